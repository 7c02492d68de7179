//! The k most similar references of every query, for Recall@K (SPEC 6).

use bytemuck::{cast_slice, cast_slice_mut};

use super::loss::{Launcher, RowCheck, matrix_bytes, pointer};
use super::params::{Counters, PrepareParams, RetrievalParams, TILE};
use super::plan::{Shape, retrieval_capacity, tiles};
use super::workspace::{Layout, Region};
use super::{Device, DeviceBackend, Kernel};
use crate::Result;
use crate::backend::Nearest;
use crate::loss::{Batch, Rows, UnitCheck, check_unit};

/// Bytes of query buffers that are alive at once; more queries are searched in turns.
/// A multiple of what all multiprocessors of one GPU work on (132 tiles of 128 queries, k = 1,000: 277 MB).
const BUFFER_BYTES: usize = 1 << 29;

/// What is searched, whichever memory the rows are in.
pub(super) struct Search<'a> {
    /// Of the rows that are searched.
    pub(super) shape: Shape,
    pub(super) check: RowCheck,
    /// Whether the rows stay in the caller's memory, so that none is set aside for them.
    pub(super) resident: bool,
    /// Square form only: the rows that take part, of how many.
    pub(super) picked: Option<(&'a [u32], usize)>,
}

/// What messages call the sides.
const NAMES: [&str; 2] = ["queries", "references"];

struct RetrievalLayout {
    layout: Layout,
    inputs: [Region; 2],
    /// Of the rows that take part, where not all do.
    picked: Region,
    rows: [Region; 2],
    square_sums: [Region; 2],
    /// As in [`Counters`]; of its fields only the bad rows are used.
    counters: Region,
    buffer: Region,
    indices: Region,
    similarities: Region,
    capacity: usize,
    /// Query tiles of one launch.
    turn: usize,
}

impl RetrievalLayout {
    /// Inputs, prepared rows, results, and up to [`BUFFER_BYTES`] of buffers.
    fn new(search: &Search<'_>, k: usize) -> Self {
        let Search { shape, resident, picked, .. } = search;
        let mut layout = Layout::default();
        // Queries that search among themselves are their own references.
        let counts = [shape.anchors, shape.references.unwrap_or(0)];
        let capacity = retrieval_capacity(k, shape.reference_count());
        let tile_bytes = capacity * TILE as usize * size_of::<u64>();
        let turn = (BUFFER_BYTES / tile_bytes).clamp(1, tiles(shape.anchors));
        let bytes = shape.precision.bytes();
        let if_copied = |elements: usize| if *resident { 0 } else { elements };
        // The check writes to the caller's index of a row.
        let checked = [picked.map_or(counts[0], |(_, all)| all), counts[1]];
        Self {
            inputs: counts.map(|count| layout.region::<u8>(if_copied(count * shape.dim * bytes))),
            picked: layout.region::<u32>(picked.map_or(0, |(rows, _)| rows.len())),
            rows: counts
                .map(|count| layout.region::<u8>(tiles(count) * TILE as usize * shape.stride() * bytes)),
            square_sums: checked.map(|count| layout.region::<f64>(count)),
            counters: layout.region::<Counters>(1),
            buffer: layout.region::<u64>(turn * TILE as usize * capacity),
            indices: layout.region::<u32>(shape.anchors * k),
            similarities: layout.region::<f32>(shape.anchors * k),
            capacity,
            turn,
            layout,
        }
    }
}

impl<D: Device> DeviceBackend<D> {
    pub(super) fn run_retrieval(
        &mut self,
        queries: &Rows<'_>,
        references: Option<&Rows<'_>>,
        k: usize,
    ) -> Result<Nearest> {
        let queries = &queries.view();
        let references = references.map(Rows::view);
        let references = references.as_ref();
        let batch =
            Batch { references: references.copied(), ..Batch::square(queries.embeddings, queries.labels) };
        batch.validate()?;
        super::loss::same_type(&batch)?;
        let check = RowCheck { check: UnitCheck::Check, tolerance: queries.embeddings.norm_tolerance() };
        let search = Search { shape: self.shape(&batch), check, resident: false, picked: None };
        self.search(&search, k, |device, buffer, regions| {
            let mut addresses = [0; 2];
            for (side, rows) in [Some(queries), references].into_iter().enumerate() {
                let Some(rows) = rows else { continue };
                device.upload(buffer, regions[side].offset, matrix_bytes(&rows.embeddings, NAMES[side])?)?;
                addresses[side] = device.address(buffer) + regions[side].offset as u64;
            }
            Ok(addresses)
        })
    }

    /// The lists, of rows at the addresses that `place` answers (queries, references); it may put them
    /// into its buffer's regions.
    pub(super) fn search(
        &mut self,
        search: &Search<'_>,
        k: usize,
        place: impl FnOnce(&mut D, &mut D::Buffer, &[Region; 2]) -> Result<[u64; 2]>,
    ) -> Result<Nearest> {
        let Search { shape, check, picked, .. } = *search;
        shape.check()?;
        let mut nearest = Nearest::of_search(shape.anchors, shape.reference_count(), k)?;
        let layout = RetrievalLayout::new(search, k);
        let Self { device, retrieval, .. } = self;
        let buffer = retrieval.lay(device, &layout.layout)?;
        device.fill(buffer, layout.counters.offset, layout.counters.bytes, 0xff)?;
        let inputs = place(device, buffer, &layout.inputs)?;
        if let Some((rows, _)) = picked {
            device.upload(buffer, layout.picked.offset, cast_slice(rows))?;
        }

        let base = device.address(buffer);
        let mut launcher = Launcher { device: &mut *device, shape };
        let bad = [std::mem::offset_of!(Counters, bad_anchor), std::mem::offset_of!(Counters, bad_reference)];
        let sides = if shape.references.is_none() { 1 } else { 2 };
        for side in 0..sides {
            let params = PrepareParams {
                input: inputs[side] as usize as *const std::ffi::c_void,
                rows: pointer(base, layout.rows[side]),
                order: picked.map_or(std::ptr::null(), |_| pointer::<u32>(base, layout.picked)),
                valid: std::ptr::null(),
                count: shape.sides(side == 1).0 as u32,
                dim: shape.dim as u32,
                stride: shape.stride() as u32,
                check: u32::from(check.check == UnitCheck::Check),
                norm_tolerance: check.tolerance,
                square_sums: pointer(base, layout.square_sums[side]),
                bad: pointer::<u32>(base + bad[side] as u64, layout.counters),
                column_sums: std::ptr::null_mut(),
                duplicate: std::ptr::null_mut(),
                keys: std::ptr::null(),
                reference_keys: std::ptr::null(),
                classes: std::ptr::null_mut(),
                references: 0,
                reserved: 0,
            };
            launcher.launch(Kernel::Prepare(shape.precision), side == 1, &params)?;
        }
        for first_tile in (0..tiles(shape.anchors)).step_by(layout.turn) {
            let rows_left = shape.anchors - first_tile * TILE as usize;
            launcher.shape = Shape { anchors: rows_left.min(layout.turn * TILE as usize), ..shape };
            let params = RetrievalParams {
                queries: pointer::<std::ffi::c_void>(base, layout.rows[0]),
                references: pointer::<std::ffi::c_void>(base, layout.rows[sides - 1]),
                query_count: shape.anchors as u32,
                reference_count: shape.reference_count() as u32,
                stride: shape.stride() as u32,
                k: k as u32,
                capacity: layout.capacity as u32,
                leave_self_out: u32::from(shape.references.is_none()),
                first_tile: first_tile as u32,
                reserved: 0,
                buffer: pointer(base, layout.buffer),
                indices: pointer(base, layout.indices),
                similarities: pointer(base, layout.similarities),
            };
            launcher.launch(Kernel::Retrieval(shape.precision), false, &params)?;
        }

        for side in 0..sides {
            let mut row = [0u32];
            device.download(buffer, layout.counters.offset + bad[side], cast_slice_mut(&mut row))?;
            if row[0] == u32::MAX {
                continue;
            }
            let mut square_sum = [0.0f64];
            let offset = layout.square_sums[side].offset + row[0] as usize * size_of::<f64>();
            device.download(buffer, offset, cast_slice_mut(&mut square_sum))?;
            check_unit(NAMES[side], row[0] as usize, square_sum[0], check.tolerance)?;
        }
        let (Some(indices), Some(similarities)) =
            (nearest.indices.as_slice_mut(), nearest.similarities.as_slice_mut())
        else {
            unreachable!("standard layout")
        };
        device.download(buffer, layout.indices.offset, cast_slice_mut(indices))?;
        device.download(buffer, layout.similarities.offset, cast_slice_mut(similarities))?;
        Ok(nearest)
    }
}
