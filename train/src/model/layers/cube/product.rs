//! A product of matrices of which one is cut from a map as it is read: what a convolution and its two gradients are.
//! No matrix of patches is ever written.
//!
//! | role | rows | columns | depth |
//! | --- | --- | --- | --- |
//! | output | output positions | output channels | taps x input channels |
//! | input gradient | input positions of a phase | input channels | taps of the phase x output channels |
//! | weight gradient | output channels | taps x input channels | output positions |
//!
//! The input gradient of a strided convolution falls into phases, by the remainder of the padded input position by the
//! stride: each has taps of its own and reaches every output position, so nothing is multiplied by zeros between.
//!
//! A cube computes a tile of the result, step by step along the depth: its units read the next step's values into
//! registers, multiply what lies in one half of shared memory, and put the values into the other half. A unit has
//! several rows and columns of the tile, so that a value in shared memory serves as many times. Products are of f32, and
//! each sum runs in the order of the depth; a depth that is cut into splits is added up by `rows.rs`.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::std::FastDivmod;

/// Which matrix is the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    Output,
    InputGradient,
    WeightGradient,
}

/// What a cube computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub rows: usize,
    pub columns: usize,
    /// Rows of a unit, a multiple of [`QUAD`].
    pub unit_rows: usize,
    /// Columns of a unit, a multiple of [`QUAD`].
    pub unit_columns: usize,
    /// Depth of a step.
    pub depth: usize,
}

/// Values that a unit reads from shared memory at once.
pub(super) const QUAD: usize = 4;

/// Floats between the rows of shared memory beyond a tile's: units that put values of one row of a matrix in a column
/// of shared memory find different banks.
const GAP: usize = QUAD;

impl Tile {
    pub const fn new(
        rows: usize,
        columns: usize,
        unit_rows: usize,
        unit_columns: usize,
        depth: usize,
    ) -> Self {
        Self { rows, columns, unit_rows, unit_columns, depth }
    }

    pub const fn units(self) -> usize {
        self.rows / self.unit_rows * (self.columns / self.unit_columns)
    }
}

/// What is known when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub role: Role,
    pub tile: Tile,
    pub kernel: u32,
    pub stride: u32,
    /// Splits of the depth.
    pub splits: u32,
}

/// Sizes and padding of the convolution.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Geometry {
    pub images: u32,
    pub height: u32,
    pub width: u32,
    pub channels: u32,
    pub out_height: u32,
    pub out_width: u32,
    pub out_channels: u32,
    /// Zeros above.
    pub above: u32,
    /// Zeros to the left.
    pub left: u32,
}

/// Divisors along the depth, by multiplication.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Divisors {
    /// The channels that taps are counted by.
    pub channels: FastDivmod<u32>,
    pub out_width: FastDivmod<u32>,
    pub out_height: FastDivmod<u32>,
}

/// What an axis of a phase has.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Axis {
    /// The first tap; the others follow at the stride.
    remainder: u32,
    taps: u32,
    /// The padded input position of the first position, by the stride.
    first: u32,
    /// Positions.
    count: u32,
}

#[cube]
fn axis(remainder: u32, size: u32, padding: u32, #[comptime] kernel: u32, #[comptime] stride: u32) -> Axis {
    if comptime!(stride == 1) {
        Axis { remainder: 0u32.runtime(), taps: kernel.runtime(), first: padding, count: size }
    } else {
        let before = clamp_min(padding, remainder) - remainder;
        let first = before.div_ceil(stride);
        let end = clamp_min(size + padding, remainder) - remainder;
        Axis {
            remainder,
            taps: (kernel + stride - 1 - remainder) / stride,
            first,
            count: end.div_ceil(stride) - first,
        }
    }
}

/// Where a position lies in a map.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Place {
    image: u32,
    y: u32,
    x: u32,
}

#[cube]
fn place(index: u32, height: u32, width: u32) -> Place {
    let line = index / width;
    Place { image: line / height, y: line % height, x: index % width }
}

/// The vector of channels from `channel` on at a place, in a map of `height` x `width` x `channels`; zeros outside,
/// where a coordinate below 0 has become a large one.
#[cube]
fn gather<N: Size>(
    map: &[Vector<f32, N>],
    at: Place,
    channel: u32,
    height: u32,
    width: u32,
    channels: u32,
    valid: bool,
) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::new(0.0);
    if valid && at.y < height && at.x < width {
        let index = ((at.image * height + at.y) * width + at.x) * channels + channel;
        value = map[(index / N::value() as u32) as usize];
    }
    value
}

/// The tile's matrices, as their parts are asked for: by row or column, and depth.
#[derive(CubeType)]
struct Job {
    geometry: Geometry,
    divisors: Divisors,
    y: Axis,
    x: Axis,
    /// End of the depth of this split.
    end: u32,
    #[cube(comptime)]
    plan: Plan,
}

#[cube]
impl Job {
    /// Tap and channel at a depth.
    fn tap(&self, depth: u32) -> (u32, u32) {
        if comptime!(self.plan.kernel == 1) {
            (0u32.runtime(), depth)
        } else {
            self.divisors.channels.div_mod(depth)
        }
    }

    /// Taps of a phase side by side. A phase may have none, of which nothing is asked but that it divides.
    fn line(&self) -> u32 {
        clamp_min(self.x.taps, 1u32)
    }

    /// The position of a phase. It may have none; then what comes out lies outside the map.
    fn phase_place(&self, row: u32) -> Place {
        place(row, clamp_min(self.y.count, 1u32), clamp_min(self.x.count, 1u32))
    }

    /// The left matrix: a vector along the depth, or of rows for the weight's gradient.
    fn left<N: Size>(&self, map: &[Vector<f32, N>], row: u32, depth: u32) -> Vector<f32, N> {
        let g = self.geometry;
        let stride = comptime!(self.plan.stride);
        match comptime!(self.plan.role) {
            Role::Output => {
                let position = place(row, g.out_height, g.out_width);
                let (tap, channel) = self.tap(depth);
                let at = Place {
                    image: position.image,
                    y: position.y * stride + tap / self.plan.kernel - g.above,
                    x: position.x * stride + tap % self.plan.kernel - g.left,
                };
                let valid = position.image < g.images && depth < self.end;
                gather::<N>(map, at, channel, g.height, g.width, g.channels, valid)
            }
            Role::InputGradient => {
                let position = self.phase_place(row);
                let (tap, channel) = self.tap(depth);
                let at = Place {
                    image: position.image,
                    y: position.y + self.y.first - tap / self.line(),
                    x: position.x + self.x.first - tap % self.line(),
                };
                let valid = position.image < g.images && depth < self.end;
                gather::<N>(map, at, channel, g.out_height, g.out_width, g.out_channels, valid)
            }
            Role::WeightGradient => {
                let mut value = Vector::<f32, N>::new(0.0);
                if row < g.out_channels && depth < self.end {
                    value = map[((depth * g.out_channels + row) / N::value() as u32) as usize];
                }
                value
            }
        }
    }

    /// The right matrix: a vector along the depth for the output, or of columns.
    fn right<N: Size>(&self, matrix: &[Vector<f32, N>], column: u32, depth: u32) -> Vector<f32, N> {
        let g = self.geometry;
        let kernel = comptime!(self.plan.kernel);
        let stride = comptime!(self.plan.stride);
        match comptime!(self.plan.role) {
            Role::Output => {
                let mut value = Vector::<f32, N>::new(0.0);
                if column < g.out_channels && depth < self.end {
                    let row = kernel * kernel * g.channels;
                    value = matrix[((column * row + depth) / N::value() as u32) as usize];
                }
                value
            }
            Role::InputGradient => {
                let mut value = Vector::<f32, N>::new(0.0);
                if column < g.channels && depth < self.end {
                    let (tap, channel) = self.tap(depth);
                    let y = self.y.remainder + stride * (tap / self.line());
                    let x = self.x.remainder + stride * (tap % self.line());
                    let index = ((channel * kernel + y) * kernel + x) * g.channels + column;
                    value = matrix[(index / N::value() as u32) as usize];
                }
                value
            }
            Role::WeightGradient => {
                let (tap, channel) = self.tap(column);
                let (line, x) = self.divisors.out_width.div_mod(depth);
                let (image, y) = self.divisors.out_height.div_mod(line);
                let at = Place {
                    image,
                    y: y * stride + tap / kernel - g.above,
                    x: x * stride + tap % kernel - g.left,
                };
                let valid = column < kernel * kernel * g.channels && depth < self.end;
                gather::<N>(matrix, at, channel, g.height, g.width, g.channels, valid)
            }
        }
    }

    /// Where a row of the result begins; rows past the end are told by a length of 0.
    fn row(&self, row: u32) -> (u32, u32) {
        let g = self.geometry;
        match comptime!(self.plan.role) {
            Role::Output => {
                let within = row < g.images * g.out_height * g.out_width;
                (row * g.out_channels, select(within, g.out_channels, 0u32))
            }
            Role::InputGradient => {
                let stride = comptime!(self.plan.stride);
                let position = self.phase_place(row);
                let y = (position.y + self.y.first) * stride + self.y.remainder - g.above;
                let x = (position.x + self.x.first) * stride + self.x.remainder - g.left;
                let pixel = (position.image * g.height + y) * g.width + x;
                let within = position.image < g.images && y < g.height && x < g.width;
                (pixel * g.channels, select(within, g.channels, 0u32))
            }
            Role::WeightGradient => {
                let length = self.plan.kernel * self.plan.kernel * g.channels;
                (row * length, select(row < g.out_channels, length, 0u32))
            }
        }
    }
}

/// One of the two matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    Left,
    Right,
}

/// How a side's part of a step is shared out: neighbouring units read neighbouring vectors of the matrix as it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Share {
    side: Side,
    /// Whether vectors lie along the depth, or along the tile.
    along_depth: bool,
    /// Rows or columns of the tile.
    extent: usize,
    depth: usize,
    vector: usize,
    units: usize,
}

impl Share {
    fn new(side: Side, plan: Plan, vector: usize) -> Self {
        let (extent, along_depth) = match side {
            Side::Left => (plan.tile.rows, plan.role != Role::WeightGradient),
            Side::Right => (plan.tile.columns, plan.role == Role::Output),
        };
        Self { side, along_depth, extent, depth: plan.tile.depth, vector, units: plan.tile.units() }
    }

    fn vectors(self) -> usize {
        self.extent * self.depth / self.vector
    }

    /// Vectors of a unit.
    fn slots(self) -> usize {
        self.vectors().div_ceil(self.units)
    }

    /// Vectors of a row, or of a depth.
    fn line(self) -> usize {
        if self.along_depth { self.depth / self.vector } else { self.extent / self.vector }
    }

    /// Floats from one depth to the next in shared memory.
    fn pitch(self) -> usize {
        self.extent + GAP
    }
}

/// Reads what of a step is this unit's.
#[cube]
fn fetch<N: Size>(
    job: &Job,
    matrix: &[Vector<f32, N>],
    values: &mut Array<Vector<f32, N>>,
    first: u32,
    depth: u32,
    #[comptime] share: Share,
) {
    #[unroll(share.units > 1)]
    for slot in 0..share.slots() {
        let index = UNIT_POS as usize + slot * share.units;
        let outer = (index / share.line()) as u32;
        let inner = (index % share.line() * share.vector) as u32;
        let (along, depth) = if comptime!(share.along_depth) {
            (first + outer, depth + inner)
        } else {
            (first + inner, depth + outer)
        };
        if index < share.vectors() {
            values[slot] = match comptime!(share.side) {
                Side::Left => job.left::<N>(matrix, along, depth),
                Side::Right => job.right::<N>(matrix, along, depth),
            };
        }
    }
}

/// Puts it into half a side's shared memory, depth by depth.
#[cube]
fn store<N: Size>(
    values: &Array<Vector<f32, N>>,
    shared: &mut Shared<[Vector<f32, Const<QUAD>>]>,
    half: usize,
    #[comptime] share: Share,
) {
    let start = half * share.depth * share.pitch();
    #[unroll(share.units > 1)]
    for slot in 0..share.slots() {
        let index = UNIT_POS as usize + slot * share.units;
        let outer = index / share.line();
        let inner = index % share.line() * share.vector;
        if index < share.vectors() {
            if comptime!(share.along_depth) {
                let shared = shared.with_vector_size_mut::<Const<1>>();
                #[unroll]
                for lane in 0..share.vector {
                    let at = start + (inner + lane) * share.pitch() + outer;
                    shared[at] = Vector::new(values[slot].extract(lane));
                }
            } else {
                let shared = shared.with_vector_size_mut::<N>();
                shared[(start + outer * share.pitch() + inner) / share.vector] = values[slot];
            }
        }
    }
}

/// Adds the products of a step to the unit's part of the tile.
#[cube]
fn multiply(
    left: &Shared<[Vector<f32, Const<QUAD>>]>,
    right: &Shared<[Vector<f32, Const<QUAD>>]>,
    sums: &mut Array<Vector<f32, Const<QUAD>>>,
    half: usize,
    unit: (usize, usize),
    #[comptime] tile: Tile,
) {
    let (rows, columns) = comptime!((tile.unit_rows / QUAD, tile.unit_columns / QUAD));
    let (left_pitch, right_pitch) = comptime!(((tile.rows + GAP) / QUAD, (tile.columns + GAP) / QUAD));
    let (unit_row, unit_column) = unit;
    #[unroll]
    for depth in 0..tile.depth {
        let left_at = (half * tile.depth + depth) * left_pitch + unit_row;
        let right_at = (half * tile.depth + depth) * right_pitch + unit_column;
        let mut rights = Array::<Vector<f32, Const<QUAD>>>::new(columns);
        #[unroll]
        for j in 0..columns {
            rights[j] = right[right_at + j * comptime!(tile.columns / tile.unit_columns)];
        }
        #[unroll]
        for i in 0..rows {
            let lefts = left[left_at + i * comptime!(tile.rows / tile.unit_rows)];
            #[unroll]
            for lane in 0..QUAD {
                let value = Vector::<f32, Const<QUAD>>::new(lefts.extract(lane));
                #[unroll]
                for j in 0..columns {
                    let at = comptime!((i * QUAD + lane) * columns + j);
                    sums[at] = fma(value, rights[j], sums[at]);
                }
            }
        }
    }
}

/// The result, or its splits one behind the other. Cubes: tiles of rows, tiles of columns, splits of every phase.
#[cube(launch_unchecked)]
pub(super) fn product_kernel<N: Size>(
    left: &[Vector<f32, N>],
    right: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    geometry: Geometry,
    divisors: Divisors,
    split_depth: u32,
    split_size: u32,
    #[comptime] plan: Plan,
) {
    let tile = comptime!(plan.tile);
    let vector = N::value();
    let left_share = comptime!(Share::new(Side::Left, plan, vector));
    let right_share = comptime!(Share::new(Side::Right, plan, vector));
    let split = CUBE_POS_Z % plan.splits;
    let phase = CUBE_POS_Z / plan.splits;
    let y = axis(phase / plan.stride, geometry.height, geometry.above, plan.kernel, plan.stride);
    let x = axis(phase % plan.stride, geometry.width, geometry.left, plan.kernel, plan.stride);
    let depth = match comptime!(plan.role) {
        Role::Output => plan.kernel * plan.kernel * geometry.channels,
        Role::InputGradient => y.taps * x.taps * geometry.out_channels,
        Role::WeightGradient => geometry.images * geometry.out_height * geometry.out_width,
    };
    let begin = split * split_depth;
    let end = clamp_max(begin + split_depth, depth);
    let job = Job { geometry, divisors, y, x, end, plan };

    let first_row = CUBE_POS_X * tile.rows as u32;
    let first_column = CUBE_POS_Y * tile.columns as u32;
    let unit_columns = comptime!(tile.columns / tile.unit_columns);
    let unit = (UNIT_POS as usize / unit_columns, UNIT_POS as usize % unit_columns);

    let mut lefts = Array::<Vector<f32, N>>::new(left_share.slots());
    let mut rights = Array::<Vector<f32, N>>::new(right_share.slots());
    let mut left_shared = Shared::<[Vector<f32, Const<QUAD>>]>::new_aligned_slice(
        comptime!(2 * tile.depth * left_share.pitch() / QUAD),
        16usize,
    );
    let mut right_shared = Shared::<[Vector<f32, Const<QUAD>>]>::new_aligned_slice(
        comptime!(2 * tile.depth * right_share.pitch() / QUAD),
        16usize,
    );
    let mut sums =
        Array::<Vector<f32, Const<QUAD>>>::new(comptime!(tile.unit_rows * tile.unit_columns / QUAD));

    fetch::<N>(&job, left, &mut lefts, first_row, begin, left_share);
    fetch::<N>(&job, right, &mut rights, first_column, begin, right_share);
    store::<N>(&lefts, &mut left_shared, 0usize, left_share);
    store::<N>(&rights, &mut right_shared, 0usize, right_share);
    sync_cube();
    let mut half = 0usize;
    for at in range_stepped(begin, end, tile.depth as u32) {
        let next = at + tile.depth as u32;
        if next < end {
            fetch::<N>(&job, left, &mut lefts, first_row, next, left_share);
            fetch::<N>(&job, right, &mut rights, first_column, next, right_share);
        }
        multiply(&left_shared, &right_shared, &mut sums, half, unit, tile);
        half = 1 - half;
        if next < end {
            store::<N>(&lefts, &mut left_shared, half, left_share);
            store::<N>(&rights, &mut right_shared, half, right_share);
        }
        sync_cube();
    }

    let (unit_row, unit_column) = unit;
    #[unroll]
    for i in 0..tile.unit_rows {
        let line = comptime!(i / QUAD * (tile.rows / tile.unit_rows) * QUAD + i % QUAD);
        let (start, length) = job.row(first_row + (line + unit_row * QUAD) as u32);
        #[unroll]
        for j in 0..comptime!(tile.unit_columns / QUAD) {
            let block = comptime!(j * (tile.columns / tile.unit_columns) * QUAD);
            #[unroll]
            for part in 0..comptime!(QUAD / vector) {
                let column = first_column + (block + unit_column * QUAD + part * vector) as u32;
                let mut value = Vector::<f32, N>::empty();
                #[unroll]
                for lane in 0..vector {
                    let sum = sums[comptime!(i * (tile.unit_columns / QUAD) + j)];
                    value.insert(lane, sum.extract(comptime!(part * vector + lane)));
                }
                if column < length {
                    let at = split * split_size + start + column;
                    out[(at / vector as u32) as usize] = value;
                }
            }
        }
    }
}
