//! Statistics of a batch's rows, and the share of them that each thread gathers.
//!
//! A thread gathers minima, maxima and integers, which do not depend on the order of tiles or threads. So
//! nothing is kept per tile, and memory is linear in the batch.

use super::pairs::Pairs;
use super::tile::Bounds;
use crate::loss::LossSettings;
use crate::loss::select::{candidate_tolerance, negative_bound, probe_tolerance};

/// Fixed-point units per 1.0 in sums of similarities; the f64 sum of each tile is rounded to units.
const UNITS: f64 = (1u64 << 60) as f64;

/// Converts to units: saturates, and NaN becomes 0.
fn to_units(sum: f64) -> i128 {
    (sum * UNITS) as i128
}

fn from_units(sum: i128) -> f64 {
    sum as f64 / UNITS
}

/// Counts and similarity sums of pairs of one class.
#[derive(Debug, Clone, Copy, Default)]
pub struct SameClassSums {
    pub positives: u64,
    positive_sum: i128,
    /// All pairs of one class: duplicates too and, in the rectangular form, rows with themselves.
    pairs: u64,
    sum: i128,
}

impl SameClassSums {
    fn add(&mut self, other: &Self) {
        self.positives += other.positives;
        self.positive_sum = self.positive_sum.saturating_add(other.positive_sum);
        self.pairs += other.pairs;
        self.sum = self.sum.saturating_add(other.sum);
    }
}

/// The sums of one tile, in f64, while its pairs are visited.
#[derive(Debug, Clone, Copy, Default)]
pub struct TileSameClass {
    positives: u64,
    positive_sum: f64,
    pairs: u64,
    sum: f64,
}

impl TileSameClass {
    pub fn add(&mut self, s: f32, positive: bool) {
        self.pairs += 1;
        self.sum += f64::from(s);
        if positive {
            self.positives += 1;
            self.positive_sum += f64::from(s);
        }
    }

    fn rounded(self) -> SameClassSums {
        let Self { positives, pairs, .. } = self;
        SameClassSums { positives, positive_sum: to_units(self.positive_sum), pairs, sum: to_units(self.sum) }
    }
}

/// The statistics that one thread gathers in a pass, by position of the row.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Smallest similarity to a positive, or largest to a negative.
    pub extremes: Vec<f32>,
    /// `[|P_i|, |N_i|]`.
    counts: Vec<[u32; 2]>,
    /// Negatives above the probe's bounds.
    pub probe: u64,
    same_class: SameClassSums,
}

impl Gathered {
    /// Begins a pass over `rows` rows whose extremes start from `extreme`.
    pub fn begin(&mut self, rows: usize, extreme: f32) {
        self.extremes.clear();
        self.extremes.resize(rows, extreme);
        self.counts.clear();
        self.counts.resize(rows, [0; 2]);
        (self.probe, self.same_class) = Default::default();
    }

    /// Adds a tile's pairs of one class.
    pub fn add_same_class(&mut self, tile: TileSameClass) {
        self.same_class.add(&tile.rounded());
    }

    /// Raises the extremes of a block that begins at `start` to its `largest` negatives in a tile.
    pub fn raise(&mut self, start: usize, largest: &[f32]) {
        merge(&mut self.extremes[start..], largest, f32::max);
    }

    /// Adds the set sizes of a block that begins at `start`.
    pub fn count(&mut self, start: usize, counts: &[[u8; 2]]) {
        for (sum, count) in self.counts[start..].iter_mut().zip(counts) {
            sum[0] += u32::from(count[0]);
            sum[1] += u32::from(count[1]);
        }
    }

    pub fn bytes(&self) -> usize {
        self.extremes.capacity() * 4 + self.counts.capacity() * 8
    }
}

fn merge(values: &mut [f32], others: &[f32], of: impl Fn(f32, f32) -> f32) {
    for (value, other) in values.iter_mut().zip(others) {
        *value = of(*value, *other);
    }
}

/// The caller's numbers for the columns of the rectangular form, by position in class order. Columns that are
/// no anchors of the whole batch have those of a row without pairs, and so select nothing.
#[derive(Debug, Default)]
pub struct ColumnNumbers {
    pub min_pos: Vec<f32>,
    pub max_neg: Vec<f32>,
    /// `[|P_j|, |N_j|]`.
    pub counts: Vec<[u32; 2]>,
}

/// Statistics of each row, by position in class order, and of the whole batch.
#[derive(Debug, Default)]
pub struct Statistics {
    pub min_pos: Vec<f32>,
    pub max_neg: Vec<f32>,
    /// `[|P_i|, |N_i|]`.
    pub counts: Vec<[u32; 2]>,
    /// Empty in the square form.
    pub columns: ColumnNumbers,
    pub probe_neg: u64,
    /// Ordered pairs of one class.
    pub same_class: SameClassSums,
    keep: Vec<f32>,
    column_keep: Vec<f32>,
    probe: Vec<f32>,
}

/// Sets `values` to `rows` times `value`.
fn refill<T: Clone>(values: &mut Vec<T>, rows: usize, value: T) {
    values.clear();
    values.resize(rows, value);
}

impl Statistics {
    /// Begins a batch: no pair is known of any row or column.
    pub fn reset(&mut self, pairs: &Pairs<'_>) {
        let rows = pairs.rows.order.rows.len();
        refill(&mut self.min_pos, rows, f32::INFINITY);
        refill(&mut self.max_neg, rows, f32::NEG_INFINITY);
        refill(&mut self.counts, rows, [0; 2]);
        let columns = if pairs.square { 0 } else { pairs.columns.order.rows.len() };
        refill(&mut self.columns.min_pos, columns, f32::INFINITY);
        refill(&mut self.columns.max_neg, columns, f32::NEG_INFINITY);
        refill(&mut self.columns.counts, columns, [0; 2]);
        (self.probe_neg, self.same_class) = Default::default();
    }

    /// Takes over m+ and the sums over pairs of one class. The square form visits each unordered pair once,
    /// so its sums count twice.
    pub fn merge_same_class(&mut self, square: bool, gathered: &Gathered) {
        merge(&mut self.min_pos, &gathered.extremes, f32::min);
        for _ in 0..if square { 2 } else { 1 } {
            self.same_class.add(&gathered.same_class);
        }
    }

    /// Takes over m- and the probe's count.
    pub fn merge_sweep(&mut self, gathered: &Gathered) {
        merge(&mut self.max_neg, &gathered.extremes, f32::max);
        self.probe_neg += gathered.probe;
    }

    /// Takes over the sizes of the mined sets.
    pub fn merge_counts(&mut self, gathered: &Gathered) {
        for (sum, count) in self.counts.iter_mut().zip(&gathered.counts) {
            sum[0] += count[0];
            sum[1] += count[1];
        }
    }

    /// Sets the sweep's bounds from m+: the probe's, and the candidates', the lower of it and the initial
    /// one.
    pub fn set_bounds(&mut self, settings: &LossSettings) {
        let fill = |bounds: &mut Vec<f32>, min_pos: &[f32], tolerance: f64| {
            bounds.clear();
            bounds.extend(min_pos.iter().map(|&m| negative_bound(f64::from(m), tolerance) as f32));
        };
        let keep = candidate_tolerance(settings);
        fill(&mut self.probe, &self.min_pos, probe_tolerance(settings));
        fill(&mut self.keep, &self.min_pos, keep);
        fill(&mut self.column_keep, &self.columns.min_pos, keep);
    }

    /// Bounds of candidates and of the probe. The probe counts for each row of a tile and, in the square
    /// form, for each column.
    pub fn bounds(&self, square: bool) -> (Bounds<'_>, Bounds<'_>) {
        let columns = if square { &self.keep } else { &self.column_keep };
        let keep = Bounds { rows: &self.keep, columns: Some(columns) };
        (keep, Bounds { rows: &self.probe, columns: square.then_some(self.probe.as_slice()) })
    }

    /// Number of ordered negative pairs, and mean similarity of all positives and of all negatives. The sum
    /// of e_i . e_j over all pairs is the product of the sums of e_i and of e_j.
    pub fn means(&self, pairs: &Pairs<'_>) -> (u64, f64, f64) {
        let all: f64 = pairs.rows.sum.iter().zip(pairs.columns.sum).map(|(a, b)| a * b).sum();
        let (rows, columns) = (pairs.rows.order.rows.len() as u64, pairs.columns.order.rows.len() as u64);
        // In the rectangular form a row's pair with itself is among the pairs of one class.
        let (own, with_themselves) = if pairs.square { (pairs.rows.square_sum, rows) } else { (0.0, 0) };
        let SameClassSums { positives, positive_sum, pairs, sum } = self.same_class;
        let negatives = rows * columns - with_themselves - pairs;
        let of_negatives = (all - own - from_units(sum)) / negatives as f64;
        let mean_neg = if negatives == 0 { f64::NAN } else { of_negatives };
        (negatives, from_units(positive_sum) / positives as f64, mean_neg)
    }

    pub fn bytes(&self) -> usize {
        let Self { min_pos, max_neg, keep, column_keep, probe, columns, .. } = self;
        let lists = [min_pos, max_neg, keep, column_keep, probe, &columns.min_pos, &columns.max_neg];
        let floats: usize = lists.iter().map(|list| list.capacity()).sum();
        floats * 4 + (self.counts.capacity() + columns.counts.capacity()) * 8
    }
}
