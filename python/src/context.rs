//! `Context`: a workspace that is allocated once, the threads that fill it, and the calls that compute.

use std::sync::{Mutex, PoisonError};

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{self, Batch, Rows, UnitCheck};
use ddtas::retrieval::recall;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::double;
use crate::error::raise;
use crate::input::{Labels, Matrix};
use crate::output::LossOutput;
use crate::settings::Settings;

/// A workspace on the processor, and the threads that compute in it.
///
/// Calls on one context take turns, without the interpreter's lock; whoever wants them side by
/// side makes two.
#[pyclass(frozen, module = "ddtas")]
pub struct Context {
    backend: Mutex<CpuBackend>,
    /// `None`: the process's own pool, as many threads as cores.
    pool: Option<rayon::ThreadPool>,
}

/// Both sides of a batch, each with its labels.
pub struct Sides<'py> {
    pub anchors: (Matrix<'py>, Labels<'py>),
    pub references: Option<(Matrix<'py>, Labels<'py>)>,
}

impl<'py> Sides<'py> {
    fn new(
        anchors: (&Bound<'py, PyAny>, &Bound<'py, PyAny>),
        references: (Option<&Bound<'py, PyAny>>, Option<&Bound<'py, PyAny>>),
    ) -> PyResult<Self> {
        let references = match references {
            (None, None) => None,
            (Some(rows), Some(labels)) => {
                Some((Matrix::new("references", rows)?, Labels::new("labels of the references", labels)?))
            }
            _ => {
                let message = "references and reference_labels belong together: give both or neither";
                return Err(PyValueError::new_err(message));
            }
        };
        let labels = Labels::new("labels", anchors.1)?;
        Ok(Self { anchors: (Matrix::new("anchors", anchors.0)?, labels), references })
    }

    fn is_double(&self) -> bool {
        self.anchors.0.is_double()
    }

    fn batch(&self, reference_gradient: bool, check: UnitCheck) -> PyResult<Batch<'_>> {
        let references = self.references.as_ref().map(rows).transpose()?;
        Ok(Batch { anchors: rows(&self.anchors)?, references, reference_gradient, check })
    }
}

fn rows<'a>((matrix, labels): &'a (Matrix<'_>, Labels<'_>)) -> PyResult<Rows<'a>> {
    Ok(Rows { embeddings: matrix.single()?, labels: labels.as_slice()? })
}

pub fn unit_check(check: bool) -> UnitCheck {
    if check { UnitCheck::Check } else { UnitCheck::Trust }
}

impl Context {
    /// Runs `work` on the workspace and the threads, the interpreter let go of.
    fn compute<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut CpuBackend) -> ddtas::Result<T> + Send,
    ) -> PyResult<T> {
        let run = || {
            // What an earlier call left half-written, the next one writes anew.
            let mut guard = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
            let backend = &mut *guard;
            match &self.pool {
                Some(pool) => pool.install(|| work(backend)),
                None => work(backend),
            }
        };
        py.detach(run).map_err(raise)
    }
}

#[pymethods]
impl Context {
    #[new]
    #[pyo3(signature = (threads = None))]
    fn new(threads: Option<usize>) -> PyResult<Self> {
        let pool = match threads {
            None => None,
            Some(0) => return Err(PyValueError::new_err("threads = 0 is out of range: at least 1")),
            Some(count) => {
                let built = rayon::ThreadPoolBuilder::new().num_threads(count).build();
                Some(built.map_err(|error| PyRuntimeError::new_err(error.to_string()))?)
            }
        };
        Ok(Self { backend: Mutex::new(CpuBackend::new()), pool })
    }

    /// Threads that compute.
    #[getter]
    fn threads(&self) -> usize {
        self.pool.as_ref().map_or_else(rayon::current_num_threads, rayon::ThreadPool::current_num_threads)
    }

    /// Bytes the workspace holds now.
    #[getter]
    fn workspace_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.compute(py, |backend| Ok(backend.workspace_bytes()))
    }

    /// A copy or a pickle is a new context: the workspace holds nothing that outlives a call.
    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<(Py<PyAny>, (Option<usize>,))> {
        let threads = slf.get().pool.as_ref().map(rayon::ThreadPool::current_num_threads);
        Ok((slf.get_type().into_any().unbind(), (threads,)))
    }

    /// Mines, and evaluates the loss and its gradient.
    #[pyo3(signature = (embeddings, labels, references, reference_labels, settings, reference_gradient, check))]
    #[allow(clippy::too_many_arguments)]
    fn loss<'py>(
        &self,
        py: Python<'py>,
        embeddings: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        references: Option<&Bound<'py, PyAny>>,
        reference_labels: Option<&Bound<'py, PyAny>>,
        settings: Settings,
        reference_gradient: bool,
        check: bool,
    ) -> PyResult<LossOutput> {
        let settings = settings.to_library()?;
        let sides = Sides::new((embeddings, labels), (references, reference_labels))?;
        let check = unit_check(check);
        if sides.is_double() {
            return double::loss(py, &sides, &settings, reference_gradient, check);
        }
        let batch = sides.batch(reference_gradient, check)?;
        let output = self.compute(py, |backend| {
            // Not kept from call to call: Python takes the gradient's memory with it.
            let mut output = loss::LossOutput::default();
            backend.loss(&batch, &settings, &mut output).map(|()| output)
        })?;
        Ok(LossOutput::of_backend(py, output))
    }

    /// The two hyper-gradient sums along a tangent of the rows.
    #[pyo3(signature = (embeddings, labels, tangent, references, reference_labels, reference_tangent, settings, check))]
    #[allow(clippy::too_many_arguments)]
    fn threshold_gradient<'py>(
        &self,
        py: Python<'py>,
        embeddings: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        tangent: &Bound<'py, PyAny>,
        references: Option<&Bound<'py, PyAny>>,
        reference_labels: Option<&Bound<'py, PyAny>>,
        reference_tangent: Option<&Bound<'py, PyAny>>,
        settings: Settings,
        check: bool,
    ) -> PyResult<(f64, f64)> {
        let settings = settings.to_library()?;
        let sides = Sides::new((embeddings, labels), (references, reference_labels))?;
        let tangent = Matrix::new("tangent", tangent)?;
        let reference_tangent =
            reference_tangent.map(|rows| Matrix::new("tangent of the references", rows)).transpose()?;
        let check = unit_check(check);
        let sums = if sides.is_double() {
            let tangents = (&tangent, reference_tangent.as_ref());
            double::threshold_gradient(py, &sides, &settings, tangents, check)?
        } else {
            let batch = sides.batch(false, check)?;
            let tangent = tangent.float()?;
            let reference_tangent = reference_tangent.as_ref().map(Matrix::float).transpose()?;
            self.compute(py, |backend| {
                backend.loss(&batch, &settings, &mut loss::LossOutput::default())?;
                backend.hypergradient(&batch, tangent, reference_tangent)
            })?
        };
        Ok((sums.pos, sums.neg))
    }

    /// Recall@K of every row searched among the others: pairs of K and the share of answered queries.
    fn recall_at_k<'py>(
        &self,
        py: Python<'py>,
        embeddings: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        ks: Vec<usize>,
    ) -> PyResult<Vec<(usize, f64)>> {
        let side = (Matrix::new("queries", embeddings)?, Labels::new("labels of the queries", labels)?);
        let rows = rows(&side)?;
        self.compute(py, |backend| recall(backend, &rows, None, &ks).map(|(recall, _)| recall.at))
    }
}
