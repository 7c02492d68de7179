//! Named shares of mined negatives.

use std::fmt;
use std::str::FromStr;

use ddtas::loss::{LossSettings, Mining};
use ddtas_io::{Error, Result};

/// Share of all negative pairs that is finally mined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Density {
    /// Late in training: 1 %.
    Late,
    /// In the middle: 8 %.
    Middle,
    /// At the start: 30 %.
    Start,
    /// Nearly every pair, by tolerances that keep it.
    All,
    /// Any other share, in 0 to 0.6.
    Share(f64),
}

/// Largest share. Noise alone gives less: a negative must exceed the smallest of several positives.
const MOST: f64 = 0.6;

impl Density {
    /// The share that noise is adjusted for. [`Density::All`] has the noise of `middle`.
    #[must_use]
    pub fn share(self) -> f64 {
        match self {
            Self::Late => 0.01,
            Self::Middle | Self::All => 0.08,
            Self::Start => 0.30,
            Self::Share(share) => share,
        }
    }

    /// Settings of mining and loss: the paper's, but for [`Density::All`].
    #[must_use]
    pub fn settings(self) -> LossSettings {
        match self {
            // m+ - 2 lies below every cosine similarity, m- + 2 above.
            Self::All => LossSettings {
                mining: Mining::Asms,
                gamma: 2.0,
                negative_ratio: 1.0,
                ..LossSettings::default()
            },
            _ => LossSettings::default(),
        }
    }
}

impl FromStr for Density {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "late" => Ok(Self::Late),
            "middle" => Ok(Self::Middle),
            "start" => Ok(Self::Start),
            "all" => Ok(Self::All),
            _ => match text.parse() {
                Ok(share) if share > 0.0 && share <= MOST => Ok(Self::Share(share)),
                _ => Err(Error::misuse(
                    "density",
                    text,
                    "give late (0.01), middle (0.08), start (0.3), all, or a share above 0 and at most 0.6",
                )),
            },
        }
    }
}

impl fmt::Display for Density {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Late => f.write_str("late"),
            Self::Middle => f.write_str("middle"),
            Self::Start => f.write_str("start"),
            Self::All => f.write_str("all"),
            Self::Share(share) => write!(f, "{share}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_read_back() {
        for text in ["late", "middle", "start", "all", "0.05", "0.6"] {
            assert_eq!(text.parse::<Density>().unwrap().to_string(), text);
        }
        for text in ["", "early", "0", "-0.1", "0.61", "1", "NaN", "8%"] {
            assert!(text.parse::<Density>().is_err(), "{text}");
        }
    }

    #[test]
    fn settings_are_in_range() {
        for density in [Density::Late, Density::Middle, Density::Start, Density::All, Density::Share(0.5)] {
            density.settings().validate().unwrap();
        }
    }
}
