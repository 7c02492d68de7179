//! Metrics of retrieval on unseen classes (SPEC 6).
//!
//! | file | what |
//! | --- | --- |
//! | `recall.rs` | Recall@K, of rows in host memory and of rows that only a callback can search |
//! | `evaluate.rs` | Recall@K, R-precision and MAP@R, queries searched in blocks |
//! | `rows.rs` | the rows that take part in a search |
//! | `k_means.rs` | k-means of unit rows |
//! | `mutual_information.rs` | how far clusters agree with classes: NMI |
//!
//! A search goes through [`Backend::nearest`](crate::backend::Backend::nearest) and never holds a Q x N
//! matrix. Queries are searched among themselves, each left out of its own list, or in a gallery of their
//! own.

mod evaluate;
mod k_means;
mod mutual_information;
mod recall;
mod rows;

pub use evaluate::{Metrics, QueryMetrics, SearchTask, evaluate, evaluate_queries};
pub use k_means::{Clusters, KMeansSettings, k_means};
pub use mutual_information::{NMI_STEPS, classes, nmi, normalized_mutual_information};
pub use recall::{Recall, recall, recall_by};
