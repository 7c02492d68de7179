//! What stays of a loss between its steps, and for the threshold's sums after it.

use crate::backend::step::Step;
use crate::loss::{Batch, BatchSize, LossSettings};

/// How far the last loss came, and of what size and settings it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Remembered {
    pub size: BatchSize,
    /// B of 1/B.
    pub total: usize,
    pub settings: LossSettings,
    pub step: Step,
}

impl Remembered {
    pub fn new(batch: &Batch<'_>, settings: &LossSettings, step: Step) -> Self {
        Self { size: BatchSize::of(batch), total: batch.total(), settings: *settings, step }
    }
}
