//! Updates lambda by hyper-gradients.

use serde::{Deserialize, Serialize};

use super::{GeneratorSettings, Lambda, Optimizer};
use ddtas::loss::ThresholdGradient;

/// Adam's decay rates of mean and square. That of the mean is above the usual 0.9, since the noise of a
/// hyper-gradient is many times its mean.
const DECAYS: (f64, f64) = (0.95, 0.999);
const EPSILON: f64 = 1e-12;

/// Distance of the first and the last member's initial lambda from the value given.
const ENSEMBLE_SPREAD: f64 = 0.1;
/// Ratio of the fastest member's rate to the slowest one's.
const ENSEMBLE_RATES: f64 = 4.0;

/// How a member is updated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateRule {
    /// SGD or Adam.
    pub optimizer: Optimizer,
    /// Current factor of every member's learning rate.
    pub pace: f64,
    /// L1 regularisation towards the initial value.
    pub l1: f64,
    /// L2 regularisation towards the initial value.
    pub l2: f64,
    /// Smallest and largest lambda.
    pub range: (f64, f64),
    /// Whether the two thresholds are learned separately.
    pub pair: bool,
}

/// State of one generator of an ensemble.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Current thresholds.
    pub lambda: Lambda,
    /// Initial thresholds, which the regularisation pulls back to.
    pub start: Lambda,
    /// Learning rate.
    pub rate: f64,
    mean: Lambda,
    square: Lambda,
    updates: i32,
}

impl Member {
    /// A member with the initial thresholds `start`.
    #[must_use]
    pub fn new(start: Lambda, rate: f64) -> Self {
        Self { lambda: start, start, rate, mean: Lambda::default(), square: Lambda::default(), updates: 0 }
    }

    /// Takes one step against `gradient`, dL^m/dlambda. A gradient that is not finite is ignored.
    pub fn update(&mut self, gradient: ThresholdGradient, rule: &UpdateRule) {
        let ThresholdGradient { mut pos, mut neg } = gradient;
        if !(pos.is_finite() && neg.is_finite()) {
            return;
        }
        if !rule.pair {
            (pos, neg) = (pos + neg, pos + neg);
        }
        self.updates = self.updates.saturating_add(1);
        let updates = self.updates;
        let rate = self.rate * rule.pace;
        let step = |lambda: &mut f64, start: f64, mean: &mut f64, square: &mut f64, gradient: f64| {
            let direction = match rule.optimizer {
                Optimizer::Sgd => gradient,
                Optimizer::Adam => {
                    *mean = DECAYS.0 * *mean + (1.0 - DECAYS.0) * gradient;
                    *square = DECAYS.1 * *square + (1.0 - DECAYS.1) * gradient * gradient;
                    let unbiased = |value: f64, decay: f64| value / (1.0 - decay.powi(updates));
                    unbiased(*mean, DECAYS.0) / (unbiased(*square, DECAYS.1).sqrt() + EPSILON)
                }
            };
            let away = *lambda - start;
            // The regularisation is decoupled from the optimizer, like weight decay in AdamW.
            let pull = rule.l2 * away + if away == 0.0 { 0.0 } else { rule.l1 * away.signum() };
            *lambda = (*lambda - rate * (direction + pull)).clamp(rule.range.0, rule.range.1);
        };
        step(&mut self.lambda.pos, self.start.pos, &mut self.mean.pos, &mut self.square.pos, pos);
        step(&mut self.lambda.neg, self.start.neg, &mut self.mean.neg, &mut self.square.neg, neg);
    }
}

/// The state of the generator in a checkpoint. Lambda is the mean of its members.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// The members, at least one.
    pub members: Vec<Member>,
}

impl Thresholds {
    /// Members with initial values from `ENSEMBLE_SPREAD` below to as much above `start`, and with rates from
    /// half to twice the one in `settings`.
    #[must_use]
    pub fn new(start: Lambda, settings: &GeneratorSettings) -> Self {
        let count = settings.lambda_ensemble.max(1);
        let range = (settings.lambda_min, settings.lambda_max);
        let members = (0..count)
            .map(|member| {
                // -1 to 1 over the members, 0 for a single one.
                let place = if count == 1 { 0.0 } else { 2.0 * member as f64 / (count - 1) as f64 - 1.0 };
                let moved = |lambda: f64| (lambda + ENSEMBLE_SPREAD * place).clamp(range.0, range.1);
                let start = Lambda { pos: moved(start.pos), neg: moved(start.neg) };
                Member::new(start, settings.lambda_rate * ENSEMBLE_RATES.powf(0.5 * place))
            })
            .collect();
        Self { members }
    }

    /// An error with the reason if the members, from a checkpoint, do not fit `settings`.
    pub(crate) fn check(&self, settings: &GeneratorSettings) -> std::result::Result<(), String> {
        let (low, high) = (settings.lambda_min, settings.lambda_max);
        let count = self.members.len();
        if count != settings.lambda_ensemble {
            return Err(format!("holds a generator of {count} members: give --lambda-ensemble {count}"));
        }
        for member in &self.members {
            let Member { lambda, start, rate, mean, square, updates } = member;
            let finite = |pair: &Lambda| pair.pos.is_finite() && pair.neg.is_finite();
            let sound = [lambda, start, mean, square].into_iter().all(finite) && *updates >= 0;
            if !(sound && square.pos >= 0.0 && square.neg >= 0.0 && *rate > 0.0 && rate.is_finite()) {
                return Err("holds an impossible state of the generator: the file is damaged".into());
            }
            if let Some(outside) =
                [lambda.pos, lambda.neg].into_iter().find(|value| !(low..=high).contains(value))
            {
                return Err(format!(
                    "holds lambda {outside}, outside of --lambda-min {low} to --lambda-max {high}: widen them"
                ));
            }
            if lambda.pos != lambda.neg && !settings.lambda_pair {
                return Err("holds two lambdas, learned apart: give --lambda-pair".into());
            }
        }
        Ok(())
    }

    /// Lambda: the mean of the members.
    #[must_use]
    pub fn lambda(&self) -> Lambda {
        let count = self.members.len().max(1) as f64;
        let mean = |of: fn(&Lambda) -> f64| self.members.iter().map(|m| of(&m.lambda)).sum::<f64>() / count;
        Lambda { pos: mean(|lambda| lambda.pos), neg: mean(|lambda| lambda.neg) }
    }
}

impl UpdateRule {
    /// The rule for step `step` of the run.
    #[must_use]
    pub fn at(step: usize, settings: &GeneratorSettings) -> Self {
        Self {
            optimizer: settings.lambda_optimizer,
            pace: settings.pace(step),
            l1: settings.lambda_l1,
            l2: settings.lambda_l2,
            range: (settings.lambda_min, settings.lambda_max),
            pair: settings.lambda_pair,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: UpdateRule =
        UpdateRule { optimizer: Optimizer::Sgd, pace: 1.0, l1: 0.0, l2: 0.0, range: (0.0, 1.0), pair: false };

    fn both(value: f64) -> Lambda {
        Lambda { pos: value, neg: value }
    }

    #[test]
    fn one_lambda_moves_by_the_sum_of_both_gradients() {
        let mut member = Member::new(both(0.5), 0.1);
        member.update(ThresholdGradient { pos: 1.0, neg: -3.0 }, &RULE);
        assert!((member.lambda.pos - 0.7).abs() < 1e-12 && member.lambda.pos == member.lambda.neg);
        let mut pair = Member::new(both(0.5), 0.1);
        pair.update(ThresholdGradient { pos: 1.0, neg: -3.0 }, &UpdateRule { pair: true, ..RULE });
        assert!((pair.lambda.pos - 0.4).abs() < 1e-12 && (pair.lambda.neg - 0.8).abs() < 1e-12);
        let mut slow = Member::new(both(0.5), 0.1);
        slow.update(ThresholdGradient { pos: 1.0, neg: -3.0 }, &UpdateRule { pace: 0.25, ..RULE });
        assert!((slow.lambda.pos - 0.55).abs() < 1e-12);
    }

    #[test]
    fn members_that_no_run_leaves_behind_are_refused() {
        let settings = GeneratorSettings::default();
        let state = Thresholds::new(both(0.7), &settings);
        assert_eq!(state.check(&settings), Ok(()));
        let faults: [fn(&mut Member); 7] = [
            |member| member.lambda.pos = f64::NAN,
            |member| member.start.neg = f64::INFINITY,
            |member| member.rate = 0.0,
            |member| member.mean.pos = f64::NEG_INFINITY,
            |member| member.square.neg = -1.0,
            |member| member.updates = -1,
            |member| member.lambda = both(1.1),
        ];
        for (number, fault) in faults.into_iter().enumerate() {
            let mut damaged = state.clone();
            fault(&mut damaged.members[0]);
            assert!(damaged.check(&settings).is_err(), "fault {number}");
        }
        assert!(Thresholds { members: Vec::new() }.check(&settings).is_err());
    }

    #[test]
    fn adam_moves_by_its_rate_whatever_the_scale() {
        let rule = UpdateRule { optimizer: Optimizer::Adam, ..RULE };
        for scale in [1e-6, 1.0, 1e6] {
            let mut member = Member::new(both(0.5), 0.01);
            member.update(ThresholdGradient { pos: 0.0, neg: scale }, &rule);
            assert!((member.lambda.neg - 0.49).abs() < 1e-6, "{scale}: {}", member.lambda.neg);
        }
    }

    #[test]
    fn adam_follows_its_formula_over_many_steps() {
        let rule = UpdateRule { optimizer: Optimizer::Adam, pair: true, ..RULE };
        let mut member = Member::new(both(0.5), 0.01);
        let (mut want, mut mean, mut square) = (0.5, 0.0, 0.0);
        for (step, gradient) in (1..).zip([1.0f64, -0.5, 2.0, 0.25, -1.0]) {
            member.update(ThresholdGradient { pos: gradient, neg: 0.0 }, &rule);
            mean += 0.05 * (gradient - mean);
            square += 0.001 * (gradient * gradient - square);
            let unbiased = |value: f64, decay: f64| value / (1.0 - decay.powi(step));
            want -= 0.01 * unbiased(mean, 0.95) / unbiased(square, 0.999).sqrt();
            assert!(
                (member.lambda.pos - want).abs() < 1e-9,
                "step {step}: {}, not {want}",
                member.lambda.pos
            );
        }
        assert_eq!(member.lambda.neg, 0.5);
    }

    #[test]
    fn an_ensemble_begins_around_lambda_with_rates_around_the_given_one() {
        let settings =
            GeneratorSettings { lambda_ensemble: 3, lambda_rate: 0.02, ..GeneratorSettings::default() };
        let mut ensemble = Thresholds::new(both(0.7), &settings);
        for (member, (lambda, rate)) in ensemble.members.iter().zip([(0.6, 0.01), (0.7, 0.02), (0.8, 0.04)]) {
            assert!((member.lambda.pos - lambda).abs() < 1e-12 && (member.rate - rate).abs() < 1e-12);
            assert_eq!(member.lambda, member.start);
        }
        ensemble.members[2].lambda = Lambda { pos: 0.5, neg: 0.2 };
        let Lambda { pos, neg } = ensemble.lambda();
        assert!(
            (pos - 0.6).abs() < 1e-12 && (neg - 0.5).abs() < 1e-12,
            "the mean of the members: {pos}, {neg}"
        );
    }

    #[test]
    fn in_a_rehearsal_the_pace_falls_to_zero() {
        let pace = |rehearsal, step| {
            UpdateRule::at(step, &GeneratorSettings { rehearsal, ..GeneratorSettings::default() }).pace
        };
        assert_eq!([0, 1, 3].map(|step| pace(4, step)), [1.0, 0.75, 0.25]);
        assert_eq!(pace(0, 1000), 1.0);
    }

    #[test]
    fn range_holds_pull_returns_and_nan_is_passed_over() {
        let mut member = Member::new(both(0.5), 1.0);
        member.update(ThresholdGradient { pos: 0.0, neg: -9.0 }, &RULE);
        assert_eq!(member.lambda, both(1.0));
        member.update(ThresholdGradient::default(), &UpdateRule { l2: 0.5, ..RULE });
        assert_eq!(member.lambda, both(0.75));
        member.update(ThresholdGradient::default(), &UpdateRule { l1: 0.25, ..RULE });
        assert_eq!(member.lambda, both(0.5));
        member.update(ThresholdGradient { pos: f64::NAN, neg: 0.0 }, &RULE);
        assert_eq!(member.lambda, both(0.5));
    }
}
