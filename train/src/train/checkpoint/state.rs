//! What a checkpoint keeps of a run beside tensors: as TOML, whose floats come back as the same bits.
//!
//! Every random draw comes from (seed, purpose, step, position), so that the
//! number of steps is all there is to the position of sampler, augmentation and loader.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::generator::{Lambda, Thresholds};
use crate::train::report::{Extent, Shown};
use crate::train::run::Phase;
use crate::train::settings::TrainSettings;
use ddtas::retrieval::Recall;

/// A run between two steps.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(in crate::train) struct RunState {
    /// Steps done, of the rehearsal or of the run itself.
    pub step: usize,
    /// The rehearsal, if there is one, is over.
    #[serde(default)]
    pub rehearsed: bool,
    /// Classes and pictures that train and test: the run can only go on with the same.
    pub extents: Option<[Extent; 2]>,
    /// Steps that were done at the last evaluation.
    pub evaluated: Option<usize>,
    /// The last step, its evaluation and the report are done.
    pub finished: bool,
    /// Length of metrics.jsonl at this point.
    pub metrics_bytes: u64,
    /// Steps in which nothing was mined and the weights stayed.
    pub steps_without_pairs: usize,
    /// Times that another picture stood in for an unreadable one.
    pub replaced: usize,
    /// Unreadable pictures of the test split and the gallery.
    pub skipped: usize,
    /// Files that could not be read, and were named in a warning.
    pub unread: Unread,
    /// Recall by raw pixels.
    pub pixels: Option<Recall>,
    /// Recall before training.
    pub before: Option<Recall>,
    /// Recall as last evaluated.
    pub after: Option<Recall>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Optimizer, thresholds and generator; the tensors lie beside.
    pub engine: Option<EngineState>,
}

impl RunState {
    /// Which part of the run the next step belongs to.
    pub fn phase(&self, settings: &TrainSettings) -> Phase {
        if self.rehearsed || settings.generator.rehearsal_steps() == 0 {
            Phase::Training
        } else {
            Phase::Rehearsal
        }
    }
}

/// Unreadable pictures by their index in the split.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(in crate::train) struct Unread {
    /// Training pictures.
    pub train: BTreeSet<usize>,
    /// Test pictures.
    pub test: BTreeSet<usize>,
    /// Pictures of the gallery, where the set has one.
    pub gallery: BTreeSet<usize>,
}

/// The best evaluation so far, whose weights are in best.safetensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::train) struct Best {
    /// Steps trained.
    pub step: usize,
    /// Its recall.
    pub recall: Recall,
    /// The neighbours that the report shows.
    pub shown: Vec<Shown>,
}

/// What a step depends on beside weights, moments and memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::train) struct EngineState {
    /// Loss thresholds in force.
    pub lambda: Lambda,
    /// Loss thresholds learned, in force from the next step on.
    pub pending: Option<Lambda>,
    /// The threshold generator.
    pub generator: Option<GeneratorState>,
}

/// The threshold generator's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::train) struct GeneratorState {
    /// Its members.
    pub thresholds: Thresholds,
    /// dL^m/dlambda as last found.
    pub hypergradient: Option<Lambda>,
    /// Batches whose features lie beside.
    pub recent: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_survive_as_the_same_bits() {
        // Numbers that a reader who rounds twice gets wrong in the last place.
        let values = [0.1 + 0.2, 1.0 / 3.0, 5e-324, 2.0f64.powi(-1000) / 3.0, 0.700_000_000_000_000_1];
        for value in values {
            let lambda = Lambda { pos: value, neg: -value };
            let recall = Recall { at: vec![(1, value), (10, 1.0)], queries: 3, without_match: 0 };
            let shown = vec![Shown { picture: 4, answers: vec![(7, 0.1f32), (9, value as f32)] }];
            let state = RunState {
                step: 17,
                unread: Unread { train: [3, 1].into(), ..Unread::default() },
                pixels: Some(recall.clone()),
                best: Some(Best { step: 12, recall, shown }),
                engine: Some(EngineState { lambda, pending: Some(lambda), generator: None }),
                ..RunState::default()
            };
            let text = toml::to_string(&state).unwrap();
            assert_eq!(toml::from_str::<RunState>(&text).unwrap(), state, "{text}");
        }
    }
}
