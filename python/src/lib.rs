//! `ddtas._ddtas`: the library behind the Python package `ddtas`.
//!
//! | file | content |
//! | --- | --- |
//! | `input.rs` | matrices and labels where Python keeps them: NumPy arrays, DLPack tensors |
//! | `settings.rs` | `ddtas.Settings` as the library's settings |
//! | `sides.rs` | both sides of a batch |
//! | `workspace.rs` | `Context`: a workspace and its threads |
//! | `context.rs` | the calls of `Context` |
//! | `part.rs` | `ddtas.Part` and the steps of its loss |
//! | `double.rs` | the same calls on float64 rows |
//! | `tensors.rs` | the loss of tensors by their addresses, for `ddtas.torch` |
//! | `output.rs` | `LossOutput`: what a loss returns, without a copy |
//! | `cuda.rs` | `CudaContext`: the loss and Recall@K on tensors in the GPU's memory (feature `cuda`) |
//! | `cuda_part.rs` | `CudaPart`: some anchors of a batch there, and the steps of their loss |
//! | `resident.rs` | the loss issued on a GPU without waiting, and the workspaces there |
//! | `emulated.rs` | the emulated device in place of a GPU, for tests (feature `emulated`) |
//! | `error.rs` | the library's errors as Python's exceptions |
//!
//! The interpreter is detached while something is computed.

use ddtas::Error;
use ddtas::loss::select::initial_tolerances;
use ddtas::loss::{ElementType, LossScalars};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

mod context;
#[cfg(feature = "kernels")]
mod cuda;
#[cfg(feature = "kernels")]
mod cuda_part;
mod double;
#[cfg(all(feature = "emulated", not(feature = "cuda")))]
mod emulated;
mod error;
mod input;
mod output;
mod part;
#[cfg(feature = "kernels")]
mod resident;
mod settings;
mod sides;
mod tensors;
mod workspace;

/// Checks every range of a `ddtas.Settings`.
#[pyfunction]
fn check_settings(settings: settings::Settings) -> PyResult<()> {
    settings.to_library().map(|_| ())
}

/// Both tolerances before a batch adapts them.
#[pyfunction]
fn _initial_tolerances(mining: &str, numbers: [f64; 8]) -> PyResult<(f64, f64)> {
    let tolerances = initial_tolerances(&settings::Settings::of_numbers(mining, numbers).to_library()?);
    Ok((tolerances.pos, tolerances.neg))
}

/// The address that rows are read from: the array's own, since nothing is copied.
#[pyfunction]
fn address_of(embeddings: &Bound<'_, PyAny>) -> PyResult<usize> {
    Ok(input::Matrix::new("anchors", embeddings)?.address())
}

/// How far the norm of a row of that type may be from 1.
#[pyfunction]
fn _norm_tolerance(dtype: u8) -> f64 {
    tensors::element_type(dtype).unwrap_or(ElementType::F32).norm_tolerance()
}

/// Raises the error for a row that is not finite or not of unit length, by the sum of its squares.
#[pyfunction]
fn _refuse_row(of_references: bool, row: usize, square_sum: f64) -> PyResult<()> {
    let rows = if of_references { "references" } else { "anchors" };
    Err(error::raise(Error::bad_row(rows, row, square_sum)))
}

/// Reads the scalars of a loss, 120 bytes that the kernels wrote; raises for a bad row.
#[pyfunction]
fn _read_scalars(written: &[u8]) -> PyResult<[f64; tensors::COMPUTED]> {
    let refused = |_| PyValueError::new_err("the scalars of a loss have another size");
    let scalars: LossScalars = bytemuck::try_pod_read_unaligned(written).map_err(refused)?;
    for (rows, row) in [("anchors", scalars.bad_anchor), ("references", scalars.bad_reference)] {
        if row != u32::MAX {
            return Err(error::raise(Error::bad_row(rows, row as usize, scalars.bad_square_sum)));
        }
    }
    Ok(tensors::statistics(&scalars))
}

/// The loss of tensors given by address; only `ddtas.torch` calls it, see `tensors.rs`.
#[pyfunction]
#[pyo3(signature = (context, rows, references, identity, mining, numbers, flags))]
#[allow(clippy::too_many_arguments)]
fn _loss_at(
    py: Python<'_>,
    context: &workspace::Context,
    rows: tensors::Place,
    references: Option<tensors::Place>,
    identity: usize,
    mining: &str,
    numbers: [f64; 8],
    flags: tensors::Flags,
) -> PyResult<tensors::Answers> {
    let settings = settings::Settings::of_numbers(mining, numbers).to_library()?;
    // SAFETY: `ddtas.torch` holds the tensors and has checked them.
    unsafe { tensors::loss(py, context, (rows, references), identity, &settings, flags) }
}

/// Rows at unit length, given by address: see `tensors.rs`.
#[pyfunction]
fn _normalize_at(
    py: Python<'_>,
    context: &workspace::Context,
    rows: tensors::Place,
    unit: usize,
) -> PyResult<()> {
    // SAFETY: `ddtas.torch` holds the tensors and has made them of one size.
    unsafe { tensors::normalize(py, context, rows, unit) }
}

/// The gradient with respect to rows as given, from that with respect to unit rows: see `tensors.rs`.
#[pyfunction]
fn _normalize_backward_at(
    py: Python<'_>,
    context: &workspace::Context,
    rows: tensors::Place,
    gradient: usize,
) -> PyResult<()> {
    // SAFETY: as above.
    unsafe { tensors::normalize_backward(py, context, rows, gradient) }
}

/// The number of threads that `OMP_NUM_THREADS` gives torch and NumPy, at most one for each core; 0 if it is not
/// set, or if `RAYON_NUM_THREADS` is. Of a list, for nested parallelism, the first number counts.
fn threads_of_environment() -> usize {
    if std::env::var_os("RAYON_NUM_THREADS").is_some() {
        return 0;
    }
    let given = std::env::var("OMP_NUM_THREADS").unwrap_or_default();
    let count = given.split(',').next().and_then(|first| first.trim().parse::<usize>().ok()).unwrap_or(0);
    count.min(std::thread::available_parallelism().map_or(1, usize::from))
}

/// The compiled part of the package.
#[pymodule]
fn _ddtas(module: &Bound<'_, PyModule>) -> PyResult<()> {
    ddtas::threads::set_default_count(threads_of_environment());
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("has_cuda", cfg!(feature = "cuda"))?;
    module.add_class::<workspace::Context>()?;
    module.add_class::<output::LossOutput>()?;
    #[cfg(feature = "kernels")]
    module.add_class::<cuda::CudaContext>()?;
    #[cfg(feature = "kernels")]
    module.add_class::<cuda_part::CudaPart>()?;
    module.add_function(wrap_pyfunction!(check_settings, module)?)?;
    module.add_function(wrap_pyfunction!(address_of, module)?)?;
    module.add_function(wrap_pyfunction!(_initial_tolerances, module)?)?;
    module.add_function(wrap_pyfunction!(_norm_tolerance, module)?)?;
    module.add_function(wrap_pyfunction!(_refuse_row, module)?)?;
    module.add_function(wrap_pyfunction!(_read_scalars, module)?)?;
    module.add_function(wrap_pyfunction!(_loss_at, module)?)?;
    module.add_function(wrap_pyfunction!(_normalize_at, module)?)?;
    module.add_function(wrap_pyfunction!(_normalize_backward_at, module)?)
}
