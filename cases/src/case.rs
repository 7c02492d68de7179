//! A batch with its expected results.

use ddtas::Result;
use ddtas::loss::select::{initial_tolerances, probe_tolerance};
use ddtas::loss::{Batch, ElementType, Identity, LossSettings, OwnedEmbeddings, Reference, Rows, UnitCheck};
use ndarray::Array2;

use crate::Expected;

/// Rows with their labels, and the tangent that goes with them (edot of SPEC 5).
#[derive(Debug, Clone)]
pub struct Side {
    /// Unit rows.
    pub rows: OwnedEmbeddings,
    /// One label per row; a row with a negative label is ignored.
    pub labels: Vec<i64>,
    /// A row for each of `rows`.
    pub tangent: Array2<f32>,
}

impl Side {
    /// The rows as a backend takes them.
    #[must_use]
    pub fn view(&self) -> Rows<'_> {
        Rows { embeddings: self.rows.view(), labels: &self.labels }
    }
}

/// A batch, its settings, and the expected results.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its situation, e.g. `duplicate_image`.
    pub name: String,
    /// Settings of mining and loss.
    pub settings: LossSettings,
    /// The rows of the batch.
    pub anchors: Side,
    /// The rows they are compared with; `None` is the square form.
    pub references: Option<Side>,
    /// The expected results.
    pub expected: Expected,
}

impl Case {
    /// A case whose expected results are the truth's.
    ///
    /// # Errors
    /// Errors of the truth.
    pub fn new(
        name: String,
        settings: LossSettings,
        anchors: Side,
        references: Option<Side>,
    ) -> Result<Self> {
        let tangents = (&anchors.tangent, references.as_ref().map(|side| &side.tangent));
        let expected =
            Expected::evaluate(&batch(&anchors, references.as_ref()), &settings, tangents.0, tangents.1)?;
        Ok(Self { name, settings, anchors, references, expected })
    }

    /// The case with its rows rounded to another type, and the truth's results for these.
    ///
    /// # Errors
    /// Errors of the truth.
    pub fn rounded_to(&self, dtype: ElementType) -> Result<Self> {
        let side = |side: &Side| {
            let rows = side.rows.view().to_f64().mapv(|value| value as f32);
            Side { rows: OwnedEmbeddings::new(&rows, dtype), ..side.clone() }
        };
        Self::new(self.name.clone(), self.settings, side(&self.anchors), self.references.as_ref().map(side))
    }

    /// The type of its rows.
    #[must_use]
    pub fn dtype(&self) -> ElementType {
        self.anchors.rows.view().element_type()
    }

    /// The batch as the backend sees it; in the rectangular form with both gradients.
    #[must_use]
    pub fn batch(&self) -> Batch<'_> {
        batch(&self.anchors, self.references.as_ref())
    }
}

fn batch<'a>(anchors: &'a Side, references: Option<&'a Side>) -> Batch<'a> {
    Batch {
        anchors: anchors.view(),
        references: references.map(Side::view),
        reference_gradient: references.is_some(),
        identity: Identity::ByValue,
        total: None,
        check: UnitCheck::Check,
    }
}

/// Whether no pair is within `slack` of a threshold, so that single precision finds the truth's sets.
#[must_use]
pub fn is_clear(truth: &Reference, settings: &LossSettings, slack: f64) -> bool {
    let (similarities, selection) = (&truth.similarities, &truth.selection);
    let tolerances = [selection.tolerances.neg, initial_tolerances(settings).neg, probe_tolerance(settings)];
    // An infinite bound is far from everything, and so is NaN: an infinite tolerance where there is no m+ or m-.
    let clear = |value: f64, bound: f64| bound.is_nan() || (value - bound).abs() >= slack;
    (0..similarities.anchors()).all(|i| {
        let s = similarities.values.row(i);
        let upper = selection.max_neg[i] + selection.tolerances.pos;
        // Duplicates lie within 1e-6 of the squared norm by definition: what counts is that they are not near its edge.
        s.iter().enumerate().all(|(j, &value)| (value - similarities.duplicate_bound(i, j)).abs() > 7e-7)
            && similarities.positives(i).all(|j| clear(s[j], upper))
            && similarities
                .negatives(i)
                .all(|j| tolerances.iter().all(|tolerance| clear(s[j], selection.min_pos[i] - tolerance)))
    })
}
