//! A batch in parts: each with its own backend and thread, which exchange their results.
#![allow(clippy::unwrap_used, missing_docs, reason = "for tests, which stop where something is off")]

use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::loss::{
    Batch, Embeddings, Identity, LossOutput, LossSettings, Mining, PairTotals, RowNumbers, Rows,
    ThresholdGradient, reference,
};
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::random::{self, Draw, draw};
use crate::{Case, Report, SINGLE_PRECISION};

/// Rows of any type from `first` to `end`.
pub fn slice<'a>(rows: &'a Rows<'_>, first: usize, end: usize) -> Rows<'a> {
    let embeddings = match &rows.embeddings {
        Embeddings::F32(m) => Embeddings::F32(m.slice(s![first..end, ..])),
        Embeddings::F16(m) => Embeddings::F16(m.slice(s![first..end, ..])),
        Embeddings::Bf16(m) => Embeddings::Bf16(m.slice(s![first..end, ..])),
    };
    Rows { embeddings, labels: &rows.labels[first..end] }
}

/// The results of all parts in one: totals summed, rows concatenated.
#[derive(Debug, Default)]
pub struct Together {
    pub output: LossOutput,
    pub threshold_gradient: ThresholdGradient,
}

/// The loss of the first rows of `all`, in parts of these `lengths`; the rows behind them are a memory.
///
/// `tangent` is edot of the anchors.
pub fn loss_in_parts(
    backends: &mut [Box<dyn Backend>],
    all: &Rows<'_>,
    lengths: &[usize],
    settings: &LossSettings,
    tangent: ArrayView2<'_, f32>,
) -> Result<Together> {
    let total = lengths.iter().sum();
    let part = |(first, end): (usize, usize)| {
        Batch::part(slice(all, first, end), all.view(), Identity::From(first), total)
    };
    four_steps(backends, &part, lengths, true, settings, (tangent, None))
}

/// A rectangular batch, its anchors in parts of these `lengths`. The gradient of its references is that of
/// parts of `reference_lengths`, in which they take the anchors' place and mine nothing.
///
/// `tangents` are edot of anchors and references.
pub fn rectangular_in_parts(
    backends: &mut [Box<dyn Backend>],
    batch: &Batch<'_>,
    lengths: [&[usize]; 2],
    settings: &LossSettings,
    tangents: (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
) -> Result<Together> {
    let (anchors, references) = (batch.anchors, batch.reference_rows());
    let total = anchors.labels.len();
    let part = |(first, end): (usize, usize)| {
        Batch::part(slice(&anchors, first, end), references.view(), Identity::ByValue, total)
    };
    let mut found = four_steps(backends, &part, lengths[0], false, settings, (tangents.0, Some(tangents.1)))?;
    let totals = found.output.pair_totals();
    let Together { output: LossOutput { min_pos, max_neg, count_pos, count_neg, .. }, .. } = &found;
    let ranges = ranges(lengths[1]);
    let mut outputs: Vec<LossOutput> = ranges.iter().map(|_| LossOutput::default()).collect();
    each(backends, &mut outputs, |p, backend, output| {
        let (first, end) = ranges[p];
        let rows = slice(&references, first, end);
        let part = Batch::part(rows, anchors.view(), Identity::ByValue, total);
        let (positive, negative) = (vec![f32::INFINITY; end - first], vec![f32::NEG_INFINITY; end - first]);
        let none = vec![0; end - first];
        backend.same_class(&part, settings, output)?;
        backend.sweep(&part, RowNumbers::new(&positive, min_pos), output)?;
        backend.select(&part, RowNumbers::new(&negative, max_neg), totals, output)?;
        backend.gradient(&part, RowNumbers::new(&none, count_pos), RowNumbers::new(&none, count_neg), output)
    })?;
    for part in &outputs {
        assert_eq!((part.loss, part.active), (0.0, 0), "references have no share of the loss");
    }
    found.output.reference_gradient = Some(gradient_of(&outputs));
    Ok(found)
}

/// The steps of all parts; `square` if the references begin with the anchors.
fn four_steps<'a>(
    backends: &mut [Box<dyn Backend>],
    part: &(impl Fn((usize, usize)) -> Batch<'a> + Sync),
    lengths: &[usize],
    square: bool,
    settings: &LossSettings,
    (tangent, reference_tangent): (ArrayView2<'_, f32>, Option<ArrayView2<'_, f32>>),
) -> Result<Together> {
    let ranges = ranges(lengths);
    let mut outputs: Vec<LossOutput> = lengths.iter().map(|_| LossOutput::default()).collect();

    each(backends, &mut outputs, |p, backend, output| {
        backend.same_class(&part(ranges[p]), settings, output)
    })?;
    let min_pos: Vec<f32> = outputs.iter().flat_map(|part| part.min_pos.clone()).collect();
    each(backends, &mut outputs, |p, backend, output| {
        backend.sweep(&part(ranges[p]), numbers(&min_pos, ranges[p], square), output)
    })?;
    let max_neg: Vec<f32> = outputs.iter().flat_map(|part| part.max_neg.clone()).collect();
    let totals = outputs.iter().fold(PairTotals::default(), |sum, part| PairTotals {
        probe_neg: sum.probe_neg + part.probe_neg,
        total_pos: sum.total_pos + part.total_pos,
    });
    each(backends, &mut outputs, |p, backend, output| {
        backend.select(&part(ranges[p]), numbers(&max_neg, ranges[p], square), totals, output)
    })?;
    let count_pos: Vec<u32> = outputs.iter().flat_map(|part| part.count_pos.clone()).collect();
    let count_neg: Vec<u32> = outputs.iter().flat_map(|part| part.count_neg.clone()).collect();
    each(backends, &mut outputs, |p, backend, output| {
        let [positives, negatives] =
            [&count_pos, &count_neg].map(|counts| numbers(counts, ranges[p], square));
        backend.gradient(&part(ranges[p]), positives, negatives, output)
    })?;

    let mut together = Together::default();
    for (p, backend) in backends.iter_mut().take(lengths.len()).enumerate() {
        let (first, end) = ranges[p];
        let own = tangent.slice(s![first..end, ..]);
        let sums = backend.threshold_gradient(&part(ranges[p]), own, reference_tangent)?;
        together.threshold_gradient.pos += sums.pos;
        together.threshold_gradient.neg += sums.neg;
        together.output.add_part(&outputs[p]);
    }
    let (gamma_pos, gamma_neg) = (outputs[0].gamma_pos, outputs[0].gamma_neg);
    for part in &outputs {
        assert_eq!((part.gamma_pos, part.gamma_neg), (gamma_pos, gamma_neg), "tolerances are the batch's");
    }
    together.output = LossOutput {
        gradient: gradient_of(&outputs),
        min_pos,
        max_neg,
        count_pos,
        count_neg,
        gamma_pos,
        gamma_neg,
        ..together.output
    };
    Ok(together)
}

/// The first row of each part, and the one after its last.
fn ranges(lengths: &[usize]) -> Vec<(usize, usize)> {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    ends.zip(lengths).map(|(end, length)| (end - length, end)).collect()
}

/// The numbers that a part is given: of its rows, and of all rows if they are its references.
fn numbers<T>(all: &[T], (first, end): (usize, usize), square: bool) -> RowNumbers<'_, T> {
    RowNumbers::new(&all[first..end], if square { all } else { &[] })
}

fn gradient_of(parts: &[LossOutput]) -> Array2<f32> {
    let gradients: Vec<ArrayView2<'_, f32>> = parts.iter().map(|part| part.gradient.view()).collect();
    concatenate(Axis(0), &gradients).unwrap()
}

/// One step of all parts at once, each part in a thread of its own with a pool of 1 to 3 threads.
fn each(
    backends: &mut [Box<dyn Backend>],
    outputs: &mut [LossOutput],
    step: impl Fn(usize, &mut dyn Backend, &mut LossOutput) -> Result<()> + Sync,
) -> Result<()> {
    let step = &step;
    std::thread::scope(|scope| {
        let threads: Vec<_> = backends
            .iter_mut()
            .zip(outputs)
            .enumerate()
            .map(|(p, (backend, output))| {
                scope.spawn(move || {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + p % 3).build().unwrap();
                    pool.install(|| step(p, backend.as_mut(), output))
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
}

/// Lengths of 1 to 5 parts of `rows` rows, some of them perhaps 0.
pub fn split(rows: usize, random: &mut ChaCha8Rng) -> Vec<usize> {
    let parts = random.random_range(1..6);
    let mut ends: Vec<usize> = (1..parts).map(|_| random.random_range(0..rows + 1)).collect();
    ends.sort_unstable();
    ends.push(rows);
    let mut before = 0;
    ends.into_iter().map(|end| end - std::mem::replace(&mut before, end)).collect()
}

/// Checks a backend on every case of a table, with its anchors split at random places, and its references if
/// they have a gradient.
///
/// `open` makes the backend of the part with this number.
pub fn run_all(mut open: impl FnMut(usize) -> Box<dyn Backend>, cases: impl IntoIterator<Item = Case>) {
    let mut random = ChaCha8Rng::seed_from_u64(17);
    let (mut counts, mut failures) = ([0, 0], Vec::new());
    for case in cases {
        let batch = case.batch();
        let lengths = split(batch.anchors.labels.len(), &mut random);
        let of_references = case.references.as_ref().map(|rows| split(rows.labels.len(), &mut random));
        counts[usize::from(of_references.is_some())] += 1;
        let most = lengths.len().max(of_references.as_ref().map_or(0, Vec::len));
        let mut backends: Vec<_> = (0..most).map(&mut open).collect();
        let tangent = case.anchors.tangent.view();
        let found = match (&case.references, &of_references) {
            (Some(references), Some(others)) => {
                let (lengths, tangents) = ([&lengths[..], others], (tangent, references.tangent.view()));
                rectangular_in_parts(&mut backends, &batch, lengths, &case.settings, tangents)
            }
            _ => loss_in_parts(&mut backends, &batch.anchors, &lengths, &case.settings, tangent),
        };
        let found = found.unwrap();
        let report = Report::new(&case.expected, &found.output, found.threshold_gradient);
        if !report.is_within(&case.expected.bounds) {
            failures.push(format!(
                "{} {:?} {lengths:?} {of_references:?}: {report:?}",
                case.name,
                case.dtype()
            ));
        }
    }
    println!("{} square and {} rectangular cases in parts, {} failed", counts[0], counts[1], failures.len());
    assert!(counts[0] > 0, "an empty table proves nothing");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Checks a backend where a list says which references are anchors; their rows are copies of other anchors'.
pub fn check_identity(backend: &mut dyn Backend) {
    let how = Draw { rows: 150, dim: 40, classes: 20, noise: 1.5, ignored: 9, duplicates: 8 };
    for (seed, settings) in (0..40).zip([LossSettings::default(); 40]) {
        let (anchors, labels) = draw(how, seed);
        let (mut references, mut reference_labels) = draw(Draw { rows: 300, ..how }, seed + 100);
        let mut list = vec![Identity::ABSENT; 150];
        for i in 0..100 {
            // Another row than the anchor, so that its value does not tell.
            let at = 299 - 2 * i;
            reference_labels[at] = labels[i];
            list[i] = at as u32;
            references.row_mut(at).assign(&anchors.row((i + 1) % 100));
        }
        let own = Rows::new(anchors.view(), &labels);
        let others = Rows::new(references.view(), &reference_labels);
        let batch =
            Batch::rectangular(own, others).with_identity(Identity::List(&list)).with_reference_gradient();
        if let Some(report) = random::compare(backend, &batch, &settings, seed) {
            assert!(report.passes(SINGLE_PRECISION), "seed {seed}: {report:#?}");
            return;
        }
    }
    panic!("no draw clear of the thresholds");
}

/// A batch of 90 rows and, behind it, a memory which holds its first rows once more.
pub fn with_memory() -> (Array2<f32>, Vec<i64>) {
    let how = Draw { rows: 90, dim: 20, classes: 18, noise: 1.8, ignored: 12, duplicates: 15 };
    let (embeddings, labels) = draw(how, 21);
    let (memory, memory_labels) = draw(Draw { rows: 150, ..how }, 22);
    let held = embeddings.slice(s![..10, ..]);
    let all = concatenate(Axis(0), &[embeddings.view(), memory.view(), held]).unwrap();
    (all, [&labels[..], &memory_labels, &labels[..10]].concat())
}

/// Checks a backend against the reference implementation where a memory follows the batch.
pub fn check_memory(mut open: impl FnMut(usize) -> Box<dyn Backend>) {
    let (embeddings, labels) = with_memory();
    let all = Rows::new(embeddings.view(), &labels);
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let batch = Batch::rectangular(slice(&all, 0, 90), all.view()).with_identity(Identity::From(0));
    let truth = reference(&batch.with_reference_gradient(), &settings).unwrap();
    // An anchor's row of (G + G^T) E: its gradient as an anchor, and as a reference.
    let gradient = &truth.gradient + &truth.reference_gradient.unwrap().slice(s![..90, ..]);
    let loss = truth.weighted.loss;
    let tangent = random::tangent(90, 20, 4);
    let mut backends: Vec<_> = (0..2).map(&mut open).collect();
    let parts = loss_in_parts(&mut backends, &all, &[50, 40], &settings, tangent.view()).unwrap().output;
    let counts: Vec<[u32; 2]> = parts.count_pos.iter().zip(&parts.count_neg).map(|(p, n)| [*p, *n]).collect();
    assert_eq!(counts, truth.selection.sizes());
    assert!((parts.loss - loss).abs() <= 1e-6 * loss, "{} {loss}", parts.loss);
    let largest = gradient.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let mut off = gradient.iter().zip(&parts.gradient).map(|(a, b)| (a - f64::from(*b)).abs());
    assert!(off.all(|x| x <= 1e-5 * largest));
}
