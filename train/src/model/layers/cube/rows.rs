//! Sums over the rows of a matrix `[R, L]`, in a fixed order.
//!
//! A cube has columns side by side and several groups of units, each of which adds every so many-th row; then one unit a
//! column adds what the groups have, one after the other. Tall matrices are first cut into chunks of rows.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::{MULTIPROCESSORS, UNITS, empty, units, vector_size};

/// How many cubes a sum over rows is cut into at most.
const CUBES: usize = 4 * MULTIPROCESSORS;

/// How a sum over rows is shared out among units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Vectors side by side in a cube.
    pub lanes: usize,
    /// Units in a cube that share the rows of a lane.
    pub groups: usize,
    /// Cubes side by side.
    pub width: usize,
    /// Chunks of rows.
    pub chunks: usize,
    /// Rows of a chunk; the last has fewer.
    pub rows: usize,
}

impl Plan {
    /// Of `rows` rows of `vectors` vectors; at most `chunks` chunks.
    pub fn new(rows: usize, vectors: usize, chunks: usize, units: usize) -> Self {
        let lanes = vectors.next_power_of_two().min(32).min(units);
        let groups = units / lanes;
        let width = vectors.div_ceil(lanes);
        // A unit that adds fewer rows than this waits longer for the others than it adds. On the CPU chunks are as many as
        // on a GPU.
        let least = 4 * (UNITS / lanes.max(8));
        let wanted = (CUBES / width).clamp(1, chunks).min(rows.div_ceil(least)).max(1);
        let rows_of_chunk = rows.div_ceil(wanted).max(1);
        Self { lanes, groups, width, chunks: rows.div_ceil(rows_of_chunk).max(1), rows: rows_of_chunk }
    }

    pub fn cube_count(&self) -> CubeCount {
        CubeCount::new_2d(self.width as u32, self.chunks as u32)
    }

    pub fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d((self.lanes * self.groups) as u32)
    }
}

/// Adds what the groups of a cube have, in the order of the groups; every unit gets the sum.
#[cube]
pub(super) fn add_groups<N: Size>(
    own: Vector<f32, N>,
    lane: usize,
    group: usize,
    #[comptime] lanes: usize,
    #[comptime] groups: usize,
) -> Vector<f32, N> {
    if comptime!(groups == 1) {
        own
    } else {
        let mut shared = Shared::<[Vector<f32, N>]>::new_aligned_slice(lanes * groups, 16usize);
        shared[group * lanes + lane] = own;
        sync_cube();
        let mut sum = shared[lane];
        for other in 1..groups {
            sum += shared[other * lanes + lane];
        }
        // Who comes here again must not write before all have read.
        sync_cube();
        sum
    }
}

#[cube(launch_unchecked)]
fn sum_kernel<N: Size>(
    matrix: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    vectors: usize,
    #[comptime] lanes: usize,
    #[comptime] groups: usize,
) {
    let lane = UNIT_POS as usize % lanes;
    let group = UNIT_POS as usize / lanes;
    let column = CUBE_POS_X as usize * lanes + lane;
    let mut sum = Vector::<f32, N>::new(0.0);
    if column < vectors {
        for row in range_stepped(group, rows, groups) {
            sum += matrix[row * vectors + column];
        }
    }
    let sum = add_groups::<N>(sum, lane, group, lanes, groups);
    if group == 0 && column < vectors {
        out[column] = sum;
    }
}

/// `[R, ...]` to `[...]`.
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
    // SAFETY: rows and columns are checked within.
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
            plan.lanes,
            plan.groups,
        );
    }
    out
}
