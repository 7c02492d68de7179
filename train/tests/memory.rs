//! Cross-batch memory: the loss of a batch against itself and earlier embeddings.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, LossOutput, LossSettings, Mining, Rows, reference, reference_threshold_gradient};
use ddtas_cases::is_clear;
use ddtas_cases::random::{Draw, SLACK, draw, tangent};
use ddtas_train::train::Memory;
use ddtas_train::train::PairLoss;
use ndarray::{Array2, array, concatenate, s};
use runs::{records, small_run};

const OURS: PairLoss = PairLoss::SoftContrastive;

fn how(rows: usize, dim: usize) -> Draw {
    Draw { rows, dim, classes: 9, noise: 1.6, ignored: 11, duplicates: 0 }
}

fn filled(rows: &Array2<f32>, labels: &[i64]) -> Memory {
    let mut memory = Memory::new(labels.len(), 0, rows.ncols());
    memory.push(0, rows.view(), labels);
    memory
}

fn loss(memory: &Memory, rows: &Array2<f32>, labels: &[i64], settings: &LossSettings) -> LossOutput {
    let mut output = LossOutput::default();
    memory.loss(&mut CpuBackend::new(), OURS, (rows.view(), labels), settings, &mut output).unwrap();
    output
}

#[test]
fn loss_gradient_and_threshold_gradient_are_those_of_the_scalar_reference() {
    for mining in [Mining::None, Mining::Asms, Mining::AtAsms] {
        let settings = LossSettings { mining, ..LossSettings::default() };
        // A draw with a pair too near a threshold is replaced by the next.
        let compared = (0..40).find_map(|seed| {
            let (rows, labels) = draw(how(61, 34), seed);
            let (old, old_labels) = draw(how(130, 34), seed + 100);
            let all = concatenate![ndarray::Axis(0), rows, old];
            let all_labels = [labels.clone(), old_labels.clone()].concat();
            let references = Rows::new(all.view(), &all_labels);
            let batch = Batch::rectangular(Rows::new(rows.view(), &labels), references);
            let truth = reference(&batch.with_reference_gradient(), &settings).unwrap();
            if !is_clear(&truth, &settings, SLACK) {
                return None;
            }
            let memory = filled(&old, &old_labels);
            let output = loss(&memory, &rows, &labels, &settings);
            assert!((output.loss - truth.weighted.loss).abs() < 1e-5 * truth.weighted.loss, "{mining:?}");
            assert_eq!(output.active, truth.active());
            // The batch's rows are both anchors and references; the memory's rows are constant.
            let back = truth.reference_gradient.as_ref().unwrap();
            let wanted = &truth.gradient + &back.slice(s![..61, ..]);
            let largest = wanted.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            for ((at, got), wanted) in output.gradient.indexed_iter().zip(&wanted) {
                assert!(
                    (f64::from(*got) - wanted).abs() < 1e-5 * largest,
                    "{mining:?} {at:?}: {got} {wanted}"
                );
            }

            let edot = tangent(61, 34, seed);
            let mut backend = CpuBackend::new();
            let mut output = LossOutput::default();
            memory.loss(&mut backend, OURS, (rows.view(), &labels), &settings, &mut output).unwrap();
            let got = memory.threshold_gradient(&mut backend, (rows.view(), &labels), edot.view()).unwrap();
            let edot = edot.mapv(f64::from);
            let moving = concatenate![ndarray::Axis(0), edot, Array2::zeros((130, 34))];
            let wanted = reference_threshold_gradient(&batch, &settings, &edot, Some(&moving)).unwrap();
            for (got, wanted) in [(got.pos, wanted.pos), (got.neg, wanted.neg)] {
                assert!((got - wanted).abs() < 1e-4 * (1.0 + wanted.abs()), "{mining:?}: {got} {wanted}");
            }
            Some(())
        });
        assert!(compared.is_some(), "{mining:?}: no draw clear of the thresholds");
    }
}

#[test]
fn gradient_is_the_slope_of_the_loss_when_a_row_moves_on_both_sides() {
    let settings = LossSettings { mining: Mining::None, alpha: 4.0, ..LossSettings::default() };
    let on_circle = |angles: &[f64]| {
        Array2::from_shape_fn((angles.len(), 2), |(i, d)| {
            (if d == 0 { angles[i].cos() } else { angles[i].sin() }) as f32
        })
    };
    let (angles, labels) = ([0.0, 0.7, 0.3, 1.1, 1.4], [0, 0, 1, 1, 2]);
    let memory = filled(&on_circle(&[0.2, 1.3, 0.9, 0.5]), &[0, 1, 2, 2]);
    let output = loss(&memory, &on_circle(&angles), &labels, &settings);
    for row in 0..angles.len() {
        // Large enough to dwarf the rounding of the rows to single precision.
        let step = 1e-2;
        let moved = |by: f64| {
            let mut angles = angles;
            angles[row] += by;
            loss(&memory, &on_circle(&angles), &labels, &settings).loss
        };
        let wanted = (moved(step) - moved(-step)) / (2.0 * step);
        let along = array![-angles[row].sin(), angles[row].cos()];
        let got = output.gradient.row(row).mapv(f64::from).dot(&along);
        assert!((got - wanted).abs() < 1e-3 * (0.1 + wanted.abs()), "row {row}: {got} {wanted}");
    }
}

#[test]
fn empty_memory_is_the_square_batch_and_no_row_is_a_positive_of_itself() {
    for dim in [16, 128, 513] {
        let (rows, labels) = draw(Draw { ignored: 0, ..how(80, dim) }, 3);
        let settings = LossSettings::default();
        let empty = Memory::new(1000, 0, dim);
        let mut square = LossOutput::default();
        let batch = Batch::square(rows.view(), &labels);
        ddtas::backend::Backend::loss(&mut CpuBackend::new(), &batch, &settings, &mut square).unwrap();
        assert_eq!(loss(&empty, &rows, &labels, &settings), square);

        let (old, old_labels) = draw(Draw { ignored: 0, ..how(33, dim) }, 4);
        let output = loss(&filled(&old, &old_labels), &rows, &labels, &settings);
        let same = |i: usize, others: &[i64]| others.iter().filter(|&&other| other == labels[i]).count();
        let wanted: usize = (0..80).map(|i| same(i, &labels) - 1 + same(i, &old_labels)).sum();
        assert_eq!(output.total_pos, wanted as u64, "dimension {dim}");
    }
}

#[test]
fn memory_keeps_the_last_rows_from_its_start_on() {
    let mut memory = Memory::new(5, 2, 1);
    let rows = |value: f32| Array2::from_elem((3, 1), value);
    for step in 0..2 {
        memory.push(step, rows(0.0).view(), &[0; 3]);
        assert!(memory.is_empty(), "step {step} is before the start");
    }
    for (step, len) in [(2, 3), (3, 5), (4, 5)] {
        memory.push(step, rows(step as f32).view(), &[step as i64; 3]);
        assert_eq!(memory.len(), len);
    }
    let mut same = Memory::new(5, 2, 1);
    same.push(3, array![[3.0], [3.0]].view(), &[3, 3]);
    same.push(4, rows(4.0).view(), &[4; 3]);
    assert_eq!(memory, same, "the oldest row is forgotten first");
    let mut off = Memory::new(0, 0, 1);
    off.push(9, rows(1.0).view(), &[1; 3]);
    assert!(off.is_empty());
}

#[test]
fn the_memory_adds_negatives_from_the_step_after_its_start_on() {
    let place = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        let run = place.path().join(name);
        small_run(&run, 8).args(more).assert().success();
        records(&run).0
    };
    let with = run("with", &["--memory-size", "70", "--memory-start", "3"]);
    let without = run("without", &[]);
    // The batch of step 3 is the first to be kept, so step 4 is the first to use the memory.
    assert_eq!(with[..4], without[..4]);
    let pairs = |step: &ddtas_train::train::StepRecord| step.mined_neg;
    assert!((4..8).all(|step| pairs(&with[step]) > pairs(&without[step])), "the memory adds no negative");
}

#[test]
fn every_loss_and_generator_trains_with_memory() {
    let place = tempfile::tempdir().unwrap();
    for (name, more) in [
        ("contrastive", ["--loss", "contrastive"]),
        ("multi-similarity", ["--loss", "multi-similarity"]),
        ("head", ["--generator", "head"]),
        ("full", ["--generator", "full"]),
    ] {
        let run = place.path().join(name);
        let memory = ["--memory-size", "64", "--memory-start", "0"];
        small_run(&run, 3).args(memory).args(more).assert().success();
        assert!(records(&run).0.iter().all(|step| step.loss > 0.0 && step.loss.is_finite()), "{name}");
    }
}
