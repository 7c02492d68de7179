//! The training engine over `ddtas`: data sets, network, threshold generator, training, and a trained network at work.
//!
//! Modules depend one way: [`inference`] on [`train`], that on [`generator`], [`model`], [`data`] and [`ranks`], each on those
//! that follow it; the first two on `pages` as well, which depends on [`data`].
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod data;
mod error;
pub mod generator;
pub mod inference;
pub mod model;
mod pages;
pub mod ranks;
pub mod train;

pub use error::{Error, Result};
