//! The method: what DDTAS computes, and the scalar float64 truth of every pass.
//!
//! Types first ([`Batch`], [`LossSettings`], [`LossOutput`]), then one file a
//! pass, each reading like its section of the specification:
//!
//! | pass | file | SPEC ([`method`](crate::method)) |
//! | --- | --- | --- |
//! | similarity | `similarity.rs` | 1: positives, negatives, m+, m- |
//! | select | `select.rs` | 2, 3: ASMS and AT-ASMS |
//! | gradient | `gradient.rs` | 4: soft contrastive loss |
//! | threshold | `threshold.rs` | 5: threshold gradient |
//!
//! [`reference()`] runs them in order. It stores every similarity and is meant
//! for tests and small batches; the [`backend`](crate::backend)s compute the
//! same numbers in fused passes.

mod batch;
mod double;
pub mod gradient;
pub mod logistic;
mod output;
mod part;
mod reference;
mod scalars;
pub mod select;
mod settings;
pub mod similarity;
mod tangent;
pub mod threshold;

#[cfg(feature = "kernels")]
pub(crate) use batch::check_total;
pub use batch::{Batch, ElementType, Embeddings, Identity, OwnedEmbeddings, Rows, UnitCheck};
pub(crate) use batch::{check_unit, has_entries, same_length};
pub(crate) use batch::{validate_dims, validate_identity, validate_rows};
pub use double::{DoubleBatch, DoubleRows};
pub use output::{LossOutput, ThresholdGradient};
pub use part::RowNumbers;
pub use reference::{Reference, reference, reference_threshold_gradient, reference_threshold_gradient_terms};
pub use scalars::LossScalars;
pub use select::PairTotals;
pub use settings::{LossSettings, Mining};
pub(crate) use tangent::{BatchSize, TangentOf};
