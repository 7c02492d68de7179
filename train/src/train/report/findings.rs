//! Contents of a report, from the files of a run folder.

use std::path::Path;

use ddtas_io::files;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::strip::Query;
use crate::data::{Extent, file_name};
use crate::pages::encode;
use crate::train::RunFolder;
use crate::train::records::{self, EvaluationRecord, Record, StepRecord};
use crate::{Error, Result};

/// Contents of report.json, written at the end of a run: what metrics.jsonl and config.toml lack for a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Name of the data set.
    pub dataset: String,
    /// Classes and pictures of the training split.
    pub train: Extent,
    /// Classes and pictures of the test split.
    pub test: Extent,
    /// Whether test classes are also training classes.
    #[serde(default)]
    pub seen: bool,
    /// Recall for comparison, of raw pixels and of other runs.
    pub baselines: Vec<Baseline>,
    /// Seconds of training, without evaluations.
    pub training_seconds: f64,
    /// Test pictures and their nearest neighbours by the best network.
    pub queries: Vec<Query>,
}

/// Recall@K for comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Name in the table, such as `raw pixels`.
    pub name: String,
    /// K and Recall@K, ascending in K, in 0 to 1.
    pub recall: Vec<(usize, f64)>,
}

impl Findings {
    /// Writes report.json, and neighbours.png if there are queries: `sheet`.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io), for example if the disk is full.
    pub fn save(&self, folder: &Path, sheet: &RgbImage) -> Result<()> {
        let path = folder.join("report.json");
        let text = serde_json::to_vec(self).map_err(|error| Error::format(&path, error.to_string()))?;
        files::write_atomic(&path, &text)?;
        if !self.queries.is_empty() {
            let path = folder.join("neighbours.png");
            let png = encode(sheet).map_err(|reason| Error::format(&path, reason))?;
            files::write_atomic(&path, &png)?;
        }
        Ok(())
    }

    /// Reads report.json.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io); [`Format`](ddtas_io::Error::Format) if it is something else.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("report.json");
        let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|error| Error::format(&path, error.to_string()))
    }
}

/// All data of a report.
pub(super) struct Report {
    pub name: String,
    pub settings: toml::Table,
    pub rehearsal: Vec<StepRecord>,
    pub steps: Vec<StepRecord>,
    pub evaluations: Vec<EvaluationRecord>,
    pub findings: Findings,
}

impl Report {
    /// Whether the run started from a file, given by `setting`: `init` or `weights`.
    pub fn begins_with(&self, setting: &str) -> bool {
        self.settings.contains_key(setting)
    }

    /// Reads the files of a run folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let files = RunFolder::at(folder);
        let config = files.config();
        let text = std::fs::read_to_string(&config).map_err(Error::io("read", &config))?;
        let settings =
            text.parse().map_err(|error: toml::de::Error| Error::format(&config, error.message()))?;
        let (mut rehearsal, mut steps, mut evaluations) = (Vec::new(), Vec::new(), Vec::new());
        for record in records::read(&files.metrics())? {
            match record {
                Record::Rehearsal(step) => rehearsal.push(step),
                Record::Step(step) => steps.push(step),
                Record::Evaluation(evaluation) => evaluations.push(evaluation),
            }
        }
        let folder_name = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
        let name = file_name(&folder_name);
        Ok(Self { name, settings, rehearsal, steps, evaluations, findings: Findings::read(folder)? })
    }
}
