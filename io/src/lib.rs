//! What the programs of ddtas read, write and print.
//!
//! | module | what |
//! | --- | --- |
//! | [`chart`] | lines as SVG |
//! | [`console`] | results and progress, where the reader may have gone or the disk be full |
//! | `error.rs` | what can go wrong there, the library's errors among them |
//! | [`files`] | files that are either whole or not there |
//! | [`tensors`] | matrices and labels in .safetensors files |
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod chart;
pub mod console;
mod error;
pub mod files;
pub mod tensors;

pub use error::{Error, Result, UNKNOWN_DEVICE};
