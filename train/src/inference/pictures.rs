//! The pictures of a folder tree.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::data::{Split, is_picture};
use crate::{Error, Result};

/// Pictures by path, in sorted order.
pub(super) struct Pictures {
    /// Names: paths below the folder, with `/` between their parts.
    pub(super) names: Vec<String>,
    /// One class that holds them all: their classes, if they have any, are the caller's business.
    pub(super) split: Arc<Split>,
}

impl Pictures {
    /// All JPEG and PNG files below `root`, by extension; names that start with a dot are passed over.
    ///
    /// # Errors
    /// [`Error::Dataset`] if there are none; [`Io`](ddtas_io::Error::Io) if a folder cannot be listed.
    pub(super) fn below(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            let state = if root.exists() { "is not a folder" } else { "does not exist" };
            return Err(Error::Dataset(format!(
                "{} {state}: give a folder of JPEG or PNG pictures",
                root.display()
            )));
        }
        let mut paths = Vec::new();
        let visible = |entry: &walkdir::DirEntry| {
            entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
        };
        // Links are followed: collections are often links to where the pictures lie. A loop is an error.
        let entries = walkdir::WalkDir::new(root).follow_links(true).sort_by_file_name().into_iter();
        for entry in entries.filter_entry(visible) {
            let entry = entry.map_err(|error| {
                let path = error.path().unwrap_or(root).to_path_buf();
                Error::io("list", path)(error.into())
            })?;
            if entry.file_type().is_file() && is_picture(entry.path()) {
                paths.push(entry.into_path());
            }
        }
        if paths.is_empty() {
            return Err(Error::Dataset(format!("no JPEG or PNG picture below {}", root.display())));
        }
        let name = |path: &PathBuf| {
            let below = path.strip_prefix(root).unwrap_or(path);
            let parts: Vec<_> = below.iter().map(|part| part.to_string_lossy()).collect();
            parts.join("/")
        };
        let names = paths.iter().map(name).collect();
        Ok(Self { names, split: split(root, paths) })
    }

    /// These files.
    pub(super) fn of(paths: &[PathBuf]) -> Self {
        let names = paths.iter().map(|path| path.display().to_string()).collect();
        Self { names, split: split(Path::new("query"), paths.to_vec()) }
    }
}

/// Pictures are read once, so none is kept in memory.
fn split(root: &Path, paths: Vec<PathBuf>) -> Arc<Split> {
    Arc::new(Split::from_files(vec![(root.display().to_string(), paths)], 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_found_at_any_depth_in_sorted_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("b/deep")).unwrap();
        std::fs::create_dir_all(root.join(".hidden")).unwrap();
        for name in
            ["z.PNG", "b/deep/2.jpeg", "b/deep/10.jpg", "a.txt", ".hidden/1.png", "b/.x.png", "b/1.Jpg"]
        {
            std::fs::write(root.join(name), b"").unwrap();
        }
        let pictures = Pictures::below(root).unwrap();
        assert_eq!(pictures.names, ["b/1.Jpg", "b/deep/10.jpg", "b/deep/2.jpeg", "z.PNG"]);
        assert_eq!(pictures.split.len(), 4);
        assert!(Pictures::below(&root.join("a.txt")).is_err());
        assert!(Pictures::below(&root.join("none")).is_err());
        assert!(Pictures::below(&root.join(".hidden")).is_ok(), "what was asked for by name is looked into");
        std::fs::remove_file(root.join(".hidden/1.png")).unwrap();
        assert!(Pictures::below(&root.join(".hidden")).is_err(), "no picture");
    }
}
