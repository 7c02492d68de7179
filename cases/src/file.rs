//! The reference cases of SPEC 7: inputs and float64 results in `.safetensors` files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ddtas::loss::{LossSettings, Mining, OwnedEmbeddings, ThresholdGradient};
use ddtas_io::tensors::TensorFile;
use ddtas_io::{Error, Result};

use crate::{Case, Side};

impl Case {
    /// Reads a reference case: square, f32 rows. The means, which the file does not have, are the truth's.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it is not a reference case.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let file = TensorFile::parse(path, &bytes)?;
        let embeddings = file.matrix::<f32>("embeddings")?;
        let (shape, rows) = (embeddings.dim(), embeddings.nrows());
        let labels = file.integers("labels", rows)?;
        let settings = settings_of(path, &file.metadata)?;
        let (tangent, gradient) = (file.matrix("tangent")?, file.matrix("expected.grad")?);
        for (name, matrix) in [("tangent", tangent.dim()), ("expected.grad", gradient.dim())] {
            if matrix != shape {
                return Err(Error::format(path, format!("`{name}` and `embeddings` differ in shape")));
            }
        }
        let name = file.metadata.get("case").cloned();
        let name = name.ok_or_else(|| Error::format(path, "the metadata has no `case`"))?;
        let anchors = Side { rows: OwnedEmbeddings::F32(embeddings), labels, tangent };
        let mut case = Self::new(name, settings, anchors, None)?;
        let counts = |name: &str, length| -> Result<Vec<u64>> {
            let count =
                |x| u64::try_from(x).map_err(|_| Error::format(path, format!("tensor `{name}` holds {x}")));
            file.integers(name, length)?.into_iter().map(count).collect()
        };
        let short = |name: &str| -> Result<Vec<u32>> {
            let short = |count| {
                u32::try_from(count).map_err(|_| {
                    Error::format(path, format!("tensor `{name}` holds {count}, more than 32 bits"))
                })
            };
            counts(name, rows)?.into_iter().map(short).collect()
        };
        let count = |name: &str| counts(name, 1).map(|counts| counts[0]);
        let no_nan = |name: &str, holds: bool| match holds {
            false => Ok(()),
            true => Err(Error::format(path, format!("tensor `{name}` holds a NaN"))),
        };
        let floats = |name: &str, length| -> Result<Vec<f64>> {
            let floats = file.floats(name, length)?;
            no_nan(name, floats.iter().any(|value| value.is_nan()))?;
            Ok(floats)
        };
        let float = |name: &str| floats(name, 1).map(|floats| floats[0]);
        no_nan("expected.grad", gradient.iter().any(|value: &f64| value.is_nan()))?;
        let expected = &mut case.expected;
        expected.loss = float("expected.loss")?;
        expected.gradient = gradient;
        expected.gamma_pos = float("expected.gamma_pos")?;
        expected.gamma_neg = float("expected.gamma_neg")?;
        expected.probe_neg = count("expected.probe_neg")?;
        expected.total_pos = count("expected.total_pos")?;
        expected.active = count("expected.active")?;
        expected.min_pos = floats("expected.min_pos", rows)?;
        expected.max_neg = floats("expected.max_neg", rows)?;
        expected.count_pos = short("expected.count_pos")?;
        expected.count_neg = short("expected.count_neg")?;
        expected.dloss_dlambda_pos = float("expected.dloss_dlambda_pos")?;
        expected.dloss_dlambda_neg = float("expected.dloss_dlambda_neg")?;
        expected.threshold_gradient =
            ThresholdGradient { pos: float("expected.hyper_pos")?, neg: float("expected.hyper_neg")? };
        expected.bound_by_sums();
        Ok(case)
    }
}

/// The case files that `paths` name: files as they are, folders by their `.safetensors` in order of name.
///
/// # Errors
/// [`Error::Io`] for a path that cannot be read, [`Error::Format`] for a folder without cases.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !std::fs::metadata(path).map_err(Error::io("read", path))?.is_dir() {
            files.push(path.clone());
            continue;
        }
        let mut found = Vec::new();
        for entry in std::fs::read_dir(path).map_err(Error::io("read", path))? {
            let file = entry.map_err(Error::io("read", path))?.path();
            if file.extension().is_some_and(|extension| extension == "safetensors") {
                found.push(file);
            }
        }
        if found.is_empty() {
            return Err(Error::format(path, "the folder holds no .safetensors file"));
        }
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

/// The metadata that states `settings`: what [`settings_of`] reads.
///
/// # Errors
/// A message for a way of mining that the metadata cannot state.
pub fn metadata_of(settings: &LossSettings) -> Result<BTreeMap<String, String>, String> {
    let adaptive = match settings.mining {
        Mining::AtAsms => "true",
        Mining::Asms => "false",
        other => return Err(format!("the metadata cannot state the mining {other}: asms or at-asms")),
    };
    let mut metadata = BTreeMap::from([("adaptive".to_owned(), adaptive.to_owned())]);
    let mut settings = *settings;
    metadata.extend(parameters(&mut settings).map(|(key, value)| (key.to_owned(), value.to_string())));
    Ok(metadata)
}

/// The numbers of `settings` by their keys in the metadata.
fn parameters(settings: &mut LossSettings) -> [(&'static str, &mut f64); 8] {
    [
        ("gamma", &mut settings.gamma),
        ("neg_ratio", &mut settings.negative_ratio),
        ("probe_neg_ratio", &mut settings.probe_ratio),
        ("tolerance", &mut settings.tolerance),
        ("alpha", &mut settings.alpha),
        ("beta", &mut settings.beta),
        ("lam_pos", &mut settings.lambda_pos),
        ("lam_neg", &mut settings.lambda_neg),
    ]
}

/// The settings that a file states in its metadata (SPEC 7).
///
/// # Errors
/// [`Error::Format`] if one is missing, no number or out of range.
pub fn settings_of(path: &Path, metadata: &BTreeMap<String, String>) -> Result<LossSettings> {
    let bad = |reason| Error::format(path, reason);
    let text = |key: &str| metadata.get(key).ok_or_else(|| bad(format!("the metadata has no `{key}`")));
    let mining = match text("adaptive")?.as_str() {
        "true" => Mining::AtAsms,
        "false" => Mining::Asms,
        other => return Err(bad(format!("metadata `adaptive` is `{other}`, not true or false"))),
    };
    let mut settings = LossSettings { mining, ..LossSettings::default() };
    for (key, value) in parameters(&mut settings) {
        let text = text(key)?;
        *value = text.parse().map_err(|_| bad(format!("metadata `{key}` is `{text}`, not a number")))?;
    }
    settings.validate().map_err(|e| bad(e.to_string()))?;
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_they_are_stated() {
        for mining in Mining::ALL {
            let settings = LossSettings {
                mining,
                gamma: 0.1 + 0.2,
                negative_ratio: 1.5,
                probe_ratio: 1.0 / 3.0,
                tolerance: 0.25,
                alpha: 33.0,
                beta: 3.0,
                lambda_pos: 0.9,
                lambda_neg: -0.4,
            };
            match metadata_of(&settings) {
                Ok(metadata) => {
                    assert_eq!(settings_of(Path::new("file"), &metadata).unwrap(), settings);
                }
                Err(said) => {
                    assert!(matches!(mining, Mining::None | Mining::Symmetric), "{said}");
                    assert!(said.contains(mining.name()), "{said}");
                }
            }
        }
    }
}
