//! Signals that stop a run, and signals that do not.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use runs::process::{
    PROGRAM, Place, arguments, assert_finished, assert_same, finish, resume, send, start, wait_for_lines,
};

/// Whether this process ignores hang-ups, as under `nohup`: then the program ignores them too.
fn hang_ups_are_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0) & 1 == 1;
    if ignored {
        println!("skipped: hang-ups are ignored here");
    }
    ignored
}

#[test]
fn signals_stop_a_run_that_then_goes_on_to_the_same_bytes() {
    let place = Place::new();
    let unbroken = place.run("unbroken");
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        if signal == "HUP" && hang_ups_are_ignored() {
            continue;
        }
        let run = place.run(signal);
        let mut child = start(&arguments(&place.data, &run, &["--checkpoint-every", "0", "--workers", "2"]));
        wait_for_lines(&run, &mut child, 17);
        send(signal, &child);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{said}");
        let last = said.lines().last().unwrap();
        assert!(last.starts_with("stopped after ") && last.ends_with(run.to_str().unwrap()), "{said}");
        assert!(last.contains("ddtas-train --resume"), "{said}");
        assert_finished(&finish(&[resume(&run), vec!["--workers".into(), "1".into()]].concat()));
        // config.toml differs in --workers and --checkpoint-every, the results do not.
        assert_same(&run, &unbroken, signal);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_second_signal_ends_the_program_at_once() {
    let place = Place::new();
    // Opening a pipe without a writer blocks forever.
    let run = place.run("run");
    fs::create_dir(&run).unwrap();
    assert!(Command::new("mkfifo").arg(run.join("config.toml")).status().unwrap().success());
    let mut child = start(&resume(&run));
    let until = |what: &str, met: &mut dyn FnMut() -> bool| {
        let begun = Instant::now();
        while !met() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let status = format!("/proc/{}/status", child.id());
    until("the program does not listen for signals", &mut || {
        let status = fs::read_to_string(&status).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        let (interrupt, terminate) = (1 << 1, 1 << 14);
        u64::from_str_radix(caught.trim(), 16).unwrap() & (interrupt | terminate) == interrupt | terminate
    });
    send("INT", &child);
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the first signal waits for the step to end");
    // The system may merge two signals that are close together, so they are repeated.
    until("the second signal is ignored", &mut || {
        send("INT", &child);
        std::thread::sleep(Duration::from_millis(50));
        child.try_wait().unwrap().is_some()
    });
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_second_hang_up_does_not_end_the_program_at_once() {
    if hang_ups_are_ignored() {
        return;
    }
    let place = Place::new();
    let (unbroken, run) = (place.run("unbroken"), place.run("run"));
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    let mut child = start(&arguments(&place.data, &run, &["--checkpoint-every", "0"]));
    wait_for_lines(&run, &mut child, 17);
    // A closing terminal also causes several hang-ups: by the shell and by the system.
    while child.try_wait().unwrap().is_none() {
        let _ = Command::new("kill").args(["-HUP", &child.id().to_string()]).stderr(Stdio::null()).status();
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(129), "{said}");
    assert!(said.lines().last().unwrap().starts_with("stopped after "), "{said}");
    assert_finished(&finish(&resume(&run)));
    assert_same(&run, &unbroken, "hung up more than once");
}

#[test]
fn a_run_under_nohup_outlives_a_hang_up() {
    let place = Place::new();
    let (unbroken, run) = (place.run("unbroken"), place.run("run"));
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    let mut child = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", PROGRAM])
        .args(arguments(&place.data, &run, &[]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_lines(&run, &mut child, 17);
    send("HUP", &child);
    assert_finished(&child.wait_with_output().unwrap());
    assert_same(&run, &unbroken, "nohup");
}

#[test]
fn a_signal_ends_the_unpacking_of_an_archive() {
    let place = Place::new();
    let (archive, run) = (place.run("set.tar"), place.run("run"));
    // Four gigabytes of zeros, which take seconds to write.
    let length = 4 << 30;
    let mut header = tar::Header::new_gnu();
    header.set_path("large").unwrap();
    header.set_size(length);
    header.set_cksum();
    fs::write(&archive, header.as_bytes()).unwrap();
    fs::File::options().write(true).open(&archive).unwrap().set_len(length + 512).unwrap();
    let mut child = Command::new(PROGRAM)
        .args([
            "--dataset",
            "sop",
            "--data-root",
            archive.to_str().unwrap(),
            "--output",
            run.to_str().unwrap(),
        ])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let partial = place.run("set.tar.unpacking/large");
    let begun = Instant::now();
    while !partial.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    send("INT", &child);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.lines().last().unwrap().starts_with("stopped while unpacking "), "{said}");
    let left = fs::read_dir(place.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, ["data", "set.tar"]);
}
