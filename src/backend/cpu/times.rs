//! The time of each pass, at the cost of six clock reads.

use std::time::{Duration, Instant};

/// Time of the passes of one loss, in their order; `bench/benches/passes.rs` reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PassTimes {
    /// Rows sorted by class, checked and packed.
    pub rows: Duration,
    /// The same-class pass: m+.
    pub same_class: Duration,
    /// The sweep: m-, probe count, candidates.
    pub sweep: Duration,
    /// Bounds and sizes of the mined sets.
    pub select: Duration,
    /// Weights, loss and gradient.
    pub gradient: Duration,
}

/// Time since the last lap.
pub(super) struct Stopwatch(Instant);

impl Stopwatch {
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}
