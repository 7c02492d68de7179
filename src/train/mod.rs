//! Training: from settings to a run folder with metrics, checkpoint and report.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | every setting, its default and range |
//! | `run.rs` | the run: data, steps, evaluations, files |
//! | `device.rs` | where network and loss compute |
//! | `engine.rs` | one step, and embedding a split |
//! | `generator.rs` | lambda learned beside the steps |
//! | `schedule.rs` | the learning rate |
//! | `records.rs` | what is written down of a step and an evaluation |
//! | `checkpoint.rs` | weights as safetensors |
//! | `report/` | report.html and the picture of neighbours |

pub mod checkpoint;
mod device;
mod engine;
mod generator;
mod records;
pub mod report;
mod run;
mod schedule;
mod settings;

pub use engine::{Embedded, Engine};
pub use generator::Generator;
pub use records::{EvaluationRecord, Record, StepRecord, read as read_records};
pub use run::{Event, Summary, train};
pub use schedule::Schedule;
pub use settings::{BatchNorm, DatasetKind, TrainSettings};
