//! Who selects which candidate (SPEC 2-3), and what a selected pair weighs (SPEC 4).

use super::pairs::Pairs;
use super::rows::{Block, MAX_BLOCK};
use super::simd::{GROUP, Lanes, Work};
use super::statistics::Statistics;
use super::tile::{Candidates, MAX_GROUPS, bits};
use crate::loss::LossSettings;
use crate::loss::select::{Tolerances, negative_bound, positive_bound};

/// When pairs of one kind are selected, and what they then weigh, by position.
#[derive(Debug, Default)]
pub struct Shares {
    rows: ShareList,
    /// Of the columns in the rectangular form: those that are no anchors select nothing.
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

/// When a pair is selected by one of its rows, and what it then weighs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Negatives above it, positives below it are selected.
    pub bound: f32,
    /// 2 / (B |set|), 0 for inactive rows.
    pub factor: f32,
}

/// The shares of a block.
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

/// Sets the factors of one side's positives and negatives; returns how many of its rows are active.
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

/// Sizes of the sets within one tile, `[positives, negatives]` by local row and column.
#[derive(Debug, Clone)]
pub struct Counts {
    pub rows: [[u8; 2]; MAX_BLOCK],
    pub columns: [[u8; 2]; MAX_BLOCK],
}

const _: () = assert!(MAX_BLOCK <= u8::MAX as usize);

impl Default for Counts {
    fn default() -> Self {
        Self { rows: [[0; 2]; MAX_BLOCK], columns: [[0; 2]; MAX_BLOCK] }
    }
}

/// Counts the selected pairs of one tile.
pub struct CountTile<'a, 'b> {
    pub pairs: Pairs<'a>,
    pub tile: (usize, usize),
    pub candidates: Candidates<'b>,
    pub weights: &'b Weights,
    pub counts: &'b mut Counts,
}

impl Work for CountTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { pairs, tile: (row, column), candidates, weights, counts } = self;
        *counts = Counts::default();
        let (rows, across): (Block, Block) =
            (pairs.rows.order.blocks[row], pairs.columns.order.blocks[column]);
        let bounds = |shares: &Shares| {
            let mut padded = [0.0; MAX_BLOCK];
            padded[..across.rows].copy_from_slice(shares.columns(&pairs, across).bounds);
            padded
        };
        let across_bounds = [bounds(&weights.positives), bounds(&weights.negatives)];
        let has_positives = pairs.has_positives(row, column);
        // In numbers that vectors add; there are no more than rows of a block.
        let mut columns = [[[0.0f32; GROUP]; MAX_GROUPS]; 2];
        let mut reader = candidates;
        for (r, counts) in counts.rows[..rows.rows].iter_mut().enumerate() {
            let position = rows.start + r;
            let class = if has_positives { pairs.class_columns(position, column) } else { (0, 0) };
            let own = [weights.positives.row(position).bound, weights.negatives.row(position).bound];
            reader.next_lines(simd, |group, mask, s| {
                let same_class = bits(class.0, class.1, group);
                for (kind, mask) in [mask & same_class, mask & !same_class].into_iter().enumerate() {
                    if mask == 0 {
                        continue;
                    }
                    let own = [own[kind]; GROUP];
                    let Some(other) = across_bounds[kind][group * GROUP..].first_chunk() else { continue };
                    // Positives are selected below their bound, negatives above it.
                    let (by_row, by_column) = if kind == 0 {
                        (simd.above_group(&own, &s), simd.above_group(other, &s))
                    } else {
                        (simd.above_group(&s, &own), simd.above_group(&s, other))
                    };
                    counts[kind] += (by_row & mask).count_ones() as u8;
                    let ones = simd.expand(&[1.0; GROUP], by_column & mask);
                    for (sum, one) in columns[kind][group].iter_mut().zip(&ones) {
                        *sum += one;
                    }
                }
            });
        }
        for (kind, columns) in columns.iter().enumerate() {
            for (count, column) in counts.columns.iter_mut().zip(columns.as_flattened()) {
                count[kind] = *column as u8;
            }
        }
    }
}
