//! Training: from settings to a run folder with metrics, checkpoint and report.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | every setting, its default and range |
//! | `preset.rs` | settings by one name |
//! | `run/` | the run: data, steps, evaluations, files; stopped and gone on with |
//! | `device.rs` | where network and loss compute |
//! | `engine.rs` | one step, and embedding a split |
//! | `generator.rs` | lambda learned beside the steps |
//! | `parts.rs` | the loss of a batch that several ranks share |
//! | `chunks.rs` | a large batch in chunks through the network, its loss over the whole |
//! | `average.rs` | a running mean of the weights |
//! | `optimizer.rs` | how weights move: optimizer, rates of head and backbone, what decays |
//! | `schedule.rs` | the learning rate |
//! | `memory.rs` | cross-batch memory: earlier embeddings as further references |
//! | `records.rs` | what is written down of a step and an evaluation |
//! | `tensorboard.rs` | the same as event files |
//! | `checkpoint/` | weights, and all that a run goes on from, as safetensors |
//! | `shown.rs` | which pictures and neighbours a report shows |
//! | `report/` | report.html and the picture of neighbours |

mod average;
pub mod checkpoint;
pub mod chunks;
mod device;
mod engine;
mod generator;
mod memory;
mod optimizer;
mod parts;
mod preset;
mod records;
pub mod report;
mod run;
mod schedule;
mod settings;
mod shown;
mod tensorboard;

pub use engine::{Embedded, Engine, embed_batches};
pub use generator::Generator;
pub use memory::Memory;
pub use optimizer::{Decayed, OptimizerKind, OptimizerSettings};
pub use preset::Preset;
pub use records::{EvaluationRecord, Phase, Record, StepRecord, read as read_records};
pub use run::{EVALUATION_CHUNK, Event, Outcome, Overrides, Summary, resume, train};
pub use schedule::{Schedule, ScheduleKind};
pub use settings::{BatchNorm, TrainSettings};
pub use shown::{Shown, choose};
