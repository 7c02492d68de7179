//! The queries that a report shows, with their nearest neighbours: chosen at an evaluation, drawn at the end of the run.

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
    /// What was found and its cosine similarity, nearest first.
    pub answers: Vec<(usize, f32)>,
}

/// `count` queries, one at a random place in each of as many equal parts of the split, chosen before the answers are known,
/// with what `nearest` finds for them, by their rows. Even distances would show the same picture of every class where they
/// are a multiple of its pictures.
///
/// `rows[i]` is the index in its split of the picture behind query `i`; `searched` is the same for the indices that
/// `nearest` answers, which count another split where the set has a gallery.
///
/// # Errors
/// Those of `nearest`.
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
