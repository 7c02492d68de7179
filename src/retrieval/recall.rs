//! Recall@K.

use super::evaluate::{Kept, answers, kept};
use crate::backend::{Backend, Nearest};
use crate::loss::{Rows, validate_rows};
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

/// Searches every query and counts hits.
///
/// Without a gallery the queries are searched among themselves, each left out of its own list. `ks` are the values of K,
/// each at least 1. Rows with a negative label are neither queries nor answers: their lists are empty, and they stand in no other.
/// A K beyond the rows there are to find is answered by a list of all of them. The lists, `[Q, largest K]` or, if they are
/// fewer, `[Q, rows to find]`, are returned: [`evaluate`](super::evaluate()) is for sets where they would be large.
///
/// # Errors
/// Those of [`Backend::nearest`]; [`Error::InvalidSetting`] if a K is 0 or none is given.
pub fn recall(
    backend: &mut dyn Backend,
    queries: &Rows<'_>,
    gallery: Option<&Rows<'_>>,
    ks: &[usize],
) -> Result<(Recall, Nearest)> {
    let ks = sorted(ks)?;
    // Before ignored rows are picked out by their labels.
    validate_rows("queries", queries)?;
    gallery.map_or(Ok(()), |gallery| validate_rows("references", gallery))?;
    let others = gallery.map_or(queries.labels.len() - 1, |gallery| gallery.labels.len());
    let nearest = search(backend, queries, gallery, depth(&ks, others))?;
    Ok((count(queries.labels, gallery.map(|gallery| gallery.labels), ks, &nearest), nearest))
}

/// [`recall`] of rows among themselves, which `search` alone can read: it answers the lists, as long as it is told,
/// of the rows that it is given, numbered as these are; `None` stands for all of them.
///
/// # Errors
/// Those of `search`; [`Error::InvalidSetting`] if a K is 0 or none is given.
pub fn recall_by<E: From<Error>>(
    labels: &[i64],
    ks: &[usize],
    search: impl FnOnce(Option<&[u32]>, usize) -> Result<Nearest, E>,
) -> Result<Recall, E> {
    let ks = sorted(ks)?;
    let depth = depth(&ks, labels.len().saturating_sub(1));
    let nearest = match kept(labels) {
        None => search(None, depth)?,
        Some(rows) if rows.is_empty() => Nearest::none(labels.len(), depth)?,
        Some(rows) => {
            let original = |row: u32| rows[row as usize];
            spread(&search(Some(&rows), depth)?, labels.len(), original, original)?
        }
    };
    Ok(count(labels, None, ks, &nearest))
}

/// How long lists must be to answer every K where `others` rows can stand in them. `ks` ascend.
fn depth(ks: &[usize], others: usize) -> usize {
    ks[ks.len() - 1].min(others.max(1))
}

/// Looks for the first right neighbour in every list.
fn count(queries: &[i64], gallery: Option<&[i64]>, ks: Vec<usize>, nearest: &Nearest) -> Recall {
    let labels = gallery.unwrap_or(queries);
    let answers = answers(queries, gallery);
    let mut hits = Hits::new(ks);
    for (query, list) in nearest.indices.outer_iter().enumerate() {
        if answers[query] > 0 {
            let right = |&index: &u32| index != Nearest::NONE && labels[index as usize] == queries[query];
            hits.add(list.iter().position(right));
        }
    }
    hits.finish(queries.len())
}

/// [`Backend::nearest`] without the ignored rows of either side; indices are the caller's.
fn search(
    backend: &mut dyn Backend,
    queries: &Rows<'_>,
    gallery: Option<&Rows<'_>>,
    depth: usize,
) -> Result<Nearest> {
    let kept_queries = Kept::new(queries);
    let kept_gallery = gallery.map(Kept::new);
    if kept_queries.is_all() && kept_gallery.as_ref().is_none_or(Kept::is_all) {
        return backend.nearest(queries, gallery, depth);
    }
    if kept_queries.is_empty() || kept_gallery.as_ref().is_some_and(Kept::is_empty) {
        return Nearest::none(queries.labels.len(), depth);
    }
    let gallery_rows = kept_gallery.as_ref().map(Kept::rows);
    let found = backend.nearest(&kept_queries.rows(), gallery_rows.as_ref(), depth)?;
    let answering = kept_gallery.as_ref().unwrap_or(&kept_queries);
    let query = |row| kept_queries.original(row);
    spread(&found, queries.labels.len(), query, |row| answering.original(row))
}

/// Lists of some rows as those of all `count`, which are empty for the others; both functions give the caller's row.
fn spread(
    found: &Nearest,
    count: usize,
    query: impl Fn(u32) -> u32,
    answer: impl Fn(u32) -> u32,
) -> Result<Nearest> {
    let mut nearest = Nearest::none(count, found.indices.ncols())?;
    for (row, (indices, similarities)) in
        found.indices.outer_iter().zip(found.similarities.outer_iter()).enumerate()
    {
        let query = query(row as u32) as usize;
        nearest.similarities.row_mut(query).assign(&similarities);
        for (target, &index) in nearest.indices.row_mut(query).iter_mut().zip(indices) {
            *target = if index == Nearest::NONE { index } else { answer(index) };
        }
    }
    Ok(nearest)
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
        None => {
            Err(Error::InvalidSetting { name: "recall-at", value: "nothing".into(), range: "at least one K" })
        }
        Some(0) => Err(Error::InvalidSetting { name: "recall-at", value: "0".into(), range: "1 or more" }),
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
    /// `ks` ascend.
    pub(super) fn new(ks: Vec<usize>) -> Self {
        Self { hits: vec![0; ks.len()], ks, queries: 0 }
    }

    /// Counts a query whose first right neighbour stands at `rank`, from 0.
    pub(super) fn add(&mut self, rank: Option<usize>) {
        self.queries += 1;
        if let Some(rank) = rank {
            self.ks.iter().zip(&mut self.hits).filter(|(k, _)| rank < **k).for_each(|(_, hits)| *hits += 1);
        }
    }

    /// Recall@K of the queries counted, of `total`.
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
    use ndarray::{Array2, array};

    /// Unit rows at these angles, in degrees.
    fn at_angles(angles: &[f32]) -> Array2<f32> {
        Array2::from_shape_fn((angles.len(), 2), |(i, d)| {
            let angle = angles[i].to_radians();
            if d == 0 { angle.cos() } else { angle.sin() }
        })
    }

    #[test]
    fn recall_counts_the_first_right_neighbour_and_skips_unanswerable_queries() {
        // Row 3 is alone in its class, row 4 is ignored though it lies between the others.
        let (rows, labels) = (at_angles(&[0.0, 10.0, 25.0, 60.0, 5.0]), [0, 1, 0, 2, -1]);
        let (recall, nearest) =
            recall(&mut CpuBackend::new(), &Rows::new(rows.view(), &labels), None, &[2, 1]).unwrap();
        assert_eq!(recall.queries, 2);
        assert_eq!(recall.without_match, 3);
        assert_eq!(recall.at, vec![(1, 0.0), (2, 1.0)]);
        let none = Nearest::NONE;
        assert_eq!(nearest.indices, array![[1, 2], [0, 2], [1, 0], [2, 1], [none, none]]);
    }

    #[test]
    fn queries_are_searched_in_a_gallery_of_their_own() {
        let (queries, gallery) = (at_angles(&[0.0, 38.0, 80.0]), at_angles(&[2.0, 49.0, 30.0, 79.0]));
        // The third query's class has no picture in the gallery; gallery row 3 is ignored.
        let (recall, nearest) = recall(
            &mut CpuBackend::new(),
            &Rows::new(queries.view(), &[7, 8, 9]),
            Some(&Rows::new(gallery.view(), &[8, 7, 8, -1])),
            &[1, 3],
        )
        .unwrap();
        assert_eq!((recall.queries, recall.without_match), (2, 1));
        assert_eq!(recall.at, vec![(1, 0.5), (3, 1.0)]);
        assert_eq!(nearest.indices, array![[0, 2, 1], [2, 1, 0], [1, 2, 0]]);
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
            let (found, nearest) = recall(&mut CpuBackend::new(), &side, None, &ks).unwrap();
            assert_eq!(nearest.indices.dim(), (3, 2));
            assert_eq!(found.at.iter().map(|(k, _)| *k).collect::<Vec<_>>(), [1, ks[0], ks[2]]);
            let all = if found.queries == 0 { 0.0 } else { 1.0 };
            assert_eq!((found.get(ks[0]), found.get(ks[2])), (Some(all), Some(all)));
            let again = recall_by(&labels, &ks, |picked, depth| {
                let picked = picked.map_or(vec![0, 1, 2], <[u32]>::to_vec);
                let some = rows
                    .select(ndarray::Axis(0), &picked.iter().map(|&row| row as usize).collect::<Vec<_>>());
                CpuBackend::new().nearest(&Rows::new(some.view(), &labels[..picked.len()]), None, depth)
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
            assert!(matches!(refused, Err(Error::InvalidSetting { name: "recall-at", .. })), "{ks:?}");
        }
    }
}
