//! Settings for fine-tuning: the head's learning rate and steps, weight decay, modes of BatchNorm, the moving
//! average of the weights, and batches in chunks.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::store::ModuleSnapshot;
use burn::tensor::{Device, Tensor};
use clap::{CommandFactory, FromArgMatches, Parser};
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::Mining;
use ddtas_train::data::ImageBatch;
use ddtas_train::model::{
    BackboneKind, EmbeddingNetwork, HeadKind, Normalise, PoolingKind, backward, read, seeded, to_array,
};
use ddtas_train::train::{
    BatchNorm, Engine, OptimizerKind, OptimizerSettings, PairLoss, Preset, ScheduleKind, TrainSettings,
    chunks,
};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runs::{assert_refused, records, small_run};

const SIDE: usize = 24;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: TrainSettings,
}

fn settings(arguments: &str) -> TrainSettings {
    let all = format!("test --image-size {SIDE} --width 8 --embedding-dim 10 --warm-up 0 {arguments}");
    // Frozen BatchNorm needs --init; the tests build the network themselves.
    let init = if arguments.contains("frozen") { " --init here" } else { "" };
    Arguments::parse_from((all + init).split_whitespace()).settings
}

/// A network with running statistics of 20 batches.
fn network(settings: &TrainSettings, device: &Device) -> EmbeddingNetwork {
    seeded(device, 3, || {
        let network = EmbeddingNetwork::new(&settings.network_shape(), device);
        for seed in 0..20 {
            let images = chunk(&batch(12, seed), device);
            let _ = network.forward(images, Normalise::Training);
        }
        network
    })
}

/// `count` pictures of noise, four per class.
fn batch(count: usize, seed: u64) -> ImageBatch {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    ImageBatch {
        pixels: (0..count * 3 * SIDE * SIDE).map(|_| rng.random_range(-1.0..1.0)).collect(),
        labels: (0..count).map(|row| (row / 4) as i64).collect(),
        indices: (0..count).collect(),
        own: 0..count,
        image_size: SIDE,
        replaced: 0,
    }
}

fn chunk(batch: &ImageBatch, device: &Device) -> Tensor<4> {
    let shape = [batch.labels.len(), 3, SIDE, SIDE];
    Tensor::from_data(burn::tensor::TensorData::new(batch.pixels.clone(), shape), device)
}

fn engine(settings: &TrainSettings, network: &EmbeddingNetwork, device: &Device) -> Engine {
    settings.validate().unwrap();
    Engine::new(network.clone(), settings, Box::new(CpuBackend::new()), None, device.clone())
}

type Weights = BTreeMap<String, Vec<f32>>;

/// Weights and running statistics by their names in checkpoints.
fn weights(network: &EmbeddingNetwork) -> Weights {
    let tensors = network.valid().collect(None, None, true).into_iter();
    let named = |tensor: burn::store::burn_pack::Tensor| {
        let (name, _, _, _, bytes) = tensor.into_parts().unwrap();
        (network.file_name(&name), bytemuck::pod_collect_to_vec(&bytes))
    };
    tensors.map(named).collect()
}

/// Weights before and after `steps` steps with `arguments`.
fn after(arguments: &str, steps: usize) -> (Weights, Weights) {
    let (settings, device) = (settings(arguments), Device::flex().autodiff());
    let network = network(&settings, &device);
    let before = weights(&network);
    let mut engine = engine(&settings, &network, &device);
    for step in 0..steps {
        assert!(engine.step(step, &batch(24, 100 + step as u64), None).unwrap(), "step {step} mines nothing");
    }
    (before, weights(&engine.network))
}

fn moved(before: &Weights, after: &Weights) -> Vec<String> {
    before.iter().filter(|(name, values)| after[*name] != **values).map(|(name, _)| name.clone()).collect()
}

/// Largest change of a tensor's entries.
fn change((before, after): &(Weights, Weights), name: &str) -> f32 {
    before[name].iter().zip(&after[name]).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn a_seed_gives_the_same_weights_in_every_thread() {
    let (settings, device) = (settings(""), Device::flex().autodiff());
    let drawn = || seeded(&device, 3, || weights(&EmbeddingNetwork::new(&settings.network_shape(), &device)));
    let wanted = drawn();
    std::thread::scope(|threads| {
        let drawn: Vec<_> = (0..4).map(|_| threads.spawn(|| (0..20).all(|_| drawn() == wanted))).collect();
        assert!(drawn.into_iter().all(|thread| thread.join().unwrap()));
    });
}

#[test]
fn the_head_learns_alone_for_its_steps_and_the_backbone_stays_as_it_is() {
    let (before, two) = after("--head-steps 2", 2);
    assert_eq!(moved(&before, &two), ["head.bias", "head.weight"]);
    let (_, three) = after("--head-steps 2", 3);
    assert!(moved(&two, &three).iter().any(|name| name.starts_with("backbone.")));
}

#[test]
fn the_head_has_a_rate_of_its_own() {
    let same = after("--learning-rate 1e-3 --weight-decay 0", 1);
    let faster = after("--learning-rate 1e-3 --weight-decay 0 --head-learning-rate 5e-3", 1);
    let stem = "backbone.stem.weight";
    assert_eq!(change(&same, stem), change(&faster, stem));
    let ratio = change(&faster, "head.weight") / change(&same, "head.weight");
    assert!((ratio - 5.0).abs() < 1e-3, "{ratio}");
}

#[test]
fn the_rate_of_a_step_is_that_of_its_number() {
    let of = |more: &str, steps| after(&format!("--weight-decay 0 --schedule {more}"), steps).1;
    let falls = "step --milestones 1 --milestone-factor 0.5";
    assert_eq!(of(falls, 1), of("constant", 1));
    assert_ne!(of(falls, 2), of("constant", 2));
}

#[test]
fn biases_and_normalisations_decay_only_where_all_weights_do() {
    for optimizer in ["adam", "adamw"] {
        let how = |more: &str| after(&format!("--optimizer {optimizer} {more}"), 2);
        let (none, all) = (how("--weight-decay 0").1, how("--weight-decay 0.5").1);
        let weights = how("--weight-decay 0.5 --weight-decay-on weights").1;
        assert!(moved(&none, &all).iter().any(|name| name.ends_with(".gamma")), "{optimizer}");
        // Compared after one step, for which the gradients are the same.
        let first = |more: &str| after(&format!("--optimizer {optimizer} {more}"), 1).1;
        let different =
            moved(&first("--weight-decay 0"), &first("--weight-decay 0.5 --weight-decay-on weights"));
        assert!(different.iter().any(|name| name == "head.weight"), "{different:?}");
        assert!(different.iter().all(|name| name.ends_with("weight")), "{different:?}");
        assert_ne!(all, weights, "{optimizer}");
    }
}

#[test]
fn batch_norm_learns_all_or_scale_and_shift_or_nothing() {
    let of = |kind: &str, mode: &str| {
        let (before, after) = after(&format!("--batch-norm {mode}"), 2);
        moved(&before, &after).iter().any(|name| name.ends_with(kind))
    };
    for (mode, gamma, statistics) in
        [("trainable", true, true), ("frozen-statistics", true, false), ("frozen", false, false)]
    {
        assert_eq!(of("norm.gamma", mode), gamma, "{mode}");
        assert_eq!(of("norm.running_mean", mode), statistics, "{mode}");
        assert_eq!(of("norm.running_variance", mode), statistics, "{mode}");
        assert!(of("stem.weight", mode), "{mode}");
    }
}

#[test]
fn the_mean_of_the_weights_is_what_is_evaluated() {
    let device = Device::flex().autodiff();
    for mode in ["trainable", "frozen"] {
        let settings = settings(&format!("--ema 0.4 --batch-norm {mode}"));
        let network = network(&settings, &device);
        let mut engine = engine(&settings, &network, &device);
        let mut mean = weights(&network);
        assert_eq!(weights(&engine.evaluated()), mean);
        // The decay rises from step to step to the setting's.
        for (step, decay) in
            [0.1f32, 2.0 / 11.0, 0.25, 4.0 / 13.0, 5.0 / 14.0, 0.4, 0.4].into_iter().enumerate()
        {
            engine.step(step, &batch(24, 100 + step as u64), None).unwrap();
            for (name, values) in weights(&engine.network) {
                let old = mean.get_mut(&name).unwrap();
                old.iter_mut().zip(values).for_each(|(old, new)| *old += (1.0 - decay) * (new - *old));
            }
        }
        let got = weights(&engine.evaluated());
        assert_ne!(got, weights(&engine.network));
        for (name, values) in &mean {
            for (got, want) in got[name].iter().zip(values) {
                assert!((got - want).abs() <= 1e-6 * (1.0 + want.abs()), "{mode}, {name}: {got}, not {want}");
            }
        }
        let frozen = got.iter().filter(|(name, _)| name.contains("running"));
        let kept = weights(&network);
        assert!(mode == "trainable" || frozen.clone().all(|(name, values)| kept[name] == *values));
    }
}

#[test]
fn a_step_without_pairs_goes_into_the_mean_too() {
    let device = Device::flex().autodiff();
    let settings = settings("--ema 0.9");
    let network = network(&settings, &device);
    let mut engine = engine(&settings, &network, &device);
    assert!(engine.step(0, &batch(24, 100), None).unwrap());
    let [before, mean] = [&engine.network, &engine.evaluated()].map(weights);
    // Each picture is a class of its own.
    let alone = ImageBatch { labels: (0..24).collect(), ..batch(24, 101) };
    assert!(!engine.step(1, &alone, None).unwrap());
    let [after, newer] = [&engine.network, &engine.evaluated()].map(weights);
    assert_eq!(before["head.weight"], after["head.weight"]);
    for ((old, new), latest) in
        mean["head.weight"].iter().zip(&newer["head.weight"]).zip(&after["head.weight"])
    {
        let want = old + (1.0 - 2.0 / 11.0) * (latest - old);
        assert!((new - want).abs() < 1e-6, "{new}, not {want}");
    }
}

/// For each parameter, the norms of the difference `got - want` and of `want`.
fn difference(network: &EmbeddingNetwork, got: &GradientsParams, want: &GradientsParams) -> Vec<(f64, f64)> {
    struct Norms<'a>(&'a GradientsParams, &'a GradientsParams, Vec<(f64, f64)>);
    impl ModuleVisitor for Norms<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let (got, want) = (self.0.get::<D>(param.id), self.1.get::<D>(param.id));
            assert_eq!(got.is_some(), want.is_some());
            let (Some(got), Some(want)) = (got, want) else { return };
            let norm = |tensor: Tensor<D>| {
                let values = read(tensor).unwrap();
                values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
            };
            self.2.push((norm(got - want.clone()), norm(want)));
        }
    }
    let mut norms = Norms(got, want, Vec::new());
    network.visit(&mut norms);
    norms.2
}

#[test]
fn chunks_give_the_gradient_of_the_whole_batch_where_batch_norm_is_frozen() {
    let (settings, device) = (settings("--head layer-norm+linear"), Device::flex().autodiff());
    let network = network(&settings, &device);
    let batch = batch(22, 7);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let gradient = Array2::from_shape_fn((22, 10), |_| rng.random_range(-1.0f32..1.0));
    for mode in [Normalise::Running, Normalise::Affine] {
        let embeddings = network.forward(chunk(&batch, &device), mode);
        let features = chunks::features(&network, &batch, 5, mode, &device);
        let in_chunks = to_array(network.valid().head.forward(features)).unwrap();
        assert_eq!(in_chunks, to_array(embeddings.clone()).unwrap(), "a picture is embedded by itself");
        let whole = backward(embeddings, &gradient, &network);
        let got = chunks::gradients(&network, &batch, &gradient, 5, mode, &device);
        let norms = difference(&network, &got, &whole);
        assert!(norms.len() > 10);
        for (at, (off, norm)) in norms.into_iter().enumerate() {
            assert!(off <= 1e-5 * norm, "{mode:?}: parameter {at} is off by {off}, its norm is {norm}");
        }
    }
}

#[test]
fn both_passes_of_a_chunk_see_the_same_statistics() {
    let device = Device::flex().autodiff();
    let settings = settings("--chunk-size 8 --learning-rate 1e-2");
    let network = network(&settings, &device);
    let batch = batch(24, 7);
    let first = to_array(network.valid().head.forward(chunks::features(
        &network,
        &batch,
        8,
        Normalise::Training,
        &device,
    )));
    // Only the second pass updates the running statistics, once per chunk.
    let before = weights(&network);
    let gradient = Array2::ones((24, 10));
    let _ = chunks::gradients(&network, &batch, &gradient, 8, Normalise::Training, &device);
    assert_eq!(moved(&before, &weights(&network)).len(), 2 * before.len() / 5);
    let again = chunks::features(&network, &batch, 8, Normalise::Training, &device);
    assert_eq!(first.unwrap(), to_array(network.valid().head.forward(again)).unwrap());
}

fn metrics(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("metrics.jsonl")).unwrap()
}

#[test]
fn every_way_trains_and_is_the_same_run_whatever_the_thread_count() {
    let place = tempfile::tempdir().unwrap();
    let plain = place.path().join("plain");
    small_run(&plain, 6).assert().success();
    for (name, more) in [
        ("head", "--head layer-norm+linear --head-learning-rate 0.01 --head-steps 2"),
        ("adam", "--optimizer adam --weight-decay-on weights --schedule step --milestones 2,4"),
        ("mean", "--ema 0.9 --schedule constant"),
        ("chunks", "--chunk-size 7 --memory-size 40 --memory-start 0 --generator head"),
        ("alone", "--chunk-size 7 --head-steps 4 --generator head --meta recent"),
    ] {
        let run = |threads: &str| {
            let run = place.path().join(format!("{name}{threads}"));
            let mut command = small_run(&run, 6);
            command.env("RAYON_NUM_THREADS", threads).args(more.split(' ')).assert().success();
            assert!(records(&run).0.iter().all(|step| step.loss > 0.0 && step.loss.is_finite()), "{name}");
            metrics(&run)
        };
        let one = run("1");
        assert!(one == run("3"), "{name}: 3 threads differ from 1");
        assert!(one != metrics(&plain), "{name} changes nothing");
    }
    // A chunk as large as the batch is the batch.
    let large = place.path().join("large");
    small_run(&large, 6).args(["--chunk-size", "32"]).assert().success();
    assert!(metrics(&large) == metrics(&plain));
}

#[test]
fn a_head_of_another_kind_is_another_network() {
    let place = tempfile::tempdir().unwrap();
    let first = place.path().join("first");
    small_run(&first, 2).args(["--head", "layer-norm+linear"]).assert().success();
    let best = first.join("best.safetensors");
    let mut other = small_run(&place.path().join("other"), 2);
    assert_refused(other.arg("--init").arg(&best), "--head layer-norm+linear");
    let mut eval = assert_cmd::Command::cargo_bin("ddtas-train").unwrap();
    let said = eval.args(["eval", "--json", "--checkpoint"]).arg(&best).assert().success();
    let said = String::from_utf8(said.get_output().stdout.clone()).unwrap();
    let found: serde_json::Value = serde_json::from_str(&said).unwrap();
    let (_, evaluations) = records(&first);
    let best = evaluations.iter().map(|evaluation| evaluation.recall[0].1).fold(0.0, f64::max);
    assert_eq!(found["at"][0][1].as_f64(), Some(best), "{said}");
}

#[test]
fn a_preset_is_its_table_of_settings() {
    let of = |preset: Preset| {
        let matches = preset.apply(Arguments::command()).get_matches_from(["test"]);
        Arguments::from_arg_matches(&matches).unwrap().settings
    };
    // Also those that are the defaults of every run, so that a change of these does not change the presets.
    let both = TrainSettings {
        embedding_dim: 512,
        head: HeadKind::Linear,
        batch_norm: BatchNorm::Frozen,
        loss: PairLoss::SoftContrastive,
        gamma: 0.1,
        negative_ratio: 0.1,
        probe_ratio: 0.1,
        tolerance: 0.5,
        alpha: 40.0,
        beta: 2.0,
        lambda: 0.7,
        // 16, or all there are.
        classes_per_batch: None,
        images_per_class: 5,
        warm_up: 0.0,
        weight_decay: 0.0,
        memory_size: 0,
        ..TrainSettings::default()
    };
    let optimizer = OptimizerSettings {
        optimizer: OptimizerKind::Adam,
        schedule: ScheduleKind::Constant,
        ..OptimizerSettings::default()
    };
    let paper = TrainSettings {
        backbone: BackboneKind::BnInception,
        pooling: None,
        image_size: 227,
        mining: Mining::AtAsms,
        learning_rate: 1e-5,
        optimizer: optimizer.clone(),
        ..both.clone()
    };
    let fine_tune = TrainSettings {
        backbone: BackboneKind::EfficientnetLite0,
        pooling: Some(PoolingKind::AvgMax),
        image_size: 96,
        mining: Mining::Symmetric,
        learning_rate: 1e-4,
        optimizer: OptimizerSettings { head_learning_rate: Some(5e-4), ..optimizer },
        ..both
    };
    assert_eq!(of(Preset::Paper), paper);
    assert_eq!(of(Preset::FineTune), fine_tune);
}

#[test]
fn flags_beat_a_preset_and_a_preset_beats_the_defaults() {
    let place = tempfile::tempdir().unwrap();
    let (first, run) = (place.path().join("first"), place.path().join("run"));
    small_run(&first, 2).assert().success();
    for preset in ["paper", "fine-tune"] {
        let mut without = small_run(&run, 2);
        assert_refused(without.args(["--preset", preset]), "--weights FILE");
        assert!(!run.exists());
    }
    let mut command = small_run(&run, 2);
    command
        .args(["--preset", "paper", "--backbone", "residual", "--learning-rate", "3e-4", "--init"])
        .arg(first.join("best.safetensors"));
    command.assert().success();
    let config: toml::Table =
        toml::from_str(&std::fs::read_to_string(run.join("config.toml")).unwrap()).unwrap();
    let text = |name: &str| config[name].to_string();
    assert_eq!((text("learning_rate"), text("image_size")), ("0.0003".into(), "16".into()));
    assert_eq!((text("optimizer"), text("schedule")), ("\"adam\"".into(), "\"constant\"".into()));
    assert_eq!((text("batch_norm"), text("warm_up")), ("\"frozen\"".into(), "0.0".into()));
    let paper = ddtas::loss::LossSettings::default();
    let of = |name: &str| config[name].as_float().unwrap();
    assert_eq!(
        [of("lambda"), of("negative_ratio"), of("alpha"), of("beta"), of("gamma")],
        [paper.lambda_neg, paper.negative_ratio, paper.alpha, paper.beta, paper.gamma]
    );
    let mut again = assert_cmd::Command::cargo_bin("ddtas-train").unwrap();
    assert_refused(again.arg("--resume").arg(&run).args(["--preset", "paper"]), "leave out --preset ");
}
