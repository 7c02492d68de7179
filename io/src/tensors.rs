//! Matrices, numbers and texts in .safetensors files, for the programs and for other tools.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};
use half::{bf16, f16};
use ndarray::Array2;
pub use safetensors::Dtype;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::files::write_atomic;

/// Bytes of the number before the header; the header is padded to a multiple of it.
const ALIGNMENT: usize = 8;

/// Embeddings with labels.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddedRows {
    /// `[rows, D]`.
    pub values: Array2<f32>,
    /// One label per row; a row with a negative label is ignored.
    pub labels: Vec<i64>,
}

/// A file's parsed header, and its data.
pub struct TensorFile<'a> {
    path: &'a Path,
    header: Metadata,
    data: &'a [u8],
    /// The header's metadata.
    pub metadata: BTreeMap<String, String>,
}

/// Whether the .safetensors file `path` has the tensor `name`; reads its header alone.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn file_has(path: &Path, name: &str) -> Result<bool> {
    const LONGEST: u64 = 100_000_000;
    let read = || {
        let (mut file, mut length, mut header) = (File::open(path)?, Vec::new(), Vec::new());
        (&mut file).take(ALIGNMENT as u64).read_to_end(&mut length)?;
        let length = length.try_into().map_or(0, u64::from_le_bytes);
        file.take(length.min(LONGEST)).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = read().map_err(Error::io("read", path))?;
    Ok(serde_json::from_slice::<Metadata>(&header).is_ok_and(|header| header.info(name).is_some()))
}

/// A type of floats that matrices are read as.
pub trait Float: Copy {
    /// The nearest to `value`.
    fn of(value: f64) -> Self;
}

impl Float for f32 {
    fn of(value: f64) -> Self {
        value as Self
    }
}

impl Float for f64 {
    fn of(value: f64) -> Self {
        value
    }
}

impl<'a> TensorFile<'a> {
    /// Reads the header of `bytes`, the content of `path`.
    ///
    /// # Errors
    /// [`Error::Format`] if it is no safetensors file.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let other = |e| Error::format(path, format!("not a safetensors file ({e})"));
        let (length, header) = SafeTensors::read_metadata(bytes).map_err(other)?;
        let metadata = header.metadata().iter().flatten();
        let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Self { path, header, data: &bytes[ALIGNMENT + length..], metadata })
    }

    /// Name, type, shape and bytes of every tensor.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Dtype, Vec<usize>, &'a [u8])> {
        let all = self.header.tensors().into_iter();
        all.map(|(name, info)| (name, info.dtype, info.shape.clone(), self.bytes(info)))
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// A matrix `[rows, D]` of floats of any width.
    ///
    /// # Errors
    /// [`Error::Format`] if there is no such tensor, or it is something else.
    pub fn matrix<T: Float>(&self, name: &str) -> Result<Array2<T>> {
        let [count, dim] = *self.tensor(name)?.shape else {
            let dimensions = self.tensor(name)?.shape.len();
            return Err(self.bad(format!("tensor `{name}` has {dimensions} dimensions, not 2")));
        };
        let values = self.values(name)?;
        Array2::from_shape_vec((count, dim), values).map_err(|e| self.bad(format!("tensor `{name}`: {e}")))
    }

    /// `count` floats of any width.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn floats(&self, name: &str, count: usize) -> Result<Vec<f64>> {
        let values = self.values(name)?;
        if values.len() != count {
            return Err(self.bad(format!("tensor `{name}` has {} values, not {count}", values.len())));
        }
        Ok(values)
    }

    /// `count` integers.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn integers(&self, name: &str, count: usize) -> Result<Vec<i64>> {
        let tensor = self.tensor(name)?;
        // A scalar has no dimension at all.
        if *tensor.shape != [count] && !(tensor.shape.is_empty() && count == 1) {
            return Err(self.bad(format!("tensor `{name}` must have one entry for each of the {count} rows")));
        }
        integers_of(tensor.dtype, self.bytes(tensor))
            .map_err(|reason| self.bad(format!("tensor `{name}` {reason}")))
    }

    /// A matrix and the labels of its rows.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn rows(&self, values: &str, labels: &str) -> Result<EmbeddedRows> {
        let values = self.matrix(values)?;
        let labels = self.integers(labels, values.nrows())?;
        Ok(EmbeddedRows { values, labels })
    }

    fn values<T: Float>(&self, name: &str) -> Result<Vec<T>> {
        let tensor = self.tensor(name)?;
        floats_of(tensor.dtype, self.bytes(tensor))
            .ok_or_else(|| self.bad(format!("tensor `{name}` holds {:?}, not floats", tensor.dtype)))
    }

    fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.header.info(name).ok_or_else(|| self.bad(format!("there is no tensor `{name}`")))
    }

    fn bytes(&self, tensor: &TensorInfo) -> &'a [u8] {
        // Within the data: the header was checked against them.
        &self.data[tensor.data_offsets.0..tensor.data_offsets.1]
    }

    fn bad(&self, reason: String) -> Error {
        Error::format(self.path, reason)
    }
}

/// Little-endian values of a type of floats; `None` for another type.
#[must_use]
pub fn floats_of<T: Float>(dtype: Dtype, bytes: &[u8]) -> Option<Vec<T>> {
    Some(match dtype {
        Dtype::F32 => words(bytes).map(|word| T::of(f32::from_le_bytes(word).into())).collect(),
        Dtype::F64 => words(bytes).map(|word| T::of(f64::from_le_bytes(word))).collect(),
        Dtype::F16 => words(bytes).map(|word| T::of(f16::from_le_bytes(word).into())).collect(),
        Dtype::BF16 => words(bytes).map(|word| T::of(bf16::from_le_bytes(word).into())).collect(),
        _ => return None,
    })
}

/// Little-endian values of a type of integers.
///
/// # Errors
/// A message for another type, or for a value that exceeds i64.
pub fn integers_of(dtype: Dtype, bytes: &[u8]) -> Result<Vec<i64>, String> {
    let fits =
        |value: u64| i64::try_from(value).map_err(|_| format!("holds {value}: at most {} is read", i64::MAX));
    Ok(match dtype {
        Dtype::I8 => words(bytes).map(|word| i8::from_le_bytes(word).into()).collect(),
        Dtype::U8 => words(bytes).map(|word| u8::from_le_bytes(word).into()).collect(),
        Dtype::I16 => words(bytes).map(|word| i16::from_le_bytes(word).into()).collect(),
        Dtype::U16 => words(bytes).map(|word| u16::from_le_bytes(word).into()).collect(),
        Dtype::I32 => words(bytes).map(|word| i32::from_le_bytes(word).into()).collect(),
        Dtype::U32 => words(bytes).map(|word| u32::from_le_bytes(word).into()).collect(),
        Dtype::I64 => words(bytes).map(i64::from_le_bytes).collect(),
        Dtype::U64 => words(bytes).map(|word| fits(u64::from_le_bytes(word))).collect::<Result<_, _>>()?,
        _ => return Err(format!("holds {dtype:?}: give integers")),
    })
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    data.as_chunks().0.iter().copied()
}

/// A tensor to write: name, type, shape, and little-endian values in row-major order.
pub type Tensor<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// A safetensors file; the same contents give the same bytes.
///
/// # Errors
/// A message if a tensor's shape does not fit its bytes.
pub fn to_bytes(facts: &BTreeMap<String, String>, mut tensors: Vec<Tensor<'_>>) -> Result<Vec<u8>, String> {
    let say = |error: &dyn std::fmt::Display| error.to_string();
    // The order of the safetensors crate: the widest type first.
    tensors.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let mut end = 0;
    let infos = tensors.iter().map(|&(name, dtype, shape, bytes)| {
        let begin = end;
        end += bytes.len();
        (name.to_owned(), TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (begin, end) })
    });
    let header = Metadata::new(None, infos.collect()).map_err(|error| say(&error))?;
    let header = serde_json::to_string(&header).map_err(|error| say(&error))?;
    // The crate would write the facts in the random order of a hash map: they are put in here instead.
    let facts = serde_json::to_string(facts).map_err(|error| say(&error))?;
    let comma = if tensors.is_empty() { "" } else { "," };
    let mut header = format!("{{\"__metadata__\":{facts}{comma}{}", &header[1..]).into_bytes();
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    let mut bytes = Vec::with_capacity(ALIGNMENT + header.len() + end);
    bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&header);
    tensors.iter().for_each(|(.., data)| bytes.extend_from_slice(data));
    Ok(bytes)
}

/// A matrix with its name, and its rows' labels, if any, with theirs.
pub type NamedRows<'a> = (&'a str, &'a Array2<f32>, Option<(&'a str, &'a [i64])>);

/// Writes rows, whole or not at all.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written.
pub fn write_rows(path: &Path, sides: &[NamedRows<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut data = Vec::new();
    for (name, matrix, labels) in sides {
        let floats: Vec<u8> = matrix.iter().flat_map(|x| x.to_le_bytes()).collect();
        data.push((*name, Dtype::F32, matrix.shape().to_vec(), floats));
        if let Some((name, labels)) = labels {
            let integers: Vec<u8> = labels.iter().flat_map(|x| x.to_le_bytes()).collect();
            data.push((*name, Dtype::I64, vec![labels.len()], integers));
        }
    }
    let tensors = data.iter().map(|(name, dtype, shape, bytes)| (*name, *dtype, &shape[..], &bytes[..]));
    let bytes = to_bytes(metadata, tensors.collect())
        .map_err(|e| Error::format(path, format!("cannot be written as safetensors ({e})")))?;
    write_atomic(path, &bytes)
}
