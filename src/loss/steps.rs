//! The loss of a part of a batch in scalar float64, step by step: the reference for the backends' steps.

use ndarray::Array2;

use super::gradient::{Weighted, weigh_part};
use super::reference::read;
use super::select::{PairTotals, Selection, adapt, probe};
use super::similarity::Similarities;
use super::{Batch, LossSettings, RowNumbers};
use crate::Result;

/// A part of a batch with all its similarities. [`PartReference::same_class`] and the three steps after it
/// take what the caller has gathered from all parts in between, as
/// [`Backend::same_class`](crate::backend::Backend::same_class) describes.
#[derive(Debug, Clone)]
pub struct PartReference {
    similarities: Similarities,
    /// The transposed similarities: references as anchors.
    elsewhere: Similarities,
    references: Array2<f64>,
    settings: LossSettings,
    total: usize,
}

impl PartReference {
    /// Reads a part, made by [`Batch::part`].
    ///
    /// # Errors
    /// As [`reference()`](super::reference()).
    pub fn new(part: &Batch<'_>, settings: &LossSettings) -> Result<Self> {
        settings.validate()?;
        part.validate()?;
        let rows = part.reference_rows();
        let anchors = read(part, "anchors", &part.anchors)?;
        let references = read(part, "references", &rows)?;
        let (own, other) = ((&anchors, part.anchors.labels), (&references, rows.labels));
        let similarities = Similarities::new(own, Some(other)).with_identity(&part.identity);
        let elsewhere = similarities.turned();
        Ok(Self { similarities, elsewhere, references, settings: *settings, total: part.total() })
    }

    /// m+ of every anchor, and the number of positive pairs.
    #[must_use]
    pub fn same_class(&self) -> (Vec<f64>, u64) {
        let anchors = 0..self.similarities.anchors();
        let total_pos = anchors.clone().map(|i| self.similarities.positives(i).count() as u64).sum();
        (anchors.map(|i| self.similarities.min_pos(i)).collect(), total_pos)
    }

    /// m- of every anchor, and the number of negatives that pass the probe, given m+ of every anchor.
    ///
    /// # Panics
    /// If `min_pos` is shorter than the anchors.
    #[must_use]
    pub fn sweep(&self, min_pos: &[f64]) -> (Vec<f64>, u64) {
        let max_neg = (0..self.similarities.anchors()).map(|i| self.similarities.max_neg(i)).collect();
        (max_neg, probe(&self.similarities, &self.settings, min_pos))
    }

    /// The mined pairs of the anchors, given their m+ and m- and the totals of the batch.
    ///
    /// # Panics
    /// If `min_pos` or `max_neg` is shorter than the anchors.
    #[must_use]
    pub fn select(&self, min_pos: &[f64], max_neg: &[f64], totals: PairTotals) -> Selection {
        let tolerances = adapt(&self.settings, totals);
        Selection::keep(&self.similarities, tolerances, (min_pos.to_vec(), max_neg.to_vec()), totals)
    }

    /// The part's share of the loss, and the gradient of its anchors, `[b, D]`: their rows of `(G + G^T) E`.
    /// G^T follows from m+ and m- of the references, and from `sizes` (positives, negatives) over all parts.
    /// References without an entry select no pairs.
    ///
    /// # Panics
    /// If `selection`, or an entry of `sizes`, is not of one of the part's anchors.
    #[must_use]
    pub fn gradient(
        &self,
        selection: &Selection,
        (min_pos, max_neg): (&[f64], &[f64]),
        sizes: RowNumbers<'_, [u32; 2]>,
    ) -> (Weighted, Array2<f64>) {
        let own = weigh_part(&self.similarities, selection, sizes.anchors, &self.settings, self.total);
        let rows = self.elsewhere.anchors();
        let extremes = (padded(min_pos, rows, f64::INFINITY), padded(max_neg, rows, f64::NEG_INFINITY));
        let totals = PairTotals { probe_neg: selection.probe_neg, total_pos: selection.total_pos };
        let kept = Selection::keep(&self.elsewhere, selection.tolerances, extremes, totals);
        let sizes = padded(sizes.references, rows, [0; 2]);
        let back = weigh_part(&self.elsewhere, &kept, &sizes, &self.settings, self.total);
        let gradient = (&own.weights + &back.weights.t()).dot(&self.references);
        (own, gradient)
    }
}

fn padded<T: Copy>(values: &[T], rows: usize, rest: T) -> Vec<T> {
    (0..rows).map(|j| values.get(j).copied().unwrap_or(rest)).collect()
}
