//! One measurement: the loss and its gradient, and the two bare matrix products of a loss that is not fused, the floor.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, Axis, s};
use peak_alloc::PeakAlloc;
use rayon::prelude::*;

use super::EmbeddedRows;
use super::embeddings::{Embeddings, mined_share};
#[cfg(feature = "cuda")]
use super::products::Products;
use super::settings::ThroughputSettings;
use ddtas::backend::{Backend, DeviceSpec};
use ddtas::loss::{Batch, ElementType, LossOutput, LossSettings, OwnedEmbeddings, Rows};
use ddtas_io::Result;

/// Calls before the clock starts: buffers grow in the first, and caches settle.
const WARM_UP: usize = 2;
const FEWEST: usize = 5;
const MOST: usize = 10_000;

/// Rows of S the floor computes at a time. All of S at once would exceed the cache and be slower.
const STRIPE: usize = 256;

/// The measurement of one batch. Field names are those of `--json`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Rows of the batch, B.
    pub batch: usize,
    /// Number of separate references, N; none where the batch is compared with itself.
    pub references: Option<usize>,
    /// Dimensions of a row, D.
    pub dim: usize,
    /// Type of the rows.
    pub dtype: ElementType,
    /// Whether f32 rows were multiplied to TF32's precision.
    pub tf32: bool,
    /// Backend that ran.
    pub backend: String,
    /// Threads of the CPU that could be used.
    pub threads: usize,
    /// Name of the density, if the rows have one.
    pub density: Option<String>,
    /// Length of the noise over that of a class centre, if rows were drawn so.
    pub noise: Option<f64>,
    /// Seed the rows were drawn by; none if they were read.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Mined negatives of active anchors over all negative pairs, 0 to 1.
    pub mined_share: f64,
    /// Median time of loss and gradient, rows and gradient in the host's memory, milliseconds.
    pub time_ms: f64,
    /// The shortest of the times, milliseconds: least affected by other programs on the machine.
    pub time_best_ms: f64,
    /// 90th less 10th percentile of the times, milliseconds.
    pub time_spread_ms: f64,
    /// `4 B N D`, the operations of an unfused loss, divided by the time.
    pub gflops: f64,
    /// Time over that of two bare products of the same shape, S = E Rᵀ and dE = S R, in the same run: in
    /// float32 on the CPU; by cuBLAS on rows in a GPU's memory, in their type; none without cuBLAS.
    pub floor_share: Option<f64>,
    /// Most bytes allocated at any time beyond the rows and the gradient, on host and device; none where
    /// the program's allocator does not count.
    pub peak_extra_bytes: Option<usize>,
}

/// What is timed: a backend, or a loss on rows that are kept elsewhere.
pub trait Timed {
    /// As [`Backend::name`].
    fn name(&self) -> String;

    /// As [`Backend::loss`].
    ///
    /// # Errors
    /// As [`Backend::loss`].
    fn loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> ddtas::Result<()>;

    /// As [`Backend::workspace_bytes`].
    fn workspace_bytes(&self) -> usize;
}

impl Timed for Box<dyn Backend> {
    fn name(&self) -> String {
        self.as_ref().name()
    }

    fn loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> ddtas::Result<()> {
        self.as_mut().loss(batch, settings, output)
    }

    fn workspace_bytes(&self) -> usize {
        self.as_ref().workspace_bytes()
    }
}

/// The rows, or those that they were rounded to.
fn view<'a>(rows: &'a EmbeddedRows, rounded: &'a Option<OwnedEmbeddings>) -> Rows<'a> {
    let embeddings = rounded.as_ref().map_or_else(|| rows.values.view().into(), OwnedEmbeddings::view);
    Rows { embeddings, labels: &rows.labels }
}

/// Measures one batch: time, the floor's time, memory.
///
/// # Errors
/// Errors of the backend, such as [`Error::NotUnit`](ddtas::Error::NotUnit).
pub fn measure(embeddings: &Embeddings, settings: &ThroughputSettings) -> Result<Row> {
    measure_on(|| Ok(settings.device.open()?), embeddings, settings)
}

/// As [`measure`], on the backend that `opened` returns, whose memory counts from then on.
///
/// # Errors
/// As [`measure`], and those of `opened`.
pub fn measure_on<T: Timed>(
    opened: impl FnOnce() -> Result<T>,
    embeddings: &Embeddings,
    settings: &ThroughputSettings,
) -> Result<Row> {
    with_batch(embeddings, settings, |batch| measure_batch(opened, embeddings, batch, settings))
}

/// Calls `work` with the rows in the type that `settings` ask for.
///
/// # Errors
/// Settings out of range, rows that are no batch, and errors of `work`.
pub fn with_batch<T>(
    embeddings: &Embeddings,
    settings: &ThroughputSettings,
    work: impl FnOnce(&Batch<'_>) -> Result<T>,
) -> Result<T> {
    settings.check_products()?;
    // Rows of f32 are not copied.
    let rounded = |rows: &EmbeddedRows| match settings.dtype {
        ElementType::F32 => None,
        dtype => Some(OwnedEmbeddings::new(&rows.values, dtype)),
    };
    let own = rounded(&embeddings.anchors);
    let other = embeddings.references.as_ref().map(|rows| (rows, rounded(rows)));
    let references = other.as_ref().map(|(rows, rounded)| view(rows, rounded));
    let batch = Batch { anchors: view(&embeddings.anchors, &own), references, ..embeddings.batch() };
    batch.validate()?;
    work(&batch)
}

fn measure_batch<T: Timed>(
    opened: impl FnOnce() -> Result<T>,
    embeddings: &Embeddings,
    batch: &Batch<'_>,
    settings: &ThroughputSettings,
) -> Result<Row> {
    let (count, dim) = embeddings.anchors.values.dim();
    let against = embeddings.references.as_ref().map_or(count, |rows| rows.labels.len());

    // The gradient is a result, so its memory is not extra.
    let mut output = LossOutput { gradient: Array2::zeros((count, dim)), ..LossOutput::default() };
    let before = PeakAlloc.current_usage();
    PeakAlloc.reset_peak_usage();
    let mut backend = opened()?;
    let loss = || backend.loss(batch, &embeddings.settings, &mut output);
    let times = time(settings.seconds, loss)?;
    // 0 bytes in use: the program's allocator does not count.
    let counted = (before > 0).then(|| PeakAlloc.peak_usage().saturating_sub(before));
    let name = backend.name();
    let on_device = if is_gpu(&name) { backend.workspace_bytes() } else { 0 };
    drop(backend);

    let floor = match name.parse() {
        Ok(DeviceSpec::Cpu) => Some(floor(embeddings, settings.seconds)?),
        Ok(DeviceSpec::Cuda(ordinal)) => floor_of_gpu(ordinal, batch, settings)?,
        _ => None,
    };
    Ok(Row {
        batch: count,
        references: embeddings.references.as_ref().map(|rows| rows.labels.len()),
        dim,
        dtype: settings.dtype,
        tf32: settings.device.tf32,
        backend: name,
        threads: rayon::current_num_threads(),
        density: embeddings.density.clone(),
        noise: embeddings.noise,
        seed: settings.embeddings.is_none().then_some(settings.seed),
        mined_share: mined_share(embeddings, &output),
        time_ms: times.median,
        time_best_ms: times.best,
        time_spread_ms: times.spread,
        gflops: 4.0 * count as f64 * against as f64 * dim as f64 / times.median / 1e6,
        floor_share: floor.map(|floor| times.median / floor.median),
        peak_extra_bytes: counted.map(|bytes| bytes + on_device),
    })
}

/// Whether the workspace is in memory that the host's allocator does not see.
fn is_gpu(backend: &str) -> bool {
    backend.starts_with("cuda")
}

/// Milliseconds a call.
struct Times {
    best: f64,
    median: f64,
    /// 90th less 10th percentile.
    spread: f64,
}

fn time(seconds: f64, mut step: impl FnMut() -> ddtas::Result<()>) -> Result<Times> {
    for _ in 0..WARM_UP {
        step()?;
    }
    let mut times = Vec::new();
    let begin = Instant::now();
    let enough = Duration::from_secs_f64(seconds);
    while times.len() < FEWEST || (begin.elapsed() < enough && times.len() < MOST) {
        let start = Instant::now();
        step()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times[(times.len() * part / 10).min(times.len() - 1)];
    Ok(Times { best: at(0), median: at(5), spread: at(9) - at(1) })
}

/// Two products by cuBLAS, waited for as the loss is.
#[cfg(feature = "cuda")]
fn floor_of_gpu(ordinal: usize, batch: &Batch<'_>, settings: &ThroughputSettings) -> Result<Option<Times>> {
    let products = Products::new(ordinal, batch, settings.device.tf32)?;
    products.map(|mut products| time(settings.seconds, || products.make())).transpose()
}

#[cfg(not(feature = "cuda"))]
fn floor_of_gpu(_: usize, _: &Batch<'_>, _: &ThroughputSettings) -> Result<Option<Times>> {
    Ok(None)
}

/// Two bare products, by stripes of rows shared out among the threads.
fn floor(embeddings: &Embeddings, seconds: f64) -> Result<Times> {
    let anchors = &embeddings.anchors.values;
    let references = embeddings.references.as_ref().map_or(anchors, |rows| &rows.values);
    let (count, dim) = anchors.dim();
    let threads = rayon::current_num_threads();
    let stripe = count.div_ceil(threads).clamp(1, STRIPE);
    let similarities: Vec<_> =
        (0..threads).map(|_| Mutex::new(Array2::<f32>::zeros((stripe, references.nrows())))).collect();
    let mut gradient = Array2::<f32>::zeros((count, dim));
    let transposed = references.t();
    time(seconds, || {
        let parts = gradient.axis_chunks_iter_mut(Axis(0), stripe);
        let parts = parts.zip(anchors.axis_chunks_iter(Axis(0), stripe));
        parts.par_bridge().for_each(|(mut gradient, rows)| {
            let mine = &similarities[rayon::current_thread_index().unwrap_or(0) % threads];
            let mut product = mine.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let mut product = product.slice_mut(s![..rows.nrows(), ..]);
            general_mat_mul(1.0, &rows, &transposed, 0.0, &mut product);
            general_mat_mul(1.0, &product, references, 0.0, &mut gradient);
        });
        Ok(())
    })
}
