//! Files of embeddings, in formats that vector indexes read.
//!
//! .safetensors: `embeddings` [N, D] f32 and `labels` [N] i64; for queries with a separate gallery also
//! `references` [M, D] and `reference_labels` [M]. The metadata may contain `names`, a JSON array with a name
//! for each row. Other types of floats and integers are read as well.
//!
//! .npy: only the matrix; everything else is in a .json of the same name, or the labels in `NAME.labels.npy`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;

use super::npy;
use crate::error::fits;
use crate::{Error, Result};
use ddtas_io::files::{check_place, read, write_together};
use ddtas_io::tensors::{EmbeddedRows, TensorFile, file_has, write_rows};

/// Key of the rows' names in the metadata.
const NAMES: &str = "names";

/// Largest difference from 1 of a norm that counts as 1: the tolerance of the backends for float32 rows.
const UNIT: f64 = 1e-3;

/// Embeddings of a test set or a collection of pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingsFile {
    /// `[N, D]`.
    pub values: Array2<f32>,
    /// Label of each row, if they are known.
    pub labels: Option<Vec<i64>>,
    /// Name of each row; empty if the rows have no names.
    pub names: Vec<String>,
    /// The other metadata of the header.
    pub metadata: BTreeMap<String, String>,
}

/// Contents of the .json for a .npy.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct Beside {
    names: Vec<String>,
    labels: Option<Vec<i64>>,
    metadata: BTreeMap<String, String>,
    /// CRC-32 of the .npy; none in files of earlier versions and of other programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    crc32: Option<String>,
}

/// The checksum of a .npy in its .json.
fn checksum(matrix: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(matrix))
}

/// Checks that the .json for the .npy `path` can be written, and is not a file of another program.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused).
pub(super) fn check_beside(path: &Path) -> Result<()> {
    let beside = path.with_extension("json");
    check_place("out", &beside)?;
    let ours = |text: Vec<u8>| {
        let object =
            serde_json::from_slice::<serde_json::Map<_, serde_json::Value>>(&text).unwrap_or_default();
        object.contains_key("names") && serde_json::from_slice::<Beside>(&text).is_ok()
    };
    if beside.is_file() && !std::fs::read(&beside).is_ok_and(ours) {
        let reason =
            format!("{} would be overwritten, which embed did not write; give another", beside.display());
        return Err(Error::misuse("out", path.display(), reason));
    }
    Ok(())
}

/// Checks that the .safetensors `path`, if it is there, is not another file than one of embeddings, such as a checkpoint.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused); [`Io`](ddtas_io::Error::Io) if it cannot be read.
pub(super) fn check_replaced(path: &Path) -> Result<()> {
    let good = match std::fs::metadata(path) {
        Ok(found) if found.is_file() => found.len() == 0 || file_has(path, "embeddings")?,
        _ => true,
    };
    fits(good, "out", path.display(), "would be overwritten, and holds no embeddings: give another")
}

/// Format of a file, by its extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `.safetensors`
    Safetensors,
    /// `.npy`, with a `.json` of the same name.
    Npy,
}

impl Format {
    /// The format of `path`.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) for another extension.
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default();
        if extension.eq_ignore_ascii_case("safetensors") {
            Ok(Self::Safetensors)
        } else if extension.eq_ignore_ascii_case("npy") {
            Ok(Self::Npy)
        } else {
            Err(Error::format(path, "give a name that ends in .safetensors or .npy"))
        }
    }
}

impl EmbeddingsFile {
    /// The file, and those for the other data of a .npy: its .json, and its labels.
    #[must_use]
    pub fn files(path: &Path) -> [PathBuf; 3] {
        [path.to_owned(), path.with_extension("json"), path.with_extension("labels.npy")]
    }

    /// Reads a .npy or a .safetensors file. Rows are scaled to unit length, since similarities are cosines.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) if it cannot be read; [`Format`](ddtas_io::Error::Format) if it contains
    /// something else, or a row that is zero, NaN or infinite.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::read_with_gallery(path)?.0)
    }

    /// Reads a file, and the rows that its queries are compared with; if none, each is compared with the other rows.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_with_gallery(path: &Path) -> Result<(Self, Option<EmbeddedRows>)> {
        let bytes = read(path)?;
        if Format::of(path).is_ok_and(|format| format == Format::Npy) {
            return Ok((Self::read_npy(path, &bytes)?, None));
        }
        let file = TensorFile::parse(path, &bytes)?;
        let mut values = file.matrix("embeddings")?;
        if values.is_empty() {
            return Err(Error::format(path, "tensor `embeddings` is empty"));
        }
        to_unit_rows(path, "embeddings", &mut values)?;
        let labels = file.has("labels").then(|| file.integers("labels", values.nrows())).transpose()?;
        let mut gallery =
            file.has("references").then(|| file.rows("references", "reference_labels")).transpose()?;
        if let Some(gallery) = &mut gallery {
            if gallery.values.ncols() != values.ncols() || gallery.values.is_empty() {
                let (rows, dim) = gallery.values.dim();
                let reason =
                    format!("`references` is {rows} x {dim}; `embeddings` has {} dimensions", values.ncols());
                return Err(Error::format(path, reason));
            }
            to_unit_rows(path, "references", &mut gallery.values)?;
        }
        let mut metadata = file.metadata;
        let names = match metadata.remove(NAMES) {
            Some(text) => serde_json::from_str(&text)
                .map_err(|_| Error::format(path, "metadata `names` is not a JSON array of names"))?,
            None => Vec::new(),
        };
        Ok((Self { values, labels, names, metadata }.checked(path)?, gallery))
    }

    fn read_npy(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut values = npy::matrix(path, bytes)?;
        if values.is_empty() {
            return Err(Error::format(path, "the matrix is empty"));
        }
        to_unit_rows(path, "embeddings", &mut values)?;
        let [_, json, labels] = Self::files(path);
        let beside: Beside = match std::fs::read(&json) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Error::format(&json, format!("not what `embed` writes: {error}")))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Beside::default(),
            Err(error) => return Err(Error::io("read", &json)(error)),
        };
        if beside.crc32.as_ref().is_some_and(|written| *written != checksum(bytes)) {
            let json = json.display();
            let reason = format!(
                "is not the matrix that {json} belongs to: embed the pictures again, or remove `crc32` from {json} if its names and \
                 labels are those of these rows"
            );
            return Err(Error::format(path, reason));
        }
        let labels = match beside.labels {
            None if labels.is_file() => {
                let bytes = std::fs::read(&labels).map_err(Error::io("read", &labels))?;
                Some(npy::labels(&labels, &bytes)?)
            }
            known => known,
        };
        let Beside { names, metadata, .. } = beside;
        Self { values, labels, names, metadata }.checked(path)
    }

    /// Checks that there are as many names and labels as rows, or none.
    fn checked(self, path: &Path) -> Result<Self> {
        let rows = self.values.nrows();
        let labels = self.labels.as_ref().map_or(rows, Vec::len);
        let names = if self.names.is_empty() { rows } else { self.names.len() };
        for (what, count) in [("names", names), ("labels", labels)] {
            if count != rows {
                return Err(Error::format(path, format!("holds {count} {what} for {rows} rows")));
            }
        }
        Ok(self)
    }

    /// Writes the file atomically, in the format of its extension; a .npy together with its .json.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) for another extension; [`Io`](ddtas_io::Error::Io), for example if the
    /// disk is full.
    pub fn write(&self, path: &Path) -> Result<()> {
        match Format::of(path)? {
            Format::Safetensors => self.write_safetensors(path),
            Format::Npy => self.write_npy(path),
        }
    }

    fn write_safetensors(&self, path: &Path) -> Result<()> {
        let mut metadata = self.metadata.clone();
        if !self.names.is_empty() {
            let names = serde_json::to_string(&self.names).map_err(|e| Error::format(path, e.to_string()))?;
            metadata.insert(NAMES.into(), names);
        }
        let labels = self.labels.as_deref().map(|labels| ("labels", labels));
        Ok(write_rows(path, &[("embeddings", &self.values, labels)], &metadata)?)
    }

    fn write_npy(&self, path: &Path) -> Result<()> {
        let cannot = |reason: String| Error::format(path, format!("cannot be written as .npy ({reason})"));
        let Self { names, labels, metadata, .. } = self.clone();
        let matrix = npy::write(&self.values);
        let beside = Beside { names, labels, metadata, crc32: Some(checksum(&matrix)) };
        let text = serde_json::to_vec(&beside).map_err(|e| cannot(e.to_string()))?;
        Ok(write_together(&[(&path.with_extension("json"), &text), (path, &matrix)])?)
    }
}

/// Scales every row to unit length. Rows whose length is within `UNIT` of 1 keep their bits.
fn to_unit_rows(path: &Path, tensor: &str, values: &mut Array2<f32>) -> Result<()> {
    for (index, mut row) in values.outer_iter_mut().enumerate() {
        let norm = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
        if !norm.is_finite() || norm < f64::from(f32::MIN_POSITIVE) {
            let what = if norm.is_finite() { "is zero" } else { "holds a NaN or an infinity" };
            return Err(Error::format(path, format!("row {index} of tensor `{tensor}` {what}")));
        }
        if (norm - 1.0).abs() > UNIT {
            row.mapv_inplace(|value| (f64::from(value) / norm) as f32);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn example() -> EmbeddingsFile {
        EmbeddingsFile {
            values: array![[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]],
            labels: Some(vec![4, -1, 4]),
            names: vec!["a.jpg".into(), "b/ü \"x\".png".into(), "c\nd.jpg".into()],
            metadata: BTreeMap::from([("root".to_owned(), "pictures".to_owned())]),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.safetensors");
        example().write(&path).unwrap();
        assert_eq!(EmbeddingsFile::read_with_gallery(&path).unwrap(), (example(), None));
    }

    /// Writes queries of two dimensions, and a gallery.
    fn write_with_gallery(path: &Path, gallery: &Array2<f32>) {
        let queries = array![[1.0, 0.0], [0.6, 0.8]];
        let sides = [
            ("embeddings", &queries, Some(("labels", &[4, 5][..]))),
            ("references", gallery, Some(("reference_labels", &[5, 4, 5][..gallery.nrows()]))),
        ];
        write_rows(path, &sides, &BTreeMap::new()).unwrap();
    }

    #[test]
    fn queries_may_have_a_gallery_of_as_many_dimensions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.safetensors");
        write_with_gallery(&path, &array![[0.0, 1.0], [3.0, 4.0], [-1.0, 0.0]]);
        let (file, gallery) = EmbeddingsFile::read_with_gallery(&path).unwrap();
        assert_eq!(file.labels, Some(vec![4, 5]));
        let unit = array![[0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]];
        assert_eq!(gallery, Some(EmbeddedRows { values: unit, labels: vec![5, 4, 5] }));
        write_with_gallery(&path, &array![[1.0]]);
        let said = EmbeddingsFile::read(&path).unwrap_err().to_string();
        assert!(said.contains("`references` is 1 x 1; `embeddings` has 2 dimensions"), "{said}");
    }

    #[test]
    fn npy_holds_the_matrix_and_json_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.npy");
        example().write(&path).unwrap();
        assert_eq!(EmbeddingsFile::read(&path).unwrap(), example());
        // The bytes that numpy.save writes for this matrix.
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }";
        let mut wanted = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
        wanted.extend(format!("{header:<117}\n").bytes());
        wanted.extend([1.0f32, 0.0, 0.6, 0.8, 0.0, -1.0].iter().flat_map(|value| value.to_le_bytes()));
        assert_eq!(std::fs::read(&path).unwrap(), wanted);
        let text = std::fs::read_to_string(folder.path().join("e.json")).unwrap();
        let beside: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(beside["names"][2], "c\nd.jpg");
        assert_eq!(beside["labels"][1], -1);
        assert_eq!(beside["metadata"]["root"], "pictures");
        assert!(example().write(&folder.path().join("e.csv")).is_err());
    }

    #[test]
    fn a_npy_with_the_json_of_another_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        example().write(&at("e.npy")).unwrap();
        let other = EmbeddingsFile { values: array![[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], ..example() };
        other.write(&at("f.npy")).unwrap();
        std::fs::copy(at("f.json"), at("e.json")).unwrap();
        let said = EmbeddingsFile::read(&at("e.npy")).unwrap_err().to_string();
        assert!(said.contains("e.npy: is not the matrix that"), "{said}");
        // As earlier versions wrote it.
        let text = std::fs::read_to_string(at("e.json")).unwrap();
        let mut beside: serde_json::Map<_, _> = serde_json::from_str(&text).unwrap();
        beside.remove("crc32").unwrap();
        std::fs::write(at("e.json"), serde_json::to_vec(&beside).unwrap()).unwrap();
        assert_eq!(EmbeddingsFile::read(&at("e.npy")).unwrap(), example());
    }

    #[test]
    fn rows_of_any_length_become_unit_rows_and_rows_without_direction_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.safetensors");
        let with = |values| EmbeddingsFile { values, ..example() };
        with(array![[3.0, 4.0], [0.6, 0.8], [0.0, 1e-20]]).write(&path).unwrap();
        let read = EmbeddingsFile::read(&path).unwrap();
        assert_eq!(read.values, array![[0.6, 0.8], [0.6, 0.8], [0.0, 1.0]]);
        for bad in [0.0, f32::NAN, f32::INFINITY] {
            with(array![[1.0, 0.0], [bad, 0.0], [1.0, 0.0]]).write(&path).unwrap();
            let said = EmbeddingsFile::read(&path).unwrap_err().to_string();
            assert!(said.contains("row 1 of tensor `embeddings`"), "{said}");
        }
    }

    #[test]
    fn files_that_hold_something_else_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.safetensors");
        let wrong = [
            EmbeddingsFile { names: vec!["one".into()], ..example() },
            EmbeddingsFile { labels: Some(vec![1]), ..example() },
        ];
        for (file, what) in wrong.iter().zip(["1 names for 3 rows", "one entry for each"]) {
            file.write(&path).unwrap();
            let said = EmbeddingsFile::read(&path).unwrap_err().to_string();
            assert!(said.contains(what) && said.contains("e.safetensors"), "{said}");
        }
        std::fs::write(&path, b"nothing").unwrap();
        assert!(EmbeddingsFile::read(&path).unwrap_err().to_string().contains("not a safetensors file"));
        assert!(matches!(
            EmbeddingsFile::read(&folder.path().join("none")),
            Err(Error::Program(ddtas_io::Error::Io { .. }))
        ));
    }
}
