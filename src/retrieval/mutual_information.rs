//! Normalised mutual information of clusters and classes.

use std::collections::{HashMap, HashSet};

use super::k_means::{KMeansSettings, k_means};
use super::rows::{KeptRows, with_row};
use crate::backend::Backend;
use crate::loss::{Embeddings, Rows, same_length, validate_rows};
use crate::{Error, Result};

/// Number of distinct labels that are not negative.
#[must_use]
pub fn classes(labels: &[i64]) -> usize {
    labels.iter().filter(|label| **label >= 0).collect::<HashSet<_>>().len()
}

/// Default for the most steps of k-means.
pub const NMI_STEPS: usize = 20;

/// NMI of the rows' classes and as many clusters, found by at most `steps` steps of k-means. Ignored rows are
/// left out; without any row it is 1. `progress` gets the number of each step.
///
/// # Errors
/// Those of [`k_means`]; [`Error::InvalidSetting`] unless the rows are float32.
pub fn nmi(
    backend: &mut dyn Backend,
    rows: &Rows<'_>,
    steps: usize,
    seed: u64,
    progress: &mut dyn FnMut(usize),
) -> Result<f64> {
    validate_rows("queries", rows)?;
    let kept = KeptRows::new(rows);
    let rows = kept.rows();
    let Embeddings::F32(values) = rows.embeddings else {
        let (value, range) = (rows.embeddings.element_type().to_string(), "k-means takes f32 alone");
        return Err(Error::InvalidSetting { name: "type of the rows", value, range });
    };
    if rows.labels.is_empty() {
        return Ok(1.0);
    }
    let settings = KMeansSettings { clusters: classes(rows.labels), iterations: steps, seed };
    let clusters = k_means(backend, values, &settings, &mut |step, _| progress(step))
        .map_err(|error| with_row(error, "rows", "queries", |row| kept.original(row as u32)))?;
    normalized_mutual_information(rows.labels, &clusters.assignment)
}

/// I(classes; clusters) over the arithmetic mean of their entropies, 0 to 1: scikit-learn's
/// `normalized_mutual_info_score` at its defaults.
///
/// 1 if both sides have at most one group, as in scikit-learn; 0 if they are independent.
///
/// # Errors
/// [`Error::LengthMismatch`] unless each row has a class and a cluster.
pub fn normalized_mutual_information(classes: &[i64], clusters: &[u32]) -> Result<f64> {
    same_length("clusters of the rows", classes.len(), clusters.len())?;
    let total = classes.len() as f64;
    let mut joint = HashMap::<(i64, u32), usize>::new();
    let mut by_class = HashMap::<i64, usize>::new();
    let mut by_cluster = HashMap::<u32, usize>::new();
    for (&class, &cluster) in classes.iter().zip(clusters) {
        *joint.entry((class, cluster)).or_default() += 1;
        *by_class.entry(class).or_default() += 1;
        *by_cluster.entry(cluster).or_default() += 1;
    }
    if by_class.len() <= 1 && by_cluster.len() <= 1 {
        return Ok(1.0);
    }
    let term = |((class, cluster), &count): (&(i64, u32), &usize)| {
        let expected = by_class[class] as f64 * by_cluster[cluster] as f64 / total;
        count as f64 / total * (count as f64 / expected).ln()
    };
    let information = ordered_sum(joint.iter().map(term));
    let mean_entropy = (entropy(&by_class, total) + entropy(&by_cluster, total)) / 2.0;
    Ok(if information <= f64::EPSILON { 0.0 } else { (information / mean_entropy).min(1.0) })
}

fn entropy<K>(sizes: &HashMap<K, usize>, total: f64) -> f64 {
    let share = |&size: &usize| size as f64 / total;
    -ordered_sum(sizes.values().map(share).map(|share| share * share.ln()))
}

/// A sum that does not depend on the order a hash map happens to have.
fn ordered_sum(terms: impl Iterator<Item = f64>) -> f64 {
    let mut terms: Vec<f64> = terms.collect();
    terms.sort_unstable_by(f64::total_cmp);
    terms.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use ndarray::array;

    #[test]
    fn of_no_row_the_information_is_1() {
        let rows = array![[1.0f32, 0.0], [0.0, 1.0]];
        let ignored = Rows::new(rows.view(), &[-1, -2]);
        assert_eq!(nmi(&mut CpuBackend::new(), &ignored, NMI_STEPS, 0, &mut |_| {}).unwrap(), 1.0);
    }

    #[test]
    fn rows_of_another_type_are_refused_by_its_name() {
        let rows = array![[half::bf16::ONE, half::bf16::ZERO]];
        let refused = nmi(&mut CpuBackend::new(), &Rows::new(rows.view(), &[0]), 1, 0, &mut |_| {});
        let wanted = "type of the rows = bf16 is out of range: k-means takes f32 alone";
        assert_eq!(refused.unwrap_err().to_string(), wanted);
    }

    #[test]
    fn figures_of_scikit_learn_are_met() {
        // By sklearn.metrics.normalized_mutual_info_score(classes, clusters) of scikit-learn 1.9.
        let cases: [(&[i64], &[u32], f64); 5] = [
            (&[0, 0, 1, 1], &[5, 5, 2, 2], 1.0),
            (&[0, 0, 1, 1], &[0, 1, 0, 1], 0.0),
            (&[0, 0, 0, 1, 1, 2, 2, 2, 2, 9], &[0, 0, 1, 1, 1, 2, 2, 0, 3, 3], 0.573_932_378_775_651_6),
            (&[1, 1, 1], &[4, 4, 4], 1.0),
            (&[1, 2, 3], &[4, 4, 4], 0.0),
        ];
        for (classes, clusters, wanted) in cases {
            let got = normalized_mutual_information(classes, clusters).unwrap();
            assert!((got - wanted).abs() < 1e-12, "{classes:?} {clusters:?}: {got}, want {wanted}");
        }
        assert!(normalized_mutual_information(&[1, 2], &[3]).is_err());
        assert_eq!(normalized_mutual_information(&[], &[]).unwrap(), 1.0);
    }
}
