//! Training: from settings to a run folder with metrics, checkpoint and report.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | every setting, its default and range |
//! | `run/` | the run: data, steps, evaluations, files; stopped and gone on with |
//! | `device.rs` | where network and loss compute |
//! | `engine.rs` | one step, and embedding a split |
//! | `generator.rs` | lambda learned beside the steps |
//! | `schedule.rs` | the learning rate |
//! | `memory.rs` | cross-batch memory: earlier embeddings as further references |
//! | `records.rs` | what is written down of a step and an evaluation |
//! | `tensorboard.rs` | the same as event files |
//! | `checkpoint/` | weights, and all that a run goes on from, as safetensors |
//! | `report/` | report.html and the picture of neighbours |

pub mod checkpoint;
mod device;
mod engine;
mod generator;
mod memory;
mod records;
pub mod report;
mod run;
mod schedule;
mod settings;
mod tensorboard;

pub use engine::{Embedded, Engine, embed_batches};
pub use generator::Generator;
pub use memory::Memory;
pub use records::{EvaluationRecord, Record, StepRecord, read as read_records};
pub use run::{EVALUATION_CHUNK, Event, Outcome, Overrides, Phase, Summary, resume, train};
pub use schedule::Schedule;
pub use settings::{BatchNorm, TrainSettings};
