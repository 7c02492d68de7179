//! `CudaPart`: some anchors of a batch in a GPU's memory, and the steps of their loss, for `ddtas.torch`.

use ddtas::backend::device::{ResidentNumbers, ResidentPart, ResidentSettings};
use pyo3::prelude::*;

use crate::cuda::CudaContext;
use crate::resident::{Known, Target, Where, part_of, settings_of};

/// Some anchors of a batch, against references that begin with all its anchors or hold none. Each step is issued
/// without waiting; what it takes and gives are addresses.
#[pyclass(frozen, module = "ddtas")]
pub struct CudaPart {
    context: Py<CudaContext>,
    place: Where,
    part: ResidentPart,
    settings: ResidentSettings,
}

/// Addresses of the numbers of the part's anchors and of the references that are anchors, and the count of the latter.
type Numbers = (usize, usize, usize);

fn numbers((anchors, references, count): Numbers) -> ResidentNumbers {
    ResidentNumbers { anchors: anchors as u64, references: references as u64, count }
}

// SAFETY of every step: `ddtas.torch` has checked the tensors and holds them until the last step is issued; torch does
// not reuse their memory before this stream has finished.
#[pymethods]
impl CudaPart {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        context: Py<CudaContext>,
        place: Where,
        sides: Vec<Target>,
        identity: Known,
        total: usize,
        mining: &str,
        settings: [f64; 8],
        check: bool,
        normalize: bool,
    ) -> PyResult<Self> {
        let part = part_of(&sides, identity, total, (check, normalize))?;
        Ok(Self { context, place, part, settings: settings_of(mining, settings, 0)? })
    }

    fn same_class(&self, py: Python<'_>, min_pos: usize) -> PyResult<()> {
        self.context.get().compute(py, self.place, |backend| {
            // SAFETY: above.
            unsafe { backend.enqueue_same_class(&self.part, &self.settings, min_pos as u64) }
        })
    }

    fn sweep(&self, py: Python<'_>, min_pos: Numbers, max_neg: usize, totals: usize) -> PyResult<()> {
        self.context.get().compute(py, self.place, |backend| {
            // SAFETY: above.
            unsafe { backend.enqueue_sweep(&self.part, numbers(min_pos), max_neg as u64, totals as u64) }
        })
    }

    fn select(&self, py: Python<'_>, max_neg: Numbers, totals: usize, counts: [usize; 2]) -> PyResult<()> {
        let counts = counts.map(|address| address as u64);
        self.context.get().compute(py, self.place, |backend| {
            // SAFETY: above.
            unsafe { backend.enqueue_select(&self.part, numbers(max_neg), totals as u64, counts) }
        })
    }

    fn gradient(&self, py: Python<'_>, counts: [Numbers; 2], scalars: usize) -> PyResult<()> {
        self.context.get().compute(py, self.place, |backend| {
            // SAFETY: above.
            unsafe { backend.enqueue_gradient(&self.part, counts.map(numbers), scalars as u64) }
        })
    }
}
