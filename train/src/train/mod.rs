//! Training: from settings to a run folder with metrics, checkpoint and report.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | every setting, its default and range |
//! | `preset.rs` | named sets of settings |
//! | `run/` | the run: data, steps, evaluations, files, resuming |
//! | `device.rs` | where network and loss compute |
//! | `engine.rs` | one step, and embedding a split |
//! | `generator.rs` | the threshold generator, which learns lambda during training |
//! | `pair_loss.rs` | the loss, DDTAS's or one to compare with |
//! | `parts.rs` | the loss of a batch that several ranks share |
//! | `chunks.rs` | a large batch in chunks through the network, with one loss over the whole |
//! | `average.rs` | an exponential moving average of the weights |
//! | `optimizer.rs` | the optimizer, learning rates of head and backbone, weight decay |
//! | `schedule.rs` | the learning rate |
//! | `memory.rs` | cross-batch memory |
//! | `folder.rs` | the run folder |
//! | `records.rs` | metrics.jsonl: a record for each step and evaluation |
//! | `tensorboard.rs` | the same records as TensorBoard event files |
//! | `checkpoint/` | weights and the state of a run, as safetensors |
//! | `shown.rs` | which pictures and neighbours a report shows |
//! | `report/` | report.html and the picture of neighbours |

mod average;
pub mod checkpoint;
pub mod chunks;
pub(crate) mod device;
mod engine;
mod folder;
mod generator;
mod memory;
mod optimizer;
mod pair_loss;
mod parts;
mod preset;
mod records;
pub mod report;
mod run;
mod schedule;
mod settings;
mod shown;
mod tensorboard;

pub use engine::{Embedded, Engine, embed_batches, without_direction};
pub(crate) use folder::RunFolder;
pub use generator::Generator;
pub use memory::Memory;
pub use optimizer::{Decayed, OptimizerKind, OptimizerSettings};
pub use pair_loss::PairLoss;
pub use preset::Preset;
pub use records::{EvaluationRecord, Phase, Record, StepRecord, read as read_records};
pub(crate) use run::check_embedding;
pub use run::{EVALUATION_CHUNK, Event, Outcome, Overrides, Summary, resume, train};
pub use schedule::{Schedule, ScheduleKind};
pub use settings::{BatchNorm, TrainSettings};
pub use shown::{Shown, choose};
