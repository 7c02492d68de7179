//! The one error type of the library.
//!
//! Variants differ by what the caller can do about the error, and carry the values (row, length, setting)
//! that its message needs.

use crate::loss::ElementType;

/// An error of ddtas. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An embedding holds a NaN or an infinity.
    #[error("row {row} of the {rows} holds a value that is not finite (NaN or infinity)")]
    NotFinite {
        /// Which matrix: `"anchors"`, `"references"`, `"queries"`, `"rows"`, `"tangent"`,
        /// `"reference tangent"`.
        rows: &'static str,
        /// Row index, from 0.
        row: usize,
    },
    /// An embedding does not have unit L2 norm.
    #[error("row {row} of the {rows} {}", not_unit(*norm))]
    NotUnit {
        /// Which matrix: `"anchors"`, `"references"`, `"queries"`, `"rows"`.
        rows: &'static str,
        /// Row index, from 0.
        row: usize,
        /// The norm that was found.
        norm: f64,
    },
    /// Two inputs that must agree in a length do not.
    #[error("{what}: expected {expected}, got {got}")]
    LengthMismatch {
        /// The input that is off.
        what: &'static str,
        /// The length the other inputs imply.
        expected: usize,
        /// The length that was given.
        got: usize,
    },
    /// Both sides of a batch must have one element type.
    #[error("the references must be {anchors}, as the anchors are, not {references}")]
    TypeMismatch {
        /// Type of the anchors.
        anchors: ElementType,
        /// Type of the references.
        references: ElementType,
    },
    /// The rows of a matrix do not lie one behind the other in memory.
    #[error("the {rows} must be in row-major order without gaps")]
    NotContiguous {
        /// Which matrix.
        rows: &'static str,
    },
    /// A batch without rows or without dimensions.
    #[error("the {rows} are empty: at least one row and one dimension are needed")]
    Empty {
        /// Which matrix.
        rows: &'static str,
    },
    /// A setting outside its range.
    #[error("{name} = {value} is out of range: {range}")]
    InvalidSetting {
        /// The field or argument, as Rust, C and Python spell it.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        range: &'static str,
    },
    /// A pass that continues an earlier one was called out of order.
    #[error("{0}")]
    OutOfOrder(&'static str),
    /// A result that the host's memory cannot hold.
    #[error("{what}: {bytes} bytes of memory could not be allocated")]
    OutOfMemory {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// A device or backend that this build or machine does not have.
    #[error("{0}")]
    Unavailable(String),
    /// The GPU driver refused a call.
    #[error("{call} failed: {code}")]
    Device {
        /// The driver call.
        call: &'static str,
        /// The driver's name of the error.
        code: String,
    },
}

impl Error {
    /// [`Error::NotUnit`] for a row with this sum of squares; [`Error::NotFinite`] if the sum is not finite.
    #[must_use]
    pub fn bad_row(rows: &'static str, row: usize, square_sum: f64) -> Self {
        if square_sum.is_finite() {
            Self::NotUnit { rows, row, norm: square_sum.sqrt() }
        } else {
            Self::NotFinite { rows, row }
        }
    }
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn not_unit(norm: f64) -> String {
    if norm == 0.0 {
        return "is all zeros: it has no direction".into();
    }
    format!("has L2 norm {norm:.6}, not 1: normalise the embeddings first")
}
