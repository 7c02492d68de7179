//! The training engine on top of `ddtas`: data sets, network, threshold generator, training, and use of a trained network.
//!
//! In the order [`inference`], [`train`], [`generator`], [`model`], [`data`], [`ranks`] each module depends only on later
//! ones. The first two also depend on `pages`, which depends on [`data`]; all may use [`arguments`] and `vectors`.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod arguments;
pub mod data;
mod error;
pub mod generator;
pub mod inference;
pub mod model;
mod pages;
pub mod ranks;
pub mod train;
mod vectors;

pub use error::{Error, Result};
