//! Virtual step of the embedding head only, in closed form.
//!
//! The head is linear, so the virtual step, the meta loss and the tangent need only features, which a
//! training step computes anyway: no pass through the backbone. All values are float64; the cost is small
//! compared with the step.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, Zip};

use super::{Lambda, VirtualStep, VirtualStepKind};
use crate::Result;
use ddtas::loss::ThresholdGradient;

/// Weights of the head, or a direction in their space.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// `[features, D]`.
    pub weight: Array2<f64>,
    /// `[D]`.
    pub bias: Array1<f64>,
}

/// Embeddings of unit norm, and their norms before normalisation.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedded {
    /// `[B, D]`.
    pub embeddings: Array2<f64>,
    norms: Array1<f64>,
}

impl Head {
    /// Embeds features `[B, features]`.
    #[must_use]
    pub fn embed(&self, features: ArrayView2<'_, f64>) -> Embedded {
        let mut embeddings = features.dot(&self.weight) + &self.bias;
        let norms = embeddings.map_axis(Axis(1), |row| row.dot(&row).sqrt().max(f64::MIN_POSITIVE));
        Zip::from(embeddings.rows_mut()).and(&norms).for_each(|mut row, &norm| row /= norm);
        Embedded { embeddings, norms }
    }

    /// The gradient of the weights from `gradient` = dL/dE, `[B, D]`.
    #[must_use]
    pub fn pull_back(features: ArrayView2<'_, f64>, embedded: &Embedded, gradient: &Array2<f64>) -> Self {
        let raw = embedded.through_norm(gradient.clone());
        Self { weight: features.t().dot(&raw), bias: raw.sum_axis(Axis(0)) }
    }

    /// edot: the directional derivative of the embeddings when the weights move along `direction`.
    #[must_use]
    pub fn tangent(features: ArrayView2<'_, f64>, embedded: &Embedded, direction: &Self) -> Array2<f64> {
        embedded.through_norm(features.dot(&direction.weight) + &direction.bias)
    }

    /// Sum of the products of all entries.
    #[must_use]
    pub fn dot(&self, other: &Self) -> f64 {
        let flat = |head: &Self| head.weight.iter().chain(&head.bias).copied().collect::<Array1<f64>>();
        flat(self).dot(&flat(other))
    }

    /// `self + factor * direction`.
    #[must_use]
    pub fn moved(&self, factor: f64, direction: &Self) -> Self {
        Self {
            weight: &self.weight + &direction.weight * factor,
            bias: &self.bias + &direction.bias * factor,
        }
    }
}

impl Embedded {
    /// Applies the derivative of `raw / |raw|` to `rows`. It is symmetric, so it is the same forward and backward.
    fn through_norm(&self, mut rows: Array2<f64>) -> Array2<f64> {
        let along = |row: ArrayView1<'_, f64>, embedding: ArrayView1<'_, f64>| row.dot(&embedding);
        Zip::from(rows.rows_mut()).and(self.embeddings.rows()).and(&self.norms).for_each(
            |mut row, embedding, &norm| {
                let share = along(row.view(), embedding);
                row.scaled_add(-share, &embedding);
                row /= norm;
            },
        );
        rows
    }
}

/// The three evaluations of the loss that a hyper-gradient needs.
pub trait Losses {
    /// dL/dE of the training batch at `lambda`, `[B, D]`; keeps the mined pairs.
    ///
    /// # Errors
    /// Errors of the backend.
    fn train(&mut self, embeddings: &Array2<f64>, lambda: Lambda) -> Result<Array2<f64>>;

    /// dL^m/dE of the meta batch at its reference threshold.
    ///
    /// # Errors
    /// Errors of the backend.
    fn meta(&mut self, embeddings: &Array2<f64>) -> Result<Array2<f64>>;

    /// The sums of SPEC 5 over the pairs that [`train`](Losses::train) kept.
    ///
    /// # Errors
    /// Errors of the backend.
    fn threshold_gradient(
        &mut self,
        embeddings: &Array2<f64>,
        tangent: &Array2<f64>,
    ) -> Result<ThresholdGradient>;
}

/// dL^m/dlambda (SPEC 5) for a virtual step of the head from `head`, on training features `[B, features]` and
/// meta features `[B^m, features]`. `None` if the training or the meta batch has no mined pair.
///
/// The direction of a unit step depends on lambda, but not its length: only the component of the meta
/// gradient orthogonal to the training gradient counts then.
///
/// # Errors
/// Errors of `losses`.
pub fn hypergradient(
    head: &Head,
    train: ArrayView2<'_, f64>,
    meta: ArrayView2<'_, f64>,
    step: VirtualStep,
    lambda: Lambda,
    losses: &mut dyn Losses,
) -> Result<Option<ThresholdGradient>> {
    let embedded = head.embed(train);
    let gradient = Head::pull_back(train, &embedded, &losses.train(&embedded.embeddings, lambda)?);
    let length = gradient.dot(&gradient).sqrt();
    if length == 0.0 {
        return Ok(None);
    }
    let rate = match step.kind {
        VirtualStepKind::Plain => step.rate,
        VirtualStepKind::Unit => step.rate / length,
    };
    let virtual_head = head.moved(-rate, &gradient);
    let meta_embedded = virtual_head.embed(meta);
    let mut direction = Head::pull_back(meta, &meta_embedded, &losses.meta(&meta_embedded.embeddings)?);
    if direction.dot(&direction) == 0.0 {
        return Ok(None);
    }
    if step.kind == VirtualStepKind::Unit {
        direction = direction.moved(-direction.dot(&gradient) / (length * length), &gradient);
    }
    let tangent = Head::tangent(train, &embedded, &direction);
    let ThresholdGradient { pos, neg } = losses.threshold_gradient(&embedded.embeddings, &tangent)?;
    Ok(Some(ThresholdGradient { pos: -rate * pos, neg: -rate * neg }))
}
