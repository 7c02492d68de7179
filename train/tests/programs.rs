//! The program as users call it: help, versions, a run's folder as checkpoint, foreign embeddings, --resume.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use assert_cmd::Command;
use ddtas_train::inference::EmbeddingsFile;
use runs::{assert_refused, change, folder_of_pictures, small_run};
use serde_json::Value;

fn ddtas_train(arguments: &str) -> Command {
    let mut command = Command::cargo_bin("ddtas-train").unwrap();
    command.current_dir(place()).args(arguments.split_whitespace());
    command
}

fn printed(arguments: &str) -> String {
    let output = ddtas_train(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn said(arguments: &str) -> String {
    let output = ddtas_train(arguments).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments}: {said}");
    said
}

fn json(arguments: &str) -> Value {
    serde_json::from_str(&printed(arguments)).unwrap()
}

/// A folder with pictures, `data`, and a finished run on them, `run`.
fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs");
        let _ = fs::remove_dir_all(&place);
        folder_of_pictures(&place.join("data"), 8, 4);
        let mut command = small_run(&place.join("run"), 4);
        command
            .args(["--dataset", "folder", "--classes-per-batch", "4", "--data-root"])
            .arg(place.join("data"));
        command.assert().success();
        place
    })
}

#[test]
fn help_is_in_sections_and_short_help_is_short() {
    for (command, most) in [("", 60), ("eval ", 60), ("embed ", 60), ("search ", 60)] {
        let short = printed(&format!("{command}-h"));
        assert!(short.lines().count() <= most, "{command}-h has {} lines", short.lines().count());
        let long = printed(&format!("{command}--help"));
        for text in [&short, &long] {
            assert!(!text.contains("SPEC"), "{command}: {text}");
        }
    }
    let long = printed("--help");
    for heading in ["Runs:", "Data:", "Batches:", "Network:", "Optimisation:", "Loss:", "Learned threshold:"]
    {
        assert_eq!(long.lines().filter(|line| *line == heading).count(), 1, "{heading}");
    }
}

#[test]
fn help_gives_the_ranges_of_the_checks() {
    let long = printed("--help");
    for (flag, range) in [
        ("--steps <STEPS>", "[range: 1 to 2147483648]"),
        ("--image-size <IMAGE_SIZE>", "[range: 8 to 1024]"),
        ("--gamma <GAMMA>", "[range: 0 to 2]"),
        ("--learning-rate <RATE>", "[range: above 0]"),
        ("--meta-classes <P>", "[range: 2 to 65536]"),
        ("--memory-start <STEPS>", "[range: 0 to 2147483648]"),
    ] {
        let (_, help) = long.split_once(flag).unwrap();
        let help = help.split("      --").next().unwrap();
        assert!(help.contains(range), "{flag}{help}");
    }
    assert!(long.matches("[range: ").count() >= 40, "{long}");
    assert!(!printed("-h").contains("[range: "));
}

#[test]
fn flags_of_other_programs_are_understood() {
    let refused = |arguments: &str| {
        let output = ddtas_train(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused("--batch-size 32");
    assert_eq!(said, "ddtas-train: --batch-size: a batch is --classes-per-batch times --images-per-class\n");
    let said = refused("--steps 3 --epochs=5");
    assert!(said.starts_with("ddtas-train: --epochs: give --steps") && said.lines().count() == 1, "{said}");
    assert!(refused("eval --batch-size 32").contains("unexpected argument '--batch-size'"));
    assert_refused(&mut ddtas_train("--lr 0"), "--learning-rate 0 is out of range");
}

#[test]
fn a_margin_is_not_called_lambda_and_one_step_is_no_steps() {
    let once = "--dataset folder --data-root data --image-size 16 --width 4 --steps 1 --evaluate-every 0";
    let output =
        ddtas_train(&format!("{once} --loss contrastive --mining none --output margin")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let step = said.lines().find(|line| line.starts_with("step 1/1: ")).unwrap();
    assert!(step.contains("  margin 0.500  mined ") && !step.contains("lambda"), "{said}");
    assert!(!step.contains("gamma"), "{said}");
    assert!(said.contains("after 1 step: ") && !said.contains("1 steps"), "{said}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("before training (random weights)") && table.contains("trained, 1 step "),
        "{table}"
    );
}

#[test]
fn version_completions_and_manual_pages_are_there() {
    let version = printed("--version");
    assert!(version.contains("features: ") && version.contains("instruction set: "), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(&format!("completions {shell}"));
        assert!(script.contains("data-root") && script.contains("embed"), "{shell}");
    }
    assert!(printed("man").contains(".TH ddtas-train"));
    let pages = tempfile::tempdir().unwrap();
    ddtas_train("man --out").arg(pages.path()).assert().success();
    for page in ["ddtas-train.1", "ddtas-train-eval.1", "ddtas-train-search.1"] {
        assert!(pages.path().join(page).is_file(), "{page}");
    }
    assert_refused(&mut ddtas_train("man --out nowhere"), "--out nowhere");
}

#[test]
fn quiet_says_the_result_alone_and_json_is_one_object() {
    let again = "--dataset folder --data-root data --image-size 16 --width 4 --steps 2 --evaluate-every 0";
    let output = ddtas_train(&format!("{again} --quiet --json --output quiet")).output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((summary["steps"].as_u64(), summary["folder"].as_str()), (Some(2), Some("quiet")));
    assert!(summary["after"]["at"][0][1].is_number());
    assert_eq!(said("eval --checkpoint run --quiet"), "");
    // A thread count beyond the pool's limit is no error.
    ddtas_train("eval --checkpoint run --quiet").env("RAYON_NUM_THREADS", "1000000").assert().success();
}

#[test]
fn the_folder_of_a_run_means_its_best_checkpoint() {
    let of = |checkpoint: &str| {
        let mut evaluation = json(&format!("eval --checkpoint {checkpoint} --json"));
        evaluation.as_object_mut().unwrap().retain(|key, _| !key.ends_with("seconds"));
        evaluation
    };
    assert_eq!(of("run"), of("run/best.safetensors"));
    printed("eval --checkpoint run --html eval.html");
    let page = fs::read_to_string(place().join("eval.html")).unwrap();
    assert!(
        page.contains("<th>R@1</th>") && page.contains("<th>M@R</th>") && page.contains("16 queries"),
        "{page}"
    );
    assert_refused(&mut ddtas_train("eval --checkpoint run --html nowhere/eval.html"), "--html nowhere");
    assert_refused(&mut ddtas_train("eval --checkpoint data"), "holds no best.safetensors");
    let finished = json("--resume run --json");
    assert_eq!((&finished["steps"], &finished["best"]["queries"]), (&4.into(), &16.into()), "{finished}");
    copied_run("alone");
    assert_refused(&mut ddtas_train("--resume alone --json"), "report.json");
}

#[test]
fn npy_files_are_evaluated_and_searched_with_labels_beside_them() {
    let figures = |file: &str| json(&format!("eval --embeddings {file} --json"))["at"].clone();
    printed("embed --checkpoint run --images data --out e.npy");
    printed("embed --checkpoint run --images data --out e.safetensors");
    assert_eq!(figures("e.npy"), figures("e.safetensors"));
    printed("embed --checkpoint run --images data --out e.safetensors");
    let search = |gallery: &str| {
        printed(&format!("search --checkpoint run --gallery {gallery} --query data/class00/0.png"))
    };
    assert_eq!(search("e.npy"), search("data"));
    assert!(
        search("e.npy").lines().nth(1).unwrap().ends_with("class00/0.png  (the query itself)"),
        "{}",
        search("e.npy")
    );

    // Embeddings of another program: no .json, and labels in a .npy file.
    fs::copy(place().join("e.npy"), place().join("bare.npy")).unwrap();
    assert_refused(&mut ddtas_train("eval --embeddings bare.npy"), "bare.labels.npy");
    let mut labels =
        b"\x93NUMPY\x01\0\x46\0{'descr': '|u1', 'fortran_order': False, 'shape': (32,), }".to_vec();
    labels.resize(10 + 0x45, b' ');
    labels.push(b'\n');
    labels.extend((0..32).map(|row| row / 4));
    fs::write(place().join("bare.labels.npy"), &labels).unwrap();
    assert_eq!(figures("bare.npy"), figures("e.npy"));
    labels.truncate(labels.len() - 1);
    fs::write(place().join("bare.labels.npy"), labels).unwrap();
    assert_refused(&mut ddtas_train("eval --embeddings bare.npy"), "not those of its shape");
}

#[test]
fn an_output_replaces_nothing_that_is_read_or_another_program_s() {
    fs::copy(place().join("run/best.safetensors"), place().join("cp.safetensors")).unwrap();
    fs::write(place().join("theirs.json"), "{\"a\": 1}").unwrap();
    let before = fs::read(place().join("cp.safetensors")).unwrap();
    printed("embed --checkpoint run --images data --out g.npy");
    fs::write(place().join("g.labels.npy"), "").unwrap();
    let picture = fs::read(place().join("data/class01/1.png")).unwrap();
    for (arguments, what) in [
        ("embed --checkpoint cp.safetensors --images data --out ./cp.safetensors", "file of --checkpoint"),
        ("embed --checkpoint run --images data --out run/best.safetensors", "file of --checkpoint"),
        ("embed --checkpoint run --images data --out run/last.safetensors", "would be overwritten"),
        ("embed --checkpoint run --images data --out new.safetensors/", "must be a file in an existing"),
        ("embed --checkpoint run --images data --out theirs.npy", "theirs.json would be overwritten"),
        ("eval --checkpoint cp.safetensors --html cp.safetensors", "file of --checkpoint"),
        (
            "search --checkpoint run --gallery data --query data/class00/0.png --html data/class00/0.png",
            "file of --query",
        ),
        (
            "search --checkpoint run --gallery g.npy --query data/class00/0.png --html g.labels.npy",
            "file of --gallery",
        ),
        (
            "search --checkpoint run --gallery data --query data/class00/0.png --html data/class01/1.png",
            "--html data/class01/1.png: would be overwritten",
        ),
        (
            "eval --checkpoint run --html data/class01/1.png",
            "--html data/class01/1.png: would be overwritten",
        ),
    ] {
        assert_refused(&mut ddtas_train(arguments), what);
    }
    assert_eq!(fs::read(place().join("cp.safetensors")).unwrap(), before);
    assert_eq!(fs::read(place().join("theirs.json")).unwrap(), b"{\"a\": 1}");
    assert_eq!(fs::read(place().join("data/class01/1.png")).unwrap(), picture);
    let again = "search --checkpoint run --gallery data --query data/class00/0.png --html again";
    assert_eq!(printed(again), printed(again), "a page is replaced");
}

#[test]
fn of_two_runs_into_one_folder_one_gets_it() {
    let commands = ["1", "2"].map(|seed| {
        let mut command = small_run(&place().join("shared"), 2);
        command.args(["--dataset", "folder", "--classes-per-batch", "4", "--seed", seed, "--data-root"]);
        command.arg(place().join("data"));
        (seed, command)
    });
    let outputs = std::thread::scope(|scope| {
        commands
            .map(|(seed, mut command)| scope.spawn(move || (seed, command.output().unwrap())))
            .map(|thread| thread.join().unwrap())
    });
    let (won, lost): (Vec<_>, Vec<_>) = outputs.into_iter().partition(|(_, output)| output.status.success());
    assert_eq!((won.len(), lost.len()), (1, 1));
    let said = String::from_utf8_lossy(&lost[0].1.stderr);
    assert!(said.contains("give another --output"), "{said}");
    let config = fs::read_to_string(place().join("shared/config.toml")).unwrap();
    assert!(config.contains(&format!("\nseed = {}\n", won[0].0)), "{config}");
}

#[cfg(unix)]
#[test]
fn splits_refuses_names_that_no_line_can_hold() {
    use std::os::unix::ffi::OsStrExt;
    folder_of_pictures(&place().join("listed"), 4, 2);
    let list = "splits --dataset folder --data-root listed";
    assert_eq!(printed(list).lines().count(), 8);
    // The default set is drawn in memory, so that nothing of it can be listed.
    let unnamed = ddtas_train("splits").output().unwrap();
    assert!(
        String::from_utf8_lossy(&unnamed.stderr).contains("not provided:\n  --dataset <DATASET>"),
        "{unnamed:?}"
    );
    for name in [&b"tab\t.png"[..], b"line\n.png", b"caf\xe9.png"] {
        let below = Path::new("listed/class00").join(std::ffi::OsStr::from_bytes(name));
        let odd = place().join(&below);
        fs::copy(place().join("data/class00/0.png"), &odd).unwrap();
        assert_refused(&mut ddtas_train(list), &format!("{below:?} cannot be listed"));
        fs::remove_file(odd).unwrap();
    }
}

#[test]
fn flips_change_embeddings_and_files_remember_them() {
    printed("embed --checkpoint run --images data --out f.safetensors --flips");
    let search = "search --checkpoint run --gallery f.safetensors --query data/class00/0.png";
    assert_refused(&mut ddtas_train(search), "with --flips: give it here too");
    assert!(printed(&format!("{search} --flips")).contains("1.000"));
    printed("embed --checkpoint run --images data --out plain.safetensors");
    let [plain, flipped] =
        ["plain.safetensors", "f.safetensors"].map(|file| EmbeddingsFile::read(&place().join(file)).unwrap());
    assert_eq!(plain.names, flipped.names);
    assert_ne!(plain.values, flipped.values);
    assert_eq!(json("eval --checkpoint run --flips --json")["queries"], 16);

    // A picture and its mirror image are embedded alike.
    let both = place().join("both");
    fs::create_dir_all(&both).unwrap();
    let picture = image::RgbImage::from_fn(24, 20, |x, y| image::Rgb([x as u8 * 9, y as u8 * 9, 90]));
    picture.save(both.join("a.png")).unwrap();
    image::imageops::flip_horizontal(&picture).save(both.join("b.png")).unwrap();
    printed("embed --checkpoint run --images both --out both.safetensors --flips");
    let rows = EmbeddingsFile::read(&place().join("both.safetensors")).unwrap().values;
    let apart = (&rows.row(0) - &rows.row(1)).iter().fold(0.0f32, |most, off| most.max(off.abs()));
    assert!(apart < 1e-5, "{apart}");
    assert!(rows.outer_iter().all(|row| (row.dot(&row) - 1.0).abs() < 1e-5), "unit norm");
}

#[cfg(unix)]
#[test]
fn control_characters_in_names_are_printed_escaped() {
    let odd = "line\n\u{1b}[2J.png";
    let from = place().join("data/class00/0.png");
    fs::create_dir(place().join("controls")).unwrap();
    fs::copy(&from, place().join("controls").join(odd)).unwrap();
    let mut search = ddtas_train("search --checkpoint run --gallery controls --json --query");
    let found = search.arg(Path::new("controls").join(odd)).output().unwrap();
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(found["queries"][0]["answers"][0]["name"], odd);
    let mut search = ddtas_train("search --checkpoint run --gallery controls --query");
    let printed = search.arg(Path::new("controls").join(odd)).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert_eq!(printed.matches("line\\n\\u{1b}[2J.png").count(), 2, "{printed}");
    assert!(!printed.contains('\u{1b}') && printed.lines().count() == 2, "{printed}");
}

#[test]
fn weights_that_give_nan_or_zeros_are_named() {
    let head = |to: &str, value: f32| {
        change(&place().join("run/best.safetensors"), &place().join(to), |_, tensors| {
            for (.., bytes) in tensors.iter_mut().filter(|tensor| tensor.0.starts_with("head.")) {
                bytes.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
            }
        });
    };
    head("nan.safetensors", f32::NAN);
    head("zeros.safetensors", 0.0);
    for (arguments, what) in [
        ("embed --checkpoint nan.safetensors --images data --out nan.npy", "nan.safetensors: holds weights"),
        ("eval --checkpoint zeros.safetensors --dataset folder --data-root data", "class04/0.png to zeros"),
        (
            "--init zeros.safetensors --dataset folder --data-root data --output zeros \
             --image-size 16 --width 8 --embedding-dim 32 --steps 2",
            "class04/0.png to zeros",
        ),
    ] {
        assert_refused(&mut ddtas_train(arguments), what);
    }
}

#[test]
fn a_gallery_remembers_the_size_of_its_pictures() {
    printed("embed --checkpoint run --images data --out s.safetensors --image-size 32");
    let search = "search --checkpoint run --gallery s.safetensors --query data/class00/0.png";
    assert_refused(&mut ddtas_train(search), "with --image-size 32, not 16: give it here too");
    assert!(printed(&format!("{search} --image-size 32")).contains("1.000"));
    // Files of earlier versions do not have it.
    change(&place().join("s.safetensors"), &place().join("s.safetensors"), |facts, _| {
        facts.remove("ddtas.image-size").unwrap();
    });
    printed(search);
}

#[test]
fn queries_that_stand_in_the_gallery_are_noticed() {
    for side in ["query", "gallery"] {
        folder_of_pictures(&place().join("own").join(side), 4, 3);
    }
    folder_of_pictures(&place().join("own/train"), 4, 3);
    let said = said("eval --checkpoint run --dataset folder --data-root own");
    assert!(said.contains("12 of the 12 queries stand in the gallery as well"), "{said}");
}

#[cfg(unix)]
#[test]
fn names_that_are_no_text_survive() {
    use std::os::unix::ffi::OsStrExt;
    let folder = place().join("odd");
    let odd = folder.join(std::ffi::OsStr::from_bytes(b"caf\xe9.png"));
    fs::create_dir_all(&folder).unwrap();
    fs::copy(place().join("data/class01/0.png"), &odd).unwrap();
    fs::copy(place().join("data/class02/0.png"), folder.join("plain.png")).unwrap();
    fs::write(folder.join("cut.png"), b"").unwrap();
    fs::write(folder.join("more.heic"), b"").unwrap();
    let output = ddtas_train("embed --checkpoint run --images odd --out odd.npy --json").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("passed over, not read as pictures: 1 .heic"), "{said}");
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["pictures"], 2);
    let page = place().join("odd.html");
    let mut search = ddtas_train("search --checkpoint run --gallery odd.npy --top 2 --html odd.html --query");
    let output = search.arg(&odd).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains("(the query itself)"));
    assert!(!fs::read_to_string(page).unwrap().contains("no picture"), "the file was found again");
    // The same in arguments of training, which has no subcommand.
    let mut training = ddtas_train("--dataset folder --data-root");
    assert_refused(training.arg(folder.join(std::ffi::OsStr::from_bytes(b"\xe9"))), "does not exist");
}

/// Makes a run that stopped with an error and can be resumed, with its data in `NAME data`; the run's name.
fn unfinished(name: &str) -> String {
    let run = place().join(name);
    let mut command = small_run(&run, 60);
    command.args([
        "--dataset",
        "folder",
        "--classes-per-batch",
        "4",
        "--checkpoint-every",
        "2",
        "--max-bad-images",
        "0",
    ]);
    // A broken picture stops the run, since --max-bad-images is 0.
    let data = place().join(format!("{name} data"));
    folder_of_pictures(&data, 8, 4);
    fs::write(data.join("class07/0.png"), b"").unwrap();
    command.arg("--data-root").arg(&data).assert().failure();
    folder_of_pictures(&data, 8, 4);
    name.to_owned()
}

/// A folder with the files that a run is resumed from, those of `run`.
fn copied_run(name: &str) -> PathBuf {
    let copy = place().join(name);
    fs::create_dir(&copy).unwrap();
    for file in ["config.toml", "last.safetensors", "metrics.jsonl"] {
        fs::copy(place().join("run").join(file), copy.join(file)).unwrap();
    }
    copy
}

#[test]
fn damage_in_a_run_is_found_before_it_goes_on() {
    let run = copied_run("damaged");
    let metrics = fs::read(run.join("metrics.jsonl")).unwrap();
    let mut damaged = metrics.clone();
    damaged[2] = b'\xff';
    fs::write(run.join("metrics.jsonl"), damaged).unwrap();
    let more = "--resume damaged --steps 6";
    assert_refused(&mut ddtas_train(more), "metrics.jsonl: line 1: ");
    assert_refused(&mut ddtas_train(more), "begin a new run with --init damaged/last.safetensors");
    // The checkpoint knows how many bytes it follows.
    fs::write(run.join("metrics.jsonl"), [b" ", &metrics[..]].concat()).unwrap();
    assert_refused(&mut ddtas_train(more), "metrics.jsonl: no line ends at byte");
    let config = |run: &str| fs::read_to_string(place().join(run).join("config.toml")).unwrap();
    assert_eq!(config("damaged"), config("run"), "the steps are not changed yet");
    fs::write(run.join("metrics.jsonl"), metrics).unwrap();
    fs::write(run.join("best.safetensors"), "garbage").unwrap();
    let said = said(more);
    assert!(said.contains("best.safetensors: ") && said.contains("the best weights so far, after"), "{said}");
}

#[test]
fn a_run_goes_on_with_pictures_that_moved_and_not_with_an_edited_config() {
    let name = unfinished("moved");
    let (old, new) = (place().join("moved data"), place().join("elsewhere"));
    fs::rename(&old, &new).unwrap();
    let resume = format!("--resume {name}");
    assert_refused(&mut ddtas_train(&resume), "does not exist");
    said(&format!("{resume} --data-root elsewhere"));
    let config = fs::read_to_string(place().join(&name).join("config.toml")).unwrap();
    assert!(config.contains("elsewhere") && !config.contains("moved data"), "{config}");
    json(&format!("eval --checkpoint {name} --json"));

    // The checkpoint holds the settings that the run began with.
    let edited = copied_run("edited");
    let text = fs::read_to_string(edited.join("config.toml")).unwrap();
    fs::write(edited.join("config.toml"), text.replace("gamma = 0.1", "gamma = 0.2")).unwrap();
    assert_refused(&mut ddtas_train("--resume edited"), "gamma is 0.2, but the run began with 0.1");
    fs::write(edited.join("config.toml"), format!("gama = 0.2\n{text}")).unwrap();
    assert_refused(&mut ddtas_train("--resume edited"), "gama is not a setting");
    let generator = text.replace("[generator]\n", "[generator]\nlamda_rate = 0.2\n");
    fs::write(edited.join("config.toml"), generator).unwrap();
    for arguments in ["--resume edited", "eval --checkpoint edited/last.safetensors"] {
        assert_refused(&mut ddtas_train(arguments), "generator.lamda_rate is not a setting");
    }
    let steps = text.lines().position(|line| line.starts_with("steps = ")).unwrap() + 1;
    for (line, other, reason) in [
        ("gamma = ", "gamma = 'small' # ", "gamma: invalid type: string"),
        ("image_size = ", "image_size = -1 # ", "image_size: invalid value: integer `-1`"),
        ("lambda_rate = ", "lambda_rate = true # ", "generator.lambda_rate: invalid type: boolean"),
        ("gamma = ", "# ", "missing field `gamma`"),
        ("steps = ", "steps = = ", &format!("line {steps}: ")),
    ] {
        fs::write(edited.join("config.toml"), text.replace(&format!("\n{line}"), &format!("\n{other}")))
            .unwrap();
        assert_refused(&mut ddtas_train("--resume edited"), &format!("config.toml: {reason}"));
    }
}

#[test]
fn a_run_with_a_removed_setting_goes_on_where_it_had_the_value_of_all_runs() {
    let older = place().join("older");
    fs::create_dir_all(&older).unwrap();
    fs::copy(place().join("run/metrics.jsonl"), older.join("metrics.jsonl")).unwrap();
    let config = fs::read_to_string(place().join("run/config.toml")).unwrap();
    let with = |text: &str, value: &str| {
        let changed = text.replace("[generator]\n", &format!("[generator]\nmeta_objective = \"{value}\"\n"));
        assert_ne!(changed, text);
        changed
    };
    change(&place().join("run/last.safetensors"), &older.join("last.safetensors"), |facts, _| {
        let state = facts.get_mut("ddtas.run").unwrap();
        *state = with(state, "loss");
    });
    fs::write(older.join("config.toml"), with(&config, "loss")).unwrap();
    assert!(said("--resume older").contains("has finished"));
    fs::write(older.join("config.toml"), with(&config, "neighbours")).unwrap();
    assert_refused(&mut ddtas_train("--resume older"), "generator.meta_objective is not a setting");
}

#[test]
fn of_equal_evaluations_the_first_is_the_best() {
    let mut command = small_run(&place().join("equal"), 2);
    command.args(["--dataset", "folder", "--classes-per-batch", "4", "--data-root", "data", "--init", "run"]);
    // Too small a rate to change any weight.
    command.args(["--batch-norm", "frozen", "--learning-rate", "1e-30"]).current_dir(place());
    assert!(command.output().unwrap().status.success());
    let recalls = runs::records(&place().join("equal")).1;
    assert_eq!(recalls[0].recall, recalls[1].recall);
    change(&place().join("equal/best.safetensors"), &place().join("equal/copy"), |facts, _| {
        assert_eq!(facts["ddtas.step"], "0");
    });
}

#[test]
fn a_finished_run_goes_on_in_a_new_folder_with_its_optimizer() {
    assert!(said("--resume run").contains("--init run/last.safetensors"));
    let first_steps = |init: &str, name: &str| {
        let mut command = small_run(&place().join(name), 3);
        command.args([
            "--dataset",
            "folder",
            "--classes-per-batch",
            "4",
            "--schedule",
            "constant",
            "--warm-up",
            "0",
        ]);
        command.args(["--data-root", "data", "--init", init]).current_dir(place());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let table = String::from_utf8(output.stdout).unwrap();
        assert!(table.contains("before this run") && !table.contains("before training"), "{table}");
        runs::records(&place().join(name)).0.iter().map(|step| step.loss).collect::<Vec<_>>()
    };
    // The same weights with the optimizer's moments, and without.
    let with = first_steps("run/last.safetensors", "goes on");
    change(&place().join("run/last.safetensors"), &place().join("bare.safetensors"), |_, tensors| {
        let all = tensors.len();
        tensors.retain(|(name, ..)| !name.starts_with("optimizer."));
        assert!(tensors.len() < all);
    });
    let without = first_steps("bare.safetensors", "without");
    assert_eq!(with[0], without[0]);
    assert_ne!(with[2], without[2], "the moments count");
}
