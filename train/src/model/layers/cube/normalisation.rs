//! Batch normalisation fused with its activation, and the residual sum fused with ReLU. A map is read once
//! for the statistics, once forward, and twice backward, together with the gradient.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::rows::{self, Plan, Share, Units};
use super::{Map, dense, empty, grid, units, vector_size};
use crate::model::layers::{Activation, NormaliseOptions};

/// Rows that one unit computes for its vector of channels: it reads their parameters once.
const ROWS: usize = 4;

/// Parameters and options of a normalisation.
pub(super) struct Parameters {
    statistics: CubeTensor,
    gamma: CubeTensor,
    beta: CubeTensor,
    options: NormaliseOptions,
}

impl Parameters {
    pub fn new(
        statistics: CubeTensor,
        gamma: CubeTensor,
        beta: CubeTensor,
        options: NormaliseOptions,
    ) -> Self {
        Self { statistics: dense(statistics), gamma: dense(gamma), beta: dense(beta), options }
    }

    fn activates(&self) -> bool {
        self.options.activation != Activation::None
    }

    fn range(&self) -> RangeLaunch {
        let [floor, ceiling] = self.options.activation.range();
        RangeLaunch::new(floor, ceiling)
    }
}

/// Range that an activation clamps to.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Range {
    floor: f32,
    ceiling: f32,
}

/// `(x - mean) * scale + beta`, for a vector of channels.
#[derive(CubeType)]
struct Affine<N: Size> {
    mean: Vector<f32, N>,
    inverse_deviation: Vector<f32, N>,
    scale: Vector<f32, N>,
    beta: Vector<f32, N>,
}

#[cube]
impl<N: Size> Affine<N> {
    fn new(
        statistics: &[Vector<f32, N>],
        gamma: &[Vector<f32, N>],
        beta: &[Vector<f32, N>],
        column: usize,
        columns: usize,
        epsilon: f32,
    ) -> Self {
        let variance = statistics[columns + column] + Vector::new(epsilon);
        let inverse_deviation = Vector::<f32, N>::new(1.0) / variance.sqrt();
        Affine::<N> {
            mean: statistics[column],
            inverse_deviation,
            scale: gamma[column] * inverse_deviation,
            beta: beta[column],
        }
    }

    fn apply(&self, x: Vector<f32, N>) -> Vector<f32, N> {
        fma(x - self.mean, self.scale, self.beta)
    }

    /// The gradient of the activation's input: `gradient` where the output is inside the range, else 0.
    fn passed(
        &self,
        x: Vector<f32, N>,
        gradient: Vector<f32, N>,
        range: Range,
        #[comptime] activates: bool,
    ) -> Vector<f32, N> {
        if comptime!(activates) {
            let output = self.apply(x);
            let above = output.greater_than(&Vector::new(range.floor));
            let below = output.less_than(&Vector::new(range.ceiling));
            select_many(above.vec_and(below), gradient, Vector::new(0.0))
        } else {
            gradient
        }
    }
}

/// Mean and sum of squared deviations of every chunk of rows, `[chunks, 2, C]`.
///
/// Sums are of differences from the chunk's first row, a value of the distribution: unlike sums of squares of
/// the values themselves, they lose no digits by cancellation.
#[cube(launch_unchecked)]
fn chunk_statistics_kernel<N: Size>(
    input: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    columns: usize,
    chunk: usize,
    #[comptime] units: Units,
) {
    let share = Share::new(rows, chunk, units);
    let mut first = Vector::<f32, N>::new(0.0);
    let mut sum = Vector::<f32, N>::new(0.0);
    let mut squares = Vector::<f32, N>::new(0.0);
    if share.column < columns {
        first = input[share.first * columns + share.column];
        for row in range_stepped(share.begin, share.end, share.units.groups) {
            let deviation = input[row * columns + share.column] - first;
            sum += deviation;
            squares = fma(deviation, deviation, squares);
        }
    }
    let sum = share.add_groups::<N>(sum);
    let squares = share.add_groups::<N>(squares);
    if share.writes(columns) {
        let mean = sum / Vector::cast_from(share.end - share.first);
        let at = CUBE_POS_Y as usize * 2 * columns + share.column;
        out[at] = first + mean;
        out[at + columns] = squares - mean * sum;
    }
}

/// Mean and biased variance of every channel, `[2, C]`, from those of the chunks.
#[cube(launch_unchecked)]
fn statistics_kernel<N: Size>(
    chunks: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    columns: usize,
    chunk: usize,
    count: usize,
    #[comptime] units: Units,
) {
    let share = Share::new(count, count, units);
    let column = share.column;
    let total = Vector::<f32, N>::cast_from(rows);
    let mut sum = Vector::<f32, N>::new(0.0);
    if column < columns {
        // Differences from the first chunk's mean: their sums round less than sums of the means.
        let first = chunks[column];
        for index in range_stepped(share.begin, share.end, share.units.groups) {
            let length = clamp_max(rows - index * chunk, chunk);
            sum += (chunks[index * 2 * columns + column] - first) * Vector::cast_from(length);
        }
    }
    let sum = share.add_groups::<N>(sum);
    let mut mean = Vector::<f32, N>::new(0.0);
    let mut squares = Vector::<f32, N>::new(0.0);
    if column < columns {
        mean = chunks[column] + sum / total;
        for index in range_stepped(share.begin, share.end, share.units.groups) {
            let length = clamp_max(rows - index * chunk, chunk);
            let deviation = chunks[index * 2 * columns + column] - mean;
            squares += chunks[(index * 2 + 1) * columns + column];
            squares += deviation * deviation * Vector::cast_from(length);
        }
    }
    let squares = share.add_groups::<N>(squares);
    if share.writes(columns) {
        out[column] = mean;
        out[columns + column] = squares / total;
    }
}

pub(super) fn statistics(input: &Map) -> CubeTensor {
    let columns = Columns::new(input);
    let plan = columns.plan(input);
    let last = Plan::new(plan.chunks, columns.count, 1, units(&input.0));
    let chunks = empty(&input.0, [plan.chunks, 2, input.channels()]);
    let out = empty(&input.0, [2, input.channels()]);
    // SAFETY: both kernels check rows and columns.
    unsafe {
        chunk_statistics_kernel::launch_unchecked(
            &out.client,
            plan.cube_count(),
            plan.cube_dim(),
            columns.size,
            input.argument(),
            chunks.clone().into_buffer_arg(),
            columns.rows,
            columns.count,
            plan.rows,
            plan.units,
        );
        statistics_kernel::launch_unchecked(
            &out.client,
            last.cube_count(),
            last.cube_dim(),
            columns.size,
            chunks.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            columns.rows,
            columns.count,
            plan.rows,
            plan.chunks,
            last.units,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn forward_kernel<N: Size>(
    input: &[Vector<f32, N>],
    statistics: &[Vector<f32, N>],
    gamma: &[Vector<f32, N>],
    beta: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    columns: usize,
    epsilon: f32,
    range: Range,
) {
    let column = ABSOLUTE_POS % columns;
    let first = ABSOLUTE_POS / columns * ROWS;
    if first >= rows {
        terminate!();
    }
    let affine = Affine::<N>::new(statistics, gamma, beta, column, columns, epsilon);
    let (floor, ceiling) = (Vector::new(range.floor), Vector::new(range.ceiling));
    for row in first..clamp_max(first + ROWS, rows) {
        let at = row * columns + column;
        out[at] = clamp_max(clamp_min(affine.apply(input[at]), floor), ceiling);
    }
}

#[cube(launch_unchecked)]
fn input_gradient_kernel<N: Size>(
    input: &[Vector<f32, N>],
    gradient: &[Vector<f32, N>],
    statistics: &[Vector<f32, N>],
    gamma: &[Vector<f32, N>],
    beta: &[Vector<f32, N>],
    sums: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    columns: usize,
    epsilon: f32,
    range: Range,
    #[comptime] activates: bool,
    #[comptime] from_batch: bool,
) {
    let column = ABSOLUTE_POS % columns;
    let first = ABSOLUTE_POS / columns * ROWS;
    if first >= rows {
        terminate!();
    }
    let affine = Affine::<N>::new(statistics, gamma, beta, column, columns, epsilon);
    // If the statistics are the batch's, the gradient's mean and its projection on the normalised input are subtracted.
    let mut mean = Vector::<f32, N>::new(0.0);
    let mut projection = Vector::<f32, N>::new(0.0);
    if comptime!(from_batch) {
        let count = Vector::<f32, N>::cast_from(rows);
        mean = sums[columns + column] / count;
        projection = sums[column] / count * affine.inverse_deviation;
    }
    for row in first..clamp_max(first + ROWS, rows) {
        let at = row * columns + column;
        let x = input[at];
        let mut inner = affine.passed(x, gradient[at], range, activates);
        if comptime!(from_batch) {
            inner = inner - mean - (x - affine.mean) * projection;
        }
        out[at] = inner * affine.scale;
    }
}

/// Sums over chunks of rows, `[chunks, 2, C]`: of the gradient times the normalised input, and of the gradient.
#[cube(launch_unchecked)]
fn chunk_gradient_kernel<N: Size>(
    input: &[Vector<f32, N>],
    gradient: &[Vector<f32, N>],
    statistics: &[Vector<f32, N>],
    gamma: &[Vector<f32, N>],
    beta: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    rows: usize,
    columns: usize,
    chunk: usize,
    epsilon: f32,
    range: Range,
    #[comptime] activates: bool,
    #[comptime] units: Units,
) {
    let share = Share::new(rows, chunk, units);
    let mut dot = Vector::<f32, N>::new(0.0);
    let mut sum = Vector::<f32, N>::new(0.0);
    let column = share.column;
    if column < columns {
        let affine = Affine::<N>::new(statistics, gamma, beta, column, columns, epsilon);
        for row in range_stepped(share.begin, share.end, share.units.groups) {
            let at = row * columns + column;
            let x = input[at];
            let passed = affine.passed(x, gradient[at], range, activates);
            sum += passed;
            dot = fma(passed, (x - affine.mean) * affine.inverse_deviation, dot);
        }
    }
    let dot = share.add_groups::<N>(dot);
    let sum = share.add_groups::<N>(sum);
    if share.writes(columns) {
        let at = CUBE_POS_Y as usize * 2 * columns + column;
        out[at] = dot;
        out[at + columns] = sum;
    }
}

pub(super) fn forward(input: &Map, parameters: &Parameters) -> Map {
    let (out, columns) = (Map::empty(input, input.shape()), Columns::new(input));
    let (cubes, units) = columns.grid(input, ROWS);
    // SAFETY: the kernel checks rows; a column is a remainder by the number of columns.
    unsafe {
        forward_kernel::launch_unchecked(
            &input.0.client,
            cubes,
            units,
            columns.size,
            input.argument(),
            parameters.statistics.clone().into_buffer_arg(),
            parameters.gamma.clone().into_buffer_arg(),
            parameters.beta.clone().into_buffer_arg(),
            out.argument(),
            columns.rows,
            columns.count,
            parameters.options.epsilon,
            parameters.range(),
        );
    }
    out
}

pub(super) fn input_gradient(input: &Map, gradient: &Map, sums: CubeTensor, parameters: &Parameters) -> Map {
    let (out, columns) = (Map::empty(input, input.shape()), Columns::new(input));
    let (cubes, units) = columns.grid(input, ROWS);
    // SAFETY: as above.
    unsafe {
        input_gradient_kernel::launch_unchecked(
            &input.0.client,
            cubes,
            units,
            columns.size,
            input.argument(),
            gradient.argument(),
            parameters.statistics.clone().into_buffer_arg(),
            parameters.gamma.clone().into_buffer_arg(),
            parameters.beta.clone().into_buffer_arg(),
            sums.into_buffer_arg(),
            out.argument(),
            columns.rows,
            columns.count,
            parameters.options.epsilon,
            parameters.range(),
            parameters.activates(),
            parameters.options.from_batch,
        );
    }
    out
}

pub(super) fn parameter_gradient(input: &Map, gradient: &Map, parameters: &Parameters) -> CubeTensor {
    let columns = Columns::new(input);
    let plan = columns.plan(input);
    let chunks = empty(&input.0, [plan.chunks, 2, input.channels()]);
    // SAFETY: the kernel checks rows and columns.
    unsafe {
        chunk_gradient_kernel::launch_unchecked(
            &input.0.client,
            plan.cube_count(),
            plan.cube_dim(),
            columns.size,
            input.argument(),
            gradient.argument(),
            parameters.statistics.clone().into_buffer_arg(),
            parameters.gamma.clone().into_buffer_arg(),
            parameters.beta.clone().into_buffer_arg(),
            chunks.clone().into_buffer_arg(),
            columns.rows,
            columns.count,
            plan.rows,
            parameters.options.epsilon,
            parameters.range(),
            parameters.activates(),
            plan.units,
        );
    }
    rows::sum(chunks)
}

#[cube(launch_unchecked)]
fn add_relu_kernel<N: Size>(a: &[Vector<f32, N>], b: &[Vector<f32, N>], out: &mut [Vector<f32, N>]) {
    if ABSOLUTE_POS < out.len() {
        out[ABSOLUTE_POS] = clamp_min(a[ABSOLUTE_POS] + b[ABSOLUTE_POS], Vector::new(0.0));
    }
}

#[cube(launch_unchecked)]
fn add_relu_gradient_kernel<N: Size>(
    output: &[Vector<f32, N>],
    gradient: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
) {
    if ABSOLUTE_POS < out.len() {
        let zero = Vector::<f32, N>::new(0.0);
        let above = output[ABSOLUTE_POS].greater_than(&zero);
        out[ABSOLUTE_POS] = select_many(above, gradient[ABSOLUTE_POS], zero);
    }
}

pub(super) fn add_relu(a: &Map, b: &Map) -> Map {
    let (out, columns) = (Map::empty(a, a.shape()), Columns::new(a));
    let (cubes, units) = columns.grid(a, 1);
    // SAFETY: the kernel checks the length.
    unsafe {
        add_relu_kernel::launch_unchecked(
            &a.0.client,
            cubes,
            units,
            columns.size,
            a.argument(),
            b.argument(),
            out.argument(),
        );
    }
    out
}

pub(super) fn add_relu_gradient(output: &Map, gradient: &Map) -> Map {
    let (out, columns) = (Map::empty(output, output.shape()), Columns::new(output));
    let (cubes, units) = columns.grid(output, 1);
    // SAFETY: as above.
    unsafe {
        add_relu_gradient_kernel::launch_unchecked(
            &output.0.client,
            cubes,
            units,
            columns.size,
            output.argument(),
            gradient.argument(),
            out.argument(),
        );
    }
    out
}

/// A map as rows of vectors.
struct Columns {
    rows: usize,
    /// Vectors in a row.
    count: usize,
    /// Floats in a vector.
    size: usize,
}

impl Columns {
    fn new(map: &Map) -> Self {
        let size = vector_size(&[map.channels()]);
        Self { rows: map.elements() / map.channels(), count: map.channels() / size, size }
    }

    /// How sums over rows are divided among units.
    fn plan(&self, map: &Map) -> Plan {
        Plan::new(self.rows, self.count, usize::MAX, units(&map.0))
    }

    /// A grid with a unit for each vector of each group of `rows` rows.
    fn grid(&self, map: &Map, rows: usize) -> (CubeCount, CubeDim) {
        grid(&map.0, self.rows.div_ceil(rows) * self.count)
    }
}
