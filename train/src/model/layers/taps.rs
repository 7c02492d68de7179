//! The product at the heart of a direct convolution: sums over taps of a weight times a contiguous piece of memory.

use pulp::{Simd, WithSimd};

use crate::vectors::dispatch;

/// Most positions that are computed at once (three vectors of 16 lanes).
pub const STEP: usize = 48;

/// Terms that are added one after the other. Longer sums are sums of such partial sums, which round less.
pub const RUN: usize = 144;

/// Weights in the order in which the product reads them: by block of outputs, then input, then tap.
pub struct PackedWeights {
    blocks: Vec<[f32; WIDEST_BLOCK]>,
    /// Number of outputs of each block.
    sizes: Vec<usize>,
}

/// Most outputs that are computed together.
pub const WIDEST_BLOCK: usize = 8;

impl PackedWeights {
    pub fn new(outputs: usize, inputs: usize, taps: usize, at: impl Fn(usize, usize, usize) -> f32) -> Self {
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
    dispatch(BlockSizes { outputs })
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
pub fn channel_offsets(channels: usize, channel_length: usize, taps: &[usize], start: usize) -> Vec<usize> {
    (0..channels).flat_map(|c| taps.iter().map(move |tap| c * channel_length + start + tap)).collect()
}

/// `out[o][p] = sum_k weight[o][k] * planes[offset_k + p]`, where k runs over all taps of all input channels.
pub struct TapProduct<'a> {
    pub planes: &'a [f32],
    pub offsets: &'a [usize],
    pub packed: &'a PackedWeights,
    pub positions: usize,
}

impl TapProduct<'_> {
    /// Calls `finish(o, values)` with the values at the flattened positions for every output o.
    pub fn run(&self, accumulators: &mut Vec<f32>, mut finish: impl FnMut(usize, &[f32])) {
        let length = self.positions + STEP;
        accumulators.resize(WIDEST_BLOCK * length, 0.0);
        let mut first = 0;
        for (weights, &size) in self.packed.blocks.chunks_exact(self.offsets.len()).zip(&self.packed.sizes) {
            dispatch(TapBlock { product: self, weights, size, out: &mut accumulators[..], length });
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
pub fn tile<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(
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
