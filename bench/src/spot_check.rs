//! Checks a device's loss on a batch of any size against float64, for some of its anchors.
//!
//! [`run`](ddtas_cases::run()) needs every similarity of a small batch. Here an anchor costs one row of S:
//! its m+, m-, counts and term of the loss follow from its own similarities, its gradient from these and the
//! device's four numbers of the other anchors (m+, m-, |P|, |N|). Pairs closer to a threshold than the error
//! of the device's similarities may be kept or not. `benches/device.sh` does this before it times a shape.

use std::ops::Range;

use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::backend::device::{Device, DeviceBackend};
use ddtas::loss::logistic::{sigmoid, softplus};
use ddtas::loss::select::{Tolerances, adapt, negative_bound, positive_bound};
use ddtas::loss::similarity::DUPLICATE;
use ddtas::loss::{Batch, Embeddings, LossOutput, LossSettings};
use ddtas_cases::random::SLACK;
use ddtas_cases::{Bounds, SINGLE_PRECISION, to_tf32};
use ndarray::{Array2, s};
use rayon::prelude::*;

/// References that are converted to float64 at a time.
const CHUNK: usize = 2048;

/// A device's results for a batch.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Loss, gradient and the numbers of each anchor.
    pub output: LossOutput,
    /// Each anchor's term of the loss.
    pub terms: Vec<f64>,
    /// Whether its gradient is a product of tiles; otherwise it is summed pair by pair, in another order.
    pub by_tiles: Vec<bool>,
}

impl Answer {
    /// Evaluates the loss of a batch.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn new<D: Device>(
        backend: &mut DeviceBackend<D>,
        batch: &Batch<'_>,
        settings: &LossSettings,
    ) -> Result<Self> {
        let mut output = LossOutput::default();
        backend.loss(batch, settings, &mut output)?;
        let (terms, by_tiles) = backend.terms_of_last_loss()?;
        Ok(Self { output, terms, by_tiles })
    }

    /// Compares it with an answer of the same kernels under another budget: bit for bit, except for gradient
    /// rows that were summed the other way.
    ///
    /// # Errors
    /// The first difference.
    pub fn same_bits(&self, other: &Self) -> std::result::Result<(), String> {
        let (a, b) = (&self.output, &other.output);
        let scalars = |o: &LossOutput| {
            let floats = [
                ("loss", o.loss),
                ("gamma_pos", o.gamma_pos),
                ("gamma_neg", o.gamma_neg),
                ("dloss_dlambda_pos", o.dloss_dlambda_pos),
                ("dloss_dlambda_neg", o.dloss_dlambda_neg),
                ("mean_pos", o.mean_pos),
                ("mean_neg", o.mean_neg),
            ];
            let counts = [
                ("probe_neg", o.probe_neg),
                ("total_pos", o.total_pos),
                ("total_neg", o.total_neg),
                ("active", o.active),
            ];
            floats.map(|(name, value)| (name, value.to_bits())).into_iter().chain(counts).collect::<Vec<_>>()
        };
        for ((name, a), (_, b)) in scalars(a).into_iter().zip(scalars(b)) {
            if a != b {
                return Err(format!("{name} differs between budgets, {a:#x} and {b:#x}"));
            }
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let vectors = [
            ("min_pos", bits(&a.min_pos), bits(&b.min_pos)),
            ("max_neg", bits(&a.max_neg), bits(&b.max_neg)),
            ("count_pos", a.count_pos.clone(), b.count_pos.clone()),
            ("count_neg", a.count_neg.clone(), b.count_neg.clone()),
        ];
        for (name, a, b) in vectors {
            if let Some(row) = (0..a.len().max(b.len())).find(|&row| a.get(row) != b.get(row)) {
                return Err(format!("{name}[{row}] differs between budgets"));
            }
        }
        for (row, (a, b)) in a.gradient.outer_iter().zip(b.gradient.outer_iter()).enumerate() {
            let differ = a.iter().zip(b).any(|(a, b)| a.to_bits() != b.to_bits());
            if differ && self.by_tiles[row] == other.by_tiles[row] {
                return Err(format!("row {row} of the gradient differs between budgets"));
            }
        }
        Ok(())
    }

    /// Compares its counts with those of other kernels, whose similarities may differ in the last bit.
    ///
    /// # Errors
    /// A message if the counts differ by more than that explains.
    pub fn same_counts(&self, other: &Self) -> std::result::Result<(), String> {
        let (a, b) = (&self.output, &other.output);
        for (name, a, b) in
            [("count_pos", &a.count_pos, &b.count_pos), ("count_neg", &a.count_neg, &b.count_neg)]
        {
            let all: u64 = b.iter().map(|&count| u64::from(count)).sum();
            let off: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            if a.len() != b.len() || off > all / 100_000 + 1 {
                return Err(format!("other kernels: {name} is off by {off} of {all} in all"));
            }
        }
        Ok(())
    }
}

/// Largest errors of an answer, as shares of what is allowed.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Figures {
    /// Number of anchors checked.
    pub anchors: usize,
    /// Error of m+ and m-.
    pub thresholds: f64,
    /// Error of the anchors' terms of the loss.
    pub terms: f64,
    /// Error of the gradient's rows.
    pub gradient: f64,
}

/// How a device computes its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As it is to be timed.
    Usual,
    /// With a budget of 0, so that every tile is recomputed.
    NothingStored,
    /// With the kernels that every GPU has, not Hopper's own.
    EveryGpu,
}

/// Evaluates the batch in all [`Way`]s, compares the first two with float64 and with each other bit for bit,
/// and the counts of the third with theirs.
///
/// # Errors
/// Errors of `open` or of a backend; the inner result says what is wrong with an answer.
pub fn compare<D: Device>(
    open: impl Fn(Way) -> Result<DeviceBackend<D>>,
    batch: &Batch<'_>,
    settings: &LossSettings,
    tf32: bool,
    anchors: usize,
) -> Result<std::result::Result<Figures, String>> {
    // One after the other: the memory of two may not fit.
    let answer = |way| Answer::new(&mut open(way)?, batch, settings);
    let usual = answer(Way::Usual)?;
    let (recomputed, other) = (answer(Way::NothingStored)?, answer(Way::EveryGpu)?);
    let truth = SpotCheck::new(batch, settings, tf32, anchors);
    Ok(truth.check(&usual).and_then(|figures| {
        truth.check(&recomputed).map_err(|wrong| format!("budget 0: {wrong}"))?;
        usual.same_bits(&recomputed)?;
        usual.same_counts(&other)?;
        Ok(figures)
    }))
}

/// Some anchors of a batch and all their similarities.
pub struct SpotCheck<'a, 'b> {
    batch: &'a Batch<'b>,
    settings: &'a LossSettings,
    tf32: bool,
    anchors: Vec<usize>,
    /// Squared norms of `anchors`.
    squares: Vec<f64>,
    chunks: Vec<Chunk>,
}

/// The similarities with some of the references.
struct Chunk {
    references: Range<usize>,
    /// `[anchors, references]`.
    values: Array2<f64>,
    squares: Vec<f64>,
}

/// A pair of the anchor that is checked.
struct Pair {
    reference: usize,
    s: f64,
    positive: bool,
}

/// Whether a pair is kept, by its distance from the bound and the error of the device's similarities.
#[derive(PartialEq)]
enum Kept {
    No,
    Perhaps,
    Yes,
}

impl Kept {
    fn new(pair: &Pair, pos_bound: f64, neg_bound: f64) -> Self {
        let inside = if pair.positive { pos_bound - pair.s } else { pair.s - neg_bound };
        match inside {
            _ if inside > SLACK => Self::Yes,
            _ if inside >= -SLACK => Self::Perhaps,
            _ => Self::No,
        }
    }
}

impl<'a, 'b> SpotCheck<'a, 'b> {
    /// Takes at most `count` anchors, spread over the batch. `tf32`: f32 rows are rounded as on the device.
    #[must_use]
    pub fn new(batch: &'a Batch<'b>, settings: &'a LossSettings, tf32: bool, count: usize) -> Self {
        let all = batch.anchors.embeddings.rows();
        let count = count.min(all);
        // Not always the same place within a tile.
        let step = all / count.max(1);
        let anchors: Vec<usize> = (0..count).map(|k| k * step + k * 37 % step).collect();
        let mut own = Array2::zeros((count, batch.anchors.embeddings.dim()));
        for (mut row, &anchor) in own.outer_iter_mut().zip(&anchors) {
            row.assign(&wide(&batch.anchors.embeddings, anchor..anchor + 1, tf32).row(0));
        }
        let squares = |rows: &Array2<f64>| rows.outer_iter().map(|row| row.dot(&row)).collect::<Vec<_>>();
        let references = batch.reference_rows().embeddings;
        let chunks = (0..references.rows().div_ceil(CHUNK))
            .into_par_iter()
            .map(|chunk| {
                let range = chunk * CHUNK..((chunk + 1) * CHUNK).min(references.rows());
                let rows = wide(&references, range.clone(), tf32);
                Chunk { references: range, values: own.dot(&rows.t()), squares: squares(&rows) }
            })
            .collect();
        Self { batch, settings, tf32, squares: squares(&own), anchors, chunks }
    }

    /// The pairs of the `k`-th anchor with the references of a chunk.
    fn pairs<'c>(&'c self, k: usize, chunk: &'c Chunk) -> impl Iterator<Item = Pair> + use<'a, 'b, 'c> {
        let anchor = self.anchors[k];
        let (label, labels) = (self.batch.anchors.labels[anchor], self.batch.reference_rows().labels);
        chunk.references.clone().enumerate().filter_map(move |(at, reference)| {
            let (s, other) = (chunk.values[[k, at]], labels[reference]);
            let itself = self.batch.is_square() && reference == anchor;
            let positive = label == other;
            let duplicate = positive && s >= DUPLICATE * self.squares[k].max(chunk.squares[at]);
            let counts = label >= 0 && other >= 0 && !itself && !duplicate;
            counts.then_some(Pair { reference, s, positive })
        })
    }

    fn all_pairs(&self, k: usize) -> impl Iterator<Item = Pair> + '_ {
        self.chunks.iter().flat_map(move |chunk| self.pairs(k, chunk))
    }

    /// Checks an answer against float64.
    ///
    /// # Errors
    /// The first wrong value: its name and anchor, the value, and the one wanted.
    pub fn check(&self, answer: &Answer) -> std::result::Result<Figures, String> {
        let output = &answer.output;
        let tolerances = adapt(self.settings, output.pair_totals());
        for (name, got, want) in
            [("gamma_pos", output.gamma_pos, tolerances.pos), ("gamma_neg", output.gamma_neg, tolerances.neg)]
        {
            if !close(got, want, 1e-9 * want.abs()) {
                return Err(format!("{name} is {got}, want {want}"));
            }
        }
        let sum: f64 = answer.terms.iter().sum();
        if !close(output.loss, sum, 1e-9 * sum.abs()) {
            return Err(format!("the loss is {}, its terms' sum {sum}", output.loss));
        }
        let anchors: Vec<_> = (0..self.anchors.len())
            .into_par_iter()
            .map(|k| self.check_anchor(k, answer, tolerances))
            .collect::<std::result::Result<_, String>>()?;
        let gradient = self.check_gradient(output, tolerances)?;
        let worst = |of: fn(&[f64; 2]) -> f64| anchors.iter().map(of).fold(0.0, f64::max);
        Ok(Figures {
            anchors: self.anchors.len(),
            thresholds: worst(|errors| errors[0]),
            terms: worst(|errors| errors[1]),
            gradient,
        })
    }

    /// Checks m+, m-, counts and term of the `k`-th anchor; returns the errors of m+ and m-, and of the term.
    fn check_anchor(
        &self,
        k: usize,
        answer: &Answer,
        tolerances: Tolerances,
    ) -> std::result::Result<[f64; 2], String> {
        let (anchor, output, settings) = (self.anchors[k], &answer.output, self.settings);
        let (mut min_pos, mut max_neg) = (f64::INFINITY, f64::NEG_INFINITY);
        for pair in self.all_pairs(k) {
            if pair.positive {
                min_pos = min_pos.min(pair.s);
            } else {
                max_neg = max_neg.max(pair.s);
            }
        }
        let mut off = 0.0f64;
        for (name, got, want) in
            [("m+", output.min_pos[anchor], min_pos), ("m-", output.max_neg[anchor], max_neg)]
        {
            let got = f64::from(got);
            let error = if got == want { 0.0 } else { (got - want).abs() / SLACK };
            if !close(got, want, SLACK) {
                return Err(format!("{name} of anchor {anchor} is {got}, want {want}"));
            }
            off = off.max(error);
        }

        let bounds = (positive_bound(max_neg, tolerances.pos), negative_bound(min_pos, tolerances.neg));
        // Of positives and of negatives: those that are kept in any case, and those that perhaps are.
        let (mut counts, mut sums) = ([[0u32; 2]; 2], [[0.0f64; 2]; 2]);
        for pair in self.all_pairs(k) {
            let kept = Kept::new(&pair, bounds.0, bounds.1);
            if kept == Kept::No {
                continue;
            }
            let (kind, perhaps) = (usize::from(!pair.positive), usize::from(kept == Kept::Perhaps));
            counts[kind][perhaps] += 1;
            sums[kind][perhaps] += softplus(argument(settings, &pair));
        }
        let got = [output.count_pos[anchor], output.count_neg[anchor]];
        for (kind, name) in ["positives", "negatives"].into_iter().enumerate() {
            let [least, more] = counts[kind];
            if got[kind] < least || got[kind] > least + more {
                let wanted =
                    if more == 0 { least.to_string() } else { format!("{least} to {}", least + more) };
                return Err(format!("anchor {anchor} keeps {} {name}, want {wanted}", got[kind]));
            }
        }

        let (mut least, mut more) = (0.0, 0.0);
        if got[0] > 0 && got[1] > 0 {
            for (kind, sharpness) in [settings.beta, settings.alpha].into_iter().enumerate() {
                let scale = self.weight(got[kind]) / sharpness;
                least += scale * sums[kind][0];
                more += scale * sums[kind][1];
            }
        }
        let term = answer.terms[anchor];
        let rounding =
            (SINGLE_PRECISION + settings.alpha.max(settings.beta) * Bounds::TRUNCATION) * (least + more);
        let nearest = term.clamp(least, least + more);
        if !close(term, nearest, rounding) {
            return Err(format!("anchor {anchor} adds {term} to the loss, want {least} and perhaps {more}"));
        }
        Ok([off, if term == nearest { 0.0 } else { (term - nearest).abs() / rounding }])
    }

    /// 2 / (B count), the weight of a pair in an anchor's set.
    fn weight(&self, count: u32) -> f64 {
        2.0 / (self.batch.anchors.embeddings.rows() as f64 * f64::from(count))
    }

    /// Relative rounding error of a weight on tensor cores.
    fn rounding(&self) -> f64 {
        match self.batch.anchors.embeddings {
            Embeddings::F32(_) if self.tf32 => 2.0f64.powi(-11),
            Embeddings::F32(_) => 0.0,
            Embeddings::F16(_) => 2.0f64.powi(-11),
            Embeddings::Bf16(_) => 2.0f64.powi(-8),
        }
    }

    /// Least error of a sigmoid with 16-bit rows: f16 holds 2^15 times it, in steps of 2^-24 or more.
    fn smallest(&self) -> f64 {
        match self.batch.anchors.embeddings {
            Embeddings::F32(_) if !self.tf32 => 0.0,
            _ => 2.0f64.powi(-40),
        }
    }

    /// The worst of the anchors' rows of the gradient, as a share of what is allowed.
    fn check_gradient(
        &self,
        output: &LossOutput,
        tolerances: Tolerances,
    ) -> std::result::Result<f64, String> {
        let references = self.batch.reference_rows().embeddings;
        let shape = (self.anchors.len(), references.dim());
        // The gradient; each anchor's sums of weights, of their squares, and of weights of doubtful pairs.
        let nothing = || (Array2::<f64>::zeros(shape), vec![[0.0f64; 3]; shape.0]);
        let (want, sums) = self
            .chunks
            .par_iter()
            .map(|chunk| {
                let mut weights = Array2::<f64>::zeros(chunk.values.dim());
                let (_, mut sums) = nothing();
                for (k, sums) in sums.iter_mut().enumerate() {
                    for pair in self.pairs(k, chunk) {
                        let (weight, perhaps) = self.pair_weight(self.anchors[k], &pair, output, tolerances);
                        weights[[k, pair.reference - chunk.references.start]] = weight;
                        sums[0] += weight.abs();
                        sums[1] += weight * weight;
                        sums[2] += perhaps;
                    }
                }
                (weights.dot(&wide(&references, chunk.references.clone(), self.tf32)), sums)
            })
            .reduce(nothing, |(a, mut sums), (b, others)| {
                for (sums, others) in sums.iter_mut().zip(others) {
                    for (sum, other) in sums.iter_mut().zip(others) {
                        *sum += other;
                    }
                }
                (a + b, sums)
            });
        let mut worst = 0.0f64;
        for (k, [all, squares, perhaps]) in sums.into_iter().enumerate() {
            let anchor = self.anchors[k];
            let got = output.gradient.row(anchor).mapv(f64::from);
            let error = (&got - &want.row(k)).mapv(|x| x * x).sum().sqrt();
            let sharpness = self.settings.alpha.max(self.settings.beta);
            // Rounded weights err independently, sums and similarities perhaps not.
            let allowed = 2.5 * self.rounding() * squares.sqrt()
                + (SINGLE_PRECISION + sharpness * Bounds::TRUNCATION) * all
                + 1.01 * perhaps;
            if !close(error, 0.0, allowed) {
                return Err(format!(
                    "the gradient of anchor {anchor} is off by {error:.2e} in norm, {allowed:.2e} allowed"
                ));
            }
            worst = worst.max(if error == 0.0 { 0.0 } else { error / allowed });
        }
        Ok(worst)
    }

    /// G_ij, plus G_ji in the square form, and the part of the sum that is uncertain.
    fn pair_weight(
        &self,
        anchor: usize,
        pair: &Pair,
        output: &LossOutput,
        tolerances: Tolerances,
    ) -> (f64, f64) {
        let slope = sigmoid(argument(self.settings, pair));
        let (mut weight, mut perhaps) = (0.0, 0.0);
        let other = self.batch.is_square().then_some(pair.reference);
        for i in [Some(anchor), other].into_iter().flatten() {
            let counts = [output.count_pos[i], output.count_neg[i]];
            if counts.contains(&0) {
                continue;
            }
            let pos_bound = positive_bound(f64::from(output.max_neg[i]), tolerances.pos);
            let neg_bound = negative_bound(f64::from(output.min_pos[i]), tolerances.neg);
            let most = self.weight(counts[usize::from(!pair.positive)]);
            let share = most * slope;
            let signed = if pair.positive { -share } else { share };
            match Kept::new(pair, pos_bound, neg_bound) {
                Kept::No => continue,
                Kept::Yes => {}
                Kept::Perhaps => perhaps += share,
            }
            weight += signed;
            perhaps += most * self.smallest();
        }
        (weight, perhaps)
    }
}

/// Equal, infinities included, or off by no more than `bound`; NaN is close to nothing.
fn close(got: f64, want: f64, bound: f64) -> bool {
    got == want || (got - want).abs() <= bound
}

/// The pair's term of the loss is softplus of this (SPEC 4).
fn argument(settings: &LossSettings, pair: &Pair) -> f64 {
    if pair.positive {
        -settings.beta * (pair.s - settings.lambda_pos)
    } else {
        settings.alpha * (pair.s - settings.lambda_neg)
    }
}

/// Rows in float64, as the device multiplies them.
fn wide(rows: &Embeddings<'_>, range: Range<usize>, tf32: bool) -> Array2<f64> {
    let part = s![range, ..];
    match rows {
        Embeddings::F32(m) if tf32 => m.slice(part).mapv(|value| f64::from(to_tf32(value))),
        Embeddings::F32(m) => m.slice(part).mapv(f64::from),
        Embeddings::F16(m) => m.slice(part).mapv(f64::from),
        Embeddings::Bf16(m) => m.slice(part).mapv(f64::from),
    }
}
