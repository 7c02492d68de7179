//! Fused similarity and top-K: each query's most similar references, without the Q x N matrix.

use std::sync::Mutex;

use ndarray::Array2;

use super::product::{STRIP, product};
use super::rows::{MAX_BLOCK, PanelBuffer, Side};
use super::simd::{GROUP, Lanes, Work};
use super::tasks::{Workers, lock};
use super::{CpuBackend, Scratch, block_rows};
use crate::backend::Nearest;
use crate::loss::{Rows, UnitCheck, validate_rows};
use crate::{Error, Result};

/// See [`Backend::nearest`](crate::backend::Backend::nearest).
pub fn nearest(
    backend: &mut CpuBackend,
    queries: &Rows<'_>,
    references: Option<&Rows<'_>>,
    k: usize,
) -> Result<Nearest> {
    if k == 0 {
        return Err(Error::InvalidSetting { name: "k", value: "0".to_owned(), range: "1 or more" });
    }
    validate_rows("queries", queries)?;
    let (count, dim) = (queries.embeddings.rows(), queries.embeddings.dim());
    let mut against = count;
    if let Some(references) = references {
        validate_rows("references", references)?;
        let (expected, got) = (dim, references.embeddings.dim());
        if expected != got {
            return Err(Error::LengthMismatch { what: "dimension of the references", expected, got });
        }
        against = references.embeddings.rows();
    }
    let workers = Workers::new(count.saturating_mul(against).saturating_mul(dim));
    backend.scratch.resize_with(workers.count(), Mutex::default);
    for scratch in &backend.scratch {
        lock(scratch).tile.reset();
    }
    backend.rows.order.as_given(count, block_rows(count));
    let rows = backend.rows.prepare("queries", queries, UnitCheck::Check, &workers)?;
    let columns = match references {
        None => rows,
        Some(references) => {
            let count = references.embeddings.rows();
            backend.columns.order.as_given(count, block_rows(count));
            backend.columns.prepare("references", references, UnitCheck::Check, &workers)?
        }
    };
    let found: Vec<Mutex<Vec<Vec<Hit>>>> = rows.order.blocks.iter().map(|_| Mutex::default()).collect();
    workers.for_each(found.len(), &backend.scratch, |block, scratch: &mut Scratch| {
        let work = Search {
            rows,
            columns,
            itself: references.is_none(),
            block,
            k,
            row_panels: &mut scratch.tile.row_panels,
            panels: &mut scratch.tile.panels,
        };
        *lock(&found[block]) = backend.level.dispatch(work);
    });
    let mut nearest = Nearest {
        indices: Array2::from_elem((count, k), Nearest::NONE),
        similarities: Array2::from_elem((count, k), f32::NEG_INFINITY),
    };
    for (block, found) in rows.order.blocks.iter().zip(found) {
        for (query, hits) in block.range().zip(lock(&found).iter()) {
            for (rank, hit) in hits.iter().enumerate() {
                nearest.indices[[query, rank]] = hit.index;
                nearest.similarities[[query, rank]] = hit.similarity;
            }
        }
    }
    Ok(nearest)
}

#[derive(Debug, Clone, Copy)]
struct Hit {
    similarity: f32,
    index: u32,
}

impl Hit {
    /// Most similar first, then by index.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.similarity.total_cmp(&self.similarity).then(self.index.cmp(&other.index))
    }
}

/// The hits of one query so far: an unordered buffer, cut back to the best k whenever it is full.
struct Best {
    k: usize,
    hits: Vec<Hit>,
    /// Similarity of the k-th best at the last cut. References come in order of index, so a
    /// later one must exceed it.
    bound: f32,
}

impl Best {
    fn push(&mut self, hit: Hit) {
        self.hits.push(hit);
        if self.hits.len() >= 2 * self.k + GROUP {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.hits.len() > self.k {
            let (_, last, _) = self.hits.select_nth_unstable_by(self.k - 1, Hit::order);
            self.bound = last.similarity;
            self.hits.truncate(self.k);
        }
    }
}

/// Searches the references for one block of queries.
struct Search<'a, 'b> {
    rows: Side<'a>,
    columns: Side<'a>,
    itself: bool,
    block: usize,
    k: usize,
    row_panels: &'b mut PanelBuffer,
    panels: &'b mut PanelBuffer,
}

impl Work for Search<'_, '_> {
    type Output = Vec<Vec<Hit>>;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> Vec<Vec<Hit>> {
        let Self { rows, columns, itself, block, k, row_panels, panels } = self;
        let row_panels = rows.panels(block, row_panels);
        let block = rows.order.blocks[block];
        let panel = rows.dim * GROUP;
        let mut best: Vec<Best> =
            (0..block.rows).map(|_| Best { k, hits: Vec::new(), bound: f32::NEG_INFINITY }).collect();
        let mut strip = vec![0.0; STRIP * MAX_BLOCK];
        for (column, across) in columns.order.blocks.iter().enumerate() {
            let panels = columns.panels(column, panels);
            for start in (0..block.rows).step_by(STRIP) {
                let count = STRIP.min(block.rows - start);
                let strip_rows = &row_panels[start / GROUP * panel..][..panel];
                product(simd, strip_rows, start % GROUP, panels, &mut strip, MAX_BLOCK, false);
                for r in 0..count {
                    let best = &mut best[start + r];
                    let line = S::as_simd_f32s(&strip[r * MAX_BLOCK..][..across.panels() * GROUP]).0;
                    for (v, &s) in line.iter().enumerate() {
                        let mut bits = simd.above(s, simd.splat_f32s(best.bound));
                        while bits != 0 {
                            let local = v * S::F32_LANES + bits.trailing_zeros() as usize;
                            bits &= bits - 1;
                            let index = across.start + local;
                            let own = itself && index == block.start + start + r;
                            let similarity = strip[r * MAX_BLOCK + local];
                            if local < across.rows && !own && similarity > best.bound {
                                best.push(Hit { similarity, index: index as u32 });
                            }
                        }
                    }
                }
            }
        }
        let sorted = |mut best: Best| {
            best.cut();
            best.hits.sort_unstable_by(Hit::order);
            best.hits
        };
        best.into_iter().map(sorted).collect()
    }
}
