//! The calls of `Context`.

use ddtas::backend::Backend;
use ddtas::loss::{self, Batch, PairTotals, RowNumbers, Rows};
use ddtas::retrieval::{NMI_STEPS, Recall, SearchTask, evaluate_queries, nmi, recall};
use ddtas::threads::{MOST_THREADS, available};
use pyo3::prelude::*;

use crate::double;
use crate::input::{Labels, Matrix, similarities, sizes, whole};
use crate::output::{LossOutput, array, vector};
use crate::part::{self, Part, run};
use crate::settings::Settings;
use crate::sides::{self, LOSS, SEARCH, Sides, unit_check};
use crate::workspace::Context;

#[pymethods]
impl Context {
    #[new]
    #[pyo3(signature = (threads = None, budget = None))]
    fn new(threads: Option<Bound<'_, PyAny>>, budget: Option<Bound<'_, PyAny>>) -> PyResult<Self> {
        let threads =
            threads.map(|value| whole(&value, "threads", &format!("1 to {MOST_THREADS}"))).transpose()?;
        let budget = budget.map(|value| whole(&value, "budget", "bytes, 0 to 2^64 - 1")).transpose()?;
        Self::make(threads, budget)
    }

    /// Threads that compute.
    #[getter]
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(available)
    }

    /// Bytes the workspace holds now.
    #[getter]
    fn workspace_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.compute(py, |backend| Ok(backend.workspace_bytes()))
    }

    /// A copy or a pickle is a new context: the workspace holds nothing that outlives a call.
    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<(Py<PyAny>, Made)> {
        Ok((slf.get_type().into_any().unbind(), (slf.get().threads, slf.get().budget)))
    }

    /// Mines, and evaluates the loss and its gradient.
    #[pyo3(signature = (embeddings, labels, references, reference_labels, identity, settings, reference_gradient, check))]
    #[allow(clippy::too_many_arguments)]
    fn loss<'py>(
        &self,
        py: Python<'py>,
        embeddings: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        references: Option<&Bound<'py, PyAny>>,
        reference_labels: Option<&Bound<'py, PyAny>>,
        identity: Option<&Bound<'py, PyAny>>,
        settings: Settings,
        reference_gradient: bool,
        check: bool,
    ) -> PyResult<LossOutput> {
        let settings = settings.to_library()?;
        let sides = Sides::new(&LOSS, (embeddings, labels), (references, reference_labels), identity)?;
        let check = unit_check(check);
        if sides.is_double() {
            return double::loss(py, &sides, &settings, reference_gradient, check);
        }
        let batch = sides.batch(reference_gradient, check)?;
        let output = self.compute(py, |backend| {
            // Not kept from call to call: Python takes the gradient's memory with it.
            let mut output = loss::LossOutput::default();
            backend.loss(&batch, &settings, &mut output).map(|()| output)
        })?;
        Ok(LossOutput::of_backend(py, output))
    }

    /// The two sums of the threshold gradient along a tangent of the rows.
    #[pyo3(signature = (embeddings, labels, tangent, references, reference_labels, reference_tangent, identity, settings, check))]
    #[allow(clippy::too_many_arguments)]
    fn threshold_gradient<'py>(
        &self,
        py: Python<'py>,
        embeddings: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        tangent: &Bound<'py, PyAny>,
        references: Option<&Bound<'py, PyAny>>,
        reference_labels: Option<&Bound<'py, PyAny>>,
        reference_tangent: Option<&Bound<'py, PyAny>>,
        identity: Option<&Bound<'py, PyAny>>,
        settings: Settings,
        check: bool,
    ) -> PyResult<(f64, f64)> {
        let settings = settings.to_library()?;
        let sides = Sides::new(&LOSS, (embeddings, labels), (references, reference_labels), identity)?;
        let tangent = Matrix::new("tangent", tangent)?;
        let reference_tangent =
            reference_tangent.map(|rows| Matrix::new("tangent of the references", rows)).transpose()?;
        let check = unit_check(check);
        let sums = if sides.is_double() {
            let tangents = (&tangent, reference_tangent.as_ref());
            double::threshold_gradient(py, &sides, &settings, tangents, check)?
        } else {
            let batch = sides.batch(false, check)?;
            let tangent = tangent.float()?;
            let reference_tangent = reference_tangent.as_ref().map(Matrix::float).transpose()?;
            self.compute(py, |backend| {
                backend.loss(&batch, &settings, &mut loss::LossOutput::default())?;
                backend.threshold_gradient(&batch, tangent, reference_tangent)
            })?
        };
        Ok((sums.pos, sums.neg))
    }

    /// First step of a part: m+, positive and negative pairs, and their mean similarities.
    fn same_class(&self, py: Python<'_>, part: Part<'_>) -> PyResult<part::SameClass> {
        let (sides, settings) = (part.sides()?, part.settings.to_library()?);
        let batch = part.batch(&sides)?;
        let found = run(py, self, |backend, output| backend.same_class(&batch, &settings, output))?;
        Ok((vector(py, found.min_pos), found.total_pos, found.total_neg, found.mean_pos, found.mean_neg))
    }

    /// Second step: m- and the probe's count.
    #[pyo3(signature = (part, min_pos, reference_min_pos))]
    fn sweep(
        &self,
        py: Python<'_>,
        part: Part<'_>,
        min_pos: &Bound<'_, PyAny>,
        reference_min_pos: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<part::Sweep> {
        let sides = part.sides()?;
        let batch = part.batch(&sides)?;
        let own = similarities("min_pos", Some(min_pos))?;
        let other = similarities("reference_min_pos", reference_min_pos)?;
        let numbers = RowNumbers::new(&own, &other);
        let found = run(py, self, |backend, output| backend.sweep(&batch, numbers, output))?;
        Ok((vector(py, found.max_neg), found.probe_neg))
    }

    /// Third step: the sizes of both sets, and the tolerances.
    #[pyo3(signature = (part, max_neg, reference_max_neg, probe_neg, total_pos))]
    fn select(
        &self,
        py: Python<'_>,
        part: Part<'_>,
        max_neg: &Bound<'_, PyAny>,
        reference_max_neg: Option<&Bound<'_, PyAny>>,
        probe_neg: &Bound<'_, PyAny>,
        total_pos: &Bound<'_, PyAny>,
    ) -> PyResult<part::Selection> {
        let count = |value, name| whole(value, name, "the sum over all parts").map(|count| count as u64);
        let totals = PairTotals {
            probe_neg: count(probe_neg, "probe_neg")?,
            total_pos: count(total_pos, "total_pos")?,
        };
        let sides = part.sides()?;
        let batch = part.batch(&sides)?;
        let own = similarities("max_neg", Some(max_neg))?;
        let other = similarities("reference_max_neg", reference_max_neg)?;
        let numbers = RowNumbers::new(&own, &other);
        let found = run(py, self, |backend, output| backend.select(&batch, numbers, totals, output))?;
        let counts = (vector(py, found.count_pos), vector(py, found.count_neg));
        Ok((counts.0, counts.1, found.gamma_pos, found.gamma_neg))
    }

    /// Last step: the part's share of the loss, the gradient of its anchors, active ones, and dL/dlambda.
    #[pyo3(signature = (part, count_pos, count_neg, reference_count_pos, reference_count_neg))]
    fn gradient(
        &self,
        py: Python<'_>,
        part: Part<'_>,
        count_pos: &Bound<'_, PyAny>,
        count_neg: &Bound<'_, PyAny>,
        reference_count_pos: Option<&Bound<'_, PyAny>>,
        reference_count_neg: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<part::PartLoss> {
        let sides = part.sides()?;
        let batch = part.batch(&sides)?;
        let own = [sizes("count_pos", Some(count_pos))?, sizes("count_neg", Some(count_neg))?];
        let other = [
            sizes("reference_count_pos", reference_count_pos)?,
            sizes("reference_count_neg", reference_count_neg)?,
        ];
        let (pos, neg) = (RowNumbers::new(&own[0], &other[0]), RowNumbers::new(&own[1], &other[1]));
        let found = run(py, self, |backend, output| backend.gradient(&batch, pos, neg, output))?;
        let gradient = array(py, found.gradient);
        Ok((found.loss, gradient, found.active, found.dloss_dlambda_pos, found.dloss_dlambda_neg))
    }

    /// After the last step: the part's share of both sums of the threshold gradient.
    #[pyo3(signature = (part, tangent, reference_tangent))]
    fn part_threshold_gradient<'py>(
        &self,
        py: Python<'py>,
        part: Part<'py>,
        tangent: &Bound<'py, PyAny>,
        reference_tangent: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(f64, f64)> {
        let sides = part.sides()?;
        let batch = part.batch(&sides)?;
        let own = Matrix::new("tangent", tangent)?;
        let other =
            reference_tangent.map(|rows| Matrix::new("tangent of the references", rows)).transpose()?;
        let (tangent, moving) = (own.float()?, other.as_ref().map(Matrix::float).transpose()?);
        let sums = self.compute(py, |backend| backend.threshold_gradient(&batch, tangent, moving))?;
        Ok((sums.pos, sums.neg))
    }

    /// For each query: rank of the first answer, R-precision, average precision at R, and the label. The metrics
    /// are NaN for a query without an answer; the rank is -1 if no answer is in the query's list.
    #[pyo3(signature = (queries, labels, gallery, gallery_labels, identity, ks))]
    #[allow(clippy::too_many_arguments)]
    fn query_metrics<'py>(
        &self,
        py: Python<'py>,
        queries: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        gallery: Option<&Bound<'py, PyAny>>,
        gallery_labels: Option<&Bound<'py, PyAny>>,
        identity: Option<&Bound<'py, PyAny>>,
        ks: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<QueryMetrics> {
        let ks = depths(&ks)?;
        let sides = Sides::new(&SEARCH, (queries, labels), (gallery, gallery_labels), identity)?;
        let batch = sides.batch(false, unit_check(true))?;
        let metrics = self.compute(py, |backend| metrics_of_queries(backend, &batch, &ks))?;
        Ok(metrics.into_python(py))
    }

    /// NMI of the rows' classes and as many clusters, by k-means.
    fn nmi<'py>(
        &self,
        py: Python<'py>,
        rows: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        seed: Bound<'py, PyAny>,
    ) -> PyResult<f64> {
        let seed = whole(&seed, "seed", "0 to 2^64 - 1")? as u64;
        let side = (Matrix::new("queries", rows)?, Labels::new("labels of the queries", labels)?);
        side.0.float()?;
        let rows = sides::rows(&side)?;
        self.compute(py, |backend| nmi(backend, &rows, NMI_STEPS, seed, &mut |_| {}))
    }

    /// Recall@K of every row searched among the others: pairs of K and the share of answered queries, how
    /// many queries were counted, and how many had nothing to find.
    fn recall_at_k<'py>(
        &self,
        py: Python<'py>,
        embeddings: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        ks: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<Found> {
        let ks = depths(&ks)?;
        let side = (Matrix::new("queries", embeddings)?, Labels::new("labels of the queries", labels)?);
        let rows = sides::rows(&side)?;
        self.compute(py, |backend| recall(backend, &rows, None, &ks).map(found))
    }
}

/// Ranks of first answers, R-precision, average precision at R, labels.
pub type QueryMetrics = (Py<PyAny>, Py<PyAny>, Py<PyAny>, Py<PyAny>);

/// [`QueryMetrics`] before the conversion to Python.
pub struct MetricColumns {
    first: Vec<f64>,
    r_precision: Vec<f64>,
    average_precision: Vec<f64>,
    labels: Vec<i64>,
}

/// Metrics of a batch's anchors as queries, searched among its references.
pub fn metrics_of_queries(
    backend: &mut dyn Backend,
    batch: &Batch<'_>,
    ks: &[usize],
) -> ddtas::Result<MetricColumns> {
    let labels = batch.anchors.labels.to_vec();
    let nothing = || vec![f64::NAN; labels.len()];
    let mut all =
        MetricColumns { first: nothing(), r_precision: nothing(), average_precision: nothing(), labels };
    let gallery = batch.references.as_ref().map(Rows::view);
    let task = SearchTask { queries: batch.anchors.view(), gallery, identity: batch.identity };
    evaluate_queries(backend, &task, ks, &mut |metrics| {
        all.first[metrics.query] = metrics.first.map_or(-1.0, |place| place as f64);
        all.r_precision[metrics.query] = metrics.r_precision;
        all.average_precision[metrics.query] = metrics.average_precision;
    })?;
    Ok(all)
}

impl MetricColumns {
    pub fn into_python(self, py: Python<'_>) -> QueryMetrics {
        let Self { first, r_precision, average_precision, labels } = self;
        (vector(py, first), vector(py, r_precision), vector(py, average_precision), vector(py, labels))
    }
}

/// Threads and budget, from which a context is made.
type Made = (Option<usize>, Option<usize>);

/// K and the shares, queries counted, queries without anything to find.
pub type Found = (Vec<(usize, f64)>, usize, usize);

pub fn found(recall: Recall) -> Found {
    (recall.at, recall.queries, recall.without_match)
}

/// The values of K.
///
/// # Errors
/// As [`whole`].
pub fn depths(ks: &[Bound<'_, PyAny>]) -> PyResult<Vec<usize>> {
    ks.iter().map(|k| whole(k, "ks", "1 to 2^64 - 1")).collect()
}
