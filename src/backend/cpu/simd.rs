//! Instruction sets, chosen at run time, and what [`pulp`] lacks of them.

use pulp::{Scalar256b, Simd};

/// Columns are packed and masked in groups of this many, whatever the vector width.
pub const GROUP: usize = 16;

/// Vectors of 8 or 16 floats with comparisons that answer in bits.
pub trait Lanes: Simd {
    /// Bit l is set where lane l of `a` exceeds that of `b`.
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32;

    /// Writes the values whose mask bit is set to the front of `out`; what lies behind them is unspecified.
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]);
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

impl Lanes for Scalar256b {
    #[inline(always)]
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32 {
        let (a, b): ([f32; 8], [f32; 8]) = (bytemuck::cast(a), bytemuck::cast(b));
        (0..8).fold(0, |bits, lane| bits | u32::from(a[lane] > b[lane]) << lane)
    }

    #[inline(always)]
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]) {
        compress_by_bit(values, mask, out);
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V3 {
    #[inline(always)]
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32 {
        let mask: std::arch::x86_64::__m256 = bytemuck::cast(self.greater_than_f32s(a, b));
        self.avx._mm256_movemask_ps(mask) as u32
    }

    #[inline(always)]
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]) {
        compress_by_bit(values, mask, out);
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V4 {
    #[inline(always)]
    fn above(self, a: Self::f32s, b: Self::f32s) -> u32 {
        u32::from(self.greater_than_f32s(a, b).0)
    }

    #[inline(always)]
    fn compress(self, values: &[u32; GROUP], mask: u16, out: &mut [u32; GROUP]) {
        // In a register: the form that stores to memory is microcoded on some processors.
        *out = bytemuck::cast(self.avx512f._mm512_maskz_compress_epi32(mask, bytemuck::cast(*values)));
    }
}

/// Code that runs on any [`Lanes`].
pub trait Work {
    /// What it returns.
    type Output;

    /// Runs it. Must be `#[inline(always)]`, as everything it calls, to be compiled for the instruction set.
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
    /// All this processor has, the best last.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(pulp::x86::V3::try_new().map(Self::Avx2));
            levels.extend(pulp::x86::V4::try_new().map(Self::Avx512));
        }
        levels
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
