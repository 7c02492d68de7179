//! Sizes of the mined sets (SPEC 2-3), tile by tile.

use super::pairs::Pairs;
use super::rows::{Block, MAX_BLOCK};
use super::shares::{Shares, Weights};
use super::simd::{GROUP, Lanes, Work};
use super::tile::{Candidates, MAX_GROUPS, bits};

/// Sizes of the sets within one tile, `[positives, negatives]` by local row and column.
#[derive(Debug, Clone)]
pub struct Counts {
    pub rows: [[u8; 2]; MAX_BLOCK],
    pub columns: [[u8; 2]; MAX_BLOCK],
}

const _: () = assert!(MAX_BLOCK <= u8::MAX as usize);

impl Default for Counts {
    fn default() -> Self {
        Self { rows: [[0; 2]; MAX_BLOCK], columns: [[0; 2]; MAX_BLOCK] }
    }
}

/// Counts the selected pairs of one tile.
pub struct CountTile<'a, 'b> {
    pub pairs: Pairs<'a>,
    pub tile: (usize, usize),
    pub candidates: Candidates<'b>,
    pub weights: &'b Weights,
    pub counts: &'b mut Counts,
}

impl Work for CountTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { pairs, tile: (row, column), candidates, weights, counts } = self;
        *counts = Counts::default();
        let (rows, across): (Block, Block) =
            (pairs.rows.order.blocks[row], pairs.columns.order.blocks[column]);
        let bounds = |shares: &Shares| {
            let mut padded = [0.0; MAX_BLOCK];
            padded[..across.rows].copy_from_slice(shares.columns(&pairs, across).bounds);
            padded
        };
        let across_bounds = [bounds(&weights.positives), bounds(&weights.negatives)];
        let has_positives = pairs.has_positives(row, column);
        // As floats, which vectors can add. Exact, since a count is at most the rows of a block.
        let mut columns = [[[0.0f32; GROUP]; MAX_GROUPS]; 2];
        let mut reader = candidates;
        for (r, counts) in counts.rows[..rows.rows].iter_mut().enumerate() {
            let position = rows.start + r;
            let class = if has_positives { pairs.class_columns(position, column) } else { (0, 0) };
            let own = [weights.positives.row(position).bound, weights.negatives.row(position).bound];
            reader.next_lines(simd, |group, mask, s| {
                let same_class = bits(class.0, class.1, group);
                for (kind, mask) in [mask & same_class, mask & !same_class].into_iter().enumerate() {
                    if mask == 0 {
                        continue;
                    }
                    let own = [own[kind]; GROUP];
                    let Some(other) = across_bounds[kind][group * GROUP..].first_chunk() else { continue };
                    // Positives are selected below their bound, negatives above it.
                    let (by_row, by_column) = if kind == 0 {
                        (simd.above_group(&own, &s), simd.above_group(other, &s))
                    } else {
                        (simd.above_group(&s, &own), simd.above_group(&s, other))
                    };
                    counts[kind] += (by_row & mask).count_ones() as u8;
                    let ones = simd.expand(&[1.0; GROUP], by_column & mask);
                    for (sum, one) in columns[kind][group].iter_mut().zip(&ones) {
                        *sum += one;
                    }
                }
            });
        }
        for (kind, columns) in columns.iter().enumerate() {
            for (count, column) in counts.columns.iter_mut().zip(columns.as_flattened()) {
                count[kind] = *column as u8;
            }
        }
    }
}
