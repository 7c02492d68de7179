//! Which test pictures a report shows, with their nearest neighbours: chosen when a network is evaluated, drawn when the
//! run ends.

use ddtas::backend::Nearest;
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

/// `count` queries at even distances through the split, chosen before the answers are known, with what `nearest` finds for them, by
/// their rows.
///
/// `rows[i]` is the index in its split of the picture behind query `i`; `searched` is the same for the indices that
/// `nearest` answers, which count another split where the set has a gallery.
///
/// # Errors
/// Those of `nearest`.
pub fn choose(
    rows: &[usize],
    searched: &[usize],
    count: usize,
    nearest: impl FnOnce(&[usize]) -> Result<Nearest>,
) -> Result<Vec<Shown>> {
    let count = count.min(rows.len());
    // The middle of each of `count` equal stretches.
    let chosen: Vec<usize> = (0..count).map(|i| (2 * i + 1) * rows.len() / (2 * count)).collect();
    let nearest = nearest(&chosen)?;
    let lists = nearest.indices.outer_iter().zip(nearest.similarities.outer_iter());
    let shown = chosen.iter().zip(lists).map(|(&row, (indices, similarities))| {
        let found = indices.into_iter().zip(similarities).take_while(|(answer, _)| **answer != Nearest::NONE);
        let answers = found.map(|(&answer, &similarity)| (searched[answer as usize], similarity)).collect();
        Shown { picture: rows[row], answers }
    });
    Ok(shown.collect())
}
