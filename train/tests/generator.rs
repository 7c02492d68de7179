//! The threshold generator: its closed form for the head, and runs that use it. `tests/meta_gradient.rs`
//! compares whole training steps with the meta loss.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use assert_cmd::Command;
use burn::tensor::{Device, Tensor};
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::gradient::weigh;
use ddtas::loss::select::Selection;
use ddtas::loss::similarity::Similarities;
use ddtas::loss::{LossSettings, Mining, ThresholdGradient, threshold};
use ddtas_train::Result;
use ddtas_train::generator::head::{Head, Losses, hypergradient};
use ddtas_train::generator::{
    GeneratorKind, GeneratorSettings, Lambda, MetaSource, Thresholds, VirtualStep, VirtualStepKind,
};
use ddtas_train::model::{EmbeddingHead, seeded};
use ddtas_train::train::{Generator, Memory};
use ndarray::{Array1, Array2, Axis, arr1, concatenate};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runs::{records, small_run};

const STEPS: [VirtualStep; 2] = [
    VirtualStep { kind: VirtualStepKind::Plain, rate: 0.5 },
    VirtualStep { kind: VirtualStepKind::Unit, rate: 0.3 },
];

fn uniform(shape: (usize, usize), rng: &mut impl Rng) -> Array2<f64> {
    Array2::from_shape_fn(shape, |_| rng.random_range(-1.0..1.0))
}

fn labels(classes: usize, images: usize) -> Vec<i64> {
    (0..classes * images).map(|row| (row / images) as i64).collect()
}

/// The losses computed by the scalar truth.
struct Truth {
    labels: Vec<i64>,
    meta_labels: Vec<i64>,
    settings: LossSettings,
    lambda: Lambda,
    meta_loss: f64,
}

fn scalar(
    embeddings: &Array2<f64>,
    labels: &[i64],
    settings: &LossSettings,
) -> (Similarities, Selection, f64, Array2<f64>) {
    let similarities = Similarities::new((embeddings, labels), None);
    let selection = Selection::new(&similarities, settings);
    let weighted = weigh(&similarities, &selection, settings, labels.len());
    let gradient = (&weighted.weights + &weighted.weights.t()).dot(embeddings);
    (similarities, selection, weighted.loss, gradient)
}

impl Losses for Truth {
    fn train(&mut self, embeddings: &Array2<f64>, lambda: Lambda) -> Result<Array2<f64>> {
        self.lambda = lambda;
        Ok(scalar(embeddings, &self.labels, &lambda.applied_to(&self.settings)).3)
    }

    fn meta(&mut self, embeddings: &Array2<f64>) -> Result<Array2<f64>> {
        let (_, _, loss, gradient) = scalar(embeddings, &self.meta_labels, &self.settings.with_lambda(0.6));
        self.meta_loss = loss;
        Ok(gradient)
    }

    fn threshold_gradient(
        &mut self,
        embeddings: &Array2<f64>,
        tangent: &Array2<f64>,
    ) -> Result<ThresholdGradient> {
        let settings = self.lambda.applied_to(&self.settings);
        let (similarities, selection, ..) = scalar(embeddings, &self.labels, &settings);
        let tilt = tangent.dot(&embeddings.t()) + embeddings.dot(&tangent.t());
        Ok(threshold::threshold_gradient(&similarities, &selection, &settings, &tilt, self.labels.len()))
    }
}

#[test]
fn closed_form_of_the_head_is_the_derivative_of_the_meta_loss() {
    for (seed, mining) in [(1, Mining::AtAsms), (2, Mining::Asms), (3, Mining::None)] {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let head = Head { weight: uniform((9, 7), &mut rng), bias: arr1(&[0.1; 7]) };
        let (train, meta) = (uniform((12, 9), &mut rng), uniform((6, 9), &mut rng));
        let mut truth = Truth {
            labels: labels(4, 3),
            meta_labels: labels(3, 2),
            settings: LossSettings { mining, alpha: 4.0, ..LossSettings::default() },
            lambda: Lambda::default(),
            meta_loss: 0.0,
        };
        for step in STEPS {
            let lambda = Lambda { pos: 0.5, neg: 0.4 };
            let found =
                hypergradient(&head, train.view(), meta.view(), step, lambda, &mut truth).unwrap().unwrap();
            // The meta loss after another virtual step, at lambda +- h.
            let mut meta_loss = |lambda: Lambda| {
                hypergradient(&head, train.view(), meta.view(), step, lambda, &mut truth).unwrap();
                truth.meta_loss
            };
            let h = 1e-5;
            let pos = (meta_loss(Lambda { pos: lambda.pos + h, ..lambda })
                - meta_loss(Lambda { pos: lambda.pos - h, ..lambda }))
                / (2.0 * h);
            let neg = (meta_loss(Lambda { neg: lambda.neg + h, ..lambda })
                - meta_loss(Lambda { neg: lambda.neg - h, ..lambda }))
                / (2.0 * h);
            assert!(
                pos.abs() > 1e-6 && neg.abs() > 1e-6,
                "{mining:?} {step:?}: nothing to compare: {pos} {neg}"
            );
            for (what, got, want) in [("pos", found.pos, pos), ("neg", found.neg, neg)] {
                let error = (got - want).abs() / want.abs();
                assert!(error < 1e-4, "{mining:?} {step:?} {what}: {got} is not {want}, off by {error:.1e}");
            }
        }
    }
}

#[test]
fn a_batch_without_a_mined_pair_has_no_hypergradient() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let head = Head { weight: uniform((4, 3), &mut rng), bias: Array1::zeros(3) };
    let (train, meta) = (uniform((4, 4), &mut rng), uniform((4, 4), &mut rng));
    let (pairs, singletons) = (labels(2, 2), labels(4, 1));
    for (labels, meta_labels, some) in
        [(&pairs, &pairs, true), (&singletons, &pairs, false), (&pairs, &singletons, false)]
    {
        let mut truth = Truth {
            labels: labels.clone(),
            meta_labels: meta_labels.clone(),
            settings: LossSettings { mining: Mining::None, ..LossSettings::default() },
            lambda: Lambda::default(),
            meta_loss: 0.0,
        };
        let lambda = Lambda { pos: 0.5, neg: 0.5 };
        let found = hypergradient(&head, train.view(), meta.view(), STEPS[1], lambda, &mut truth).unwrap();
        assert_eq!(found.is_some(), some, "{labels:?} {meta_labels:?}");
    }
}

/// Features and labels of a batch.
type Features = (Array2<f64>, Vec<i64>);

/// A generator of the head that begins at `start`.
fn generator(settings: &GeneratorSettings, start: f64) -> Generator {
    let thresholds = Thresholds::new(Lambda { pos: start, neg: start }, settings);
    Generator::new(settings.clone(), thresholds, Box::new(CpuBackend::new()))
}

/// Lambda after step 0 of `generator` on the features `train`.
fn learn(generator: &mut Generator, train: &Features, meta: Option<&Features>) -> f64 {
    learn_at(0, generator, train, meta)
}

fn learn_at(step: usize, generator: &mut Generator, train: &Features, meta: Option<&Features>) -> f64 {
    let head = seeded(&Device::flex(), 1, || {
        let head = EmbeddingHead::new(9, 7, &Device::flex());
        let _ = head.forward(Tensor::zeros([1, 9], &Device::flex()));
        head
    });
    let loss = LossSettings { mining: Mining::None, alpha: 4.0, ..LossSettings::default() };
    let loss = generator.lambda().applied_to(&loss);
    let (train, meta) = ((train.0.clone(), &*train.1), meta.map(|(meta, labels)| (meta.clone(), &**labels)));
    let memory = Memory::new(0, 0, 7);
    generator.begin(step);
    generator.learn_head(&head, train, meta, (&mut CpuBackend::new(), &memory), &loss).unwrap().pos
}

#[test]
fn recent_meta_batches_are_the_last_ones_before_this() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let batches: Vec<Features> = (0..5).map(|_| (uniform((12, 9), &mut rng), labels(4, 3))).collect();
    let fresh = GeneratorSettings { kind: GeneratorKind::Head, ..GeneratorSettings::default() };
    let recent = GeneratorSettings { meta: MetaSource::Recent, meta_recent: 2, ..fresh.clone() };
    let (mut got, mut want) = (generator(&recent, 0.5), generator(&fresh, 0.5));
    for (step, batch) in batches.iter().enumerate() {
        let before = &batches[step.saturating_sub(2)..step];
        let views: Vec<_> = before.iter().map(|(features, _)| features.view()).collect();
        let meta = concatenate(Axis(0), &views).ok();
        let meta = meta.map(|meta| (meta, before.iter().flat_map(|(_, labels)| labels).copied().collect()));
        let (got, want) = (learn(&mut got, batch, None), learn(&mut want, batch, meta.as_ref()));
        assert_eq!(got, want, "step {step}");
        assert_eq!(got != 0.5, step > 0, "step {step} has {} batches before it", before.len());
    }
}

#[test]
fn lambda_comes_to_rest_at_the_end_of_a_rehearsal() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let (train, meta) =
        ((uniform((12, 9), &mut rng), labels(4, 3)), (uniform((6, 9), &mut rng), labels(3, 2)));
    let settings =
        GeneratorSettings { kind: GeneratorKind::Head, rehearsal: 5, ..GeneratorSettings::default() };
    let moved = |step| (learn_at(step, &mut generator(&settings, 0.5), &train, Some(&meta)) - 0.5).abs();
    let [first, fourth, end] = [0, 4, 5].map(moved);
    assert!(first > 1e-3 && (fourth - first / 5.0).abs() < 1e-9 && end == 0.0, "{first}, {fourth}, {end}");
}

#[test]
fn each_member_of_an_ensemble_learns_at_its_own_lambda() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (train, meta) =
        ((uniform((12, 9), &mut rng), labels(4, 3)), (uniform((6, 9), &mut rng), labels(3, 2)));
    let settings = GeneratorSettings { kind: GeneratorKind::Head, ..GeneratorSettings::default() };
    let mut ensemble = generator(&GeneratorSettings { lambda_ensemble: 3, ..settings.clone() }, 0.5);
    let rates = [(0.4, 0.005), (0.5, 0.01), (0.6, 0.02)];
    let mut members = rates
        .map(|(start, lambda_rate)| generator(&GeneratorSettings { lambda_rate, ..settings.clone() }, start));
    for step in 0..4 {
        let got = learn(&mut ensemble, &train, Some(&meta));
        let want = members.each_mut().map(|member| learn(member, &train, Some(&meta)));
        let want = want.iter().sum::<f64>() / 3.0;
        assert!((got - want).abs() < 1e-12, "step {step}: {got}, not {want}");
        let found = ensemble.last_hypergradient().unwrap().neg;
        let want = members.iter().map(|member| member.last_hypergradient().unwrap().neg).sum::<f64>() / 3.0;
        assert!((found - want).abs() < 1e-9 * want.abs(), "step {step}: {found}, not {want}");
    }
}

fn run(output: &std::path::Path, more: &[&str]) -> Command {
    let mut command = small_run(output, 6);
    command.args(more);
    command
}

fn lambdas(run: &std::path::Path) -> Vec<(f64, f64)> {
    records(run).0.into_iter().map(|step| (step.lambda_pos, step.lambda_neg)).collect()
}

#[test]
fn every_generator_moves_lambda_within_its_range() {
    let place = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 5] = [
        ("head", &["--generator", "head"]),
        ("recent", &["--generator", "head", "--meta", "recent"]),
        ("ensemble", &["--generator", "head", "--lambda-ensemble", "3", "--lambda-l2", "0.1"]),
        ("pair", &["--generator", "head", "--lambda-pair", "--virtual-step", "plain"]),
        ("full", &["--generator", "full"]),
    ];
    for (name, arguments) in cases {
        let output = place.path().join(name);
        run(&output, arguments)
            .args(["--lambda", "0.7", "--lambda-min", "0.65", "--lambda-max", "0.75"])
            .assert()
            .success();
        let lambdas = lambdas(&output);
        assert_eq!(lambdas.len(), 6);
        assert!(lambdas.iter().any(|&(_, neg)| neg != 0.7), "{name}: lambda never moved");
        assert!(lambdas.iter().all(|(pos, neg)| (0.65..=0.75).contains(pos) && (0.65..=0.75).contains(neg)));
        // The whole network learns after the loss, for the next step.
        assert_eq!(lambdas[0].1 == 0.7, name == "full" || name == "recent", "{name}: {lambdas:?}");
        if name == "pair" {
            assert!(lambdas.iter().any(|(pos, neg)| pos != neg), "one lambda moved for both");
        } else {
            assert!(lambdas.iter().all(|(pos, neg)| pos == neg), "{name}: two lambdas");
        }
    }
}

/// The lines of metrics.jsonl of this kind.
fn lines(run: &std::path::Path, kind: &str) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let kind = format!("\"kind\":\"{kind}\"");
    text.lines().filter(|line| line.contains(&kind)).map(str::to_owned).collect()
}

#[test]
fn after_a_rehearsal_the_run_is_that_of_a_fixed_lambda() {
    let place = tempfile::tempdir().unwrap();
    // In the rehearsal the warm-up takes half of the steps at most; mean and memory begin again after it.
    let kept = ["--warm-up", "1", "--ema", "0.5", "--memory-size", "40", "--memory-start", "0"];
    for (kind, more) in [("head", &kept[..]), ("full", &[])] {
        let (rehearsed, fixed) = (place.path().join(kind), place.path().join(format!("{kind}-fixed")));
        let rehearsal = ["--generator", kind, "--rehearsal", "5", "--lambda", "0.4"];
        run(&rehearsed, &rehearsal).args(more).args(["--learning-rate", "0.004"]).assert().success();
        let rehearsal = lines(&rehearsed, "rehearsal");
        assert_eq!(rehearsal.len(), 5);
        let at = |step: usize, rate: &str| rehearsal[step].contains(&format!("\"learning_rate\":{rate}"));
        assert!(at(0, "0.002") && at(1, "0.004") && at(2, "0.004"), "{rehearsal:?}");
        let learned = lambdas(&rehearsed);
        assert!(learned[0].0 != 0.4 && learned.iter().all(|&lambda| lambda == learned[0]), "{learned:?}");
        // As it stands in the file: a parsed number may differ in the last bit.
        let step = lines(&rehearsed, "step").swap_remove(0);
        let lambda = step.split("\"lambda_pos\":").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
        run(&fixed, &["--lambda", lambda]).args(more).args(["--learning-rate", "0.004"]).assert().success();
        for kind in ["step", "evaluation"] {
            assert_eq!(lines(&rehearsed, kind), lines(&fixed, kind));
        }
        assert!(lines(&fixed, "rehearsal").is_empty());
        let page = std::fs::read_to_string(rehearsed.join("report.html")).unwrap();
        assert!(page.contains("Steps below 0: the rehearsal."));
    }
}

#[test]
fn generator_starts_warm_from_a_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let (cold, warm) = (place.path().join("cold"), place.path().join("warm"));
    run(&cold, &["--generator", "head", "--lambda", "0.4"]).assert().success();
    let checkpoint = cold.join("best.safetensors");
    let checkpoint = checkpoint.to_str().unwrap();
    run(&warm, &["--generator", "head", "--generator-init", checkpoint]).assert().success();
    let first = lambdas(&warm)[0].0;
    assert!((first - 0.4).abs() < 0.1, "starts at {first}, not where the first run was");

    let off = place.path().join("off");
    run(&off, &[]).assert().success();
    let without = off.join("best.safetensors");
    let refused =
        run(&place.path().join("x"), &["--generator", "head", "--generator-init", without.to_str().unwrap()])
            .assert()
            .failure();
    let said = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
    assert!(said.contains("--generator off"), "{said}");

    // The thresholds in the file must fit the other settings.
    let init = ["--generator-init", checkpoint];
    let pair = place.path().join("pair");
    run(&pair, &["--generator", "head", "--lambda-pair"]).assert().success();
    let apart = pair.join("last.safetensors");
    let apart = ["--generator-init", apart.to_str().unwrap()];
    let cases: [(&[&str], &[&str], &str); 4] = [
        (&init, &["--generator", "head", "--lambda-min", "0.6"], "outside of --lambda-min 0.6"),
        (&init, &["--generator", "head", "--lambda-ensemble", "2"], "give --lambda-ensemble 1"),
        (&init, &[], "generator-init"),
        (&apart, &["--generator", "head"], "give --lambda-pair"),
    ];
    for (init, more, what) in cases {
        let output = place.path().join("refused");
        let refused = run(&output, &[init, more].concat()).assert().code(1);
        let said = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
        assert!(said.contains(what) && said.lines().count() == 1, "expected {what:?} in: {said}");
        assert!(!output.exists());
    }
}
