//! Pair selection: ASMS (SPEC 2) and AT-ASMS (SPEC 3).
//!
//! An anchor keeps a positive less similar than its hardest negative plus a tolerance, and a negative more
//! similar than its hardest positive minus a tolerance. Comparisons are strict; an empty set is not an error.

use super::logistic::sigmoid;
use super::similarity::Similarities;
use super::{LossSettings, Mining};

/// The two tolerances of mining.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerances {
    /// Positives are kept below m- + `pos`.
    pub pos: f64,
    /// Negatives are kept above m+ - `neg`.
    pub neg: f64,
}

impl Tolerances {
    /// Keeps every pair of an anchor that has pairs of both kinds.
    const EVERYTHING: Self = Self { pos: f64::INFINITY, neg: f64::INFINITY };

    /// Whether an anchor with m- = `max_neg` keeps a positive of similarity `s`.
    fn keep_positive(&self, s: f64, max_neg: f64) -> bool {
        s < positive_bound(max_neg, self.pos)
    }

    /// Whether an anchor with m+ = `min_pos` keeps a negative of similarity `s`.
    fn keep_negative(&self, s: f64, min_pos: f64) -> bool {
        s > negative_bound(min_pos, self.neg)
    }
}

/// The tolerances before adaptation.
#[must_use]
pub fn initial_tolerances(settings: &LossSettings) -> Tolerances {
    let gamma = settings.gamma;
    match settings.mining {
        Mining::None => Tolerances::EVERYTHING,
        Mining::Symmetric => Tolerances { pos: gamma, neg: gamma },
        Mining::Asms | Mining::AtAsms => Tolerances { pos: gamma, neg: gamma * settings.negative_ratio },
    }
}

/// The probe's tolerance: a negative above m+ minus this is counted in n_neg (SPEC 3).
#[must_use]
pub fn probe_tolerance(settings: &LossSettings) -> f64 {
    settings.gamma * settings.probe_ratio
}

/// The larger of the probe's and the initial negative tolerance. Adaptation never widens the latter (SPEC 3),
/// so one sweep with this tolerance finds all candidates.
#[must_use]
pub fn candidate_tolerance(settings: &LossSettings) -> f64 {
    probe_tolerance(settings).max(initial_tolerances(settings).neg)
}

/// The counts that the tolerances adapt to (SPEC 3), over all anchors of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PairTotals {
    /// Negatives that pass the probe, n_neg.
    pub probe_neg: u64,
    /// Ordered positive pairs, N_pos.
    pub total_pos: u64,
}

/// The tolerances in force once the probe has been counted (SPEC 3). Only [`Mining::AtAsms`] adapts.
#[must_use]
pub fn adapt(settings: &LossSettings, PairTotals { probe_neg, total_pos }: PairTotals) -> Tolerances {
    let initial = initial_tolerances(settings);
    if settings.mining != Mining::AtAsms || total_pos == 0 || probe_neg <= total_pos {
        return initial;
    }
    let rho = probe_neg as f64 / total_pos as f64;
    let t = settings.tolerance * sigmoid(rho);
    Tolerances { pos: initial.pos * (1.0 + t), neg: initial.neg * (1.0 - t) }
}

/// n_neg of the probe (SPEC 3): negatives above m+ minus the probe's tolerance.
fn probe(similarities: &Similarities, settings: &LossSettings, min_pos: &[f64]) -> u64 {
    let tolerances = Tolerances { neg: probe_tolerance(settings), pos: 0.0 };
    let passes = |i: usize, j: usize| tolerances.keep_negative(similarities.values[[i, j]], min_pos[i]);
    let of = |i: usize| similarities.negatives(i).filter(|&j| passes(i, j)).count() as u64;
    (0..similarities.anchors()).map(of).sum()
}

/// The mined pairs of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// m+ of every anchor.
    pub min_pos: Vec<f64>,
    /// m- of every anchor.
    pub max_neg: Vec<f64>,
    /// P_i, ascending.
    pub positives: Vec<Vec<usize>>,
    /// N_i, ascending.
    pub negatives: Vec<Vec<usize>>,
    /// The tolerances in force.
    pub tolerances: Tolerances,
    /// n_neg of the probe.
    pub probe_neg: u64,
    /// N_pos, ordered positive pairs.
    pub total_pos: u64,
}

impl Selection {
    /// Mines a batch: probe, adapt, keep.
    #[must_use]
    pub fn new(similarities: &Similarities, settings: &LossSettings) -> Self {
        let anchors = 0..similarities.anchors();
        let min_pos: Vec<f64> = anchors.clone().map(|i| similarities.min_pos(i)).collect();
        let max_neg: Vec<f64> = anchors.clone().map(|i| similarities.max_neg(i)).collect();
        let total_pos = anchors.clone().map(|i| similarities.positives(i).count() as u64).sum();
        let probe_neg = probe(similarities, settings, &min_pos);
        let tolerances = adapt(settings, PairTotals { probe_neg, total_pos });
        let s = &similarities.values;
        let positives = |i: usize| {
            let kept = |&j: &usize| tolerances.keep_positive(s[[i, j]], max_neg[i]);
            similarities.positives(i).filter(kept).collect()
        };
        let negatives = |i: usize| {
            let kept = |&j: &usize| tolerances.keep_negative(s[[i, j]], min_pos[i]);
            similarities.negatives(i).filter(kept).collect()
        };
        let (positives, negatives) =
            (anchors.clone().map(positives).collect(), anchors.map(negatives).collect());
        Self { min_pos, max_neg, positives, negatives, tolerances, probe_neg, total_pos }
    }

    /// Numbers of positive and negative pairs of active anchors.
    #[must_use]
    pub fn mined(&self) -> (u64, u64) {
        let active = self.sizes().into_iter().filter(|&[pos, neg]| pos > 0 && neg > 0);
        active.fold((0, 0), |sum, [pos, neg]| (sum.0 + u64::from(pos), sum.1 + u64::from(neg)))
    }

    /// |P_i| and |N_i| of every anchor.
    #[must_use]
    pub fn sizes(&self) -> Vec<[u32; 2]> {
        self.positives.iter().zip(&self.negatives).map(|(p, n)| [p.len() as u32, n.len() as u32]).collect()
    }

    /// Whether anchor i enters the loss: both sets are non-empty.
    #[must_use]
    pub fn is_active(&self, i: usize) -> bool {
        !self.positives[i].is_empty() && !self.negatives[i].is_empty()
    }
}

/// m- + tolerance. Without a negative (m- = -inf) nothing is below it, whatever the tolerance.
#[must_use]
pub fn positive_bound(max_neg: f64, tolerance: f64) -> f64 {
    if max_neg == f64::NEG_INFINITY { max_neg } else { max_neg + tolerance }
}

/// m+ - tolerance. Without a positive (m+ = +inf) nothing is above it, whatever the tolerance.
#[must_use]
pub fn negative_bound(min_pos: f64, tolerance: f64) -> f64 {
    if min_pos == f64::INFINITY { min_pos } else { min_pos - tolerance }
}
