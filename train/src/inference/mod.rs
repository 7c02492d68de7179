//! Using a trained network: `ddtas-train eval`, `embed` and `search`.
//!
//! | file | what |
//! | --- | --- |
//! | `embedder.rs` | a network from a checkpoint or published weights, which embeds pictures |
//! | `evaluation.rs` | evaluates a checkpoint on a data set, or embeddings in a file |
//! | `pictures.rs` | the pictures of a folder tree |
//! | `export.rs` | writes the embeddings of a folder tree to a file |
//! | `file.rs`, `npy.rs` | files of embeddings |
//! | `origin.rs` | paths of the embedded pictures, in a file's metadata |
//! | `search.rs` | the nearest pictures of a collection |
//! | `page.rs` | results of an evaluation as an HTML page |
//! | `sheet.rs` | results of a search as an HTML page with pictures |

mod embedder;
mod evaluation;
mod export;
mod file;
mod npy;
mod origin;
mod page;
mod pictures;
mod search;
mod sheet;

pub use embedder::{Embedder, NetworkSettings};
pub use evaluation::{EvalSettings, Evaluation, evaluate};
pub use export::{EmbedSettings, Export, embed};
pub use file::{EmbeddingsFile, Format};
pub use page::write as write_page;
pub use search::{Answer, Found, Query, SearchSettings, search};
pub use sheet::write as write_sheet;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::fits;
use crate::{Error, Result};
use ddtas_io::files::check_output;

/// Checks that the HTML file `path` can be written, and would replace at most an HTML file: neither one of
/// `inputs` (the files that are read, each with its flag), nor a picture or list in a folder that is read.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused).
pub fn check_page(path: &Path, inputs: Vec<(&'static str, PathBuf)>) -> Result<()> {
    check_output("html", path, inputs)?;
    if !path.is_file() {
        return Ok(());
    }
    let mut start = [0; 64];
    let count =
        File::open(path).and_then(|mut file| file.read(&mut start)).map_err(Error::io("read", path))?;
    let start = String::from_utf8_lossy(&start[..count]).trim_start().to_ascii_lowercase();
    let is_page = start.is_empty() || start.starts_with("<!doctype html") || start.starts_with("<html");
    let reason = "would be overwritten, and is not an HTML file: give another";
    fits(is_page, "html", path.display(), reason)
}

/// Progress of an evaluation, an export or a search.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Pictures are being embedded.
    Embedding {
        /// Pictures done.
        done: usize,
        /// Pictures in all.
        total: usize,
    },
    /// Queries are being searched.
    Searching {
        /// Queries done.
        done: usize,
        /// Queries in all.
        total: usize,
    },
    /// A step of k-means is done.
    Clustering {
        /// The step, from 1.
        step: usize,
        /// Most steps there will be.
        steps: usize,
    },
    /// Something that takes long has begun.
    Note(&'a str),
    /// Something the user should know.
    Warning(&'a str),
}
