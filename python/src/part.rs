//! `ddtas.Part`, some anchors of a batch, and the steps of its loss.

use ddtas::backend::Backend;
use ddtas::loss::{self, Batch, PairTotals, RowNumbers};
use pyo3::prelude::*;

use crate::input::{Matrix, similarities, sizes, whole};
use crate::output::{array, vector};
use crate::settings::Settings;
use crate::sides::{LOSS, Sides, unit_check};
use crate::workspace::Context;

/// The fields of `ddtas.Part`, read by name.
#[derive(FromPyObject)]
pub struct Part<'py> {
    embeddings: Bound<'py, PyAny>,
    labels: Bound<'py, PyAny>,
    references: Bound<'py, PyAny>,
    reference_labels: Bound<'py, PyAny>,
    identity: Option<Bound<'py, PyAny>>,
    total: Bound<'py, PyAny>,
    settings: Settings,
    check: bool,
}

/// m+, positive and negative pairs, mean similarities of both.
pub type SameClass = (Py<PyAny>, u64, u64, f64, f64);
/// m-, negatives that passed the probe.
pub type Sweep = (Py<PyAny>, u64);
/// Sizes of both sets, tolerances of both.
pub type Selection = (Py<PyAny>, Py<PyAny>, f64, f64);
/// Loss, gradient, active anchors, dL/dlambda of both.
pub type PartLoss = (f64, Py<PyAny>, u64, f64, f64);

/// Numbers of anchors and references, as Python passes them.
type Given<'a, 'py> = (&'a Bound<'py, PyAny>, Option<&'a Bound<'py, PyAny>>);

impl<'py> Part<'py> {
    fn sides(&self) -> PyResult<Sides<'py>> {
        let references = (Some(&self.references), Some(&self.reference_labels));
        Sides::new(&LOSS, (&self.embeddings, &self.labels), references, self.identity.as_ref())
    }

    fn batch<'a>(&self, sides: &'a Sides<'_>) -> PyResult<Batch<'a>> {
        let total = whole(&self.total, "total", "the anchors of all parts")?;
        Ok(Batch { total: Some(total), ..sides.batch(false, unit_check(self.check))? })
    }

    /// See [`Backend::same_class`].
    pub fn same_class(&self, py: Python<'_>, context: &Context) -> PyResult<SameClass> {
        let (sides, settings) = (self.sides()?, self.settings.to_library()?);
        let batch = self.batch(&sides)?;
        let found = run(py, context, |backend, output| backend.same_class(&batch, &settings, output))?;
        Ok((vector(py, found.min_pos), found.total_pos, found.total_neg, found.mean_pos, found.mean_neg))
    }

    /// See [`Backend::sweep`].
    pub fn sweep(&self, py: Python<'_>, context: &Context, min_pos: Given<'_, '_>) -> PyResult<Sweep> {
        let sides = self.sides()?;
        let batch = self.batch(&sides)?;
        let own = similarities("min_pos", Some(min_pos.0))?;
        let other = similarities("reference_min_pos", min_pos.1)?;
        let numbers = RowNumbers::new(&own, &other);
        let found = run(py, context, |backend, output| backend.sweep(&batch, numbers, output))?;
        Ok((vector(py, found.max_neg), found.probe_neg))
    }

    /// See [`Backend::select`].
    pub fn select(
        &self,
        py: Python<'_>,
        context: &Context,
        max_neg: Given<'_, '_>,
        totals: PairTotals,
    ) -> PyResult<Selection> {
        let sides = self.sides()?;
        let batch = self.batch(&sides)?;
        let own = similarities("max_neg", Some(max_neg.0))?;
        let other = similarities("reference_max_neg", max_neg.1)?;
        let numbers = RowNumbers::new(&own, &other);
        let found = run(py, context, |backend, output| backend.select(&batch, numbers, totals, output))?;
        let counts = (vector(py, found.count_pos), vector(py, found.count_neg));
        Ok((counts.0, counts.1, found.gamma_pos, found.gamma_neg))
    }

    /// See [`Backend::gradient`].
    pub fn gradient(
        &self,
        py: Python<'_>,
        context: &Context,
        count_pos: Given<'_, '_>,
        count_neg: Given<'_, '_>,
    ) -> PyResult<PartLoss> {
        let sides = self.sides()?;
        let batch = self.batch(&sides)?;
        let own = [sizes("count_pos", Some(count_pos.0))?, sizes("count_neg", Some(count_neg.0))?];
        let other = [sizes("reference_count_pos", count_pos.1)?, sizes("reference_count_neg", count_neg.1)?];
        let (pos, neg) = (RowNumbers::new(&own[0], &other[0]), RowNumbers::new(&own[1], &other[1]));
        let found = run(py, context, |backend, output| backend.gradient(&batch, pos, neg, output))?;
        let gradient = array(py, found.gradient);
        Ok((found.loss, gradient, found.active, found.dloss_dlambda_pos, found.dloss_dlambda_neg))
    }

    /// See [`Backend::threshold_gradient`].
    pub fn threshold_gradient(
        &self,
        py: Python<'_>,
        context: &Context,
        tangent: &Bound<'py, PyAny>,
        reference_tangent: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(f64, f64)> {
        let sides = self.sides()?;
        let batch = self.batch(&sides)?;
        let own = Matrix::new("tangent", tangent)?;
        let other =
            reference_tangent.map(|rows| Matrix::new("tangent of the references", rows)).transpose()?;
        let (tangent, moving) = (own.float()?, other.as_ref().map(Matrix::float).transpose()?);
        let sums = context.compute(py, |backend| backend.threshold_gradient(&batch, tangent, moving))?;
        Ok((sums.pos, sums.neg))
    }
}

/// Runs a step and returns the output it has filled in.
fn run(
    py: Python<'_>,
    context: &Context,
    step: impl FnOnce(&mut dyn Backend, &mut loss::LossOutput) -> ddtas::Result<()> + Send,
) -> PyResult<loss::LossOutput> {
    context.compute(py, |backend| {
        let mut output = loss::LossOutput::default();
        step(backend, &mut output).map(|()| output)
    })
}
