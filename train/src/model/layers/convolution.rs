//! Direct 2D convolution on the CPU: forward, and the gradients of input and weight.
//!
//! Burn's own CPU convolution builds patches (im2col) for a matrix product; with few channels, writing and
//! reading the patches costs more than the product. Here an image is copied once into padded planes in which
//! every tap of the kernel is a constant offset: output position p of the flattened plane and tap t read
//! `plane[p + offset_t]`. So one loop over contiguous memory serves every width, and a strided convolution is
//! the same loop over the input split into `stride²` phases. The weight gradient reads the image with channels last, where
//! the taps of a row of the kernel are contiguous.
//!
//! Layouts are Burn's: images `[N, C, H, W]`, weights `[out, in, k, k]`.
//! Work is divided by image, or by fixed groups of images and outputs for sums over images, so results do not depend on the
//! number of threads.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::ConvolutionOptions;
use super::buffer::written;

/// Most positions that are computed at once (three vectors of 16 lanes).
pub(super) const STEP: usize = 48;

/// Tasks of the weight gradient, independent of the number of threads.
const WEIGHT_TASKS: usize = 16;

/// Most sums that the groups of images of the weight gradient have together, unless one group has more.
const MOST_SUMS: usize = 1 << 22;

/// Most lanes of a vector.
const LANES: usize = 16;

/// Terms that are added one after the other. Longer sums are sums of such partial sums, which round less.
const RUN: usize = 144;

/// Shape of a convolution with a square kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Number of images.
    pub images: usize,
    /// Input channels.
    pub channels_in: usize,
    /// Output channels.
    pub channels_out: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Side of the kernel.
    pub kernel: usize,
    /// Input positions from one output position to the next.
    pub stride: usize,
    /// Zeros before and after the height, and before and after the width.
    pub padding: [[usize; 2]; 2],
}

impl Geometry {
    /// Output height and width.
    pub fn output(&self) -> [usize; 2] {
        let options = ConvolutionOptions { stride: self.stride, padding: self.padding, depthwise: false };
        options.output(self.input, self.kernel)
    }

    /// Zeros above and to the left.
    fn before(&self) -> [usize; 2] {
        self.padding.map(|[before, _]| before)
    }

    /// Largest offset of a tap within its phase, in positions of the phase.
    pub(super) fn reach(&self) -> usize {
        (self.kernel - 1) / self.stride
    }

    /// Rows and columns of an input plane of one phase.
    pub(super) fn phase_plane(&self) -> [usize; 2] {
        self.output().map(|side| side + self.reach())
    }

    /// Floats after a plane's last position that a kernel may read.
    pub(super) fn slack(&self) -> usize {
        STEP + self.kernel + self.before()[1]
    }

    pub(super) fn phases(&self) -> usize {
        // A kernel smaller than the stride reads only the first phases.
        self.stride.min(self.kernel)
    }

    /// Floats of one plane of one phase, with the slack after it.
    fn plane_length(&self) -> usize {
        let [rows, columns] = self.phase_plane();
        rows * columns + self.slack()
    }

    /// Floats of all phases of one channel.
    pub(super) fn channel_length(&self) -> usize {
        self.phases() * self.phases() * self.plane_length()
    }

    /// Flattened output positions, including the unused ones at the end of each row.
    pub(super) fn positions(&self) -> usize {
        self.output()[0] * self.phase_plane()[1]
    }

    /// Offset of every tap, row by row, from an output position within a channel.
    pub(super) fn taps(&self) -> Vec<usize> {
        let columns = self.phase_plane()[1];
        (0..self.kernel * self.kernel)
            .map(|tap| {
                let (y, x) = (tap / self.kernel, tap % self.kernel);
                let phase = (y % self.stride) * self.phases() + x % self.stride;
                phase * self.plane_length() + (y / self.stride) * columns + x / self.stride
            })
            .collect()
    }

    /// Height and width with the padding.
    fn padded(&self) -> [usize; 2] {
        std::array::from_fn(|axis| self.input[axis] + self.padding[axis].iter().sum::<usize>())
    }

    /// Floats of a padded image.
    fn padded_length(&self) -> usize {
        self.padded().iter().product::<usize>() * self.channels_in
    }

    /// Where the inputs of each output position begin in a padded image with channels last.
    fn starts(&self) -> Vec<usize> {
        let [height, width] = self.output();
        let at = |y: usize, x: usize| (y * self.padded()[1] + x) * self.stride * self.channels_in;
        (0..height).flat_map(|y| (0..width).map(move |x| at(y, x))).collect()
    }

    /// Where each position of an image begins in a padded image with channels last.
    fn padded_places(&self) -> Vec<usize> {
        let ([height, width], [above, left]) = (self.input, self.before());
        let at = |y: usize, x: usize| ((y + above) * self.padded()[1] + x + left) * self.channels_in;
        (0..height).flat_map(|y| (0..width).map(move |x| at(y, x))).collect()
    }

    pub(super) fn input_length(&self) -> usize {
        self.channels_in * self.input[0] * self.input[1]
    }

    fn output_length(&self) -> usize {
        let [height, width] = self.output();
        self.channels_out * height * width
    }
}

/// `[N, out, H', W']` from `[N, in, H, W]` and `[out, in, k, k]`.
pub fn forward(g: &Geometry, input: &[f32], weight: &[f32]) -> Vec<f32> {
    let taps = g.taps();
    let packed = PackedWeights::new(g.channels_out, g.channels_in, taps.len(), |o, i, t| {
        weight[(o * g.channels_in + i) * taps.len() + t]
    });
    let offsets = channel_offsets(g.channels_in, g.channel_length(), &taps, 0);
    let phases = PhasePlanes::new(g);
    let [height, width] = g.output();
    let columns = g.phase_plane()[1];
    written(g.images * g.output_length(), g.output_length(), |scratch: &mut Scratch, image, output| {
        let input = &input[image * g.input_length()..][..g.input_length()];
        let planes = zeroed(&mut scratch.planes, g.channels_in * g.channel_length());
        phases.split(g.input, input, planes, g.channel_length());
        let product = TapProduct { planes, offsets: &offsets, packed: &packed, positions: g.positions() };
        product.run(&mut scratch.accumulators, |o, flat| {
            let plane = &mut output[o * height * width..][..height * width];
            for (row, flat) in plane.chunks_exact_mut(width).zip(flat.chunks(columns)) {
                copy(&flat[..width], row);
            }
        });
    })
}

/// dL/d(input), `[N, in, H, W]`, from dL/d(output), `[N, out, H', W']`.
///
/// For each phase of the input it is a convolution of the padded output gradient with the taps that read this
/// phase, flipped.
pub fn input_gradient(g: &Geometry, output_gradient: &[f32], weight: &[f32]) -> Vec<f32> {
    let padded = PaddedGradient::new(g);
    let (area, channel_length) = (g.output().iter().product(), padded.length(g));
    let taps_per_pair = g.kernel * g.kernel;
    let phases = padded.phases(g);
    let packed: Vec<PackedWeights> = phases
        .iter()
        .map(|phase| {
            PackedWeights::new(g.channels_in, g.channels_out, phase.kernel_taps.len(), |i, o, t| {
                weight[(o * g.channels_in + i) * taps_per_pair + phase.kernel_taps[t]]
            })
        })
        .collect();

    written(g.images * g.input_length(), g.input_length(), |scratch: &mut Scratch, image, gradient| {
        let output_gradient = &output_gradient[image * g.output_length()..][..g.output_length()];
        let planes = zeroed(&mut scratch.planes, g.channels_out * channel_length);
        for (plane, source) in planes.chunks_exact_mut(channel_length).zip(output_gradient.chunks_exact(area))
        {
            padded.copy(g, source, plane);
        }
        for (phase, packed) in phases.iter().zip(&packed) {
            let positions = phase.count[0] * padded.size[1];
            let product = TapProduct { planes, offsets: &phase.offsets, packed, positions };
            product.run(&mut scratch.accumulators, |i, flat| {
                let plane = &mut gradient[i * g.input[0] * g.input[1]..][..g.input[0] * g.input[1]];
                phase.scatter(g, plane, flat, padded.size[1]);
            });
        }
    })
}

/// dL/d(weight), `[out, in, k, k]`.
///
/// With channels last, the inputs that one row of the kernel reads for an output position are contiguous. So the
/// gradient of a row of the kernel is the product of the output gradient, `[out, positions]`, with these pieces.
pub fn weight_gradient(g: &Geometry, input: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    let (area, row) = (g.output().iter().product::<usize>(), g.kernel * g.channels_in);
    let tasks = WeightTasks::new(g);
    let block_length = g.kernel * tasks.block * row.next_multiple_of(LANES);
    // Images that are summed together, so that small maps have long sums too.
    let together = (RUN / area.max(1)).clamp(1, tasks.images);
    let (image_length, starts, places) = (g.padded_length(), g.starts(), g.padded_places());
    let packed_places: Vec<usize> = (0..area).map(|p| p * WIDEST_BLOCK).collect();

    let run = |scratch: &mut Scratch, task: usize| {
        let (images, outputs) = (tasks.images(g, task), tasks.outputs(g, task));
        let mut sums = vec![0.0; outputs.len().div_ceil(tasks.block) * block_length];
        for first in images.clone().step_by(together) {
            let images = first..(first + together).min(images.end);
            let planes = zeroed(&mut scratch.planes, images.len() * image_length + STEP);
            let input = &input[first * g.input_length()..];
            let images = images.len();
            let padded = planes.chunks_exact_mut(image_length).take(images);
            for (input, padded) in input.chunks_exact(g.input_length()).zip(padded) {
                transpose(input, &places, padded);
            }
            let positions: Vec<usize> = (0..images)
                .flat_map(|image| starts.iter().map(move |start| image * image_length + start))
                .collect();
            // Every block of outputs of every image, as `[block][image][position][output]`.
            scratch
                .weights
                .resize(outputs.len().div_ceil(tasks.block) * positions.len(), [0.0; WIDEST_BLOCK]);
            let packed = scratch.weights.chunks_exact_mut(positions.len());
            for (output, packed) in outputs.clone().step_by(tasks.block).zip(packed) {
                let size = tasks.block.min(outputs.end - output);
                for (image, packed) in packed.chunks_exact_mut(area).enumerate() {
                    let gradient = &output_gradient[(first + image) * g.output_length() + output * area..];
                    transpose(&gradient[..size * area], &packed_places, packed.as_flattened_mut());
                }
            }
            Arch::new().dispatch(KernelRows {
                planes: &scratch.planes,
                positions: &positions,
                weights: &scratch.weights,
                block_length,
                rows: g.kernel,
                next_row: g.padded()[1] * g.channels_in,
                row,
                sums: &mut sums,
            });
        }
        sums
    };
    let sums: Vec<Vec<f32>> = (0..tasks.count)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| run(scratch, task))
        .collect();

    let (taps, stride) = (g.kernel * g.kernel, row.next_multiple_of(LANES));
    written(
        g.channels_out * g.channels_in * taps,
        g.channels_in * taps,
        |total: &mut Vec<f32>, output, gradient| {
            let (part, output) = (output / tasks.outputs, output % tasks.outputs);
            let total = zeroed(total, g.kernel * row);
            for sums in sums[part..].iter().step_by(tasks.parts) {
                let block = &sums[output / tasks.block * block_length..][..block_length];
                let kernel_rows = block.chunks_exact(tasks.block * stride);
                for (total, kernel_row) in total.chunks_exact_mut(row).zip(kernel_rows) {
                    let sums = &kernel_row[output % tasks.block * stride..][..row];
                    total.iter_mut().zip(sums).for_each(|(total, sum)| *total += *sum);
                }
            }
            for (tap, total) in total.chunks_exact(g.channels_in).enumerate() {
                gradient[tap..].iter_mut().step_by(taps).zip(total).for_each(|(to, total)| *to = *total);
            }
        },
    )
}

/// How the weight gradient is divided into tasks: by groups of images, whose sums are added in the end, and by parts of the
/// outputs where the sums of all groups would be many. It does not depend on the number of threads.
struct WeightTasks {
    /// Number of tasks.
    count: usize,
    /// Number of parts of the outputs; task t has part `t % parts`.
    parts: usize,
    /// Images of a group and outputs of a part; the last may have fewer.
    images: usize,
    outputs: usize,
    /// Outputs that are computed together.
    block: usize,
}

impl WeightTasks {
    fn new(g: &Geometry) -> Self {
        let weights = g.channels_out * g.channels_in * g.kernel * g.kernel;
        let groups = (MOST_SUMS / weights.max(1)).clamp(1, WEIGHT_TASKS);
        let images = g.images.div_ceil(groups).max(1);
        let block = block_sizes(WIDEST_BLOCK)[0];
        let outputs = (g.channels_out * groups).div_ceil(WEIGHT_TASKS).next_multiple_of(block).max(block);
        let parts = g.channels_out.div_ceil(outputs);
        Self { count: g.images.div_ceil(images) * parts, parts, images, outputs, block }
    }

    fn images(&self, g: &Geometry, task: usize) -> Range<usize> {
        let first = task / self.parts * self.images;
        first..(first + self.images).min(g.images)
    }

    fn outputs(&self, g: &Geometry, task: usize) -> Range<usize> {
        let first = task % self.parts * self.outputs;
        first..(first + self.outputs).min(g.channels_out)
    }
}

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    planes: Vec<f32>,
    accumulators: Vec<f32>,
    weights: Vec<[f32; WIDEST_BLOCK]>,
}

pub(super) fn zeroed(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.clear();
    buffer.resize(length, 0.0);
    buffer
}

/// How an image is copied into phase planes.
pub(super) struct PhasePlanes {
    stride: usize,
    /// Columns of a plane.
    columns: usize,
    phases: Vec<PhaseCopy>,
}

/// The rectangle of one phase that lies in the image.
struct PhaseCopy {
    /// Its first position among the phase planes of a channel.
    start: usize,
    /// Its first row and column in the image.
    first: [usize; 2],
    rows: usize,
    columns: usize,
}

impl PhasePlanes {
    pub(super) fn new(g: &Geometry) -> Self {
        let columns = g.phase_plane()[1];
        let copy = |phase: usize| {
            let place = PhasePlace::both(g, [phase / g.phases(), phase % g.phases()]);
            let [row, column] = place.map(|axis| axis.within);
            let start = phase * g.plane_length() + row * columns + column;
            let [rows, columns] = place.map(|axis| axis.count);
            PhaseCopy { start, first: place.map(|axis| axis.first), rows, columns }
        };
        let phases = (0..g.phases() * g.phases()).map(copy);
        Self {
            stride: g.stride,
            columns,
            phases: phases.filter(|phase| phase.rows > 0 && phase.columns > 0).collect(),
        }
    }

    /// Copies an image into zeroed phase planes; channel c starts at `c * channel_length`.
    pub(super) fn split(
        &self,
        [height, width]: [usize; 2],
        input: &[f32],
        planes: &mut [f32],
        channel_length: usize,
    ) {
        for phase in &self.phases {
            for (c, source) in input.chunks_exact(height * width).enumerate() {
                let plane = planes[c * channel_length + phase.start..].chunks_mut(self.columns);
                let source = source[phase.first[0] * width..].chunks_exact(width).step_by(self.stride);
                for (to, from) in plane.zip(source).take(phase.rows) {
                    copy_strided(&from[phase.first[1]..], self.stride, &mut to[..phase.columns]);
                }
            }
        }
    }
}

/// Copies every `stride`th value of a row.
fn copy_strided(from: &[f32], stride: usize, to: &mut [f32]) {
    match stride {
        1 => copy(&from[..to.len()], to),
        // PERF: the compiler vectorises a constant stride alone.
        2 => to.iter_mut().zip(from.chunks(2)).for_each(|(to, from)| *to = from[0]),
        stride => to.iter_mut().zip(from.iter().step_by(stride)).for_each(|(to, from)| *to = *from),
    }
}

/// Copies a row.
// PERF: most rows are so short that a call of memcpy takes longer than the copy.
#[inline(always)]
pub(super) fn copy(from: &[f32], to: &mut [f32]) {
    match to.len() {
        4..=8 => copy_ends::<4>(from, to),
        9..=16 => copy_ends::<8>(from, to),
        17..=32 => copy_ends::<16>(from, to),
        _ => to.copy_from_slice(from),
    }
}

/// Copies a row of N to 2 N values: its first N, then its last N.
#[inline(always)]
fn copy_ends<const N: usize>(from: &[f32], to: &mut [f32]) {
    let (Some(first), Some(last)) = (from.first_chunk::<N>(), from.last_chunk::<N>()) else { return };
    if let Some(to) = to.first_chunk_mut::<N>() {
        *to = *first;
    }
    if let Some(to) = to.last_chunk_mut::<N>() {
        *to = *last;
    }
}

/// A plane of the output gradient with the zeros around it that the phases of the input read.
pub(super) struct PaddedGradient {
    /// Rows and columns.
    pub(super) size: [usize; 2],
    /// Zeros before the gradient.
    lead: [usize; 2],
}

impl PaddedGradient {
    pub(super) fn new(g: &Geometry) -> Self {
        let (mut size, mut lead) = ([0; 2], [0; 2]);
        for axis in 0..2 {
            let extents = (0..g.phases()).map(|phase| PhasePlace::new(g, axis, phase));
            // Position q of a phase reads the gradient's outputs q - reach to q.
            let first = extents.clone().map(|extent| extent.within).min().unwrap_or(0).min(g.reach());
            let end = extents.map(|extent| extent.within + extent.count).max().unwrap_or(0);
            lead[axis] = g.reach() - first;
            size[axis] = (end + lead[axis]).max(g.output()[axis] + lead[axis]);
        }
        Self { size, lead }
    }

    /// Floats with the slack.
    pub(super) fn length(&self, g: &Geometry) -> usize {
        self.size[0] * self.size[1] + g.slack()
    }

    /// Copies a plane of the output gradient into a zeroed padded plane.
    pub(super) fn copy(&self, g: &Geometry, gradient: &[f32], plane: &mut [f32]) {
        let width = g.output()[1];
        for (row, to) in
            gradient.chunks_exact(width).zip(plane.chunks_exact_mut(self.size[1]).skip(self.lead[0]))
        {
            copy(row, &mut to[self.lead[1]..][..width]);
        }
    }

    /// All phases of the input.
    pub(super) fn phases(&self, g: &Geometry) -> Vec<InputPhase> {
        let phases = (0..g.phases()).flat_map(|y| (0..g.phases()).map(move |x| [y, x]));
        phases.map(|phase| InputPhase::new(g, self, phase)).collect()
    }
}

/// The part of one phase of the input that lies in the image, along one axis.
#[derive(Clone, Copy)]
struct PhasePlace {
    /// First position of the phase.
    within: usize,
    /// The same, as a position of the image.
    first: usize,
    /// Number of positions that an output reads.
    count: usize,
}

impl PhasePlace {
    fn new(g: &Geometry, axis: usize, phase: usize) -> Self {
        // Position q of the phase is input row stride * q + phase - padding.
        let within = g.before()[axis].saturating_sub(phase).div_ceil(g.stride);
        let first = g.stride * within + phase - g.before()[axis];
        let last = g.output()[axis] + g.reach();
        let inside = g.input[axis].saturating_sub(first).div_ceil(g.stride);
        Self { within, first, count: inside.min(last.saturating_sub(within)) }
    }

    fn both(g: &Geometry, phase: [usize; 2]) -> [Self; 2] {
        [0, 1].map(|axis| Self::new(g, axis, phase[axis]))
    }
}

/// The gradient of one phase of the input, as a convolution of the padded output gradient.
pub(super) struct InputPhase {
    /// Taps of the kernel that read this phase.
    pub(super) kernel_taps: Vec<usize>,
    /// Offsets of these taps into the padded gradient, for each of its channels.
    pub(super) offsets: Vec<usize>,
    /// First row and column of the image that belong to the phase.
    first: [usize; 2],
    /// Number of rows and columns of the image that belong to the phase.
    pub(super) count: [usize; 2],
}

impl InputPhase {
    fn new(g: &Geometry, padded: &PaddedGradient, phase: [usize; 2]) -> Self {
        let (reach, columns) = (g.reach(), padded.size[1]);
        let place = PhasePlace::both(g, phase);
        let (mut kernel_taps, mut taps) = (Vec::new(), Vec::new());
        for y in (phase[0]..g.kernel).step_by(g.stride) {
            for x in (phase[1]..g.kernel).step_by(g.stride) {
                kernel_taps.push(y * g.kernel + x);
                taps.push((reach - y / g.stride) * columns + reach - x / g.stride);
            }
        }
        let [row, column] = [0, 1].map(|axis| place[axis].within + padded.lead[axis] - reach);
        let offsets = channel_offsets(g.channels_out, padded.length(g), &taps, row * columns + column);
        Self {
            kernel_taps,
            offsets,
            first: place.map(|axis| axis.first),
            count: place.map(|axis| axis.count),
        }
    }

    pub(super) fn scatter(&self, g: &Geometry, plane: &mut [f32], flat: &[f32], columns: usize) {
        for (y, flat) in flat.chunks(columns).take(self.count[0]).enumerate() {
            let row = &mut plane[(self.first[0] + y * g.stride) * g.input[1]..][..g.input[1]];
            let values = flat.iter().take(self.count[1]);
            row[self.first[1]..].iter_mut().step_by(g.stride).zip(values).for_each(|(to, from)| *to = *from);
        }
    }
}

/// Weights in the order in which the product reads them: by block of outputs, then input, then tap.
struct PackedWeights {
    blocks: Vec<[f32; WIDEST_BLOCK]>,
    /// Number of outputs of each block.
    sizes: Vec<usize>,
}

/// Most outputs that are computed together.
const WIDEST_BLOCK: usize = 8;

impl PackedWeights {
    fn new(outputs: usize, inputs: usize, taps: usize, at: impl Fn(usize, usize, usize) -> f32) -> Self {
        let sizes = block_sizes(outputs);
        let mut blocks = Vec::with_capacity(sizes.len() * inputs * taps);
        let mut first = 0;
        for size in &sizes {
            for (input, tap) in (0..inputs).flat_map(|input| (0..taps).map(move |tap| (input, tap))) {
                blocks.push(std::array::from_fn(|o| if o < *size { at(first + o, input, tap) } else { 0.0 }));
            }
            first += size;
        }
        Self { blocks, sizes }
    }
}

fn block_sizes(outputs: usize) -> Vec<usize> {
    Arch::new().dispatch(BlockSizes { outputs })
}

/// Divides outputs into blocks of sizes that suit this processor; the last block may not be full.
struct BlockSizes {
    outputs: usize,
}

impl WithSimd for BlockSizes {
    type Output = Vec<usize>;

    fn with_simd<S: Simd>(self, _: S) -> Vec<usize> {
        let (mut left, mut sizes) = (self.outputs, Vec::new());
        while left > 0 {
            // AVX2 has blocks of 6 and 4: 4 if at most 4 are left, and twice 4 for 7 or 8, in place of 6 and a rest.
            let block = match (S::F32_LANES, left) {
                (16, _) => WIDEST_BLOCK,
                (_, 5 | 6 | 9..) => 6,
                _ => 4,
            };
            sizes.push(block.min(left));
            left -= block.min(left);
        }
        sizes
    }
}

/// Offsets of every tap of every channel, plus `start`.
fn channel_offsets(channels: usize, channel_length: usize, taps: &[usize], start: usize) -> Vec<usize> {
    (0..channels).flat_map(|c| taps.iter().map(move |tap| c * channel_length + start + tap)).collect()
}

/// `out[o][p] = sum_k weight[o][k] * planes[offset_k + p]`, where k runs over all taps of all input channels.
struct TapProduct<'a> {
    planes: &'a [f32],
    offsets: &'a [usize],
    packed: &'a PackedWeights,
    positions: usize,
}

impl TapProduct<'_> {
    /// Calls `finish(o, values)` with the values at the flattened positions for every output o.
    fn run(&self, accumulators: &mut Vec<f32>, mut finish: impl FnMut(usize, &[f32])) {
        let length = self.positions + STEP;
        accumulators.resize(WIDEST_BLOCK * length, 0.0);
        let arch = Arch::new();
        let mut first = 0;
        for (weights, &size) in self.packed.blocks.chunks_exact(self.offsets.len()).zip(&self.packed.sizes) {
            arch.dispatch(TapBlock { product: self, weights, size, out: &mut accumulators[..], length });
            for (o, flat) in accumulators.chunks_exact(length).take(size).enumerate() {
                finish(first + o, &flat[..self.positions]);
            }
            first += size;
        }
    }
}

/// Computes one block of outputs at all positions.
struct TapBlock<'a, 'b> {
    product: &'a TapProduct<'b>,
    weights: &'a [[f32; WIDEST_BLOCK]],
    size: usize,
    out: &'a mut [f32],
    length: usize,
}

impl WithSimd for TapBlock<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // 8 x 3 sums, 3 values and a weight fit the 32 registers of AVX-512; 6 x 2 sums, 2 values and a weight the 16 of
        // AVX2. With 4 x 3 none of the 16 would be free: the compiler then keeps sums in memory, which takes twice as long.
        if S::F32_LANES == 16 {
            self.rows::<S, 8, 3>(simd);
        } else if self.size > 4 {
            self.rows::<S, 6, 2>(simd);
        } else {
            self.rows::<S, 4, 2>(simd);
        }
    }
}

impl TapBlock<'_, '_> {
    #[inline(always)]
    fn rows<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(&mut self, simd: S) {
        for position in (0..self.product.positions).step_by(VECTORS * S::F32_LANES) {
            match (self.product.positions - position).div_ceil(S::F32_LANES) {
                1 => self.step::<S, OUTPUTS, 1>(simd, position),
                2 => self.step::<S, OUTPUTS, 2>(simd, position),
                _ => self.step::<S, OUTPUTS, VECTORS>(simd, position),
            }
        }
    }

    #[inline(always)]
    fn step<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(&mut self, simd: S, position: usize) {
        let planes = &self.product.planes[position..];
        let mut totals = [[simd.splat_f32s(0.0); VECTORS]; OUTPUTS];
        for (offsets, weights) in self.product.offsets.chunks(RUN).zip(self.weights.chunks(RUN)) {
            let sums = tile::<S, OUTPUTS, VECTORS>(simd, planes, offsets, weights);
            for (total, sum) in totals.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
                *total = simd.add_f32s(*total, *sum);
            }
        }
        for (o, totals) in totals.iter().enumerate() {
            let out = &mut self.out[o * self.length + position..][..VECTORS * S::F32_LANES];
            S::as_mut_simd_f32s(out).0.copy_from_slice(totals);
        }
    }
}

/// `sum over k of weights[k][o] * planes[offsets[k] + x]` for some outputs o and vectors of x.
// PERF: nothing in this loop may panic. With a bounds check that can panic, the compiler keeps half of
// the sums in memory, and the loop takes twice as long.
#[inline(always)]
fn tile<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(
    simd: S,
    planes: &[f32],
    offsets: &[usize],
    weights: &[[f32; WIDEST_BLOCK]],
) -> [[S::f32s; VECTORS]; OUTPUTS] {
    let width = VECTORS * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; OUTPUTS];
    for (&offset, weights) in offsets.iter().zip(weights) {
        let Some(values) = planes.get(offset..offset + width) else { break };
        let Ok(values) = <&[S::f32s; VECTORS]>::try_from(S::as_simd_f32s(values).0) else { break };
        let Some(weights) = weights.first_chunk::<OUTPUTS>() else { break };
        for o in 0..OUTPUTS {
            let weight = simd.splat_f32s(weights[o]);
            for v in 0..VECTORS {
                sums[o][v] = simd.mul_add_f32s(weight, values[v], sums[o][v]);
            }
        }
    }
    sums
}

/// Copies a matrix of rows as long as `places`, transposed: column c begins at `to[places[c]]`.
fn transpose(from: &[f32], places: &[usize], to: &mut [f32]) {
    Arch::new().dispatch(Transpose { from, places, to });
}

struct Transpose<'a> {
    from: &'a [f32],
    places: &'a [usize],
    to: &'a mut [f32],
}

/// Side of the squares that are transposed in registers.
const SQUARE: usize = 8;

impl WithSimd for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let columns = self.places.len();
        for (row, rows) in self.from.chunks(SQUARE * columns).enumerate() {
            let row = row * SQUARE;
            let whole = if rows.len() == SQUARE * columns { columns - columns % SQUARE } else { 0 };
            for (square, places) in self.places[..whole].chunks_exact(SQUARE).enumerate() {
                let mut values = [[0.0f32; SQUARE]; SQUARE];
                for (r, values) in values.iter_mut().enumerate() {
                    values.copy_from_slice(&rows[r * columns + square * SQUARE..][..SQUARE]);
                }
                for c in 0..SQUARE {
                    let column: [f32; SQUARE] = std::array::from_fn(|r| values[r][c]);
                    self.to[places[c] + row..][..SQUARE].copy_from_slice(&column);
                }
            }
            for c in whole..columns {
                for (r, values) in rows.chunks_exact(columns).enumerate() {
                    self.to[self.places[c] + row + r] = values[c];
                }
            }
        }
    }
}

/// `sums[block][y][o][x] += sum over k of weights[block][k][o] * planes[positions[k] + y * next_row + x]`.
struct KernelRows<'a> {
    planes: &'a [f32],
    positions: &'a [usize],
    weights: &'a [[f32; WIDEST_BLOCK]],
    /// Floats of the sums of a block, rows of the kernel, and floats between two of them in the planes.
    block_length: usize,
    rows: usize,
    next_row: usize,
    /// Number of x.
    row: usize,
    sums: &'a mut [f32],
}

impl WithSimd for KernelRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if S::F32_LANES == 16 { self.run::<S, 8, 3>(simd) } else { self.run::<S, 6, 2>(simd) }
    }
}

impl KernelRows<'_> {
    #[inline(always)]
    fn run<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(&mut self, simd: S) {
        for first in (0..self.positions.len()).step_by(RUN) {
            let run = first..(first + RUN).min(self.positions.len());
            for y in 0..self.rows {
                for x in (0..self.row).step_by(VECTORS * S::F32_LANES) {
                    match (self.row - x).div_ceil(S::F32_LANES) {
                        1 => self.blocks::<S, OUTPUTS, 1>(simd, run.clone(), y, x),
                        2 => self.blocks::<S, OUTPUTS, 2>(simd, run.clone(), y, x),
                        _ => self.blocks::<S, OUTPUTS, VECTORS>(simd, run.clone(), y, x),
                    }
                }
            }
        }
    }

    /// Adds the terms of some positions to the sums of some x for every block.
    // The inputs stay in the first-level cache for all blocks.
    #[inline(always)]
    fn blocks<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        run: Range<usize>,
        y: usize,
        x: usize,
    ) {
        let planes = &self.planes[y * self.next_row + x..];
        let stride = self.row.next_multiple_of(LANES);
        let weights = self.weights.chunks_exact(self.positions.len());
        for (weights, sums) in weights.zip(self.sums.chunks_exact_mut(self.block_length)) {
            let totals = tile::<S, OUTPUTS, VECTORS>(
                simd,
                planes,
                &self.positions[run.clone()],
                &weights[run.clone()],
            );
            for (o, totals) in totals.iter().enumerate() {
                let sums = &mut sums[(y * OUTPUTS + o) * stride + x..][..VECTORS * S::F32_LANES];
                let sums = S::as_mut_simd_f32s(sums).0;
                sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum = simd.add_f32s(*sum, *total));
            }
        }
    }
}
