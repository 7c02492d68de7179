//! Embeddings in .safetensors files, with the settings they are to be mined with.
//!
//! `embeddings` [B, D] f32 and `labels` [B] i64; in the rectangular form `references` [N, D] f32 and
//! `reference_labels` [N] i64. Metadata: those of SPEC 7 for other settings than the defaults, `density`, `noise`.

use std::path::Path;

use super::embeddings::Embeddings;
use ddtas::loss::LossSettings;
use ddtas_cases::{metadata_of, settings_of};
use ddtas_io::tensors::{TensorFile, write_rows};
use ddtas_io::{Error, Result};

/// Reads rows, their labels, and the settings they are to be mined with.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it does not hold what it should.
pub fn read(path: &Path) -> Result<Embeddings> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let file = TensorFile::parse(path, &bytes)?;
    let references = file.has("references").then(|| file.rows("references", "reference_labels"));
    let noise = file.metadata.get("noise").and_then(|noise| noise.parse().ok());
    let stated = file.metadata.contains_key("gamma");
    Ok(Embeddings {
        anchors: file.rows("embeddings", "labels")?,
        references: references.transpose()?,
        settings: if stated { settings_of(path, &file.metadata)? } else { LossSettings::default() },
        density: file.metadata.get("density").cloned(),
        noise,
    })
}

pub(super) fn write(path: &Path, embeddings: &Embeddings) -> Result<()> {
    let anchors = &embeddings.anchors;
    let mut sides = vec![("embeddings", &anchors.values, Some(("labels", anchors.labels.as_slice())))];
    sides.extend(embeddings.references.as_ref().map(|references| {
        ("references", &references.values, Some(("reference_labels", references.labels.as_slice())))
    }));
    let mut metadata = metadata_of(&embeddings.settings).map_err(|reason| Error::format(path, reason))?;
    metadata.extend(embeddings.density.clone().map(|density| ("density".to_owned(), density)));
    metadata.extend(embeddings.noise.map(|noise| ("noise".to_owned(), noise.to_string())));
    write_rows(path, &sides, &metadata)
}

#[cfg(test)]
mod tests {
    use super::super::{Density, EmbeddedRows, draw};
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.safetensors");
        for references in [None, Some(11)] {
            let written = draw(7, references, 3, Density::All, 0.25, 5);
            write(&path, &written).unwrap();
            let got = read(&path).unwrap();
            assert_eq!(
                (got.anchors.values, got.anchors.labels),
                (written.anchors.values, written.anchors.labels)
            );
            let values = |rows: Option<EmbeddedRows>| rows.map(|rows| (rows.values, rows.labels));
            assert_eq!(values(got.references), values(written.references));
            assert_eq!(
                (got.settings, got.density, got.noise),
                (written.settings, written.density, written.noise)
            );
        }
    }
}
