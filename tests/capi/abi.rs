//! The C ABI as a backend: every pass calls its functions, with packed or strided rows.

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};
use std::sync::Arc;

use ddtas::backend::{Backend, Nearest};
use ddtas::capi::*;
use ddtas::loss::{
    self, Batch, Embeddings, LossOutput, LossSettings, Mining, PairTotals, RowNumbers, ThresholdGradient,
    UnitCheck,
};
use ddtas::{Error, Result};
use ndarray::{Array2, ArrayView2};

/// A context, destroyed on drop.
pub(crate) struct Handle(pub(crate) *mut Context);

// The header allows sharing a context between threads: it locks itself.
unsafe impl Send for Handle {}
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        unsafe { ddtas_context_destroy(self.0) };
    }
}

/// A backend that calls the C ABI.
#[derive(Clone)]
pub(crate) struct Abi {
    pub(crate) handle: Arc<Handle>,
    /// Elements between the end of a row and the next one.
    pub(crate) gap: usize,
    pub(crate) memory: Memory,
}

/// The arrays and the result that a function wrote.
pub(crate) struct Answer {
    min_pos: Vec<f32>,
    max_neg: Vec<f32>,
    count_pos: Vec<u32>,
    count_neg: Vec<u32>,
    pub(crate) gradient: Array2<f32>,
    pub(crate) reference_gradient: Option<Array2<f32>>,
    pub(crate) result: LossResult,
}

/// A float and a count that no loss writes for an anchor: initial values, to detect what was written.
const UNTOUCHED: (f32, u32) = (-7.0, u32::MAX);

impl Answer {
    /// Which of m+, m-, both counts and the gradient were written.
    fn written(&self) -> [bool; 4] {
        let floats = |values: &[f32]| values.iter().any(|value| *value != UNTOUCHED.0);
        let counts = |values: &[u32]| values.iter().any(|value| *value != UNTOUCHED.1);
        let counted = counts(&self.count_pos);
        assert_eq!(counted, counts(&self.count_neg));
        // A row that was not written still holds GAP, a NaN.
        let gradient = self.gradient.iter().any(|value| !value.is_nan());
        [floats(&self.min_pos), floats(&self.max_neg), counted, gradient]
    }
}

/// Byte between rows: NaN in every type, so that reading it spoils the results; tests check that it stays.
const GAP: u8 = 0xff;

/// Rows in the caller's layout, kept alive for a call.
pub(crate) struct Laid {
    bytes: Vec<u64>,
    pub(crate) rows: Rows,
}

fn bytes_of(embeddings: &Embeddings<'_>) -> (usize, Vec<u8>) {
    match embeddings {
        Embeddings::F32(m) => (4, bytemuck::cast_slice(m.as_slice().unwrap()).to_vec()),
        Embeddings::F16(m) => (2, bytemuck::cast_slice(m.as_slice().unwrap()).to_vec()),
        Embeddings::Bf16(m) => (2, bytemuck::cast_slice(m.as_slice().unwrap()).to_vec()),
    }
}

/// Spreads rows of `width` bytes out over `stride` bytes each, in memory aligned to 8.
fn spread(packed: &[u8], width: usize, stride: usize) -> Vec<u64> {
    let count = packed.len() / width;
    let mut words = vec![u64::from_ne_bytes([GAP; 8]); (count * stride).div_ceil(8)];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    for (row, values) in packed.chunks_exact(width).enumerate() {
        bytes[row * stride..][..width].copy_from_slice(values);
    }
    words
}

/// A strided float matrix that a function writes to.
pub(crate) struct Target {
    words: Vec<u64>,
    shape: (usize, usize),
    stride: usize,
}

impl Target {
    pub(crate) fn new(shape: (usize, usize), gap: usize) -> Self {
        let stride = shape.1 + gap;
        let words = vec![u64::from_ne_bytes([GAP; 8]); (shape.0 * stride * 4).div_ceil(8)];
        Self { words, shape, stride }
    }

    pub(crate) fn pointer(&mut self) -> *mut f32 {
        self.words.as_mut_ptr().cast()
    }

    pub(crate) fn read(&self) -> Array2<f32> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        let (count, dim) = self.shape;
        for row in 0..count {
            let gap = &bytes[(row * self.stride + dim) * 4..(row + 1) * self.stride * 4];
            assert!(gap.iter().all(|&byte| byte == GAP), "row {row}: the space behind it was written to");
        }
        let values: &[f32] = bytemuck::cast_slice(bytes);
        Array2::from_shape_fn((count, dim), |(i, d)| values[i * self.stride + d])
    }
}

impl Abi {
    pub(crate) fn open(device: &str, threads: usize, gap: usize, memory: Memory) -> Self {
        let device = CString::new(device).unwrap();
        let options = ContextOptions {
            struct_size: size_of::<ContextOptions>(),
            device: device.as_ptr(),
            threads,
            workspace_bytes: 0,
            stream: null_mut(),
            stream_mode: 0,
            allow_tf32: 0,
        };
        let mut context = null_mut();
        let status = unsafe { ddtas_context_create(&raw const options, &raw mut context, null_mut(), 0) };
        assert_eq!(status, Status::Ok);
        Self { handle: Arc::new(Handle(context)), gap, memory }
    }

    pub(crate) fn lay(&self, rows: &ddtas::loss::Rows<'_>) -> Laid {
        let (element, packed) = bytes_of(&rows.embeddings);
        let dim = rows.embeddings.dim();
        let stride = dim + self.gap;
        let bytes = spread(&packed, dim * element, stride * element);
        let dtype = match rows.embeddings {
            Embeddings::F32(_) => Dtype::F32,
            Embeddings::F16(_) => Dtype::F16,
            Embeddings::Bf16(_) => Dtype::Bf16,
        };
        let rows = Rows {
            struct_size: size_of::<Rows>(),
            embeddings: bytes.as_ptr().cast::<c_void>(),
            labels: rows.labels.as_ptr(),
            count: rows.labels.len(),
            dim,
            row_stride: stride,
            dtype: dtype as i32,
            memory: self.memory as i32,
            identity: Identity::ByValue as i32,
            identity_first: 0,
            identity_list: null(),
        };
        Laid { bytes, rows }
    }

    /// The references, with the identity that says which of them are anchors.
    pub(crate) fn lay_references(&self, batch: &Batch<'_>) -> Option<Laid> {
        let mut laid = self.lay(batch.references.as_ref()?);
        match batch.identity {
            loss::Identity::ByValue => {}
            loss::Identity::From(first) => {
                laid.rows.identity = Identity::From as i32;
                laid.rows.identity_first = first as u32;
            }
            loss::Identity::List(list) => {
                laid.rows.identity = Identity::List as i32;
                laid.rows.identity_list = list.as_ptr();
            }
        }
        Some(laid)
    }

    /// Calls a function with a result that asks for every output that `batch` has.
    pub(crate) fn evaluate(
        &self,
        batch: &Batch<'_>,
        call: impl FnOnce(*const Rows, *const Rows, *mut LossResult) -> Status,
    ) -> Result<Answer> {
        let anchors = self.lay(&batch.anchors);
        let references = self.lay_references(batch);
        let shape = |rows: &Laid| (rows.rows.count, rows.rows.dim);
        let count = anchors.rows.count;
        let mut gradient = Target::new(shape(&anchors), self.gap);
        let mut reference_gradient = references
            .as_ref()
            .filter(|_| batch.reference_gradient)
            .map(|rows| Target::new(shape(rows), 2 * self.gap));
        let mut min_pos = vec![UNTOUCHED.0; count];
        let mut max_neg = vec![UNTOUCHED.0; count];
        let mut count_pos = vec![UNTOUCHED.1; count];
        let mut count_neg = vec![UNTOUCHED.1; count];
        let mut result = LossResult {
            gradient: gradient.pointer(),
            gradient_stride: gradient.stride,
            reference_gradient: reference_gradient.as_mut().map_or(null_mut(), Target::pointer),
            reference_gradient_stride: reference_gradient.as_ref().map_or(0, |target| target.stride),
            min_pos: min_pos.as_mut_ptr(),
            max_neg: max_neg.as_mut_ptr(),
            count_pos: count_pos.as_mut_ptr(),
            count_neg: count_neg.as_mut_ptr(),
            ..empty_result()
        };
        let other = references.as_ref().map_or(null(), |rows| &raw const rows.rows);
        let status = call(&raw const anchors.rows, other, &raw mut result);
        assert_eq!(anchors.bytes.is_empty(), count == 0);
        self.check(status)?;
        let reference_gradient = reference_gradient.map(|target| target.read());
        Ok(Answer {
            min_pos,
            max_neg,
            count_pos,
            count_neg,
            gradient: gradient.read(),
            reference_gradient,
            result,
        })
    }

    pub(crate) fn message(&self) -> String {
        let length = unsafe { ddtas_context_message(self.handle.0, null_mut(), 0) };
        let mut bytes = vec![0u8; length + 1];
        let again = unsafe { ddtas_context_message(self.handle.0, bytes.as_mut_ptr().cast(), bytes.len()) };
        assert_eq!((again, bytes[length]), (length, 0));
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    /// Recall at each of `ks`, and the number of queries counted.
    pub(crate) fn recall(&self, rows: &Rows, ks: &[usize]) -> Result<(Vec<f64>, u64)> {
        let (mut recall, mut queries) = (vec![f64::NAN; ks.len()], 0u64);
        let status = unsafe {
            ddtas_recall_at_k(
                self.handle.0,
                &raw const *rows,
                ks.as_ptr(),
                ks.len(),
                recall.as_mut_ptr(),
                &raw mut queries,
            )
        };
        self.check(status).map(|()| (recall, queries))
    }

    /// Turns a failed status and its message into an error.
    pub(crate) fn check(&self, status: Status) -> Result<()> {
        if status == Status::Ok {
            assert_eq!(self.message(), "", "a call that worked leaves no message");
            return Ok(());
        }
        Err(Error::Unavailable(format!("{status:?}: {}", self.message())))
    }
}

pub(crate) fn settings_of(settings: &LossSettings, check: UnitCheck) -> Settings {
    let mining = match settings.mining {
        Mining::AtAsms => MiningMode::AtAsms,
        Mining::Asms => MiningMode::Asms,
        Mining::Symmetric => MiningMode::Symmetric,
        Mining::None => MiningMode::None,
    };
    Settings {
        struct_size: size_of::<Settings>(),
        mining: mining as i32,
        row_check: i32::from(check == UnitCheck::Trust),
        gamma: settings.gamma,
        negative_ratio: settings.negative_ratio,
        probe_ratio: settings.probe_ratio,
        tolerance: settings.tolerance,
        alpha: settings.alpha,
        beta: settings.beta,
        lambda_pos: settings.lambda_pos,
        lambda_neg: settings.lambda_neg,
        normalize: 0,
    }
}

pub(crate) fn empty_result() -> LossResult {
    // All bytes zero, as the header tells a C caller.
    let mut result: LossResult = unsafe { std::mem::zeroed() };
    result.struct_size = size_of::<LossResult>();
    result
}

fn empty_part(batch: &Batch<'_>) -> Part {
    let mut part: Part = unsafe { std::mem::zeroed() };
    (part.struct_size, part.total) = (size_of::<Part>(), batch.total());
    part
}

impl Backend for Abi {
    fn name(&self) -> String {
        let mut name = [0u8; 16];
        let length = unsafe { ddtas_context_device(self.handle.0, name.as_mut_ptr().cast(), name.len()) };
        String::from_utf8(name[..length].to_vec()).unwrap()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        let settings = settings_of(settings, batch.check);
        let handle = self.handle.0;
        let answer = self.evaluate(batch, |anchors, references, result| unsafe {
            ddtas_loss(handle, &raw const settings, anchors, references, result)
        })?;
        let result = answer.result;
        *output = LossOutput {
            loss: result.loss,
            gradient: answer.gradient,
            reference_gradient: answer.reference_gradient,
            gamma_pos: result.gamma_pos,
            gamma_neg: result.gamma_neg,
            probe_neg: result.probe_neg,
            total_pos: result.total_pos,
            total_neg: result.total_neg,
            min_pos: answer.min_pos,
            max_neg: answer.max_neg,
            count_pos: answer.count_pos,
            count_neg: answer.count_neg,
            active: result.active,
            dloss_dlambda_pos: result.dloss_dlambda_pos,
            dloss_dlambda_neg: result.dloss_dlambda_neg,
            mean_pos: result.mean_pos,
            mean_neg: result.mean_neg,
        };
        assert_eq!(output.mined(), (result.mined_pos, result.mined_neg));
        Ok(())
    }

    fn normalized_loss(&mut self, _: &Batch<'_>, _: &LossSettings, _: &mut LossOutput) -> Result<()> {
        Err(Error::Unavailable("the C ABI takes unit rows only".into()))
    }

    fn same_class(
        &mut self,
        part: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let settings = settings_of(settings, part.check);
        let given = empty_part(part);
        let handle = self.handle.0;
        let answer = self.evaluate(part, |anchors, references, result| unsafe {
            ddtas_same_class(handle, &raw const settings, anchors, references, &raw const given, result)
        })?;
        assert_eq!(answer.written()[1..], [false; 3]);
        output.min_pos = answer.min_pos;
        output.total_pos = answer.result.total_pos;
        output.total_neg = answer.result.total_neg;
        output.mean_pos = answer.result.mean_pos;
        output.mean_neg = answer.result.mean_neg;
        Ok(())
    }

    fn sweep(
        &mut self,
        part: &Batch<'_>,
        min_pos: RowNumbers<'_, f32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let given = Part {
            reference_numbers: min_pos.references.len(),
            min_pos: min_pos.anchors.as_ptr(),
            reference_min_pos: min_pos.references.as_ptr(),
            ..empty_part(part)
        };
        let handle = self.handle.0;
        let answer = self.evaluate(part, |anchors, references, result| unsafe {
            ddtas_sweep(handle, anchors, references, &raw const given, result)
        })?;
        assert_eq!(answer.written().map(u8::from), [0, u8::from(!answer.max_neg.is_empty()), 0, 0]);
        output.max_neg = answer.max_neg;
        output.probe_neg = answer.result.probe_neg;
        Ok(())
    }

    fn select(
        &mut self,
        part: &Batch<'_>,
        max_neg: RowNumbers<'_, f32>,
        PairTotals { probe_neg, total_pos }: PairTotals,
        output: &mut LossOutput,
    ) -> Result<()> {
        let given = Part {
            reference_numbers: max_neg.references.len(),
            max_neg: max_neg.anchors.as_ptr(),
            reference_max_neg: max_neg.references.as_ptr(),
            probe_neg,
            total_pos,
            ..empty_part(part)
        };
        let handle = self.handle.0;
        let answer = self.evaluate(part, |anchors, references, result| unsafe {
            ddtas_select(handle, anchors, references, &raw const given, result)
        })?;
        assert_eq!(answer.written()[..2], [false; 2]);
        (output.count_pos, output.count_neg) = (answer.count_pos, answer.count_neg);
        (output.gamma_pos, output.gamma_neg) = (answer.result.gamma_pos, answer.result.gamma_neg);
        Ok(())
    }

    fn gradient(
        &mut self,
        part: &Batch<'_>,
        count_pos: RowNumbers<'_, u32>,
        count_neg: RowNumbers<'_, u32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        assert_eq!(count_pos.references.len(), count_neg.references.len());
        let given = Part {
            reference_numbers: count_pos.references.len(),
            count_pos: count_pos.anchors.as_ptr(),
            reference_count_pos: count_pos.references.as_ptr(),
            count_neg: count_neg.anchors.as_ptr(),
            reference_count_neg: count_neg.references.as_ptr(),
            ..empty_part(part)
        };
        let handle = self.handle.0;
        let answer = self.evaluate(part, |anchors, references, result| unsafe {
            ddtas_gradient(handle, anchors, references, &raw const given, result)
        })?;
        assert_eq!(answer.written()[..3], [false; 3]);
        let result = answer.result;
        output.gradient = answer.gradient;
        (output.loss, output.active) = (result.loss, result.active);
        output.dloss_dlambda_pos = result.dloss_dlambda_pos;
        output.dloss_dlambda_neg = result.dloss_dlambda_neg;
        let mined = output.mined_of_part(count_pos.anchors, count_neg.anchors);
        assert_eq!(mined, (result.mined_pos, result.mined_neg));
        Ok(())
    }

    fn threshold_gradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<ThresholdGradient> {
        let anchors = self.lay(&batch.anchors);
        let references = self.lay_references(batch);
        let stride = tangent.ncols() + self.gap;
        // Another stride than the anchors'.
        let reference_stride = stride + self.gap;
        let spread = |m: ArrayView2<'_, f32>, stride: usize| {
            spread(bytemuck::cast_slice(m.as_slice().unwrap()), m.ncols() * 4, stride * 4)
        };
        let own = spread(tangent, stride);
        let other = reference_tangent.map(|tangent| spread(tangent, reference_stride));
        let tangents = Tangents {
            struct_size: size_of::<Tangents>(),
            anchors: own.as_ptr().cast(),
            anchor_stride: stride,
            references: other.as_ref().map_or(null(), |words| words.as_ptr().cast()),
            reference_stride,
        };
        let mut sums = ThresholdGradient::default();
        let references = references.as_ref().map_or(null(), |rows| &raw const rows.rows);
        let status = unsafe {
            ddtas_threshold_gradient(
                self.handle.0,
                &raw const anchors.rows,
                references,
                &raw const tangents,
                &raw mut sums.pos,
                &raw mut sums.neg,
            )
        };
        self.check(status).map(|()| sums)
    }

    fn nearest(
        &mut self,
        queries: &ddtas::loss::Rows<'_>,
        references: Option<&ddtas::loss::Rows<'_>>,
        k: usize,
    ) -> Result<Nearest> {
        let queries = self.lay(queries);
        let references = references.map(|rows| self.lay(rows));
        let size = (queries.rows.count, k);
        let mut found =
            Nearest { indices: Array2::zeros(size), similarities: Array2::from_elem(size, f32::NAN) };
        let references = references.as_ref().map_or(null(), |rows| &raw const rows.rows);
        let status = unsafe {
            ddtas_nearest(
                self.handle.0,
                &raw const queries.rows,
                references,
                k,
                found.indices.as_mut_ptr(),
                found.similarities.as_mut_ptr(),
            )
        };
        self.check(status).map(|()| found)
    }

    fn workspace_bytes(&self) -> usize {
        let mut bytes = 0;
        assert_eq!(unsafe { ddtas_workspace_bytes(self.handle.0, &raw mut bytes) }, Status::Ok);
        bytes
    }
}
