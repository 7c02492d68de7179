//! Invalid settings: each is refused by a line that names it, before anything is written.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::collections::BTreeSet;
use std::path::Path;

use assert_cmd::Command;
use clap::{ArgAction, Args};
use ddtas::loss::{LossSettings, Mining};
use ddtas_train::inference::{EmbedSettings, EvalSettings, SearchSettings};
use ddtas_train::train::TrainSettings;
use runs::small_run;

/// Invalid arguments of training, and the text that the refusal has to contain. DATA: a folder of pictures.
const TRAIN: &[(&str, &str)] = &[
    ("--dataset cars", "--dataset"),
    ("--dataset folder", "--data-root: missing: --dataset other than synthetic needs --data-root DIR"),
    ("--dataset folder --data-root nowhere", "--data-root nowhere does not exist"),
    ("--dataset folder --data-root DATA --train-classes 1", "train-classes"),
    ("--dataset folder --data-root DATA --train-classes 8", "train-classes"),
    ("--dataset folder --data-root DATA --train-classes 18446744073709551614", "train-classes"),
    ("--train-classes 4", "train-classes"),
    ("--crop-to-box", "crop-to-box"),
    ("--data-seed 9223372036854775808", "--data-seed 9223372036854775808 is out of range"),
    ("--data-seed 3 --dataset folder --data-root DATA", "--data-seed"),
    ("--image-size 0", "image-size"),
    ("--image-size 1025", "image-size"),
    ("--embedding-dim 0", "embedding-dim"),
    ("--backbone alexnet", "--backbone"),
    ("--backbone vit-s16 --image-size 100", "--image-size 100: must be a multiple of 16"),
    ("--backbone bn-inception --image-size 112", "--image-size 112: must be a size"),
    ("--weights DATA/class00/0.png", "weights"),
    ("--backbone resnet18 --weights nowhere", "weights"),
    ("--backbone resnet18 --weights DATA/class00/0.png --init DATA/class00/0.png", "weights"),
    ("--backbone resnet18 --weights DATA/class00/0.png", "0.png"),
    ("--backbone resnet18 --weights DATA", "cannot read"),
    ("--pooling cls", "pooling"),
    ("--preset large", "--preset"),
    ("--width 0", "width"),
    ("--depth 0", "depth"),
    #[cfg(target_os = "linux")]
    ("--width 4096 --depth 64", "--width 4096: training a network of --width 4096 --depth 64"),
    ("--batch-norm thawed", "--batch-norm"),
    ("--batch-norm frozen", "--batch-norm frozen: needs --weights FILE or --init FILE"),
    ("--batch-norm frozen-statistics", "--batch-norm frozen-statistics: needs --weights FILE or --init FILE"),
    ("--head mlp", "--head"),
    ("--init nowhere", "--init nowhere: there is no such file"),
    ("--loss triplet", "--loss"),
    ("--mining hard", "--mining"),
    ("--gamma=-0.1", "gamma"),
    ("--gamma NaN", "gamma"),
    ("--negative-ratio 11", "negative-ratio"),
    ("--probe-ratio inf", "probe-ratio"),
    ("--tolerance 2", "tolerance"),
    ("--alpha 0", "alpha"),
    ("--beta=-1", "beta"),
    ("--lambda 9", "--lambda 9"),
    ("--lambda 9 --lambda-pos 0.5 --lambda-neg 0.5", "--lambda 9"),
    ("--lambda-pos 3", "lambda-pos"),
    ("--lambda-neg=-3", "lambda-neg"),
    ("--margin 0.4", "margin"),
    ("--margin 2 --loss contrastive", "--margin 2"),
    ("--classes-per-batch 0", "classes-per-batch"),
    ("--classes-per-batch 99", "--classes-per-batch 99: asks for more than the 98 training classes"),
    ("--classes-per-batch 1", "--classes-per-batch 1: a batch of one class has no negative pair"),
    ("--images-per-class 0", "images-per-class"),
    ("--images-per-class 1", "--images-per-class 1: a batch with one picture per class has no positive pair"),
    ("--images-per-class 1048576 --image-size 512", "--images-per-class 1048576: a step on 8388608 pictures"),
    ("--meta-images 65536 --generator head --image-size 512", "--meta-images 65536: a step on"),
    ("--ranks 0", "--ranks"),
    ("--ranks 1025", "give 1 to 1024, mpi or nccl"),
    ("--ranks nccl", "--rendezvous: missing"),
    ("--rendezvous file", "--rendezvous file: is for --ranks nccl"),
    ("--rank-timeout 0", "--rank-timeout"),
    ("--smallest-crop 0", "smallest-crop"),
    ("--smallest-crop 1.5", "smallest-crop"),
    ("--smallest-crop NaN", "smallest-crop"),
    ("--flip 1.5", "--flip 1.5"),
    ("--jitter 1", "--jitter 1"),
    ("--steps 0", "--steps 0 is out of range"),
    ("--steps -1", "'-1' for '--steps"),
    ("--width -4", "'-4' for '--width"),
    ("--warm-up -0.5", "--warm-up -0.5"),
    ("--steps 99999999999", "steps"),
    ("--learning-rate 0", "learning-rate"),
    ("--learning-rate inf", "learning-rate"),
    ("--warm-up 1.1", "warm-up"),
    ("--weight-decay 1", "weight-decay"),
    ("--optimizer lion", "--optimizer"),
    ("--weight-decay-on biases", "--weight-decay-on"),
    ("--head-learning-rate 0", "head-learning-rate"),
    ("--head-steps 99999999999", "head-steps"),
    ("--head-steps 5 --generator full", "head-steps"),
    ("--schedule exponential", "--schedule"),
    ("--schedule step", "--schedule step: needs --milestones"),
    ("--schedule step --milestones 8,8", "--milestones 8,8: give rising steps"),
    ("--schedule step --milestones 0,8", "--milestones 0,8: give rising steps"),
    (
        "--schedule step --milestones 2,18446744073709551615",
        "--milestones 2,18446744073709551615 is out of range",
    ),
    ("--milestones 8", "--schedule step"),
    ("--milestone-factor 0", "milestone-factor"),
    ("--ema 1", "ema"),
    ("--chunk-size 99999999999", "chunk-size"),
    ("--chunk-size 8 --generator full", "chunk-size"),
    ("--evaluate-every 18446744073709551615", "evaluate-every"),
    ("--memory-size 99999999999", "memory-size"),
    ("--memory-start 18446744073709551615 --memory-size 9", "memory-start"),
    ("--memory-start 4", "--memory-start 4: needs --memory-size"),
    ("--seed 18446744073709551615", "seed"),
    ("--device toaster", "--device toaster: unknown; give auto, cpu"),
    ("--workers 0", "workers"),
    ("--workers 257", "workers"),
    ("--checkpoint-every 18446744073709551615", "checkpoint-every"),
    ("--max-bad-images 18446744073709551615", "max-bad-images"),
    ("--generator all", "--generator"),
    ("--generator head --loss contrastive", "soft-contrastive"),
    ("--lambda-pair=yes", "--lambda-pair"),
    ("--meta old", "--meta"),
    ("--meta recent --generator full", "--meta recent: needs --generator head"),
    ("--meta-classes 1", "meta-classes"),
    ("--meta-classes 99 --generator head", "--meta-classes"),
    (
        "--meta-classes 5 --classes-per-batch 4 --generator head --dataset folder --data-root DATA",
        "--meta-classes 5",
    ),
    ("--meta-images 0", "meta-images"),
    ("--meta-images 1 --generator head", "nothing can be mined"),
    ("--meta-recent 0", "meta-recent"),
    ("--lambda-reference 2.5", "lambda-reference"),
    ("--virtual-step long", "--virtual-step"),
    ("--virtual-rate 0", "virtual-rate"),
    ("--lambda-optimizer lbfgs", "--lambda-optimizer"),
    ("--lambda-rate NaN", "lambda-rate"),
    ("--rehearsal 99999999999 --generator head", "rehearsal"),
    ("--rehearsal 10", "rehearsal"),
    ("--lambda-l1=-1 --lambda-l2=-1", "lambda-l1"),
    ("--lambda-l2=-1", "lambda-l2"),
    ("--lambda-min 0.95 --generator head", "--lambda-min"),
    ("--lambda-max 3", "lambda-max"),
    ("--lambda 0.9 --lambda-max 0.85 --generator head", "--lambda-pos 0.9"),
    ("--lambda-neg 0.5 --generator head", "--lambda-pair"),
    ("--lambda-pos 0.5 --generator head", "--generator head: learns one lambda: give --lambda, or both"),
    ("--lambda-ensemble 2 --generator full", "--lambda-ensemble 2: needs --generator head"),
];

/// Invalid arguments of training whose refusal has to contain `generator-init`.
const GENERATOR_INIT: [&str; 2] =
    ["--generator-init nowhere --generator head", "--generator-init DATA/class00/0.png"];

fn refusal(command: &mut Command, arguments: &str, flag: &str) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments}: {said}");
    assert!(said.contains(flag) && !said.contains("panicked"), "{arguments} does not name {flag}: {said}");
    // clap writes the usage, too.
    let is_one_line = output.status.code() == Some(2) || said.lines().count() == 1;
    assert!(output.stdout.is_empty() && is_one_line, "{arguments}: {said}");
    said
}

fn split<'a>(arguments: &'a str, data: &'a str) -> impl Iterator<Item = String> + 'a {
    arguments.split(' ').map(move |part| part.replace("DATA", data))
}

/// The long names of the settings, without those in `except`.
fn flags<T: Args>(except: &[&str]) -> BTreeSet<String> {
    let command = T::augment_args(clap::Command::new("test"));
    let all = command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned));
    all.filter(|flag| !except.contains(&flag.as_str())).collect()
}

/// Asserts that the table tries a bad value of every setting, so that a new one needs a check.
fn assert_complete<T: Args>(tried: &[&str], except: &[&str]) {
    let tried: String = tried.join(" ") + " ";
    for flag in flags::<T>(except) {
        assert!(
            tried.contains(&format!("--{flag} ")) || tried.contains(&format!("--{flag}=")),
            "no bad value of --{flag} is tried"
        );
    }
}

#[test]
fn training_refuses_what_cannot_work_and_leaves_no_folder() {
    let place = tempfile::tempdir().unwrap();
    let (data, run) = (place.path().join("data"), place.path().join("mine"));
    runs::folder_of_pictures(&data, 8, 2);
    let data = data.to_str().unwrap();
    let init = GENERATOR_INIT.map(|arguments| (arguments, "generator-init"));
    for (arguments, flag) in TRAIN.iter().copied().chain(init) {
        let mut command = small_run(&run, 2);
        command.current_dir(place.path());
        // Later arguments override those of the small run.
        command.args(split(arguments, data));
        refusal(&mut command, arguments, flag);
        assert!(!run.exists(), "{arguments} leaves a folder");
    }
    let mut empty = small_run(Path::new(""), 2);
    refusal(&mut empty, "--output ''", "output");
    let tried: Vec<&str> = TRAIN.iter().map(|row| row.0).chain(GENERATOR_INIT).collect();
    assert_complete::<TrainSettings>(&tried, &["output"]);
    // With valid settings the command runs, since the refused ones left no folder.
    small_run(&run, 2).assert().success();
    refusal(&mut small_run(&run, 2), "--output RUN", "--output");
    refusal(&mut small_run(&run.join("config.toml"), 2), "--output FILE", "--output");
    let mut resumed = Command::cargo_bin("ddtas-train").unwrap();
    resumed.arg("--resume").arg(&run).args(["--workers", "0"]);
    refusal(&mut resumed, "--workers 0", "workers");
}

#[test]
fn the_other_commands_refuse_what_cannot_work_and_leave_no_file() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("data");
    runs::folder_of_pictures(&data, 8, 2);
    small_run(&place.path().join("run"), 1).assert().success();
    let checkpoint = "run/best.safetensors";
    let given = format!("--checkpoint {checkpoint}");
    let eval = format!("eval --checkpoint {checkpoint}");
    let embed = format!("embed --checkpoint {checkpoint} --images DATA --out out.npy");
    let search = format!("search --checkpoint {checkpoint} --gallery DATA --query DATA/class00/0.png");
    let table: &[(&str, &str, &str)] = &[
        (&eval, "--recall-at 1,0", "recall-at"),
        (&eval, "--nmi --nmi-steps 0", "nmi-steps"),
        (&eval, "--image-size 7", "image-size"),
        (&eval, "--device toaster", "device"),
        (&eval, "--dataset cars", "--dataset"),
        (&eval, "--dataset cub200", "data-root"),
        (&eval, "--dataset folder --data-root nowhere", "--data-root"),
        (&eval, "--dataset folder --data-root DATA --train-classes 0", "train-classes"),
        (&eval, "--dataset sop --data-root DATA --crop-to-box", "crop-to-box"),
        (&eval, "--dataset synthetic --data-seed=-1", "--data-seed"),
        (&eval, "--seed -1", "'-1' for '--seed"),
        (&eval, "--nmi-steps 3", "--nmi"),
        ("eval", "--checkpoint nowhere", "nowhere"),
        ("eval", "--embeddings nowhere", "nowhere"),
        (&eval, "--weights nowhere", "cannot be used with"),
        (&embed, "--pooling avg", "cannot be used with"),
        (&search, "--weights nowhere", "cannot be used with"),
        ("eval --embeddings nowhere", "--weights nowhere", "cannot be used with"),
        ("eval --embeddings nowhere", "--pooling avg", "cannot be used with"),
        ("eval --embeddings nowhere", "--train-classes 4", "cannot be used with"),
        ("eval --embeddings nowhere", "--data-seed 4", "cannot be used with"),
        ("eval --embeddings nowhere", "--crop-to-box", "cannot be used with"),
        ("eval", "", "--checkpoint: missing"),
        ("embed --images DATA --out out.npy", "", "--checkpoint: missing"),
        ("search --gallery DATA --query DATA/class00/0.png", "", "--checkpoint: missing"),
        ("eval", "--backbone resnet18", "--weights"),
        ("eval", "--weights nowhere", "--backbone"),
        ("eval", "--backbone resnet18 --weights nowhere", "nowhere"),
        ("eval", "--backbone resnet18 --weights nowhere --pooling cls", "pooling"),
        (&eval, "--backbone resnet18 --weights nowhere", "--backbone"),
        (&embed.replace(checkpoint, "nowhere"), "", "nowhere"),
        (&embed, "--backbone resnet18 --weights nowhere", "--backbone"),
        (&embed.replace(&given, "--backbone resnet18"), "--weights nowhere --pooling avg", "nowhere"),
        (&embed, "--image-size 0", "image-size"),
        (&embed.replace("out.npy", "out.txt"), "", "--out out.txt: must end in .safetensors or .npy"),
        (
            &embed.replace("out.npy", "nowhere/out.npy"),
            "",
            "--out nowhere/out.npy: must be a file in an existing folder",
        ),
        (&embed.replace("--images DATA", "--images nowhere"), "", "nowhere does not exist"),
        (&search, "--top 0", "top"),
        (&search, "--image-size 2000", "image-size"),
        (&search, "--device toaster", "device"),
        (&search, "--html nowhere/out.html", "html"),
        (&search, "--html run", "html"),
        (&search.replace("--gallery DATA", "--gallery nowhere"), "", "nowhere"),
        (&search.replace("class00/0.png", "nowhere"), "", "nowhere"),
        (&search.replace(checkpoint, "nowhere"), "", "nowhere"),
        (&search, "--backbone resnet18 --weights nowhere", "--backbone"),
        (&search.replace(&given, "--backbone resnet18"), "--weights nowhere --pooling avg", "nowhere"),
    ];
    let before = names(place.path());
    for &(command, more, flag) in table {
        let arguments = format!("{command} {more}");
        let mut program = Command::cargo_bin("ddtas-train").unwrap();
        program.current_dir(place.path()).args(split(arguments.trim(), "data"));
        refusal(&mut program, &arguments, flag);
        assert_eq!(names(place.path()), before, "{arguments} leaves something");
    }
    let tried = |command: &str| -> Vec<&str> {
        table.iter().filter(|row| row.0.starts_with(command)).flat_map(|row| [row.0, row.1]).collect()
    };
    // Flags without a value have no bad value.
    assert_complete::<EvalSettings>(&tried("eval"), &switches::<EvalSettings>());
    assert_complete::<EmbedSettings>(&tried("embed"), &switches::<EmbedSettings>());
    assert_complete::<SearchSettings>(&tried("search"), &switches::<SearchSettings>());
}

#[test]
fn every_setting_of_a_resumed_run_is_applied_or_refused() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    small_run(&run, 1).assert().success();
    // An impossible value shows that a setting is applied.
    let changeable = [
        ("device", "toaster"),
        ("workers", "0"),
        ("checkpoint-every", "99999999999"),
        ("max-bad-images", "99999999999"),
        ("data-root", "elsewhere"),
        ("steps", "0"),
    ];
    let command = TrainSettings::augment_args(clap::Command::new("test"));
    for argument in command.get_arguments() {
        let flag = format!("--{}", argument.get_long().unwrap());
        let known = changeable.iter().find(|(name, _)| flag == format!("--{name}"));
        let possible = argument.get_possible_values();
        let value = possible.first().map_or("1", |value| value.get_name());
        let (value, wanted) = match known {
            Some((_, value)) => (*value, format!("ddtas-train: {flag}")),
            None => (value, format!("leave out {flag} (")),
        };
        let mut resumed = Command::cargo_bin("ddtas-train").unwrap();
        resumed.args(["--steps", "2", "--resume"]).arg(&run).arg(&flag);
        if !matches!(argument.get_action(), ArgAction::SetTrue) {
            resumed.arg(value);
        }
        runs::assert_refused(&mut resumed, &wanted);
    }
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_refused_where_files_are_read() {
    let place = tempfile::tempdir().unwrap();
    runs::folder_of_pictures(&place.path().join("data"), 4, 2);
    let pipe = std::process::Command::new("mkfifo").arg(place.path().join("pipe")).status();
    assert!(pipe.unwrap().success());
    small_run(&place.path().join("run"), 1).assert().success();
    for arguments in [
        "--init FILE --output new",
        "--backbone resnet18 --weights FILE --output new",
        "--generator head --generator-init FILE --output new",
        "eval --checkpoint FILE",
        "eval --embeddings FILE",
        "search --checkpoint run --gallery FILE --query data/class00/0.png",
        "search --checkpoint run --gallery data --query FILE",
    ] {
        for file in ["pipe", "/dev/zero"] {
            let mut program = Command::cargo_bin("ddtas-train").unwrap();
            program.current_dir(place.path()).timeout(std::time::Duration::from_secs(60));
            runs::assert_refused(
                program.args(arguments.replace("FILE", file).split(' ')),
                "is a pipe or a device",
            );
        }
    }
}

fn names(folder: &Path) -> BTreeSet<std::ffi::OsString> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

/// Flags that take no value.
fn switches<T: Args>() -> Vec<&'static str> {
    let command = T::augment_args(clap::Command::new("test"));
    let switch = |argument: &&clap::Arg| matches!(argument.get_action(), ArgAction::SetTrue);
    command
        .get_arguments()
        .filter(switch)
        .filter_map(|argument| argument.get_long().map(|long| &*long.to_owned().leak()))
        .collect()
}

/// Standard error of a small run with further `arguments`.
fn said_of(arguments: &str, place: &Path) -> String {
    let run = place.join(format!("run {arguments}").replace('/', "-"));
    let mut command = small_run(&run, 2);
    command.current_dir(place).args(split(arguments, "data"));
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments}: {said}");
    said
}

#[test]
fn flags_that_change_nothing_are_named_once() {
    let place = tempfile::tempdir().unwrap();
    runs::folder_of_pictures(&place.path().join("data"), 8, 3);
    let usual = "--dataset folder --data-root DATA --classes-per-batch 4";
    for (arguments, flag) in [
        ("--meta-classes 3 --lambda-rate 0.1", "--lambda-rate changes nothing here: it is for --generator"),
        ("--mining none --gamma 0.2", "--gamma changes nothing"),
        ("--lambda 0.1 --lambda-pos 0.8 --lambda-neg 0.7", "--lambda changes nothing here"),
        ("--weight-decay 0 --weight-decay-on weights", "--weight-decay-on changes nothing here"),
        ("--rank-timeout 9", "--rank-timeout changes nothing here: it is for --ranks nccl"),
        ("--mining asms --probe-ratio 0.2", "--probe-ratio changes nothing here: it is for --mining at-asms"),
        (
            "--generator head --meta recent --meta-images 3",
            "--meta-images changes nothing here: it is for --meta fresh",
        ),
        (
            "--memory-size 8 --memory-start 2",
            "--memory-start 2: the run ends after 2 steps, and the memory stays empty",
        ),
    ] {
        let said = said_of(&format!("{usual} {arguments}"), place.path());
        assert_eq!(said.matches(flag).count(), 1, "{arguments}: {said}");
    }
    // With a memory, a batch of one class has negatives.
    let said = said_of(&format!("{usual} --classes-per-batch 1 --memory-size 50"), place.path());
    assert!(!said.contains("changes nothing"), "{said}");
}

#[test]
fn batches_fit_a_set_of_few_classes() {
    let place = tempfile::tempdir().unwrap();
    runs::folder_of_pictures(&place.path().join("data"), 8, 3);
    let run = place.path().join("run");
    let mut command = Command::cargo_bin("ddtas-train").unwrap();
    command.current_dir(place.path()).args(["--dataset", "folder", "--data-root", "data", "--output", "run"]);
    // The README's command, shorter and smaller, with a generator, whose batches shrink too.
    command.args(["--steps", "2", "--image-size", "16", "--width", "4", "--generator", "head"]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert_eq!(
        said.matches("4 classes train: a batch has pictures of all of them, not of 16").count(),
        1,
        "{said}"
    );
    let config = std::fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(config.contains("classes_per_batch = 4") && config.contains("meta_classes = 4"), "{config}");
    assert!(config.contains("evaluate_every = 2"), "{config}");
}

#[test]
fn short_epochs_have_twenty_evaluations_unless_more_are_asked_for() {
    let place = tempfile::tempdir().unwrap();
    runs::folder_of_pictures(&place.path().join("data"), 4, 2);
    let evaluations = |name: &str, more: &[&str]| {
        let run = place.path().join(name);
        let mut command = small_run(&run, 59);
        // An epoch is one step.
        command.args(["--classes-per-batch", "2", "--dataset", "folder", "--data-root"]);
        command.arg(place.path().join("data")).args(more).assert().success();
        runs::records(&run).1.len()
    };
    // `small_run` gives 0.
    assert_eq!(evaluations("none", &[]), 2);
    assert_eq!(evaluations("asked", &["--evaluate-every", "2"]), 31);
    let run = place.path().join("default");
    let mut command = Command::cargo_bin("ddtas-train").unwrap();
    command.args(["--dataset", "folder", "--image-size", "16", "--width", "4", "--steps", "59", "--output"]);
    command.arg(&run).arg("--data-root").arg(place.path().join("data")).assert().success();
    // Every four steps, not every two: at 0, 4, ..., 56 and 59.
    assert_eq!(runs::records(&run).1.len(), 16);
}

#[test]
fn settings_of_the_library_are_written_and_read_as_text() {
    let settings = LossSettings { mining: Mining::Asms, alpha: 20.0, ..LossSettings::default() };
    let text = toml::to_string(&settings).unwrap();
    assert_eq!(toml::from_str::<LossSettings>(&text).unwrap(), settings);
    let partly = toml::from_str::<LossSettings>("mining = \"asms\"\nalpha = 20.0").unwrap();
    assert_eq!(partly, settings, "what is missing has its default");
    assert!(toml::from_str::<LossSettings>("alhpa = 20.0").unwrap_err().to_string().contains("alhpa"));
}
