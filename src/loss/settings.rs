//! Settings of mining and loss, with the paper's defaults.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How the pairs that enter the loss are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Mining {
    /// Every pair of an anchor that has pairs of both kinds.
    None,
    /// One tolerance for both kinds: `gamma_pos = gamma_neg = gamma`.
    Symmetric,
    /// Asymmetric sample mining (SPEC 2): `gamma_neg = gamma * negative_ratio`.
    Asms,
    /// Adaptive asymmetric sample mining (SPEC 3).
    #[default]
    AtAsms,
}

impl Mining {
    /// Every way, from all pairs to the paper's.
    pub const ALL: [Self; 4] = [Self::None, Self::Symmetric, Self::Asms, Self::AtAsms];

    /// As the programs and files spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Symmetric => "symmetric",
            Self::Asms => "asms",
            Self::AtAsms => "at-asms",
        }
    }
}

impl fmt::Display for Mining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mining {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|mining| mining.name() == text);
        found.ok_or_else(|| Error::InvalidSetting {
            name: "mining",
            value: text.to_owned(),
            range: "none, symmetric, asms or at-asms",
        })
    }
}

/// Settings of one loss evaluation (SPEC 2-4). [`Default`] is the paper's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct LossSettings {
    /// Which pairs are kept.
    pub mining: Mining,
    /// Tolerance gamma of mining, in units of cosine similarity. 0 to 2; paper: 0.1.
    pub gamma: f64,
    /// `gamma_neg / gamma` under [`Mining::Asms`] and [`Mining::AtAsms`]. 0 to 10; paper: 0.1.
    pub negative_ratio: f64,
    /// The probe's tolerance over gamma (SPEC 3). 0 to 10; paper: 0.1, the authors' released code: 1.0.
    pub probe_ratio: f64,
    /// Factor k of the adaptation. 0 to 1; paper: 0.5.
    pub tolerance: f64,
    /// Sharpness of the negative term. Above 0, at most 10,000; paper: 40.
    pub alpha: f64,
    /// Sharpness of the positive term. Above 0, at most 10,000; paper: 2.
    pub beta: f64,
    /// Loss threshold of the positive term, a cosine similarity. -2 to 2; paper: 0.7.
    pub lambda_pos: f64,
    /// Loss threshold of the negative term, a cosine similarity. -2 to 2; paper: 0.7.
    pub lambda_neg: f64,
}

impl Default for LossSettings {
    fn default() -> Self {
        Self {
            mining: Mining::AtAsms,
            gamma: 0.1,
            negative_ratio: 0.1,
            probe_ratio: 0.1,
            tolerance: 0.5,
            alpha: 40.0,
            beta: 2.0,
            lambda_pos: 0.7,
            lambda_neg: 0.7,
        }
    }
}

impl LossSettings {
    /// The same settings with both loss thresholds at `lambda`.
    #[must_use]
    pub fn with_lambda(self, lambda: f64) -> Self {
        Self { lambda_pos: lambda, lambda_neg: lambda, ..self }
    }

    /// Checks every range. Backends call it, so a caller need not.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let within = |name, value: f64, low: f64, high: f64, range| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                let digits = value.to_string();
                // 1e308 would be 309 digits.
                let value = if digits.len() > 20 { format!("{value:e}") } else { digits };
                Err(Error::InvalidSetting { name, value, range })
            }
        };
        within("gamma", self.gamma, 0.0, 2.0, "0 to 2")?;
        within("negative_ratio", self.negative_ratio, 0.0, 10.0, "0 to 10")?;
        within("probe_ratio", self.probe_ratio, 0.0, 10.0, "0 to 10")?;
        within("tolerance", self.tolerance, 0.0, 1.0, "0 to 1")?;
        within("alpha", self.alpha, f64::MIN_POSITIVE, 1e4, "above 0, at most 10000")?;
        within("beta", self.beta, f64::MIN_POSITIVE, 1e4, "above 0, at most 10000")?;
        within("lambda_pos", self.lambda_pos, -2.0, 2.0, "-2 to 2")?;
        within("lambda_neg", self.lambda_neg, -2.0, 2.0, "-2 to 2")
    }
}
