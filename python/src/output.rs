//! The result of a loss, as NumPy arrays that own the library's memory.

use ddtas::loss::{self, LossScalars, Reference};
use ndarray::{Array, Dimension};
use numpy::{Element, PyArray, PyArray1};
use pyo3::prelude::*;

/// Result of one loss evaluation: scalars, an entry per anchor, gradients.
#[pyclass(frozen, get_all, module = "ddtas")]
pub struct LossOutput {
    /// The loss, the mean over all B anchors.
    loss: f64,
    /// dL/d(embeddings), `[B, D]`, float32; float64 for float64 rows.
    gradient: Py<PyAny>,
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
    /// Mined positives of every anchor, inactive ones included (0 there without mining).
    count_pos: Py<PyAny>,
    /// Mined negatives of every anchor, inactive ones included (0 there without mining).
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

/// As [`vector`], of any number of dimensions.
pub fn array<T: Element, D: Dimension>(py: Python<'_>, values: Array<T, D>) -> Py<PyAny> {
    PyArray::from_owned_array(py, values).into_any().unbind()
}

impl LossOutput {
    /// Takes a backend's output.
    pub fn of_backend(py: Python<'_>, output: loss::LossOutput) -> Self {
        let scalars = output.scalars();
        let gradients = (array(py, output.gradient), output.reference_gradient.map(|rows| array(py, rows)));
        let similarities = [vector(py, output.min_pos), vector(py, output.max_neg)];
        let counts = [vector(py, output.count_pos), vector(py, output.count_neg)];
        Self::new(&scalars, gradients, similarities, counts)
    }

    /// Takes the output of the float64 reference, whose gradients and similarities stay float64.
    pub fn of_reference(py: Python<'_>, truth: Reference) -> Self {
        let scalars = truth.scalars();
        let gradients = (array(py, truth.gradient), truth.reference_gradient.map(|rows| array(py, rows)));
        let sizes = truth.selection.sizes();
        let counts = [0, 1].map(|kind| vector(py, sizes.iter().map(|size| size[kind]).collect()));
        let similarities = [vector(py, truth.selection.min_pos), vector(py, truth.selection.max_neg)];
        Self::new(&scalars, gradients, similarities, counts)
    }

    fn new(
        scalars: &LossScalars,
        (gradient, reference_gradient): (Py<PyAny>, Option<Py<PyAny>>),
        [min_pos, max_neg]: [Py<PyAny>; 2],
        [count_pos, count_neg]: [Py<PyAny>; 2],
    ) -> Self {
        Self {
            loss: scalars.loss,
            gradient,
            reference_gradient,
            gamma_pos: scalars.gamma_pos,
            gamma_neg: scalars.gamma_neg,
            probe_neg: scalars.probe_neg,
            total_pos: scalars.total_pos,
            total_neg: scalars.total_neg,
            min_pos,
            max_neg,
            count_pos,
            count_neg,
            active: scalars.active,
            mined: (scalars.mined_pos, scalars.mined_neg),
            dloss_dlambda_pos: scalars.dloss_dlambda_pos,
            dloss_dlambda_neg: scalars.dloss_dlambda_neg,
            mean_pos: scalars.mean_pos,
            mean_neg: scalars.mean_neg,
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
