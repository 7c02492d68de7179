//! Named tensors and facts as a safetensors file whose bytes depend on nothing but its contents.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};

use crate::{Error, Result};

/// Length of the number before the header, and what the header is padded to.
const ALIGNMENT: usize = 8;

/// What a safetensors file holds, in memory.
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

/// A number that an archive can hold.
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
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        Self::from_bytes(&bytes).map_err(|reason| Error::format(path, reason))
    }

    /// Parses the bytes of a safetensors file.
    pub fn from_bytes(bytes: &[u8]) -> std::result::Result<Self, String> {
        let not = |error| format!("not a safetensors file: {error}");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(not)?;
        let facts = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors = SafeTensors::deserialize(bytes).map_err(not)?;
        let entry = |view: TensorView<'_>| Entry {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        let tensors = tensors.tensors().into_iter().map(|(name, view)| (name, entry(view))).collect();
        Ok(Self { facts, tensors })
    }

    /// The bytes of a safetensors file.
    pub fn to_bytes(&self) -> std::result::Result<Vec<u8>, String> {
        let views = self
            .tensors
            .iter()
            .map(|(name, entry)| {
                TensorView::new(entry.dtype, entry.shape.clone(), &entry.bytes)
                    .map(|view| (name, view))
                    .map_err(|error| format!("tensor {name}: {error}"))
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        // The crate would write the facts in the random order of a hash map: they are put in here instead.
        let plain = serialize(views, None).map_err(|error| error.to_string())?;
        let (length, _) = SafeTensors::read_metadata(&plain).map_err(|error| error.to_string())?;
        let (header, data) = plain[ALIGNMENT..].split_at(length);
        let facts = serde_json::to_string(&self.facts).map_err(|error| error.to_string())?;
        let mut joined = format!("{{\"__metadata__\":{facts}").into_bytes();
        if !self.tensors.is_empty() {
            joined.push(b',');
        }
        joined.extend_from_slice(header[1..].trim_ascii_end());
        joined.resize(joined.len().next_multiple_of(ALIGNMENT), b' ');
        let mut bytes = Vec::with_capacity(ALIGNMENT + joined.len() + data.len());
        bytes.extend_from_slice(&(joined.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&joined);
        bytes.extend_from_slice(data);
        Ok(bytes)
    }

    /// Adds a tensor.
    pub fn put(&mut self, name: impl Into<String>, entry: Entry) {
        self.tensors.insert(name.into(), entry);
    }

    /// Adds a tensor of numbers, whose shape must fit them.
    pub fn put_numbers<T: Number>(&mut self, name: impl Into<String>, shape: &[usize], values: &[T]) {
        let bytes = bytemuck::cast_slice(values).to_vec();
        self.put(name, Entry { dtype: T::DTYPE, shape: shape.to_vec(), bytes });
    }

    /// Takes a tensor of numbers out: its shape and values. `None` if it is missing or of another type.
    pub fn take_numbers<T: Number>(&mut self, name: &str) -> Option<(Vec<usize>, Vec<T>)> {
        let entry = self.tensors.remove(name).filter(|entry| entry.dtype == T::DTYPE)?;
        Some((entry.shape, bytemuck::pod_collect_to_vec(&entry.bytes)))
    }

    /// Takes out every tensor whose name begins with `prefix`, which is cut off.
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
        assert_eq!(Archive::from_bytes(&bytes).unwrap(), archive());
        for _ in 0..8 {
            assert!(archive().to_bytes().unwrap() == bytes);
        }
        let empty = Archive { facts: archive().facts, ..Archive::default() };
        assert_eq!(Archive::from_bytes(&empty.to_bytes().unwrap()).unwrap(), empty);
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
            assert!(Archive::from_bytes(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
    }
}
