//! Files, printing and charts of the programs of ddtas.
//!
//! | module | what |
//! | --- | --- |
//! | [`chart`] | line charts as SVG |
//! | [`console`] | printing of results and progress |
//! | `error.rs` | errors, the library's included |
//! | [`files`] | atomic writing of files |
//! | [`progress`] | a bar on a terminal, lines elsewhere |
//! | [`tensors`] | matrices and labels in .safetensors files |
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod chart;
pub mod console;
mod error;
pub mod files;
pub mod progress;
pub mod tensors;

pub use error::{Error, Result, UNKNOWN_DEVICE};
