//! Direct 2D convolution on the CPU: forward, and the gradients of input and weight.
//!
//! Burn's own CPU convolution builds patches (im2col) for a matrix product; with few channels, writing and
//! reading the patches costs more than the product. Here an image is copied once into padded planes in which
//! every tap of the kernel is a constant offset: output position p of the flattened plane and tap t read
//! `plane[p + offset_t]`. So one loop over contiguous memory serves every width, and a strided convolution is
//! the same loop over the input split into `stride²` phases.
//!
//! Layouts are Burn's: images `[N, C, H, W]`, weights `[out, in, k, k]`.
//! Work is divided by image, or by fixed groups of images for sums over images, so results do not depend on
//! the number of threads.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::ConvolutionOptions;
use super::buffer::written;

/// Most positions that are computed at once (three vectors of 16 lanes).
pub(super) const STEP: usize = 48;

/// Groups of images whose sums are added for the weight gradient, independent of the number of threads.
const WEIGHT_GROUPS: usize = 16;

/// Flattened length from which the horizontal sums at the end of a reduction cost little.
const LONG_REDUCTION: usize = 2048;

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
    let [height, width] = g.output();
    let columns = g.phase_plane()[1];
    written(g.images * g.output_length(), g.output_length(), |scratch: &mut Scratch, image, output| {
        let input = &input[image * g.input_length()..][..g.input_length()];
        let planes = zeroed(&mut scratch.planes, g.channels_in * g.channel_length());
        split_phases(g, input, planes, g.channel_length());
        let product = TapProduct { planes, offsets: &offsets, packed: &packed, positions: g.positions() };
        product.run(&mut scratch.accumulators, |o, flat| {
            let plane = &mut output[o * height * width..][..height * width];
            for (row, flat) in plane.chunks_exact_mut(width).zip(flat.chunks(columns)) {
                row.copy_from_slice(&flat[..width]);
            }
        });
    })
}

/// dL/d(input), `[N, in, H, W]`, from dL/d(output), `[N, out, H', W']`.
///
/// For each phase of the input it is a convolution of the padded output gradient with the taps that read this
/// phase, flipped.
pub fn input_gradient(g: &Geometry, output_gradient: &[f32], weight: &[f32]) -> Vec<f32> {
    let reach = g.reach();
    let [height, width] = g.output();
    let columns = width + 2 * reach;
    let channel_length = (height + 2 * reach) * columns + g.slack();
    let taps_per_pair = g.kernel * g.kernel;

    let phases: Vec<InputPhase> = (0..g.phases() * g.phases())
        .map(|phase| InputPhase::new(g, [phase / g.phases(), phase % g.phases()], columns, channel_length))
        .collect();
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
        for (plane, source) in
            planes.chunks_exact_mut(channel_length).zip(output_gradient.chunks_exact(height * width))
        {
            for (y, row) in source.chunks_exact(width).enumerate() {
                plane[(y + reach) * columns + reach..][..width].copy_from_slice(row);
            }
        }
        for (phase, packed) in phases.iter().zip(&packed) {
            let positions = phase.count[0] * columns;
            let product = TapProduct { planes, offsets: &phase.offsets, packed, positions };
            product.run(&mut scratch.accumulators, |i, flat| {
                let plane = &mut gradient[i * g.input[0] * g.input[1]..][..g.input[0] * g.input[1]];
                phase.scatter(g, plane, flat, columns);
            });
        }
    })
}

/// dL/d(weight), `[out, in, k, k]`.
pub fn weight_gradient(g: &Geometry, input: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    let [height, width] = g.output();
    let columns = g.phase_plane()[1];
    let taps = g.taps();
    let pairs = g.channels_in * taps.len();
    let group = g.images.div_ceil(WEIGHT_GROUPS).max(1);
    // If there is one phase, the planes of several images are adjacent and reduced in one pass; the gradient
    // is zero at positions whose taps reach into the next image.
    let one_phase = g.phases() == 1;
    let image_stride = if one_phase { g.phase_plane()[0] * g.phase_plane()[1] } else { g.channel_length() };
    // Images reduced together, so that small planes give a long reduction.
    let together = (LONG_REDUCTION / g.positions().max(1)).clamp(1, group);

    let partial: Vec<Vec<f32>> = input
        .par_chunks(group * g.input_length())
        .zip(output_gradient.par_chunks(group * g.output_length()))
        .map_init(Scratch::default, |scratch, (input, output_gradient)| {
            let mut sums = vec![0.0; g.channels_out * pairs];
            let batches = input
                .chunks(together * g.input_length())
                .zip(output_gradient.chunks(together * g.output_length()));
            for (input, output_gradient) in batches {
                let images = input.len() / g.input_length();
                // A channel holds its images one after the other, so that a reduction covers all of them. The
                // gradient is zero at positions that are not outputs: row ends, and the slack.
                let channel_length = images * image_stride + g.slack();
                let planes = zeroed(&mut scratch.planes, g.channels_in * channel_length);
                let rows = zeroed(&mut scratch.accumulators, g.channels_out * channel_length);
                for image in 0..images {
                    let start = image * image_stride;
                    let input = &input[image * g.input_length()..][..g.input_length()];
                    split_phases(g, input, &mut planes[start..], channel_length);
                    let gradient = &output_gradient[image * g.output_length()..][..g.output_length()];
                    for (o, source) in gradient.chunks_exact(height * width).enumerate() {
                        let plane = &mut rows[o * channel_length + start..][..height * columns];
                        for (to, row) in plane.chunks_exact_mut(columns).zip(source.chunks_exact(width)) {
                            to[..width].copy_from_slice(row);
                        }
                    }
                }
                let (segments, positions) = if one_phase {
                    (vec![0], (images - 1) * image_stride + g.positions())
                } else {
                    ((0..images).map(|image| image * image_stride).collect(), g.positions())
                };
                Arch::new().dispatch(Correlate {
                    planes,
                    rows,
                    channel_length,
                    segments,
                    positions,
                    offsets: channel_offsets(g.channels_in, channel_length, &taps, 0),
                    sums: &mut sums,
                });
            }
            sums
        })
        .collect();
    let mut partial = partial.into_iter();
    let mut total = partial.next().unwrap_or_else(|| vec![0.0; g.channels_out * pairs]);
    for sums in partial {
        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    total
}

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    planes: Vec<f32>,
    accumulators: Vec<f32>,
}

pub(super) fn zeroed(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.clear();
    buffer.resize(length, 0.0);
    buffer
}

/// Copies an image into zeroed phase planes; channel c starts at `c * channel_length`.
pub(super) fn split_phases(g: &Geometry, input: &[f32], planes: &mut [f32], channel_length: usize) {
    let [height, width] = g.input;
    let [rows, columns] = g.phase_plane();
    let [above, left] = g.before();
    for (c, source) in input.chunks_exact(height * width).enumerate() {
        for phase_y in 0..g.phases() {
            for phase_x in 0..g.phases() {
                let phase = phase_y * g.phases() + phase_x;
                let plane = &mut planes[c * channel_length + phase * g.plane_length()..][..rows * columns];
                for (y, row) in plane.chunks_exact_mut(columns).enumerate() {
                    let Some(source_y) = (g.stride * y + phase_y).checked_sub(above) else { continue };
                    if source_y >= height {
                        continue;
                    }
                    let source = &source[source_y * width..][..width];
                    // The first column of the plane that is inside the image.
                    let first = left.saturating_sub(phase_x).div_ceil(g.stride);
                    let Some(row) = row.get_mut(first..) else { continue };
                    let from = g.stride * first + phase_x - left;
                    let Some(source) = source.get(from..) else { continue };
                    if g.stride == 1 {
                        let length = row.len().min(source.len());
                        row[..length].copy_from_slice(&source[..length]);
                    } else {
                        row.iter_mut()
                            .zip(source.iter().step_by(g.stride))
                            .for_each(|(to, from)| *to = *from);
                    }
                }
            }
        }
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
    pub(super) fn new(g: &Geometry, phase: [usize; 2], columns: usize, channel_length: usize) -> Self {
        let reach = g.reach();
        let (mut kernel_taps, mut taps) = (Vec::new(), Vec::new());
        for y in (phase[0]..g.kernel).step_by(g.stride) {
            for x in (phase[1]..g.kernel).step_by(g.stride) {
                kernel_taps.push(y * g.kernel + x);
                taps.push((reach - y / g.stride) * columns + reach - x / g.stride);
            }
        }
        let mut first = [0; 2];
        let mut count = [0; 2];
        let mut within = [0; 2];
        for axis in 0..2 {
            // Position q of the phase is input row stride * q + phase - padding.
            within[axis] = g.before()[axis].saturating_sub(phase[axis]).div_ceil(g.stride);
            first[axis] = g.stride * within[axis] + phase[axis] - g.before()[axis];
            let last = g.output()[axis] + reach;
            let inside = g.input[axis].saturating_sub(first[axis]).div_ceil(g.stride);
            count[axis] = inside.min(last.saturating_sub(within[axis]));
        }
        let start = within[0] * columns + within[1];
        let offsets = channel_offsets(g.channels_out, channel_length, &taps, start);
        Self { kernel_taps, offsets, first, count }
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
        let sizes = Arch::new().dispatch(BlockSizes { outputs });
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
        let width = VECTORS * S::F32_LANES;
        for position in (0..self.product.positions).step_by(width) {
            let sums = self.tile::<S, OUTPUTS, VECTORS>(simd, position);
            for (o, sums) in sums.iter().enumerate() {
                let out = &mut self.out[o * self.length + position..][..width];
                S::as_mut_simd_f32s(out).0.copy_from_slice(sums);
            }
        }
    }

    // PERF: nothing in this loop may panic. With a bounds check that can panic, the compiler keeps half of
    // the sums in memory, and the loop takes twice as long.
    #[inline(always)]
    fn tile<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        position: usize,
    ) -> [[S::f32s; VECTORS]; OUTPUTS] {
        let width = VECTORS * S::F32_LANES;
        let mut totals = [[simd.splat_f32s(0.0); VECTORS]; OUTPUTS];
        let planes = &self.product.planes[position..];
        for (offsets, weights) in self.product.offsets.chunks(RUN).zip(self.weights.chunks(RUN)) {
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
            for o in 0..OUTPUTS {
                for v in 0..VECTORS {
                    totals[o][v] = simd.add_f32s(totals[o][v], sums[o][v]);
                }
            }
        }
        totals
    }
}

/// `sums[o][pair] += sum over segments and p of rows[o][segment + p] * planes[segment + offset_pair + p]`.
struct Correlate<'a> {
    planes: &'a [f32],
    rows: &'a [f32],
    channel_length: usize,
    segments: Vec<usize>,
    positions: usize,
    offsets: Vec<usize>,
    sums: &'a mut [f32],
}

impl WithSimd for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::F32_LANES == 16 { self.blocks::<S, 4, 6>(simd) } else { self.blocks::<S, 3, 4>(simd) }
    }
}

impl Correlate<'_> {
    #[inline(always)]
    fn blocks<S: Simd, const OUTPUTS: usize, const PAIRS: usize>(self, simd: S) {
        let outputs = self.rows.len() / self.channel_length;
        for first in (0..outputs).step_by(OUTPUTS) {
            // An incomplete last block repeats its last entry, and does not store the repetitions.
            let rows: [usize; OUTPUTS] =
                std::array::from_fn(|o| (first + o).min(outputs - 1) * self.channel_length);
            for pair in (0..self.offsets.len()).step_by(PAIRS) {
                let offsets: [usize; PAIRS] =
                    std::array::from_fn(|k| self.offsets[(pair + k).min(self.offsets.len() - 1)]);
                let sums = self.reduce::<S, OUTPUTS, PAIRS>(simd, rows, offsets);
                for (o, sums) in sums.iter().enumerate().take(outputs - first) {
                    let stored = &mut self.sums[(first + o) * self.offsets.len() + pair..];
                    let stored = stored.iter_mut().take(self.offsets.len() - pair);
                    stored.zip(sums).for_each(|(stored, &sum)| *stored += simd.reduce_sum_f32s(sum));
                }
            }
        }
    }

    // PERF: nothing in the loop may panic; see `TapBlock::tile`.
    #[inline(always)]
    fn reduce<S: Simd, const OUTPUTS: usize, const PAIRS: usize>(
        &self,
        simd: S,
        rows: [usize; OUTPUTS],
        offsets: [usize; PAIRS],
    ) -> [[S::f32s; PAIRS]; OUTPUTS] {
        let lanes = S::F32_LANES;
        let steps = self.positions.div_ceil(lanes);
        let mut sums = [[simd.splat_f32s(0.0); PAIRS]; OUTPUTS];
        for &segment in &self.segments {
            let rows = rows.map(|row| S::as_simd_f32s(&self.rows[row + segment..][..steps * lanes]).0);
            let planes = offsets.map(|at| S::as_simd_f32s(&self.planes[at + segment..][..steps * lanes]).0);
            for step in 0..steps {
                let mut gradient = [simd.splat_f32s(0.0); OUTPUTS];
                for o in 0..OUTPUTS {
                    let Some(&value) = rows[o].get(step) else { break };
                    gradient[o] = value;
                }
                for k in 0..PAIRS {
                    let Some(&value) = planes[k].get(step) else { break };
                    for o in 0..OUTPUTS {
                        sums[o][k] = simd.mul_add_f32s(gradient[o], value, sums[o][k]);
                    }
                }
            }
        }
        sums
    }
}
