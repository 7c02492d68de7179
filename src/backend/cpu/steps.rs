//! The passes of one loss in order. Between them the caller may take over what other parts of the batch
//! found.

use std::sync::Mutex;

use ndarray::ArrayView2;

use super::pairs::Owner;
use super::remembered::Remembered;
use super::rows::Order;
use super::tasks::{Workers, lock};
use super::threshold;
use super::tiles::Known;
use super::times::Stopwatch;
use super::walk::{Walk, write_gradient};
use super::weigh::Totals;
use super::{BUDGET_OF_A_ROW, CpuBackend, workers_for};
use crate::backend::step::{NO_LOSS, OTHER_LABELS, Step};
use crate::loss::select::adapt;
use crate::loss::{
    Batch, BatchSize, LossOutput, LossSettings, PairTotals, RowNumbers, TangentOf, ThresholdGradient,
    UnitCheck,
};
use crate::{Error, Result};

impl CpuBackend {
    /// Checks that `step` is next and `part` that of the step before; returns its settings.
    pub(super) fn go_on(&mut self, part: &Batch<'_>, step: Step) -> Result<LossSettings> {
        let remembered = step.take_last(&mut self.remembered, |last| Some(last.step))?;
        part.validate()?;
        let settings = remembered.settings;
        if remembered != Remembered::new(part, &settings, remembered.step) || !self.sides.are_of(part) {
            return Err(Error::OutOfOrder(
                "a step needs the part of the step before it: shape, total or labels differ",
            ));
        }
        Ok(settings)
    }

    pub(super) fn take_min_pos(&mut self, numbers: &RowNumbers<'_, f32>) {
        let (rows, columns) = self.sides.orders();
        let statistics = &mut self.statistics;
        by_position(rows, numbers.anchors, f32::INFINITY, &mut statistics.min_pos);
        by_position(columns, numbers.references, f32::INFINITY, &mut statistics.columns.min_pos);
    }

    pub(super) fn take_max_neg(&mut self, numbers: &RowNumbers<'_, f32>) {
        let (rows, columns) = self.sides.orders();
        let statistics = &mut self.statistics;
        by_position(rows, numbers.anchors, f32::NEG_INFINITY, &mut statistics.max_neg);
        by_position(columns, numbers.references, f32::NEG_INFINITY, &mut statistics.columns.max_neg);
    }

    pub(super) fn take_counts(&mut self, pos: &RowNumbers<'_, u32>, neg: &RowNumbers<'_, u32>) {
        let (rows, columns) = self.sides.orders();
        let sides = [
            (rows, pos.anchors, neg.anchors, &mut self.statistics.counts),
            (columns, pos.references, neg.references, &mut self.statistics.columns.counts),
        ];
        for (order, pos, neg, counts) in sides {
            for (counts, &row) in counts.iter_mut().zip(&order.rows) {
                *counts = [pos, neg].map(|list| list.get(row as usize).copied().unwrap_or(0));
            }
        }
    }

    /// Readies a scratch for each thread; panels packed before are forgotten, because other rows come next.
    fn ready_scratch(&mut self, workers: Workers<'_>) {
        self.scratch.resize_with(workers.count(), Mutex::default);
        for scratch in &self.scratch {
            lock(scratch).tile.reset();
        }
    }

    /// Orders the rows by class; finds m+ and the positives.
    pub(super) fn find_same_class(
        &mut self,
        batch: &Batch<'_>,
        workers: Workers<'_>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let mut watch = Stopwatch::start();
        self.ready_scratch(workers);
        self.sides.set(batch, &workers)?;
        let pairs = self.sides.pairs(batch)?;
        self.times.rows = watch.lap();

        let against = if pairs.square { 0 } else { pairs.columns.order.rows.len() };
        let of_rows = BUDGET_OF_A_ROW.saturating_mul(pairs.rows.order.rows.len() + against);
        self.tiles.set(&pairs, self.budget.unwrap_or(of_rows));
        self.statistics.reset(&pairs);
        self.tiles.same_class_pass(&pairs, &workers, &self.scratch, &mut self.statistics);
        let statistics = &self.statistics;
        report(pairs.rows.order, batch, &statistics.min_pos, f32::INFINITY, &mut output.min_pos);
        output.total_pos = statistics.same_class.positives;
        (output.total_neg, output.mean_pos, output.mean_neg) = statistics.means(&pairs);
        self.times.same_class = watch.lap();
        Ok(())
    }

    /// Finds m-, the probe's count and the candidates, from m+ of both sides.
    pub(super) fn sweep_tiles(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        workers: Workers<'_>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let mut watch = Stopwatch::start();
        self.ready_scratch(workers);
        let pairs = self.sides.pairs(batch)?;
        self.statistics.set_bounds(settings);
        self.tiles.sweep(&pairs, &workers, &self.scratch, &mut self.statistics);
        let statistics = &self.statistics;
        report(pairs.rows.order, batch, &statistics.max_neg, f32::NEG_INFINITY, &mut output.max_neg);
        output.probe_neg = statistics.probe_neg;
        self.times.sweep = watch.lap();
        Ok(())
    }

    /// Counts the mined sets, from m- of both sides and the totals of the batch.
    pub(super) fn select_pairs(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        totals: PairTotals,
        workers: Workers<'_>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let mut watch = Stopwatch::start();
        self.ready_scratch(workers);
        let pairs = self.sides.pairs(batch)?;
        let tolerances = adapt(settings, totals);
        self.weights.set_bounds(settings, tolerances, &self.statistics);
        self.tiles.count(&pairs, &workers, &self.scratch, &self.weights, &mut self.statistics);
        (output.gamma_pos, output.gamma_neg) = (tolerances.pos, tolerances.neg);
        for (kind, counts) in [&mut output.count_pos, &mut output.count_neg].into_iter().enumerate() {
            counts.clear();
            counts.resize(batch.anchors.labels.len(), 0);
            for (&row, count) in pairs.rows.order.rows.iter().zip(&self.statistics.counts) {
                counts[row as usize] = count[kind];
            }
        }
        self.times.select = watch.lap();
        Ok(())
    }

    /// Sums loss and gradient, from the sizes of both sides' sets.
    pub(super) fn sum_gradient(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        workers: Workers<'_>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let mut watch = Stopwatch::start();
        self.ready_scratch(workers);
        let pairs = self.sides.pairs(batch)?;
        output.active = self.weights.set_factors(&self.statistics, batch.total());
        let known = Known { pairs, statistics: &self.statistics, weights: &self.weights };
        self.tiles.weigh(&known, &workers, &self.scratch);
        let mut walk = Walk {
            known,
            tiles: &self.tiles,
            workers,
            scratch: &self.scratch,
            task_sums: &mut self.task_sums,
        };
        let anchors = batch.anchors.labels.len();
        let Totals { softplus, sigmoid } =
            write_gradient(&mut walk, Owner::Rows, &mut output.gradient, anchors);
        if batch.reference_gradient && !pairs.square {
            let gradient = output.reference_gradient.get_or_insert_default();
            write_gradient(&mut walk, Owner::Columns, gradient, batch.reference_rows().labels.len());
        } else {
            output.reference_gradient = None;
        }
        output.loss = softplus[0] / settings.beta + softplus[1] / settings.alpha;
        output.dloss_dlambda_pos = sigmoid[0];
        output.dloss_dlambda_neg = -sigmoid[1];
        self.times.gradient = watch.lap();
        Ok(())
    }

    /// See [`Backend::threshold_gradient`](crate::backend::Backend::threshold_gradient).
    pub(super) fn sum_threshold_gradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<ThresholdGradient> {
        batch.validate()?;
        let remembered = self.remembered.filter(|last| last.step == Step::Gradient);
        let remembered = remembered.ok_or(Error::OutOfOrder(NO_LOSS))?;
        remembered.size.is_of_last(BatchSize::of(batch))?;
        remembered.size.check_tangent(TangentOf::Anchors, &tangent)?;
        // In the square form the anchors' tangent is that of both sides.
        let reference_tangent = reference_tangent.filter(|_| !batch.is_square());
        if let Some(tangent) = &reference_tangent {
            remembered.size.check_tangent(TangentOf::References, tangent)?;
        }
        let workers = workers_for(batch);
        self.ready_scratch(workers);
        if !self.sides.are_of(batch) {
            return Err(Error::OutOfOrder(OTHER_LABELS));
        }
        self.sides.prepare(batch, UnitCheck::Trust, &workers)?;
        let pairs = self.sides.pairs(batch)?;
        let mut walk = Walk {
            known: Known { pairs, statistics: &self.statistics, weights: &self.weights },
            tiles: &self.tiles,
            workers,
            scratch: &self.scratch,
            task_sums: &mut self.task_sums,
        };
        Ok(threshold::threshold_gradient(&mut walk, tangent, reference_tangent))
    }
}

/// Puts the caller's numbers into class order; rows without a number get `without`.
fn by_position(order: &Order, numbers: &[f32], without: f32, positions: &mut [f32]) {
    for (number, &row) in positions.iter_mut().zip(&order.rows) {
        *number = numbers.get(row as usize).copied().unwrap_or(without);
    }
}

/// Puts numbers into the caller's order; ignored rows get `without`.
fn report(order: &Order, batch: &Batch<'_>, positions: &[f32], without: f32, numbers: &mut Vec<f32>) {
    numbers.clear();
    numbers.resize(batch.anchors.labels.len(), without);
    for (&row, &number) in order.rows.iter().zip(positions) {
        numbers[row as usize] = number;
    }
}
