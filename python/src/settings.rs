//! `ddtas.Settings`, a frozen dataclass, as the library's settings.

use ddtas::loss::LossSettings;
use pyo3::prelude::*;

use crate::error::raise;

/// The fields of `ddtas.Settings`, read by name.
#[derive(FromPyObject)]
pub struct Settings {
    mining: String,
    gamma: f64,
    negative_ratio: f64,
    probe_ratio: f64,
    tolerance: f64,
    alpha: f64,
    beta: f64,
    lambda_pos: f64,
    lambda_neg: f64,
}

impl Settings {
    /// The numbers in the order of the fields.
    pub fn of_numbers(mining: &str, numbers: [f64; 8]) -> Self {
        let [gamma, negative_ratio, probe_ratio, tolerance, alpha, beta, lambda_pos, lambda_neg] = numbers;
        let mining = mining.to_owned();
        Self { mining, gamma, negative_ratio, probe_ratio, tolerance, alpha, beta, lambda_pos, lambda_neg }
    }

    /// # Errors
    /// `ValueError` for a kind of mining that does not exist, or a value out of its range.
    pub fn to_library(&self) -> PyResult<LossSettings> {
        let settings = LossSettings {
            mining: self.mining.parse().map_err(raise)?,
            gamma: self.gamma,
            negative_ratio: self.negative_ratio,
            probe_ratio: self.probe_ratio,
            tolerance: self.tolerance,
            alpha: self.alpha,
            beta: self.beta,
            lambda_pos: self.lambda_pos,
            lambda_neg: self.lambda_neg,
        };
        settings.validate().map_err(raise)?;
        Ok(settings)
    }
}
