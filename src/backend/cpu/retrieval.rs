//! Fused similarity and top-K: each query's most similar references, without the Q x N matrix.
//!
//! A task compares a group of queries with all references, one block at a time. A block is packed once per
//! group; then each strip of S is compared with its queries' bounds, the similarity of the k-th best hit so
//! far. Similarities above the bound go into the query's list, which is cut back to k whenever it is full.
//! Memory beside the rows: a group's panels and lists for each thread, and the result.

use std::sync::Mutex;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{ArrayViewMut2, Axis};

use super::buffer::Buffer;
use super::product::{STRIP, pack_transposed, product};
use super::rows::{MAX_BLOCK, contiguous, grow, square_sum};
use super::simd::{GROUP, Lanes, Level, Work};
use super::tasks::{Workers, lock};
use crate::Result;
use crate::backend::{Nearest, PreparedGallery};
use crate::loss::{Embeddings, Rows, check_unit, validate_dims, validate_rows};

/// Most queries of a group. They share the packing of each block of references; their panels are read once
/// per block and take 1.5 MB at D = 512.
const MOST_QUERIES: usize = 768;

/// Bytes of a group's lists; longer lists mean smaller groups.
const LIST_BYTES: usize = 32 << 20;

/// See [`Backend::nearest`](crate::backend::Backend::nearest).
pub fn nearest(queries: &Rows<'_>, references: Option<&Rows<'_>>, k: usize) -> Result<Nearest> {
    match references {
        None => find(&Matrix::checked("queries", queries)?, None, k),
        Some(references) => Gallery::new(references)?.nearest(queries, k),
    }
}

/// A gallery whose rows have been checked.
pub struct Gallery<'a> {
    rows: Matrix<'a>,
}

impl<'a> Gallery<'a> {
    pub fn new(rows: &'a Rows<'_>) -> Result<Self> {
        Ok(Self { rows: Matrix::checked("references", rows)? })
    }
}

impl PreparedGallery for Gallery<'_> {
    fn nearest(&mut self, queries: &Rows<'_>, k: usize) -> Result<Nearest> {
        let queries = Matrix::checked("queries", queries)?;
        validate_dims(queries.dim, self.rows.dim)?;
        find(&queries, Some(&self.rows), k)
    }
}

/// Finds the `k` nearest rows of each query in `gallery`, or among the queries if it is `None`.
fn find(queries: &Matrix<'_>, gallery: Option<&Matrix<'_>>, k: usize) -> Result<Nearest> {
    let itself = gallery.is_none();
    let (queries, references) = (*queries, *gallery.unwrap_or(queries));
    let (count, against) = (queries.rows, references.rows);
    let mut nearest = Nearest::of_search(count, against, k)?;
    let workers = Workers::new(count.saturating_mul(against).saturating_mul(queries.dim));

    let capacity = k.saturating_mul(2).saturating_add(GROUP).min(against);
    let plan = Plan { itself, k, capacity, group: group_rows(count, capacity, workers.count()) };
    let indices = nearest.indices.axis_chunks_iter_mut(Axis(0), plan.group);
    let similarities = nearest.similarities.axis_chunks_iter_mut(Axis(0), plan.group);
    let found: Vec<_> = indices.zip(similarities).map(Mutex::new).collect();
    let scratch: Vec<Mutex<Scratch>> = (0..workers.count()).map(|_| Mutex::default()).collect();
    workers.for_each(found.len(), &scratch, |group, scratch| {
        let mut found = lock(&found[group]);
        let (indices, similarities) = &mut *found;
        let first = group * plan.group;
        let (plan, count) = (&plan, plan.group.min(queries.rows - first));
        Level::best().dispatch(Pass { plan, queries, references, first, count, scratch: &mut *scratch });
        scratch.lists.write(plan, indices.view_mut(), similarities.view_mut());
    });
    drop(found);
    Ok(nearest)
}

/// Parameters of a search that all groups share.
struct Plan {
    itself: bool,
    k: usize,
    /// Entries of a list: over twice `k`, so that cuts are rare, or the number of references if smaller.
    capacity: usize,
    /// Queries of a group.
    group: usize,
}

/// Queries of a group: whole panels, groups of nearly equal size, and at least one for each thread.
fn group_rows(count: usize, capacity: usize, threads: usize) -> usize {
    let fit = (LIST_BYTES / (capacity * size_of::<u64>())).clamp(GROUP, MOST_QUERIES);
    let groups = count.div_ceil(fit).next_multiple_of(threads);
    count.div_ceil(groups).next_multiple_of(GROUP)
}

/// Rows of unit norm, `[rows, dim]`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    values: Values<'a>,
    rows: usize,
    dim: usize,
}

#[derive(Clone, Copy)]
enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// `NotFinite` or `NotUnit` of the first bad row.
    fn checked(name: &'static str, rows: &'a Rows<'_>) -> Result<Self> {
        validate_rows(name, rows)?;
        let values = match &rows.embeddings {
            Embeddings::F32(view) => Values::F32(contiguous(name, view)?),
            Embeddings::F16(view) => Values::F16(contiguous(name, view)?),
            Embeddings::Bf16(view) => Values::Bf16(contiguous(name, view)?),
        };
        let matrix = Self { values, rows: rows.embeddings.rows(), dim: rows.embeddings.dim() };
        let workers = Workers::new(matrix.rows.saturating_mul(matrix.dim));
        let mut squares = vec![0.0; matrix.rows];
        workers.for_each_chunk(&mut squares, MAX_BLOCK, |chunk, squares| {
            let mut converted = Vec::new();
            let block = matrix.block(chunk * MAX_BLOCK, squares.len(), &mut converted);
            let rows = block.chunks_exact(matrix.dim);
            squares.iter_mut().zip(rows).for_each(|(square, row)| *square = square_sum(row));
        });
        let tolerance = rows.embeddings.norm_tolerance();
        squares.iter().enumerate().try_for_each(|(row, &square)| check_unit(name, row, square, tolerance))?;
        Ok(matrix)
    }

    /// `count` rows from `first` on as float32, converted into `buffer` if they are narrower.
    fn block<'b>(&self, first: usize, count: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let range = first * self.dim..(first + count) * self.dim;
        if let Values::F32(values) = self.values {
            return &values[range];
        }
        grow(buffer, range.len());
        let target = &mut buffer[..range.len()];
        match self.values {
            Values::F32(values) => target.copy_from_slice(&values[range]),
            Values::F16(values) => values[range].convert_to_f32_slice(target),
            Values::Bf16(values) => values[range].convert_to_f32_slice(target),
        }
        target
    }

    /// Packs rows into panels of 16.
    fn pack(&self, first: usize, count: usize, scratch: &mut Packed) {
        let size = count.div_ceil(GROUP) * GROUP * self.dim;
        scratch.panels.grow(size);
        let block = self.block(first, count, &mut scratch.converted);
        let row = |i: usize| &block[i * self.dim..][..self.dim];
        pack_transposed(row, count, self.dim, &mut scratch.panels[..size]);
        scratch.size = size;
    }
}

/// Rows in panels.
#[derive(Default)]
struct Packed {
    converted: Vec<f32>,
    panels: Buffer,
    size: usize,
}

impl Packed {
    fn panels(&self) -> &[f32] {
        &self.panels[..self.size]
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    queries: Packed,
    references: Packed,
    lists: Lists,
}

/// The hits of each query of a group so far.
#[derive(Default)]
struct Lists {
    /// `[group, capacity]`, unordered.
    hits: Vec<u64>,
    /// Number of hits of each query.
    lengths: Vec<usize>,
    /// Similarity of the k-th best hit at the last cut. References come in order of index, so a later one
    /// must exceed it.
    bounds: Vec<f32>,
}

/// Similarity and index in one word. Words ascend by falling similarity, among equals by rising index.
fn hit(similarity: f32, index: u32) -> u64 {
    let bits = similarity.to_bits();
    // As integers, negative floats descend.
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(index)
}

/// The converse of [`hit`].
fn parts(hit: u64) -> (f32, u32) {
    let ascending = !((hit >> 32) as u32);
    let bits = if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending };
    (f32::from_bits(bits), hit as u32)
}

impl Lists {
    fn reset(&mut self, plan: &Plan, queries: usize) {
        grow(&mut self.hits, queries * plan.capacity);
        self.lengths.clear();
        self.lengths.resize(queries, 0);
        self.bounds.clear();
        self.bounds.resize(queries, f32::NEG_INFINITY);
    }

    #[inline(always)]
    fn push(&mut self, plan: &Plan, query: usize, similarity: f32, index: u32) {
        let length = self.lengths[query];
        self.hits[query * plan.capacity + length] = hit(similarity, index);
        self.lengths[query] = length + 1;
        if length + 1 == plan.capacity {
            self.cut(plan, query);
        }
    }

    /// Keeps the k best hits, if there are more.
    #[cold]
    #[inline(never)]
    fn cut(&mut self, plan: &Plan, query: usize) {
        if self.lengths[query] > plan.k {
            let hits = &mut self.hits[query * plan.capacity..][..self.lengths[query]];
            let (_, last, _) = hits.select_nth_unstable(plan.k - 1);
            self.bounds[query] = parts(*last).0;
            self.lengths[query] = plan.k;
        }
    }

    /// Writes the k best of each query, in order.
    fn write(
        &mut self,
        plan: &Plan,
        mut indices: ArrayViewMut2<'_, u32>,
        mut similarities: ArrayViewMut2<'_, f32>,
    ) {
        for query in 0..self.lengths.len() {
            self.cut(plan, query);
            let hits = &mut self.hits[query * plan.capacity..][..self.lengths[query]];
            hits.sort_unstable();
            let (mut indices, mut similarities) = (indices.row_mut(query), similarities.row_mut(query));
            for ((hit, index), similarity) in hits.iter().zip(&mut indices).zip(&mut similarities) {
                (*similarity, *index) = parts(*hit);
            }
        }
    }
}

/// Compares one group of queries with all references.
struct Pass<'a> {
    plan: &'a Plan,
    queries: Matrix<'a>,
    references: Matrix<'a>,
    first: usize,
    count: usize,
    scratch: &'a mut Scratch,
}

impl Work for Pass<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { plan, queries, references, first, count, scratch } = self;
        let Scratch { queries: packed, references: block, lists } = scratch;
        queries.pack(first, count, packed);
        lists.reset(plan, count);
        let panel = queries.dim * GROUP;
        let mut strip = [0.0; STRIP * MAX_BLOCK];
        for start in (0..references.rows).step_by(MAX_BLOCK) {
            let width = MAX_BLOCK.min(references.rows - start);
            references.pack(start, width, block);
            for query in (0..count).step_by(STRIP) {
                let rows = &packed.panels()[query / GROUP * panel..][..panel];
                product(simd, rows, query % GROUP, block.panels(), &mut strip, MAX_BLOCK, false);
                for r in 0..STRIP.min(count - query) {
                    let line = &strip[r * MAX_BLOCK..][..width.next_multiple_of(GROUP)];
                    let bound = simd.splat_f32s(lists.bounds[query + r]);
                    for (v, &s) in S::as_simd_f32s(line).0.iter().enumerate() {
                        let mut bits = simd.above(s, bound);
                        while bits != 0 {
                            let column = v * S::F32_LANES + bits.trailing_zeros() as usize;
                            bits &= bits - 1;
                            let (index, similarity) = (start + column, line[column]);
                            let own = plan.itself && index == first + query + r;
                            // The bound may have risen since the comparison.
                            if column < width && !own && similarity > lists.bounds[query + r] {
                                lists.push(plan, query + r, similarity, index as u32);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_ordered_by_similarity_then_index_and_read_back() {
        let values = [1.0, 0.5, 1e-30, 0.0, -0.0, -1e-30, -0.25, -1.0];
        let hits: Vec<u64> = values.iter().flat_map(|&value| [hit(value, 3), hit(value, u32::MAX)]).collect();
        assert!(hits.is_sorted_by(|a, b| a < b), "{hits:x?}");
        for (i, &hit) in hits.iter().enumerate() {
            let (similarity, index) = parts(hit);
            assert_eq!(similarity.to_bits(), f32::to_bits(values[i / 2]));
            assert_eq!(index, if i % 2 == 0 { 3 } else { u32::MAX });
        }
    }

    #[test]
    fn groups_hold_whole_panels_cover_all_queries_and_keep_every_thread_busy() {
        for count in [1, 15, 16, 17, 700, 8192, 60_502] {
            for capacity in [18, 2016, 60_502, 1 << 24] {
                for threads in [1, 2, 7, 64] {
                    let group = group_rows(count, capacity, threads);
                    assert!(
                        group.is_multiple_of(GROUP) && group <= MOST_QUERIES,
                        "{count} {capacity} {threads}"
                    );
                    let groups = count.div_ceil(group);
                    assert!(
                        groups >= threads.min(count.div_ceil(GROUP)) * 2 / 3,
                        "{count} {capacity} {threads}"
                    );
                    assert!(group == GROUP || group * capacity * 8 <= LIST_BYTES + GROUP * capacity * 8);
                }
            }
        }
    }
}
