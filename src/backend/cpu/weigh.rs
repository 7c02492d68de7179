//! The weights of a tile's pairs (SPEC 4, 5), from similarities and the bounds and factors of both rows.
//!
//! The gradient's matrix G + G^T is symmetric: a pair has one weight, whichever of its rows is summed into.

use super::pairs::Pairs;
use super::rows::{MAX_BLOCK, grow};
use super::shares::{Share, ShareRun, Weights};
use super::simd::{GROUP, Lanes, Work, padded};
use super::tile::Candidates;

/// The derivative that a pair's weight stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// G: the gradient.
    Gradient,
    /// dG/d(lambda_pos).
    LambdaPos,
    /// dG/d(lambda_neg).
    LambdaNeg,
}

/// Sums over pairs, each term with its factor 2 / (B |set|).
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Softplus of positives and negatives.
    pub softplus: [f64; 2],
    /// Sigmoid of positives and negatives.
    pub sigmoid: [f64; 2],
}

impl Totals {
    pub fn add(&mut self, other: &Self) {
        for kind in 0..2 {
            self.softplus[kind] += other.softplus[kind];
            self.sigmoid[kind] += other.sigmoid[kind];
        }
    }
}

/// Sums over a tile's pairs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weighed {
    /// Filled in for [`Kind::Gradient`] only.
    pub totals: Totals,
    /// Number of pairs with a weight other than zero.
    pub pairs: usize,
}

/// Weighs the candidates of one tile.
pub struct WeighTile<'a, 'b> {
    pub pairs: Pairs<'a>,
    pub tile: (usize, usize),
    pub candidates: Candidates<'b>,
    pub weights: &'b Weights,
    pub kind: Kind,
    /// Receives a weight for each candidate, in their order; grown if it is too short.
    pub weighed: &'b mut Vec<f32>,
}

impl Work for WeighTile<'_, '_> {
    type Output = Weighed;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> Weighed {
        let Self { pairs, tile: (row, column), candidates, weights: w, kind, weighed } = self;
        let (rows, across) = (pairs.rows.order.blocks[row], pairs.columns.order.blocks[column]);
        let positives = pairs.has_positives(row, column);
        let across_negatives = w.negatives.columns(&pairs, across);
        let across_positives = w.positives.columns(&pairs, across);
        grow(weighed, candidates.values.len());
        let mut rest = weighed.as_mut_slice();
        let mut reader = candidates;
        let mut columns = [0; MAX_BLOCK + GROUP];
        // Bounds and factors of the columns of a row's candidates, in the candidates' order.
        let mut others = Others { bounds: [0.0; MAX_BLOCK + GROUP], factors: [0.0; MAX_BLOCK + GROUP] };
        let mut totals = [GroupTotals::default(); 2];
        let mut selected = 0;
        for position in rows.range() {
            let values = reader.values;
            let count = reader
                .next_groups(|group, mask, before| {
                    others.put(simd, before, across_negatives, group, mask);
                    if positives {
                        simd.compress_columns(group, mask, &mut columns[before..]);
                    }
                })
                .len();
            let (out, after) = std::mem::take(&mut rest).split_at_mut(count);
            rest = after;
            let (mut first, mut last) = (0, 0);
            if positives {
                let columns = &columns[..count];
                let (begin, end) = pairs.class_columns(position, column);
                first = columns.partition_point(|&c| (c as usize) < begin);
                last = columns.partition_point(|&c| (c as usize) < end);
                for (at, &c) in (first..last).zip(&columns[first..last]) {
                    others.bounds[at] = across_positives.bounds[c as usize];
                    others.factors[at] = across_positives.factors[c as usize];
                }
            }
            let others = &others;
            let own = w.negatives.row(position);
            let of_both = pairs.square;
            let negative =
                Curve { kind, positive: false, scale: w.alpha, lambda: w.lambda_neg, own, of_both };
            for range in [0..first, last..count] {
                if kind == Kind::LambdaPos {
                    out[range].fill(0.0);
                } else {
                    selected += weigh(simd, values, range, others, negative, &mut totals[1], out);
                }
            }
            let own = w.positives.row(position);
            let positive = Curve { kind, positive: true, scale: -w.beta, lambda: w.lambda_pos, own, of_both };
            if kind == Kind::LambdaNeg {
                out[first..last].fill(0.0);
            } else {
                selected += weigh(simd, values, first..last, others, positive, &mut totals[0], out);
            }
        }
        let sum = |lanes: [f32; GROUP]| lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
        let totals = Totals {
            softplus: totals.map(|kind| sum(kind.0[0])),
            sigmoid: totals.map(|kind| sum(kind.0[1])),
        };
        Weighed { totals, pairs: selected }
    }
}

/// Bounds and factors of the columns of a row's candidates.
struct Others {
    bounds: [f32; MAX_BLOCK + GROUP],
    factors: [f32; MAX_BLOCK + GROUP],
}

impl Others {
    /// Writes those of a group's candidates from entry `at` on.
    #[inline(always)]
    fn put<S: Lanes>(&mut self, simd: S, at: usize, across: ShareRun<'_>, group: usize, mask: u16) {
        for (values, target) in [(across.bounds, &mut self.bounds), (across.factors, &mut self.factors)] {
            let values = &values[group * GROUP..];
            if let Some(target) = target[at..].first_chunk_mut::<GROUP>() {
                simd.compress(&bytemuck::cast(padded(values)), mask, bytemuck::cast_mut(target));
            }
        }
    }
}

/// Weighs the pairs `range` of one row of a tile, which are of one kind. Returns how many weights are not
/// zero.
#[inline(always)]
fn weigh<S: Lanes>(
    simd: S,
    s: &[f32],
    range: std::ops::Range<usize>,
    others: &Others,
    curve: Curve,
    totals: &mut GroupTotals,
    out: &mut [f32],
) -> usize {
    let mut selected = 0;
    for start in range.clone().step_by(2 * S::F32_LANES) {
        let part = start..range.end.min(start + 2 * S::F32_LANES);
        let lists = [&s[part.clone()], &others.bounds[part.clone()], &others.factors[part.clone()]];
        // PERF: two vectors side by side. One pair of functions is a chain of some 30 operations, and
        // processors do not look far enough ahead to find the next one by themselves.
        selected += if part.len() > S::F32_LANES {
            weigh_vectors::<S, 2>(simd, lists, curve, totals, &mut out[part])
        } else {
            weigh_vectors::<S, 1>(simd, lists, curve, totals, &mut out[part])
        };
    }
    selected
}

/// As [`weigh`], for at most N vectors of pairs. `lists` are similarities, and bounds and factors of their
/// columns.
#[inline(always)]
fn weigh_vectors<S: Lanes, const N: usize>(
    simd: S,
    lists: [&[f32]; 3],
    curve: Curve,
    totals: &mut GroupTotals,
    out: &mut [f32],
) -> usize {
    let Curve { kind, positive, scale, lambda, own, of_both } = curve;
    let splat = |value: f32| simd.splat_f32s(value);
    let zero = splat(0.0);
    let count = out.len();
    let lanes = |n: usize| n * S::F32_LANES..count.min((n + 1) * S::F32_LANES);
    // Positives below their bound are selected and weigh less than 0, negatives above it more than 0.
    let beyond = |s, bound| {
        if positive { simd.greater_than_f32s(bound, s) } else { simd.greater_than_f32s(s, bound) }
    };
    let sign = splat(if positive { -1.0 } else { 1.0 });
    let (own_bound, own_factor) = (splat(own.bound), splat(own.factor));
    let (mut x, mut both, mut counted) = ([zero; N], [zero; N], [zero; N]);
    for n in 0..N {
        let [s, bound, factor] =
            [lists[0], lists[1], lists[2]].map(|list| simd.partial_load_f32s(&list[lanes(n)]));
        let by_row = simd.select_f32s(beyond(s, own_bound), own_factor, zero);
        let by_column = simd.select_f32s(beyond(s, bound), factor, zero);
        let there = simd.greater_than_f32s(splat(lanes(n).len() as f32), S::as_simd_f32s(&LANE).0[0]);
        both[n] = simd.select_f32s(there, simd.add_f32s(by_row, by_column), zero);
        counted[n] = if of_both { both[n] } else { simd.select_f32s(there, by_row, zero) };
        x[n] = simd.mul_f32s(splat(scale), simd.sub_f32s(s, splat(lambda)));
    }
    let (sigmoid, softplus) = logistic(simd, x);
    let mut complement = sigmoid;
    if kind != Kind::Gradient {
        // 1 - sigmoid(x), as sigmoid(-x): the difference would cancel where the sigmoid is nearly 1.
        for x in &mut x {
            *x = simd.sub_f32s(zero, *x);
        }
        complement = logistic(simd, x).0;
    }
    let mut selected = 0;
    for n in 0..N {
        let weighed = simd.mul_f32s(both[n], sigmoid[n]);
        let weight = if kind == Kind::Gradient {
            let [softplus_sum, sigmoid_sum] = &mut totals.0;
            let softplus_sum = &mut S::as_mut_simd_f32s(softplus_sum).0[0];
            *softplus_sum = simd.mul_add_e_f32s(counted[n], softplus[n], *softplus_sum);
            let sigmoid_sum = &mut S::as_mut_simd_f32s(sigmoid_sum).0[0];
            *sigmoid_sum = simd.mul_add_e_f32s(counted[n], sigmoid[n], *sigmoid_sum);
            simd.mul_f32s(sign, weighed)
        } else {
            // d sigmoid(x) / d lambda = -scale * p (1 - p).
            let slope = simd.mul_f32s(splat(-scale), complement[n]);
            simd.mul_f32s(simd.mul_f32s(sign, weighed), slope)
        };
        let other_than_zero = simd.above(weight, zero) | simd.above(zero, weight);
        selected += other_than_zero.count_ones() as usize;
        simd.partial_store_f32s(&mut out[lanes(n)], weight);
    }
    selected
}

/// Numbers of the lanes of a vector.
const LANE: [f32; GROUP] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// The function of S that weighs one kind of pair in one row: `sigmoid(scale (S - lambda))`.
#[derive(Debug, Clone, Copy)]
struct Curve {
    kind: Kind,
    positive: bool,
    scale: f32,
    lambda: f32,
    own: Share,
    /// Whether the totals count a pair for both of its rows, or for the tile's row alone.
    of_both: bool,
}

/// Sums of softplus and sigmoid of one kind of pair in a tile, by lane.
#[derive(Debug, Clone, Copy, Default)]
struct GroupTotals([[f32; GROUP]; 2]);

/// Sigmoid and softplus, log(1 + exp(x)), to a few units in the last place, without branches.
#[inline(always)]
fn logistic<S: Lanes, const N: usize>(simd: S, x: [S::f32s; N]) -> ([S::f32s; N], [S::f32s; N]) {
    let splat = |value: f32| simd.splat_f32s(value);
    let mut e = [splat(0.0); N];
    for n in 0..N {
        e[n] = simd.abs_f32s(x[n]);
    }
    let e = exp_negative(simd, e);
    let (mut share, mut z, mut z2) = (e, e, e);
    for n in 0..N {
        // One division for 1 / (1 + e) and z = e / (2 + e).
        let (one, two) = (simd.add_f32s(splat(1.0), e[n]), simd.add_f32s(splat(2.0), e[n]));
        let inverse = simd.div_f32s(splat(1.0), simd.mul_f32s(one, two));
        share[n] = simd.mul_f32s(two, inverse);
        z[n] = simd.mul_f32s(simd.mul_f32s(e[n], one), inverse);
        z2[n] = simd.mul_f32s(z[n], z[n]);
    }
    // log(1 + e) = 2 artanh(z), z <= 1/3: the series is cut below 1e-8.
    let odd = [1.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0];
    let series = polynomial(simd, z2, odd);
    let (mut sigmoid, mut softplus) = (e, e);
    for n in 0..N {
        let below = simd.greater_than_f32s(splat(0.0), x[n]);
        sigmoid[n] = simd.select_f32s(below, simd.mul_f32s(e[n], share[n]), share[n]);
        let above = simd.max_f32s(x[n], splat(0.0));
        softplus[n] = simd.mul_add_e_f32s(simd.add_f32s(z[n], z[n]), series[n], above);
    }
    (sigmoid, softplus)
}

/// exp(-x) for x >= 0: 2^n with n = -x / ln 2 rounded, times a polynomial in the remainder.
#[inline(always)]
fn exp_negative<S: Lanes, const N: usize>(simd: S, x: [S::f32s; N]) -> [S::f32s; N] {
    /// Adding it rounds a float to an integer and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let splat = |value: f32| simd.splat_f32s(value);
    let (mut shifted, mut r) = (x, x);
    for n in 0..N {
        // Results below exp(-87) would be subnormal; weights that small do not matter.
        let x = simd.sub_f32s(splat(0.0), simd.min_f32s(x[n], splat(87.0)));
        shifted[n] = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
        let whole = simd.sub_f32s(shifted[n], splat(ROUND));
        // ln 2 in two parts, so that the remainder is exact.
        r[n] = simd.mul_add_e_f32s(whole, splat(-0.693_359_4), x);
        r[n] = simd.mul_add_e_f32s(whole, splat(2.121_944_4e-4), r[n]);
    }
    let factorials =
        [1.0, 1.0, 0.5, 0.166_666_65, 0.041_665_795, 0.008_333_452, 0.001_398_2, 0.000_198_756_9];
    let mut p = polynomial(simd, r, factorials);
    for n in 0..N {
        let exponent = simd.add_u32s(bytemuck::cast(shifted[n]), simd.splat_u32s(127));
        let power = simd.wrapping_dyn_shl_u32s(exponent, simd.splat_u32s(23));
        p[n] = simd.mul_f32s(p[n], bytemuck::cast(power));
    }
    p
}

/// The polynomial with coefficients `c`, lowest first, by halves: a chain of three steps instead of seven.
#[inline(always)]
fn polynomial<S: Lanes, const N: usize>(simd: S, x: [S::f32s; N], c: [f32; 8]) -> [S::f32s; N] {
    let splat = |value: f32| simd.splat_f32s(value);
    let mut out = x;
    for n in 0..N {
        let x = x[n];
        let pair = |low: usize| simd.mul_add_e_f32s(splat(c[low + 1]), x, splat(c[low]));
        let x2 = simd.mul_f32s(x, x);
        let four = |low: usize| simd.mul_add_e_f32s(pair(low + 2), x2, pair(low));
        out[n] = simd.mul_add_e_f32s(four(4), simd.mul_f32s(x2, x2), four(0));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::Level;
    use crate::loss::logistic as truth;

    struct Logistic(f32);

    impl Work for Logistic {
        type Output = (f32, f32);

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) -> (f32, f32) {
            let ([sigmoid], [softplus]) = logistic(simd, [simd.splat_f32s(self.0)]);
            (simd.reduce_max_f32s(sigmoid), simd.reduce_max_f32s(softplus))
        }
    }

    #[test]
    fn logistic_agrees_with_the_truth_over_its_whole_range_on_every_instruction_set() {
        for level in Level::available() {
            for step in -4000..=4000 {
                let x = step as f32 * 0.025;
                let (p, q) = level.dispatch(Logistic(x));
                let wanted_p = truth::sigmoid(f64::from(x));
                let wanted_q = truth::softplus(f64::from(x));
                assert!(
                    (f64::from(p) / wanted_p - 1.0).abs() < 1e-6 || wanted_p < 1e-37,
                    "{level:?}: sigmoid({x}) = {p}"
                );
                assert!(
                    (f64::from(q) / wanted_q - 1.0).abs() < 1e-6 || wanted_q < 1e-37,
                    "{level:?}: softplus({x}) = {q}"
                );
            }
        }
    }
}
