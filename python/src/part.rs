//! `ddtas.Part`, some anchors of a batch. The steps of its loss are methods of `Context`.

use ddtas::backend::Backend;
use ddtas::loss::{Batch, LossOutput};
use pyo3::prelude::*;

use crate::input::whole;
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
    pub settings: Settings,
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

impl<'py> Part<'py> {
    pub fn sides(&self) -> PyResult<Sides<'py>> {
        let references = (Some(&self.references), Some(&self.reference_labels));
        Sides::new(&LOSS, (&self.embeddings, &self.labels), references, self.identity.as_ref())
    }

    pub fn batch<'a>(&self, sides: &'a Sides<'_>) -> PyResult<Batch<'a>> {
        let total = whole(&self.total, "total", "the anchors of all parts")?;
        Ok(Batch { total: Some(total), ..sides.batch(false, unit_check(self.check))? })
    }
}

/// Runs a step and returns the output it has filled in.
pub fn run(
    py: Python<'_>,
    context: &Context,
    step: impl FnOnce(&mut dyn Backend, &mut LossOutput) -> ddtas::Result<()> + Send,
) -> PyResult<LossOutput> {
    context.compute(py, |backend| {
        let mut output = LossOutput::default();
        step(backend, &mut output).map(|()| output)
    })
}
