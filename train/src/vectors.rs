//! Loops compiled for the widest vectors of this processor.

use pulp::{Simd, WithSimd};

/// Runs an operation with the widest vectors of this processor.
#[inline(always)]
pub(crate) fn dispatch<O: WithSimd>(operation: O) -> O::Output {
    #[cfg(test)]
    if let Some(width) = tests::width() {
        return tests::dispatch_narrower(width, operation);
    }
    pulp::Arch::new().dispatch(operation)
}

/// Runs plain loops with the instruction set of this processor. The results have the same bits with any.
///
/// PERF: the closure and what it calls must be `#[inline(always)]`; what is not inlined is compiled for the oldest processor.
/// A closure that is given to pulp itself is called by `FnOnce::call_once`, which the compiler does not always inline.
#[inline(always)]
pub(crate) fn vectorised<R>(run: impl FnMut() -> R) -> R {
    dispatch(Run(run))
}

struct Run<F>(F);

impl<R, F: FnMut() -> R> WithSimd for Run<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> R {
        (self.0)()
    }
}

/// Tests of narrower vectors than this processor's.
#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use pulp::WithSimd;

    /// Lanes of a vector; 0 for the widest.
    static WIDTH: AtomicUsize = AtomicUsize::new(0);

    pub(super) fn width() -> Option<usize> {
        Some(WIDTH.load(Ordering::Relaxed)).filter(|&width| width != 0)
    }

    pub(super) fn dispatch_narrower<O: WithSimd>(width: usize, operation: O) -> O::Output {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new().filter(|_| width == 8) {
            return pulp::Simd::vectorize(simd, operation);
        }
        operation.with_simd(pulp::Scalar)
    }

    /// What `run` returns with vectors of 1 and of 8 lanes. Meanwhile other unit tests may have narrow vectors, and the width may
    /// change within one of their operations: they cannot check what a layer computes.
    pub(crate) fn with_narrow_vectors<R>(run: impl Fn() -> R) -> [R; 2] {
        [1, 8].map(|width| {
            WIDTH.store(width, Ordering::Relaxed);
            let result = run();
            WIDTH.store(0, Ordering::Relaxed);
            result
        })
    }
}
