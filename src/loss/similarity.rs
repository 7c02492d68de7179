//! Similarities, and which pairs are positive and negative (SPEC 1).

use ndarray::Array2;

use super::Identity;

/// Share of the longer row's squared norm. A positive of at least this similarity is an exact duplicate and
/// carries no signal.
pub const DUPLICATE: f64 = 1.0 - 1e-6;

/// Every similarity of a batch, in float64, with the labels that tell positives from negatives.
#[derive(Debug, Clone)]
pub struct Similarities {
    /// `S[i, j] = anchor_i . reference_j`, `[B, N]`.
    pub values: Array2<f64>,
    /// Squared norms, 1 but for rounding.
    anchor_squares: Vec<f64>,
    reference_squares: Vec<f64>,
    anchor_labels: Vec<i64>,
    reference_labels: Vec<i64>,
    /// The reference that is each anchor itself, if known.
    itself: Vec<Option<usize>>,
}

impl Similarities {
    /// Computes S of `anchors` `[B, D]` against `references` `[N, D]`, or against themselves. Leaves out each
    /// anchor's pair with the reference that is the anchor itself, if known.
    ///
    /// # Panics
    /// If dimensions differ, or later if a side has fewer labels than rows: [`reference()`](super::reference())
    /// checks both.
    #[must_use]
    pub fn new(
        anchors: (&Array2<f64>, &[i64]),
        references: Option<(&Array2<f64>, &[i64], &Identity<'_>)>,
    ) -> Self {
        let (reference_embeddings, reference_labels, identity) =
            references.unwrap_or((anchors.0, anchors.1, &Identity::From(0)));
        let squares = |rows: &Array2<f64>| rows.outer_iter().map(|row| row.dot(&row)).collect();
        Self {
            anchor_squares: squares(anchors.0),
            reference_squares: squares(reference_embeddings),
            values: anchors.0.dot(&reference_embeddings.t()),
            anchor_labels: anchors.1.to_vec(),
            reference_labels: reference_labels.to_vec(),
            itself: (0..anchors.1.len()).map(|i| identity.of(i)).collect(),
        }
    }

    /// Number of anchors, B.
    #[must_use]
    pub fn anchors(&self) -> usize {
        self.values.nrows()
    }

    /// Positives of anchor i: same label, not itself, not an exact duplicate.
    pub fn positives(&self, i: usize) -> impl Iterator<Item = usize> + '_ {
        self.compared(i).filter(move |&j| {
            self.reference_labels[j] == self.anchor_labels[i]
                && self.values[[i, j]] < self.duplicate_bound(i, j)
        })
    }

    /// The similarity from which anchor i and reference j of the same class are exact duplicates. Relative to
    /// the longer row, so that a half-precision row, of norm not quite 1, duplicates itself.
    #[must_use]
    pub fn duplicate_bound(&self, i: usize, j: usize) -> f64 {
        DUPLICATE * self.anchor_squares[i].max(self.reference_squares[j])
    }

    /// Negatives of anchor i: another label.
    pub fn negatives(&self, i: usize) -> impl Iterator<Item = usize> + '_ {
        self.compared(i).filter(move |&j| self.reference_labels[j] != self.anchor_labels[i])
    }

    /// m+_i, the smallest similarity to a positive; +inf if there is none.
    #[must_use]
    pub fn min_pos(&self, i: usize) -> f64 {
        self.positives(i).map(|j| self.values[[i, j]]).fold(f64::INFINITY, f64::min)
    }

    /// m-_i, the largest similarity to a negative; -inf if there is none.
    #[must_use]
    pub fn max_neg(&self, i: usize) -> f64 {
        self.negatives(i).map(|j| self.values[[i, j]]).fold(f64::NEG_INFINITY, f64::max)
    }

    /// References that form a pair with anchor i: ignored rows take part in none.
    fn compared(&self, i: usize) -> impl Iterator<Item = usize> + '_ {
        let anchor_counts = self.anchor_labels[i] >= 0;
        (0..self.reference_labels.len())
            .filter(move |&j| anchor_counts && self.reference_labels[j] >= 0 && self.itself[i] != Some(j))
    }
}
