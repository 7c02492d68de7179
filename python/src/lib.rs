//! `ddtas._ddtas`: the library behind the Python package `ddtas`.
//!
//! | file | what it knows |
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
//! | `resident.rs` | the loss issued on a GPU and not waited for, and the workspaces there |
//! | `error.rs` | the library's errors as Python's exceptions |
//!
//! Python waits for no lock while something is computed: the interpreter is let go of.

use pyo3::prelude::*;

mod context;
#[cfg(feature = "cuda")]
mod cuda;
mod double;
mod error;
mod input;
mod output;
mod part;
#[cfg(feature = "cuda")]
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

/// The address that rows are read from: the array's own, since nothing is copied.
#[pyfunction]
fn address_of(embeddings: &Bound<'_, PyAny>) -> PyResult<usize> {
    Ok(input::Matrix::new("anchors", embeddings)?.address())
}

/// The compiled part of the package.
#[pymodule]
fn _ddtas(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("has_cuda", cfg!(feature = "cuda"))?;
    module.add_class::<workspace::Context>()?;
    module.add_class::<output::LossOutput>()?;
    #[cfg(feature = "cuda")]
    module.add_class::<cuda::CudaContext>()?;
    module.add_function(wrap_pyfunction!(check_settings, module)?)?;
    module.add_function(wrap_pyfunction!(address_of, module)?)
}
