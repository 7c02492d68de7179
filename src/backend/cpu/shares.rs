//! Which pairs each row selects, and the factor of their weights (SPEC 2-4), by position.

use super::pairs::Pairs;
use super::rows::Block;
use super::statistics::Statistics;
use crate::loss::LossSettings;
use crate::loss::select::{Tolerances, negative_bound, positive_bound};

/// Selection bounds and weight factors of all rows for one kind of pairs, positives or negatives.
#[derive(Debug, Default)]
pub struct Shares {
    rows: ShareList,
    /// The columns of the rectangular form; those that are no anchors select nothing.
    columns: ShareList,
}

/// The fields of [`Share`], each in an array of its own so that runs of them load as vectors.
#[derive(Debug, Default)]
struct ShareList {
    bounds: Vec<f32>,
    factors: Vec<f32>,
}

impl ShareList {
    /// Sets the bounds; all factors are 0 until the sets have been counted.
    fn reset(&mut self, bounds: impl Iterator<Item = f32>) {
        self.bounds.clear();
        self.bounds.extend(bounds);
        self.factors.clear();
        self.factors.resize(self.bounds.len(), 0.0);
    }

    fn bytes(&self) -> usize {
        (self.bounds.capacity() + self.factors.capacity()) * 4
    }
}

/// Selection bound and weight factor of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Negatives above it, or positives below it, are selected.
    pub bound: f32,
    /// 2 / (B |set|), 0 for inactive rows.
    pub factor: f32,
}

/// Bounds and factors of a block.
#[derive(Clone, Copy)]
pub struct ShareRun<'a> {
    pub bounds: &'a [f32],
    pub factors: &'a [f32],
}

impl Shares {
    /// The share of a row.
    pub fn row(&self, position: usize) -> Share {
        Share { bound: self.rows.bounds[position], factor: self.rows.factors[position] }
    }

    /// The shares of a block of columns.
    pub fn columns(&self, pairs: &Pairs<'_>, block: Block) -> ShareRun<'_> {
        let list = if pairs.square { &self.rows } else { &self.columns };
        ShareRun { bounds: &list.bounds[block.range()], factors: &list.factors[block.range()] }
    }
}

/// Everything needed to weigh a pair from its similarity.
#[derive(Debug, Default)]
pub struct Weights {
    pub positives: Shares,
    pub negatives: Shares,
    pub alpha: f32,
    pub beta: f32,
    pub lambda_pos: f32,
    pub lambda_neg: f32,
}

impl Weights {
    /// Sets the bounds of selection; factors follow when the sets have been counted.
    pub fn set_bounds(&mut self, settings: &LossSettings, tolerances: Tolerances, statistics: &Statistics) {
        self.alpha = settings.alpha as f32;
        self.beta = settings.beta as f32;
        self.lambda_pos = settings.lambda_pos as f32;
        self.lambda_neg = settings.lambda_neg as f32;
        let negative = |m: &f32| negative_bound(f64::from(*m), tolerances.neg) as f32;
        let positive = |m: &f32| positive_bound(f64::from(*m), tolerances.pos) as f32;
        let Statistics { min_pos, max_neg, columns, .. } = statistics;
        self.negatives.rows.reset(min_pos.iter().map(negative));
        self.positives.rows.reset(max_neg.iter().map(positive));
        self.negatives.columns.reset(columns.min_pos.iter().map(negative));
        self.positives.columns.reset(columns.max_neg.iter().map(positive));
    }

    /// Sets the factors 2 / (B |set|) from the sizes of the sets; returns the number of active anchors.
    pub fn set_factors(&mut self, statistics: &Statistics, batch: usize) -> u64 {
        let Self { positives, negatives, .. } = self;
        set_factors(&statistics.columns.counts, batch, [&mut positives.columns, &mut negatives.columns]);
        set_factors(&statistics.counts, batch, [&mut positives.rows, &mut negatives.rows])
    }

    pub fn bytes(&self) -> usize {
        let kinds = [&self.positives, &self.negatives];
        kinds.iter().map(|shares| shares.rows.bytes() + shares.columns.bytes()).sum()
    }
}

/// Sets the factors of one side's positives and negatives; returns its number of active rows.
fn set_factors(counts: &[[u32; 2]], batch: usize, lists: [&mut ShareList; 2]) -> u64 {
    let mut active = 0;
    let [positives, negatives] = lists;
    for (i, &[pos, neg]) in counts.iter().enumerate() {
        let enters = pos > 0 && neg > 0;
        active += u64::from(enters);
        let factor = |count: u32| if enters { (2.0 / (batch as f64 * f64::from(count))) as f32 } else { 0.0 };
        positives.factors[i] = factor(pos);
        negatives.factors[i] = factor(neg);
    }
    active
}
