//! Recall@K.

use ndarray::ArrayView1;

use super::evaluate::{QueryMetrics, SearchLimits, SearchTask, answerable, evaluate_queries_within};
use super::rows::{answers, kept};
use crate::backend::{Backend, Nearest, Picked};
use crate::loss::Rows;
use crate::{Error, Result};

/// Share of queries whose K nearest neighbours hold one of their class.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Recall {
    /// K and Recall@K in 0 to 1, ascending in K.
    pub at: Vec<(usize, f64)>,
    /// Queries that were counted.
    pub queries: usize,
    /// Queries left out: ignored rows, and rows without another of their class, which can never be answered.
    pub without_match: usize,
}

impl Recall {
    /// Recall@K, if K was asked for.
    #[must_use]
    pub fn get(&self, k: usize) -> Option<f64> {
        self.at.iter().find(|(at, _)| *at == k).map(|(_, recall)| *recall)
    }
}

/// Searches every query for Recall@K alone, with lists as long as the largest K;
/// [`evaluate`](super::evaluate()) has more metrics.
///
/// Without a gallery the queries are searched among themselves, each left out of its own list. `ks` are the
/// values of K, each at least 1; one beyond the number of rows means a list of all rows. Rows with a negative
/// label are neither queries nor answers, and are in no list. Memory beside the rows grows with the number of
/// queries, whatever K: they are searched in blocks.
///
/// # Errors
/// Those of [`Backend::nearest`]; [`Error::InvalidSetting`] if a K is 0 or none is given.
pub fn recall(
    backend: &mut dyn Backend,
    queries: &Rows<'_>,
    gallery: Option<&Rows<'_>>,
    ks: &[usize],
) -> Result<Recall> {
    recall_within(&SearchLimits::DEFAULT, backend, queries, gallery, ks)
}

pub(super) fn recall_within(
    limits: &SearchLimits,
    backend: &mut dyn Backend,
    queries: &Rows<'_>,
    gallery: Option<&Rows<'_>>,
    ks: &[usize],
) -> Result<Recall> {
    let ks = sorted(ks)?;
    let deepest = deepest(&ks);
    let mut hits = Hits::new(ks);
    let task = SearchTask::by_value(queries, gallery);
    let add = &mut |metrics: &QueryMetrics| hits.add(metrics.first);
    evaluate_queries_within(limits, backend, &task, |_| deepest, add, &mut |_, _| {})?;
    Ok(hits.finish(queries.labels.len()))
}

/// [`recall`] of rows among themselves, which only `search` can read: it returns lists of the length it is
/// given.
///
/// # Errors
/// Those of `search`; [`Error::InvalidSetting`] if a K is 0 or none is given.
pub fn recall_by<E: From<Error>>(
    labels: &[i64],
    ks: &[usize],
    search: &mut dyn FnMut(&Picked<'_>, usize) -> Result<Nearest, E>,
) -> Result<Recall, E> {
    let ks = sorted(ks)?;
    let kept = kept(labels);
    // One more than the largest K: a query is found among the others, and skipped.
    let longest = deepest(&ks).saturating_add(1).min(kept.as_ref().map_or(labels.len(), Vec::len));
    let mut hits = Hits::new(ks);
    let search = |block: &[u32], k| search(&Picked { queries: block, gallery: kept.as_deref() }, k);
    let original = |row: u32| kept.as_ref().map_or(row, |kept| kept[row as usize]);
    let mut add = |query: u32, list: ArrayView1<'_, u32>| {
        let found = list.iter().filter(|&&row| row != Nearest::NONE).map(|&row| original(row));
        let mut others = found.filter(|&row| row != query);
        hits.add(others.position(|row| labels[row as usize] == labels[query as usize]));
    };
    let queries = answerable(&answers(labels, None));
    // No rows are copied, so a block may have any number of queries.
    let limits = SearchLimits { queries: usize::MAX, ..SearchLimits::DEFAULT };
    limits.search(&queries, |_| longest, search, &mut add, &mut |_, _| {})?;
    Ok(hits.finish(labels.len()))
}

/// The largest of `ks`, which ascend.
pub(super) fn deepest(ks: &[usize]) -> usize {
    ks[ks.len() - 1]
}

/// The values of K, ascending, each once.
///
/// # Errors
/// [`Error::InvalidSetting`] if a K is 0 or none is given.
pub(super) fn sorted(ks: &[usize]) -> Result<Vec<usize>> {
    let mut ks = ks.to_vec();
    ks.sort_unstable();
    ks.dedup();
    match ks.first() {
        None => Err(Error::InvalidSetting { name: "ks", value: "nothing".into(), range: "at least one K" }),
        Some(0) => Err(Error::InvalidSetting { name: "ks", value: "0".into(), range: "1 or more" }),
        Some(_) => Ok(ks),
    }
}

/// Hits counted so far.
pub(super) struct Hits {
    ks: Vec<usize>,
    hits: Vec<usize>,
    queries: usize,
}

impl Hits {
    /// `ks` must ascend.
    pub(super) fn new(ks: Vec<usize>) -> Self {
        Self { hits: vec![0; ks.len()], ks, queries: 0 }
    }

    /// Counts a query whose first right neighbour is at `rank`, from 0.
    pub(super) fn add(&mut self, rank: Option<usize>) {
        self.queries += 1;
        if let Some(rank) = rank {
            self.ks.iter().zip(&mut self.hits).filter(|(k, _)| rank < **k).for_each(|(_, hits)| *hits += 1);
        }
    }

    /// Recall@K of the queries counted; `total` is the number of all.
    pub(super) fn finish(self, total: usize) -> Recall {
        let share = |hits: usize| hits as f64 / self.queries.max(1) as f64;
        let at = self.ks.iter().zip(&self.hits).map(|(&k, &hits)| (k, share(hits))).collect();
        Recall { at, queries: self.queries, without_match: total - self.queries }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use ndarray::{Array2, Axis};

    /// Unit rows at these angles, in degrees.
    fn at_angles(angles: &[f32]) -> Array2<f32> {
        Array2::from_shape_fn((angles.len(), 2), |(i, d)| {
            let angle = angles[i].to_radians();
            if d == 0 { angle.cos() } else { angle.sin() }
        })
    }

    #[test]
    fn recall_counts_the_first_right_neighbour_and_skips_unanswerable_queries() {
        // Row 3 is alone in its class; row 4 is ignored, although it lies between the others.
        let (rows, labels) = (at_angles(&[0.0, 10.0, 25.0, 60.0, 5.0]), [0, 1, 0, 2, -1]);
        let recall = recall(&mut CpuBackend::new(), &Rows::new(rows.view(), &labels), None, &[2, 1]).unwrap();
        assert_eq!(recall.queries, 2);
        assert_eq!(recall.without_match, 3);
        assert_eq!(recall.at, vec![(1, 0.0), (2, 1.0)]);
    }

    #[test]
    fn queries_are_searched_in_a_gallery_of_their_own() {
        let (queries, gallery) = (at_angles(&[0.0, 38.0, 80.0]), at_angles(&[2.0, 49.0, 30.0, 79.0]));
        // The third query's class has no picture in the gallery; gallery row 3 is ignored.
        let recall = recall(
            &mut CpuBackend::new(),
            &Rows::new(queries.view(), &[7, 8, 9]),
            Some(&Rows::new(gallery.view(), &[8, 7, 8, -1])),
            &[1, 3],
        )
        .unwrap();
        assert_eq!((recall.queries, recall.without_match), (2, 1));
        assert_eq!(recall.at, vec![(1, 0.5), (3, 1.0)]);
    }

    #[test]
    fn labels_that_do_not_fit_are_refused_on_either_side() {
        let rows = at_angles(&[0.0, 1.0, 2.0]);
        let good = Rows::new(rows.view(), &[0, 0, 1]);
        for labels in [&[0, -1][..], &[0, -1, 1, -1]] {
            let bad = Rows::new(rows.view(), labels);
            for (queries, gallery) in [(&bad, None), (&good, Some(&bad))] {
                let error = recall(&mut CpuBackend::new(), queries, gallery, &[1]).unwrap_err();
                assert!(matches!(error, Error::LengthMismatch { expected: 3, .. }), "{error}");
            }
        }
    }

    #[test]
    fn a_k_beyond_the_rows_is_answered_by_all_of_them() {
        let rows = at_angles(&[0.0, 10.0, 25.0]);
        for (labels, ignored) in [([0, 1, 0], false), ([0, 1, 0], true), ([-1, -1, -1], false)] {
            let labels = if ignored { [0, -1, 0] } else { labels };
            let side = Rows::new(rows.view(), &labels);
            let ks = [1_000_000_000_000, 1, usize::MAX];
            let found = recall(&mut CpuBackend::new(), &side, None, &ks).unwrap();
            assert_eq!(found.at.iter().map(|(k, _)| *k).collect::<Vec<_>>(), [1, ks[0], ks[2]]);
            let all = if found.queries == 0 { 0.0 } else { 1.0 };
            assert_eq!((found.get(ks[0]), found.get(ks[2])), (Some(all), Some(all)));
            let again = recall_by(&labels, &ks, &mut |picked, k| {
                let some = |picked: &[u32]| {
                    rows.select(Axis(0), &picked.iter().map(|&row| row as usize).collect::<Vec<_>>())
                };
                let (queries, gallery) = (some(picked.queries), some(picked.gallery.unwrap_or(&[0, 1, 2])));
                let (own, other) = (vec![0; queries.nrows()], vec![0; gallery.nrows()]);
                let gallery = Rows::new(gallery.view(), &other);
                CpuBackend::new().nearest(&Rows::new(queries.view(), &own), Some(&gallery), k)
            });
            assert_eq!(again.unwrap(), found);
        }
    }

    #[test]
    fn lists_that_no_memory_holds_are_refused() {
        let rows = at_angles(&[0.0, 10.0]);
        let side = Rows::new(rows.view(), &[0, 0]);
        for k in [0, Nearest::LONGEST + 1, usize::MAX] {
            let refused = CpuBackend::new().nearest(&side, None, k);
            assert!(matches!(refused, Err(Error::InvalidSetting { name: "k", .. })), "{k}");
        }
        let longest = CpuBackend::new().nearest(&side, None, Nearest::LONGEST).unwrap();
        assert_eq!(longest.indices.dim(), (2, Nearest::LONGEST));
        assert_eq!((longest.indices[[0, 0]], longest.indices[[0, 1]]), (1, Nearest::NONE));
        for queries in [1 << 46, usize::MAX] {
            assert!(matches!(Nearest::none(queries, 3), Err(Error::OutOfMemory { .. })), "{queries}");
        }
    }

    #[test]
    fn ks_that_make_no_sense_are_refused() {
        let rows = at_angles(&[0.0, 1.0]);
        for ks in [&[][..], &[0, 1]] {
            let refused = recall(&mut CpuBackend::new(), &Rows::new(rows.view(), &[0, 0]), None, ks);
            assert!(matches!(refused, Err(Error::InvalidSetting { name: "ks", .. })), "{ks:?}");
        }
    }
}
