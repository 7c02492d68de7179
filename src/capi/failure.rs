//! A failed call inside the C ABI: a status and a line of text.

use super::types::Status;
use crate::Error;

/// Why a call failed.
#[derive(Debug)]
pub struct Failure {
    pub status: Status,
    pub message: String,
}

/// Result of the functions behind the C ABI.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// The failure for a panic that `catch_unwind` caught.
    pub fn from_panic(panic: &(dyn std::any::Any + Send)) -> Self {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Self::new(Status::Internal, format!("a fault of ddtas, please report it: {text}"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::NotFinite { .. } => Status::NotFinite,
            Error::NotUnit { .. } => Status::NotUnit,
            Error::LengthMismatch { .. } | Error::Empty { .. } | Error::NotContiguous { .. } => {
                Status::InvalidShape
            }
            Error::InvalidSetting { .. } | Error::TypeMismatch { .. } => Status::InvalidValue,
            Error::OutOfMemory { .. } => Status::OutOfMemory,
            Error::OutOfOrder(_) => Status::OutOfOrder,
            Error::Unavailable(_) => Status::Unavailable,
            Error::Device { .. } => Status::Device,
        };
        Self::new(status, error.to_string())
    }
}
