//! A tile of S: a block of rows against a block of columns. Only its candidates are kept.
//!
//! Candidates are a stream of 16-bit words and one of similarities. Each row
//! of the tile has a word that says which groups of 16 columns hold any, then
//! a word of bits for each such group; similarities follow in the same order.
//! That is 4 bytes a candidate and at most 1/8 byte a pair.

use super::buffer::Buffer;
use super::pairs::Pairs;
use super::product::{STRIP, product};
use super::rows::{MAX_BLOCK, PanelBuffer, grow};
use super::simd::{GROUP, Lanes, Work, padded};

/// Groups of 16 columns in a tile, at most; a row's word has a bit for each.
pub const MAX_GROUPS: usize = MAX_BLOCK.div_ceil(GROUP);
const _: () = assert!(MAX_GROUPS <= 16 && MAX_BLOCK.is_multiple_of(GROUP));

/// Bounds that a similarity must exceed, by position.
#[derive(Clone, Copy)]
pub struct Bounds<'a> {
    pub rows: &'a [f32],
    /// Bounds of the columns, if they have any.
    pub columns: Option<&'a [f32]>,
}

/// Similarities of a strip; lines begin at cache lines.
#[derive(Debug)]
#[repr(C, align(64))]
struct Strip([[f32; MAX_BLOCK]; STRIP]);

/// Results of a sweep over one tile, beside its candidates.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Found {
    /// Largest negative of each row and of each column of the tile.
    pub row_max: [f32; MAX_BLOCK],
    pub column_max: [f32; MAX_BLOCK],
    /// Negatives above the probe's bounds, both directions.
    pub probe: u64,
    /// Number of candidates.
    pub filled: usize,
}

/// Buffers of one thread.
#[derive(Debug)]
pub struct TileScratch {
    pub row_panels: PanelBuffer,
    pub panels: PanelBuffer,
    strip: Box<Strip>,
    /// Candidates of the tile swept last; `values` is longer than their number, `found.filled`.
    words: Vec<u16>,
    values: Vec<f32>,
    /// Weights of the tile weighed last; likewise longer.
    pub weighed: Vec<f32>,
    pub found: Found,
}

impl Default for TileScratch {
    fn default() -> Self {
        Self {
            row_panels: PanelBuffer::default(),
            panels: PanelBuffer::default(),
            strip: Box::new(Strip([[0.0; MAX_BLOCK]; STRIP])),
            words: Vec::with_capacity(MAX_BLOCK * (1 + MAX_GROUPS)),
            values: Vec::new(),
            weighed: Vec::new(),
            found: Found { row_max: [0.0; MAX_BLOCK], column_max: [0.0; MAX_BLOCK], probe: 0, filled: 0 },
        }
    }
}

impl TileScratch {
    /// Forgets which panels it holds: other rows come next.
    pub fn reset(&mut self) {
        self.row_panels.reset();
        self.panels.reset();
    }

    pub fn bytes(&self) -> usize {
        self.panels.bytes()
            + self.row_panels.bytes()
            + size_of_val(&*self.strip)
            + self.words.capacity() * 2
            + (self.values.capacity() + self.weighed.capacity()) * 4
            + size_of::<Found>()
    }

    /// Candidates of the tile swept last, and room for their weights.
    pub fn swept(&mut self) -> (Candidates<'_>, &mut Vec<f32>) {
        (Candidates { words: &self.words, values: &self.values[..self.found.filled] }, &mut self.weighed)
    }
}

/// The panel that holds the strip of rows from local row `start`.
fn strip_panel(panels: &[f32], start: usize, panel: usize) -> &[f32] {
    &panels[start / GROUP * panel..][..panel]
}

/// Bits of the columns `first..last` in a group of 16.
pub fn bits(first: usize, last: usize, group: usize) -> u16 {
    let below = |column: usize| {
        let lanes = column.saturating_sub(group * GROUP).min(GROUP);
        (1u32 << lanes).wrapping_sub(1) as u16
    };
    below(last) & !below(first)
}

/// Visits the same-class similarities of a tile.
pub struct SameClassTile<'a, 'b, F> {
    pub pairs: Pairs<'a>,
    pub tile: (usize, usize),
    pub scratch: &'b mut TileScratch,
    /// Buffer that keeps the whole tile for the sweep, `[rows to whole strips, MAX_BLOCK]`. Without it only
    /// the groups that are visited are computed.
    pub keep: Option<&'b mut Buffer>,
    /// Called with the local row, the first local column and the similarities from there on.
    pub visit: F,
}

impl<F: FnMut(usize, usize, &[f32])> Work for SameClassTile<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        let Self { pairs, tile: (row, column), .. } = self;
        let block = pairs.rows.order.blocks[row];
        let diagonal = pairs.square && row == column;
        let row_panels = pairs.rows.panels(row, &mut self.scratch.row_panels);
        let panels = pairs.columns.panels(column, &mut self.scratch.panels);
        let panel = pairs.columns.dim * GROUP;
        if let Some(kept) = &mut self.keep {
            kept.resize(block.rows.next_multiple_of(STRIP) * MAX_BLOCK);
        }
        for start in (0..block.rows).step_by(STRIP) {
            let count = STRIP.min(block.rows - start);
            let (first, _) = pairs.class_columns(block.start + start, column);
            let (_, last) = pairs.class_columns(block.start + start + count - 1, column);
            let visited = first / GROUP..last.div_ceil(GROUP);
            let (groups, strip) = match &mut self.keep {
                Some(kept) => {
                    let lowest = if diagonal { start / GROUP } else { 0 };
                    (lowest..panels.len() / panel, &mut kept[start * MAX_BLOCK..][..STRIP * MAX_BLOCK])
                }
                None if first >= last => continue,
                None => (visited, self.scratch.strip.0.as_flattened_mut()),
            };
            product(
                simd,
                strip_panel(row_panels, start, panel),
                start % GROUP,
                &panels[groups.start * panel..groups.end * panel],
                &mut strip[groups.start * GROUP..],
                MAX_BLOCK,
                false,
            );
            for r in 0..count {
                let (mut begin, end) = pairs.class_columns(block.start + start + r, column);
                if diagonal {
                    begin = begin.max(start + r + 1);
                }
                if begin < end {
                    (self.visit)(start + r, begin, &strip[r * MAX_BLOCK..][begin..end]);
                }
            }
        }
    }
}

/// Sweeps one tile: fills the candidates and findings of the scratch.
pub struct Sweep<'a, 'b> {
    pub pairs: Pairs<'a>,
    pub tile: (usize, usize),
    /// Negatives above these are candidates; so is every pair of one class.
    pub keep: Bounds<'a>,
    pub probe: Bounds<'a>,
    /// The tile's similarities if the same-class pass has kept them, or empty.
    pub kept: &'b [f32],
    pub scratch: &'b mut TileScratch,
}

/// Bounds of the columns of a tile, by local column, padded to whole groups.
#[repr(C, align(64))]
struct Columns {
    keep: [f32; MAX_BLOCK],
    probe: [f32; MAX_BLOCK],
    duplicate: [f32; MAX_BLOCK],
    /// +inf, and -inf where there is no column.
    cap: [f32; MAX_BLOCK],
}

impl Columns {
    /// The columns `range` of the other side; missing bounds are infinite, so that nothing exceeds them.
    #[inline(always)]
    fn new(
        range: std::ops::Range<usize>,
        keep: Option<&[f32]>,
        probe: Option<&[f32]>,
        duplicate: &[f32],
    ) -> Self {
        let mut columns = Self {
            keep: [f32::INFINITY; MAX_BLOCK],
            probe: [f32::INFINITY; MAX_BLOCK],
            duplicate: [f32::INFINITY; MAX_BLOCK],
            cap: [f32::NEG_INFINITY; MAX_BLOCK],
        };
        let count = range.len();
        for (bounds, local) in [(keep, &mut columns.keep), (probe, &mut columns.probe)] {
            if let Some(bounds) = bounds {
                local[..count].copy_from_slice(&bounds[range.clone()]);
            }
        }
        columns.duplicate[..count].copy_from_slice(&duplicate[range]);
        columns.cap[..count].fill(f32::INFINITY);
        columns
    }
}

impl Work for Sweep<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { pairs, tile: (row, column), keep, probe, kept, scratch } = self;
        let TileScratch { row_panels, panels, strip, words, values, found, .. } = scratch;
        let Strip(strip) = &mut **strip;
        let (block, across) = (pairs.rows.order.blocks[row], pairs.columns.order.blocks[column]);
        let row_panels = pairs.rows.panels(row, row_panels);
        let panels = pairs.columns.panels(column, panels);
        let panel = pairs.columns.dim * GROUP;
        let groups = across.panels();
        let positives = pairs.has_positives(row, column);
        let diagonal = pairs.square && row == column;

        let columns = Columns::new(across.range(), keep.columns, probe.columns, pairs.columns.duplicate);
        found.column_max.fill(f32::NEG_INFINITY);
        found.probe = 0;
        words.clear();
        // A whole group is written at a time, so the last one needs room behind it.
        grow(values, block.rows * across.rows + GROUP);
        let values: &mut [u32] = bytemuck::cast_slice_mut(values);
        let mut filled = 0;
        for start in (0..block.rows).step_by(STRIP) {
            let count = STRIP.min(block.rows - start);
            let first_group = if diagonal { start / GROUP } else { 0 };
            if kept.is_empty() {
                product(
                    simd,
                    strip_panel(row_panels, start, panel),
                    start % GROUP,
                    &panels[first_group * panel..],
                    &mut strip.as_flattened_mut()[first_group * GROUP..],
                    MAX_BLOCK,
                    false,
                );
            } else {
                let lines = &kept[start * MAX_BLOCK..][..STRIP * MAX_BLOCK];
                strip.as_flattened_mut().copy_from_slice(lines);
            }
            for r in 0..count {
                let line = &mut strip[r];
                let position = block.start + start + r;
                // Pairs of one class are set aside while negatives are scanned.
                let mut own = [0.0; MAX_BLOCK];
                let (mut begin, mut end) =
                    if positives { pairs.class_columns(position, column) } else { (0, 0) };
                if diagonal {
                    begin = begin.max(start + r + 1);
                    end = end.max(begin);
                }
                if diagonal {
                    line[..=start + r].fill(f32::NEG_INFINITY);
                }
                own[begin..end].copy_from_slice(&line[begin..end]);
                line[begin..end].fill(f32::NEG_INFINITY);

                let mut masks = [0u16; MAX_GROUPS];
                let bounds = (keep.rows[position], probe.rows[position]);
                let scanned = scan(
                    simd,
                    line,
                    first_group..groups,
                    &columns,
                    bounds,
                    &mut found.column_max,
                    &mut masks,
                );
                found.row_max[start + r] = scanned.0;
                found.probe += u64::from(scanned.1);

                line[begin..end].copy_from_slice(&own[begin..end]);
                let lines = line.as_chunks::<GROUP>().0.iter().zip(columns.duplicate.as_chunks::<GROUP>().0);
                let own = pairs.rows.duplicate[position];
                for (group, (line, other)) in lines.enumerate().take(end.div_ceil(GROUP)).skip(begin / GROUP)
                {
                    let bounds = other.map(|other| own.max(other));
                    masks[group] |= simd.above_group(&bounds, line) & bits(begin, end, group);
                }
                if let Some(itself) = pairs.itself(position, column) {
                    masks[itself / GROUP] &= !bits(itself, itself + 1, itself / GROUP);
                }
                filled += write_candidates(simd, line, &masks[..groups], words, &mut values[filled..]);
            }
        }
        found.filled = filled;
    }
}

/// Writes the candidates of a row of a tile: to `words` which groups have any, then their masks; to `values`
/// their similarities without gaps. Returns their number.
#[inline(always)]
fn write_candidates<S: Lanes>(
    simd: S,
    line: &[f32; MAX_BLOCK],
    masks: &[u16],
    words: &mut Vec<u16>,
    values: &mut [u32],
) -> usize {
    let head = words.len();
    words.push(0);
    let (mut occupied, mut filled) = (0, 0);
    for (g, &mask) in masks.iter().enumerate().filter(|(_, mask)| **mask != 0) {
        occupied |= 1 << g;
        words.push(mask);
        if let Some(target) = values[filled..].first_chunk_mut() {
            simd.compress(bytemuck::cast_ref(&line.as_chunks::<GROUP>().0[g]), mask, target);
        }
        filled += mask.count_ones() as usize;
    }
    words[head] = occupied;
    filled
}

/// Largest negative, probe count and candidate bits of one row of a tile.
#[inline(always)]
fn scan<S: Lanes>(
    simd: S,
    line: &[f32; MAX_BLOCK],
    groups: std::ops::Range<usize>,
    columns: &Columns,
    (keep, probe): (f32, f32),
    column_max: &mut [f32; MAX_BLOCK],
    masks: &mut [u16; MAX_GROUPS],
) -> (f32, u32) {
    let parts = GROUP / S::F32_LANES;
    let line = S::as_simd_f32s(line).0;
    let column_keep = S::as_simd_f32s(&columns.keep).0;
    let column_probe = S::as_simd_f32s(&columns.probe).0;
    let cap = S::as_simd_f32s(&columns.cap).0;
    let column_max = S::as_mut_simd_f32s(column_max).0;
    let (row_keep, row_probe) = (simd.splat_f32s(keep), simd.splat_f32s(probe));
    let mut row_max = simd.splat_f32s(f32::NEG_INFINITY);
    let mut count = 0;
    for g in groups {
        let mut mask = 0;
        for part in 0..parts {
            let v = g * parts + part;
            let s = simd.min_f32s(line[v], cap[v]);
            row_max = simd.max_f32s(row_max, s);
            column_max[v] = simd.max_f32s(column_max[v], s);
            let bits = simd.above(s, row_keep) | simd.above(s, column_keep[v]);
            mask |= bits << (part * S::F32_LANES);
            count += simd.above(s, row_probe).count_ones() + simd.above(s, column_probe[v]).count_ones();
        }
        masks[g] = mask as u16;
    }
    (simd.reduce_max_f32s(row_max), count)
}

/// Candidates of a tile: their words, and the similarity or weight of each. Reading a row moves on to the
/// next.
#[derive(Debug, Clone, Copy)]
pub struct Candidates<'a> {
    pub words: &'a [u16],
    pub values: &'a [f32],
}

impl<'a> Candidates<'a> {
    /// The next row's values. Calls `visit` for each of its groups that has candidates, with the group's
    /// number, its bits and the number of the row's values before it.
    #[inline(always)]
    pub fn next_groups(&mut self, mut visit: impl FnMut(usize, u16, usize)) -> &'a [f32] {
        let mut count = 0;
        let Some((&occupied, mut words)) = self.words.split_first() else { return &[] };
        let mut occupied = occupied;
        while occupied != 0 {
            let Some((&mask, rest)) = words.split_first() else { break };
            words = rest;
            visit(occupied.trailing_zeros() as usize, mask, count);
            count += mask.count_ones() as usize;
            occupied &= occupied - 1;
        }
        let (row, rest) = self.values.split_at(count);
        self.words = words;
        self.values = rest;
        row
    }

    /// As [`next_groups`](Self::next_groups), with the group's values in their lanes.
    #[inline(always)]
    pub fn next_lines<S: Lanes>(&mut self, simd: S, mut visit: impl FnMut(usize, u16, [f32; GROUP])) {
        let values = self.values;
        self.next_groups(|group, mask, before| {
            visit(group, mask, simd.expand(&padded(&values[before..]), mask));
        });
    }

    /// The next row's values; writes their local columns, ascending, to `columns`.
    #[inline(always)]
    pub fn next_row<S: Lanes>(&mut self, simd: S, columns: &mut [u32; MAX_BLOCK + GROUP]) -> &'a [f32] {
        self.next_groups(|group, mask, before| simd.compress_columns(group, mask, &mut columns[before..]))
    }
}
