//! The structs and enums of the C interface. cbindgen copies these comments into `ddtas.h`, so they are
//! written for a C reader.

use std::ffi::{c_char, c_void};
use std::mem::offset_of;

pub use crate::loss::LossScalars;
use crate::loss::LossSettings;

/// A struct whose first field is its size in the caller's header, a `usize`.
///
/// # Safety
/// The struct must be `#[repr(C)]`, begin with that `usize`, and hold any bits.
pub unsafe trait Versioned: Copy {
    /// Its name in C.
    const NAME: &'static str;
    /// Its size in the first published header: no caller has a smaller one.
    const FIRST_BYTES: usize;

    /// The struct with the values of fields that an older header lacks; zeros by default.
    fn initial() -> Self {
        // SAFETY: any bits make a `Self`.
        unsafe { std::mem::zeroed() }
    }
}

/// Version of the binary interface these headers describe. It changes when a program built against an
/// older header could no longer run; structs that grow at their end do not change it.
pub const DDTAS_ABI_VERSION: u32 = 1;

/// Index that stands for "no reference left" in what ddtas_nearest writes.
pub const DDTAS_NO_NEIGHBOUR: u32 = u32::MAX;

/// Entry of ddtas_rows.identity_list for an anchor that is not among the references.
pub const DDTAS_ABSENT: u32 = u32::MAX;

/// Outcome of a call. For every failure the context keeps a message, unless the context itself is unusable:
/// see ddtas_context_message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum Status {
    /// The call succeeded.
    Ok = 0,
    /// A pointer that is needed is NULL.
    NullPointer = 1,
    /// A pointer is not aligned to what it points to.
    Misaligned = 2,
    /// `struct_size` is not one that this library knows: set it to sizeof the struct, and its other bytes to
    /// zero.
    StructSize = 3,
    /// A setting or an enum value is out of its range.
    InvalidValue = 4,
    /// No rows, no dimensions, sizes that disagree, or sizes that no memory could hold.
    InvalidShape = 5,
    /// A row holds a NaN or an infinity.
    NotFinite = 6,
    /// A row is not of unit L2 norm.
    NotUnit = 7,
    /// ddtas_threshold_gradient without the loss it continues, or a step of a part without the step before
    /// it.
    OutOfOrder = 8,
    /// A device that this build or this machine does not have, or that cannot do what was asked.
    Unavailable = 9,
    /// The GPU driver refused a call.
    Device = 10,
    /// There is not enough memory for the call.
    OutOfMemory = 11,
    /// A fault of this library. Nothing was written; the context can be used again. Please report it.
    Internal = 12,
}

/// Type of the values behind ddtas_rows.embeddings. Gradients and tangents are float throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum Dtype {
    /// IEEE single precision, `float`.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
}

/// The memory that rows are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum Memory {
    /// Host memory. Every device takes it; a GPU copies the rows.
    Host = 0,
    /// The memory of the context's GPU. Nothing is copied; gradients are written there.
    Device = 1,
}

/// Says which reference is the same row as an anchor; the two are never a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum Identity {
    /// Unknown: an anchor that is also a reference is recognised by its value and left out of the positives.
    ByValue = 0,
    /// Reference ddtas_rows.identity_first + i is anchor i.
    From = 1,
    /// Entry i of ddtas_rows.identity_list is the reference that is anchor i.
    List = 2,
}

/// Which pairs enter the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum MiningMode {
    /// Adaptive asymmetric sample mining, the method's own.
    AtAsms = 0,
    /// Asymmetric sample mining with fixed tolerances.
    Asms = 1,
    /// One tolerance for both kinds of pairs.
    Symmetric = 2,
    /// Every pair of an anchor that has pairs of both kinds.
    None = 3,
}

/// Whether rows are checked before use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum RowCheck {
    /// Every row is checked for NaN, infinity and unit norm.
    Check = 0,
    /// The caller vouches for the rows. Rows that fail the check give a meaningless loss, no worse.
    Trust = 1,
}

/// The stream that a GPU context works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum StreamMode {
    /// A stream of the context's own. The caller's work must be complete before a call.
    Own = 0,
    /// ddtas_context_options.stream, in order with what the caller issues there.
    Given = 1,
}

/// Options of a context. All bytes zero but struct_size mean the defaults.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ContextOptions {
    /// sizeof(ddtas_context_options).
    pub struct_size: usize,
    /// "cpu", "cuda", "cuda:N", or "auto": the first GPU if there is one, else the CPU. NULL is "auto".
    pub device: *const c_char,
    /// Threads of a CPU context, which compute while the calling one waits: 1 to 1024; 0 means as many as
    /// RAYON_NUM_THREADS says, else one per core. The result is the same bit for bit whatever their number.
    pub threads: usize,
    /// Bytes for the pairs kept between passes; what does not fit is computed again, with the same result bit
    /// for bit on the CPU. 0 means the default: 6 KiB per row on the CPU, a quarter of the free memory on a
    /// GPU.
    pub workspace_bytes: usize,
    /// A CUstream or cudaStream_t of that GPU's primary context, with DDTAS_STREAM_MODE_GIVEN;
    /// NULL is then the default stream. It must outlive the context.
    pub stream: *mut c_void,
    /// A ddtas_stream_mode.
    pub stream_mode: i32,
    /// If not 0, a GPU multiplies float rows with TF32's precision, in a third of the work or less: entries
    /// rounded to 11 significant bits (those below 6e-5 to an absolute 3e-8), products summed in float. It
    /// permits and does not demand: the CPU, whether named or found by "auto", always computes in float.
    pub allow_tf32: i32,
}

/// Mining and loss. ddtas_settings_init fills in the paper's values.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Settings {
    /// sizeof(ddtas_settings).
    pub struct_size: usize,
    /// A ddtas_mining_mode.
    pub mining: i32,
    /// A ddtas_row_check.
    pub row_check: i32,
    /// Tolerance of mining, in units of cosine similarity: 0 to 2, paper 0.1.
    pub gamma: f64,
    /// The negative tolerance over gamma: 0 to 10, paper 0.1.
    pub negative_ratio: f64,
    /// The probe's tolerance over gamma: 0 to 10, paper 0.1.
    pub probe_ratio: f64,
    /// Factor k of the adaptation: 0 to 1, paper 0.5.
    pub tolerance: f64,
    /// Sharpness of the negative term: above 0, at most 10000; paper 40.
    pub alpha: f64,
    /// Sharpness of the positive term: above 0, at most 10000; paper 2.
    pub beta: f64,
    /// Loss threshold of the positive term, a cosine similarity: -2 to 2, paper 0.7.
    pub lambda_pos: f64,
    /// Loss threshold of the negative term, a cosine similarity: -2 to 2, paper 0.7.
    pub lambda_neg: f64,
    /// 1: rows may have any length but 0. They are normalised, and gradients are with respect to the rows as
    /// given; no ddtas_threshold_gradient can follow. For ddtas_enqueue_loss, and ddtas_loss of host rows. 0:
    /// rows have unit length.
    pub normalize: u64,
}

/// Embeddings with their labels. The library reads them during a call and keeps no pointer.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Rows {
    /// sizeof(ddtas_rows).
    pub struct_size: usize,
    /// `count` rows of `dim` values of the type `dtype`, each row of unit L2 norm unless
    /// ddtas_settings.normalize is 1.
    pub embeddings: *const c_void,
    /// `count` labels. A row with a negative label takes part in no pair; a loss checks it all the same: fill
    /// it with a unit vector, any one, rather than zeros.
    pub labels: *const i64,
    /// Number of rows: 1 to 2^31 - 1; 0 for a part without anchors, whose embeddings and labels may be NULL.
    pub count: usize,
    /// Values of a row: 1 to 2^31 - 1.
    pub dim: usize,
    /// Values from the beginning of a row to that of the next: `dim` or more, 0 for `dim`.
    /// More than `dim` costs a copy of the rows; in device memory it must be `dim` or 0.
    pub row_stride: usize,
    /// A ddtas_dtype.
    pub dtype: i32,
    /// A ddtas_memory; the same for all rows of a call.
    pub memory: i32,
    /// For the references of a loss: a ddtas_identity, how the anchors are identified among them.
    pub identity: i32,
    /// With DDTAS_IDENTITY_FROM: the reference that is the first anchor; the others follow it.
    pub identity_first: u32,
    /// With DDTAS_IDENTITY_LIST: a reference for each anchor, or DDTAS_ABSENT. Host memory.
    pub identity_list: *const u32,
}

/// Result of ddtas_loss, and of the four steps of a part together. The caller sets struct_size and the
/// pointers, NULL (all bytes zero) for what it does not want; the library sets the rest, and only if the call
/// succeeds.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LossResult {
    /// sizeof(ddtas_loss_result).
    pub struct_size: usize,
    /// dL/d(anchors), float, `count` rows of `dim`; in the square form the whole gradient.
    /// In the same memory as the rows; NULL is allowed only for host rows.
    pub gradient: *mut f32,
    /// As ddtas_rows.row_stride, for `gradient`. What lies between two rows is left alone.
    pub gradient_stride: usize,
    /// dL/d(references), float, likewise. NULL in the square form.
    pub reference_gradient: *mut f32,
    /// As ddtas_rows.row_stride, for `reference_gradient`.
    pub reference_gradient_stride: usize,
    /// Host memory, an entry per anchor: smallest similarity to a positive, +inf without one.
    pub min_pos: *mut f32,
    /// Host memory, an entry per anchor: largest similarity to a negative, -inf without one.
    pub max_neg: *mut f32,
    /// Host memory, an entry per anchor: positives that are mined.
    pub count_pos: *mut u32,
    /// Host memory, an entry per anchor: negatives that are mined.
    pub count_neg: *mut u32,
    /// The loss L.
    pub loss: f64,
    /// dL/d(lambda_pos).
    pub dloss_dlambda_pos: f64,
    /// dL/d(lambda_neg).
    pub dloss_dlambda_neg: f64,
    /// The positive tolerance in force, after adaptation; +inf with DDTAS_MINING_MODE_NONE.
    pub gamma_pos: f64,
    /// The negative tolerance in force, likewise.
    pub gamma_neg: f64,
    /// Mean similarity over all positive pairs; NaN if there is none.
    pub mean_pos: f64,
    /// Mean similarity over all negative pairs; NaN if there is none.
    pub mean_neg: f64,
    /// Ordered positive pairs of the batch.
    pub total_pos: u64,
    /// Negatives that passed the probe.
    pub probe_neg: u64,
    /// Anchors that enter the loss: those with both kinds of mined pairs.
    pub active: u64,
    /// Positive pairs that enter the loss.
    pub mined_pos: u64,
    /// Negative pairs that enter the loss.
    pub mined_neg: u64,
    /// Ordered negative pairs of the batch.
    pub total_neg: u64,
}

/// A part of a batch, and what the caller has gathered from all parts. Each step reads the fields whose
/// comments name it, and ignores the others. Arrays are in host memory. The first step needs struct_size and
/// `total` only; all other bytes are zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Part {
    /// sizeof(ddtas_part).
    pub struct_size: usize,
    /// Every step: the number of anchors of all parts, B of the factor 1/B. At least 1.
    pub total: usize,
    /// From the sweep on: the number of references that are anchors of some part; these come first. The
    /// arrays `reference_...` below have as many entries. References without an entry, such as those of a
    /// memory bank, select nothing. At most the number of references.
    pub reference_numbers: usize,
    /// ddtas_sweep: ddtas_loss_result.min_pos of each anchor, over all of its pairs.
    pub min_pos: *const f32,
    /// ddtas_sweep: the same of the references.
    pub reference_min_pos: *const f32,
    /// ddtas_select: ddtas_loss_result.max_neg of each anchor, over all of its pairs.
    pub max_neg: *const f32,
    /// ddtas_select: the same of the references.
    pub reference_max_neg: *const f32,
    /// ddtas_select: the sum of ddtas_loss_result.probe_neg of all parts.
    pub probe_neg: u64,
    /// ddtas_select: the sum of ddtas_loss_result.total_pos of all parts.
    pub total_pos: u64,
    /// ddtas_gradient: ddtas_loss_result.count_pos of each anchor, over all of its pairs.
    pub count_pos: *const u32,
    /// ddtas_gradient: the same of the references.
    pub reference_count_pos: *const u32,
    /// ddtas_gradient: ddtas_loss_result.count_neg of each anchor, over all of its pairs.
    pub count_neg: *const u32,
    /// ddtas_gradient: the same of the references.
    pub reference_count_neg: *const u32,
}

/// The derivative of the embeddings along a direction, for ddtas_threshold_gradient. In the same memory as
/// the rows.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Tangents {
    /// sizeof(ddtas_tangents).
    pub struct_size: usize,
    /// The anchors' tangent, float, one row per anchor.
    pub anchors: *const f32,
    /// As ddtas_rows.row_stride, for `anchors`.
    pub anchor_stride: usize,
    /// The references' tangent; NULL if they do not move. Ignored in the square form.
    pub references: *const f32,
    /// As ddtas_rows.row_stride, for `references`.
    pub reference_stride: usize,
}

// Integers, floats and raw pointers hold any bits. FIRST_BYTES is the end of the last field of version 1;
// fields that are added later go behind it and do not change it.

// SAFETY: #[repr(C)], struct_size first, any bits are valid.
unsafe impl Versioned for ContextOptions {
    const NAME: &'static str = "ddtas_context_options";
    const FIRST_BYTES: usize = offset_of!(Self, allow_tf32) + size_of::<i32>();
}

// SAFETY: #[repr(C)], struct_size first, any bits are valid.
unsafe impl Versioned for Settings {
    const NAME: &'static str = "ddtas_settings";
    const FIRST_BYTES: usize = offset_of!(Self, lambda_neg) + size_of::<f64>();

    fn initial() -> Self {
        let paper = LossSettings::default();
        Self {
            struct_size: size_of::<Self>(),
            mining: MiningMode::AtAsms as i32,
            row_check: RowCheck::Check as i32,
            gamma: paper.gamma,
            negative_ratio: paper.negative_ratio,
            probe_ratio: paper.probe_ratio,
            tolerance: paper.tolerance,
            alpha: paper.alpha,
            beta: paper.beta,
            lambda_pos: paper.lambda_pos,
            lambda_neg: paper.lambda_neg,
            normalize: 0,
        }
    }
}

// SAFETY: #[repr(C)], struct_size first, any bits are valid.
unsafe impl Versioned for Rows {
    const NAME: &'static str = "ddtas_rows";
    const FIRST_BYTES: usize = offset_of!(Self, memory) + size_of::<i32>();
}

// SAFETY: #[repr(C)], struct_size first, any bits are valid.
unsafe impl Versioned for LossResult {
    const NAME: &'static str = "ddtas_loss_result";
    const FIRST_BYTES: usize = offset_of!(Self, mined_neg) + size_of::<u64>();
}

// SAFETY: #[repr(C)], struct_size first, any bits are valid.
unsafe impl Versioned for Part {
    const NAME: &'static str = "ddtas_part";
    const FIRST_BYTES: usize = offset_of!(Self, reference_count_neg) + size_of::<*const u32>();
}

// SAFETY: #[repr(C)], struct_size first, any bits are valid.
unsafe impl Versioned for Tangents {
    const NAME: &'static str = "ddtas_tangents";
    const FIRST_BYTES: usize = offset_of!(Self, reference_stride) + size_of::<usize>();
}
