//! The operations on Burn's GPU backend: Burn's own kernels.

use burn::backend::Cube;

use super::LayerOps;

impl LayerOps for Cube {}
