//! Retrieval on unseen classes (SPEC 6): what training is judged by.

use crate::backend::{Backend, Nearest};
use crate::loss::Rows;
use crate::{Error, Result};

/// Share of queries whose K nearest neighbours hold one of their class.
#[derive(Debug, Clone, PartialEq)]
pub struct Recall {
    /// K and Recall@K in 0 to 1, ascending in K.
    pub at: Vec<(usize, f64)>,
    /// Queries that were counted.
    pub queries: usize,
    /// Queries left out: ignored rows, and the only row of their class, which can never be answered.
    pub without_match: usize,
}

impl Recall {
    /// Recall@K, if K was asked for.
    #[must_use]
    pub fn get(&self, k: usize) -> Option<f64> {
        self.at.iter().find(|(at, _)| *at == k).map(|(_, recall)| *recall)
    }
}

/// Searches every row among the others, or among those of a gallery, and counts hits.
///
/// Without a gallery each query is left out of its own list. `ks` are the values of K, each at least 1. Rows with
/// a negative label are neither queries nor answers.
///
/// # Errors
/// Those of [`Backend::nearest`]; [`Error::InvalidSetting`] if a K is 0 or none is given.
pub fn recall(
    backend: &mut dyn Backend,
    rows: &Rows<'_>,
    gallery: Option<&Rows<'_>>,
    ks: &[usize],
) -> Result<(Recall, Nearest)> {
    let mut ks = ks.to_vec();
    ks.sort_unstable();
    ks.dedup();
    let (Some(&first), Some(&deepest)) = (ks.first(), ks.last()) else {
        return Err(Error::InvalidSetting {
            name: "recall-at",
            value: "nothing".into(),
            range: "at least one K",
        });
    };
    if first == 0 {
        return Err(Error::InvalidSetting { name: "recall-at", value: "0".into(), range: "1 or more" });
    }
    let nearest = backend.nearest(rows, gallery, deepest)?;
    let recall = count_hits(&nearest, rows.labels, gallery.map(|gallery| gallery.labels), &ks);
    Ok((recall, nearest))
}

/// `gallery` are the labels that the indices in `nearest` count; those of the queries themselves if absent.
fn count_hits(nearest: &Nearest, labels: &[i64], gallery: Option<&[i64]>, ks: &[usize]) -> Recall {
    let searched = gallery.unwrap_or(labels);
    let mut class_sizes = std::collections::HashMap::<i64, usize>::new();
    searched
        .iter()
        .filter(|label| **label >= 0)
        .for_each(|label| *class_sizes.entry(*label).or_default() += 1);
    // Among themselves, a class needs a second row.
    let least = if gallery.is_some() { 1 } else { 2 };
    let answerable = |label: &i64| class_sizes.get(label).is_some_and(|&size| size >= least);

    let mut hits = vec![0usize; ks.len()];
    let mut queries = 0;
    for (list, label) in nearest.indices.outer_iter().zip(labels).filter(|(_, label)| answerable(label)) {
        queries += 1;
        let right = |&index: &u32| index != Nearest::NONE && searched[index as usize] == *label;
        if let Some(rank) = list.iter().position(right) {
            ks.iter().zip(&mut hits).filter(|(k, _)| rank < **k).for_each(|(_, hits)| *hits += 1);
        }
    }
    let at = ks.iter().zip(&hits).map(|(&k, &hits)| (k, hits as f64 / queries.max(1) as f64)).collect();
    Recall { at, queries, without_match: labels.len() - queries }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn recall_counts_the_first_right_neighbour_and_skips_unanswerable_queries() {
        let nearest = Nearest {
            indices: array![[1, 2], [2, 0], [1, 0], [0, 1], [Nearest::NONE, Nearest::NONE]],
            similarities: array![[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.0, 0.0]],
        };
        // Row 3 is alone in its class, row 4 is ignored.
        let recall = count_hits(&nearest, &[0, 1, 0, 2, -1], None, &[1, 2]);
        assert_eq!(recall.queries, 2);
        assert_eq!(recall.without_match, 3);
        assert_eq!(recall.at, vec![(1, 0.0), (2, 1.0)]);
    }
    #[test]
    fn with_a_gallery_one_row_of_the_class_is_enough_and_indices_count_the_gallery() {
        let nearest = Nearest {
            indices: array![[1, 0], [0, 2], [2, 1]],
            similarities: array![[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]],
        };
        // No row of the gallery is of class 5.
        let recall = count_hits(&nearest, &[0, 1, 5], Some(&[0, 0, 1]), &[1, 2]);
        assert_eq!((recall.queries, recall.without_match), (2, 1));
        assert_eq!(recall.at, vec![(1, 0.5), (2, 1.0)]);
    }
}
