//! `--dataset folder`: a class per folder (SPEC 6 protocol: test classes are unseen).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dataset::{DEFAULT_CACHE_BYTES, Dataset, RECALL_AT, Split};
use crate::{Error, Result};

/// Which classes train, and how much memory pictures may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderSettings {
    /// Classes that train, the first of the sorted ones; `None` is half of them, rounded down.
    pub train_classes: Option<usize>,
    /// Budget for decoded pictures, each split. Default [`DEFAULT_CACHE_BYTES`].
    pub cache_bytes: usize,
}

impl Default for FolderSettings {
    fn default() -> Self {
        Self { train_classes: None, cache_bytes: DEFAULT_CACHE_BYTES }
    }
}

const WANTED: &str = "give a folder that holds one folder of JPEG or PNG pictures per class";

/// Opens `root/<class>/<picture>`: classes sorted by name, the first ones train, the rest test.
///
/// Pictures are files ending in .jpg, .jpeg or .png, in any case; names that start with a dot are passed over. They are
/// not opened yet.
///
/// # Errors
/// [`Error::Dataset`] if the folder is missing, holds no pictures, leaves fewer than two classes on a side, or
/// leaves a test side where no class has two pictures; [`InvalidSetting`](ddtas_io::Error::InvalidSetting) for a `train_classes` out of range;
/// [`Io`](ddtas_io::Error::Io) if a folder cannot be listed.
pub fn folder(root: &Path, settings: &FolderSettings) -> Result<Dataset> {
    let shown = root.display();
    if !root.is_dir() {
        let state = if root.exists() { "is not a folder" } else { "does not exist" };
        return Err(Error::Dataset(format!("--data-root {shown} {state}: {WANTED}")));
    }
    let mut warnings = Vec::new();
    let mut classes = Vec::new();
    let (mut empty, mut single, mut loose) = (Vec::new(), Vec::new(), 0);
    for path in sorted_entries(root)? {
        if !path.is_dir() {
            loose += usize::from(is_picture(&path));
            continue;
        }
        let name = file_name(&path);
        let pictures = pictures_of(&path)?;
        match pictures.len() {
            0 => empty.push(name),
            1 => {
                single.push(name.clone());
                classes.push((name, pictures));
            }
            _ => classes.push((name, pictures)),
        }
    }
    if classes.is_empty() {
        let found = match (loose, empty.len()) {
            (0, 0) => "it is empty".to_string(),
            (0, n) => format!("none of its {n} folders holds a JPEG or PNG"),
            (n, _) => format!("its {n} pictures lie beside each other, not in a folder per class"),
        };
        return Err(Error::Dataset(format!("no pictures in --data-root {shown}: {found}; {WANTED}")));
    }
    if !empty.is_empty() {
        warnings.push(format!("{} left out, no picture inside: {}", counted(empty.len()), some_of(&empty)));
    }
    if !single.is_empty() {
        warnings.push(format!(
            "{} with one picture only, without positives: {}",
            counted(single.len()),
            some_of(&single)
        ));
    }
    if classes.len() < 4 {
        return Err(Error::Dataset(format!(
            "--data-root {shown} holds {} with pictures: at least 4 are needed, 2 to train and 2 unseen ones to test",
            counted(classes.len())
        )));
    }
    let train_classes = settings.train_classes.unwrap_or(classes.len() / 2);
    if train_classes < 2 || train_classes + 2 > classes.len() {
        return Err(Error::setting(
            "--train-classes",
            train_classes,
            "at least 2, and at least 2 of the classes must remain to test",
        ));
    }
    let test = classes.split_off(train_classes);
    if test.iter().all(|(_, pictures)| pictures.len() < 2) {
        return Err(Error::Dataset(format!(
            "no test class of --data-root {shown} has two pictures: there is nothing to retrieve"
        )));
    }
    Ok(Dataset {
        name: root.canonicalize().map_or_else(|_| file_name(root), |path| file_name(&path)),
        train: Arc::new(Split::from_files(classes, settings.cache_bytes)),
        test: Arc::new(Split::from_files(test, settings.cache_bytes)),
        gallery: None,
        recall_at: RECALL_AT,
        warnings,
    })
}

/// The pictures that lie in `folder`, sorted by name.
pub(super) fn pictures_of(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(sorted_entries(folder)?.into_iter().filter(|file| is_picture(file) && file.is_file()).collect())
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        if !file_name(&path).starts_with('.') {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Whether a file is taken for a picture, by its extension.
pub(crate) fn is_picture(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    ["jpg", "jpeg", "png"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

fn counted(classes: usize) -> String {
    if classes == 1 { "1 class".into() } else { format!("{classes} classes") }
}

/// The first names of a list that may be thousands long.
fn some_of(names: &[String]) -> String {
    let shown = names.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > 3 { format!("{shown}, ...") } else { shown }
}
