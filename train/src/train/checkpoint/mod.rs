//! Checkpoints: the network's weights and running statistics as safetensors; of a run that goes on,
//! everything else that its next step depends on beside them.
//!
//! | file | what |
//! | --- | --- |
//! | `archive.rs` | tensors and facts as a file whose bytes depend on nothing else |
//! | `state.rs` | what is kept of a run beside tensors |
//! | `optimizer.rs` | the optimizer's moments under the names of their weights |

pub(super) mod archive;
pub(super) mod optimizer;
mod state;

use std::path::Path;

use burn::module::Module;
use burn::store::{ModuleSnapshot, SafetensorsStore};

use archive::Archive;
pub(super) use state::{Best, EngineState, GeneratorState, RunState};

use super::engine::Engine;
use crate::generator::{GeneratorSettings, Thresholds};
use crate::model::{EmbeddingNetwork, NetworkShape};
use crate::{Error, Result};
use ddtas_io::files::write_atomic;

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
    let write = || weights(network, shape, facts)?.to_bytes();
    let bytes = write().map_err(|reason| Error::format(path, reason))?;
    write_atomic(path, &bytes)
}

/// The network's weights and running statistics with `facts`.
fn weights(
    network: &EmbeddingNetwork,
    shape: &NetworkShape,
    facts: &[(&str, String)],
) -> std::result::Result<Archive, String> {
    let mut store = SafetensorsStore::from_bytes(None);
    network.save_into(&mut store).map_err(|error| error.to_string())?;
    let bytes = store.get_bytes().map_err(|error| error.to_string())?;
    let mut archive = Archive::from_bytes(&bytes)?;
    let shape = serde_json::to_string(shape).map_err(|error| error.to_string())?;
    archive.facts.insert(SHAPE.to_owned(), shape);
    archive.facts.extend(facts.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    Ok(archive)
}

/// Key of a run's state in a checkpoint's metadata.
const RUN: &str = "ddtas.run";

/// Writes everything that the next step of `engine` depends on to `path`, replacing what is there only once the new
/// file is complete. `state` is what the run itself keeps; its engine's part is filled in here.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written; [`Error::Training`] if a weight is no longer finite: such a
/// checkpoint would serve nobody.
pub(super) fn save_run(
    engine: &Engine,
    shape: &NetworkShape,
    facts: &[(&str, String)],
    state: &RunState,
    path: &Path,
) -> Result<()> {
    let fill = || -> std::result::Result<Archive, String> {
        // Evaluation mode brings the running statistics up to the last step.
        let mut archive = weights(&engine.network.valid(), shape, facts)?;
        let state = RunState { engine: Some(engine.put(&mut archive)?), ..state.clone() };
        let text = toml::to_string(&state).map_err(|error| error.to_string())?;
        archive.facts.insert(RUN.to_owned(), text);
        Ok(archive)
    };
    let archive = fill().map_err(|reason| Error::format(path, reason))?;
    if let Some(name) = archive.first_not_finite() {
        return Err(Error::Training(format!(
            "training diverged by step {} ({name} is no longer finite): lower --learning-rate",
            state.step
        )));
    }
    write_atomic(path, &archive.to_bytes().map_err(|reason| Error::format(path, reason))?)
}

/// The state of the run that a checkpoint holds.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] if the file cannot be read or is no checkpoint of a run.
pub(super) fn run_state(path: &Path) -> Result<RunState> {
    let text = metadata(path, RUN, "holds weights alone: a run cannot go on from it")?;
    toml::from_str(&text)
        .map_err(|error| Error::format(path, format!("unknown state of a run: {}", error.message())))
}

/// Puts `engine`, whose network was [loaded](load) from `path`, where the run stood.
///
/// # Errors
/// As [`run_state`]; [`Error::Format`] if what the file holds does not fit the settings.
pub(super) fn resume_engine(engine: &mut Engine, path: &Path) -> Result<()> {
    let state = run_state(path)?;
    let mut archive = Archive::read(path)?;
    let inner = state.engine.ok_or_else(|| Error::format(path, "holds no state of the optimizer"))?;
    engine.take(&mut archive, &inner).map_err(|reason| Error::format(path, reason))
}

/// Key of the threshold generator's state in a checkpoint's metadata.
pub const GENERATOR: &str = "ddtas.generator";

/// State of the threshold generator that a checkpoint holds, for one of these `settings`.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it holds none, or one that other settings made.
pub fn thresholds(path: &Path, settings: &GeneratorSettings) -> Result<Thresholds> {
    let text = metadata(path, GENERATOR, "holds no generator state: its run had --generator off")?;
    let state: Thresholds = serde_json::from_str(&text)
        .map_err(|error| Error::format(path, format!("unknown generator state: {error}")))?;
    state.check(settings).map_err(|reason| Error::format(path, reason))?;
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
    let Some(text) = Archive::read(path)?.facts.remove(IMAGE_SIZE) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Error::format(path, format!("unknown size of pictures: {text}")))
}

fn metadata(path: &Path, key: &str, missing: &str) -> Result<String> {
    Archive::read(path)?.facts.remove(key).ok_or_else(|| Error::format(path, missing))
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
