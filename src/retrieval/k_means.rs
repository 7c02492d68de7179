//! k-means of unit rows: k-means++ seeds, then Lloyd's steps through the fused search.
//!
//! The centre nearest to a row x is the one with the largest `x . c - |c|²/2`. The rows `(x, 1, 0) / sqrt 2`
//! and `(c, -|c|²/2, s) / sqrt 1.26` are of unit length (`|c| <= 1.001`, s takes up the rest) and their
//! products rank the centres in just that way. So the assignment is [`Backend::nearest`] with k = 1: a matrix
//! product, nothing of size Q x clusters.
//!
//! linfa-clustering compares row by row, draws its seeds in O(rows x clusters² x D), and counts each old
//! centre as a row of its cluster, which is not Lloyd's step.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::backend::Backend;
use crate::loss::{Embeddings, Rows, check_unit};
use crate::{Error, Result, threads};

/// Rows assigned at once, each copied with two added dimensions.
const TURN: usize = 1 << 13;

/// Squared length of the centres' rows before scaling: fits a centre of norm 1.001, which a row may have.
const SQUARE: f64 = 1.26;

/// Settings of k-means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KMeansSettings {
    /// Clusters, 1 to the number of rows.
    pub clusters: usize,
    /// Most Lloyd steps; it ends earlier once no row changes its cluster.
    pub iterations: usize,
    /// Seed of the k-means++ draws.
    pub seed: u64,
}

/// Rows in clusters.
#[derive(Debug, Clone, PartialEq)]
pub struct Clusters {
    /// Cluster of each row, `[Q]`.
    pub assignment: Vec<u32>,
    /// Sum of the squared distances of the rows to their centres.
    pub inertia: f64,
    /// Steps that were taken.
    pub iterations: usize,
}

/// Clusters rows of unit norm; `progress` gets each step's number and inertia.
///
/// The same seed gives the same clusters, whatever the number of threads.
///
/// # Errors
/// [`Error::InvalidSetting`] for a number of clusters out of range or no iterations;
/// [`Error::NotContiguous`]; [`Error::NotFinite`] and [`Error::NotUnit`] for bad rows; those of
/// [`Backend::nearest`].
pub fn k_means(
    backend: &mut dyn Backend,
    rows: ArrayView2<'_, f32>,
    settings: &KMeansSettings,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Clusters> {
    let count = rows.nrows();
    let checks = [
        ("clusters", settings.clusters, count, "1 to the number of rows"),
        ("k-means iterations", settings.iterations, usize::MAX, "1 or more"),
    ];
    for (name, value, most, range) in checks {
        if !(1..=most).contains(&value) {
            return Err(Error::InvalidSetting { name, value: value.to_string(), range });
        }
    }
    if !rows.is_standard_layout() {
        return Err(Error::NotContiguous { rows: "rows" });
    }
    threads::run(|| check(rows))??;
    let mut centres = threads::run(|| seeds(rows, settings))?;
    let mut clusters = Clusters { assignment: vec![u32::MAX; count], inertia: 0.0, iterations: 0 };
    let mut distances = vec![0.0f32; count];
    while clusters.iterations < settings.iterations {
        let changed = assign(backend, rows, centres.view(), &mut clusters.assignment, &mut distances)?;
        clusters.iterations += 1;
        clusters.inertia = distances.iter().map(|&distance| f64::from(distance)).sum();
        progress(clusters.iterations, clusters.inertia);
        if !changed {
            break;
        }
        centres = means(rows, settings.clusters, &clusters.assignment, &mut distances);
    }
    Ok(clusters)
}

/// Checks the rows here, since the search would name bad rows by numbers of its own.
fn check(rows: ArrayView2<'_, f32>) -> Result<()> {
    let tolerance = Embeddings::F32(rows).norm_tolerance();
    let bad = |row: usize| check_unit("rows", row, square_norm(rows.row(row)), tolerance).err();
    (0..rows.nrows()).into_par_iter().find_map_first(bad).map_or(Ok(()), Err)
}

/// k-means++: each seed a row, drawn by its squared distance to the seeds before it.
fn seeds(rows: ArrayView2<'_, f32>, settings: &KMeansSettings) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut chosen = vec![rng.random_range(0..rows.nrows())];
    let mut used = vec![false; rows.nrows()];
    let mut distances = vec![f32::INFINITY; rows.nrows()];
    while chosen.len() < settings.clusters {
        let seed = chosen[chosen.len() - 1];
        let last = rows.row(seed);
        distances.par_chunks_mut(1024).enumerate().for_each(|(chunk, distances)| {
            let rows = rows.slice(s![chunk * 1024.., ..]);
            for (distance, row) in distances.iter_mut().zip(rows.outer_iter()) {
                *distance = distance.min((2.0 - 2.0 * row.dot(&last)).max(0.0));
            }
        });
        // A seed is never drawn again, even if rounding leaves it a distance.
        distances[seed] = 0.0;
        used[seed] = true;
        let sum: f64 = distances.iter().map(|&distance| f64::from(distance)).sum();
        let mut left = rng.random::<f64>() * sum;
        let drawn = distances.iter().position(|&distance| {
            left -= f64::from(distance);
            distance > 0.0 && left <= 0.0
        });
        // All rows lie on seeds: the rest of the clusters will be empty, or hold duplicates.
        let unused = || used.iter().position(|used| !used).unwrap_or(0);
        chosen.push(drawn.unwrap_or_else(unused));
    }
    rows.select(Axis(0), &chosen)
}

/// Puts each row into the cluster of its nearest centre; returns whether any changed.
fn assign(
    backend: &mut dyn Backend,
    rows: ArrayView2<'_, f32>,
    centres: ArrayView2<'_, f32>,
    assignment: &mut [u32],
    distances: &mut [f32],
) -> Result<bool> {
    let dim = rows.ncols();
    let mut references = Array2::<f32>::zeros((centres.nrows(), dim + 2));
    for (mut reference, centre) in references.outer_iter_mut().zip(centres.outer_iter()) {
        let square = square_norm(centre);
        let rest = (SQUARE - square - square * square / 4.0).max(0.0).sqrt();
        let scale = SQUARE.sqrt();
        reference
            .slice_mut(s![..dim])
            .zip_mut_with(&centre, |to, &from| *to = (f64::from(from) / scale) as f32);
        reference[dim] = (-square / 2.0 / scale) as f32;
        reference[dim + 1] = (rest / scale) as f32;
    }
    let labels = vec![0; references.nrows().max(TURN)];
    let references = Rows::new(references.view(), &labels[..centres.nrows()]);
    let mut changed = false;
    let half = std::f32::consts::FRAC_1_SQRT_2;
    backend.search(&references, &mut |search| {
        for start in (0..rows.nrows()).step_by(TURN) {
            let end = (start + TURN).min(rows.nrows());
            let part = rows.slice(s![start..end, ..]);
            let mut queries = Array2::<f32>::zeros((end - start, dim + 2));
            queries.slice_mut(s![.., ..dim]).zip_mut_with(&part, |to, &from| *to = from * half);
            queries.column_mut(dim).fill(half);
            let queries = Rows::new(queries.view(), &labels[..end - start]);
            let nearest = search.nearest(&queries, 1)?;
            for (row, &cluster) in nearest.indices.column(0).iter().enumerate() {
                changed |= assignment[start + row] != cluster;
                assignment[start + row] = cluster;
            }
        }
        Ok(())
    })?;
    threads::run(|| {
        distances.par_iter_mut().enumerate().for_each(|(row, distance)| {
            let centre = centres.row(assignment[row] as usize);
            *distance = rows.row(row).iter().zip(centre).map(|(x, c)| (x - c) * (x - c)).sum();
        });
    })?;
    Ok(changed)
}

/// The means of the clusters. One without a row takes the row that is farthest from its own centre.
fn means(
    rows: ArrayView2<'_, f32>,
    clusters: usize,
    assignment: &[u32],
    distances: &mut [f32],
) -> Array2<f32> {
    let mut sums = Array2::<f64>::zeros((clusters, rows.ncols()));
    let mut sizes = vec![0u32; clusters];
    for (row, &cluster) in rows.outer_iter().zip(assignment) {
        sizes[cluster as usize] += 1;
        sums.row_mut(cluster as usize).zip_mut_with(&row, |sum, &value| *sum += f64::from(value));
    }
    for (cluster, size) in sizes.iter().enumerate() {
        let mut sum = sums.row_mut(cluster);
        if *size > 0 {
            sum /= f64::from(*size);
            continue;
        }
        // The first of equal rows; no row is taken twice.
        let farthest = (0..distances.len()).rev().max_by(|&a, &b| distances[a].total_cmp(&distances[b]));
        let farthest = farthest.unwrap_or(0);
        distances[farthest] = f32::NEG_INFINITY;
        sum.zip_mut_with(&rows.row(farthest), |sum, &value| *sum = f64::from(value));
    }
    sums.mapv(|value| value as f32)
}

fn square_norm(row: ArrayView1<'_, f32>) -> f64 {
    row.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;

    /// `classes` bundles of `each` unit rows, each bundle around its own direction with this `noise`.
    fn bundles(classes: usize, each: usize, dim: usize, noise: f32) -> Array2<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let centres = Array2::from_shape_fn((classes, dim), |_| rng.random_range(-1.0f32..1.0));
        let mut rows = Array2::from_shape_fn((classes * each, dim), |(row, d)| {
            centres[[row % classes, d]] + noise * rng.random_range(-1.0f32..1.0)
        });
        for mut row in rows.outer_iter_mut() {
            let norm = square_norm(row.view()).sqrt() as f32;
            row /= norm;
        }
        rows
    }

    fn cluster(rows: &Array2<f32>, clusters: usize, iterations: usize, seed: u64) -> Clusters {
        let settings = KMeansSettings { clusters, iterations, seed };
        k_means(&mut CpuBackend::new(), rows.view(), &settings, &mut |_, _| {}).unwrap()
    }

    #[test]
    fn bundles_far_apart_become_clusters() {
        let rows = bundles(7, 11, 19, 0.1);
        let clusters = cluster(&rows, 7, 20, 0);
        assert!(clusters.iterations < 20, "it ends once nothing changes");
        for row in 0..rows.nrows() {
            assert_eq!(clusters.assignment[row], clusters.assignment[row % 7], "row {row}");
        }
        let mut distinct = clusters.assignment[..7].to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 7);
    }

    #[test]
    fn every_row_is_in_the_cluster_of_its_nearest_mean() {
        // Overlapping bundles need several Lloyd iterations, and would show a wrong norm term.
        let rows = bundles(9, 31, 6, 1.2);
        let clusters = cluster(&rows, 9, 200, 1);
        assert!((2..200).contains(&clusters.iterations));
        let wide = rows.mapv(f64::from);
        let mut sums = Array2::<f64>::zeros((9, 6));
        let mut sizes = [0.0f64; 9];
        for (row, &cluster) in wide.outer_iter().zip(&clusters.assignment) {
            sums.row_mut(cluster as usize).zip_mut_with(&row, |sum, value| *sum += value);
            sizes[cluster as usize] += 1.0;
        }
        let mut inertia = 0.0;
        for (row, &own) in wide.outer_iter().zip(&clusters.assignment) {
            let distance = |cluster: usize| -> f64 {
                let mean = sums.row(cluster).mapv(|sum| sum / sizes[cluster]);
                row.iter().zip(&mean).map(|(x, m)| (x - m) * (x - m)).sum()
            };
            let best = (0..9).map(distance).fold(f64::INFINITY, f64::min);
            assert!(distance(own as usize) < best + 1e-6);
            inertia += distance(own as usize);
        }
        assert!((inertia - clusters.inertia).abs() < 1e-3 * inertia, "{inertia} {}", clusters.inertia);
    }

    #[test]
    fn more_steps_never_raise_the_inertia_and_the_seed_decides() {
        let rows = bundles(5, 40, 8, 1.0);
        let inertia: Vec<f64> = (1..8).map(|steps| cluster(&rows, 12, steps, 4).inertia).collect();
        assert!(inertia.is_sorted_by(|before, after| *after <= before + 1e-4), "{inertia:?}");
        assert_eq!(cluster(&rows, 12, 50, 4), cluster(&rows, 12, 50, 4));
        assert_ne!(cluster(&rows, 12, 50, 4).assignment, cluster(&rows, 12, 50, 5).assignment);
    }

    #[test]
    fn rows_within_the_tolerance_pass_and_others_are_named() {
        let mut rows = bundles(3, 4_000, 6, 0.4);
        rows.row_mut(11_000).mapv_inplace(|value| value * 1.000_95);
        rows.row_mut(7).mapv_inplace(|value| value * 0.999_05);
        // With as many clusters as rows, every row is a seed.
        let few = rows.slice(s![10_950..11_050, ..]).to_owned();
        assert!(cluster(&few, 100, 2, 0).inertia < 1e-6);
        assert!(cluster(&rows, 3, 2, 0).inertia > 0.0);
        rows.row_mut(9_000).fill(2.0);
        let settings = KMeansSettings { clusters: 3, iterations: 2, seed: 0 };
        let refused = k_means(&mut CpuBackend::new(), rows.view(), &settings, &mut |_, _| {});
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("row 9000 of the rows") && refused.contains("4.89"), "{refused}");
    }

    #[test]
    fn rows_of_later_turns_are_drawn_and_assigned_as_those_of_the_first() {
        // Neither turns nor the draws' chunks are a multiple of the bundles, which tells one row from another.
        let rows = bundles(7, 1_500, 6, 0.0);
        assert!(rows.nrows() > TURN && !TURN.is_multiple_of(7));
        for seed in 0..3 {
            let clusters = cluster(&rows, 7, 2, seed);
            assert!(clusters.inertia < 1e-3, "a seed in each bundle: {}", clusters.inertia);
            let assignment = &clusters.assignment;
            assert!((7..rows.nrows()).all(|row| assignment[row] == assignment[row % 7]));
        }
    }

    #[test]
    fn every_row_is_drawn_once_even_if_it_is_a_little_short() {
        // The length leaves each seed a distance to itself.
        let rows = bundles(20, 5, 6, 0.4) * 0.999_05;
        for seed in 0..3 {
            assert!(cluster(&rows, 100, 1, seed).inertia < 1e-9);
        }
    }

    #[test]
    fn empty_clusters_take_different_rows() {
        let rows = bundles(5, 1, 4, 0.0);
        let means = means(rows.view(), 4, &[0; 5], &mut [0.1, 0.3, 0.2, 0.3, 0.0]);
        for (cluster, row) in [(1, 1), (2, 3), (3, 2)] {
            assert_eq!(means.row(cluster), rows.row(row));
        }
    }

    #[test]
    fn duplicates_and_as_many_clusters_as_rows_are_no_trouble() {
        let same = Array2::from_shape_fn((6, 3), |(_, d)| if d == 1 { 1.0 } else { 0.0 });
        assert!(cluster(&same, 4, 10, 0).inertia < 1e-9);
        let rows = bundles(6, 1, 4, 0.0);
        let mut own = cluster(&rows, 6, 10, 0).assignment;
        own.sort_unstable();
        assert_eq!(own, [0, 1, 2, 3, 4, 5]);
        let refused = |clusters, iterations| {
            let settings = KMeansSettings { clusters, iterations, seed: 0 };
            k_means(&mut CpuBackend::new(), rows.view(), &settings, &mut |_, _| {}).is_err()
        };
        assert!(refused(0, 1) && refused(7, 1) && refused(2, 0));
    }
}
