//! Labelled rows in .safetensors files: what the programs hand each other, and other tools read.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::files::write_atomic;
use ddtas::{Error, Result};

/// Embeddings with labels.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddedRows {
    /// `[rows, D]`.
    pub values: Array2<f32>,
    /// One a row; negative: ignored.
    pub labels: Vec<i64>,
}

/// The tensors of a file, and the metadata of its header.
pub struct TensorFile<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    /// What the header says beside the tensors.
    pub metadata: HashMap<String, String>,
}

impl<'a> TensorFile<'a> {
    /// Reads the header of `bytes`, the content of `path`.
    ///
    /// # Errors
    /// [`Error::Format`] if it is no safetensors file.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let other = |e| Error::format(path, format!("not a safetensors file ({e})"));
        let tensors = SafeTensors::deserialize(bytes).map_err(other)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(other)?;
        Ok(Self { path, tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    /// A matrix `[rows, D]` of floats of any width, as float32.
    pub fn matrix(&self, name: &str) -> Result<Array2<f32>> {
        let tensor = self.tensor(name)?;
        let [count, dim] = *tensor.shape() else {
            return Err(self.bad(format!("tensor `{name}` has {} dimensions, not 2", tensor.shape().len())));
        };
        let data = tensor.data();
        let values = match tensor.dtype() {
            Dtype::F32 => words(data).map(f32::from_le_bytes).collect(),
            Dtype::F64 => words(data).map(|word| f64::from_le_bytes(word) as f32).collect(),
            Dtype::F16 => words(data).map(|word| f16::from_le_bytes(word).to_f32()).collect(),
            Dtype::BF16 => words(data).map(|word| bf16::from_le_bytes(word).to_f32()).collect(),
            other => return Err(self.bad(format!("tensor `{name}` holds {other:?}, not floats"))),
        };
        Array2::from_shape_vec((count, dim), values).map_err(|e| self.bad(format!("tensor `{name}`: {e}")))
    }

    /// `count` integers.
    pub fn integers(&self, name: &str, count: usize) -> Result<Vec<i64>> {
        let tensor = self.tensor(name)?;
        if *tensor.shape() != [count] {
            return Err(self.bad(format!("tensor `{name}` must have one entry for each of the {count} rows")));
        }
        match tensor.dtype() {
            Dtype::I64 => Ok(words(tensor.data()).map(i64::from_le_bytes).collect()),
            Dtype::I32 => Ok(words(tensor.data()).map(|word| i32::from_le_bytes(word).into()).collect()),
            other => Err(self.bad(format!("tensor `{name}` holds {other:?}, not I64 or I32"))),
        }
    }

    /// A matrix and the labels of its rows.
    pub fn rows(&self, values: &str, labels: &str) -> Result<EmbeddedRows> {
        let values = self.matrix(values)?;
        let labels = self.integers(labels, values.nrows())?;
        Ok(EmbeddedRows { values, labels })
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.tensors.tensor(name).map_err(|_| self.bad(format!("there is no tensor `{name}`")))
    }

    fn bad(&self, reason: String) -> Error {
        Error::format(self.path, reason)
    }
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    data.as_chunks().0.iter().copied()
}

/// A matrix by name, and the labels of its rows, if it has any, by another.
pub type NamedRows<'a> = (&'a str, &'a Array2<f32>, Option<(&'a str, &'a [i64])>);

/// Writes rows, whole or not at all.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written.
pub fn write_rows(path: &Path, sides: &[NamedRows<'_>], metadata: HashMap<String, String>) -> Result<()> {
    let mut data = Vec::new();
    for (name, matrix, labels) in sides {
        let floats: Vec<u8> = matrix.iter().flat_map(|x| x.to_le_bytes()).collect();
        data.push((*name, Dtype::F32, matrix.shape().to_vec(), floats));
        if let Some((name, labels)) = labels {
            let integers: Vec<u8> = labels.iter().flat_map(|x| x.to_le_bytes()).collect();
            data.push((*name, Dtype::I64, vec![labels.len()], integers));
        }
    }
    let cannot = |e| Error::format(path, format!("cannot be written as safetensors ({e})"));
    let mut views = Vec::new();
    for (name, dtype, shape, bytes) in &data {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(cannot)?));
    }
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(cannot)?;
    write_atomic(path, &bytes)
}
