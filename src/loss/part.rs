//! Numbers that the parts of a batch exchange between the steps of a loss.

use super::{Batch, LossOutput, same_length};
use crate::{Error, Result};

/// One number per row of a part, found over the whole batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowNumbers<'a, T> {
    /// One entry per anchor of the part.
    pub anchors: &'a [T],
    /// One entry per reference that is an anchor of the whole batch; these references come first. References
    /// without an entry, such as those of a memory bank, select no pairs.
    pub references: &'a [T],
}

impl<'a, T> RowNumbers<'a, T> {
    /// Joins the numbers of both sides.
    #[must_use]
    pub fn new(anchors: &'a [T], references: &'a [T]) -> Self {
        Self { anchors, references }
    }

    /// Checks that there is one number per anchor and at most one per reference.
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
    /// Checks |P| and |N| of each row; both must have the same number of references.
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
    /// Adds a part's loss, derivatives by the thresholds and counts, and combines the means. Fields with an
    /// entry a row, gradients and tolerances stay as they are.
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
