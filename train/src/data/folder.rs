//! `--dataset folder`: the user's pictures, in a folder per class or named by lists. Test classes are unseen
//! unless the user asks otherwise.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use ddtas_io::console::counted;
use serde::{Deserialize, Serialize};

use super::dataset::{DEFAULT_CACHE_BYTES, Dataset, RECALL_AT, Split};
use super::files::{IgnoredFiles, file_name, is_hidden, is_picture};
use super::lists;
use crate::{Error, Result};

/// How many of the classes, sorted by name, are for training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum TrainClasses {
    /// The first classes, this many.
    First(usize),
    /// All of them; the test then uses the same classes.
    All,
}

/// [`TrainClasses`] as written in files: a number, or `all`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Number(usize),
    Text(String),
}

impl TryFrom<Written> for TrainClasses {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Number(first) => Ok(Self::First(first)),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<TrainClasses> for Written {
    fn from(classes: TrainClasses) -> Self {
        match classes {
            TrainClasses::First(first) => Self::Number(first),
            TrainClasses::All => Self::Text("all".into()),
        }
    }
}

impl FromStr for TrainClasses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            _ => text.parse().map(Self::First).map_err(|_| "a number of classes, or all".into()),
        }
    }
}

/// Which classes train, and how much memory pictures may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderSettings {
    /// Number of training classes; `None` is half of them, rounded down, or the split that the folder defines itself.
    pub train_classes: Option<TrainClasses>,
    /// Bytes of decoded pictures that each split may keep in memory. Default [`DEFAULT_CACHE_BYTES`].
    pub cache_bytes: usize,
}

impl Default for FolderSettings {
    fn default() -> Self {
        Self { train_classes: None, cache_bytes: DEFAULT_CACHE_BYTES }
    }
}

/// The pictures of each class, by class name.
pub(super) type Files = BTreeMap<OsString, Vec<PathBuf>>;

/// The pictures for training, test and gallery.
pub(super) struct SplitFiles {
    pub train: Files,
    pub test: Files,
    pub gallery: Option<Files>,
}

/// Folders or lists that hold the sides of a split that the user made.
pub(super) struct SplitPaths {
    train: PathBuf,
    test: PathBuf,
    gallery: Option<PathBuf>,
}

impl SplitPaths {
    /// Finds `train`, and `query` with `gallery` or else `test`; none if one is missing.
    pub(super) fn of(find: impl Fn(&str) -> Option<PathBuf>) -> Option<Self> {
        let train = find("train")?;
        let (test, gallery) = match (find("query"), find("gallery")) {
            (Some(query), Some(gallery)) => (query, Some(gallery)),
            _ => (find("test")?, None),
        };
        Some(Self { train, test, gallery })
    }

    pub(super) fn read(&self, mut side: impl FnMut(&Path) -> Result<Files>) -> Result<SplitFiles> {
        Ok(SplitFiles {
            train: side(&self.train)?,
            test: side(&self.test)?,
            gallery: self.gallery.as_deref().map(side).transpose()?,
        })
    }

    fn contain(&self, path: &Path) -> bool {
        [Some(&self.train), Some(&self.test), self.gallery.as_ref()]
            .into_iter()
            .flatten()
            .any(|side| side == path)
    }
}

const WANTED: &str = "give a folder that holds one folder of pictures per class";

/// Opens `root`:
///
/// - `root/<class>/<picture>`: classes sorted by name, the first ones train, the rest test;
/// - `root/train/<class>/<picture>` and `root/test/<class>/<picture>`, or `query` and `gallery` in place of `test`;
/// - lists of pictures, `root/train.txt` and `root/test.txt`, or `query.txt` and `gallery.txt`.
///
/// Pictures are recognised by extension and not opened yet. Names that start with a dot are ignored.
///
/// # Errors
/// [`Error::Dataset`] if the folder is missing, holds no pictures, leaves fewer than two classes for training
/// or test, or if no test class has two pictures; [`InvalidSetting`](ddtas_io::Error::InvalidSetting) for a
/// `train_classes` out of range; [`Io`](ddtas_io::Error::Io) if a folder cannot be listed.
pub fn folder(root: &Path, settings: &FolderSettings) -> Result<Dataset> {
    let shown = root.display();
    if !root.is_dir() {
        let state = if root.exists() { "is not a folder" } else { "does not exist" };
        return Err(Error::Dataset(format!("--data-root {shown} {state}: {WANTED}")));
    }
    let mut notes = Notes::default();
    let own = match lists::sides(root)? {
        Some(sides) => Some(sides),
        None => split_folders(root, &mut notes)?,
    };
    if own.is_some() && settings.train_classes.is_some() {
        let reason =
            "--data-root has a split of its own, by train and test, or query and gallery: leave it out";
        return Err(Error::misuse("train-classes", "", reason));
    }
    let has_own_split = own.is_some();
    let (mut sides, seen) = match own {
        Some(sides) => (sides, false),
        None => {
            let classes = classes_in(root, root, &mut notes)?;
            divide(classes, settings.train_classes, root)?
        }
    };
    let shared = sides.test.keys().filter(|name| sides.train.contains_key(*name)).count();
    let seen = seen || shared > 0;
    if seen {
        notes.warnings.push(format!(
            "{} of the {} test classes train as well: what is measured is not of unseen classes",
            shared,
            sides.test.len()
        ));
    }
    if has_own_split {
        notes.warnings.extend(shared_pictures(&sides));
    }
    notes.warnings.extend(of_one_picture(&sides));
    if let Some(gallery) = &mut sides.gallery {
        // Queries and gallery need the same classes, so that a label means the same in both.
        let names: Vec<OsString> = sides.test.keys().chain(gallery.keys()).cloned().collect();
        for side in [&mut sides.test, gallery] {
            names.iter().for_each(|name| _ = side.entry(name.clone()).or_default());
        }
    }
    let split = |files: Files| {
        let named = files.into_iter().map(|(name, files)| (name.to_string_lossy().into_owned(), files));
        Arc::new(Split::from_files(named.collect(), settings.cache_bytes))
    };
    let dataset = Dataset {
        name: root.canonicalize().map_or_else(|_| file_name(root), |path| file_name(&path)),
        train: split(sides.train),
        test: split(sides.test),
        gallery: sides.gallery.map(split),
        seen,
        recall_at: RECALL_AT,
        warnings: notes.lines(),
    };
    if !dataset.has_answers() {
        return Err(Error::Dataset(format!(
            "no test class of --data-root {shown} has two pictures: there is nothing to retrieve"
        )));
    }
    Ok(dataset)
}

/// A warning if pictures of training and test are the same files, under whichever paths.
fn shared_pictures(sides: &SplitFiles) -> Option<String> {
    let files = |side: &Files| side.values().flatten().filter_map(|path| path.canonicalize().ok()).collect();
    let train: HashSet<PathBuf> = Vec::into_iter(files(&sides.train)).collect();
    let test = [Some(&sides.test), sides.gallery.as_ref()].into_iter().flatten().flat_map(files);
    let shared: Vec<_> = test.filter(|path| train.contains(path)).collect();
    let (first, count) = (shared.first()?.display(), counted(shared.len(), "picture"));
    Some(format!(
        "both in training and test: {count}, the first {first}: what is measured is not of unseen pictures"
    ))
}

/// Warnings of classes with one picture.
fn of_one_picture(sides: &SplitFiles) -> impl Iterator<Item = String> {
    let names = |side: &Files| -> Vec<String> {
        let single = side.iter().filter(|(_, pictures)| pictures.len() == 1);
        single.map(|(name, _)| name.to_string_lossy().into_owned()).collect()
    };
    // A query is compared with the gallery, where its class may have pictures.
    let test = if sides.gallery.is_none() { names(&sides.test) } else { Vec::new() };
    let sides = [
        ("training class", names(&sides.train), "whose positives are the same picture, varied"),
        ("test class", test, "without positives"),
    ];
    sides.into_iter().filter(|(_, names, _)| !names.is_empty()).map(|(side, names, which)| {
        format!("{} with one picture only, {which}: {}", counted(names.len(), side), some_of(&names))
    })
}

/// Divides `classes` into training and test; the second value says whether test classes are also training classes.
fn divide(mut classes: Files, wanted: Option<TrainClasses>, root: &Path) -> Result<(SplitFiles, bool)> {
    let shown = root.display();
    let count = classes.len();
    let holds = format!("--data-root {shown} holds {} with pictures", counted(count, "class"));
    if wanted == Some(TrainClasses::All) {
        if count < 2 {
            return Err(Error::Dataset(format!("{holds}: at least 2 are needed to train")));
        }
        return Ok((SplitFiles { test: classes.clone(), train: classes, gallery: None }, true));
    }
    if count < 4 {
        return Err(Error::Dataset(format!(
            "{holds}: at least 4 are needed, 2 to train and 2 unseen ones to test (--train-classes all trains all)"
        )));
    }
    let first = match wanted {
        Some(TrainClasses::First(first)) => first,
        _ => count / 2,
    };
    if first < 2 || first.saturating_add(2) > count {
        return Err(Error::setting(
            "train-classes",
            first,
            "at least 2, and at least 2 of the classes must remain to test; or all",
        ));
    }
    let border = classes.keys().nth(first).cloned().unwrap_or_default();
    let test = classes.split_off(&border);
    Ok((SplitFiles { train: classes, test, gallery: None }, false))
}

/// The split by the folders `train`, and `test` or `query` and `gallery`, of `root`; none if it has no such folders.
fn split_folders(root: &Path, notes: &mut Notes) -> Result<Option<SplitFiles>> {
    let holds_classes = |name: &str| {
        let folder = root.join(name);
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let is_class =
            entries.map(|entry| entry.path()).filter(|path| !is_hidden(path)).any(|path| path.is_dir());
        is_class.then_some(folder)
    };
    let Some(paths) = SplitPaths::of(holds_classes) else { return Ok(None) };
    for path in sorted_entries(root)? {
        if !paths.contain(&path) {
            notes.ignored.count(if path.is_dir() { "folder" } else { "file" }, " beside train and test");
        }
    }
    let sides = paths.read(|folder| classes_in(folder, root, notes))?;
    for (name, side) in [("train", &sides.train), ("test", &sides.test)] {
        if side.len() < 2 {
            let (shown, holds) = (root.display(), counted(side.len(), "class"));
            return Err(Error::Dataset(format!(
                "{shown}: its {name} side holds {holds}, at least 2 are needed"
            )));
        }
    }
    Ok(Some(sides))
}

/// The class folders in `folder`, which is `root` or one of its `train`, `test`, `query`, `gallery`.
fn classes_in(folder: &Path, root: &Path, notes: &mut Notes) -> Result<Files> {
    let mut classes = Files::new();
    let (mut loose, mut folders) = (0, Vec::new());
    for path in sorted_entries(folder)? {
        if !path.is_dir() {
            if is_picture(&path) && path.is_file() {
                loose += 1;
            } else {
                notes.ignored.note(&path);
            }
            continue;
        }
        let mut pictures = Vec::new();
        for file in sorted_entries(&path)? {
            if is_picture(&file) && file.is_file() {
                pictures.push(file);
            } else {
                notes.ignored.note(&file);
            }
        }
        let name = path.file_name().unwrap_or_default().to_owned();
        if pictures.is_empty() {
            notes.empty.push(file_name(&path));
        } else {
            classes.insert(name, pictures);
        }
        folders.push(path);
    }
    if classes.is_empty() {
        let deeper = deeper_picture(&folders);
        let found = if folder == root && deeper.is_some() { of_another_layout(&folders) } else { None };
        let found = found.unwrap_or_else(|| {
            let found = match (deeper, loose, folders.len()) {
                (Some(first), ..) => {
                    format!("its pictures lie in folders within folders, the first is {}", first.display())
                }
                (None, 0, 0) => "it is empty".to_string(),
                (None, 0, n) => format!("there is no picture in its {}", counted(n, "folder")),
                (None, n, _) => format!("it has {} without a folder per class", counted(n, "picture")),
            };
            format!("{found}; {WANTED}")
        });
        return Err(Error::Dataset(format!("no class in --data-root {}: {found}", folder.display())));
    }
    if loose > 0 {
        notes.warnings.push(format!("{} beside the class folders, passed over", counted(loose, "picture")));
    }
    Ok(classes)
}

/// The first picture below `folders`.
fn deeper_picture(folders: &[PathBuf]) -> Option<PathBuf> {
    let below = |folder| walkdir::WalkDir::new(folder).sort_by_file_name().into_iter().flatten();
    let mut paths = folders.iter().flat_map(below).map(walkdir::DirEntry::into_path);
    paths.find(|path| is_picture(path) && !is_hidden(path) && path.is_file())
}

/// What to do about class folders that are not where they are searched; none if it does not look like that. `folders` are
/// those in --data-root, which hold no pictures themselves but deeper ones.
fn of_another_layout(folders: &[PathBuf]) -> Option<String> {
    let names: Vec<String> = folders.iter().map(|folder| file_name(folder)).collect();
    let sides = ["train", "test", "query", "gallery"];
    let capital = |name: &&String| sides.iter().any(|side| name.eq_ignore_ascii_case(side) && *name != side);
    let capitals: Vec<String> = names.iter().filter(capital).cloned().collect();
    if let Some(first) = capitals.first() {
        let small = first.to_lowercase();
        return Some(format!(
            "it holds {}: the names of a split are in small letters ({small})",
            capitals.join(", ")
        ));
    }
    if names.iter().any(|name| name == "train") {
        let others: Vec<String> = names.iter().filter(|name| *name != "train").cloned().collect();
        let beside = if others.is_empty() { "" } else { &format!(" (beside train: {})", some_of(&others)) };
        return Some(format!(
            "it holds train, but not test, nor query and gallery{beside}: name the test classes' folder test"
        ));
    }
    let [only] = folders else { return None };
    let mut wrapping = only.clone();
    while let [next] = &sorted_entries(&wrapping).ok()?.into_iter().collect::<Vec<_>>()[..]
        && pictures_of(next).is_ok_and(|pictures| pictures.is_empty())
    {
        wrapping = next.clone();
    }
    Some(format!("the class folders lie in its only folder: give --data-root {}", wrapping.display()))
}

/// Collects what to warn the user of.
#[derive(Default)]
struct Notes {
    warnings: Vec<String>,
    empty: Vec<String>,
    ignored: IgnoredFiles,
}

impl Notes {
    fn lines(self) -> Vec<String> {
        let Self { mut warnings, empty, ignored } = self;
        if !empty.is_empty() {
            warnings.push(format!(
                "{} left out, no picture inside: {}",
                counted(empty.len(), "class"),
                some_of(&empty)
            ));
        }
        warnings.extend(ignored.line());
        warnings
    }
}

/// The pictures directly in `folder`, sorted by name.
pub(super) fn pictures_of(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(sorted_entries(folder)?.into_iter().filter(|file| is_picture(file) && file.is_file()).collect())
}

fn sorted_entries(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io("list", folder)));
    paths.filter(|path| !path.as_ref().is_ok_and(|path| is_hidden(path))).collect()
}

/// The first three names, for a message.
fn some_of(names: &[String]) -> String {
    let shown = names.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > 3 { format!("{shown}, ...") } else { shown }
}
