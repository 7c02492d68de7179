//! The programs `ddtas-train eval`, `embed` and `search` on a checkpoint of a short run.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use assert_cmd::Command;
use burn::tensor::Device;
use ddtas_train::inference::EmbeddingsFile;
use ddtas_train::model::{BackboneKind, EmbeddingNetwork, HeadKind, NetworkShape, PoolingKind};
use ddtas_train::train::{EvaluationRecord, Record, checkpoint, read_records};
use runs::{assert_refused, folder_of_pictures};
use serde_json::Value;

/// A run on a folder of pictures, made once: the run's folder and its data.
struct Trained {
    run: PathBuf,
    data: PathBuf,
}

const CLASSES: usize = 12;
const PICTURES: usize = 5;

fn trained() -> &'static Trained {
    static TRAINED: OnceLock<Trained> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("evaluation");
        let _ = std::fs::remove_dir_all(&place);
        let (run, data) = (place.join("run"), place.join("data"));
        for class in 0..CLASSES {
            let folder = data.join(format!("class{class:02}"));
            std::fs::create_dir_all(&folder).unwrap();
            for picture in 0..PICTURES {
                stripes(class, picture).save(folder.join(format!("{picture}.png"))).unwrap();
            }
        }
        let mut command = ddtas_train();
        command.args(["--dataset", "folder", "--image-size", "16", "--width", "8", "--embedding-dim", "24"]);
        command.args([
            "--classes-per-batch",
            "5",
            "--images-per-class",
            "4",
            "--steps",
            "8",
            "--evaluate-every",
            "0",
        ]);
        command.arg("--data-root").arg(&data).arg("--output").arg(&run).assert().success();
        Trained { run, data }
    })
}

/// Stripes: the class decides width and colour, the picture's number phase and brightness.
fn stripes(class: usize, picture: usize) -> image::RgbImage {
    image::RgbImage::from_fn(40, 32, |x, y| {
        let along = if class.is_multiple_of(2) { x } else { y };
        let lit = (along as usize + 3 * picture) / (2 + class / 3) % 2;
        let value = |channel: usize| (((class * 53 + channel * 89) % 200 + 10 * picture) * lit + 15) as u8;
        image::Rgb([value(0), value(1), value(2)])
    })
}

fn ddtas_train() -> Command {
    Command::cargo_bin("ddtas-train").unwrap()
}

fn checkpoint() -> PathBuf {
    trained().run.join("best.safetensors")
}

/// Runs a subcommand on the checkpoint with `--json`.
fn json(subcommand: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Value {
    let mut command = ddtas_train();
    command.args([subcommand, "--json"]);
    for argument in arguments {
        command.arg(argument);
    }
    let output = command.assert().success().get_output().clone();
    serde_json::from_slice(&output.stdout).unwrap()
}

fn recalls(evaluation: &Value) -> Vec<(u64, f64)> {
    let pair = |pair: &Value| (pair[0].as_u64().unwrap(), pair[1].as_f64().unwrap());
    evaluation["at"].as_array().unwrap().iter().map(pair).collect()
}

/// Copies the pictures of the test classes to a folder for `embed`.
fn test_pictures(place: &Path) -> PathBuf {
    let folder = place.join("unseen");
    for class in CLASSES / 2..CLASSES {
        let name = format!("class{class:02}");
        std::fs::create_dir_all(folder.join(&name)).unwrap();
        for picture in 0..PICTURES {
            let file = format!("{name}/{picture}.png");
            std::fs::copy(trained().data.join(&file), folder.join(&file)).unwrap();
        }
    }
    folder
}

#[test]
fn a_checkpoint_gives_the_figures_its_run_ended_with() {
    let best = read_records(&trained().run.join("metrics.jsonl")).unwrap();
    let evaluated = |record: &Record| match record {
        Record::Evaluation(evaluation) => Some(evaluation.clone()),
        Record::Rehearsal(_) | Record::Step(_) => None,
    };
    let at_1 = |evaluation: &EvaluationRecord| evaluation.recall[0].1;
    let best = best.iter().filter_map(evaluated).rev().max_by(|a, b| at_1(a).total_cmp(&at_1(b))).unwrap();
    let evaluation = json("eval", &[&"--checkpoint", &checkpoint()]);
    assert_eq!(
        [&evaluation["r_precision"], &evaluation["map_at_r"]].map(Value::as_f64),
        [best.r_precision, best.map_at_r]
    );
    let best: Vec<(u64, f64)> = best.recall.iter().map(|&(k, recall)| (k as u64, recall)).collect();
    assert_eq!(recalls(&evaluation), best);
    assert_eq!(evaluation["dataset"], "data");
    assert_eq!(evaluation["queries"], CLASSES / 2 * PICTURES);
    assert_eq!(evaluation["dim"], 24);
    assert_eq!(evaluation["nmi"], Value::Null);

    let given = json(
        "eval",
        &[&"--checkpoint", &checkpoint(), &"--dataset", &"folder", &"--data-root", &trained().data, &"--nmi"],
    );
    assert_eq!(recalls(&given), best);
    assert!((0.0..=1.0).contains(&given["nmi"].as_f64().unwrap()));
    let r_precision = given["r_precision"].as_f64().unwrap();
    assert!(given["map_at_r"].as_f64().unwrap() <= r_precision && r_precision <= 1.0);
}

#[test]
fn a_query_of_the_report_is_not_its_own_neighbour() {
    let report = std::fs::read(trained().run.join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let queries = report["queries"].as_array().unwrap();
    assert_eq!(queries.len(), 10);
    for query in queries {
        let answers = query["answers"].as_array().unwrap();
        assert_eq!(answers.len(), 8);
        assert!(answers.iter().all(|answer| answer["png"] != query["png"]), "{}", query["class"]);
    }
}

#[test]
fn the_table_names_every_figure() {
    let mut command = ddtas_train();
    command.arg("eval").arg("--checkpoint").arg(checkpoint()).args(["--recall-at", "10,1", "--nmi"]);
    let said = String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap();
    let place = |what: &str| said.find(what).unwrap_or_else(|| panic!("{what} in: {said}"));
    let order =
        ["30 queries of 6 classes", "Recall@1 ", "Recall@10 ", "R-precision", "MAP@R", "NMI", "in per cent"];
    assert!(order.map(place).is_sorted(), "{said}");
    assert!(!said.contains("Recall@2 "));
}

#[test]
fn embedded_pictures_evaluate_to_the_same_figures_as_their_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let pictures = test_pictures(place.path());
    std::fs::write(pictures.join("class07/broken.jpg"), b"not a picture").unwrap();
    std::fs::write(pictures.join("notes.txt"), b"no picture at all").unwrap();
    let out = place.path().join("e.safetensors");
    let mut command = ddtas_train();
    command.arg("embed").arg("--checkpoint").arg(checkpoint()).arg("--images").arg(&pictures);
    let output = command.arg("--out").arg(&out).assert().success().get_output().clone();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("class07/broken.jpg"), "{said}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("30 pictures of 6 folders in 24 dimensions, 1 left out"), "{said}");

    let file = EmbeddingsFile::read(&out).unwrap();
    assert_eq!(file.values.dim(), (30, 24));
    assert_eq!((file.names[0].as_str(), file.names[29].as_str()), ("class06/0.png", "class11/4.png"));
    assert_eq!(file.labels.unwrap()[5..10], [1; 5]);
    let from_file = json("eval", &[&"--embeddings", &out]);
    let from_checkpoint = json("eval", &[&"--checkpoint", &checkpoint()]);
    for figure in ["at", "queries", "r_precision", "map_at_r", "classes"] {
        assert_eq!(from_file[figure], from_checkpoint[figure], "{figure}");
    }

    let npy = place.path().join("e.npy");
    json("embed", &[&"--checkpoint", &checkpoint(), &"--images", &pictures, &"--out", &npy]);
    let floats: Vec<u8> = file.values.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert!(std::fs::read(&npy).unwrap().ends_with(&floats), "the same matrix");
    let beside: Value = serde_json::from_slice(&std::fs::read(place.path().join("e.json")).unwrap()).unwrap();
    assert_eq!(beside["names"].as_array().unwrap().len(), 30);
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 4, "no partial file is left");
}

#[test]
fn search_finds_a_picture_among_copies_and_writes_a_sheet_that_needs_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let pictures = test_pictures(place.path());
    let (out, sheet) = (place.path().join("e.safetensors"), place.path().join("sheet.html"));
    json("embed", &[&"--checkpoint", &checkpoint(), &"--images", &pictures, &"--out", &out]);
    let query = pictures.join("class09/2.png");
    let by_file = json(
        "search",
        &[
            &"--checkpoint",
            &checkpoint(),
            &"--gallery",
            &out,
            &"--query",
            &query,
            &"--top",
            &"4",
            &"--html",
            &sheet,
        ],
    );
    assert_eq!(by_file["gallery"], 30);
    let answers = by_file["queries"][0]["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 4);
    assert_eq!(answers[0]["name"], "class09/2.png");
    let similarities: Vec<f64> =
        answers.iter().map(|answer| answer["similarity"].as_f64().unwrap()).collect();
    assert!(
        (similarities[0] - 1.0).abs() < 1e-5 && similarities.is_sorted_by(|a, b| a >= b),
        "{similarities:?}"
    );

    let page = std::fs::read_to_string(&sheet).unwrap();
    assert_eq!(page.matches("data:image/png;base64,").count(), 5);
    assert!(!page.contains("src=\"http") && !page.contains("href="), "nothing is fetched");
    assert!(page.contains("class09/2.png") && page.contains("Nearest to 2.png"));

    // The folder as the gallery gives the same answers; --top beyond the gallery gives all of it.
    let by_folder = json(
        "search",
        &[
            &"--checkpoint",
            &checkpoint(),
            &"--gallery",
            &pictures,
            &"--query",
            &query,
            &query,
            &"--top",
            &"99",
        ],
    );
    assert_eq!(by_folder["queries"].as_array().unwrap().len(), 2);
    let all = by_folder["queries"][1]["answers"].as_array().unwrap();
    assert_eq!(all.len(), 30);
    assert_eq!(all[..4], answers[..]);

    // Pictures that no longer exist are shown by name.
    std::fs::remove_dir_all(pictures.join("class06")).unwrap();
    let gone = json(
        "search",
        &[
            &"--checkpoint",
            &checkpoint(),
            &"--gallery",
            &out,
            &"--query",
            &query,
            &"--top",
            &"30",
            &"--html",
            &sheet,
        ],
    );
    assert_eq!(gone["queries"][0]["answers"].as_array().unwrap().len(), 30);
    let page = std::fs::read_to_string(&sheet).unwrap();
    assert_eq!(page.matches("no picture").count(), PICTURES);
}

#[test]
fn files_that_do_not_fit_are_refused_in_one_line() {
    let place = tempfile::tempdir().unwrap();
    let pictures = test_pictures(place.path());
    let query = pictures.join("class06/0.png");
    let run = |arguments: &[&dyn AsRef<std::ffi::OsStr>]| {
        let mut command = ddtas_train();
        arguments.iter().for_each(|argument| _ = command.arg(argument));
        command
    };
    let refused =
        |arguments: &[&dyn AsRef<std::ffi::OsStr>], what: &str| assert_refused(&mut run(arguments), what);

    // A checkpoint without its run's folder.
    let alone = place.path().join("alone.safetensors");
    std::fs::copy(checkpoint(), &alone).unwrap();
    refused(&[&"eval", &"--checkpoint", &alone], "--dataset: missing");
    refused(&[&"eval", &"--embeddings", &checkpoint()], "no tensor `embeddings`");
    refused(&[&"eval", &"--embeddings", &query], "not a safetensors file");
    let single = EmbeddingsFile {
        values: ndarray::array![[1.0, 0.0], [0.0, 1.0]],
        labels: Some(vec![0, 1]),
        names: Vec::new(),
        metadata: std::collections::BTreeMap::new(),
    };
    let file = place.path().join("single.safetensors");
    single.write(&file).unwrap();
    refused(&[&"eval", &"--embeddings", &file], "no query has another row of its class");

    let out = place.path().join("e.safetensors");
    let broken = place.path().join("broken");
    std::fs::create_dir_all(&broken).unwrap();
    let checkpoint = &checkpoint();
    let embed: [&dyn AsRef<std::ffi::OsStr>; 7] =
        [&"embed", &"--checkpoint", checkpoint, &"--images", &broken, &"--out", &out];
    refused(&embed, "no JPEG, PNG, WebP");
    std::fs::write(broken.join("a.png"), b"").unwrap();
    refused(&embed, "none of the 1 pictures");
    assert!(!out.exists());

    let search = |gallery: &Path, query: &Path, what: &str| {
        let arguments: [&dyn AsRef<std::ffi::OsStr>; 7] =
            [&"search", &"--checkpoint", checkpoint, &"--gallery", &gallery, &"--query", &query];
        refused(&arguments, what);
    };
    search(&pictures, &broken.join("a.png"), "cannot read the image");
    search(&file, &query, "holds 2 dimensions");
    run(&[&"embed", &"--checkpoint", checkpoint, &"--images", &pictures, &"--out", &out]).assert().success();
    let mut other = EmbeddingsFile::read(&out).unwrap();
    other.metadata.insert("ddtas.checkpoint".into(), "00000000".into());
    other.write(&out).unwrap();
    search(&out, &query, "another network");

    // Arguments of training are refused before a subcommand.
    let mut mixed = run(&[&"--steps", &"3", &"eval", &"--embeddings", &out]);
    mixed.assert().failure().code(2);
}

#[test]
fn pictures_that_memory_cannot_hold_are_refused() {
    let (needed, word) = (413.9e9, "takes at least 413.9 GB of memory");
    let kilobytes = |line: &str| line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap();
    let about = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| about.lines().find(|line| line.starts_with(name)).map(kilobytes);
    let Some(there) = of("MemTotal:").zip(of("SwapTotal:")).map(|(memory, swap)| 1024.0 * (memory + swap))
    else {
        println!("skipped: the system does not say how much memory there is");
        return;
    };
    if there > needed {
        println!("skipped: this machine has {there} bytes of memory");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    folder_of_pictures(&at("data"), 16, 16);
    let shape = NetworkShape {
        backbone: BackboneKind::Residual,
        pooling: PoolingKind::Avg,
        width: 256,
        depth: 1,
        embedding_dim: 8,
        head: HeadKind::Linear,
    };
    let network = EmbeddingNetwork::new(&shape, &Device::flex());
    checkpoint::save(&network, &shape, &[], &at("large.safetensors")).unwrap();
    for words in [
        "eval --dataset folder --data-root data",
        "embed --images data --out out.npy",
        "search --gallery data --query data/class00/0.png",
    ] {
        let mut command = ddtas_train();
        command.current_dir(place.path()).args(words.split(' '));
        command.args(["--checkpoint", "large.safetensors", "--image-size", "1024"]);
        let said = format!("--image-size 1024: an evaluation on 128 pictures of 1024 x 1024 {word}");
        assert_refused(&mut command, &said);
    }
    assert!(!at("out.npy").exists());
}
