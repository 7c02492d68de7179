//! The k most similar references of every query, for Recall@K (SPEC 6).

use bytemuck::cast_slice_mut;
use ndarray::Array2;

use super::loss::{Launcher, matrix_bytes, pointer};
use super::params::{Counters, PrepareParams, RetrievalParams, TILE};
use super::plan::{Shape, retrieval_capacity, tiles};
use super::workspace::{Layout, Region};
use super::{Device, DeviceBackend, Kernel};
use crate::backend::Nearest;
use crate::loss::{Batch, Rows, check_unit};
use crate::{Error, Result};

/// Bytes of query buffers that are alive at once; more queries are searched in turns.
/// A multiple of what all multiprocessors of one GPU work on (132 tiles of 128 queries, k = 1,000: 277 MB).
const BUFFER_BYTES: usize = 1 << 29;

struct RetrievalLayout {
    layout: Layout,
    inputs: [Region; 2],
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
    fn new(shape: &Shape, k: usize) -> Self {
        let mut layout = Layout::default();
        // Queries that search among themselves are their own references.
        let counts = [shape.anchors, shape.references.unwrap_or(0)];
        let capacity = retrieval_capacity(k, shape.reference_count());
        let tile_bytes = capacity * TILE as usize * size_of::<u64>();
        let turn = (BUFFER_BYTES / tile_bytes).clamp(1, tiles(shape.anchors));
        let bytes = shape.precision.bytes();
        Self {
            inputs: counts.map(|count| layout.region::<u8>(count * shape.dim * bytes)),
            rows: counts
                .map(|count| layout.region::<u8>(tiles(count) * TILE as usize * shape.stride() * bytes)),
            square_sums: counts.map(|count| layout.region::<f64>(count)),
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
        if k == 0 || u32::try_from(k).is_err() {
            return Err(Error::InvalidSetting { name: "k", value: k.to_string(), range: "1 to 2^32 - 1" });
        }
        let shape = self.shape(&batch);
        shape.check()?;
        let layout = RetrievalLayout::new(&shape, k);
        let Self { device, retrieval, .. } = self;
        let buffer = retrieval.lay(device, &layout.layout)?;
        device.fill(buffer, layout.counters.offset, layout.counters.bytes, 0xff)?;
        let sides = [Some(("queries", queries)), references.map(|rows| ("references", rows))];
        for (region, (name, rows)) in layout.inputs.into_iter().zip(sides.into_iter().flatten()) {
            device.upload(buffer, region.offset, matrix_bytes(&rows.embeddings, name)?)?;
        }

        let base = device.address(buffer);
        let mut launcher = Launcher { device: &mut *device, shape };
        let bad = [std::mem::offset_of!(Counters, bad_anchor), std::mem::offset_of!(Counters, bad_reference)];
        for (index, (_, rows)) in sides.into_iter().flatten().enumerate() {
            let params = PrepareParams {
                input: pointer::<std::ffi::c_void>(base, layout.inputs[index]),
                rows: pointer(base, layout.rows[index]),
                order: std::ptr::null(),
                valid: std::ptr::null(),
                count: shape.sides(index == 1).0 as u32,
                dim: shape.dim as u32,
                stride: shape.stride() as u32,
                check: 1,
                norm_tolerance: rows.embeddings.norm_tolerance(),
                square_sums: pointer(base, layout.square_sums[index]),
                bad: pointer::<u32>(base + bad[index] as u64, layout.counters),
                column_sums: std::ptr::null_mut(),
            };
            launcher.launch(Kernel::Prepare(shape.precision), index == 1, &params)?;
        }
        let searched = usize::from(references.is_some());
        for first_tile in (0..tiles(shape.anchors)).step_by(layout.turn) {
            let rows_left = shape.anchors - first_tile * TILE as usize;
            launcher.shape = Shape { anchors: rows_left.min(layout.turn * TILE as usize), ..shape };
            let params = RetrievalParams {
                queries: pointer::<std::ffi::c_void>(base, layout.rows[0]),
                references: pointer::<std::ffi::c_void>(base, layout.rows[searched]),
                query_count: shape.anchors as u32,
                reference_count: shape.reference_count() as u32,
                stride: shape.stride() as u32,
                k: k as u32,
                capacity: layout.capacity as u32,
                leave_self_out: u32::from(references.is_none()),
                first_tile: first_tile as u32,
                reserved: 0,
                buffer: pointer(base, layout.buffer),
                indices: pointer(base, layout.indices),
                similarities: pointer(base, layout.similarities),
            };
            launcher.launch(Kernel::Retrieval(shape.precision), false, &params)?;
        }

        for (index, (name, rows)) in sides.into_iter().flatten().enumerate() {
            let mut row = [0u32];
            device.download(buffer, layout.counters.offset + bad[index], cast_slice_mut(&mut row))?;
            if row[0] == u32::MAX {
                continue;
            }
            let mut square_sum = [0.0f64];
            let offset = layout.square_sums[index].offset + row[0] as usize * size_of::<f64>();
            device.download(buffer, offset, cast_slice_mut(&mut square_sum))?;
            check_unit(name, row[0] as usize, square_sum[0], rows.embeddings.norm_tolerance())?;
        }
        let mut nearest = Nearest {
            indices: Array2::zeros((shape.anchors, k)),
            similarities: Array2::zeros((shape.anchors, k)),
        };
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
