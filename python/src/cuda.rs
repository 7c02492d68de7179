//! `CudaContext`: the loss and Recall@K on tensors in the GPU's memory, without copies.
//!
//! Everything is ordered on the caller's stream: torch's current one.

use ddtas::backend::device::{Options, ResidentOutput};
use ddtas::loss::LossOutput;
use ddtas::retrieval::recall_by;
use pyo3::prelude::*;

use crate::context::{Found, QueryMetrics, depths, found, metrics_of_queries};
use crate::error::raise;
use crate::resident::{CudaBackend, Target, Where, Workspaces, batch_of, part_of, settings_of};
use crate::settings::Settings;
use crate::sides::{SEARCH, Sides, unit_check};

/// Workspaces on GPUs. Only `ddtas.torch` calls them, with addresses of tensors that it has checked. `budget`: bytes for the candidates of all tiles, the library's if left out;
/// `allow_tf32`: float32 rows may be multiplied to TF32's precision.
#[pyclass(frozen, module = "ddtas")]
pub struct CudaContext(Workspaces);

impl CudaContext {
    /// Runs `work` in the workspace of that GPU, or of the graph that the stream captures, with the interpreter detached.
    pub fn compute<T: Send>(
        &self,
        py: Python<'_>,
        place: Where,
        work: impl FnOnce(&mut CudaBackend) -> ddtas::Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| self.0.compute(place, work)).map_err(raise)
    }
}

#[pymethods]
impl CudaContext {
    #[new]
    #[pyo3(signature = (budget = None, allow_tf32 = false))]
    fn new(budget: Option<usize>, allow_tf32: bool) -> Self {
        Self(Workspaces::new(Options { budget, tf32: allow_tf32 }))
    }

    /// Issues the loss of one side, or of the first side against the second, without waiting: gradients and
    /// scalars are written to the given addresses.
    #[pyo3(signature = (place, sides, identity, lambdas, mining, numbers, check, output, normalize = false))]
    #[allow(clippy::too_many_arguments)]
    fn enqueue_loss(
        &self,
        py: Python<'_>,
        place: Where,
        sides: Vec<Target>,
        identity: usize,
        lambdas: usize,
        mining: &str,
        numbers: [f64; 8],
        check: bool,
        output: (usize, usize),
        normalize: bool,
    ) -> PyResult<()> {
        let total = sides.first().map_or(0, |anchors| anchors.2);
        let part = part_of(&sides, (None, identity), total, (check, normalize))?;
        let settings = settings_of(mining, numbers, lambdas)?;
        let output = ResidentOutput { scalars: output.0 as u64, loss: output.1 as u64 };
        // SAFETY: `ddtas.torch` has checked the tensors and holds them until everything is issued; torch does
        // not reuse their memory before this stream has finished.
        self.compute(py, place, |backend| unsafe { backend.enqueue_loss(&part, &settings, output) })
    }

    /// Both sums of the threshold gradient along tangents, `[B, D]` and perhaps `[N, D]` (or 0), given by the
    /// addresses of float32. Waits for them.
    #[allow(clippy::too_many_arguments)]
    fn threshold_gradient(
        &self,
        py: Python<'_>,
        place: Where,
        sides: Vec<Target>,
        tangents: [usize; 2],
        settings: Settings,
        check: bool,
    ) -> PyResult<(f64, f64)> {
        let settings = settings.to_library()?;
        let batch = batch_of(&sides, check)?;
        let sums = self.compute(py, place, |backend| {
            let mut output = LossOutput::default();
            // SAFETY: as in `enqueue_loss`; the call waits for the GPU.
            unsafe { backend.loss_resident(&batch, &settings, &mut output) }?;
            // SAFETY: as above.
            unsafe { backend.threshold_gradient_resident(&batch, tangents.map(|address| address as u64)) }
        })?;
        Ok((sums.pos, sums.neg))
    }

    /// As `Context.query_metrics`, on rows in the host's memory that are copied to the GPU in blocks.
    #[pyo3(signature = (place, queries, labels, gallery, gallery_labels, identity, ks))]
    #[allow(clippy::too_many_arguments)]
    fn query_metrics<'py>(
        &self,
        py: Python<'py>,
        place: Where,
        queries: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        gallery: Option<&Bound<'py, PyAny>>,
        gallery_labels: Option<&Bound<'py, PyAny>>,
        identity: Option<&Bound<'py, PyAny>>,
        ks: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<QueryMetrics> {
        let ks = depths(&ks)?;
        let sides = Sides::new(&SEARCH, (queries, labels), (gallery, gallery_labels), identity)?;
        let batch = sides.batch(false, unit_check(true))?;
        let metrics = self.compute(py, place, |backend| metrics_of_queries(backend, &batch, &ks))?;
        Ok(metrics.into_python(py))
    }

    /// Recall@K of rows in the GPU's memory among themselves; labels and lists are copied to the host.
    fn recall_at_k(
        &self,
        py: Python<'_>,
        place: Where,
        rows: Target,
        ks: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<Found> {
        let ks = depths(&ks)?;
        let batch = batch_of(&[rows], true)?;
        let recall = self.compute(py, place, |backend| {
            // SAFETY: as in `threshold_gradient`.
            let labels = unsafe { backend.labels_resident(&batch.anchors) }?;
            recall_by(&labels, &ks, &mut |picked, k| {
                // SAFETY: as above.
                unsafe { backend.nearest_resident(&batch, Some(picked), k) }
            })
        })?;
        Ok(found(recall))
    }
}
