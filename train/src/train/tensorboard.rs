//! Event files for TensorBoard: every number of metrics.jsonl as a scalar.
//!
//! The format is a sequence of records (length, its checksum, a message, its checksum) of three small
//! protobuf messages: Event, Summary and Summary.Value (tensorflow/core/util/event.proto,
//! tensorflow/core/framework/summary.proto). A resumed run begins another file; its first event tells
//! TensorBoard to drop later steps of the previous files.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::records::{Phase, Record};
use crate::{Error, Result};

/// Prefix of every event file's name. TensorBoard reads the files in the order of the number after it.
const PREFIX: &str = "events.out.tfevents.";

/// Writes one event file, each event in one write.
pub struct EventWriter {
    file: File,
    path: PathBuf,
    /// Number of steps of the rehearsal; they have the numbers before 0.
    rehearsal: usize,
}

impl EventWriter {
    /// Creates an event file in `folder`, for a run with `rehearsal` steps of rehearsal. `resumed` is the
    /// first step of a resumed run.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io).
    pub fn create(folder: &Path, rehearsal: usize, resumed: Option<(Phase, usize)>) -> Result<Self> {
        let now = seconds() as u64;
        // Different from those of earlier files, even if a run is killed and resumed within a second.
        let number = last_number(folder)?.map_or(now, |last| now.max(last + 1));
        let path = folder.join(format!("{PREFIX}{number:010}.ddtas.{}", std::process::id()));
        let file = File::create_new(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { file, path, rehearsal };
        let mut version = Message::default();
        version.text(field::event::FILE_VERSION, "brain.Event:2");
        writer.event(0, &version)?;
        if let Some((phase, step)) = resumed {
            let step = writer.position(phase, step);
            let mut start = Message::default();
            start.integer(field::session_log::STATUS, field::session_log::START);
            let mut event = Message::default();
            event.message(field::event::SESSION_LOG, &start);
            writer.event(step, &event)?;
        }
        Ok(writer)
    }

    /// Appends the numbers of a record as scalars, such as `rehearsal/loss`, `train/loss`, `test/recall@1`.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io), for example if the disk is full.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let (step, group, value) = match record {
            Record::Rehearsal(step) => {
                (self.position(Phase::Rehearsal, step.step), "rehearsal", serde_json::to_value(step))
            }
            Record::Step(step) => {
                (self.position(Phase::Training, step.step), "train", serde_json::to_value(step))
            }
            Record::Evaluation(evaluation) => {
                (self.position(Phase::Training, evaluation.step), "test", serde_json::to_value(evaluation))
            }
        };
        let value = value.map_err(|error| Error::format(&self.path, error.to_string()))?;
        let mut figures = Vec::new();
        scalars(group, &value, &mut figures);
        let step_tag = format!("{group}/step");
        let mut summary = Message::default();
        for (tag, figure) in figures.into_iter().filter(|(tag, _)| *tag != step_tag) {
            let mut value = Message::default();
            value.text(field::value::TAG, &tag);
            value.float(field::value::SIMPLE_VALUE, figure as f32);
            summary.message(field::summary::VALUE, &value);
        }
        let mut event = Message::default();
        event.message(field::event::SUMMARY, &summary);
        self.event(step, &event)
    }

    /// TensorBoard's number of a step: negative in the rehearsal, so that its events precede those of the run.
    fn position(&self, phase: Phase, step: usize) -> i64 {
        match phase {
            Phase::Rehearsal => step as i64 - self.rehearsal as i64,
            Phase::Training => step as i64,
        }
    }

    fn event(&mut self, step: i64, rest: &Message) -> Result<()> {
        let mut event = Message::default();
        event.double(field::event::WALL_TIME, seconds());
        // int64: negative numbers as two's complement.
        event.integer(field::event::STEP, step as u64);
        event.0.extend_from_slice(&rest.0);
        self.file.write_all(&framed(&event.0)).map_err(Error::io("write", &self.path))
    }
}

/// Collects every number in `value` with its path; a list of pairs (K, number) as `name@K`.
fn scalars(path: &str, value: &Value, found: &mut Vec<(String, f64)>) {
    match value {
        Value::Number(number) => found.extend(number.as_f64().map(|figure| (path.to_owned(), figure))),
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| scalars(&format!("{path}/{name}"), value, found));
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                match item.as_array().map(Vec::as_slice) {
                    Some([k, figure]) if k.is_u64() => scalars(&format!("{path}@{k}"), figure, found),
                    _ => scalars(&format!("{path}/{index}"), item, found),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// The highest number among the event files of a folder.
fn last_number(folder: &Path) -> Result<Option<u64>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let number = |name: &str| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok();
    Ok(entries.flatten().filter_map(|entry| number(entry.file_name().to_str()?)).max())
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A record: length, its checksum, the message, its checksum.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend_from_slice(&masked_checksum(&length).to_le_bytes());
    record.extend_from_slice(message);
    record.extend_from_slice(&masked_checksum(message).to_le_bytes());
    record
}

/// CRC-32C, rotated and offset, as the format requires, since checksums of data that contain CRCs are weak.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Field numbers of the messages.
mod field {
    pub mod event {
        pub const WALL_TIME: u32 = 1;
        pub const STEP: u32 = 2;
        pub const FILE_VERSION: u32 = 3;
        pub const SUMMARY: u32 = 5;
        pub const SESSION_LOG: u32 = 7;
    }
    pub mod session_log {
        pub const STATUS: u32 = 1;
        /// The status that announces new events from this step on.
        pub const START: u64 = 1;
    }
    pub mod summary {
        pub const VALUE: u32 = 1;
    }
    pub mod value {
        pub const TAG: u32 = 1;
        pub const SIMPLE_VALUE: u32 = 2;
    }
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn integer(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn text(&mut self, field: u32, text: &str) {
        self.bytes(field, text.as_bytes());
    }

    fn message(&mut self, field: u32, message: &Self) {
        self.bytes(field, &message.0);
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.key(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}
