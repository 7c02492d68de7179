//! `kernels/params.h` as Rust structs, written by bindgen, layouts asserted.

#![expect(missing_docs, reason = "documented in kernels/params.h")]
#![allow(dead_code, reason = "some constants are of use to the kernels only")]

include!(concat!(env!("OUT_DIR"), "/params.rs"));

use std::mem::offset_of;

use super::Params;
use crate::loss::LossScalars as Written;

macro_rules! kernel_parameters {
    ($($name:ident),* $(,)?) => {
        $(
            // SAFETY: `#[repr(C)]`, laid out as the struct of the same name in params.h.
            unsafe impl Params for $name {}
        )*
    };
}

kernel_parameters!(
    OrderParams,
    MergeParams,
    PrepareParams,
    InvertParams,
    IdentityParams,
    TakeParams,
    ReportParams,
    PairsParams,
    WeighParams,
    GradientParams,
    NormalizeBackwardParams,
    ThresholdParams,
    ThresholdSumParams,
    RetrievalParams,
);

impl Counters {
    /// Reads the struct from the bytes that a kernel wrote.
    pub(super) fn from_words(words: &[u64; size_of::<Self>() / 8]) -> Self {
        // SAFETY: `words` has the size and alignment of `Self`, whose numbers may have any bits.
        unsafe { words.as_ptr().cast::<Self>().read() }
    }
}

/// The scalars that kernels write are [`crate::loss::LossScalars`]: the same types in the same places.
macro_rules! same_scalars {
    ($($field:ident),* $(,)?) => {
        const _: () = {
            assert!(size_of::<Written>() == size_of::<LossScalars>());
            $(assert!(offset_of!(Written, $field) == offset_of!(LossScalars, $field));)*
        };
        // Moving every field into the other struct fails to compile if one is missing or has another type.
        #[allow(dead_code, reason = "it is compiled, and that is the check")]
        fn written(LossScalars { $($field),* }: LossScalars) -> Written {
            Written { $($field),* }
        }
    };
}
same_scalars!(
    loss,
    dloss_dlambda_pos,
    dloss_dlambda_neg,
    mean_pos,
    mean_neg,
    gamma_pos,
    gamma_neg,
    probe_neg,
    total_pos,
    total_neg,
    active,
    bad_square_sum,
    bad_anchor,
    bad_reference,
    mined_pos,
    mined_neg,
);
