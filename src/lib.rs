//! Fused deep metric learning: mining, loss and gradient of a batch in passes
//! that never store a B x B matrix.
//!
//! The method is DDTAS (Jiang et al., ACM TOMM 20(7), 2024,
//! doi 10.1145/3656047): asymmetric mining that adapts its tolerances, a soft
//! contrastive loss, and a generator that learns the loss threshold while
//! training.
//!
//! Modules depend one way: `inference` on `train`; `train` on `model`, `data`, `generator` and
//! `retrieval`; those on [`backend`]; that on [`loss`].
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
#[cfg(feature = "capi")]
pub mod capi;
#[cfg(feature = "cli")]
pub mod cases;
#[cfg(feature = "cli")]
pub mod console;
#[cfg(feature = "train")]
pub mod data;
mod error;
#[cfg(feature = "cli")]
pub mod files;
#[cfg(feature = "train")]
pub mod generator;
#[cfg(feature = "train")]
pub mod inference;
pub mod loss;
#[cfg(feature = "train")]
pub mod model;
pub mod process;
pub mod retrieval;
#[cfg(all(feature = "cli", feature = "kernels"))]
pub mod spot_check;
#[cfg(feature = "cli")]
mod tensors;
pub mod threads;
#[cfg(feature = "cli")]
pub mod throughput;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "cli")]
pub mod verify;

pub use error::{Error, Result};

/// Compiles and runs the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
