//! Reference cases: inputs and float64 results in `.safetensors` files (SPEC 7).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::verify::Expected;
use ddtas::loss::{Batch, LossSettings, Mining, reference_hypergradient_terms};
use ddtas::{Error, Result};

/// One reference case.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its situation, e.g. `duplicate_image`.
    pub name: String,
    /// Settings of mining and loss.
    pub settings: LossSettings,
    /// `[B, D]`, unit rows.
    pub embeddings: Array2<f32>,
    /// One a row; negative: ignored.
    pub labels: Vec<i64>,
    /// edot of SPEC 5, `[B, D]`.
    pub tangent: Array2<f32>,
    /// What a backend must answer.
    pub expected: Expected,
}

impl Case {
    /// Reads one case.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it is not a reference case.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let not_safetensors = |e| Error::format(path, format!("not a safetensors file ({e})"));
        let tensors = SafeTensors::deserialize(&bytes).map_err(not_safetensors)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(not_safetensors)?;
        let file = File { path, tensors, metadata: header.metadata().clone().unwrap_or_default() };
        file.case()
    }
}

/// The case files that `paths` name: files as they are, folders by their `.safetensors` in order of name.
///
/// # Errors
/// [`Error::Io`] for a path that cannot be read, [`Error::Dataset`] for a folder without cases.
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
            return Err(Error::Dataset(format!("{}: the folder holds no .safetensors file", path.display())));
        }
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

struct File<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl File<'_> {
    fn case(&self) -> Result<Case> {
        let embeddings = self.matrix("embeddings")?.mapv(|x| x as f32);
        let (rows, _) = embeddings.dim();
        let labels = self.integers("labels", rows)?;
        let settings = self.settings()?;
        let tangent = self.matrix("tangent")?.mapv(|x| x as f32);
        let gradient = self.matrix("expected.grad")?;
        for (name, matrix) in [("tangent", tangent.dim()), ("expected.grad", gradient.dim())] {
            if matrix != embeddings.dim() {
                return Err(self.bad(format!("`{name}` and `embeddings` differ in shape")));
            }
        }
        let batch = Batch::square(embeddings.view(), &labels);
        let hyper_terms = reference_hypergradient_terms(&batch, &settings, &tangent.mapv(f64::from), None)?;
        let expected = Expected {
            loss: self.float("expected.loss")?,
            gradient,
            reference_gradient: None,
            gamma_pos: self.float("expected.gamma_pos")?,
            gamma_neg: self.float("expected.gamma_neg")?,
            probe_neg: self.count("expected.probe_neg")?,
            total_pos: self.count("expected.total_pos")?,
            min_pos: self.floats("expected.min_pos", rows)?,
            max_neg: self.floats("expected.max_neg", rows)?,
            count_pos: self.counts("expected.count_pos", rows)?,
            count_neg: self.counts("expected.count_neg", rows)?,
            active: self.count("expected.active")?,
            dloss_dlambda_pos: self.float("expected.dloss_dlambda_pos")?,
            dloss_dlambda_neg: self.float("expected.dloss_dlambda_neg")?,
            hyper_pos: self.float("expected.hyper_pos")?,
            hyper_neg: self.float("expected.hyper_neg")?,
            hyper_terms,
        };
        Ok(Case { name: self.text("case")?.to_owned(), settings, labels, embeddings, tangent, expected })
    }

    fn settings(&self) -> Result<LossSettings> {
        settings_of(self.path, &self.metadata)
    }

    fn bad(&self, reason: String) -> Error {
        Error::format(self.path, reason)
    }

    fn text(&self, key: &str) -> Result<&str> {
        let value = self.metadata.get(key);
        value.map(String::as_str).ok_or_else(|| self.bad(format!("the metadata has no `{key}`")))
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.tensors.tensor(name).map_err(|_| self.bad(format!("there is no tensor `{name}`")))
    }

    /// A tensor of floats, or of integers where every value is exact in float64.
    fn values(&self, name: &str) -> Result<(Vec<usize>, Vec<f64>)> {
        let tensor = self.tensor(name)?;
        let data = tensor.data();
        let values = match tensor.dtype() {
            Dtype::F32 => words(data).map(|w| f64::from(f32::from_le_bytes(w))).collect(),
            Dtype::F64 => words(data).map(f64::from_le_bytes).collect(),
            Dtype::I64 => words(data).map(|w| i64::from_le_bytes(w) as f64).collect(),
            other => return Err(self.bad(format!("tensor `{name}` holds {other:?}, not F32, F64 or I64"))),
        };
        Ok((tensor.shape().to_vec(), values))
    }

    fn matrix(&self, name: &str) -> Result<Array2<f64>> {
        let (shape, values) = self.values(name)?;
        let [rows, columns] = shape[..] else {
            return Err(self.bad(format!("tensor `{name}` has {} dimensions, not 2", shape.len())));
        };
        Array2::from_shape_vec((rows, columns), values).map_err(|e| self.bad(format!("tensor `{name}`: {e}")))
    }

    fn floats(&self, name: &str, length: usize) -> Result<Vec<f64>> {
        let (_, values) = self.values(name)?;
        if values.len() != length {
            return Err(self.bad(format!("tensor `{name}` has {} values, not {length}", values.len())));
        }
        Ok(values)
    }

    fn float(&self, name: &str) -> Result<f64> {
        Ok(self.floats(name, 1)?[0])
    }

    fn integers(&self, name: &str, length: usize) -> Result<Vec<i64>> {
        if self.tensor(name)?.dtype() != Dtype::I64 {
            return Err(self.bad(format!("tensor `{name}` must hold I64")));
        }
        Ok(self.floats(name, length)?.into_iter().map(|x| x as i64).collect())
    }

    fn counts(&self, name: &str, length: usize) -> Result<Vec<u32>> {
        let integers = self.integers(name, length)?;
        let count = |x: i64| u32::try_from(x).map_err(|_| self.bad(format!("tensor `{name}` holds {x}")));
        integers.into_iter().map(count).collect()
    }

    fn count(&self, name: &str) -> Result<u64> {
        let value = self.integers(name, 1)?[0];
        u64::try_from(value).map_err(|_| self.bad(format!("tensor `{name}` holds {value}")))
    }
}

/// The settings that a file states in its metadata (SPEC 7).
///
/// # Errors
/// [`Error::Format`] if one is missing, no number or out of range.
pub fn settings_of(path: &Path, metadata: &HashMap<String, String>) -> Result<LossSettings> {
    let bad = |reason| Error::format(path, reason);
    let text = |key: &str| metadata.get(key).ok_or_else(|| bad(format!("the metadata has no `{key}`")));
    let parameter = |key: &str| {
        let text = text(key)?;
        text.parse().map_err(|_| bad(format!("metadata `{key}` is `{text}`, not a number")))
    };
    let mining = match text("adaptive")?.as_str() {
        "true" => Mining::AtAsms,
        "false" => Mining::Asms,
        other => return Err(bad(format!("metadata `adaptive` is `{other}`, not true or false"))),
    };
    let settings = LossSettings {
        mining,
        gamma: parameter("gamma")?,
        negative_ratio: parameter("neg_ratio")?,
        probe_ratio: parameter("probe_neg_ratio")?,
        tolerance: parameter("tolerance")?,
        alpha: parameter("alpha")?,
        beta: parameter("beta")?,
        lambda_pos: parameter("lam_pos")?,
        lambda_neg: parameter("lam_neg")?,
    };
    settings.validate().map_err(|e| bad(e.to_string()))?;
    Ok(settings)
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    data.as_chunks().0.iter().copied()
}
