//! Fused deep metric learning: mining, loss and gradient of a batch in passes
//! that never store a B x B matrix.
//!
//! The method is DDTAS (Jiang et al., ACM TOMM 20(7), 2024,
//! doi 10.1145/3656047): asymmetric mining that adapts its tolerances, a soft
//! contrastive loss, and a generator that learns the loss threshold while
//! training.
//!
//! Modules depend one way: [`retrieval`] on [`backend`], that on [`loss`]. "SPEC n" in their documentation is
//! section n of [`method`], which has the formulas. Matrices are those of [`ndarray`], half precision that of
//! [`half`]; both crates are re-exported.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
#[cfg(feature = "capi")]
pub mod capi;
mod error;
pub mod loss;
#[doc = include_str!("../docs/method.md")]
pub mod method {}
pub mod process;
pub mod retrieval;
pub mod threads;

pub use error::{Error, Result};
pub use {half, ndarray};

/// Compiles and runs the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
