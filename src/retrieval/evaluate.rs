//! Recall@K, R-precision and MAP@R of a whole test set.
//!
//! R-precision and MAP@R as defined by Musgrave, Belongie and Lim, "A Metric Learning Reality Check" (ECCV
//! 2020): for a query with R answers (others of its class), the share of answers among its R nearest, and the
//! mean over ranks 1 to R of the precision at each rank that holds an answer (0 at the others).
//!
//! Queries are searched in blocks of bounded size, those with few answers first, so that memory beside the
//! embeddings is O(Q): a large class makes only the lists of its own queries long.

use ndarray::ArrayView1;

use super::recall::{Hits, Recall, deepest, sorted};
use super::rows::{CopiedRows, KeptRows, answers, with_row};
use crate::Result;
use crate::backend::{Backend, Nearest, PreparedGallery};
use crate::loss::{Identity, Rows, validate_identity, validate_rows};

/// Most entries and queries of one block.
pub(super) struct SearchLimits {
    /// Entries of all lists, of 8 bytes each.
    pub(super) entries: usize,
    /// Queries; their rows are copied.
    pub(super) queries: usize,
}

/// Metrics of a test set. All figures are 0 to 1, means over the queries counted.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Metrics {
    /// Recall@K, and how many queries were counted.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub recall: Recall,
    /// R-precision.
    pub r_precision: f64,
    /// Mean average precision at R.
    pub map_at_r: f64,
}

/// Searches every query and computes the metrics of the lists found.
///
/// Without a gallery the queries are searched among themselves, each left out of its own list. Rows with a
/// negative label are neither queries nor answers, and are in no list. A query without an answer is not
/// scored, but counted in [`Recall::without_match`]; it stays in the lists of other queries. `progress` gets
/// the number of queries done, and of all.
///
/// # Errors
/// Those of [`Backend::nearest`]; [`Error::InvalidSetting`](crate::Error::InvalidSetting) if a K is 0 or none
/// is given.
pub fn evaluate(
    backend: &mut dyn Backend,
    queries: &Rows<'_>,
    gallery: Option<&Rows<'_>>,
    ks: &[usize],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Metrics> {
    let ks = sorted(ks)?;
    let deepest = deepest(&ks);
    let mut totals = Totals { hits: Hits::new(ks), r_precision: 0.0, average_precision: 0.0 };
    let add = &mut |metrics: &QueryMetrics| totals.add(metrics);
    let task = SearchTask::by_value(queries, gallery);
    evaluate_queries_within(
        &SearchLimits::DEFAULT,
        backend,
        &task,
        |answers| deepest.max(answers),
        add,
        progress,
    )?;
    Ok(totals.finish(queries.labels.len()))
}

/// Queries, and the rows they are searched among: a gallery, or each other.
#[derive(Debug, Clone, Copy)]
pub struct SearchTask<'a> {
    /// The queries.
    pub queries: Rows<'a>,
    /// `None`: the queries, each left out of its own list.
    pub gallery: Option<Rows<'a>>,
    /// Which row of the gallery is a query itself and is left out of the query's list. Ignored without a
    /// gallery.
    pub identity: Identity<'a>,
}

impl<'a> SearchTask<'a> {
    /// Queries in a gallery that holds none of them, or among themselves.
    pub(super) fn by_value(queries: &'a Rows<'_>, gallery: Option<&'a Rows<'_>>) -> Self {
        Self { queries: queries.view(), gallery: gallery.map(Rows::view), identity: Identity::ByValue }
    }

    fn validate(&self) -> Result<()> {
        validate_rows("queries", &self.queries)?;
        let Some(gallery) = &self.gallery else { return Ok(()) };
        validate_rows("references", gallery)?;
        validate_identity(&self.identity, self.queries.labels, gallery.labels)
    }

    /// Whether a query may be among the rows that are searched.
    fn has_queries(&self) -> bool {
        self.gallery.is_none() || self.identity != Identity::ByValue
    }

    /// The row that is the query itself.
    fn itself(&self, query: u32) -> Option<u32> {
        match self.gallery {
            None => Some(query),
            Some(_) => self.identity.of(query as usize).map(|row| row as u32),
        }
    }

    fn answers(&self) -> Vec<u32> {
        let mut answers = answers(self.queries.labels, self.gallery.map(|gallery| gallery.labels));
        if self.gallery.is_some() {
            for (query, answers) in answers.iter_mut().enumerate() {
                *answers -= u32::from(*answers > 0 && self.identity.of(query).is_some());
            }
        }
        answers
    }
}

/// Metrics of one query's list.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryMetrics {
    /// Row number of the query.
    pub query: usize,
    /// Rank of the first answer, from 0, if the list holds one.
    pub first: Option<usize>,
    /// R-precision.
    pub r_precision: f64,
    /// Average precision at R.
    pub average_precision: f64,
}

/// As [`evaluate`], query by query: `each` is called for every query that has an answer, in no particular
/// order. Lists are long enough for the largest of `ks`.
///
/// # Errors
/// As [`evaluate`]; [`Error::InvalidSetting`](crate::Error::InvalidSetting) for an identity that names no row
/// of the gallery or one of another label than its query's.
pub fn evaluate_queries(
    backend: &mut dyn Backend,
    task: &SearchTask<'_>,
    ks: &[usize],
    each: &mut dyn FnMut(&QueryMetrics),
) -> Result<()> {
    let deepest = deepest(&sorted(ks)?);
    evaluate_queries_within(
        &SearchLimits::DEFAULT,
        backend,
        task,
        |answers| deepest.max(answers),
        each,
        &mut |_, _| {},
    )
}

/// As [`evaluate_queries`]; `depth` maps a query's number of answers to the length of its list.
pub(super) fn evaluate_queries_within(
    limits: &SearchLimits,
    backend: &mut dyn Backend,
    task: &SearchTask<'_>,
    depth: impl Fn(usize) -> usize,
    each: &mut dyn FnMut(&QueryMetrics),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    task.validate()?;
    let (queries, gallery) = (&task.queries, task.gallery.as_ref());
    let answers = task.answers();
    let mut order = answerable(&answers);
    order.sort_by_key(|&query| depth(answers[query as usize] as usize));

    let kept = gallery.map_or_else(|| KeptRows::new(queries), KeptRows::new);
    let length = |query: u32| {
        // One more than asked for: a query that is among the rows searched is found too, and skipped.
        depth(answers[query as usize] as usize)
            .saturating_add(usize::from(task.has_queries()))
            .min(kept.len())
    };
    let mut work = |gallery: &mut dyn PreparedGallery| {
        let search = |block: &[u32], longest: usize| {
            gallery
                .nearest(&CopiedRows::new(queries, block).rows(), longest)
                .map_err(|error| with_row(error, "queries", "queries", |row| block[row]))
        };
        let mut evaluate_list = |query: u32, list: ArrayView1<'_, u32>| {
            let others = list.iter().filter(|&&index| index != Nearest::NONE);
            let others = others.filter(|&&index| task.itself(query) != Some(kept.original(index)));
            let label = queries.labels[query as usize];
            let right = others.map(|&index| kept.label(index) == label);
            each(&QueryMetrics::new(query as usize, right, answers[query as usize] as usize));
        };
        limits.search(&order, length, search, &mut evaluate_list, progress)
    };
    if order.is_empty() {
        return Ok(());
    }
    let whose = if gallery.is_none() { "queries" } else { "references" };
    backend
        .search(&kept.rows(), &mut work)
        .map_err(|error| with_row(error, "references", whose, |row| kept.original(row as u32)))
}

impl SearchLimits {
    /// Lists of 64 MiB; 16 MiB of rows at D = 512.
    pub(super) const DEFAULT: Self = Self { entries: 1 << 23, queries: 1 << 13 };

    /// Searches queries in blocks. Their lists are as long as `length` says, which must ascend. `each` gets
    /// every list, `progress` the number of queries done, and of all.
    pub(super) fn search<E>(
        &self,
        queries: &[u32],
        length: impl Fn(u32) -> usize,
        mut search: impl FnMut(&[u32], usize) -> Result<Nearest, E>,
        each: &mut dyn FnMut(u32, ArrayView1<'_, u32>),
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), E> {
        let mut done = 0;
        progress(done, queries.len());
        while done < queries.len() {
            let block = self.block(&queries[done..], &length);
            let nearest = search(block, length(block[block.len() - 1]))?;
            nearest.indices.outer_iter().zip(block).for_each(|(list, &query)| each(query, list));
            done += block.len();
            progress(done, queries.len());
        }
        Ok(())
    }

    /// The queries of the next block: as many as the limits allow, at least one. The lengths of their lists
    /// ascend.
    fn block<'a>(&self, queries: &'a [u32], length: impl Fn(u32) -> usize) -> &'a [u32] {
        let most = queries.len().min(self.queries);
        let fits = (1..=most).rev().find(|&count| count * length(queries[count - 1]) <= self.entries);
        &queries[..fits.unwrap_or(1)]
    }
}

/// The queries that have an answer.
pub(super) fn answerable(answers: &[u32]) -> Vec<u32> {
    (0..answers.len() as u32).filter(|&query| answers[query as usize] > 0).collect()
}

impl QueryMetrics {
    /// Metrics of a query with `answers` answers, at least 1; `list`: whether each rank holds one.
    fn new(query: usize, list: impl Iterator<Item = bool>, answers: usize) -> Self {
        let (mut first, mut found, mut precisions) = (None, 0, 0.0);
        for (rank, right) in list.enumerate() {
            if right {
                first.get_or_insert(rank);
                if rank < answers {
                    found += 1;
                    precisions += f64::from(found) / (rank + 1) as f64;
                }
            }
            if first.is_some() && rank + 1 >= answers {
                break;
            }
        }
        let r = answers as f64;
        Self { query, first, r_precision: f64::from(found) / r, average_precision: precisions / r }
    }
}

/// Sums over the queries so far.
struct Totals {
    hits: Hits,
    r_precision: f64,
    average_precision: f64,
}

impl Totals {
    fn add(&mut self, metrics: &QueryMetrics) {
        self.hits.add(metrics.first);
        self.r_precision += metrics.r_precision;
        self.average_precision += metrics.average_precision;
    }

    /// The means; `count` is the number of all queries.
    fn finish(self, count: usize) -> Metrics {
        let recall = self.hits.finish(count);
        let share = |sum: f64| sum / recall.queries.max(1) as f64;
        Metrics { r_precision: share(self.r_precision), map_at_r: share(self.average_precision), recall }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::backend::cpu::CpuBackend;
    use crate::loss::Embeddings;
    use crate::retrieval::recall::recall_within;
    use half::bf16;
    use ndarray::Array2;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const KS: [usize; 4] = [1, 3, 20, 500];

    /// Labels of classes of 1 to `classes` rows, shuffled; if `ignored`, one row in seven is ignored.
    fn ragged(classes: i64, ignored: bool, rng: &mut ChaCha8Rng) -> Vec<i64> {
        let mut labels: Vec<i64> =
            (0..classes).flat_map(|class| std::iter::repeat_n(class, class as usize + 1)).collect();
        for i in (1..labels.len()).rev() {
            labels.swap(i, rng.random_range(0..=i));
        }
        if ignored {
            labels.iter_mut().step_by(7).for_each(|label| *label = -3);
        }
        labels
    }

    /// Unit rows of 16 entries of 1/4 or -1/4: similarities are exact, and many are equal. Rows of a class
    /// share most signs.
    fn corners(labels: &[i64], rng: &mut ChaCha8Rng) -> Array2<f32> {
        Array2::from_shape_fn((labels.len(), 16), |(row, d)| {
            let own = labels[row].wrapping_mul(2_654_435_761).wrapping_add(d as i64 * 40_503) >> 7 & 1;
            let bit = own == 1;
            if bit != (rng.random_range(0..4) == 0) { 0.25 } else { -0.25 }
        })
    }

    /// Query by query, from the definitions: Recall@K, R-precision, MAP@R, number of queries counted.
    fn plain(queries: &Rows<'_>, gallery: Option<&Rows<'_>>) -> (Vec<f64>, f64, f64, usize) {
        let searched = gallery.map_or_else(|| queries.view(), Rows::view);
        let products = queries.embeddings.to_f64().dot(&searched.embeddings.to_f64().t());
        let (mut recall, mut precision, mut average, mut counted) = (vec![0.0; KS.len()], 0.0, 0.0, 0);
        for (query, &label) in queries.labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
            let mut others: Vec<usize> = (0..searched.labels.len())
                .filter(|&j| searched.labels[j] >= 0 && (gallery.is_some() || j != query))
                .collect();
            others.sort_by(|&a, &b| products[[query, b]].total_cmp(&products[[query, a]]).then(a.cmp(&b)));
            let right: Vec<bool> = others.iter().map(|&j| searched.labels[j] == label).collect();
            let r = right.iter().filter(|right| **right).count();
            if r == 0 {
                continue;
            }
            counted += 1;
            for (k, recall) in KS.iter().zip(&mut recall) {
                *recall += f64::from(u8::from(right.iter().take(*k).any(|right| *right)));
            }
            let found_by = |rank: usize| right[..rank].iter().filter(|right| **right).count() as f64;
            precision += found_by(r) / r as f64;
            let ranks = (1..=r).filter(|&rank| right[rank - 1]);
            average += ranks.map(|rank| found_by(rank) / rank as f64).sum::<f64>() / r as f64;
        }
        let count = counted as f64;
        (recall.iter().map(|hits| hits / count).collect(), precision / count, average / count, counted)
    }

    fn check(limits: &SearchLimits, queries: &Rows<'_>, gallery: Option<&Rows<'_>>) -> Metrics {
        let (recall, precision, average, counted) = plain(queries, gallery);
        let (mut heard, mut backend) = (Vec::new(), CpuBackend::new());
        let mut totals = Totals { hits: Hits::new(KS.to_vec()), r_precision: 0.0, average_precision: 0.0 };
        let mut add = |metrics: &QueryMetrics| totals.add(metrics);
        let mut hear = |done, total| heard.push((done, total));
        let task = SearchTask::by_value(queries, gallery);
        evaluate_queries_within(limits, &mut backend, &task, |answers| answers.max(500), &mut add, &mut hear)
            .unwrap();
        let got = totals.finish(queries.labels.len());
        assert_eq!(recall_within(limits, &mut backend, queries, gallery, &KS).unwrap(), got.recall);
        assert_eq!((got.recall.queries, got.recall.without_match), (counted, queries.labels.len() - counted));
        for ((k, got), want) in got.recall.at.iter().zip(recall) {
            assert!((got - want).abs() < 1e-12, "Recall@{k}: {got}, want {want}");
        }
        assert!((got.r_precision - precision).abs() < 1e-12, "{} {precision}", got.r_precision);
        assert!((got.map_at_r - average).abs() < 1e-12, "{} {average}", got.map_at_r);
        assert_eq!((heard[0], heard[heard.len() - 1]), ((0, counted), (counted, counted)));
        got
    }

    #[test]
    fn figures_are_those_of_the_definitions_whatever_the_size_of_a_turn() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for ignored in [false, true] {
            let (labels, other_labels) = (ragged(24, ignored, &mut rng), ragged(17, ignored, &mut rng));
            let (rows, others) = (corners(&labels, &mut rng), corners(&other_labels, &mut rng));
            let (queries, gallery) =
                (Rows::new(rows.view(), &labels), Rows::new(others.view(), &other_labels));
            for limits in [
                SearchLimits::DEFAULT,
                SearchLimits { entries: 5000, queries: 40 },
                SearchLimits { entries: 1, queries: 1 },
            ] {
                let alone = check(&limits, &queries, None);
                let apart = check(&limits, &queries, Some(&gallery));
                // Figures near chance or perfection would prove little.
                assert!(alone.r_precision > 0.1 && alone.r_precision < 0.9, "{}", alone.r_precision);
                assert!(apart.recall.without_match > 0 && alone.recall.without_match > 0);
            }
        }
    }

    #[test]
    fn the_lists_of_a_block_stay_within_the_limits() {
        let queries: Vec<u32> = (0..100).collect();
        let limits = SearchLimits { entries: 60, queries: 12 };
        let (mut blocks, mut seen) = (Vec::new(), Vec::new());
        let search = |block: &[u32], longest: usize| {
            blocks.push((block.len(), longest));
            Nearest::none(block.len(), longest)
        };
        // Lists of 1 to 100 entries.
        let length = |query: u32| query as usize + 1;
        limits.search(&queries, length, search, &mut |query, _| seen.push(query), &mut |_, _| {}).unwrap();
        assert_eq!(seen, queries);
        assert!(blocks.iter().all(|&(count, longest)| count <= 12 && (count == 1 || count * longest <= 60)));
        assert_eq!(blocks[0], (7, 7), "as many as fit");
    }

    #[test]
    fn queries_that_stand_in_the_gallery_are_left_out_of_their_lists() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let labels = ragged(20, true, &mut rng);
        let rows = corners(&labels, &mut rng);
        let all = Rows::new(rows.view(), &labels);
        let list: Vec<u32> = (0..labels.len() as u32).collect();
        // With a small K lists are just long enough for a query's answers and the query itself.
        let cases = [Identity::From(0), Identity::List(&list)]
            .map(|identity| [(identity, &KS[..]), (identity, &[1])]);
        for (identity, ks) in cases.into_iter().flatten() {
            let alone = evaluate(&mut CpuBackend::new(), &all, None, ks, &mut |_, _| {}).unwrap();
            let task = SearchTask { queries: all.view(), gallery: Some(all.view()), identity };
            let mut totals =
                Totals { hits: Hits::new(ks.to_vec()), r_precision: 0.0, average_precision: 0.0 };
            evaluate_queries(&mut CpuBackend::new(), &task, ks, &mut |metrics| totals.add(metrics)).unwrap();
            let got = totals.finish(labels.len());
            assert_eq!(got.recall, alone.recall);
            assert!((got.r_precision - alone.r_precision).abs() < 1e-12);
            assert!((got.map_at_r - alone.map_at_r).abs() < 1e-12);
        }
        let wrong =
            SearchTask { queries: all.view(), gallery: Some(all.view()), identity: Identity::From(1) };
        let refused = evaluate_queries(&mut CpuBackend::new(), &wrong, &KS, &mut |_| {});
        assert!(matches!(refused, Err(Error::InvalidSetting { name: "identity", .. })));
    }

    #[test]
    fn half_precision_rows_give_the_same_figures() {
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let labels = ragged(20, true, &mut rng);
        let rows = corners(&labels, &mut rng);
        let narrow = rows.mapv(bf16::from_f32);
        let wide = check(&SearchLimits::DEFAULT, &Rows::new(rows.view(), &labels), None);
        let narrow = Rows { embeddings: Embeddings::Bf16(narrow.view()), labels: &labels };
        assert_eq!(check(&SearchLimits::DEFAULT, &narrow, None), wide);
    }

    #[test]
    fn duplicates_of_a_query_are_neighbours_and_the_query_itself_is_none() {
        // Forty equal rows: a query need not be among its own first K + 1 neighbours.
        let rows = Array2::from_shape_fn((40, 4), |_| 0.5f32);
        let labels: Vec<i64> = (0..40).map(|row| i64::from(row >= 20)).collect();
        check(&SearchLimits::DEFAULT, &Rows::new(rows.view(), &labels), None);
    }

    #[test]
    fn bad_rows_are_named_by_their_place_in_the_callers_matrix() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let labels = ragged(9, true, &mut rng);
        let mut rows = corners(&labels, &mut rng);
        let bad = labels.iter().rposition(|&label| label == 8).unwrap();
        let place = |rows: &Array2<f32>, gallery: Option<&Rows<'_>>| {
            let queries = Rows::new(rows.view(), &labels);
            evaluate(&mut CpuBackend::new(), &queries, gallery, &KS, &mut |_, _| {}).unwrap_err()
        };
        let good = rows.clone();
        rows[[bad, 3]] = f32::NAN;
        let error = place(&rows, None);
        assert!(matches!(error, Error::NotFinite { rows: "queries", row } if row == bad), "{error}");
        let error = place(&good, Some(&Rows::new(rows.view(), &labels)));
        assert!(matches!(error, Error::NotFinite { rows: "references", row } if row == bad), "{error}");
        rows[[bad, 3]] = 2.0;
        let error = place(&rows, Some(&Rows::new(good.view(), &labels)));
        assert!(matches!(error, Error::NotUnit { rows: "queries", row, .. } if row == bad), "{error}");
    }
}
