//! What the parts of a batch tell each other between the steps of a loss.

use super::{Batch, LossOutput, same_length};
use crate::{Error, Result};

/// A number for each row of a part of a batch, the whole batch taken into account.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowNumbers<'a, T> {
    /// Of each anchor of the part.
    pub anchors: &'a [T],
    /// Of the references that are anchors of the whole batch: the first ones. References behind the last
    /// number select nothing, as those of a memory bank.
    pub references: &'a [T],
}

impl<'a, T> RowNumbers<'a, T> {
    /// Joins the numbers of both sides.
    #[must_use]
    pub fn new(anchors: &'a [T], references: &'a [T]) -> Self {
        Self { anchors, references }
    }

    /// Checks that there is a number for each anchor, and none too many for the references.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`].
    pub(crate) fn validate(&self, part: &Batch<'_>) -> Result<()> {
        same_length("numbers of the anchors", part.anchors.labels.len(), self.anchors.len())?;
        let (expected, got) = (part.references.map_or(0, |rows| rows.labels.len()), self.references.len());
        if got > expected {
            return Err(Error::LengthMismatch { what: "numbers of the references", expected, got });
        }
        Ok(())
    }
}

impl RowNumbers<'_, u32> {
    /// Checks the sizes of both sets, whose references are the same.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub(crate) fn validate_sizes(pos: &Self, neg: &Self, part: &Batch<'_>) -> Result<()> {
        pos.validate(part)?;
        neg.validate(part)?;
        same_length("numbers of the references", pos.references.len(), neg.references.len())
    }
}

impl LossOutput {
    /// Adds up what parts of one batch have found of it: loss, its derivatives by the thresholds, counts and
    /// means. Fields with an entry a row, gradients and tolerances stay as they are.
    pub fn add_part(&mut self, part: &Self) {
        let mean = |own: (f64, u64), other: (f64, u64)| match (own.1, other.1) {
            (_, 0) => own.0,
            (0, _) => other.0,
            (n, m) => (own.0 * n as f64 + other.0 * m as f64) / (n + m) as f64,
        };
        self.mean_pos = mean((self.mean_pos, self.total_pos), (part.mean_pos, part.total_pos));
        self.mean_neg = mean((self.mean_neg, self.total_neg), (part.mean_neg, part.total_neg));
        self.loss += part.loss;
        self.dloss_dlambda_pos += part.dloss_dlambda_pos;
        self.dloss_dlambda_neg += part.dloss_dlambda_neg;
        self.probe_neg += part.probe_neg;
        self.total_pos += part.total_pos;
        self.total_neg += part.total_neg;
        self.active += part.active;
    }
}
