//! What stays of a loss between its steps, and for the threshold's sums after it.

use crate::backend::step::Step;
use crate::loss::{Batch, LossSettings};

/// How far the last loss came, and of what shape and settings it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Remembered {
    pub anchors: (usize, usize),
    pub references: Option<usize>,
    /// B of 1/B.
    pub total: usize,
    pub settings: LossSettings,
    pub step: Step,
}

impl Remembered {
    pub fn new(batch: &Batch<'_>, settings: &LossSettings, step: Step) -> Self {
        let embeddings = &batch.anchors.embeddings;
        Self {
            anchors: (embeddings.rows(), embeddings.dim()),
            references: batch.references.map(|rows| rows.embeddings.rows()),
            total: batch.total(),
            settings: *settings,
            step,
        }
    }
}
