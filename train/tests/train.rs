//! The program `ddtas-train`: what it learns, what it writes, and its errors.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::path::Path;

use assert_cmd::Command;
use ddtas::backend::{DeviceSpec, auto};
use runs::{assert_refused, folder_of_pictures, records, small_run};

#[test]
fn short_training_run_raises_recall_on_unseen_classes() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let mut command = Command::cargo_bin("ddtas-train").unwrap();
    command.args(["--image-size", "32", "--width", "16", "--steps", "150", "--learning-rate", "6e-3"]);
    command.args(["--evaluate-every", "0"]);
    command.arg("--output").arg(&run);
    let said = command.assert().success().get_output().stdout.clone();
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("before training (random weights)") && said.contains("seed 0"), "{said}");

    let (steps, evaluations) = records(&run);
    assert_eq!(steps.len(), 150);
    let (before, after) = (evaluations[0].recall[0].1, evaluations[1].recall[0].1);
    assert!(before < 0.10, "the untrained network already finds {before}");
    assert!(after > before + 0.04, "Recall@1 went from {before} to {after}");
    for file in ["config.toml", "best.safetensors", "report.html"] {
        assert!(run.join(file).metadata().unwrap().len() > 0, "{file}");
    }
}

#[test]
fn same_seed_gives_the_same_run_whatever_the_thread_count() {
    let place = tempfile::tempdir().unwrap();
    let metrics: Vec<Vec<u8>> = [("1", "1"), ("2", "3"), ("5", "2")]
        .iter()
        .map(|(threads, workers)| {
            let run = place.path().join(format!("run{threads}"));
            small_run(&run, 6)
                .env("RAYON_NUM_THREADS", threads)
                .args(["--seed", "7", "--workers", workers])
                .assert()
                .success();
            std::fs::read(run.join("metrics.jsonl")).unwrap()
        })
        .collect();
    assert!(metrics[0] == metrics[1], "2 threads differ from 1");
    assert!(metrics[0] == metrics[2], "5 threads differ from 1");

    let other = place.path().join("other");
    small_run(&other, 6).args(["--seed", "8"]).assert().success();
    assert!(metrics[0] != std::fs::read(other.join("metrics.jsonl")).unwrap(), "the seed changes nothing");
}

#[test]
fn pictures_are_mirrored_and_coloured_as_asked() {
    let place = tempfile::tempdir().unwrap();
    let first_loss = |flags: &str| {
        let run = place.path().join(format!("run{flags}"));
        small_run(&run, 1).args(flags.split_whitespace()).assert().success();
        records(&run).0[0].loss
    };
    let plain = first_loss("--flip 0 --jitter 0");
    assert_ne!(plain, first_loss("--flip 1 --jitter 0"));
    assert_ne!(plain, first_loss("--flip 0 --jitter 0.5"));
    assert_eq!(first_loss(""), first_loss("--flip 0.5 --jitter 0.2"));
}

#[test]
fn steps_are_recorded_with_their_epochs_rates_and_pairs() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let way = ["--mining", "none", "--warm-up", "0.5", "--learning-rate", "0.004"];
    small_run(&run, 5).args(way).assert().success();
    let (steps, _) = records(&run);
    // The warm-up is 2.5 steps, rounded up; an epoch is 3,920 pictures in batches of 32.
    let rates = [1.0 / 3.0, 2.0 / 3.0, 1.0, 1.0, 0.5].map(|share: f64| 0.004 * share);
    for (at, (step, rate)) in steps.iter().zip(rates).enumerate() {
        assert_eq!((step.step, step.epoch), (at, (at + 1) as f64 / 123.0));
        assert!((step.learning_rate - rate).abs() < 1e-12, "step {at}: {}, not {rate}", step.learning_rate);
        assert_eq!((step.mined_pos, step.mined_neg), (32 * 3, 32 * 28));
    }
}

#[test]
fn a_margin_is_a_half_unless_given() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    small_run(&run, 1).args(["--loss", "contrastive", "--mining", "none"]).assert().success();
    let step = &records(&run).0[0];
    assert_eq!([step.lambda_pos, step.lambda_neg], [0.5; 2]);
}

#[test]
fn every_loss_and_mining_trains() {
    let place = tempfile::tempdir().unwrap();
    for loss in ["soft-contrastive", "contrastive", "multi-similarity"] {
        for mining in ["none", "symmetric", "asms", "at-asms"] {
            let run = place.path().join(format!("{loss}-{mining}"));
            small_run(&run, 3).args(["--loss", loss, "--mining", mining]).assert().success();
            let (steps, _) = records(&run);
            assert!(steps.iter().all(|step| step.loss > 0.0 && step.loss.is_finite()), "{loss} {mining}");
        }
    }
}

#[test]
fn best_checkpoint_starts_another_run_where_it_ended() {
    let place = tempfile::tempdir().unwrap();
    let (first, second) = (place.path().join("first"), place.path().join("second"));
    small_run(&first, 12).args(["--ema", "0.5"]).assert().success();
    let (_, evaluations) = records(&first);
    let best = evaluations.iter().map(|evaluation| evaluation.recall[0].1).fold(0.0, f64::max);

    let checkpoint = first.join("best.safetensors");
    small_run(&second, 2).arg("--init").arg(&checkpoint).args(["--batch-norm", "frozen"]).assert().success();
    let (_, evaluations) = records(&second);
    assert_eq!(evaluations[0].recall[0].1, best);

    let mut wider = small_run(&place.path().join("wider"), 2);
    assert_refused(wider.args(["--width", "9"]).arg("--init").arg(&checkpoint), "--width 8");
    let mut broken = small_run(&place.path().join("broken"), 2);
    assert_refused(broken.arg("--init").arg(first.join("config.toml")), "not a safetensors file");
}

#[test]
fn a_collapse_is_told_once() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("data");
    folder_of_pictures(&data, 8, 4);
    let run = |name: &str| {
        let mut command = small_run(&place.path().join(name), 4);
        command.args(["--dataset", "folder", "--classes-per-batch", "4", "--data-root"]).arg(&data);
        String::from_utf8(command.assert().success().get_output().stderr.clone()).unwrap()
    };
    assert!(!run("apart").contains("collapsed"));
    // Black pictures stay black in every augmentation: the network always sees the same picture.
    for class in 0..8 {
        for picture in 0..4 {
            let path = data.join(format!("class{class:02}/{picture}.png"));
            image::RgbImage::new(24, 20).save(path).unwrap();
        }
    }
    let said = run("alike");
    assert_eq!(said.matches("warning: the embeddings of step 1 have collapsed").count(), 1, "{said}");
    assert_eq!(said.matches("collapsed").count(), 1, "{said}");
}

/// Trains three steps on `device`: standard error and metrics.jsonl.
fn three_steps_on(device: &str, place: &Path) -> (String, Vec<u8>) {
    let run = place.join(device.replace(':', "-"));
    let output = small_run(&run, 3).args(["--device", device]).assert().success().get_output().clone();
    (String::from_utf8(output.stderr).unwrap(), std::fs::read(run.join("metrics.jsonl")).unwrap())
}

/// Whether network and loss can run on a GPU here; with DDTAS_REQUIRE_GPU set (benches/device.sh) they must.
fn gpu_trains() -> bool {
    let found = cfg!(feature = "train-cuda") && auto().spec != DeviceSpec::Cpu;
    assert!(
        found || std::env::var_os("DDTAS_REQUIRE_GPU").is_none(),
        "a GPU is required: {:?}",
        auto().reason
    );
    found
}

#[test]
fn auto_takes_a_gpu_for_the_whole_run_or_says_why_not() {
    let place = tempfile::tempdir().unwrap();
    let (said, metrics) = three_steps_on("auto", place.path());
    if gpu_trains() {
        assert!(said.contains("computing on cuda:0\n"), "{said}");
        return;
    }
    let reason = auto().reason.map_or_else(String::new, |reason| format!(": {reason}"));
    assert!(said.contains(&format!("computing on cpu{reason}\n")), "{said}");
    assert!(metrics == three_steps_on("cpu", place.path()).1, "auto and cpu differ");
}

#[test]
fn a_gpu_that_cannot_train_is_refused_in_one_line_before_anything_is_written() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let refuse = |device: &str| {
        let mut command = small_run(&run, 2);
        command.args(["--device", device]);
        assert_refused(&mut command, &format!("ddtas-train: --device {device}: "));
        assert_refused(&mut command, "use the device cpu");
    };
    refuse("cuda:4096");
    if !gpu_trains() {
        refuse("cuda:0");
    }
    assert!(!run.exists());
}

#[test]
fn a_run_on_a_gpu_starts_from_the_weights_of_the_cpu() {
    if !gpu_trains() {
        println!("skipped: no GPU trains here ({:?})", auto().reason);
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let first_loss = |device: &str| {
        three_steps_on(device, place.path());
        records(&place.path().join(device.replace(':', "-"))).0[0].loss
    };
    let (cpu, gpu) = (first_loss("cpu"), first_loss("cuda:0"));
    // On the GPU sums have another order, and products may be TF32.
    assert!((gpu - cpu).abs() <= 2e-2 * cpu, "step 0: {gpu} on the GPU, {cpu} on the CPU");
}

#[test]
fn data_of_one_class_and_folders_with_other_things_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let small = || small_run(&run, 2);
    let data = place.path().join("data");
    folder_of_pictures(&data, 1, 3);
    assert_refused(small().args(["--dataset", "folder", "--data-root"]).arg(&data), "class");

    std::fs::create_dir_all(&run).unwrap();
    std::fs::write(run.join("notes"), "mine").unwrap();
    assert_refused(&mut small(), "not empty");
    assert_eq!(std::fs::read_to_string(run.join("notes")).unwrap(), "mine");
}
