//! Learning rate schedule: a linear warm-up, then the decay.

use serde::{Deserialize, Serialize};

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Cosine decay to 0 at the end.
    #[default]
    Cosine,
    /// Multiplied by --milestone-factor at each of --milestones.
    Step,
    /// Constant.
    Constant,
}

/// A schedule over a known number of steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// The learning rate after the warm-up.
    pub kind: ScheduleKind,
    /// Learning rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of the warm-up.
    pub warm_up: usize,
    /// Steps of the run.
    pub steps: usize,
    /// Steps at which the rate falls, and its factor there ([`ScheduleKind::Step`]).
    pub milestones: (Vec<usize>, f64),
}

impl Schedule {
    /// Learning rate of step `step`, counted from 0. Above zero in every step of the run.
    #[must_use]
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step < self.warm_up {
            return self.peak * (step + 1) as f64 / self.warm_up as f64;
        }
        match self.kind {
            ScheduleKind::Cosine => {
                let rest = (self.steps - self.warm_up.min(self.steps)).max(1) as f64;
                let progress = ((step - self.warm_up) as f64 / rest).min(1.0);
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
            ScheduleKind::Step => {
                let (milestones, factor) = &self.milestones;
                milestones
                    .iter()
                    .filter(|&&milestone| step >= milestone)
                    .fold(self.peak, |rate, _| rate * factor)
            }
            ScheduleKind::Constant => self.peak,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warm_up: usize, steps: usize) -> Schedule {
        Schedule { kind, peak: 1.0, warm_up, steps, milestones: (vec![40, 60], 0.1) }
    }

    #[test]
    fn rate_rises_to_the_peak_and_falls_towards_zero() {
        let schedule = schedule(ScheduleKind::Cosine, 10, 110);
        assert_eq!(schedule.learning_rate(0), 0.1);
        assert_eq!(schedule.learning_rate(9), 1.0);
        assert_eq!(schedule.learning_rate(10), 1.0);
        assert!((schedule.learning_rate(60) - 0.5).abs() < 1e-12);
        assert!(schedule.learning_rate(109) > 0.0 && schedule.learning_rate(109) < 1e-3);
    }

    #[test]
    fn run_of_one_step_has_a_rate() {
        assert!(schedule(ScheduleKind::Cosine, 0, 1).learning_rate(0) > 0.0);
    }

    #[test]
    fn rate_falls_at_the_milestones_or_not_at_all() {
        let step = schedule(ScheduleKind::Step, 10, 110);
        let rates = [4, 10, 39, 40, 59, 60, 109].map(|at| step.learning_rate(at));
        assert_eq!(rates, [0.5, 1.0, 1.0, 0.1, 0.1, 0.1 * 0.1, 0.1 * 0.1]);
        let constant = schedule(ScheduleKind::Constant, 10, 110);
        assert_eq!([4, 10, 109].map(|at| constant.learning_rate(at)), [0.5, 1.0, 1.0]);
    }
}
