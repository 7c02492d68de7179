//! Embeddings of a folder tree, into a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::embedder::{Embedder, skipped};
use super::file::{EmbeddingsFile, Format};
use super::pictures::Pictures;
use super::{Event, Skipped};
use crate::{Error, Result};
use ddtas_io::files::check_place;

/// Metadata of embeddings: the folder they came from, the checkpoint they came by, the names of the labels.
pub(super) const ROOT: &str = "ddtas.root";
pub(super) const CHECKPOINT: &str = "ddtas.checkpoint";
const CLASSES: &str = "ddtas.classes";

/// What to embed, and where the result goes.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct EmbedSettings {
    /// A checkpoint of ddtas-train.
    #[arg(long, value_name = "FILE")]
    pub checkpoint: PathBuf,
    /// A folder of JPEG or PNG pictures, in folders of any depth.
    #[arg(long, value_name = "DIR")]
    pub images: PathBuf,
    /// The file to write: .safetensors, or .npy with a .json of the same name beside it.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Side of the pictures the network sees; what the checkpoint says if not given.
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<usize>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Export {
    /// The file.
    pub path: PathBuf,
    /// Pictures embedded.
    pub pictures: usize,
    /// Dimensions of an embedding.
    pub dim: usize,
    /// Folders that hold pictures; each gave a label.
    pub folders: usize,
    /// Pictures left out because they cannot be read.
    pub skipped: Vec<Skipped>,
    /// Seconds it took.
    pub seconds: f64,
}

/// Embeds every picture below a folder, in sorted order, and writes the file. A picture's label is its folder's place
/// among the folders that hold pictures, in sorted order: where a folder is a class, the file can be evaluated.
///
/// # Errors
/// A checkpoint or folder that cannot be used, no readable picture, or a file that cannot be written.
pub fn embed(settings: &EmbedSettings, tell: &mut dyn FnMut(Event<'_>)) -> Result<Export> {
    // Before the work begins.
    if Format::of(&settings.out).is_err() {
        let value = settings.out.display().to_string();
        return Err(Error::misuse("out", value, "needs a name that ends in .safetensors or .npy"));
    }
    check_place("out", &settings.out)?;
    let begun = Instant::now();
    let embedder = Embedder::open(&settings.checkpoint, settings.image_size)?;
    let (file, skipped) = embed_folder(&embedder, &settings.images, tell)?;
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

/// The embeddings of a folder tree with names, labels and where they came from; and what could not be read.
pub(super) fn embed_folder(
    embedder: &Embedder,
    root: &Path,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<(EmbeddingsFile, Vec<Skipped>)> {
    let pictures = Pictures::below(root)?;
    let embedded = embedder.embed(&pictures.split, tell);
    let skipped = skipped(&pictures.split);
    if skipped.len() == pictures.names.len() {
        let (count, shown, reason) = (skipped.len(), root.display(), &skipped[0].reason);
        return Err(Error::Dataset(format!(
            "none of the {count} pictures below {shown} can be read: {reason}"
        )));
    }
    let embedded = embedded?;
    let names: Vec<String> = embedded.indices.iter().map(|&index| pictures.names[index].clone()).collect();
    let folder = |name: &String| name.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
    let mut folders: BTreeMap<String, i64> = names.iter().map(|name| (folder(name), 0)).collect();
    folders.values_mut().zip(0..).for_each(|(label, index)| *label = index);
    let labels = names.iter().map(|name| folders[&folder(name)]).collect();
    let classes: Vec<&String> = folders.keys().collect();
    let metadata = BTreeMap::from([
        (ROOT.to_owned(), root.display().to_string()),
        (CHECKPOINT.to_owned(), embedder.fingerprint().to_owned()),
        (CLASSES.to_owned(), serde_json::json!(classes).to_string()),
    ]);
    let file = EmbeddingsFile {
        values: embedded.view()?.to_owned(),
        labels: Some(labels),
        gallery: None,
        names,
        metadata,
    };
    Ok((file, skipped))
}
