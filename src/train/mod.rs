//! Training: from settings to a run folder with metrics, checkpoint and report.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | every setting, its default and range |
//! | `run.rs` | the run: data, steps, evaluations, files |
//! | `engine.rs` | one step, and embedding a split |
//! | `test_set.rs` | the test classes: queries, gallery, what raw pixels find |
//! | `generator.rs` | lambda learned beside the steps |
//! | `schedule.rs` | the learning rate |
//! | `records.rs` | what is written down of a step and an evaluation |
//! | `checkpoint.rs` | weights as safetensors |
//! | `report/` | report.html and the picture of neighbours |

pub mod checkpoint;
mod engine;
mod generator;
mod records;
pub mod report;
mod run;
mod schedule;
mod settings;
mod test_set;

pub use engine::{Embedded, Engine};
pub use generator::Generator;
pub use records::{EvaluationRecord, Record, StepRecord, read as read_records};
pub use run::{Event, Summary, train};
pub use schedule::Schedule;
pub use settings::{BatchNorm, TrainSettings};
