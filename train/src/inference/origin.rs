//! The paths of embedded pictures in a file's metadata: their folder, and the names that are not valid UTF-8.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::pictures::bytes_of;
use crate::data::name_of_bytes;
use crate::{Error, Result};

const ROOT: &str = "ddtas.root";
/// Keys of the root as bytes, and of the names as bytes by row, for those that are not valid UTF-8.
const ROOT_BYTES: &str = "ddtas.root.bytes";
const NAME_BYTES: &str = "ddtas.names.bytes";

/// The metadata for the pictures `paths` in `root`.
pub(super) fn metadata<'a>(
    root: &'a Path,
    paths: impl Iterator<Item = &'a Path>,
) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::from([(ROOT.to_owned(), root.display().to_string())]);
    let bytes = bytes_of(paths);
    if !bytes.is_empty() {
        metadata.insert(NAME_BYTES.to_owned(), serde_json::json!(bytes).to_string());
    }
    if let Some(bytes) = bytes_of(std::iter::once(root)).get(&0) {
        metadata.insert(ROOT_BYTES.to_owned(), serde_json::json!(bytes).to_string());
    }
    metadata
}

/// The root and names in a file's metadata.
pub(super) struct Origin {
    root: Option<PathBuf>,
    names: BTreeMap<usize, Vec<u8>>,
}

impl Origin {
    /// Reads the `metadata` of the file `path`.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if they are not in the form of [`metadata`].
    pub fn read(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let root = match parsed::<Vec<u8>>(path, metadata, ROOT_BYTES)? {
            Some(bytes) => Some(name_of_bytes(&bytes).into()),
            None => metadata.get(ROOT).map(PathBuf::from),
        };
        Ok(Self { root, names: parsed(path, metadata, NAME_BYTES)?.unwrap_or_default() })
    }

    /// Path of the picture of a row with this `name`; none if the metadata have no root.
    pub fn path(&self, row: usize, name: &str) -> Option<PathBuf> {
        let name = self.names.get(&row).map_or_else(|| name.into(), |bytes| name_of_bytes(bytes));
        self.root.as_ref().map(|root| root.join(name))
    }
}

fn parsed<T: serde::de::DeserializeOwned>(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    key: &str,
) -> Result<Option<T>> {
    let bad = |_| Error::format(path, format!("metadata `{key}` is not what `embed` writes"));
    metadata.get(key).map(|text| serde_json::from_str(text).map_err(bad)).transpose()
}

#[cfg(all(test, unix))]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn names_of_any_bytes_are_found_again_and_damaged_ones_refused() {
        let (root, odd) = (Path::new(OsStr::from_bytes(b"r\xe9")), Path::new(OsStr::from_bytes(b"\xe9.png")));
        let mut told = metadata(root, [Path::new("a.png"), odd].into_iter());
        let file = Path::new("file");
        let origin = Origin::read(file, &told).unwrap();
        assert_eq!(origin.path(0, "a.png"), Some(root.join("a.png")));
        assert_eq!(origin.path(1, "?.png"), Some(root.join(odd)));
        assert_eq!(Origin::read(file, &BTreeMap::new()).unwrap().path(0, "a.png"), None);
        told.insert(NAME_BYTES.to_owned(), "{\"1\": [300]}".to_owned());
        let said = Origin::read(file, &told).err().unwrap().to_string();
        assert_eq!(said, "file: metadata `ddtas.names.bytes` is not what `embed` writes");
    }
}
