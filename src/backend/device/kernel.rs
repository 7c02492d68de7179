//! The kernels by name, and what a block of each is.

use super::Precision;
use super::params::{
    GRADIENT_EXTRA_BYTES, GRADIENT_HOPPER_EXACT_SHARED_BYTES, GRADIENT_HOPPER_SHARED_BYTES,
    GRADIENT_HOPPER_THREADS, GRADIENT_ROWS_16BIT, GRADIENT_ROWS_32BIT, GRADIENT_STAGES_BYTES,
    HOPPER_SHARED_BYTES, ORDER_MERGE_SHARED_BYTES, ORDER_SHARED_BYTES, ORDER_WIDE_SHARED_BYTES,
    ORDER_WIDE_THREADS, RETRIEVAL_HOPPER_EXACT_SHARED_BYTES, RETRIEVAL_HOPPER_SHARED_BYTES,
    RETRIEVAL_MERGE_EXTRA_BYTES, SAME_CLASS_HOPPER_SHARED_BYTES, SAME_CLASS_SHARED_BYTES,
    SELECT_STORED_SHARED_BYTES, SHARING_STAGES_BYTES, SIMILARITY_STAGES_BYTES, SUM_SHARED_BYTES,
    SWEEP_EXACT_SHARED_BYTES, SWEEP_HOPPER_EXACT_SHARED_BYTES, SWEEP_HOPPER_EXACT_THREADS,
    SWEEP_HOPPER_SHARED_BYTES, SWEEP_HOPPER_THREADS, SWEEP_SHARED_BYTES, THREADS, TILE, WEIGH_SHARED_BYTES,
};

/// A kernel, found by [`name`](Kernel::name) in the loaded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// order.cu: sorts the labels of one tile.
    OrderTiles,
    /// order.cu: sorts the labels of one larger tile.
    OrderTilesWide,
    /// order.cu: merges sorted runs.
    OrderMerge,
    /// prepare.cu: gathers rows in class order, checks norms, finds classes and each row's bound of
    /// duplicates.
    Prepare(Precision),
    /// The same on Hopper's warpgroup products.
    PrepareHopper(Precision),
    /// exchange.cu: the position of each of the caller's rows.
    InvertOrder,
    /// exchange.cu: the reference that is each anchor itself.
    Identity,
    /// exchange.cu: takes over row numbers from the caller.
    TakeNumbers,
    /// exchange.cu: writes out the anchors' numbers that a step found.
    ReportNumbers,
    /// same_class.cu: m+ of every anchor.
    SameClass(Precision),
    /// The same on Hopper's warpgroup products.
    SameClassHopper(Precision),
    /// sweep.cu: m-, the probe and the candidates, in one sweep.
    Sweep(Precision),
    /// sweep_hopper.cu: the same on Hopper's warpgroup products.
    SweepHopper(Precision),
    /// select.cu: final sets and sums of tiles whose candidates were stored.
    SelectStored,
    /// The same for tiles stored by Hopper's sweep.
    SelectStoredHopper,
    /// select.cu: the same for tiles whose candidates were not stored.
    SelectRecomputed(Precision),
    /// The same on Hopper's warpgroup products.
    SelectRecomputedHopper(Precision),
    /// weigh.cu: row weights, loss, results in original order, lists or tiles for each row tile's gradient.
    Weigh,
    /// gradient.cu: the gradient of one side.
    Gradient(Precision),
    /// gradient_hopper.cu: the same on Hopper's warpgroup products; gradient_hopper_f32.cu: f32 at its own
    /// precision.
    GradientHopper(Precision),
    /// normalize_backward.cu: the gradient of rows of any length from that of the unit rows.
    NormalizeBackward(Precision),
    /// threshold.cu: each block's sums of the threshold gradient.
    Threshold(Precision),
    /// The same where S was multiplied on Hopper's warpgroup products.
    ThresholdHopper(Precision),
    /// threshold.cu: adds the blocks' sums.
    ThresholdSum,
    /// retrieval.cu: lists of candidates for the k most similar references of each query.
    Retrieval(Precision),
    /// retrieval_hopper.cu: the same on Hopper's warpgroup products.
    RetrievalHopper(Precision),
    /// retrieval.cu: the k most similar references, from the lists.
    RetrievalMerge,
}

/// The name of a kernel that exists in every precision. Rounded rows are f16 once they are prepared.
macro_rules! precise {
    ($precision:expr, $pass:literal) => {
        match $precision {
            Precision::F32 => concat!($pass, "_f32"),
            Precision::RoundedF32 | Precision::F16 => concat!($pass, "_f16"),
            Precision::Bf16 => concat!($pass, "_bf16"),
        }
    };
}

impl Kernel {
    /// The symbol, `extern "C"` in the .cu file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::OrderTiles => "order_tiles",
            Self::OrderTilesWide => "order_tiles_wide",
            Self::OrderMerge => "order_merge",
            Self::Prepare(Precision::RoundedF32) => "prepare_rounded_f32",
            Self::PrepareHopper(Precision::RoundedF32) => "prepare_hopper_rounded_f32",
            Self::Prepare(precision) => precise!(precision, "prepare"),
            Self::PrepareHopper(precision) => precise!(precision, "prepare_hopper"),
            Self::InvertOrder => "invert_order",
            Self::Identity => "identity",
            Self::TakeNumbers => "take_numbers",
            Self::ReportNumbers => "report_numbers",
            Self::SameClassHopper(precision) => precise!(precision, "same_class_hopper"),
            Self::SameClass(precision) => precise!(precision, "same_class"),
            Self::Sweep(precision) => precise!(precision, "sweep"),
            Self::SweepHopper(precision) => precise!(precision, "sweep_hopper"),
            Self::SelectStored => "select_stored",
            Self::SelectStoredHopper => "select_stored_hopper",
            Self::SelectRecomputed(precision) => precise!(precision, "select_recomputed"),
            Self::SelectRecomputedHopper(precision) => precise!(precision, "select_recomputed_hopper"),
            Self::Weigh => "weigh",
            Self::Gradient(precision) => precise!(precision, "gradient"),
            Self::GradientHopper(precision) => precise!(precision, "gradient_hopper"),
            Self::NormalizeBackward(Precision::F32 | Precision::RoundedF32) => "normalize_backward_f32",
            Self::NormalizeBackward(Precision::F16) => "normalize_backward_f16",
            Self::NormalizeBackward(Precision::Bf16) => "normalize_backward_bf16",
            Self::Threshold(precision) => precise!(precision, "threshold"),
            Self::ThresholdHopper(precision) => precise!(precision, "threshold_hopper"),
            Self::ThresholdSum => "threshold_sum",
            Self::Retrieval(precision) => precise!(precision, "retrieval"),
            Self::RetrievalHopper(precision) => precise!(precision, "retrieval_hopper"),
            Self::RetrievalMerge => "retrieval_merge",
        }
    }

    /// The kernel that does the same work on Hopper: itself, unless Hopper has its own.
    pub(super) fn on_hopper(self) -> Self {
        match self {
            Self::Threshold(precision) => Self::ThresholdHopper(precision),
            Self::Prepare(precision) => Self::PrepareHopper(precision),
            Self::SameClass(precision) => Self::SameClassHopper(precision),
            Self::Sweep(precision) => Self::SweepHopper(precision),
            Self::SelectStored => Self::SelectStoredHopper,
            Self::SelectRecomputed(precision) => Self::SelectRecomputedHopper(precision),
            Self::Gradient(precision) => Self::GradientHopper(precision),
            Self::Retrieval(precision) => Self::RetrievalHopper(precision),
            other => other,
        }
    }

    /// Threads of a block.
    pub(super) fn threads(self) -> u32 {
        match self {
            Self::GradientHopper(_) => GRADIENT_HOPPER_THREADS,
            Self::SweepHopper(precision) | Self::RetrievalHopper(precision) => {
                precision.pick(SWEEP_HOPPER_THREADS, SWEEP_HOPPER_EXACT_THREADS)
            }
            Self::OrderTilesWide => ORDER_WIDE_THREADS,
            _ => THREADS,
        }
    }

    /// Rows of the gradient that a block computes when it multiplies tiles.
    pub(super) fn gradient_rows(self) -> u32 {
        match self {
            Self::Gradient(precision) | Self::Threshold(precision) | Self::ThresholdHopper(precision) => {
                precision.pick(GRADIENT_ROWS_16BIT, GRADIENT_ROWS_32BIT)
            }
            _ => TILE,
        }
    }

    /// Dynamic shared memory of a block; of [`Kernel::RetrievalMerge`] without the room for its keys.
    pub(super) fn shared_bytes(self) -> u32 {
        match self {
            Self::OrderTiles => ORDER_SHARED_BYTES,
            Self::OrderTilesWide => ORDER_WIDE_SHARED_BYTES,
            Self::OrderMerge => ORDER_MERGE_SHARED_BYTES,
            Self::Identity | Self::ReportNumbers | Self::InvertOrder | Self::TakeNumbers => 0,
            Self::Prepare(_) | Self::PrepareHopper(_) => SIMILARITY_STAGES_BYTES,
            Self::SameClass(_) => SAME_CLASS_SHARED_BYTES,
            Self::SameClassHopper(_) => SAME_CLASS_HOPPER_SHARED_BYTES,
            Self::Sweep(precision) => precision.pick(SWEEP_SHARED_BYTES, SWEEP_EXACT_SHARED_BYTES),
            Self::SweepHopper(precision) => {
                precision.pick(SWEEP_HOPPER_SHARED_BYTES, SWEEP_HOPPER_EXACT_SHARED_BYTES)
            }
            Self::SelectStored | Self::SelectStoredHopper => SELECT_STORED_SHARED_BYTES,
            Self::SelectRecomputed(_) => SIMILARITY_STAGES_BYTES,
            Self::SelectRecomputedHopper(_) => HOPPER_SHARED_BYTES,
            Self::Weigh => WEIGH_SHARED_BYTES,
            Self::Gradient(precision) | Self::Threshold(precision) | Self::ThresholdHopper(precision) => {
                let matrix = self.gradient_rows() * TILE * precision.pick(2, 4);
                GRADIENT_STAGES_BYTES + matrix + GRADIENT_EXTRA_BYTES
            }
            Self::GradientHopper(precision) => {
                precision.pick(GRADIENT_HOPPER_SHARED_BYTES, GRADIENT_HOPPER_EXACT_SHARED_BYTES)
            }
            Self::NormalizeBackward(_) => 0,
            Self::ThresholdSum => SUM_SHARED_BYTES,
            Self::Retrieval(precision) => precision.pick(SHARING_STAGES_BYTES, SIMILARITY_STAGES_BYTES),
            Self::RetrievalHopper(precision) => {
                precision.pick(RETRIEVAL_HOPPER_SHARED_BYTES, RETRIEVAL_HOPPER_EXACT_SHARED_BYTES)
            }
            Self::RetrievalMerge => RETRIEVAL_MERGE_EXTRA_BYTES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::params::SELECT_BLOCKS;
    use super::*;

    #[test]
    fn blocks_that_share_a_multiprocessor_fit_its_shared_memory() {
        // In KiB: sm_80 has 164 and sm_100 more, of which each block takes one for itself. Hopper has 228.
        let two = [Precision::F16, Precision::Bf16]
            .into_iter()
            .flat_map(|precision| [Kernel::Sweep(precision), Kernel::Retrieval(precision)])
            .map(|kernel| (kernel, 2, 164));
        for (kernel, blocks, kib) in two.chain([(Kernel::SelectStoredHopper, SELECT_BLOCKS, 228)]) {
            assert!(blocks * (kernel.shared_bytes() + 1024) <= kib * 1024, "{}", kernel.name());
        }
    }
}
