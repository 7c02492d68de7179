//! The kernels by name.

use super::Precision;

/// A kernel of kernels/*.cu, found by [`name`](Kernel::name) in the loaded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// order.cu: sorts the labels of one tile.
    OrderTiles,
    /// The same of larger tiles.
    OrderTilesWide,
    /// order.cu: merges what is sorted.
    OrderMerge,
    /// prepare.cu: rows into class order, norms checked, classes, and what a positive of each row must stay below.
    Prepare(Precision),
    /// The same on Hopper's warpgroup products.
    PrepareHopper(Precision),
    /// steps.cu: the position of each of the caller's rows.
    InvertOrder,
    /// steps.cu: which reference is each anchor itself.
    Identity,
    /// steps.cu: numbers of rows from outside.
    TakeNumbers,
    /// steps.cu: numbers of anchors that a step found.
    ReportNumbers,
    /// similarity.cu: m+ of every anchor.
    SameClass(Precision),
    /// The same on Hopper's warpgroup products.
    SameClassHopper(Precision),
    /// similarity.cu: m-, the probe and the candidates, in one sweep.
    Sweep(Precision),
    /// sweep_hopper.cu: the same on Hopper's warpgroup products.
    SweepHopper(Precision),
    /// select.cu: final sets and sums of tiles whose candidates were stored.
    SelectStored,
    /// The same of tiles that Hopper's sweep has left.
    SelectStoredHopper,
    /// select.cu: the same of tiles whose candidates were not.
    SelectRecomputed(Precision),
    /// The same on Hopper's warpgroup products.
    SelectRecomputedHopper(Precision),
    /// select.cu: row weights, loss, results in original order, lists or tiles for each row tile's gradient.
    Weigh,
    /// gradient.cu: the gradient of one side.
    Gradient(Precision),
    /// gradient_hopper.cu: the same on Hopper's warpgroup products; gradient_hopper_split.cu of f32 to its own precision.
    GradientHopper(Precision),
    /// unit.cu: the gradient of rows of any length from that of the unit rows.
    LeadBack(Precision),
    /// threshold.cu: the hyper-gradient's sums of each block.
    Threshold(Precision),
    /// The same where S was multiplied on Hopper's warpgroup products.
    ThresholdHopper(Precision),
    /// threshold.cu: their sum.
    ThresholdSum,
    /// retrieval.cu: lists of what may be among the k most similar references of each query.
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
            Self::LeadBack(Precision::F32 | Precision::RoundedF32) => "lead_back_f32",
            Self::LeadBack(Precision::F16) => "lead_back_f16",
            Self::LeadBack(Precision::Bf16) => "lead_back_bf16",
            Self::Threshold(precision) => precise!(precision, "threshold"),
            Self::ThresholdHopper(precision) => precise!(precision, "threshold_hopper"),
            Self::ThresholdSum => "threshold_sum",
            Self::Retrieval(precision) => precise!(precision, "retrieval"),
            Self::RetrievalHopper(precision) => precise!(precision, "retrieval_hopper"),
            Self::RetrievalMerge => "retrieval_merge",
        }
    }
}
