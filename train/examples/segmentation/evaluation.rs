//! Measures how well pixel embeddings distinguish materials on unseen scenes.

use ddtas::backend::{Backend, Nearest};
use ddtas::loss::Rows;
use ndarray::{Array2, ArrayView2, s};

use crate::materials::Material;

/// Accuracy of classifying pixels by their embeddings.
pub struct Accuracy {
    /// Share of pixels whose nearest prototype (mean embedding of a material on training scenes) is of their material.
    pub prototype: f64,
    /// Share of pixels whose most similar pixel of other scenes is of their material.
    pub retrieval: f64,
    /// Material of the nearest prototype for every pixel, including boundaries.
    pub predicted: Vec<usize>,
}

/// Mean embedding of every material, scaled to unit length, without ignored pixels.
pub fn prototypes(embeddings: ArrayView2<'_, f32>, labels: &[i64]) -> Array2<f32> {
    let mut sums = Array2::<f32>::zeros((Material::ALL.len(), embeddings.ncols()));
    for (row, &label) in embeddings.outer_iter().zip(labels) {
        if let Ok(label) = usize::try_from(label) {
            let mut sum = sums.row_mut(label);
            sum += &row;
        }
    }
    for mut sum in sums.outer_iter_mut() {
        let norm = sum.dot(&sum).sqrt();
        sum /= norm.max(f32::MIN_POSITIVE);
    }
    sums
}

/// Evaluates embeddings of test scenes. For retrieval, pixels of the first half are queries and those of the
/// second half the gallery.
///
/// # Errors
/// Errors of [`Backend::nearest`].
pub fn evaluate(
    backend: &mut dyn Backend,
    prototypes: &Array2<f32>,
    embeddings: ArrayView2<'_, f32>,
    labels: &[i64],
) -> ddtas_train::Result<Accuracy> {
    let scores = embeddings.dot(&prototypes.t());
    let best = |row: ndarray::ArrayView1<'_, f32>| {
        (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0)
    };
    let predicted: Vec<usize> = scores.outer_iter().map(best).collect();
    let prototype =
        share(labels.iter().zip(&predicted).map(|(&label, &predicted)| (label, predicted as i64)));

    let middle = labels.len() / 2;
    let halves = [s![..middle, ..], s![middle.., ..]].map(|half| embeddings.slice_move(half));
    let queries = Rows::new(halves[0], &labels[..middle]);
    let bank = Rows::new(halves[1], &labels[middle..]);
    let nearest = backend.nearest(&queries, Some(&bank), 1)?;
    let found = nearest.indices.column(0);
    let answer = |&index: &u32| if index == Nearest::NONE { -1 } else { bank.labels[index as usize] };
    let retrieval = share(queries.labels.iter().copied().zip(found.iter().map(answer)));
    Ok(Accuracy { prototype, retrieval, predicted })
}

/// Share of equal pairs among those whose first label is not ignored.
fn share(pairs: impl Iterator<Item = (i64, i64)>) -> f64 {
    let (right, all) = pairs
        .filter(|(label, _)| *label >= 0)
        .fold((0usize, 0usize), |(right, all), (label, got)| (right + usize::from(label == got), all + 1));
    right as f64 / all.max(1) as f64
}
