//! Instruction sets, chosen at run time, and the operations that [`pulp`] lacks.

use pulp::{Scalar256b, Simd};

/// Columns are packed and masked in groups of this many, whatever the vector width.
pub const GROUP: usize = 16;

/// Vectors of 8 or 16 floats with comparisons that answer in bits.
pub trait Lanes: Simd {
    /// Bit l is set where lane l of `a` exceeds that of `b`.
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32;

    /// Transposes: `out[k][l] = rows[l][k]`.
    fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8];

    /// Writes the values whose mask bit is set to the front of `out`; the rest of `out` is unspecified.
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]);

    /// Bit l is set where value l of `a` exceeds that of `b`.
    #[inline(always)]
    fn above_group(self, a: &[f32; GROUP], b: &[f32; GROUP]) -> u16 {
        let (a, b) = (Self::as_simd_f32s(a).0, Self::as_simd_f32s(b).0);
        let mut mask = 0;
        for (part, (&a, &b)) in a.iter().zip(b).enumerate() {
            mask |= self.above(a, b) << (part * Self::F32_LANES);
        }
        mask as u16
    }

    /// Bit l is set where value l is not zero.
    #[inline(always)]
    fn other_than_zero(self, values: &[f32; GROUP]) -> u16 {
        let zero = [0.0; GROUP];
        self.above_group(values, &zero) | self.above_group(&zero, values)
    }

    /// Writes the columns of a group whose bit is set to the front of `columns`, which has room for the whole
    /// group.
    #[inline(always)]
    fn compress_columns(self, group: usize, mask: u16, columns: &mut [u32]) {
        let lanes: [u32; GROUP] = std::array::from_fn(|lane| (group * GROUP + lane) as u32);
        if let Some(target) = columns.first_chunk_mut() {
            self.compress(&lanes, mask, target);
        }
    }

    /// The reverse of [`compress`](Self::compress): the first values go where the mask's bits are set, 0
    /// elsewhere.
    fn expand(self, values: &[f32; GROUP], mask: u16) -> [f32; GROUP];
}

/// The first values of a group, filled up with zeros.
#[inline(always)]
pub fn padded<T: Copy + Default>(values: &[T]) -> [T; GROUP] {
    if let Some(whole) = values.first_chunk() {
        return *whole;
    }
    let mut group = [T::default(); GROUP];
    for (lane, value) in group.iter_mut().zip(values) {
        *lane = *value;
    }
    group
}

/// Compression without an instruction for it.
#[inline(always)]
fn compress_by_bit(values: &[u32; GROUP], mut mask: u16, out: &mut [u32; GROUP]) {
    let mut next = 0;
    while mask != 0 {
        out[next] = values[mask.trailing_zeros() as usize & (GROUP - 1)];
        next += 1;
        mask &= mask - 1;
    }
}

/// Expansion without an instruction for it.
#[inline(always)]
fn expand_by_bit(values: &[f32; GROUP], mut mask: u16) -> [f32; GROUP] {
    let mut out = [0.0; GROUP];
    for value in values {
        if mask == 0 {
            break;
        }
        out[mask.trailing_zeros() as usize & (GROUP - 1)] = *value;
        mask &= mask - 1;
    }
    out
}

impl Lanes for Scalar256b {
    #[inline(always)]
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32 {
        // PERF: the compiler vectorises the products for NEON, but not half of these comparisons.
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        if let Some(neon) = pulp::core_arch::aarch64::Neon::try_new() {
            return above_neon(neon, bytemuck::cast(a), bytemuck::cast(b));
        }
        let (a, b): ([f32; 8], [f32; 8]) = (bytemuck::cast(a), bytemuck::cast(b));
        (0..8).fold(0, |bits, lane| bits | u32::from(a[lane] > b[lane]) << lane)
    }

    #[inline(always)]
    fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        std::array::from_fn(|k| rows.map(|row| row[k]))
    }

    #[inline(always)]
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]) {
        compress_by_bit(values, mask, out);
    }

    #[inline(always)]
    fn expand(self, values: &[f32; GROUP], mask: u16) -> [f32; GROUP] {
        expand_by_bit(values, mask)
    }
}

/// One bit of a narrow vector for each lane, summed over the lanes.
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
#[inline(always)]
fn above_neon(
    neon: pulp::core_arch::aarch64::Neon,
    a: [std::arch::aarch64::float32x4_t; 2],
    b: [std::arch::aarch64::float32x4_t; 2],
) -> u32 {
    let above = |half: usize| neon.vmovn_u32(neon.vcgtq_f32(a[half], b[half]));
    let bits: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
    u32::from(neon.vaddvq_u16(neon.vandq_u16(neon.vcombine_u16(above(0), above(1)), bytemuck::cast(bits))))
}

/// Transposes by interleaving pairs of rows, then fours, then halves of a vector.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_avx(avx: pulp::core_arch::x86::Avx, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
    let r: [std::arch::x86_64::__m256; 8] = bytemuck::cast(rows);
    let low = |a, b| avx._mm256_unpacklo_ps(r[a], r[b]);
    let high = |a, b| avx._mm256_unpackhi_ps(r[a], r[b]);
    let pairs = [low(0, 1), high(0, 1), low(2, 3), high(2, 3), low(4, 5), high(4, 5), low(6, 7), high(6, 7)];
    let low = |a: usize| avx._mm256_shuffle_ps::<0x44>(pairs[a], pairs[a + 2]);
    let high = |a: usize| avx._mm256_shuffle_ps::<0xee>(pairs[a], pairs[a + 2]);
    let fours = [low(0), high(0), low(1), high(1), low(4), high(4), low(5), high(5)];
    let first = |k: usize| avx._mm256_permute2f128_ps::<0x20>(fours[k], fours[k + 4]);
    let second = |k: usize| avx._mm256_permute2f128_ps::<0x31>(fours[k], fours[k + 4]);
    bytemuck::cast([first(0), first(1), first(2), first(3), second(0), second(1), second(2), second(3)])
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V3 {
    #[inline(always)]
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32 {
        let mask: std::arch::x86_64::__m256 = bytemuck::cast(self.greater_than_f32s(a, b));
        self.avx._mm256_movemask_ps(mask) as u32
    }

    #[inline(always)]
    fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        transpose_avx(self.avx, rows)
    }

    #[inline(always)]
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]) {
        let halves = values.as_chunks::<8>().0;
        let packed = |half: usize, mask: u16| -> [u32; 8] {
            let order: u64 = bytemuck::cast(SET_BITS[usize::from(mask & 0xff)]);
            let order = self.avx2._mm256_cvtepu8_epi32(self.sse2._mm_set_epi64x(0, order as i64));
            let values = bytemuck::cast(halves[half]);
            bytemuck::cast(self.avx2._mm256_permutevar8x32_epi32(values, order))
        };
        out[..8].copy_from_slice(&packed(0, mask));
        let first = (mask & 0xff).count_ones() as usize;
        if let Some(rest) = out.get_mut(first..first + 8) {
            rest.copy_from_slice(&packed(1, mask >> 8));
        }
    }

    #[inline(always)]
    fn expand(self, values: &[f32; GROUP], mask: u16) -> [f32; GROUP] {
        // Each lane takes the value whose index is the number of set bits below the lane.
        let spread = |values: [f32; 8], mask: u16| -> [f32; 8] {
            let order: u64 = bytemuck::cast(BITS_BELOW[usize::from(mask & 0xff)]);
            let order = self.avx2._mm256_cvtepu8_epi32(self.sse2._mm_set_epi64x(0, order as i64));
            let values = self.avx2._mm256_permutevar8x32_ps(bytemuck::cast(values), order);
            let bits = self.avx._mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = self.avx2._mm256_and_si256(self.avx._mm256_set1_epi32(i32::from(mask)), bits);
            let set = self.avx2._mm256_cmpeq_epi32(set, bits);
            bytemuck::cast(self.avx._mm256_and_ps(values, self.avx._mm256_castsi256_ps(set)))
        };
        let first = (mask & 0xff).count_ones() as usize;
        let low = values.first_chunk().map_or([0.0; 8], |values| spread(*values, mask));
        let high = values.get(first..).and_then(|rest| rest.first_chunk());
        bytemuck::cast([low, high.map_or([0.0; 8], |values| spread(*values, mask >> 8))])
    }
}

/// For every byte, the positions of its set bits, lowest first.
#[cfg(target_arch = "x86_64")]
static SET_BITS: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut bit, mut next) = (0, 0);
        while bit < 8 {
            if mask >> bit & 1 == 1 {
                table[mask][next] = bit as u8;
                next += 1;
            }
            bit += 1;
        }
        mask += 1;
    }
    table
};

/// For every byte and each of its bits, the number of set bits below it.
#[cfg(target_arch = "x86_64")]
static BITS_BELOW: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut mask: usize = 0;
    while mask < 256 {
        let mut bit = 0;
        while bit < 8 {
            table[mask][bit] = (mask & ((1 << bit) - 1)).count_ones() as u8;
            bit += 1;
        }
        mask += 1;
    }
    table
};

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V4 {
    #[inline(always)]
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32 {
        u32::from(self.greater_than_f32s(a, b).0)
    }

    #[inline(always)]
    fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        transpose_avx(self.avx, rows)
    }

    #[inline(always)]
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]) {
        // In a register: the form that stores to memory is microcoded on some processors.
        *out = bytemuck::cast(self.avx512f._mm512_maskz_compress_epi32(mask, bytemuck::cast(*values)));
    }

    #[inline(always)]
    fn expand(self, values: &[f32; GROUP], mask: u16) -> [f32; GROUP] {
        bytemuck::cast(self.avx512f._mm512_maskz_expand_ps(mask, bytemuck::cast(*values)))
    }
}

/// Code that runs on any [`Lanes`].
pub trait Work {
    /// The result of [`run`](Self::run).
    type Output;

    /// Runs the work. This and all it calls must be `#[inline(always)]`, to use the instruction set.
    fn run<S: Lanes>(self, simd: S) -> Self::Output;
}

/// An instruction set this processor has.
#[derive(Debug, Clone, Copy)]
pub enum Level {
    /// Whatever the build's target guarantees.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    /// AVX-512 F, BW, CD, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
}

impl Level {
    /// All levels of this processor, for tests.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        [
            Some(Self::Portable),
            #[cfg(target_arch = "x86_64")]
            pulp::x86::V3::try_new().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            pulp::x86::V4::try_new().map(Self::Avx512),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// The best level of this processor. Asked once a tile: the standard library keeps what it has detected.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = pulp::x86::V4::try_new() {
                return Self::Avx512(simd);
            }
            if let Some(simd) = pulp::x86::V3::try_new() {
                return Self::Avx2(simd);
            }
        }
        Self::Portable
    }

    /// Runs `work` compiled for this instruction set.
    pub fn dispatch<W: Work>(self, work: W) -> W::Output {
        match self {
            Self::Portable => work.run(Scalar256b),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(Call { simd, work }),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(Call { simd, work }),
        }
    }
}

#[cfg(target_arch = "x86_64")]
struct Call<S, W> {
    simd: S,
    work: W,
}

#[cfg(target_arch = "x86_64")]
impl<S: Lanes, W: Work> pulp::NullaryFnOnce for Call<S, W> {
    type Output = W::Output;

    #[inline(always)]
    fn call(self) -> W::Output {
        self.work.run(self.simd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Compress<'a>(u16, &'a [u32; GROUP], &'a mut [u32; GROUP]);

    impl Work for Compress<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            simd.compress(self.1, self.0, self.2);
        }
    }

    struct Above<'a>(&'a [f32; GROUP], &'a [f32; GROUP]);

    impl Work for Above<'_> {
        type Output = u16;

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) -> u16 {
            simd.above_group(self.0, self.1)
        }
    }

    #[test]
    fn comparison_sets_the_bits_of_greater_lanes() {
        let zeros = [0.0; GROUP];
        for level in Level::available() {
            for mask in 0..=u16::MAX {
                // Neither equal values nor NaN are above.
                let others = [0.0, -0.0, -1.0, f32::NAN];
                let values =
                    std::array::from_fn(|lane| if mask >> lane & 1 == 1 { 1e-3 } else { others[lane % 4] });
                assert_eq!(level.dispatch(Above(&values, &zeros)), mask, "{level:?} {mask:#x}");
            }
        }
    }

    struct Expand<'a>(u16, &'a [f32; GROUP]);

    impl Work for Expand<'_> {
        type Output = [f32; GROUP];

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) -> [f32; GROUP] {
            simd.expand(self.1, self.0)
        }
    }

    #[test]
    fn expansion_spreads_the_first_values_over_every_choice_of_lanes() {
        let values: [f32; GROUP] = std::array::from_fn(|lane| 1.0 + lane as f32);
        for level in Level::available() {
            for mask in 0..=u16::MAX {
                let mut next = values.iter();
                let wanted: [f32; GROUP] = std::array::from_fn(|lane| {
                    if mask >> lane & 1 == 1 { *next.next().unwrap_or(&0.0) } else { 0.0 }
                });
                assert_eq!(level.dispatch(Expand(mask, &values)), wanted, "{level:?} {mask:#x}");
            }
        }
    }

    #[test]
    fn compression_brings_every_choice_of_lanes_to_the_front() {
        let values: [u32; GROUP] = std::array::from_fn(|lane| 100 + lane as u32);
        for level in Level::available() {
            for mask in 0..=u16::MAX {
                let mut out = [0; GROUP];
                level.dispatch(Compress(mask, &values, &mut out));
                let chosen = (0..GROUP).filter(|lane| mask >> lane & 1 == 1).map(|lane| values[lane]);
                assert!(chosen.zip(out).all(|(want, got)| want == got), "{level:?} {mask:#x}: {out:?}");
            }
        }
    }
}
