//! Runs that are killed, or meet a full disk or bad pictures, and their files afterwards. Signals:
//! `tests/signals.rs`.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use assert_cmd::Command as Assertion;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runs::process::{
    PROGRAM, Place, STEPS, arguments, assert_finished, assert_same, finish, lines_of, resume, start,
    wait_for_lines,
};
use runs::{assert_refused, folder_of_pictures, records};

fn program(arguments: &[String]) -> Assertion {
    let mut command = Assertion::cargo_bin("ddtas-train").unwrap();
    command.args(arguments);
    command
}

/// Asserts that the program ended with a line that says it cannot write `what`, and how to go on.
fn assert_one_line(output: &Output, what: &str, run: &Path) {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    let line = said.lines().last().unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(line.starts_with("ddtas-train: cannot write ") && line.contains(what), "{said}");
    assert!(line.ends_with(&format!("ddtas-train --resume {}", run.display())), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

fn append(path: &Path, bytes: &[u8]) {
    let whole = [fs::read(path).unwrap(), bytes.to_vec()].concat();
    fs::write(path, whole).unwrap();
}

/// The event files of a run, oldest first.
fn events_of(run: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
    let named =
        |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("events.out.tfevents.");
    let mut files: Vec<PathBuf> = entries.filter(named).collect();
    files.sort();
    files
}

#[test]
fn killed_runs_go_on_to_the_same_bytes_as_unbroken_ones() {
    let place = Place::new();
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("moments of killing drawn from seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let ways: [(&str, &[&str]); 8] = [
        ("off", &[]),
        ("head", &["--generator", "head", "--lambda-pair", "--lambda-ensemble", "3"]),
        ("recent", &["--generator", "head", "--meta", "recent"]),
        ("rehearsal", &["--generator", "head", "--meta", "recent", "--rehearsal", "40"]),
        ("full", &["--generator", "full", "--checkpoint-every", "1"]),
        (
            "mean",
            &["--ema", "0.9", "--head-steps", "30", "--head-learning-rate", "0.02", "--optimizer", "adam"],
        ),
        ("chunks", &["--chunk-size", "5", "--ema", "0.9", "--weight-decay-on", "weights"]),
        ("memory", &["--memory-size", "50", "--memory-start", "7", "--workers", "3"]),
    ];
    for (name, more) in ways {
        let (unbroken, run) = (place.run(&format!("{name}-unbroken")), place.run(name));
        assert_finished(&finish(&arguments(&place.data, &unbroken, more)));
        let mut kills = Vec::new();
        // Each process gets some steps further than the last, and is killed at a random moment.
        for attempt in 0..6 {
            let lines = lines_of(&run) + rng.random_range(1..25);
            let first = arguments(&place.data, &run, more);
            let mut child = start(&if attempt == 0 { first } else { resume(&run) });
            wait_for_lines(&run, &mut child, lines);
            std::thread::sleep(Duration::from_micros(rng.random_range(0..8000)));
            child.kill().unwrap();
            kills.push(lines);
            if child.wait().unwrap().success() {
                break;
            }
        }
        assert_finished(&finish(&resume(&run)));
        assert_same(&run, &unbroken, &format!("{name}, seed {seed}, killed after {kills:?} lines"));
    }
}

#[test]
fn what_a_kill_during_a_write_leaves_is_passed_over() {
    let place = Place::new();
    let (unbroken, run) = (place.run("unbroken"), place.run("run"));
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    let mut child = start(&arguments(&place.data, &run, &[]));
    wait_for_lines(&run, &mut child, 20);
    child.kill().unwrap();
    child.wait().unwrap();

    // Half a checkpoint that was not renamed yet, half a line of metrics, half an event.
    let whole = fs::read(run.join("last.safetensors")).unwrap();
    fs::write(run.join(".ddtas-1-0.partial"), &whole[..whole.len() / 2]).unwrap();
    append(&run.join("metrics.jsonl"), b"{\"kind\":\"step\",\"st");
    append(&events_of(&run)[0], &[24, 0, 0]);
    assert_finished(&finish(&resume(&run)));
    assert_same(&run, &unbroken, "half-written files");
    assert_eq!(events_of(&run).len(), 2, "a run that goes on begins an event file of its own");

    // Nothing is left to do.
    let again = finish(&resume(&run));
    assert_finished(&again);
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(said.contains(&format!("has finished after {STEPS} steps")), "{said}");
    assert_same(&run, &unbroken, "resumed once more");
}

#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let place = Place::new();
    let (unbroken, run) = (place.run("unbroken"), place.run("run"));
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    let mut child = start(&arguments(&place.data, &run, &[]));
    wait_for_lines(&run, &mut child, 3);
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_file(run.join("last.safetensors")).unwrap();
    assert_finished(&finish(&resume(&run)));
    assert_same(&run, &unbroken, "no checkpoint");
}

#[test]
fn a_limit_on_file_size_costs_one_line_and_loses_nothing() {
    let place = Place::new();
    let (unbroken, run) = (place.run("unbroken"), place.run("run"));
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    let mut child = start(&arguments(&place.data, &run, &[]));
    wait_for_lines(&run, &mut child, 20);
    child.kill().unwrap();
    child.wait().unwrap();

    let checkpoint = fs::read(run.join("last.safetensors")).unwrap();
    let mut limited = Command::new("sh");
    // A limit of 32 KiB, whose signal the program ignores, so that writing fails as on a full disk.
    limited.args(["-c", "ulimit -f 64; exec \"$0\" \"$@\"", PROGRAM]);
    let output = limited.args(resume(&run)).output().unwrap();
    assert_one_line(&output, "last.safetensors", &run);
    assert!(fs::read(run.join("last.safetensors")).unwrap() == checkpoint, "the checkpoint was touched");
    assert_finished(&finish(&resume(&run)));
    assert_same(&run, &unbroken, "file size limit");
}

#[test]
fn a_run_that_cannot_begin_leaves_its_folder_to_another() {
    let place = Place::new();
    let (run, mut limited) = (place.run("run"), Command::new("sh"));
    let begin = arguments(&place.data, &run, &["--steps", "2"]);
    limited.args(["-c", "ulimit -f 0; exec \"$0\" \"$@\"", PROGRAM]);
    let output = limited.args(&begin).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.lines().last().unwrap().starts_with("ddtas-train: cannot write "), "{said}");
    assert_eq!(fs::read_dir(&run).unwrap().count(), 0);
    assert_finished(&finish(&begin));
}

#[test]
fn a_full_disk_costs_one_line_and_loses_nothing() {
    let place = Place::new();
    let (unbroken, disk, out) = (place.run("unbroken"), place.run("disk"), place.run("out"));
    fs::create_dir(&disk).unwrap();
    // A tmpfs in a new mount namespace is filled during the run, then emptied, then the run is resumed.
    let script = r#"
        set -e
        mount -t tmpfs -o size=16m none "$DISK" || exit 77
        "$PROGRAM" "$@" 2> "$OUT.stderr" > "$OUT.stdout" &
        run=$!
        while [ ! -e "$DISK/run/last.safetensors" ]; do sleep 0.01; done
        dd if=/dev/zero of="$DISK/filler" bs=4k 2> /dev/null || true
        code=0; wait $run || code=$?
        echo $code > "$OUT.code"
        rm "$DISK/filler"
        "$PROGRAM" --resume "$DISK/run" > /dev/null 2>&1
        cp -r "$DISK/run" "$OUT"
    "#;
    let long = ["--steps", "600"];
    let run = disk.join("run");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--map-root-user", "sh", "-c", script, "sh"]);
    command.args(arguments(&place.data, &run, &long));
    command.env("DISK", &disk).env("OUT", &out).env("PROGRAM", PROGRAM);
    let Ok(output) = command.output() else {
        println!("skipped: there is no unshare command");
        return;
    };
    if output.status.code() == Some(77) || !place.run("out.stderr").exists() {
        println!("skipped: no disk can be mounted here: {}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| fs::read_to_string(place.run(name)).unwrap();
    assert_eq!((read("out.code").trim(), read("out.stdout").trim()), ("1", ""), "{}", read("out.stderr"));
    let said = read("out.stderr");
    let line = said.lines().last().unwrap();
    assert!(line.starts_with("ddtas-train: cannot write") && line.contains("No space left"), "{said}");
    assert!(line.contains("ddtas-train --resume"), "{said}");
    assert_finished(&finish(&arguments(&place.data, &unbroken, &long)));
    assert_same(&out, &unbroken, "full disk");
}

#[test]
fn settings_that_a_run_depends_on_cannot_change_when_it_goes_on() {
    let place = Place::new();
    let run = place.run("run");
    let mut child = start(&arguments(&place.data, &run, &["--steps", "100000"]));
    wait_for_lines(&run, &mut child, 20);
    // The run has not ended yet.
    let running = || program(&resume(&run));
    assert_refused(&mut running(), "has not ended");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_refused(running().args(["--lambda", "0.8"]), "--resume: takes its settings from");
    assert_refused(running().args(["--lambda", "0.8"]), "leave out --lambda ");
    assert_refused(running().args(["--generator", "head"]), "leave out --generator ");
    assert_refused(running().args(["--seed", "0"]), "config.toml");
    assert_refused(&mut program(&resume(&place.run("none"))), "none");
    assert_refused(&mut program(&resume(&place.data)), "no config.toml");
    assert_refused(&mut program(&resume(&place.data.join("class00/0.png"))), "no config.toml");

    fs::remove_file(place.data.join("class01/3.png")).unwrap();
    assert_refused(&mut running(), "had 24 pictures of 4 classes, now 23 of 4");
    folder_of_pictures(&place.data, 8, 6);
    let whole = fs::read(run.join("last.safetensors")).unwrap();
    fs::write(run.join("last.safetensors"), &whole[..whole.len() / 2]).unwrap();
    assert_refused(&mut running(), "not a safetensors file");
    fs::copy(run.join("best.safetensors"), run.join("last.safetensors")).unwrap();
    assert_refused(&mut running(), "holds only weights");
    fs::write(run.join("last.safetensors"), &whole).unwrap();
    fs::write(run.join("metrics.jsonl"), "").unwrap();
    assert_refused(&mut running(), "holds 0 bytes");
}

#[test]
fn a_run_goes_on_to_more_steps_or_to_fewer() {
    let place = Place::new();
    let way = |steps| {
        [&["--schedule", "constant", "--warm-up", "0", "--memory-size", "40", "--steps"], &[steps][..]]
            .concat()
    };
    let of = |name: &str, steps| {
        let run = place.run(name);
        assert_finished(&finish(&arguments(&place.data, &run, &way(steps))));
        run
    };
    let on = |run: &Path, steps: &str| [resume(run), vec!["--steps".into(), steps.into()]].concat();
    let (unbroken, short, run) = (of("unbroken", "120"), of("short", "60"), of("run", "36"));
    let again = finish(&on(&run, "36"));
    assert!(String::from_utf8(again.stderr).unwrap().contains("has finished after 36 steps"));
    assert_refused(
        &mut program(&on(&run, "35")),
        "ddtas-train: --steps 35: the run has done 36: give 36 or more",
    );
    assert_refused(&mut program(&on(&run, "0")), "--steps 0 is out of range");
    fs::write(run.join("seconds.txt"), "1000.000 2000.000\n").unwrap();
    assert_finished(&finish(&on(&run, "120")));
    assert_same(&run, &unbroken, "36 steps, then 120");
    let seconds = fs::read_to_string(run.join("seconds.txt")).unwrap();
    let seconds: Vec<f64> = seconds.split_whitespace().map(|word| word.parse().unwrap()).collect();
    assert!(seconds[0] > 1000.0 && seconds[1] > 2000.0, "{seconds:?}");
    assert!(fs::read_to_string(run.join("config.toml")).unwrap().contains("\nsteps = 120\n"));
    assert!(fs::read_to_string(run.join("report.html")).unwrap().contains("trained, after 120 steps"));

    // Steps 12 to 36 are evaluated in every run, step 38 only where the run ends there.
    let run = of("between", "38");
    let evaluated = || records(&run).1.iter().map(|evaluation| evaluation.step).collect::<Vec<_>>();
    assert_eq!(evaluated(), [0, 12, 24, 36, 38]);
    let never = [on(&run, "120"), vec!["--checkpoint-every".into(), "0".into()]].concat();
    let mut child = start(&never);
    wait_for_lines(&run, &mut child, lines_of(&run) + 2);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_finished(&finish(&resume(&run)));
    assert!(!evaluated().contains(&38), "{:?}", evaluated());
    for file in ["metrics.jsonl", "last.safetensors"] {
        assert!(fs::read(run.join(file)).unwrap() == fs::read(unbroken.join(file)).unwrap(), "{file}");
    }

    let run = place.run("long");
    let mut child = start(&arguments(&place.data, &run, &way("100000")));
    wait_for_lines(&run, &mut child, 20);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_finished(&finish(&on(&run, "60")));
    assert_same(&run, &short, "100000 steps, then 60");
}

#[test]
fn unreadable_pictures_are_named_and_too_many_stop_the_run() {
    let place = Place::new();
    fs::write(place.data.join("class00/0.png"), b"not a picture").unwrap();
    let whole = fs::read(place.data.join("class02/1.png")).unwrap();
    fs::write(place.data.join("class02/1.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(place.data.join("class06/2.png"), b"").unwrap();
    let run = place.run("run");
    let output = finish(&arguments(&place.data, &run, &["--max-bad-images", "3"]));
    assert_finished(&output);
    let said = String::from_utf8(output.stderr).unwrap();
    for (picture, remedy) in [
        ("class00/0.png", "replaces it"),
        ("class02/1.png", "replaces it"),
        ("class06/2.png", "left out of the evaluation"),
    ] {
        let naming = said.lines().filter(|line| line.contains(picture)).collect::<Vec<_>>();
        assert!(naming.len() == 1 && naming[0].contains(remedy), "{picture}: {said}");
    }
    assert!(said.contains("1 test picture cannot be read"), "{said}");
    assert!(said.contains("unreadable training pictures were replaced"), "{said}");
    let mut strict = program(&arguments(&place.data, &place.run("strict"), &["--max-bad-images", "2"]));
    assert_refused(&mut strict, "3 pictures cannot be read, more than --max-bad-images 2");
    let mut strictest = program(&arguments(&place.data, &place.run("strictest"), &["--max-bad-images", "0"]));
    assert_refused(&mut strictest, "class06/2.png");
    // The run goes on with a higher limit.
    let more = [resume(&place.run("strict")), vec!["--max-bad-images".into(), "3".into()]].concat();
    assert_finished(&finish(&more));
    assert_same(&place.run("strict"), &run, "another --max-bad-images");
}

#[test]
fn a_class_with_one_picture_trains_and_is_told() {
    let place = Place::new();
    for picture in 1..6 {
        fs::remove_file(place.data.join(format!("class01/{picture}.png"))).unwrap();
        fs::remove_file(place.data.join(format!("class05/{picture}.png"))).unwrap();
    }
    let run = place.run("run");
    let output = finish(&arguments(&place.data, &run, &[]));
    assert_finished(&output);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("1 training class with one picture only, whose positives are the same"), "{said}");
    assert!(said.contains("1 test class with one picture only, without positives: class05"), "{said}");
    let (steps, evaluations) = records(&run);
    assert_eq!(steps.len(), STEPS);
    assert!(evaluations.iter().all(|evaluation| evaluation.recall.iter().all(|(_, recall)| *recall <= 1.0)));
}

#[test]
fn a_class_without_readable_pictures_stops_the_run_until_its_files_are_pictures() {
    let place = Place::new();
    let run = place.run("run");
    for picture in 0..6 {
        fs::write(place.data.join(format!("class02/{picture}.png")), b"not a picture").unwrap();
    }
    let output = finish(&arguments(&place.data, &run, &["--steps", "12"]));
    let said = String::from_utf8(output.stderr).unwrap();
    let line = said.lines().last().unwrap();
    assert!(line.contains("class class02 of the training split has no readable picture (6 tried)"), "{said}");
    assert!(
        line.contains("; put pictures in place of its files (")
            && line.contains("begin a new one); fix this"),
        "{said}"
    );
    let without = place.folder.path().join("class02");
    fs::rename(place.data.join("class02"), &without).unwrap();
    assert_refused(&mut program(&resume(&run)), "the training split has changed");
    fs::rename(&without, place.data.join("class02")).unwrap();
    folder_of_pictures(&place.data, 8, 6);
    assert_finished(&finish(&resume(&run)));
}

#[test]
fn a_run_that_diverges_names_the_weights_that_are_good() {
    let place = Place::new();
    let run = place.run("run");
    let rate = ["--learning-rate", "1e30", "--warm-up", "0"];
    let output = program(&arguments(&place.data, &run, &rate)).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let line = said.lines().last().unwrap();
    assert!(
        line.contains("lower --learning-rate") && line.contains("the best weights, after step 0"),
        "{said}"
    );
    let best = run.join("best.safetensors");
    assert!(line.contains(best.to_str().unwrap()), "{said}");
    let from_best = ["--init", best.to_str().unwrap()];
    assert_finished(&finish(&arguments(&place.data, &place.run("again"), &from_best)));
}
