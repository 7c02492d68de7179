//! The C ABI against the float64 truth: the whole table of cases through its entries.
//!
//! [`Abi`] is a backend that computes by calling them, with packed and with strided rows.
//! Hostile input and sanitizers are the business of tests/capi (`.ci/linked.sh`).
#![allow(clippy::undocumented_unsafe_blocks, reason = "every call below hands in live memory of its own")]
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};
use std::sync::Arc;

use ddtas::backend::{Backend, Nearest};
use ddtas::capi::*;
use ddtas::loss::{Batch, Embeddings, Hypergradient, LossOutput, LossSettings, Mining, UnitCheck};
use ddtas::{Error, Result};
use ddtas_cases::table as cases;
use ndarray::{Array2, ArrayView2};

/// A context, destroyed by the last who has it.
struct Handle(*mut Context);

// The header allows both: a context locks itself.
unsafe impl Send for Handle {}
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        unsafe { ddtas_context_destroy(self.0) };
    }
}

/// A backend made of C calls.
#[derive(Clone)]
struct Abi {
    handle: Arc<Handle>,
    /// Elements between the end of a row and the next one.
    gap: usize,
    memory: Memory,
}

/// What lies between rows: NaN in every type, so that reading it shows; writing it is looked for.
const GAP: u8 = 0xff;

/// Rows in the caller's layout, kept alive for a call.
struct Laid {
    bytes: Vec<u64>,
    rows: Rows,
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

/// A float matrix spread out for writing, and what was written there.
struct Target {
    words: Vec<u64>,
    shape: (usize, usize),
    stride: usize,
}

impl Target {
    fn new(shape: (usize, usize), gap: usize) -> Self {
        let stride = shape.1 + gap;
        let words = vec![u64::from_ne_bytes([GAP; 8]); (shape.0 * stride * 4).div_ceil(8)];
        Self { words, shape, stride }
    }

    fn pointer(&mut self) -> *mut f32 {
        self.words.as_mut_ptr().cast()
    }

    fn read(&self) -> Array2<f32> {
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
    fn open(device: &str, threads: usize, gap: usize, memory: Memory) -> Self {
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

    fn lay(&self, rows: &ddtas::loss::Rows<'_>) -> Laid {
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
        };
        Laid { bytes, rows }
    }

    fn message(&self) -> String {
        let length = unsafe { ddtas_context_message(self.handle.0, null_mut(), 0) };
        let mut bytes = vec![0u8; length + 1];
        let again = unsafe { ddtas_context_message(self.handle.0, bytes.as_mut_ptr().cast(), bytes.len()) };
        assert_eq!((again, bytes[length]), (length, 0));
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    /// Recall at each of `ks`, and the queries that were counted.
    fn recall(&self, rows: &Rows, ks: &[usize]) -> Result<(Vec<f64>, u64)> {
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

    /// A failure as an error, which the table prints.
    fn check(&self, status: Status) -> Result<()> {
        if status == Status::Ok {
            assert_eq!(self.message(), "", "a call that worked leaves no message");
            return Ok(());
        }
        Err(Error::Training(format!("{status:?}: {}", self.message())))
    }
}

fn settings_of(settings: &LossSettings, check: UnitCheck) -> Settings {
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
    }
}

fn empty_result() -> LossResult {
    // All bytes zero, as the header tells a C caller.
    let mut result: LossResult = unsafe { std::mem::zeroed() };
    result.struct_size = size_of::<LossResult>();
    result
}

impl Backend for Abi {
    fn name(&self) -> String {
        let mut name = [0u8; 16];
        let length = unsafe { ddtas_context_device(self.handle.0, name.as_mut_ptr().cast(), name.len()) };
        String::from_utf8(name[..length].to_vec()).unwrap()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        let settings = settings_of(settings, batch.check);
        let anchors = self.lay(&batch.anchors);
        let references = batch.references.as_ref().map(|rows| self.lay(rows));
        let shape = |rows: &Laid| (rows.rows.count, rows.rows.dim);
        let count = anchors.rows.count;
        let mut gradient = Target::new(shape(&anchors), self.gap);
        let mut reference_gradient = references
            .as_ref()
            .filter(|_| batch.reference_gradient)
            .map(|rows| Target::new(shape(rows), self.gap));
        output.min_pos = vec![f32::NAN; count];
        output.max_neg = vec![f32::NAN; count];
        output.count_pos = vec![u32::MAX; count];
        output.count_neg = vec![u32::MAX; count];
        let mut result = LossResult {
            gradient: gradient.pointer(),
            gradient_stride: gradient.stride,
            reference_gradient: reference_gradient.as_mut().map_or(null_mut(), Target::pointer),
            reference_gradient_stride: reference_gradient.as_ref().map_or(0, |target| target.stride),
            min_pos: output.min_pos.as_mut_ptr(),
            max_neg: output.max_neg.as_mut_ptr(),
            count_pos: output.count_pos.as_mut_ptr(),
            count_neg: output.count_neg.as_mut_ptr(),
            ..empty_result()
        };
        let references = references.as_ref().map_or(null(), |rows| &raw const rows.rows);
        let status = unsafe {
            ddtas_loss(
                self.handle.0,
                &raw const settings,
                &raw const anchors.rows,
                references,
                &raw mut result,
            )
        };
        assert!(!anchors.bytes.is_empty());
        self.check(status)?;
        output.gradient = gradient.read();
        output.reference_gradient = reference_gradient.map(|target| target.read());
        output.loss = result.loss;
        output.gamma_pos = result.gamma_pos;
        output.gamma_neg = result.gamma_neg;
        output.probe_neg = result.probe_neg;
        output.total_pos = result.total_pos;
        output.active = result.active;
        output.dloss_dlambda_pos = result.dloss_dlambda_pos;
        output.dloss_dlambda_neg = result.dloss_dlambda_neg;
        output.mean_pos = result.mean_pos;
        output.mean_neg = result.mean_neg;
        assert_eq!(output.mined(), (result.mined_pos, result.mined_neg));
        Ok(())
    }

    fn hypergradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<Hypergradient> {
        let anchors = self.lay(&batch.anchors);
        let references = batch.references.as_ref().map(|rows| self.lay(rows));
        let stride = tangent.ncols() + self.gap;
        let spread = |m: ArrayView2<'_, f32>| {
            spread(bytemuck::cast_slice(m.as_slice().unwrap()), m.ncols() * 4, stride * 4)
        };
        let own = spread(tangent);
        let other = reference_tangent.map(spread);
        let tangents = Tangents {
            struct_size: size_of::<Tangents>(),
            anchors: own.as_ptr().cast(),
            anchor_stride: stride,
            references: other.as_ref().map_or(null(), |words| words.as_ptr().cast()),
            reference_stride: stride,
        };
        let mut sums = Hypergradient::default();
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

#[test]
fn golden_cases_agree_through_the_c_abi() {
    cases::run_all(&mut Abi::open("cpu", 0, 0, Memory::Host), cases::golden());
}

#[test]
fn every_type_and_form_agrees_with_packed_rows() {
    cases::run_all(&mut Abi::open("cpu", 2, 0, Memory::Host), cases::generated());
}

#[test]
fn every_type_and_form_agrees_with_strided_rows() {
    cases::run_all(&mut Abi::open("cpu", 1, 3, Memory::Host), cases::generated());
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = cases::golden().into_iter().find(|case| case.name == "odd_sizes_257x130").unwrap();
    let mut outputs = [1, 2, 5].map(|threads| {
        let mut output = LossOutput::default();
        Abi::open("cpu", threads, 1, Memory::Host).loss(&case.batch(), &case.settings, &mut output).unwrap();
        output
    });
    assert!(outputs[0].active > 0);
    outputs.rotate_left(1);
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[1], outputs[2]);
}

#[test]
fn recall_through_the_c_abi_is_that_of_the_library() {
    let case = cases::golden().into_iter().find(|case| case.name == "hard_many_mined").unwrap();
    let batch = case.batch();
    let (expected, _) = ddtas::retrieval::recall(
        &mut ddtas::backend::cpu::CpuBackend::new(),
        &batch.anchors,
        None,
        &[1, 2, 8],
    )
    .unwrap();
    let abi = Abi::open("cpu", 0, 5, Memory::Host);
    // Out of order, twice the same, and one far beyond the number of rows.
    let (recall, queries) = abi.recall(&abi.lay(&batch.anchors).rows, &[8, 1, 2, 1, usize::MAX]).unwrap();
    assert_eq!(queries, expected.queries as u64);
    assert_eq!(recall[..4], [8, 1, 2, 1].map(|k| expected.get(k).unwrap()));
    assert_eq!(recall[4], 1.0, "a list of everything holds one of every class");
    assert!(recall[1] < 1.0, "a case that recall does not trivially pass");
}

#[test]
fn threads_that_share_a_context_get_their_own_results() {
    let abi = Abi::open("cpu", 2, 0, Memory::Host);
    let cases = cases::golden();
    std::thread::scope(|scope| {
        for case in cases.iter().filter(|case| case.name.contains("batch80")) {
            let mut abi = abi.clone();
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut output = LossOutput::default();
                    abi.loss(&case.batch(), &case.settings, &mut output).unwrap();
                    let want = case.expected.output.loss;
                    assert!((output.loss - want).abs() <= 1e-5 * want, "{}: {}", case.name, output.loss);
                }
            });
        }
    });
}

#[cfg(feature = "emulated")]
#[test]
fn rows_in_device_memory_agree_in_every_type_and_form() {
    // The emulated device's memory is the host's.
    let mut abi = Abi::open("emulated", 0, 0, Memory::Device);
    cases::run_all(&mut abi, cases::golden());
    let rectangular = |case: &cases::Case| case.references.is_some() && case.name.contains("ignored");
    cases::run_all(&mut abi, cases::generated().into_iter().filter(rectangular));
}

#[cfg(feature = "emulated")]
#[test]
fn recall_of_rows_in_device_memory_is_that_of_the_host_s() {
    let mut case = cases::golden().into_iter().find(|case| case.name == "hard_many_mined").unwrap();
    let device = Abi::open("emulated", 0, 0, Memory::Device);
    let host = Abi { memory: Memory::Host, ..device.clone() };
    // One row, every third, all of them.
    for ignored in [usize::MAX, 3, 1] {
        case.anchors.labels.iter_mut().step_by(ignored).for_each(|label| *label = -1);
        let both = [&device, &host].map(|abi| {
            let laid = abi.lay(&case.batch().anchors);
            abi.recall(&laid.rows, &[1, 4, 1000]).unwrap()
        });
        assert_eq!(both[0], both[1], "every {ignored}th row is ignored");
        assert_eq!(both[0].1 == 0, ignored == 1, "{both:?}");
    }
}

#[cfg(feature = "emulated")]
#[test]
fn a_search_in_device_memory_refuses_what_the_loss_refuses() {
    let case = cases::golden().remove(0);
    let abi = Abi::open("emulated", 0, 0, Memory::Device);
    let laid = abi.lay(&case.batch().anchors);
    let good = laid.rows;
    let (mut indices, mut similarities) = ([7u32; 1000], [7f32; 1000]);
    let mut refused = |rows: Rows, references: Option<&Rows>, k: usize| {
        let references = references.map_or(null(), |rows| &raw const *rows);
        let (to, and) = (indices.as_mut_ptr(), similarities.as_mut_ptr());
        let status = unsafe { ddtas_nearest(abi.handle.0, &raw const rows, references, k, to, and) };
        assert!(indices[0] == 7 && similarities[0] == 7.0, "a call that fails writes nothing");
        (status, abi.message())
    };
    let address = good.embeddings.addr();
    let at = |address: usize| std::ptr::without_provenance(address);
    assert_eq!(refused(Rows { embeddings: null(), ..good }, None, 1).0, Status::NullPointer);
    assert_eq!(refused(Rows { embeddings: at(address + 2), ..good }, None, 1).0, Status::Misaligned);
    assert_eq!(refused(Rows { row_stride: good.dim + 1, ..good }, None, 1).0, Status::InvalidShape);
    assert_eq!(refused(good, None, 0).0, Status::InvalidShape);
    let on_host = Rows { memory: Memory::Host as i32, ..good };
    assert_eq!(refused(good, Some(&on_host), 1).0, Status::InvalidValue);
    assert_eq!(abi.recall(&Rows { labels: null(), ..good }, &[1]).unwrap_err().to_string(), {
        "NullPointer: rows.labels is NULL"
    });
    let bad = vec![f32::NAN; good.count * good.dim];
    let (status, message) = refused(Rows { embeddings: bad.as_ptr().cast(), ..good }, Some(&good), 1);
    assert_eq!((status, message.contains("row 0 of the queries")), (Status::NotFinite, true), "{message}");
    // Labels are not looked at, and a k beyond the rows is no fault.
    let nameless = Rows { labels: null(), count: 3, ..good };
    let (mut found, mut how_close) = ([7u32; 15], [7f32; 15]);
    let (to, and) = (found.as_mut_ptr(), how_close.as_mut_ptr());
    let status = unsafe { ddtas_nearest(abi.handle.0, &raw const nameless, null(), 5, to, and) };
    assert_eq!(status, Status::Ok, "{}", abi.message());
    assert!(found[..2].iter().all(|&index| index < 3) && found[2..5] == [DDTAS_NO_NEIGHBOUR; 3], "{found:?}");
    assert_eq!(how_close[2..5], [f32::NEG_INFINITY; 3]);
}

#[test]
fn auto_is_the_device_that_programs_take() {
    let taken = ddtas::backend::auto().spec.to_string();
    assert_eq!(Abi::open("auto", 1, 0, Memory::Host).name(), taken);
}

#[test]
fn a_device_without_memory_of_its_own_refuses_device_rows() {
    let case = cases::golden().remove(0);
    let mut abi = Abi::open("cpu", 1, 0, Memory::Device);
    let mut output = LossOutput::default();
    let rows = abi.lay(&case.batch().anchors);
    for error in [
        abi.loss(&case.batch(), &case.settings, &mut output).unwrap_err(),
        abi.nearest(&case.batch().anchors, None, 1).unwrap_err(),
        abi.recall(&rows.rows, &[1]).unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "Unavailable: the device cpu takes rows in host memory only");
    }
}

#[test]
fn a_newer_header_is_understood_until_it_uses_what_is_new() {
    let case = cases::golden().remove(0);
    let mut abi = Abi::open("cpu", 1, 0, Memory::Host);
    let mut output = LossOutput::default();
    abi.loss(&case.batch(), &case.settings, &mut output).unwrap();

    #[repr(C)]
    struct Newer {
        settings: Settings,
        added: f64,
    }
    let rows = abi.lay(&case.batch().anchors);
    let run = |added: f64| {
        let mut newer = Newer { settings: settings_of(&case.settings, UnitCheck::Check), added };
        newer.settings.struct_size = size_of::<Newer>();
        let mut result = empty_result();
        let settings = (&raw const newer).cast::<Settings>();
        let status =
            unsafe { ddtas_loss(abi.handle.0, settings, &raw const rows.rows, null(), &raw mut result) };
        (status, result.loss)
    };
    assert_eq!(run(0.0), (Status::Ok, output.loss));
    assert_eq!(run(1.0), (Status::StructSize, 0.0));
    assert!(abi.message().contains("ddtas_settings.struct_size"), "{}", abi.message());
}
