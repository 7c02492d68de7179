//! The library's errors as Python's exceptions, with the library's one line.

use ddtas::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};

/// A row that is not finite or not of unit length, with the sum of its squares.
pub fn bad_row(rows: &'static str, row: usize, square_sum: f64) -> PyErr {
    let norm = square_sum.sqrt();
    raise(if norm.is_finite() { Error::NotUnit { rows, row, norm } } else { Error::NotFinite { rows, row } })
}

/// `ValueError` for what the caller handed in, `MemoryError` and `RuntimeError` for what the machine refused.
pub fn raise(error: Error) -> PyErr {
    match error {
        Error::NotFinite { .. }
        | Error::NotUnit { .. }
        | Error::LengthMismatch { .. }
        | Error::NotContiguous { .. }
        | Error::Empty { .. }
        | Error::InvalidSetting { .. } => PyValueError::new_err(error.to_string()),
        Error::OutOfMemory { .. } => PyMemoryError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}
