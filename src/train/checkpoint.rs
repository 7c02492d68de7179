//! Checkpoints: the network's weights and running statistics as safetensors.

use std::collections::HashMap;
use std::path::Path;

use burn::store::{ModuleSnapshot, SafetensorsStore};

use crate::files::write_atomic;
use crate::generator::Thresholds;
use crate::model::{EmbeddingNetwork, NetworkShape};
use crate::{Error, Result};

/// Key of the network's shape in a checkpoint's metadata.
const SHAPE: &str = "ddtas.network";

/// Writes `network` to `path`, replacing what is there only once the new file is complete.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written.
pub fn save(
    network: &EmbeddingNetwork,
    shape: &NetworkShape,
    facts: &[(&str, String)],
    path: &Path,
) -> Result<()> {
    let shape = serde_json::to_string(shape).map_err(|error| Error::format(path, error.to_string()))?;
    let mut store = SafetensorsStore::from_bytes(None).metadata(SHAPE, shape);
    for (key, value) in facts {
        store = store.metadata(*key, value);
    }
    network.save_into(&mut store).map_err(|error| Error::format(path, error.to_string()))?;
    let bytes = store.get_bytes().map_err(|error| Error::format(path, error.to_string()))?;
    write_atomic(path, &bytes)
}

/// Key of the threshold generator's state in a checkpoint's metadata.
pub const GENERATOR: &str = "ddtas.generator";

/// State of the threshold generator that a checkpoint holds.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it holds none.
pub fn thresholds(path: &Path) -> Result<Thresholds> {
    let text = metadata(path, GENERATOR, "holds no generator state: its run had --generator off")?;
    let state: Thresholds = serde_json::from_str(&text)
        .map_err(|error| Error::format(path, format!("unknown generator state: {error}")))?;
    if state.members.is_empty() {
        return Err(Error::format(path, "holds a generator without members"));
    }
    Ok(state)
}

/// Shape of the network a checkpoint holds.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it is no checkpoint of ddtas.
pub fn shape(path: &Path) -> Result<NetworkShape> {
    let text = metadata(path, SHAPE, "not a checkpoint of ddtas-train: no network shape")?;
    serde_json::from_str(&text)
        .map_err(|error| Error::format(path, format!("unknown network shape: {error}")))
}

/// Key of the side of the pictures, in pixels, in a checkpoint's metadata.
pub const IMAGE_SIZE: &str = "ddtas.image-size";

/// Side of the pictures that the network was trained on; `None` in checkpoints that do not hold it.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it holds something else than a number.
pub fn image_size(path: &Path) -> Result<Option<usize>> {
    let Some(text) = find_metadata(path, IMAGE_SIZE)? else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Error::format(path, format!("unknown size of pictures: {text}")))
}

fn metadata(path: &Path, key: &str, missing: &str) -> Result<String> {
    find_metadata(path, key)?.ok_or_else(|| Error::format(path, missing))
}

fn find_metadata(path: &Path, key: &str) -> Result<Option<String>> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
        .map_err(|error| Error::format(path, format!("not a safetensors file: {error}")))?;
    let none = HashMap::new();
    Ok(header.metadata().as_ref().unwrap_or(&none).get(key).cloned())
}

/// Fills `network` from `path`.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] if the file cannot be read or does not fit the network.
pub fn load(mut network: EmbeddingNetwork, path: &Path) -> Result<EmbeddingNetwork> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes));
    network.load_from(&mut store).map_err(|error| {
        let reason = error.to_string();
        let line = reason.lines().next().unwrap_or("unreadable").to_owned();
        Error::format(path, format!("does not fit the network: {line}"))
    })?;
    Ok(network)
}
