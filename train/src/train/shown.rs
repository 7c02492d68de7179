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

/// `count` queries with their first `depth` neighbours, at even distances through the split:
/// chosen before the answers are known.
///
/// `rows[i]` is the index in its split of the picture behind row `i` of `nearest`; `searched` is the same for the
/// indices in `nearest`, which count another split where the set has a gallery.
///
/// # Errors
/// [`ddtas::Error::LengthMismatch`] if `rows` and `nearest` differ in length.
pub fn choose(
    rows: &[usize],
    searched: &[usize],
    nearest: &Nearest,
    count: usize,
    depth: usize,
) -> Result<Vec<Shown>> {
    if rows.len() != nearest.indices.nrows() {
        let (expected, got) = (nearest.indices.nrows(), rows.len());
        return Err(
            ddtas::Error::LengthMismatch { what: "pictures of the neighbour lists", expected, got }.into()
        );
    }
    let count = count.min(rows.len());
    let shown = (0..count).map(|i| {
        // The middle of each of `count` equal stretches.
        let row = (2 * i + 1) * rows.len() / (2 * count);
        let found = nearest.indices.row(row).into_iter().zip(nearest.similarities.row(row)).take(depth);
        let found = found.take_while(|(answer, _)| **answer != Nearest::NONE);
        let answers = found.map(|(&answer, &similarity)| (searched[answer as usize], similarity)).collect();
        Shown { picture: rows[row], answers }
    });
    Ok(shown.collect())
}
