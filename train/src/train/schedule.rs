//! Learning rate over a run: linear warm-up, then half a cosine down to zero.

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Learning rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of the warm-up.
    pub warm_up: usize,
    /// Steps of the run.
    pub steps: usize,
}

impl Schedule {
    /// Learning rate of step `step`, counted from 0. Never exactly zero while the run lasts.
    #[must_use]
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step < self.warm_up {
            return self.peak * (step + 1) as f64 / self.warm_up as f64;
        }
        let rest = (self.steps - self.warm_up.min(self.steps)).max(1) as f64;
        let progress = ((step - self.warm_up) as f64 / rest).min(1.0);
        self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_rises_to_the_peak_and_falls_towards_zero() {
        let schedule = Schedule { peak: 1.0, warm_up: 10, steps: 110 };
        assert_eq!(schedule.learning_rate(0), 0.1);
        assert_eq!(schedule.learning_rate(9), 1.0);
        assert_eq!(schedule.learning_rate(10), 1.0);
        assert!((schedule.learning_rate(60) - 0.5).abs() < 1e-12);
        assert!(schedule.learning_rate(109) > 0.0 && schedule.learning_rate(109) < 1e-3);
    }

    #[test]
    fn run_of_one_step_has_a_rate() {
        assert!(Schedule { peak: 1.0, warm_up: 0, steps: 1 }.learning_rate(0) > 0.0);
    }
}
