//! What is remembered of a loss between its steps and for the threshold gradient after it.

use std::mem::offset_of;

use super::layout::{LossLayout, SideRegions, pointer, unless_empty};
use super::params::{Counters, MinedSums, Pairs, Settings, Side};
use super::shape::{Shape, more_scale, sum_scale, tiles};
use super::workspace::Region;
use crate::backend::step::Step;
use crate::loss::select::{candidate_tolerance, initial_tolerances, probe_tolerance};
use crate::loss::{Batch, LossSettings, Mining};

/// The last loss, with the layout of its pairs.
pub(super) struct Remembered {
    pub(super) shape: Shape,
    pub(super) layout: LossLayout,
    pub(super) settings: Settings,
    pub(super) host_settings: LossSettings,
    /// The last step of a part's loss; `None` for a whole loss.
    pub(super) step: Option<Step>,
    /// Labels of both sides, if the host has them; later calls on this loss must have the same.
    pub(super) labels: Option<[Vec<i64>; 2]>,
}

/// Labels of both sides; those of missing references are empty.
fn labels_of<'a>(batch: &Batch<'a>) -> [&'a [i64]; 2] {
    [batch.anchors.labels, batch.references.map_or(&[], |rows| rows.labels)]
}

const _: () = assert!(offset_of!(Counters, probe_neg) == 0 && offset_of!(Counters, total_pos) == 8);

impl Remembered {
    /// Copies the labels of `batch`, into the memory of the labels of `before`.
    pub(super) fn keep_labels(before: Option<Self>, batch: &Batch<'_>) -> Option<[Vec<i64>; 2]> {
        let mut labels = before.and_then(|last| last.labels).unwrap_or_default();
        for (kept, given) in labels.iter_mut().zip(labels_of(batch)) {
            kept.clear();
            kept.extend_from_slice(given);
        }
        Some(labels)
    }

    /// Whether the labels are those of `batch`; also true if the host does not know them.
    pub(super) fn has_labels_of(&self, batch: &Batch<'_>) -> bool {
        self.labels.as_ref().is_none_or(|labels| *labels == labels_of(batch))
    }

    /// The parameter that all passes share, for a workspace at `base`.
    pub(super) fn pairs(&self, base: u64) -> Pairs {
        let (shape, layout) = (&self.shape, &self.layout);
        let side = |regions: &SideRegions, count: usize| Side {
            rows: pointer(base, regions.rows),
            order: pointer(base, regions.order),
            duplicate: pointer(base, regions.duplicate),
            count: count as u32,
            tiles: tiles(count) as u32,
        };
        Pairs {
            anchors: side(&layout.anchors, shape.anchors),
            references: side(&layout.references, shape.reference_count()),
            total: shape.total as u32,
            band: shape.band() as u32,
            square: u32::from(shape.references.is_none()),
            stride: shape.stride() as u32,
            dim: shape.dim as u32,
            pool: layout.pool as u32,
            tiles: shape.tiles() as u64,
            classes: pointer(base, layout.classes),
            same: pointer(base, layout.same),
            max_neg: pointer(base, layout.max_neg),
            counters: pointer(base, layout.counters),
            positives: mined_sums(base, layout.sums, shape.anchors, 0),
            negatives: mined_sums(base, layout.sums, shape.anchors, 1),
            weights: pointer(base, layout.weights),
            identity: unless_empty::<u32>(base, layout.identity),
            columns: unless_empty(base, layout.columns),
            column_weights: match shape.references {
                None => pointer(base, layout.weights),
                Some(_) => unless_empty(base, layout.column_weights),
            },
            // A whole loss adapts to the totals that its own sweep counts.
            totals: match self.step {
                None => pointer::<u64>(base, layout.counters),
                Some(_) => pointer(base, layout.totals),
            },
            tile_counts: pointer(base, layout.tile_counts),
            tile_segments: pointer(base, layout.tile_segments),
            pool_values: pointer(base, layout.pool_values),
            pool_words: pointer(base, layout.pool_words),
            settings: self.settings,
        }
    }
}

/// Addresses of the lists of positives (`kind` 0) or negatives (1) in `sums`.
fn mined_sums(base: u64, sums: Region, rows: usize, kind: usize) -> MinedSums {
    let first = pointer::<i64>(base, sums);
    MinedSums {
        softplus: first.wrapping_add(2 * kind * rows),
        sigmoid: first.wrapping_add((2 * kind + 1) * rows),
        count: first.wrapping_add(4 * rows).cast::<u32>().wrapping_add(kind * rows),
    }
}

pub(super) fn device_settings(settings: &LossSettings, shape: &Shape) -> Settings {
    let tolerances = initial_tolerances(settings);
    Settings {
        gamma_pos: tolerances.pos,
        gamma_neg: tolerances.neg,
        probe: probe_tolerance(settings),
        candidate: candidate_tolerance(settings),
        tolerance: settings.tolerance,
        alpha: settings.alpha,
        beta: settings.beta,
        lambda_pos: settings.lambda_pos,
        lambda_neg: settings.lambda_neg,
        lambda: 0,
        sum_scale: sum_scale(settings, shape.reference_count()),
        more_scale: more_scale(settings, shape.reference_count()),
        adaptive: u32::from(settings.mining == Mining::AtAsms),
        reserved: 0,
    }
}
