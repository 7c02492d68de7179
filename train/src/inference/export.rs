//! Writes the embeddings of a folder tree to a file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Event;
use super::embedder::{Embedder, NetworkSettings};
use super::file::{EmbeddingsFile, Format, check_beside, check_replaced};
use super::origin;
use super::pictures::{Pictures, slash_separated};
use crate::data::Unreadable;
use crate::train::checkpoint::IMAGE_SIZE;
use crate::{Error, Result};
use ddtas_io::files::{as_text, check_output};

/// Metadata key of the checkpoint's fingerprint.
pub(super) const CHECKPOINT: &str = "ddtas.checkpoint";
/// Metadata key that is present if embeddings are averaged with those of mirror images.
pub(super) const FLIPS: &str = "ddtas.flips";
const CLASSES: &str = "ddtas.classes";

/// What to embed, and where the result goes.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct EmbedSettings {
    /// The network.
    #[command(flatten)]
    pub network: NetworkSettings,
    /// The pictures to embed: a folder tree.
    #[arg(long, value_name = "DIR")]
    pub images: PathBuf,
    /// The file to write: .safetensors, or .npy with names and labels in a .json of the same name.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Result of `embed`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Export {
    /// The file.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Pictures embedded.
    pub pictures: usize,
    /// Dimensions of an embedding.
    pub dim: usize,
    /// Folders that contain pictures; each is a label.
    pub folders: usize,
    /// Pictures left out because they cannot be read.
    pub skipped: Vec<Unreadable>,
    /// Duration in seconds.
    pub seconds: f64,
}

/// Embeds every picture below a folder, in sorted order, and writes the file. A picture's label is the index of its folder
/// among the sorted folders that contain pictures: if each folder is a class, the file can be evaluated.
///
/// # Errors
/// A checkpoint or folder that cannot be used, no readable picture, or a file that cannot be written.
pub fn embed(settings: &EmbedSettings, tell: &mut dyn FnMut(Event<'_>)) -> Result<Export> {
    // Checked before the work begins.
    let Ok(format) = Format::of(&settings.out) else {
        return Err(Error::misuse("out", settings.out.display(), "must end in .safetensors or .npy"));
    };
    check_output("out", &settings.out, settings.network.files())?;
    match format {
        Format::Npy => check_beside(&settings.out)?,
        Format::Safetensors => check_replaced(&settings.out)?,
    }
    let begun = Instant::now();
    let embedder = Embedder::new(&settings.network)?;
    let (file, skipped) =
        embed_folder(&embedder, &settings.images, &Pictures::below(&settings.images)?, tell)?;
    file.write(&settings.out)?;
    let folders = file.labels.iter().flatten().max().map_or(0, |&label| label as usize + 1);
    Ok(Export {
        path: settings.out.clone(),
        pictures: file.values.nrows(),
        dim: file.values.ncols(),
        folders,
        skipped,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Embeds the `pictures` below the folder `root`: returns embeddings with names, labels and origin, and the
/// pictures that could not be read.
pub(super) fn embed_folder(
    embedder: &Embedder,
    root: &Path,
    pictures: &Pictures,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<(EmbeddingsFile, Vec<Unreadable>)> {
    pictures.ignored.iter().for_each(|line| tell(Event::Warning(line)));
    let embedded = embedder.embed(&pictures.split, tell);
    let skipped = pictures.split.unreadable();
    if skipped.len() == pictures.paths.len() {
        let (count, shown, reason) = (skipped.len(), root.display(), &skipped[0].reason);
        return Err(Error::Dataset(format!(
            "none of the {count} pictures below {shown} can be read: {reason}"
        )));
    }
    let embedded = embedded?;
    let paths: Vec<&Path> = embedded.indices.iter().map(|&index| pictures.paths[index].as_path()).collect();
    let folder = |path: &&Path| path.parent().unwrap_or(Path::new("")).to_path_buf();
    // Sorted by bytes, like the names in files.
    let mut folders: BTreeMap<OsString, i64> =
        paths.iter().map(|path| (folder(path).into_os_string(), 0)).collect();
    folders.values_mut().zip(0..).for_each(|(label, index)| *label = index);
    let labels = paths.iter().map(|path| folders[folder(path).as_os_str()]).collect();
    let classes: Vec<String> = folders.keys().map(|folder| slash_separated(Path::new(folder))).collect();
    let mut metadata = origin::metadata(root, paths.iter().copied());
    metadata.insert(CHECKPOINT.to_owned(), embedder.fingerprint().to_owned());
    metadata.insert(CLASSES.to_owned(), serde_json::json!(classes).to_string());
    metadata.insert(IMAGE_SIZE.to_owned(), embedder.image_size().to_string());
    if embedder.flips() {
        metadata.insert(FLIPS.to_owned(), "true".to_owned());
    }
    let names = paths.iter().map(|path| slash_separated(path)).collect();
    let file = EmbeddingsFile { values: embedded.view()?.to_owned(), labels: Some(labels), names, metadata };
    Ok((file, skipped))
}
