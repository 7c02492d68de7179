//! The k most similar references of every query, for Recall@K (SPEC 6).

use bytemuck::{cast_slice, cast_slice_mut};

use super::launcher::Launcher;
use super::layout::pointer;
use super::params::{Counters, PrepareParams, RetrievalParams, TILE};
use super::plan::LaunchPlan;
use super::search_plan::SearchPlan;
use super::shape::{Shape, tiles};
use super::transfer::{NO_ROW, RowTolerance, matrix_bytes};
use super::workspace::{Layout, Region};
use super::{Device, DeviceBackend, Kernel};
use crate::Result;
use crate::backend::{Nearest, PreparedGallery};
use crate::loss::{Batch, Rows, UnitCheck, check_unit, validate_rows};

/// Rows of one side of a search, in host or device memory.
pub(super) struct Searched<'a> {
    /// Their name in messages.
    pub(super) name: &'static str,
    /// Shape of a square batch of these rows.
    pub(super) shape: Shape,
    pub(super) check: RowTolerance,
    /// Whether the rows stay in the caller's memory and have no region.
    pub(super) resident: bool,
    /// The rows that take part, and the number of all rows; `None` if all take part.
    pub(super) picked: Option<(&'a [u32], usize)>,
}

/// A gallery in device memory, checked, in the kernels' layout.
#[derive(Clone, Copy)]
pub(super) struct Gallery {
    rows: u64,
    count: usize,
}

/// Regions of one side of a search.
struct SearchRegions {
    input: Region,
    /// Numbers of the rows that take part, if not all do.
    picked: Region,
    rows: Region,
    square_sums: Region,
    /// A [`Counters`], of which only the bad row is used.
    counters: Region,
}

impl SearchRegions {
    fn new(layout: &mut Layout, side: &Searched<'_>) -> Self {
        let Searched { shape, resident, picked, .. } = side;
        let (count, stored) = (shape.anchors, shape.precision.stored_bytes());
        let copied = if *resident { 0 } else { count * shape.dim * shape.precision.bytes() };
        Self {
            input: layout.region::<u8>(copied),
            picked: layout.region::<u32>(picked.map_or(0, |(rows, _)| rows.len())),
            rows: layout.region::<u8>(tiles(count) * TILE as usize * shape.stride() * stored),
            // Indexed by the caller's row numbers.
            square_sums: layout.region::<f64>(picked.map_or(count, |(_, all)| all)),
            counters: layout.region::<Counters>(1),
        }
    }
}

struct SearchLayout {
    layout: Layout,
    queries: SearchRegions,
    keys: Region,
    counts: Region,
    indices: Region,
    similarities: Region,
}

impl SearchLayout {
    /// Lays out queries, results, and the lists of one launch.
    fn new(queries: &Searched<'_>, plan: &SearchPlan, k: usize) -> Self {
        let mut layout = Layout::default();
        let count = queries.shape.anchors;
        let lists = plan.turn * TILE as usize * plan.lists;
        Self {
            queries: SearchRegions::new(&mut layout, queries),
            keys: layout.region::<u64>(lists * plan.capacity),
            counts: layout.region::<u32>(lists),
            indices: layout.region::<u32>(count * k),
            similarities: layout.region::<f32>(count * k),
            layout,
        }
    }
}

/// Copies rows into their region and returns their address, or returns the address where they already are.
type PutRows<'a, D> = &'a dyn Fn(&mut D, &mut <D as Device>::Buffer, Region) -> Result<u64>;

/// Issues the preparation of rows; [`check`] waits for it and reports a bad row.
fn prepare<D: Device>(
    device: &mut D,
    buffer: &mut D::Buffer,
    side: &Searched<'_>,
    regions: &SearchRegions,
    place: PutRows<'_, D>,
) -> Result<()> {
    let shape = side.shape;
    device.fill(buffer, regions.counters.offset, regions.counters.bytes, 0xff)?;
    let input = place(device, buffer, regions.input)?;
    if let Some((rows, _)) = side.picked {
        device.upload(buffer, regions.picked.offset, cast_slice(rows))?;
    }
    let base = device.address(buffer);
    let params = PrepareParams {
        input: input as usize as *const std::ffi::c_void,
        rows: pointer(base, regions.rows),
        order: side.picked.map_or(std::ptr::null(), |_| pointer::<u32>(base, regions.picked)),
        valid: std::ptr::null(),
        count: shape.anchors as u32,
        dim: shape.dim as u32,
        stride: shape.stride() as u32,
        check: u32::from(side.check.check == UnitCheck::Check),
        norm_tolerance: side.check.tolerance,
        square_sums: pointer(base, regions.square_sums),
        bad: pointer::<u32>(base + BAD_ROW as u64, regions.counters),
        column_sums: std::ptr::null_mut(),
        duplicate: std::ptr::null_mut(),
        lengths: std::ptr::null_mut(),
        keys: std::ptr::null(),
        reference_keys: std::ptr::null(),
        classes: std::ptr::null_mut(),
        references: 0,
        reserved: 0,
    };
    Launcher { device, shape }.launch(Kernel::Prepare(shape.precision), false, &params)
}

/// Where [`prepare`] reports a bad row.
const BAD_ROW: usize = std::mem::offset_of!(Counters, bad_anchor);

/// Waits for [`prepare`], and names the first bad row.
fn check<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    side: &Searched<'_>,
    regions: &SearchRegions,
) -> Result<()> {
    let mut row = [0u32];
    device.download(buffer, regions.counters.offset + BAD_ROW, cast_slice_mut(&mut row))?;
    if row[0] == NO_ROW {
        return Ok(());
    }
    let mut square_sum = [0.0f64];
    let offset = regions.square_sums.offset + row[0] as usize * size_of::<f64>();
    device.download(buffer, offset, cast_slice_mut(&mut square_sum))?;
    check_unit(side.name, row[0] as usize, square_sum[0], side.check.tolerance)
}

/// A gallery in the host's memory, copied and prepared.
struct HostGallery<'a, 'r, D: Device> {
    backend: &'a mut DeviceBackend<D>,
    rows: Rows<'r>,
    prepared: Gallery,
}

impl<D: Device> PreparedGallery for HostGallery<'_, '_, D> {
    fn nearest(&mut self, queries: &Rows<'_>, k: usize) -> Result<Nearest> {
        self.backend.find_in(queries, &self.rows, self.prepared, k)
    }
}

impl<D: Device> DeviceBackend<D> {
    pub(super) fn run_search(
        &mut self,
        gallery: &Rows<'_>,
        work: &mut dyn FnMut(&mut dyn PreparedGallery) -> Result<()>,
    ) -> Result<()> {
        let side = self.host_side("references", gallery)?;
        self.with_gallery(&side, &place_host(gallery, "references"), |backend, prepared| {
            work(&mut HostGallery { backend, rows: gallery.view(), prepared })
        })
    }

    pub(super) fn run_retrieval(
        &mut self,
        queries: &Rows<'_>,
        references: Option<&Rows<'_>>,
        k: usize,
    ) -> Result<Nearest> {
        let Some(references) = references else { return self.find_host_rows(queries, None, k) };
        let side = self.host_side("references", references)?;
        self.with_gallery(&side, &place_host(references, "references"), |backend, prepared| {
            backend.find_in(queries, references, prepared, k)
        })
    }

    /// Searches for queries in the prepared gallery of the host's rows `gallery`.
    fn find_in(
        &mut self,
        queries: &Rows<'_>,
        gallery: &Rows<'_>,
        prepared: Gallery,
        k: usize,
    ) -> Result<Nearest> {
        Batch::rectangular(queries.view(), gallery.view()).validate()?;
        self.find_host_rows(queries, Some(prepared), k)
    }

    fn host_side(&self, name: &'static str, rows: &Rows<'_>) -> Result<Searched<'static>> {
        validate_rows(name, rows)?;
        let check = RowTolerance { check: UnitCheck::Check, tolerance: rows.embeddings.norm_tolerance() };
        let shape = self.shape(&Batch::square(rows.embeddings, rows.labels));
        Ok(Searched { name, shape, check, resident: false, picked: None })
    }

    fn find_host_rows(&mut self, queries: &Rows<'_>, gallery: Option<Gallery>, k: usize) -> Result<Nearest> {
        let side = self.host_side("queries", queries)?;
        self.find(&side, gallery, k, &place_host(queries, "queries"))
    }

    /// Prepares a gallery and calls `work` with it.
    pub(super) fn with_gallery<T>(
        &mut self,
        side: &Searched<'_>,
        place: PutRows<'_, D>,
        work: impl FnOnce(&mut Self, Gallery) -> Result<T>,
    ) -> Result<T> {
        side.shape.check()?;
        let mut layout = Layout::default();
        let regions = SearchRegions::new(&mut layout, side);
        let Self { device, gallery, .. } = self;
        let buffer = gallery.lay(device, &layout)?;
        prepare(device, buffer, side, &regions, place)?;
        check(device, buffer, side, &regions)?;
        let rows = device.address(buffer) + regions.rows.offset as u64;
        work(self, Gallery { rows, count: side.shape.anchors })
    }

    /// Searches for queries in a gallery, or among themselves.
    pub(super) fn find(
        &mut self,
        queries: &Searched<'_>,
        gallery: Option<Gallery>,
        k: usize,
        place: PutRows<'_, D>,
    ) -> Result<Nearest> {
        let count = queries.shape.anchors;
        let shape = Shape { references: gallery.map(|gallery| gallery.count), ..queries.shape };
        shape.check()?;
        let mut nearest = Nearest::of_search(count, shape.reference_count(), k)?;
        let Self { device, retrieval, .. } = self;
        let plan = SearchPlan::new(&shape, k, device.properties());
        let layout = SearchLayout::new(queries, &plan, k);
        let buffer = retrieval.lay(device, &layout.layout)?;
        prepare(device, buffer, queries, &layout.queries, place)?;
        let base = device.address(buffer);
        let rows = pointer::<std::ffi::c_void>(base, layout.queries.rows);
        for first_tile in (0..tiles(count)).step_by(plan.turn) {
            let rows_left = count - first_tile * TILE as usize;
            let shape = Shape { anchors: rows_left.min(plan.turn * TILE as usize), ..shape };
            let params = RetrievalParams {
                queries: rows,
                references: gallery.map_or(rows.cast_const(), |gallery| gallery.rows as usize as *const _),
                query_count: count as u32,
                reference_count: shape.reference_count() as u32,
                stride: shape.stride() as u32,
                k: k as u32,
                kept: plan.kept as u32,
                capacity: plan.capacity as u32,
                leave_self_out: u32::from(gallery.is_none()),
                first_tile: first_tile as u32,
                splits: plan.splits as u32,
                lists: plan.lists as u32,
                keys: pointer(base, layout.keys),
                counts: pointer(base, layout.counts),
                indices: pointer(base, layout.indices),
                similarities: pointer(base, layout.similarities),
            };
            let mut launcher = Launcher { device: &mut *device, shape };
            launcher.launch_with(Kernel::Retrieval(shape.precision), false, &params, |launch| {
                let [tiles, ..] = launch.grid;
                LaunchPlan { grid: [tiles, plan.splits as u32, 1], ..launch }
            })?;
            launcher.launch_with(Kernel::RetrievalMerge, false, &params, |launch| LaunchPlan {
                shared_bytes: launch.shared_bytes + plan.merge_bytes(),
                ..launch
            })?;
        }
        check(device, buffer, queries, &layout.queries)?;
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

/// Copies rows from the host.
fn place_host<D: Device>(
    rows: &Rows<'_>,
    name: &'static str,
) -> impl Fn(&mut D, &mut D::Buffer, Region) -> Result<u64> {
    move |device, buffer, region| {
        device.upload(buffer, region.offset, matrix_bytes(&rows.embeddings, name)?)?;
        Ok(device.address(buffer) + region.offset as u64)
    }
}
