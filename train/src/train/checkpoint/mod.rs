//! Checkpoints: the network's weights and running statistics as safetensors, and the state of a run.
//!
//! | file | what |
//! | --- | --- |
//! | `archive.rs` | tensors and metadata as a file |
//! | `moments.rs` | the optimizer's moments under the names of their weights |

pub(super) mod archive;
pub(super) mod moments;

use std::path::{Path, PathBuf};

use burn::store::{ModuleSnapshot, SafetensorsStore};

use archive::{Archive, Entry};
use ddtas_io::files::read;
use ddtas_io::tensors::Dtype;

use crate::generator::{GeneratorSettings, Thresholds};
use crate::model::{EmbeddingNetwork, NetworkShape};
use crate::{Error, Result};

/// Name of the best checkpoint in a run folder.
pub(crate) const BEST: &str = "best.safetensors";
/// Key of the network's shape in a checkpoint's metadata.
const SHAPE: &str = "ddtas.network";
/// Key of the side of the pictures, in pixels.
pub const IMAGE_SIZE: &str = "ddtas.image-size";
/// Name of the head's weight in files, where it is `[out, in]`, as in PyTorch's Linear: the transpose of Burn's.
const HEAD: &str = "head.weight";
/// Key that says so. Files of earlier versions are without it: they have Burn's layout, which a square weight does not show.
const HEAD_LAYOUT: &str = "ddtas.head.weight";
/// Key of the threshold generator's state.
pub const GENERATOR: &str = "ddtas.generator";

/// Writes `network` to `path` atomically.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io) if the file cannot be written.
pub fn save(
    network: &EmbeddingNetwork,
    shape: &NetworkShape,
    facts: &[(&str, String)],
    path: &Path,
) -> Result<()> {
    weights(network, shape, facts).map_err(|reason| Error::format(path, reason))?.write(path)
}

/// The network's weights and running statistics with `facts`.
pub(super) fn weights(
    network: &EmbeddingNetwork,
    shape: &NetworkShape,
    facts: &[(&str, String)],
) -> std::result::Result<Archive, String> {
    let mut archive = tensors(network)?;
    let shape = serde_json::to_string(shape).map_err(|error| error.to_string())?;
    archive.facts.insert(SHAPE.to_owned(), shape);
    archive.facts.extend(facts.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    Ok(archive)
}

/// Only the network's weights and running statistics, by their names in files.
pub(super) fn tensors(network: &EmbeddingNetwork) -> std::result::Result<Archive, String> {
    let mut archive = Archive::default();
    archive.facts.extend(SafetensorsStore::default_metadata());
    archive.facts.insert(HEAD_LAYOUT.to_owned(), "[out, in]".to_owned());
    for tensor in network.collect(None, None, true) {
        let (name, entry) = Entry::of(tensor)?;
        let entry = if name == HEAD { entry.transposed() } else { entry };
        archive.put(network.file_name(&name), entry);
    }
    Ok(archive)
}

/// `network` with the weights and running statistics of `stored`, or a reason in one line why they do not
/// fit. Other tensors of a run's checkpoint are ignored.
pub(super) fn filled(
    mut network: EmbeddingNetwork,
    stored: &Archive,
) -> std::result::Result<EmbeddingNetwork, String> {
    let mut tensors = Vec::new();
    for wanted in network.collect(None, None, true) {
        let name = network.file_name(&wanted.name);
        let found = stored.get(&name).ok_or_else(|| format!("no tensor `{name}`"))?;
        let mut shape: Vec<usize> = wanted.shape.iter().copied().collect();
        let is_transposed = name == HEAD && stored.facts.contains_key(HEAD_LAYOUT);
        if is_transposed {
            shape.reverse();
        }
        if (found.dtype, &found.shape) != (Dtype::F32, &shape) {
            let (dtype, got) = (found.dtype, &found.shape);
            return Err(format!("tensor `{name}` is {dtype:?} of shape {got:?}, not F32 of shape {shape:?}"));
        }
        let found = if is_transposed { found.transposed() } else { found.clone() };
        tensors.push(found.named(wanted.name, None));
    }
    match network.apply(tensors, None, None, true).errors.first() {
        Some(error) => Err(error.to_string()),
        None => Ok(network),
    }
}

/// The contents of a checkpoint file.
pub struct Checkpoint {
    path: PathBuf,
    length: usize,
    /// CRC-32 of the file.
    sum: u32,
    archive: Archive,
}

impl Checkpoint {
    /// Reads a file, or the best checkpoint of a run folder.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) if it cannot be read, [`Format`](ddtas_io::Error::Format) if it is no safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let best = path.join(BEST);
        let path = if path.is_dir() { best.as_path() } else { path };
        if path == best && !path.exists() {
            return Err(Error::format(
                path.with_file_name(""),
                format!("holds no {BEST}: give a checkpoint or the folder of a run"),
            ));
        }
        Self::parse(path, &read(path)?)
    }

    /// Parses the bytes of the file `path`.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if they are no safetensors file.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let archive = Archive::from_bytes(path, bytes)?;
        let (length, sum) = (bytes.len(), crc32fast::hash(bytes));
        Ok(Self { path: path.to_path_buf(), length, sum, archive })
    }

    /// Path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Identifies the checkpoint: the CRC-32 of the file, in hexadecimal.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        format!("{:08x}", self.sum)
    }

    /// Shape of the network.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if it is no checkpoint of ddtas.
    pub fn shape(&self) -> Result<NetworkShape> {
        let text = self.fact(SHAPE, "not a checkpoint of ddtas-train: no network shape")?;
        let shape: NetworkShape = serde_json::from_str(text)
            .map_err(|error| self.bad(format!("unknown network shape: {error}")))?;
        for (name, value, low, high, range) in shape.sizes() {
            if !(low..=high).contains(&value) {
                return Err(self.bad(format!("its network has {name} {value}, which is not {range}")));
            }
        }
        if shape.least_bytes() > self.length {
            return Err(self.bad(format!("is too small to hold a network of {shape}")));
        }
        Ok(shape)
    }

    /// Side of the pictures that the network was trained on; `None` if the checkpoint does not contain it.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if the value is not a number.
    pub fn image_size(&self) -> Result<Option<usize>> {
        let Some(text) = self.archive.facts.get(IMAGE_SIZE) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.bad(format!("unknown size of pictures: {text}")))
    }

    /// State of a threshold generator with these `settings`.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if there is none, or one of other settings.
    pub fn thresholds(&self, settings: &GeneratorSettings) -> Result<Thresholds> {
        let text = self.fact(GENERATOR, "holds no generator state: its run had --generator off")?;
        let state: Thresholds = serde_json::from_str(text)
            .map_err(|error| self.bad(format!("unknown generator state: {error}")))?;
        state.check(settings).map_err(|reason| self.bad(reason))?;
        Ok(state)
    }

    /// `network` with the weights of the checkpoint.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if the weights do not fit it.
    pub fn fill(&self, network: EmbeddingNetwork) -> Result<EmbeddingNetwork> {
        filled(network, &self.archive)
            .map_err(|reason| self.bad(format!("does not fit the network: {reason}")))
    }

    /// The metadata value of `key`; `missing` is the reason in the error if there is none.
    pub(super) fn fact(&self, key: &str, missing: &str) -> Result<&str> {
        self.archive.facts.get(key).map(String::as_str).ok_or_else(|| self.bad(missing.into()))
    }

    /// Tensors and metadata.
    pub(super) fn into_archive(self) -> Archive {
        self.archive
    }

    fn bad(&self, reason: String) -> Error {
        Error::format(&self.path, reason)
    }
}
