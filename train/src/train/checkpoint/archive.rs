//! Named tensors and metadata as a safetensors file. The same contents give the same bytes.

use std::collections::BTreeMap;
use std::path::Path;

use burn::store::burn_pack::Tensor;
use burn::tensor::{Bytes, DType};
use ddtas_io::files::write_atomic;
use ddtas_io::tensors::{self, Dtype, TensorFile};

use crate::{Error, Result};

/// Contents of a safetensors file, in memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub(in crate::train) struct Archive {
    /// The metadata.
    pub facts: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

/// A tensor: little-endian, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::train) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Entry {
    /// Name and contents of a tensor of Burn; an error message if it cannot be read or is not f32.
    pub fn of(tensor: Tensor) -> std::result::Result<(String, Self), String> {
        let (name, dtype, shape, _, bytes) = tensor.into_parts().map_err(|error| error.to_string())?;
        if dtype != DType::F32 {
            return Err(format!("{name} is not of type f32"));
        }
        let shape = shape.iter().copied().collect();
        Ok((name, Self { dtype: Dtype::F32, shape, bytes: bytes.to_vec() }))
    }

    /// The transpose of a matrix of f32.
    pub fn transposed(&self) -> Self {
        let columns = self.shape.last().copied().unwrap_or_default();
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(&self.bytes);
        let column = |at: usize| values.iter().skip(at).step_by(columns);
        let turned: Vec<f32> = (0..columns).flat_map(column).copied().collect();
        let shape = self.shape.iter().rev().copied().collect();
        Self { dtype: self.dtype, shape, bytes: bytemuck::cast_slice(&turned).to_vec() }
    }

    /// Converts the entry to a tensor of Burn, of f32.
    pub fn named(self, name: String, parameter: Option<u64>) -> Tensor {
        Tensor::new(name, DType::F32, self.shape, parameter, Bytes::from_bytes_vec(self.bytes))
    }
}

/// A type of numbers that an archive can contain.
pub(in crate::train) trait Number: bytemuck::Pod {
    const DTYPE: Dtype;
}

impl Number for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Number for f64 {
    const DTYPE: Dtype = Dtype::F64;
}

impl Number for i64 {
    const DTYPE: Dtype = Dtype::I64;
}

impl Number for u64 {
    const DTYPE: Dtype = Dtype::U64;
}

impl Archive {
    /// Parses the bytes of the safetensors file `path`.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let file = TensorFile::parse(path, bytes)?;
        let entry = |(name, dtype, shape, bytes): (String, Dtype, Vec<usize>, &[u8])| {
            (name, Entry { dtype, shape, bytes: bytes.to_vec() })
        };
        let tensors = file.tensors().map(entry).collect();
        Ok(Self { facts: file.metadata, tensors })
    }

    /// The bytes of a safetensors file.
    pub fn to_bytes(&self) -> std::result::Result<Vec<u8>, String> {
        let tensors =
            self.tensors.iter().map(|(name, e)| (name.as_str(), e.dtype, &e.shape[..], &e.bytes[..]));
        tensors::to_bytes(&self.facts, tensors.collect())
    }

    /// Writes the file atomically.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(write_atomic(path, &self.to_bytes().map_err(|reason| Error::format(path, reason))?)?)
    }

    /// Names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor `name`.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// Adds a tensor.
    pub fn put(&mut self, name: impl Into<String>, entry: Entry) {
        self.tensors.insert(name.into(), entry);
    }

    /// Adds a tensor of numbers; `shape` must fit their count.
    pub fn put_numbers<T: Number>(&mut self, name: impl Into<String>, shape: &[usize], values: &[T]) {
        let bytes = bytemuck::cast_slice(values).to_vec();
        self.put(name, Entry { dtype: T::DTYPE, shape: shape.to_vec(), bytes });
    }

    /// Removes a tensor of numbers and returns its shape and values; `None` if it is missing or of another type.
    pub fn take_numbers<T: Number>(&mut self, name: &str) -> Option<(Vec<usize>, Vec<T>)> {
        let entry = self.tensors.remove(name).filter(|entry| entry.dtype == T::DTYPE)?;
        Some((entry.shape, bytemuck::pod_collect_to_vec(&entry.bytes)))
    }

    /// Removes and returns every tensor whose name begins with `prefix`, with the names after the prefix.
    pub fn take_all(&mut self, prefix: &str) -> Vec<(String, Entry)> {
        let named: Vec<String> =
            self.tensors.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        let take = |name: String| self.tensors.remove(&name).map(|e| (name[prefix.len()..].to_owned(), e));
        named.into_iter().filter_map(take).collect()
    }

    /// Name of the first tensor with an entry that is NaN or infinite.
    pub fn first_not_finite(&self) -> Option<&str> {
        let finite = |entry: &Entry| match entry.dtype {
            Dtype::F32 => {
                bytemuck::pod_collect_to_vec::<u8, f32>(&entry.bytes).iter().all(|value| value.is_finite())
            }
            _ => true,
        };
        self.tensors.iter().find(|(_, entry)| !finite(entry)).map(|(name, _)| name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Archive {
        let mut archive = Archive::default();
        for key in ["one", "two", "three", "four", "five"] {
            archive.facts.insert(key.into(), "a \"fact\"\n".into());
        }
        archive.put_numbers("weights", &[2, 3], &[1.0f32, -2.0, 3.0, 0.1, f32::MIN_POSITIVE, -0.0]);
        archive.put_numbers("count", &[1], &[u64::MAX]);
        archive.put_numbers("inner.empty", &[0, 3], &[0.0f64; 0]);
        archive
    }

    #[test]
    fn what_is_written_is_read_and_its_bytes_are_always_the_same() {
        let bytes = archive().to_bytes().unwrap();
        assert_eq!(Archive::from_bytes(Path::new("a"), &bytes).unwrap(), archive());
        for _ in 0..8 {
            assert!(archive().to_bytes().unwrap() == bytes);
        }
        let empty = Archive { facts: archive().facts, ..Archive::default() };
        assert_eq!(Archive::from_bytes(Path::new("a"), &empty.to_bytes().unwrap()).unwrap(), empty);
    }

    #[test]
    fn tensors_are_taken_by_name_type_and_prefix() {
        let mut archive = archive();
        assert_eq!(archive.take_numbers::<u64>("count"), Some((vec![1], vec![u64::MAX])));
        assert_eq!(archive.take_numbers::<u64>("count"), None);
        let inner = archive.take_all("inner.");
        assert_eq!(inner[0].0, "empty");
        assert_eq!(archive.first_not_finite(), None);
        archive.put_numbers("bad", &[2], &[1.0, f32::NAN]);
        assert_eq!(archive.first_not_finite(), Some("bad"));
    }

    #[test]
    fn a_file_cut_short_is_told() {
        let bytes = archive().to_bytes().unwrap();
        for length in 0..bytes.len() {
            assert!(
                Archive::from_bytes(Path::new("a"), &bytes[..length]).is_err(),
                "{length} of {} bytes",
                bytes.len()
            );
        }
    }
}
