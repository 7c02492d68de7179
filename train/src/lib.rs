//! The training engine over `ddtas`: data sets, network, threshold generator, training, and a trained network at work.
//!
//! Modules depend one way: [`inference`] on [`train`]; that on [`model`], [`data`] and [`generator`].
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod data;
pub mod generator;
pub mod inference;
pub mod model;
pub mod train;

pub use ddtas::{Error, Result};
