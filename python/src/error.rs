//! The library's errors as Python's exceptions, with the library's one line.

use ddtas::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};

/// `ValueError` or `TypeError` for what the caller handed in, `MemoryError` and `RuntimeError` for what the machine refused.
pub fn raise(error: Error) -> PyErr {
    match error {
        Error::NotFinite { .. }
        | Error::NotUnit { .. }
        | Error::LengthMismatch { .. }
        | Error::NotContiguous { .. }
        | Error::Empty { .. }
        | Error::InvalidSetting { .. } => PyValueError::new_err(error.to_string()),
        Error::TypeMismatch { .. } => PyTypeError::new_err(error.to_string()),
        Error::OutOfMemory { .. } => PyMemoryError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}
