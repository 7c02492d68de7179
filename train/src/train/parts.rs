//! The loss of a batch that several ranks share: the library's four steps, with messages between the ranks after each.
//!
//! Every rank has all rows, and computes the gradient of its own: on the CPU with the same bits as in one process.

use std::ops::Range;

use ndarray::{ArrayView2, s};

use crate::Result;
use crate::ranks::{Collective, gather};
use ddtas::backend::Backend;
use ddtas::loss::{
    Batch, Identity, LossOutput, LossSettings, PairTotals, RowNumbers, Rows, ThresholdGradient,
};

/// A rank's part of a batch: its own rows as anchors, with all rows as references.
pub(super) struct Part<'a> {
    /// The batch's rows, followed by rows that are only references (the memory).
    pub references: (ArrayView2<'a, f32>, &'a [i64]),
    /// Number of rows of the batch.
    pub total: usize,
    /// The rank's own rows of the batch.
    pub own: Range<usize>,
    pub ranks: &'a dyn Collective,
}

impl Part<'_> {
    /// Evaluates the loss of the whole batch, and the gradient of the rank's own rows. Returns whether any gradient is not 0.
    pub fn loss(
        &self,
        backend: &mut dyn Backend,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<bool> {
        let part = &self.batch();
        backend.same_class(part, settings, output)?;
        let min_pos: Vec<f32> = gather(self.ranks, &output.min_pos)?;
        backend.sweep(part, self.numbers(&min_pos), output)?;
        let (max_neg, totals) = self.gather_swept(output)?;
        backend.select(part, self.numbers(&max_neg), totals, output)?;
        let counts: Vec<[u32; 2]> =
            output.count_pos.iter().zip(&output.count_neg).map(|(p, n)| [*p, *n]).collect();
        let counts: Vec<[u32; 2]> = gather(self.ranks, &counts)?;
        let (pos, neg): (Vec<u32>, Vec<u32>) = counts.into_iter().map(|[pos, neg]| (pos, neg)).unzip();
        backend.gradient(part, self.numbers(&pos), self.numbers(&neg), output)?;
        let any = self.add_up(output)?;
        (output.min_pos, output.max_neg, output.count_pos, output.count_neg) = (min_pos, max_neg, pos, neg);
        Ok(any)
    }

    /// The sums of SPEC 5 over the pairs of the last [`loss`](Part::loss), which must have been of the same
    /// part. `tangent` is edot of the rank's own rows; that of the rows after the batch is 0.
    pub fn threshold_gradient(
        &self,
        backend: &mut dyn Backend,
        tangent: ArrayView2<'_, f32>,
    ) -> Result<ThresholdGradient> {
        let ThresholdGradient { pos, neg } = backend.threshold_gradient(&self.batch(), tangent, None)?;
        let parts: Vec<[f64; 2]> = gather(self.ranks, &[[pos, neg]])?;
        let sum = |a: ThresholdGradient, [pos, neg]: [f64; 2]| ThresholdGradient {
            pos: a.pos + pos,
            neg: a.neg + neg,
        };
        Ok(parts.into_iter().fold(ThresholdGradient::default(), sum))
    }

    fn batch(&self) -> Batch<'_> {
        let (embeddings, labels) = self.references;
        let own = embeddings.slice_move(s![self.own.clone(), ..]);
        let anchors = Rows::new(own, &labels[self.own.clone()]);
        Batch::part(anchors, Rows::new(embeddings, labels), Identity::From(self.own.start), self.total)
    }

    /// Values of all anchors and of the rank's own, in the form that a step takes.
    fn numbers<'a, T>(&self, all: &'a [T]) -> RowNumbers<'a, T> {
        RowNumbers::new(&all[self.own.clone()], all)
    }

    /// m- of all anchors, and the sums over the ranks of `probe_neg` and `total_pos`.
    fn gather_swept(&self, output: &LossOutput) -> Result<(Vec<f32>, PairTotals)> {
        let totals = [output.probe_neg, output.total_pos];
        let own = [bytemuck::bytes_of(&totals), bytemuck::cast_slice(&output.max_neg)].concat();
        let (mut max_neg, mut sums) = (Vec::with_capacity(self.total), PairTotals::default());
        for message in self.ranks.all_gather(&own)?.iter() {
            let (totals, rows) = message.split_at(size_of::<[u64; 2]>());
            let [probe_neg, total_pos]: [u64; 2] = bytemuck::pod_read_unaligned(totals);
            sums.probe_neg += probe_neg;
            sums.total_pos += total_pos;
            max_neg.extend(bytemuck::pod_collect_to_vec::<u8, f32>(rows));
        }
        Ok((max_neg, sums))
    }

    /// Sums loss, derivatives, means and counts in `output` over all ranks. Returns whether any gradient is not 0.
    fn add_up(&self, output: &mut LossOutput) -> Result<bool> {
        let any = output.gradient.iter().any(|&entry| entry != 0.0);
        let values = [
            output.loss,
            output.dloss_dlambda_pos,
            output.dloss_dlambda_neg,
            output.mean_pos,
            output.mean_neg,
        ];
        let counts = [output.probe_neg, output.total_pos, output.total_neg, output.active, u64::from(any)];
        let own: Vec<u64> = values.map(f64::to_bits).into_iter().chain(counts).collect();
        let all: Vec<[u64; 10]> = gather(self.ranks, &own)?.as_chunks().0.to_vec();
        let mut sum = LossOutput::default();
        for [loss, by_pos, by_neg, mean_pos, mean_neg, probe_neg, total_pos, total_neg, active, _] in &all {
            let [loss, by_pos, by_neg, mean_pos, mean_neg] =
                [loss, by_pos, by_neg, mean_pos, mean_neg].map(|bits| f64::from_bits(*bits));
            sum.add_part(&LossOutput {
                loss,
                dloss_dlambda_pos: by_pos,
                dloss_dlambda_neg: by_neg,
                mean_pos,
                mean_neg,
                probe_neg: *probe_neg,
                total_pos: *total_pos,
                total_neg: *total_neg,
                active: *active,
                ..LossOutput::default()
            });
        }
        *output = LossOutput {
            gradient: std::mem::take(&mut output.gradient),
            reference_gradient: output.reference_gradient.take(),
            gamma_pos: output.gamma_pos,
            gamma_neg: output.gamma_neg,
            ..sum
        };
        Ok(all.iter().any(|entry| entry[9] != 0))
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::Error;
    use crate::ranks::{gather_rows, on_threads, share, together};
    use crate::train::Memory;
    use crate::train::PairLoss;
    use ddtas::backend::cpu::CpuBackend;
    use ddtas::loss::Mining;
    use ndarray::Array2;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const OURS: PairLoss = PairLoss::SoftContrastive;
    const ROWS: usize = 61;
    const DIM: usize = 24;

    /// Unit rows of nine classes, each around its own centre, and their labels, of which one is negative.
    fn rows(seed: u64) -> (Array2<f32>, Vec<i64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let labels: Vec<i64> = (0..ROWS).map(|row| if row == 7 { -1 } else { (row % 9) as i64 }).collect();
        let centres = Array2::from_shape_fn((9, DIM), |_| rng.random_range(-1.0f32..1.0));
        let mut rows = Array2::from_shape_fn((ROWS, DIM), |(row, at)| {
            centres[[row % 9, at]] + rng.random_range(-1.2f32..1.2)
        });
        for mut row in rows.outer_iter_mut() {
            let norm = row.dot(&row).sqrt();
            row /= norm;
        }
        (rows, labels)
    }

    /// Loss and hyper-gradient, which must be equal on all `count` ranks, with the gradient of all rows.
    fn on_ranks(count: usize, memory: &Memory, settings: &LossSettings) -> (LossOutput, ThresholdGradient) {
        let ((rows, labels), (tangent, _)) = (rows(1), rows(2));
        let mut seen = Vec::new();
        for asked in 0..count {
            let found = on_threads(count, |ranks| {
                let own = share(ROWS, ranks.rank(), count);
                let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
                together(&ranks, || {
                    let (on, batch) = ((&*ranks, own.clone()), (rows.view(), labels.as_slice()));
                    let any =
                        memory.loss_on_ranks(on.clone(), &mut backend, OURS, batch, settings, &mut output)?;
                    let own = tangent.slice(s![own, ..]);
                    let sums = memory.threshold_gradient_on_ranks(on, &mut backend, batch, own)?;
                    output.gradient = gather_rows(&*ranks, output.gradient.clone())?;
                    assert!(any);
                    // Compares the sums of rank `asked` with those of this rank.
                    let bits: Vec<u64> =
                        [output.loss, output.mean_pos, sums.pos, sums.neg].map(f64::to_bits).into();
                    let all: Vec<u64> = gather(&*ranks, &bits)?;
                    assert!(all[4 * asked..][..4] == bits, "rank {asked} has other sums");
                    Ok((output.clone(), sums))
                })
            });
            seen.push(found.unwrap());
        }
        seen.swap_remove(0)
    }

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-6 * want.abs(), "{got} is not {want}");
    }

    #[test]
    fn ranks_find_the_loss_of_one_process_and_its_rows_bits() {
        let ((rows, labels), (tangent, _)) = (rows(1), rows(2));
        let mut full = Memory::new(100, 0, DIM);
        full.push(0, rows.slice(s![3.., ..]).as_standard_layout().view(), &labels[3..]);
        for mining in [Mining::None, Mining::AtAsms] {
            let settings = LossSettings { mining, ..LossSettings::default() };
            for memory in [Memory::new(0, 0, DIM), full.clone()] {
                let (mut backend, mut want) = (CpuBackend::new(), LossOutput::default());
                let batch = (rows.view(), labels.as_slice());
                memory.loss(&mut backend, OURS, batch, &settings, &mut want).unwrap();
                let sums = memory.threshold_gradient(&mut backend, batch, tangent.view()).unwrap();
                for count in 2..5 {
                    let (got, got_sums) = on_ranks(count, &memory, &settings);
                    close(got.loss, want.loss);
                    close(got.mean_pos, want.mean_pos);
                    close(got.mean_neg, want.mean_neg);
                    close(got_sums.pos, sums.pos);
                    close(got_sums.neg, sums.neg);
                    assert_eq!(
                        (got.count_pos, got.count_neg),
                        (want.count_pos.clone(), want.count_neg.clone())
                    );
                    assert_eq!((got.min_pos, got.max_neg), (want.min_pos.clone(), want.max_neg.clone()));
                    assert_eq!((got.active, got.total_neg), (want.active, want.total_neg));
                    if memory.is_empty() {
                        assert!(
                            got.gradient == want.gradient,
                            "{count} ranks: a row's gradient has other bits"
                        );
                    } else {
                        let off = (&got.gradient - &want.gradient).mapv(f32::abs);
                        assert!(off.iter().all(|off| *off < 1e-7), "{count} ranks: a row's gradient is off");
                    }
                }
            }
        }
    }

    #[test]
    fn a_bad_row_ends_all_ranks() {
        let (mut rows, labels) = rows(1);
        rows[[40, 3]] = f32::NAN;
        let done = on_threads(3, |ranks| {
            let own = share(ROWS, ranks.rank(), 3);
            let memory = Memory::new(0, 0, DIM);
            let (settings, batch) = (LossSettings::default(), (rows.view(), labels.as_slice()));
            let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
            let on = (&*Rc::clone(&ranks), own);
            together(&ranks, || memory.loss_on_ranks(on, &mut backend, OURS, batch, &settings, &mut output))
        });
        let error = done.unwrap_err();
        assert!(error.to_string().contains("row 40") || matches!(error, Error::Rank { .. }), "{error}");
    }
}
