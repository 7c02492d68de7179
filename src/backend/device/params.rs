//! `kernels/params.h` as Rust structs, written by bindgen, layouts asserted.

#![expect(missing_docs, reason = "documented in kernels/params.h")]
#![allow(dead_code, reason = "some constants are of use to the kernels only")]

include!(concat!(env!("OUT_DIR"), "/params.rs"));

use super::Params;

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
    LeadBackParams,
    ThresholdParams,
    ThresholdSumParams,
    RetrievalParams,
);

macro_rules! read_from_words {
    ($($name:ident),* $(,)?) => {
        $(
            impl $name {
                /// Reads the struct from the bytes that a kernel wrote.
                pub(super) fn from_words(words: &[u64; size_of::<Self>() / 8]) -> Self {
                    // SAFETY: as many bytes, as aligned, and every bit pattern is a value of its numbers.
                    unsafe { words.as_ptr().cast::<Self>().read() }
                }
            }
        )*
    };
}

read_from_words!(Counters, LossScalars, RowSums);
