//! Sums over the rows of a matrix `[R, L]`, in a fixed order.
//!
//! A cube has `lanes` neighbouring columns and several groups of units; each group adds every `groups`-th
//! row, and then the groups' sums are added in order. Tall matrices are first divided into chunks of rows.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::{MULTIPROCESSORS, UNITS, empty, units, vector_size};

/// Most cubes for a sum over rows.
const CUBES: usize = 4 * MULTIPROCESSORS;

/// The units of a cube.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Units {
    /// Neighbouring columns, each a vector.
    pub lanes: usize,
    /// Units for each column, which divide its rows.
    pub groups: usize,
}

/// How a sum over rows is divided among units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub units: Units,
    /// Cubes for all columns.
    pub width: usize,
    /// Number of chunks of rows.
    pub chunks: usize,
    /// Rows of a chunk; the last chunk may have fewer.
    pub rows: usize,
}

impl Plan {
    /// A plan for `rows` rows of `vectors` vectors, with at most `chunks` chunks and `units` units in a cube.
    pub fn new(rows: usize, vectors: usize, chunks: usize, units: usize) -> Self {
        let lanes = vectors.next_power_of_two().min(32).min(units);
        let groups = units / lanes;
        let width = vectors.div_ceil(lanes);
        // With fewer rows, a unit waits for the others longer than it adds. Independent of `units`: the CPU
        // has the same chunks as a GPU.
        let least = 4 * (UNITS / lanes.max(8));
        let wanted = (CUBES / width).clamp(1, chunks).min(rows.div_ceil(least)).max(1);
        let rows_of_chunk = rows.div_ceil(wanted).max(1);
        let chunks = rows.div_ceil(rows_of_chunk).max(1);
        Self { units: Units { lanes, groups }, width, chunks, rows: rows_of_chunk }
    }

    pub fn cube_count(&self) -> CubeCount {
        CubeCount::new_2d(self.width as u32, self.chunks as u32)
    }

    pub fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d((self.units.lanes * self.units.groups) as u32)
    }
}

/// A unit's share of a sum over rows: one column, and every `units.groups`-th row of its cube's chunk from `begin` on.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Share {
    lane: usize,
    group: usize,
    pub column: usize,
    /// The chunk's first row.
    pub first: usize,
    /// This unit's first row.
    pub begin: usize,
    /// One past the chunk's last row.
    pub end: usize,
    #[cube(comptime)]
    pub units: Units,
}

#[cube]
impl Share {
    /// The share of the calling unit, of `rows` rows in chunks of `chunk`.
    pub fn new(rows: usize, chunk: usize, #[comptime] units: Units) -> Share {
        let lane = UNIT_POS as usize % units.lanes;
        let group = UNIT_POS as usize / units.lanes;
        let first = CUBE_POS_Y as usize * chunk;
        Share {
            lane,
            group,
            column: CUBE_POS_X as usize * units.lanes + lane,
            first,
            begin: first + group,
            end: clamp_max(first + chunk, rows),
            units,
        }
    }

    /// The sum of `own` over the groups of the cube, in their order; every unit gets it.
    pub fn add_groups<N: Size>(self, own: Vector<f32, N>) -> Vector<f32, N> {
        let units = comptime!(self.units);
        if comptime!(units.groups == 1) {
            own
        } else {
            let mut shared =
                Shared::<[Vector<f32, N>]>::new_aligned_slice(units.lanes * units.groups, 16usize);
            shared[self.group * units.lanes + self.lane] = own;
            sync_cube();
            let mut sum = shared[self.lane];
            for other in 1..units.groups {
                sum += shared[other * units.lanes + self.lane];
            }
            // All units must have read before the next call writes.
            sync_cube();
            sum
        }
    }

    /// Whether this unit writes the sum of its column, if there are `columns` columns.
    pub fn writes(self, columns: usize) -> bool {
        self.group == 0 && self.column < columns
    }
}

#[cube(launch_unchecked)]
fn sum_kernel<N: Size>(
    matrix: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    vectors: usize,
    #[comptime] units: Units,
) {
    let share = Share::new(rows, rows, units);
    let mut sum = Vector::<f32, N>::new(0.0);
    if share.column < vectors {
        for row in range_stepped(share.begin, share.end, share.units.groups) {
            sum += matrix[row * vectors + share.column];
        }
    }
    let sum = share.add_groups::<N>(sum);
    if share.writes(vectors) {
        out[share.column] = sum;
    }
}

/// Sums `[R, ...]` over the rows to `[...]`.
pub(super) fn sum(matrix: CubeTensor) -> CubeTensor {
    let shape: Vec<usize> = matrix.meta.shape().iter().copied().collect();
    let (rows, shape) = (shape[0], &shape[1..]);
    let out = empty(&matrix, shape.to_vec());
    if rows == 1 {
        return CubeTensor { meta: out.meta, ..matrix };
    }
    let length = shape.iter().product::<usize>();
    let size = vector_size(&[length]);
    let plan = Plan::new(rows, length / size, 1, units(&matrix));
    // SAFETY: the kernel checks rows and columns.
    unsafe {
        sum_kernel::launch_unchecked(
            &out.client,
            plan.cube_count(),
            plan.cube_dim(),
            size,
            matrix.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows,
            length / size,
            plan.units,
        );
    }
    out
}
