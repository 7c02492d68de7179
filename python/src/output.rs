//! What a loss returns, as NumPy arrays that own the library's memory.

use ddtas::loss::select::Selection;
use ddtas::loss::{self, Reference};
use ndarray::Array2;
use numpy::{Element, PyArray1, PyArray2};
use pyo3::prelude::*;

/// Result of one loss evaluation: scalars, an entry per anchor, gradients.
#[pyclass(frozen, get_all, module = "ddtas")]
pub struct LossOutput {
    /// The loss, the mean over all B anchors.
    loss: f64,
    /// dL/d(embeddings), `[B, D]`, float32; float64 for float64 rows.
    gradient: Option<Py<PyAny>>,
    /// dL/d(references), `[N, D]`, if it was asked for.
    reference_gradient: Option<Py<PyAny>>,
    /// Tolerance of positives in force, after adaptation.
    gamma_pos: f64,
    /// Tolerance of negatives in force, after adaptation.
    gamma_neg: f64,
    /// Negatives that passed the probe, over all anchors.
    probe_neg: u64,
    /// Ordered positive pairs of the batch.
    total_pos: u64,
    /// Ordered negative pairs of the batch.
    total_neg: u64,
    /// m+: smallest similarity to a positive, an entry per anchor; inf without one.
    min_pos: Py<PyAny>,
    /// m-: largest similarity to a negative, an entry per anchor; -inf without one.
    max_neg: Py<PyAny>,
    /// Mined positives of every anchor, inactive ones included.
    count_pos: Py<PyAny>,
    /// Mined negatives of every anchor, inactive ones included.
    count_neg: Py<PyAny>,
    /// Anchors with mined pairs of both kinds: those that enter the loss.
    active: u64,
    /// Positive and negative pairs of active anchors.
    mined: (u64, u64),
    /// dL/d(lambda_pos).
    dloss_dlambda_pos: f64,
    /// dL/d(lambda_neg).
    dloss_dlambda_neg: f64,
    /// Mean similarity of all positive pairs; NaN if there is none.
    mean_pos: f64,
    /// Mean similarity of all negative pairs; NaN if there is none.
    mean_neg: f64,
}

/// An array that owns the library's memory.
pub fn vector<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyAny> {
    PyArray1::from_vec(py, values).into_any().unbind()
}

/// As [`vector`], with rows.
pub fn matrix<T: Element>(py: Python<'_>, values: Array2<T>) -> Py<PyAny> {
    PyArray2::from_owned_array(py, values).into_any().unbind()
}

/// Pairs of active anchors, positive and negative.
pub fn mined(selection: &Selection) -> (u64, u64) {
    (0..selection.positives.len()).filter(|&i| selection.is_active(i)).fold((0, 0), |sum, i| {
        (sum.0 + selection.positives[i].len() as u64, sum.1 + selection.negatives[i].len() as u64)
    })
}

impl LossOutput {
    /// Takes a backend's output. A gradient that stayed on the device is `None`.
    pub fn of_backend(py: Python<'_>, output: loss::LossOutput) -> Self {
        let mined = output.mined();
        let gradient = (!output.gradient.is_empty()).then(|| matrix(py, output.gradient));
        Self {
            loss: output.loss,
            gradient,
            reference_gradient: output.reference_gradient.map(|rows| matrix(py, rows)),
            gamma_pos: output.gamma_pos,
            gamma_neg: output.gamma_neg,
            probe_neg: output.probe_neg,
            total_pos: output.total_pos,
            total_neg: output.total_neg,
            min_pos: vector(py, output.min_pos),
            max_neg: vector(py, output.max_neg),
            count_pos: vector(py, output.count_pos),
            count_neg: vector(py, output.count_neg),
            active: output.active,
            mined,
            dloss_dlambda_pos: output.dloss_dlambda_pos,
            dloss_dlambda_neg: output.dloss_dlambda_neg,
            mean_pos: output.mean_pos,
            mean_neg: output.mean_neg,
        }
    }

    /// Takes the truth's, whose gradients and similarities stay float64.
    pub fn of_reference(py: Python<'_>, truth: Reference) -> Self {
        let active = truth.active();
        let Reference { selection, weighted, gradient, reference_gradient, mean_pos, mean_neg, .. } = truth;
        let total_neg = truth.total_neg;
        let mined = mined(&selection);
        let sizes = |sets: &[Vec<usize>]| vector(py, sets.iter().map(|set| set.len() as u32).collect());
        Self {
            loss: weighted.loss,
            gradient: Some(matrix(py, gradient)),
            reference_gradient: reference_gradient.map(|rows| matrix(py, rows)),
            gamma_pos: selection.tolerances.pos,
            gamma_neg: selection.tolerances.neg,
            probe_neg: selection.probe_neg,
            total_pos: selection.total_pos,
            total_neg,
            count_pos: sizes(&selection.positives),
            count_neg: sizes(&selection.negatives),
            min_pos: vector(py, selection.min_pos),
            max_neg: vector(py, selection.max_neg),
            active,
            mined,
            dloss_dlambda_pos: weighted.dloss_dlambda_pos,
            dloss_dlambda_neg: weighted.dloss_dlambda_neg,
            mean_pos,
            mean_neg,
        }
    }
}

#[pymethods]
impl LossOutput {
    fn __repr__(&self) -> String {
        let Self { loss, active, mined: (pos, neg), .. } = self;
        format!("LossOutput(loss={loss:.6}, active={active}, mined=({pos}, {neg}))")
    }
}
