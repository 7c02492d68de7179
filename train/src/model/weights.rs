//! Loads published weights, in PyTorch's format or safetensors, into a backbone.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use burn::store::ModuleSnapshot;
use burn::store::burn_pack::Tensor as Packed;
use burn::tensor::{Bytes, DType, Device};
use clap::ValueEnum;
use ddtas_io::console::one_line;
use ddtas_io::files::check_regular;
use ddtas_io::tensors::{Dtype, TensorFile, floats_of};
use pytorch_reader::{DType as TorchType, PytorchReader};

use super::{Backbone, BackboneKind, NetworkShape};
use crate::arguments::name_of;
use crate::{Error, Result};

/// Prefixes of all tensor names in files of other programs.
const WRAPPERS: [&str; 6] = ["state_dict.", "model.", "module.", "backbone.", "encoder.", "teacher."];

/// Name prefixes of the classifier that a network was trained with; its tensors are ignored.
const CLASSIFIERS: [&str; 5] = ["fc.", "_fc.", "classifier.", "last_linear.", "head."];

/// A tensor of a file; those of PyTorch are read on demand.
enum Stored {
    Torch(pytorch_reader::Tensor),
    Safetensors { dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8> },
}

impl Stored {
    fn shape(&self) -> &[usize] {
        match self {
            Self::Torch(tensor) => tensor.shape(),
            Self::Safetensors { shape, .. } => shape,
        }
    }

    /// The type of the values, if it is a floating-point type.
    fn dtype(&self) -> Option<Dtype> {
        match self {
            Self::Safetensors { dtype, .. } => Some(*dtype),
            Self::Torch(tensor) => match tensor.dtype() {
                TorchType::F64 => Some(Dtype::F64),
                TorchType::F32 => Some(Dtype::F32),
                TorchType::F16 => Some(Dtype::F16),
                TorchType::BF16 => Some(Dtype::BF16),
                _ => None,
            },
        }
    }

    /// The values, row by row, or the reason why they cannot be read.
    fn values(self) -> std::result::Result<Vec<f32>, String> {
        let not_floats = "is not of a floating-point type";
        let dtype = self.dtype().ok_or(not_floats)?;
        let bytes = match self {
            Self::Torch(tensor) => tensor.read().map_err(one_line)?,
            Self::Safetensors { bytes, .. } => bytes,
        };
        let values: Vec<f32> = floats_of(dtype, &bytes).ok_or(not_floats)?;
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(format!("holds {value}")),
            None => Ok(values),
        }
    }
}

impl Backbone {
    /// Loads the weights of the file `path`: .safetensors, .pth or .pt.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) or [`Format`](ddtas_io::Error::Format) if the file cannot be read;
    /// [`Format`](ddtas_io::Error::Format) names a tensor that is missing, not part of the network, or of another shape,
    /// and says which network the weights fit.
    pub fn with_weights(mut self, path: &Path) -> Result<Self> {
        let bad = |reason: String| Error::format(path, reason);
        let mut stored = read(path)?;
        let layout = self.layout();
        if let Some(reason) = mismatch(&layout, &stored) {
            return Err(bad(refusal(&layout, &stored, &reason)));
        }
        let mut tensors = Vec::new();
        for wanted in self.collect(None, None, true) {
            let name = self.file_name(&wanted.name);
            let found = stored.remove(&name).ok_or_else(|| bad(format!("no tensor `{name}`")))?;
            let shape: Vec<usize> = wanted.shape.iter().copied().collect();
            let values = guarded(|| found.values()).map_err(|why| bad(format!("tensor `{name}`: {why}")))?;
            let bytes = Bytes::from_bytes_vec(bytemuck::cast_slice(&values).to_vec());
            tensors.push(Packed::new(wanted.name, DType::F32, shape, None, bytes));
        }
        let applied = self.apply(tensors, None, None, true);
        match applied.errors.first() {
            Some(error) => Err(bad(format!("does not fit the network: {error}"))),
            None => Ok(self),
        }
    }
}

/// Shapes of a network's tensors, by their names in files.
type Layout = BTreeMap<String, Vec<usize>>;

impl Backbone {
    fn layout(&self) -> Layout {
        let named = |tensor: Packed| (self.file_name(&tensor.name), tensor.shape.iter().copied().collect());
        self.collect(None, None, true).into_iter().map(named).collect()
    }
}

/// The first difference between a network and the tensors of a file.
fn mismatch(layout: &Layout, stored: &BTreeMap<String, Stored>) -> Option<String> {
    let differs = |(name, shape): (&String, &Vec<usize>)| match stored.get(name) {
        None => Some(format!("no tensor `{name}`")),
        Some(found) if found.shape() != shape => {
            Some(format!("tensor `{name}` has shape {:?}, not {shape:?}", found.shape()))
        }
        Some(_) => None,
    };
    let surplus = || stored.keys().find(|name| !layout.contains_key(*name) && !is_left_out(name));
    let unknown = || surplus().map(|name| format!("tensor `{name}` is not part of it"));
    layout.iter().find_map(differs).or_else(unknown)
}

/// An error message: the tensors of the file do not fit, and which network they fit.
fn refusal(layout: &Layout, stored: &BTreeMap<String, Stored>, reason: &str) -> String {
    let published = BackboneKind::value_variants().iter().filter(|kind| kind.image_size().is_some());
    let layouts: Vec<(String, Layout)> = published
        .map(|kind| {
            let network = Backbone::new(&NetworkShape::published(*kind), &Device::flex());
            (name_of(kind), network.layout())
        })
        .collect();
    // Two backbones can be one network, with pictures scaled in different ways.
    let names = |fits: &dyn Fn(&Layout) -> bool| {
        let fitting = layouts.iter().filter(|(_, other)| fits(other)).map(|(name, _)| name.clone());
        fitting.reduce(|names, name| names + " or " + &name)
    };
    let own = names(&|other| other == layout).unwrap_or_else(|| "this network".to_owned());
    match names(&|other| mismatch(other, stored).is_none()) {
        Some(others) => format!("not weights of {own} ({reason}); they fit --backbone {others}"),
        None => format!("not weights of {own}: {reason}"),
    }
}

fn is_left_out(name: &str) -> bool {
    name.ends_with(".num_batches_tracked") || CLASSIFIERS.iter().any(|prefix| name.starts_with(prefix))
}

/// All tensors of a file, by their names without common prefix.
fn read(path: &Path) -> Result<BTreeMap<String, Stored>> {
    check_regular(path)?;
    let mut start = [0; 9];
    let mut file = std::fs::File::open(path).map_err(Error::io("read", path))?;
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    let is_torch = match file.read_exact(&mut start) {
        Ok(()) => is_torch(start, length),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            return Err(Error::format(path, "is too short to hold weights"));
        }
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let mut tensors = if is_torch { read_torch(path)? } else { read_safetensors(path)? };
    for wrapper in WRAPPERS {
        if !tensors.is_empty() && tensors.keys().all(|name| name.starts_with(wrapper)) {
            tensors = tensors.into_iter().map(|(name, t)| (name[wrapper.len()..].to_owned(), t)).collect();
        }
    }
    Ok(tensors)
}

/// Whether a file is PyTorch's, by its first bytes: a pickle begins with its version, a zip archive with its signature. The
/// header length at the start of a safetensors file may have the same bytes, so the byte after it is checked, too.
fn is_torch(start: [u8; 9], length: u64) -> bool {
    let [header @ .., brace] = start;
    let is_safetensors = brace == b'{' && u64::from_le_bytes(header) < length;
    !is_safetensors && (start[0] == 0x80 || start.starts_with(b"PK") || start.starts_with(b"\x8a\x0a"))
}

fn read_safetensors(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let file = TensorFile::parse(path, &bytes)?;
    let stored = |(name, dtype, shape, bytes): (String, Dtype, Vec<usize>, &[u8])| {
        (name, Stored::Safetensors { dtype, shape, bytes: bytes.to_vec() })
    };
    Ok(file.tensors().map(stored).collect())
}

/// Most times its own size that an archive's parts may have: torch.save does not compress.
const MOST_EXPANSION: u128 = 4;

/// Position and bytes of a TAR archive's signature.
const TAR_MARK: (u64, &[u8]) = (257, b"ustar");

/// Refuses archives that could fill the memory: compressed ones, and TAR archives, whose files may be sparse.
fn check_archive(path: &Path) -> Result<()> {
    let mut file = std::fs::File::open(path).map_err(Error::io("read", path))?;
    let (at, mark) = TAR_MARK;
    let mut found = [0; TAR_MARK.1.len()];
    let read = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut found));
    if read.is_ok() && found == mark {
        return Err(Error::format(
            path,
            "is a TAR archive, as PyTorch 0.1.9 and earlier wrote: save the weights anew",
        ));
    }
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    // The reader reports files that are not archives.
    let Ok(mut archive) = zip::ZipArchive::new(std::io::BufReader::new(file)) else { return Ok(()) };
    let parts = archive.len();
    let size = |part| archive.by_index_raw(part).map_or(0, |part| u128::from(part.size()));
    let total: u128 = (0..parts).map(size).sum();
    if total > MOST_EXPANSION * u128::from(length) {
        return Err(Error::format(path, "is compressed, which files of torch.save are not"));
    }
    Ok(())
}

fn read_torch(path: &Path) -> Result<BTreeMap<String, Stored>> {
    check_archive(path)?;
    let open = || PytorchReader::new(path).map_err(one_line);
    let file =
        guarded(open).map_err(|why| Error::format(path, format!("not a file of PyTorch weights: {why}")))?;
    Ok(file.into_tensors().into_iter().map(|(name, tensor)| (name, Stored::Torch(tensor))).collect())
}

/// Runs the third-party reader; a panic on an untrusted file becomes an error.
fn guarded<T>(read: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("it is damaged".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_length_may_begin_like_a_pickle_or_an_archive() {
        for first in [*b"\x80\x02", *b"PK", *b"\x8a\x0a"] {
            let start = [first[0], first[1], 0, 0, 0, 0, 0, 0, b'{'];
            assert!(!is_torch(start, 1 << 20), "{first:?}");
            assert!(is_torch(start, 100), "{first:?}: the header would not fit the file");
            assert!(is_torch([first[0], first[1], 3, 4, 5, 6, 7, 8, 9], 1 << 20), "{first:?}");
        }
        assert!(!is_torch(*b"\x40\0\0\0\0\0\0\0{", 1 << 20));
    }
}
