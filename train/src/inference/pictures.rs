//! The pictures of a folder tree.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::data::{IgnoredFiles, KINDS, Split, is_hidden, is_picture};
use crate::{Error, Result};

/// Pictures by path, in sorted order.
pub(super) struct Pictures {
    /// Paths below the folder.
    pub(super) paths: Vec<PathBuf>,
    /// The pictures as a split with a single class.
    pub(super) split: Arc<Split>,
    /// A line about the other files found, if any.
    pub(super) ignored: Option<String>,
}

impl Pictures {
    /// All pictures below `root`, by extension; names that start with a dot are ignored.
    ///
    /// # Errors
    /// [`Error::Dataset`] if there are none; [`Io`](ddtas_io::Error::Io) if a folder cannot be listed.
    pub(super) fn below(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            let state = if root.exists() { "is not a folder" } else { "does not exist" };
            return Err(Error::Dataset(format!("{} {state}: give a folder of pictures", root.display())));
        }
        let (mut paths, mut ignored) = (Vec::new(), IgnoredFiles::default());
        let visible = |entry: &walkdir::DirEntry| entry.depth() == 0 || !is_hidden(entry.path());
        // Links are followed: collections often consist of links to the pictures.
        let entries = walkdir::WalkDir::new(root).follow_links(true).sort_by_file_name().into_iter();
        for entry in entries.filter_entry(visible) {
            match entry {
                Ok(entry) if entry.file_type().is_dir() => {}
                // Only regular files: opening a pipe would block.
                Ok(entry) if is_picture(entry.path()) && entry.file_type().is_file() => {
                    paths.push(entry.into_path())
                }
                Ok(entry) => ignored.note(entry.path()),
                Err(error) if error.loop_ancestor().is_some() => ignored.count("link", " in a circle"),
                // `filter_entry` is not called for these: they may have hidden names.
                Err(error) if error.path().is_some_and(|path| path.is_symlink() && !path.exists()) => {
                    ignored.count("broken link", "");
                }
                Err(error) => {
                    let path = error.path().unwrap_or(root).to_path_buf();
                    return Err(Error::io("list", path)(error.into()));
                }
            }
        }
        let ignored = ignored.line();
        if paths.is_empty() {
            let also = ignored.map_or_else(String::new, |line| format!(" ({line})"));
            return Err(Error::Dataset(format!("no {KINDS} picture below {}{also}", root.display())));
        }
        let split = split(root, paths.clone());
        let below = |path: PathBuf| path.strip_prefix(root).map(Path::to_path_buf).unwrap_or(path);
        Ok(Self { paths: paths.into_iter().map(below).collect(), split, ignored })
    }

    /// The given files.
    pub(super) fn of(paths: &[PathBuf]) -> Self {
        let split = split(Path::new("query"), paths.to_vec());
        Self { paths: paths.to_vec(), split, ignored: None }
    }
}

/// A split without cache, since each picture is read once.
fn split(root: &Path, paths: Vec<PathBuf>) -> Arc<Split> {
    Arc::new(Split::from_files(vec![(root.display().to_string(), paths)], 0))
}

/// A path as text, with `/` between its parts.
pub(super) fn slash_separated(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
    parts.join("/")
}

/// The bytes of the paths that are not valid UTF-8, by row.
pub(super) fn bytes_of<'a>(paths: impl Iterator<Item = &'a Path>) -> BTreeMap<usize, Vec<u8>> {
    let no_text = paths.enumerate().filter(|(_, path)| path.to_str().is_none());
    no_text.map(|(row, path)| (row, path.as_os_str().as_encoded_bytes().to_vec())).collect()
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
        for name in [
            "z.PNG",
            "b/deep/2.jpeg",
            "b/deep/10.jpg",
            "a.txt",
            ".hidden/1.png",
            "b/.x.png",
            "b/1.Jpg",
            "b/2.HEIC",
            "b/3.heic",
            "b/none",
        ] {
            std::fs::write(root.join(name), b"").unwrap();
        }
        let pictures = Pictures::below(root).unwrap();
        let names: Vec<String> = pictures.paths.iter().map(|path| slash_separated(path)).collect();
        assert_eq!(names, ["b/1.Jpg", "b/deep/10.jpg", "b/deep/2.jpeg", "z.PNG"]);
        assert_eq!(pictures.split.len(), 4);
        let passed = "passed over, not read as pictures: 2 .heic, 1 .txt, 1 without extension";
        assert_eq!(pictures.ignored.as_deref(), Some(passed));
        assert!(Pictures::below(&root.join("a.txt")).is_err());
        assert!(Pictures::below(&root.join("none")).is_err());
        assert!(Pictures::below(&root.join(".hidden")).is_ok(), "what was asked for by name is looked into");
        std::fs::remove_file(root.join(".hidden/1.png")).unwrap();
        assert!(Pictures::below(&root.join(".hidden")).is_err(), "no picture");
    }

    #[cfg(unix)]
    #[test]
    fn links_in_a_circle_and_broken_ones_are_counted_and_names_of_any_bytes_survive() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let name = std::ffi::OsStr::from_bytes(b"caf\xe9");
        std::fs::create_dir_all(root.join(name)).unwrap();
        std::fs::write(root.join(name).join("1.png"), b"").unwrap();
        std::fs::write(root.join("2.png"), b"").unwrap();
        std::os::unix::fs::symlink(root, root.join("again")).unwrap();
        std::os::unix::fs::symlink(root.join("nowhere"), root.join("gone.png")).unwrap();
        let pictures = Pictures::below(root).unwrap();
        assert_eq!(
            pictures.ignored.as_deref(),
            Some("passed over, not read as pictures: 1 broken link, 1 link in a circle")
        );
        let kept = bytes_of(pictures.paths.iter().map(PathBuf::as_path));
        assert_eq!(kept.keys().collect::<Vec<_>>(), [&1]);
        assert!(root.join(crate::data::name_of_bytes(&kept[&1])).is_file());
        assert_eq!(slash_separated(&pictures.paths[1]), "caf\u{fffd}/1.png");
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_named_like_a_picture_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("1.png"), b"").unwrap();
        let pipe = std::process::Command::new("mkfifo").arg(folder.path().join("2.png")).status();
        assert!(pipe.unwrap().success());
        let pictures = Pictures::below(folder.path()).unwrap();
        assert_eq!(pictures.paths, [PathBuf::from("1.png")]);
        assert!(pictures.ignored.is_some());
    }
}
