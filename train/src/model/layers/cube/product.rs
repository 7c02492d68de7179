//! A convolution and its two gradients as matrix products (implicit GEMM): the matrix of patches is read from
//! the map directly, and never written.
//!
//! | role | rows | columns | depth |
//! | --- | --- | --- | --- |
//! | output | output positions | output channels | taps x input channels |
//! | input gradient | input positions of a phase | input channels | taps of the phase x output channels |
//! | weight gradient | output channels | taps x input channels | output positions |
//!
//! The input gradient of a strided convolution is divided into phases, by the remainder of the padded input position modulo
//! the stride. Each phase has its own taps, so that no products with inserted zeros are computed.
//!
//! A cube computes a tile of the result in steps along the depth, with two buffers in shared memory: its units read the next
//! step's values into registers, multiply the values in one buffer, and store the new ones in the other. A unit computes
//! several rows and columns of the tile, so that each value read from shared memory is used several times. Products are in
//! f32, and each sum has the order of the depth; if the depth is divided into splits, `rows.rs` adds their results.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::std::FastDivmod;

/// The result of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    Output,
    InputGradient,
    WeightGradient,
}

/// Sizes of a cube's part of the result, and of a unit's.
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

/// Floats of padding between rows of shared memory, so that units that store a row of a matrix as a column
/// use different banks.
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

/// Compile-time parameters of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub role: Role,
    pub tile: Tile,
    pub kernel: u32,
    pub stride: u32,
    /// Number of splits of the depth.
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

/// Divisors of depths and columns, for division by multiplication.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Divisors {
    /// Channels of each tap.
    pub channels: FastDivmod<u32>,
    pub out_width: FastDivmod<u32>,
    pub out_height: FastDivmod<u32>,
}

/// Taps and positions of a phase along one axis.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Axis {
    /// The phase: the remainder modulo the stride, which is also its first tap. The next taps follow at the stride.
    remainder: u32,
    taps: u32,
    /// Padded input position of the phase's first position, divided by the stride.
    first: u32,
    /// Number of positions.
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

/// A position in a map.
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

/// The vector of channels from `channel` on at a position of a map of `height` x `width` x `channels`; zeros
/// outside the map. A negative coordinate has wrapped around to a large one.
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

/// Reads the two matrices of a product, by row or column and depth.
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

    /// Taps of the phase in a row of the kernel. At least 1, since it is a divisor: a phase may have no taps.
    fn line(&self) -> u32 {
        clamp_min(self.x.taps, 1u32)
    }

    /// Position number `row` of the phase. If the phase has no positions, the result is outside the map.
    fn phase_place(&self, row: u32) -> Place {
        place(row, clamp_min(self.y.count, 1u32), clamp_min(self.x.count, 1u32))
    }

    /// A vector of the left matrix: along the depth, or along the rows for the weight gradient.
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

    /// A vector of the right matrix: along the depth for the output, else along the columns.
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

    /// Start and length of a row of the result; the length is 0 for a row outside it.
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

/// The left or the right matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    Left,
    Right,
}

/// How the units divide one matrix's values of a step: neighbouring units read neighbouring vectors in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Share {
    side: Side,
    /// Whether vectors are along the depth; else they are along the tile's rows or columns.
    along_depth: bool,
    /// Number of rows (left) or columns (right) of the tile.
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

    /// Vectors for each unit, rounded up.
    fn slots(self) -> usize {
        self.vectors().div_ceil(self.units)
    }

    /// Vectors in a line of memory: in a row of the tile, or in one depth.
    fn line(self) -> usize {
        if self.along_depth { self.depth / self.vector } else { self.extent / self.vector }
    }

    /// Floats from one depth to the next in shared memory.
    fn pitch(self) -> usize {
        self.extent + GAP
    }
}

/// Reads this unit's values of a step into registers.
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

/// Stores the unit's values in one of the two buffers of shared memory, ordered by depth.
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

/// Adds the products of a step to the unit's sums.
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

/// Computes the result, or that of each split, one after the other. Grid: tiles of rows, tiles of columns, phases x splits.
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
