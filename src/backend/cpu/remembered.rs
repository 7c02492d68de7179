//! What is remembered of a loss between its steps and for the threshold gradient after it.

use crate::backend::step::Step;
use crate::loss::{Batch, BatchSize, LossSettings};

/// Size, settings and last step of the last loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Remembered {
    pub size: BatchSize,
    /// B of the factor 1/B.
    pub total: usize,
    pub settings: LossSettings,
    pub step: Step,
}

impl Remembered {
    pub fn new(batch: &Batch<'_>, settings: &LossSettings, step: Step) -> Self {
        Self { size: BatchSize::of(batch), total: batch.total(), settings: *settings, step }
    }
}
