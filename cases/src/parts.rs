//! A batch in parts: a backend each, in threads of their own, which tell each other what they found.
#![allow(clippy::unwrap_used, reason = "for tests, which stop where something is off")]

use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::loss::{Batch, Embeddings, Hypergradient, Identity, LossOutput, LossSettings, RowNumbers, Rows};
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

/// Rows of any type from `first` to `end`.
pub fn slice<'a>(rows: &'a Rows<'_>, first: usize, end: usize) -> Rows<'a> {
    let embeddings = match &rows.embeddings {
        Embeddings::F32(m) => Embeddings::F32(m.slice(s![first..end, ..])),
        Embeddings::F16(m) => Embeddings::F16(m.slice(s![first..end, ..])),
        Embeddings::Bf16(m) => Embeddings::Bf16(m.slice(s![first..end, ..])),
    };
    Rows { embeddings, labels: &rows.labels[first..end] }
}

/// What all parts found, put together: totals added up, rows one behind the other.
#[derive(Debug, Default)]
pub struct Together {
    pub output: LossOutput,
    pub hyper: Hypergradient,
}

/// The loss of the first `anchors` of `all`, whose rows behind them are a memory, in parts of these `lengths`.
///
/// `tangent` is edot of the anchors.
pub fn loss_in_parts(
    backends: &mut [Box<dyn Backend>],
    all: &Rows<'_>,
    lengths: &[usize],
    settings: &LossSettings,
    tangent: ArrayView2<'_, f32>,
) -> Result<Together> {
    let anchors = lengths.iter().sum();
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    let ranges: Vec<(usize, usize)> = ends.zip(lengths).map(|(end, length)| (end - length, end)).collect();
    let part = |(first, end): (usize, usize)| {
        Batch::part(slice(all, first, end), all.view(), Identity::From(first), anchors)
    };
    let mut outputs: Vec<LossOutput> = lengths.iter().map(|_| LossOutput::default()).collect();

    each(backends, &mut outputs, |p, backend, output| {
        backend.same_class(&part(ranges[p]), settings, output)
    })?;
    let min_pos: Vec<f32> = outputs.iter().flat_map(|part| part.min_pos.clone()).collect();
    each(backends, &mut outputs, |p, backend, output| {
        let own = &min_pos[ranges[p].0..ranges[p].1];
        backend.sweep(&part(ranges[p]), RowNumbers::new(own, &min_pos), output)
    })?;
    let max_neg: Vec<f32> = outputs.iter().flat_map(|part| part.max_neg.clone()).collect();
    let totals = outputs.iter().fold((0, 0), |sum, part| (sum.0 + part.probe_neg, sum.1 + part.total_pos));
    each(backends, &mut outputs, |p, backend, output| {
        let own = &max_neg[ranges[p].0..ranges[p].1];
        backend.select(&part(ranges[p]), RowNumbers::new(own, &max_neg), totals, output)
    })?;
    let count_pos: Vec<u32> = outputs.iter().flat_map(|part| part.count_pos.clone()).collect();
    let count_neg: Vec<u32> = outputs.iter().flat_map(|part| part.count_neg.clone()).collect();
    each(backends, &mut outputs, |p, backend, output| {
        let (first, end) = ranges[p];
        let positives = RowNumbers::new(&count_pos[first..end], &count_pos);
        let negatives = RowNumbers::new(&count_neg[first..end], &count_neg);
        backend.gradient(&part(ranges[p]), positives, negatives, output)
    })?;

    let mut together = Together::default();
    for (p, backend) in backends.iter_mut().enumerate() {
        let (first, end) = ranges[p];
        let hyper = backend.hypergradient(&part(ranges[p]), tangent.slice(s![first..end, ..]), None)?;
        together.hyper.pos += hyper.pos;
        together.hyper.neg += hyper.neg;
        together.output.add_part(&outputs[p]);
    }
    let gradients: Vec<ArrayView2<'_, f32>> = outputs.iter().map(|part| part.gradient.view()).collect();
    let gradient: Array2<f32> = concatenate(Axis(0), &gradients).unwrap();
    let (gamma_pos, gamma_neg) = (outputs[0].gamma_pos, outputs[0].gamma_neg);
    for part in &outputs {
        assert_eq!((part.gamma_pos, part.gamma_neg), (gamma_pos, gamma_neg), "tolerances are the batch's");
    }
    together.output = LossOutput {
        gradient,
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

/// One step of all parts at once, each in a plain thread; a pool of its own for every part, of as many threads as its
/// number says.
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
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
