//! Embeddings in .safetensors files, with the settings they are to be mined with.
//!
//! `embeddings` [B, D] f32 and `labels` [B] i64; in the rectangular form `references` [N, D] f32 and
//! `reference_labels` [N] i64. Metadata: those of SPEC 7 for other settings than the defaults, `density`, `noise`.

use std::collections::HashMap;
use std::path::Path;

use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::embeddings::{EmbeddedRows, Embeddings};
use crate::cases::settings_of;
use crate::files::write_atomic;
use crate::loss::{LossSettings, Mining};
use crate::{Error, Result};

/// Reads rows, their labels, and the settings they are to be mined with.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it does not hold what it should.
pub fn read(path: &Path) -> Result<Embeddings> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let not_safetensors = |e| Error::format(path, format!("not a safetensors file ({e})"));
    let tensors = SafeTensors::deserialize(&bytes).map_err(not_safetensors)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(not_safetensors)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let has_references = tensors.tensor("references").is_ok();
    let references = has_references.then(|| rows(path, &tensors, "references", "reference_labels"));
    let noise = metadata.get("noise").and_then(|noise| noise.parse().ok());
    let stated = metadata.contains_key("gamma");
    Ok(Embeddings {
        anchors: rows(path, &tensors, "embeddings", "labels")?,
        references: references.transpose()?,
        settings: if stated { settings_of(path, &metadata)? } else { LossSettings::default() },
        density: metadata.get("density").cloned(),
        noise,
    })
}

fn rows(path: &Path, tensors: &SafeTensors<'_>, values: &str, labels: &str) -> Result<EmbeddedRows> {
    let bad = |reason| Error::format(path, reason);
    let tensor = |name: &str, dtype| match tensors.tensor(name) {
        Ok(tensor) if tensor.dtype() == dtype => Ok(tensor),
        Ok(tensor) => Err(bad(format!("tensor `{name}` holds {:?}, not {dtype:?}", tensor.dtype()))),
        Err(_) => Err(bad(format!("there is no tensor `{name}`"))),
    };
    let (matrix, classes) = (tensor(values, Dtype::F32)?, tensor(labels, Dtype::I64)?);
    let [count, dim] = *matrix.shape() else {
        return Err(bad(format!("tensor `{values}` has {} dimensions, not 2", matrix.shape().len())));
    };
    if *classes.shape() != [count] {
        return Err(bad(format!("tensor `{labels}` must have one entry for each of the {count} rows")));
    }
    let floats = matrix.data().as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let values = Array2::from_shape_vec((count, dim), floats).map_err(|e| bad(format!("`{values}`: {e}")))?;
    let labels = classes.data().as_chunks().0.iter().map(|word| i64::from_le_bytes(*word)).collect();
    Ok(EmbeddedRows { values, labels })
}

pub(super) fn write(path: &Path, embeddings: &Embeddings) -> Result<()> {
    let sides = [("embeddings", "labels", Some(&embeddings.anchors))];
    let sides = sides.into_iter().chain([("references", "reference_labels", embeddings.references.as_ref())]);
    let mut data = Vec::new();
    for (values, labels, rows) in sides {
        let Some(EmbeddedRows { values: matrix, labels: classes }) = rows else { continue };
        let (count, dim) = matrix.dim();
        let floats: Vec<u8> = matrix.iter().flat_map(|x| x.to_le_bytes()).collect();
        let integers: Vec<u8> = classes.iter().flat_map(|x| x.to_le_bytes()).collect();
        data.push((values, Dtype::F32, vec![count, dim], floats));
        data.push((labels, Dtype::I64, vec![count], integers));
    }
    let cannot = |e| Error::format(path, format!("cannot be written as safetensors ({e})"));
    let mut views = Vec::new();
    for (name, dtype, shape, bytes) in &data {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(cannot)?));
    }
    let bytes = safetensors::serialize(views, Some(metadata(embeddings))).map_err(cannot)?;
    write_atomic(path, &bytes)
}

fn metadata(embeddings: &Embeddings) -> HashMap<String, String> {
    let settings = &embeddings.settings;
    let mut entries = vec![
        ("adaptive", (settings.mining == Mining::AtAsms).to_string()),
        ("gamma", settings.gamma.to_string()),
        ("neg_ratio", settings.negative_ratio.to_string()),
        ("probe_neg_ratio", settings.probe_ratio.to_string()),
        ("tolerance", settings.tolerance.to_string()),
        ("alpha", settings.alpha.to_string()),
        ("beta", settings.beta.to_string()),
        ("lam_pos", settings.lambda_pos.to_string()),
        ("lam_neg", settings.lambda_neg.to_string()),
    ];
    entries.extend(embeddings.density.clone().map(|density| ("density", density)));
    entries.extend(embeddings.noise.map(|noise| ("noise", noise.to_string())));
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Density, draw};
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
