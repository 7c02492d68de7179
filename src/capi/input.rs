//! From C to Rust: every pointer, size and enum value is checked here, before anything is read through it.

use std::ffi::c_void;

use half::{bf16, f16};
use ndarray::ArrayView2;

use super::failure::{Failure, Outcome};
use super::types::{Identity, Memory, MiningMode, RowCheck, Rows, Settings, Status, Versioned};
use crate::loss::{self, ElementType, Embeddings, LossSettings, Mining, UnitCheck};

/// Largest struct_size: a larger one is memory that was not initialised.
const LARGEST_STRUCT: usize = 4096;
/// Rows and dimensions that the passes count with 32 bits.
const LARGEST_COUNT: usize = (1 << 31) - 1;

/// Refuses NULL and addresses that are no multiple of `alignment`.
pub fn check_pointer(name: &str, address: *const c_void, alignment: usize) -> Outcome<()> {
    if address.is_null() {
        return Err(Failure::new(Status::NullPointer, format!("{name} is NULL")));
    }
    if !address.addr().is_multiple_of(alignment) {
        let message = format!("{name} = {address:p} is not aligned to {alignment} bytes");
        return Err(Failure::new(Status::Misaligned, message));
    }
    Ok(())
}

/// As [`check_pointer`], for a pointer to `T`.
pub fn check_typed<T>(name: &str, address: *const T) -> Outcome<()> {
    check_pointer(name, address.cast(), align_of::<T>())
}

/// Refuses a struct_size that no version of the header has. Every sizeof is a multiple of the alignment, and
/// no field is larger than that: what passes does not end inside a field, a pointer perhaps.
pub fn check_size<T: Versioned>(size: usize) -> Outcome<()> {
    if (T::FIRST_BYTES..=LARGEST_STRUCT).contains(&size) && size.is_multiple_of(align_of::<T>()) {
        return Ok(());
    }
    Err(wrong_size::<T>(size, &format!("set it to sizeof({}), here {}", T::NAME, size_of::<T>())))
}

fn wrong_size<T: Versioned>(size: usize, why: &str) -> Failure {
    Failure::new(Status::StructSize, format!("{}.struct_size = {size}: {why}", T::NAME))
}

/// Reads a struct of any version: fields that the caller's header lacks get their initial value; fields that
/// this library does not know must be zero, that is unused.
///
/// # Safety
/// `pointer` is NULL, misaligned, or leads to a `usize` and, if that is a size within the limits, to as many
/// bytes.
pub unsafe fn read<T: Versioned>(pointer: *const T) -> Outcome<T> {
    check_typed(T::NAME, pointer)?;
    // SAFETY: the caller's promise; `check_typed` checked the alignment.
    let size = unsafe { pointer.cast::<usize>().read() };
    check_size::<T>(size)?;
    let known = size.min(size_of::<T>());
    let mut value = T::initial();
    // SAFETY: both are at least `known` bytes long, and any bits make a `T`.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    // SAFETY: the caller's promise: `size` bytes.
    let newer = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if newer.iter().any(|&byte| byte != 0) {
        let why =
            concat!("the program uses a field that this version, ", env!("CARGO_PKG_VERSION"), ", lacks");
        return Err(wrong_size::<T>(size, why));
    }
    Ok(value)
}

/// Writes back as much of a struct as the caller's version has.
///
/// # Safety
/// [`read`] has accepted `pointer`, and nothing was changed there since.
pub unsafe fn write_back<T: Versioned>(pointer: *mut T, value: &T) {
    // SAFETY: `read` has read it from there.
    let size = unsafe { pointer.cast::<usize>().read() };
    let known = size.min(size_of::<T>());
    // SAFETY: both are at least `known` bytes long.
    unsafe { std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), pointer.cast::<u8>(), known) };
}

/// The variant that an enum's integer stands for.
pub fn choose<T: Copy>(name: &str, value: i32, variants: &[T]) -> Outcome<T> {
    usize::try_from(value).ok().and_then(|index| variants.get(index)).copied().ok_or_else(|| {
        let message = format!("{name} = {value} is out of range: 0 to {}", variants.len() - 1);
        Failure::new(Status::InvalidValue, message)
    })
}

/// Reads settings; NULL stands for the defaults. Ranges are checked by the backend.
///
/// # Safety
/// As [`read`], or NULL.
pub unsafe fn settings(pointer: *const Settings) -> Outcome<(LossSettings, UnitCheck, bool)> {
    // SAFETY: handed on to the caller.
    let given = if pointer.is_null() { Settings::initial() } else { unsafe { read(pointer) }? };
    let modes = [MiningMode::AtAsms, MiningMode::Asms, MiningMode::Symmetric, MiningMode::None];
    let mining = match choose("mining", given.mining, &modes)? {
        MiningMode::AtAsms => Mining::AtAsms,
        MiningMode::Asms => Mining::Asms,
        MiningMode::Symmetric => Mining::Symmetric,
        MiningMode::None => Mining::None,
    };
    let check = match choose("row_check", given.row_check, &[RowCheck::Check, RowCheck::Trust])? {
        RowCheck::Check => UnitCheck::Check,
        RowCheck::Trust => UnitCheck::Trust,
    };
    let settings = LossSettings {
        mining,
        gamma: given.gamma,
        negative_ratio: given.negative_ratio,
        probe_ratio: given.probe_ratio,
        tolerance: given.tolerance,
        alpha: given.alpha,
        beta: given.beta,
        lambda_pos: given.lambda_pos,
        lambda_neg: given.lambda_neg,
    };
    if given.normalize > 1 {
        let message = format!("normalize = {} is out of range: 0 or 1", given.normalize);
        return Err(Failure::new(Status::InvalidValue, message));
    }
    Ok((settings, check, given.normalize == 1))
}

/// The size and stride of a matrix that fits the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub count: usize,
    pub dim: usize,
    /// Elements from row to row, at least `dim`.
    pub stride: usize,
}

impl Extent {
    /// Checks sizes, and that the matrix ends within the address space.
    pub fn new(name: &str, count: usize, dim: usize, stride: usize, element: usize) -> Outcome<Self> {
        let refused = |message: String| Err(Failure::new(Status::InvalidShape, message));
        if count == 0 || dim == 0 {
            return refused(format!("the {name} are empty: at least one row and one dimension are needed"));
        }
        if count > LARGEST_COUNT || dim > LARGEST_COUNT {
            return refused(format!("the {name} have {count} rows of {dim}: at most 2^31 - 1 of either"));
        }
        let stride = if stride == 0 { dim } else { stride };
        if stride < dim {
            return refused(format!("the row stride of the {name}, {stride}, is less than a row of {dim}"));
        }
        let bytes = (count - 1)
            .checked_mul(stride)
            .and_then(|elements| elements.checked_add(dim))
            .and_then(|elements| elements.checked_mul(element));
        // A row of labels or results takes at most 8 bytes, and has as many entries.
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) || isize::try_from(count * 8).is_err() {
            return refused(format!(
                "the {name}, {count} rows {stride} values apart, exceed the address space"
            ));
        }
        Ok(Self { count, dim, stride })
    }

    /// As [`Extent::new`], for a matrix that may have no rows.
    pub fn or_none(name: &str, count: usize, dim: usize, stride: usize, element: usize) -> Outcome<Self> {
        Ok(Self { count, ..Self::new(name, count.max(1), dim, stride, element)? })
    }
}

/// One side of a batch, checked but for the contents of its memory.
#[derive(Debug, Clone, Copy)]
pub struct CheckedRows {
    pub embeddings: *const c_void,
    /// NULL only if labels are not used.
    pub labels: *const i64,
    pub extent: Extent,
    pub dtype: ElementType,
    pub memory: Memory,
    identity: CheckedIdentity,
}

/// How anchors are identified among the references.
#[derive(Debug, Clone, Copy)]
enum CheckedIdentity {
    ByValue,
    From(usize),
    List(*const u32),
}

/// What a call requires of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Labels are not used.
    Unlabelled,
    /// One side of a loss, or the only rows of a call.
    Labelled,
    /// The anchors of a part: there may be none.
    OfPart,
}

impl CheckedRows {
    /// Reads and checks rows.
    ///
    /// # Safety
    /// As [`read`].
    pub unsafe fn read(name: &str, pointer: *const Rows, role: Role) -> Outcome<Self> {
        // SAFETY: handed on to the caller.
        let rows = unsafe { Self::read_side(name, pointer, role) }?;
        if !matches!(rows.identity, CheckedIdentity::ByValue) {
            let message = format!("identity is set in the {name}: it belongs to the references of a loss");
            return Err(Failure::new(Status::InvalidValue, message));
        }
        Ok(rows)
    }

    /// # Safety
    /// As [`read`].
    unsafe fn read_side(name: &str, pointer: *const Rows, role: Role) -> Outcome<Self> {
        if pointer.is_null() {
            return Err(Failure::new(Status::NullPointer, format!("{name} is NULL")));
        }
        // SAFETY: handed on to the caller.
        let rows = unsafe { read(pointer) }?;
        let dtype = choose("dtype", rows.dtype, &ElementType::ALL)?;
        let memory = choose("memory", rows.memory, &[Memory::Host, Memory::Device])?;
        let none = role == Role::OfPart && rows.count == 0;
        let sized = if none { Extent::or_none } else { Extent::new };
        let extent = sized(name, rows.count, rows.dim, rows.row_stride, dtype.bytes())?;
        if !none {
            check_pointer(&format!("{name}.embeddings"), rows.embeddings, dtype.bytes())?;
        }
        if !none && (role != Role::Unlabelled || !rows.labels.is_null()) {
            check_typed(&format!("{name}.labels"), rows.labels)?;
        }
        let ways = [Identity::ByValue, Identity::From, Identity::List];
        let identity = match choose("identity", rows.identity, &ways)? {
            Identity::ByValue => CheckedIdentity::ByValue,
            Identity::From => CheckedIdentity::From(rows.identity_first as usize),
            Identity::List => {
                check_typed(&format!("{name}.identity_list"), rows.identity_list)?;
                CheckedIdentity::List(rows.identity_list)
            }
        };
        if memory == Memory::Device && extent.stride != extent.dim {
            let message =
                format!("the {name} lie in device memory: their row stride must be their dimension");
            return Err(Failure::new(Status::InvalidShape, message));
        }
        Ok(Self { embeddings: rows.embeddings, labels: rows.labels, extent, dtype, memory, identity })
    }

    /// The second side of a call, or none for NULL; it must fit the first.
    ///
    /// # Safety
    /// As [`read`], or NULL.
    pub unsafe fn read_against(first: &Self, pointer: *const Rows, role: Role) -> Outcome<Option<Self>> {
        if pointer.is_null() {
            return Ok(None);
        }
        let rows = match role {
            // SAFETY: handed on to the caller.
            Role::Unlabelled => unsafe { Self::read("references", pointer, role) },
            // SAFETY: as above.
            Role::Labelled | Role::OfPart => unsafe {
                Self::read_side("references", pointer, Role::Labelled)
            },
        }?;
        if rows.memory != first.memory || rows.dtype != first.dtype {
            let message = "the references have another dtype or memory than the rows compared with them";
            return Err(Failure::new(Status::InvalidValue, message));
        }
        loss::validate_dims(first.extent.dim, rows.extent.dim)?;
        if rows.memory == Memory::Device && !matches!(rows.identity, CheckedIdentity::ByValue) {
            let message = "identity by index takes rows in host memory only: \
                           rows in device memory are not supported yet";
            return Err(Failure::new(Status::Unavailable, message));
        }
        Ok(Some(rows))
    }

    /// Which of these references the `count` anchors are.
    ///
    /// # Safety
    /// A list leads to `count` entries, and nobody writes to it during `'a`.
    pub unsafe fn identity<'a>(&self, count: usize) -> loss::Identity<'a> {
        match self.identity {
            CheckedIdentity::ByValue => loss::Identity::ByValue,
            CheckedIdentity::From(first) => loss::Identity::From(first),
            // SAFETY: the caller's promise.
            CheckedIdentity::List(list) => loss::Identity::List(unsafe { slice(list, count) }),
        }
    }

    /// The rows as a backend takes them: in place, or gathered if they are strided.
    ///
    /// # Safety
    /// The memory is the host's, as long as the extent says, and nobody writes to it during `'a`.
    pub unsafe fn view<'a>(&self, buffer: &'a mut RowBuffer) -> Outcome<loss::Rows<'a>> {
        let first = self.embeddings;
        let embeddings = match self.dtype {
            ElementType::F32 => {
                // SAFETY: handed on to the caller; any bits make a float.
                let values = unsafe { matrix(first.cast(), self.extent, &mut buffer.f32) };
                Embeddings::F32(values?)
            }
            ElementType::F16 => {
                // SAFETY: as above.
                let values = unsafe { matrix(first.cast(), self.extent, &mut buffer.f16) };
                Embeddings::F16(values?)
            }
            ElementType::Bf16 => {
                // SAFETY: as above.
                let values = unsafe { matrix(first.cast(), self.extent, &mut buffer.bf16) };
                Embeddings::Bf16(values?)
            }
        };
        let labels = if self.labels.is_null() {
            reserve(&mut buffer.no_labels, self.extent.count)?;
            buffer.no_labels.resize(self.extent.count, 0);
            &buffer.no_labels
        } else {
            // SAFETY: the caller's promise; alignment and length were checked when it was read.
            unsafe { slice(self.labels, self.extent.count) }
        };
        Ok(loss::Rows { embeddings, labels })
    }
}

/// The caller's values; the pointer may be NULL if `length` is 0.
///
/// # Safety
/// Unless `length` is 0, `first` is aligned and leads to as many values, which nobody changes during `'a`.
pub unsafe fn slice<'a, T>(first: *const T, length: usize) -> &'a [T] {
    // SAFETY: handed on to the caller.
    if length == 0 { &[] } else { unsafe { std::slice::from_raw_parts(first, length) } }
}

/// Both sides of a batch as a backend takes them.
///
/// # Safety
/// As [`CheckedRows::view`] and [`CheckedRows::identity`].
pub unsafe fn batch<'a>(
    anchors: &CheckedRows,
    references: Option<&CheckedRows>,
    buffers: [&'a mut RowBuffer; 2],
) -> Outcome<loss::Batch<'a>> {
    let [own, other] = buffers;
    // SAFETY: handed on to the caller.
    let rows = unsafe { anchors.view(own) }?;
    let Some(references) = references else { return Ok(loss::Batch::square(rows.embeddings, rows.labels)) };
    // SAFETY: as above.
    let against = unsafe { references.view(other) }?;
    // SAFETY: as above.
    let identity = unsafe { references.identity(anchors.extent.count) };
    Ok(loss::Batch::rectangular(rows, against).with_identity(identity))
}

/// Buffers that strided rows are gathered in, kept from call to call.
#[derive(Debug, Default)]
pub struct RowBuffer {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    no_labels: Vec<i64>,
}

/// A matrix of the caller's: in place, or gathered if its rows are strided.
///
/// # Safety
/// The memory is the host's, as long as `extent` says, and nobody writes to it during `'a`.
pub unsafe fn matrix<'a, T: Copy>(
    first: *const T,
    extent: Extent,
    buffer: &'a mut Vec<T>,
) -> Outcome<ArrayView2<'a, T>> {
    let Extent { count, dim, stride } = extent;
    let values = if stride == dim {
        // SAFETY: the caller's promise; `Extent` has checked that the length fits the address space.
        unsafe { slice(first, count * dim) }
    } else {
        buffer.clear();
        reserve(buffer, count * dim)?;
        // Row by row: what lies between two rows may be anything, and may be written by others.
        for row in 0..count {
            // SAFETY: the caller's promise.
            let row = unsafe { std::slice::from_raw_parts(first.add(row * stride), dim) };
            buffer.extend_from_slice(row);
        }
        buffer
    };
    ArrayView2::from_shape((count, dim), values)
        .map_err(|error| Failure::new(Status::Internal, format!("a matrix has another shape: {error}")))
}

/// Reserves room for `length` values, or fails if there is none.
pub fn reserve<T>(buffer: &mut Vec<T>, length: usize) -> Outcome<()> {
    let more = length.saturating_sub(buffer.len());
    buffer.try_reserve_exact(more).map_err(|_| {
        let bytes = length.saturating_mul(size_of::<T>());
        Failure::new(Status::OutOfMemory, format!("{bytes} bytes of memory could not be allocated"))
    })
}
