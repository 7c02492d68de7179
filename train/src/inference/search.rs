//! Finds the nearest pictures of a collection.

use std::path::{Path, PathBuf};

use super::Event;
use super::embedder::{Embedder, NetworkSettings};
use super::export::{CHECKPOINT, FLIPS, embed_folder};
use super::file::EmbeddingsFile;
use super::origin::Origin;
use super::pictures::Pictures;
use crate::data::Unreadable;
use crate::train::checkpoint::IMAGE_SIZE;
use crate::train::device;
use crate::{Error, Result};
use ddtas::backend::Nearest;
use ddtas::loss::Rows;
use ddtas_io::files::as_text;

/// What to look for, and where.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct SearchSettings {
    /// The network.
    #[command(flatten)]
    pub network: NetworkSettings,
    /// The pictures to search: a folder tree, or a file written by `embed`.
    #[arg(long, value_name = "DIR|FILE")]
    pub gallery: PathBuf,
    /// The pictures to look for, one or more.
    #[arg(long, value_name = "PICTURE", required = true, num_args = 1..)]
    pub query: Vec<PathBuf>,
    /// How many pictures to find for each query, 1 or more.
    #[arg(long, value_name = "K", default_value_t = 10)]
    pub top: usize,
    /// Where to search: auto (a GPU if there is one), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

impl SearchSettings {
    /// The files that the search reads, each with its flag.
    #[must_use]
    pub fn inputs(&self) -> Vec<(&'static str, PathBuf)> {
        let mut files = self.network.files();
        files.extend(EmbeddingsFile::files(&self.gallery).map(|path| ("gallery", path)));
        files.extend(self.query.iter().map(|path| ("query", path.clone())));
        files
    }
}

/// Result of a search.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Found {
    /// Number of pictures in the gallery.
    pub gallery: usize,
    /// The answers for each query picture.
    pub queries: Vec<Query>,
    /// Pictures of the gallery left out because they cannot be read.
    pub skipped: Vec<Unreadable>,
}

/// A picture and its nearest neighbours.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Query {
    /// The query picture.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Its neighbours, the most similar first.
    pub answers: Vec<Answer>,
}

/// A neighbour.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Answer {
    /// Name in the gallery, or the row's number if it has no name.
    pub name: String,
    /// Path of the picture, if the gallery has it.
    #[serde(serialize_with = "optional")]
    pub path: Option<PathBuf>,
    /// Whether it is the same file as the query.
    pub itself: bool,
    /// Cosine similarity, -1 to 1.
    pub similarity: f32,
}

fn optional<S: serde::Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => as_text(path, serializer),
        None => serializer.serialize_none(),
    }
}

/// Embeds the queries, and the gallery if it is a folder, and finds the nearest pictures of each query. A
/// query that is itself in the gallery is among its answers, marked as such.
///
/// # Errors
/// A checkpoint, gallery or query that cannot be used; a gallery with embeddings of another checkpoint.
pub fn search(settings: &SearchSettings, tell: &mut dyn FnMut(Event<'_>)) -> Result<Found> {
    let mut backend = device::open(&settings.device.parse()?)?;
    if settings.top == 0 {
        return Err(Error::setting("top", "0", "1 or more"));
    }
    let embedder = Embedder::new(&settings.network)?;
    let below = settings.gallery.is_dir().then(|| Pictures::below(&settings.gallery)).transpose()?;
    embedder.check_memory(below.as_ref().map_or(0, |pictures| pictures.split.len()))?;
    let pictures = Pictures::of(&settings.query);
    let queries = embedder.embed(&pictures.split, &mut |_| {});
    // An unreadable query is an error, not left out.
    if let Some(bad) = pictures.split.unreadable().into_iter().next() {
        return Err(Error::Image { path: bad.path, reason: bad.reason });
    }
    let queries = queries?;

    let (gallery, skipped) = match below {
        Some(pictures) => embed_folder(&embedder, &settings.gallery, &pictures, tell)?,
        None => (EmbeddingsFile::read(&settings.gallery)?, Vec::new()),
    };
    check_origin(&settings.gallery, &gallery, &embedder)?;
    let origin = Origin::read(&settings.gallery, &gallery.metadata)?;
    let count = gallery.values.nrows();
    let labels = vec![0; count.max(queries.labels.len())];
    let rows = Rows::new(queries.view()?, &labels[..queries.labels.len()]);
    let references = Rows::new(gallery.values.view(), &labels[..count]);
    let nearest = backend.nearest(&rows, Some(&references), settings.top.min(count))?;

    let answer = |query: Option<&PathBuf>, (&index, &similarity): (&u32, &f32)| {
        let name = gallery.names.get(index as usize);
        let path = name.and_then(|name| origin.path(index as usize, name));
        let real = path.as_ref().and_then(|path| path.canonicalize().ok());
        Answer {
            name: name.cloned().unwrap_or_else(|| index.to_string()),
            itself: real.is_some() && real.as_ref() == query,
            path,
            similarity,
        }
    };
    let lists = nearest.indices.outer_iter().zip(nearest.similarities.outer_iter());
    let queries = settings.query.iter().zip(lists).map(|(path, (indices, similarities))| {
        let real = path.canonicalize().ok();
        let found = indices.into_iter().zip(similarities).filter(|(index, _)| **index != Nearest::NONE);
        Query { path: path.clone(), answers: found.map(|found| answer(real.as_ref(), found)).collect() }
    });
    Ok(Found { gallery: count, queries: queries.collect(), skipped })
}

/// Checks that the gallery was embedded by the same network: embeddings of two networks cannot be compared.
fn check_origin(path: &Path, gallery: &EmbeddingsFile, embedder: &Embedder) -> Result<()> {
    let checkpoint = embedder.file().display();
    if gallery.values.ncols() != embedder.dim() {
        let (got, want) = (gallery.values.ncols(), embedder.dim());
        return Err(Error::format(
            path,
            format!("holds {got} dimensions, but {checkpoint} embeds into {want}"),
        ));
    }
    // Files of earlier versions and of other programs do not have all of this.
    let Some(made_by) = gallery.metadata.get(CHECKPOINT) else { return Ok(()) };
    if made_by != embedder.fingerprint() {
        let reason = format!("was made by another network than {checkpoint}'s: embed the pictures again");
        return Err(Error::format(path, reason));
    }
    if gallery.metadata.contains_key(FLIPS) != embedder.flips() {
        let how =
            if embedder.flips() { "without --flips: leave it out" } else { "with --flips: give it here too" };
        return Err(Error::format(path, format!("was embedded {how}, or embed the pictures again")));
    }
    let given = embedder.image_size().to_string();
    if let Some(size) = gallery.metadata.get(IMAGE_SIZE).filter(|size| **size != given) {
        let reason = format!(
            "was embedded with --image-size {size}, not {given}: give it here too, or embed the pictures again"
        );
        return Err(Error::format(path, reason));
    }
    Ok(())
}
