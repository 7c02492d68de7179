//! The queries that a report shows and their nearest neighbours: chosen at an evaluation, rendered at the end of the run.

use ddtas::backend::Nearest;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::Result;

/// A test picture and its nearest neighbours, by their indices in their splits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The picture.
    pub picture: usize,
    /// Its neighbours and their cosine similarities, nearest first.
    pub answers: Vec<(usize, f32)>,
}

/// Chooses `count` queries, a random one from each of `count` equal parts of the split, independently of the
/// answers, and finds their neighbours by `nearest`, which is called with their rows. Equal distances could
/// be a multiple of the pictures in a class, and then always show the same view.
///
/// `rows[i]` is the picture of row `i`, an index into the split of queries; `searched[i]` is that of row `i`
/// in the answers of `nearest`, an index into the gallery if there is one.
///
/// # Errors
/// Errors of `nearest`.
pub fn choose(
    rows: &[usize],
    searched: &[usize],
    (count, seed): (usize, u64),
    nearest: impl FnOnce(&[usize]) -> Result<Nearest>,
) -> Result<Vec<Shown>> {
    let count = count.min(rows.len());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut within = |part: usize| {
        let [first, end] = [part, part + 1].map(|part| part * rows.len() / count);
        rng.random_range(first..end)
    };
    let chosen: Vec<usize> = (0..count).map(&mut within).collect();
    let nearest = nearest(&chosen)?;
    let lists = nearest.indices.outer_iter().zip(nearest.similarities.outer_iter());
    let shown = chosen.iter().zip(lists).map(|(&row, (indices, similarities))| {
        let found = indices.into_iter().zip(similarities).take_while(|(answer, _)| **answer != Nearest::NONE);
        let answers = found.map(|(&answer, &similarity)| (searched[answer as usize], similarity)).collect();
        Shown { picture: rows[row], answers }
    });
    Ok(shown.collect())
}
