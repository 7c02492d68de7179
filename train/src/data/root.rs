//! Finds the files of a published data set, and reports missing ones.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ddtas_io::console::counted;
use rayon::prelude::*;

use super::archive::{Unpacking, is_archive, unpack};
use super::dataset::{DEFAULT_CACHE_BYTES, Dataset, Source, Split};
use super::decode::PixelBox;
use crate::{Error, Result};

/// Constants of a published data set.
#[derive(Debug)]
pub(super) struct Published {
    /// Its name in the literature.
    pub name: &'static str,
    /// Address of the page to download it from.
    pub page: &'static str,
    /// Its archives, and the folder in each: an archive is unpacked if that folder is missing.
    pub archives: &'static [(&'static str, &'static str)],
    /// Folders at the top of an archive that may contain the set's files.
    pub wrappers: &'static [&'static str],
    /// Numbers of pictures and classes of the whole set.
    pub extent: (usize, usize),
    /// K of Recall@K.
    pub recall_at: &'static [usize],
}

/// The classes of one split: name and pictures of each.
pub(super) type Classes = Vec<(String, Vec<Source>)>;

/// A data root: the folder or archive that the user gave.
pub(super) struct Root {
    set: &'static Published,
    given: PathBuf,
    /// Folders that files are searched in, in this order.
    folders: Vec<PathBuf>,
    /// The folder of the archive that was given as root; it may contain unrelated files.
    beside: Option<PathBuf>,
}

impl Root {
    /// Opens `given`: a folder with the set's files or archives, or one of the archives; the other files of
    /// the set may then be in the same folder as that archive. Archives are unpacked on first use.
    ///
    /// # Errors
    /// [`Error::Dataset`] if `given` does not exist or is neither; errors of [`unpack`].
    pub fn open(given: &Path, set: &'static Published, unpacking: &mut Unpacking<'_>) -> Result<Self> {
        let mut root = Self { set, given: given.to_path_buf(), folders: Vec::new(), beside: None };
        if given.is_dir() {
            root.add(given.to_path_buf());
        } else if !given.exists() {
            return Err(root.refuse("does not exist"));
        } else if is_archive(given) {
            root.add(unpack(given, unpacking)?);
            // The parent of a bare file name is the empty path.
            let parent = given.parent().filter(|parent| !parent.as_os_str().is_empty());
            root.beside = Some(parent.unwrap_or(Path::new(".")).to_path_buf());
            root.add(root.beside.clone().unwrap_or_default());
        } else {
            return Err(root.refuse("is neither a folder nor a .tgz, .tar.gz, .tar or .zip"));
        }
        // Unpacked folders are searched for archives, too.
        let mut next = 0;
        while let Some(folder) = root.folders.get(next).cloned() {
            next += 1;
            for (archive, product) in set.archives {
                let archive = folder.join(archive);
                if archive.is_file() && archive != given && !folder.join(product).exists() {
                    root.add(unpack(&archive, unpacking)?);
                }
            }
        }
        Ok(root)
    }

    fn add(&mut self, folder: PathBuf) {
        self.folders.push(folder.clone());
        let wrapped = self.set.wrappers.iter().map(|wrapper| folder.join(wrapper));
        self.folders.extend(wrapped.filter(|folder| folder.is_dir()));
    }

    /// The folders that contain only files of the set, in order.
    pub fn own_folders(&self) -> impl Iterator<Item = &PathBuf> {
        self.folders.iter().filter(|folder| self.beside.as_ref() != Some(folder))
    }

    /// The first of `names`, paths within the set, that exists.
    pub fn find(&self, names: &[&str]) -> Option<PathBuf> {
        self.folders
            .iter()
            .flat_map(|folder| names.iter().map(|name| folder.join(name)))
            .find(|path| path.exists())
    }

    /// As [`find`](Self::find).
    ///
    /// # Errors
    /// [`Error::Dataset`] if none exists: it names the first.
    pub fn need(&self, names: &[&str]) -> Result<PathBuf> {
        self.find(names).ok_or_else(|| self.refuse(&format!("holds no {}", names[0])))
    }

    /// Reads the first of `names` that exists, without `headings` lines at its top, each line split into `COLUMNS` words.
    ///
    /// # Errors
    /// [`Error::Dataset`] if it is missing; [`Format`](ddtas_io::Error::Format) for another number of words, or no lines.
    pub fn table<const COLUMNS: usize>(&self, names: &[&str], headings: usize) -> Result<Table<COLUMNS>> {
        let path = self.need(names)?;
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let mut rows = Vec::new();
        for (number, line) in
            text.lines().enumerate().skip(headings).filter(|(_, line)| !line.trim().is_empty())
        {
            let mut words = line.split_whitespace().map(str::to_string);
            let row: Option<Vec<String>> = (0..COLUMNS).map(|_| words.next()).collect();
            match row
                .and_then(|row| <[String; COLUMNS]>::try_from(row).ok())
                .filter(|_| words.next().is_none())
            {
                Some(row) => rows.push((number + 1, row)),
                None => {
                    return Err(Error::format(path, format!("line {}: not {COLUMNS} columns", number + 1)));
                }
            }
        }
        if rows.is_empty() {
            return Err(Error::format(path, "lists nothing: it was cut short"));
        }
        Ok(Table { path, rows })
    }

    /// An [`Error::Dataset`] about this root that says where to download the set.
    pub fn refuse(&self, what: &str) -> Error {
        let Published { name, page, .. } = self.set;
        Error::Dataset(format!(
            "--data-root {} {what}: get {name} from {page}, see docs/datasets.md",
            self.given.display()
        ))
    }

    /// Makes a data set of pictures with the numbers of their classes. Those up to `last` train. A class without `name` is `class 7`.
    ///
    /// # Errors
    /// Those of [`dataset`](Self::dataset).
    pub fn by_number(
        &self,
        pictures: Vec<(usize, Source)>,
        last: usize,
        name: impl Fn(usize) -> Option<String>,
    ) -> Result<Dataset> {
        let mut train: BTreeMap<usize, Vec<Source>> = BTreeMap::new();
        for (class, source) in pictures {
            train.entry(class).or_default().push(source);
        }
        let test = train.split_off(&(last + 1));
        let named = |side: BTreeMap<usize, Vec<Source>>| -> Classes {
            let name = |class| name(class).unwrap_or_else(|| format!("class {class}"));
            side.into_iter().map(|(class, pictures)| (name(class), pictures)).collect()
        };
        self.dataset(named(train), named(test), None)
    }

    /// Makes a data set of these classes after checking that all their files exist.
    ///
    /// # Errors
    /// [`Error::Dataset`] for missing pictures, fewer than two classes on a side, and a test split with nothing to retrieve.
    pub fn dataset(&self, train: Classes, test: Classes, gallery: Option<Classes>) -> Result<Dataset> {
        let sides = || [Some(&train), Some(&test), gallery.as_ref()].into_iter().flatten();
        let files: Vec<&Path> =
            sides().flatten().flat_map(|(_, pictures)| pictures.iter().map(Source::path)).collect();
        let missing: Vec<&&Path> = files.par_iter().filter(|path| !path.is_file()).collect();
        if let Some(first) = missing.first() {
            let (count, all) = (missing.len(), files.len());
            return Err(self.refuse(&format!(
                "is incomplete: {count} of {all} pictures are missing, the first is {}",
                first.display()
            )));
        }
        for (side, classes) in [("training", &train), ("test", &test)] {
            if classes.len() < 2 {
                let found = counted(classes.len(), "class");
                return Err(
                    self.refuse(&format!("holds {side} pictures of {found}, and at least 2 are needed"))
                );
            }
        }
        let (pictures, classes) = (files.len(), train.len() + test.len());
        let mut warnings = Vec::new();
        if (pictures, classes) != self.set.extent {
            let (all_pictures, all_classes) = self.set.extent;
            warnings.push(format!(
                "{pictures} pictures of {classes} classes; the complete {} has {all_pictures} of {all_classes}",
                self.set.name
            ));
        }
        let split = |classes| Arc::new(Split::from_sources(classes, DEFAULT_CACHE_BYTES));
        let dataset = Dataset {
            name: self.set.name.to_lowercase(),
            train: split(train),
            test: split(test),
            gallery: gallery.map(split),
            seen: false,
            recall_at: self.set.recall_at,
            warnings,
        };
        if !dataset.has_answers() {
            return Err(self.refuse("has no test class with two pictures, nothing to retrieve"));
        }
        Ok(dataset)
    }
}

/// A list file of a data set.
pub(super) struct Table<const COLUMNS: usize> {
    path: PathBuf,
    /// Line number and words of each line.
    rows: Vec<(usize, [String; COLUMNS])>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// Converts each row with `read`, which returns the reason if it cannot.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) with the line's number.
    pub fn read<T>(&self, mut read: impl FnMut(&[String; COLUMNS]) -> Result<T, String>) -> Result<Vec<T>> {
        let row = |(number, row): &(usize, [String; COLUMNS])| {
            read(row).map_err(|reason| Error::format(&self.path, format!("line {number}: {reason}")))
        };
        self.rows.iter().map(row).collect()
    }

    /// The folder of the list.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }
}

/// The picture at `path`, or its part in the box of `key` if there are `boxes`; `missing` is the error if that one has none.
pub(super) fn source<K: Eq + Hash>(
    path: PathBuf,
    key: &K,
    boxes: Option<&HashMap<K, PixelBox>>,
    missing: impl Fn() -> String,
) -> Result<Source, String> {
    let Some(boxes) = boxes else { return Ok(Source::File(path)) };
    let area = *boxes.get(key).ok_or_else(missing)?;
    Ok(Source::Part { path, area })
}

/// Parses a number of a list; `what` describes it in the error.
pub(super) fn number<T: std::str::FromStr>(word: &str, what: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("{word:?} is not a {what}"))
}

/// Checks that a path of a list does not lead out of the data set.
pub(super) fn relative(word: &str) -> Result<&Path, String> {
    let path = Path::new(word);
    let inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if inside { Ok(path) } else { Err(format!("the path {word:?} leads out of the data set")) }
}
