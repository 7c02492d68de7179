//! The program `ddtas-bench compare`; also the version of `ddtas-bench`.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use serde_json::{Value, json};

fn row(batch: usize, time_ms: f64) -> Value {
    json!({
        "batch": batch, "references": null, "dim": 512, "dtype": "f32", "tf32": false, "backend": "cpu", "threads": 2,
        "density": "late", "noise": 0.5, "mined_share": 0.01, "time_ms": time_ms, "time_best_ms": time_ms * 0.9,
        "time_spread_ms": time_ms * 0.06, "gflops": 1.0, "floor_share": 2.0, "peak_extra_bytes": 1000 * batch,
    })
}

fn write(path: &Path, rows: &[Value]) {
    std::fs::write(path, Value::from(rows).to_string()).unwrap();
}

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ddtas-bench").unwrap();
    command.args(arguments);
    command
}

#[test]
fn ratios_have_their_spread_and_other_shapes_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let [first, second] = ["a.json", "b.json"].map(|name| place.path().join(name));
    write(&first, &[row(80, 4.0), row(1280, 30.0)]);
    let mut gpu = row(1280, 15.0);
    gpu["backend"] = "cuda:0".into();
    write(&second, &[row(80, 5.0), gpu]);
    let paths = [first.to_str().unwrap(), second.to_str().unwrap()];
    let output = bench(&[&["compare"], &paths[..]].concat()).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].contains("first, ms") && lines.len() == 4, "{table}");
    // Each time has a relative error of 0.06 / 2, so the ratio has 1.25 * 0.03 * sqrt(2).
    assert!(
        lines[1].contains("1.250") && lines[1].contains("±0.053") && lines[2].contains("0.500"),
        "{table}"
    );
    let json = bench(&[&["compare", "--json"], &paths[..]].concat()).output().unwrap();
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["ratios"][1]["time"], 0.5);
    assert_eq!(json["ratios"][0]["memory"], 1.0);

    let mut other = row(1280, 1.0);
    other["dim"] = 64.into();
    for (rows, what) in [
        (vec![row(80, 1.0), other], "row 2: D is 64, in "),
        (vec![row(80, 1.0)], "has 1 rows"),
        (vec![], "holds no measurement"),
        (vec![json!({"batch": 1})], "not what `throughput --json` prints"),
    ] {
        write(&second, &rows);
        let output = bench(&[&["compare"], &paths[..]].concat()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains(what) && said.contains("b.json") && said.lines().count() == 1, "{said}");
    }
}

/// Runs `throughput` for one row, as briefly as possible.
fn measured(flag: &str) -> Output {
    let small = ["--batch", "40", "--dim", "8", "--density", "all", "--seconds", "0", "--backend", "cpu"];
    bench(&[&["throughput", flag], &small[..]].concat()).output().unwrap()
}

#[test]
fn what_throughput_prints_can_be_compared() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run.json");
    let output = measured("--json");
    std::fs::write(&path, output.stdout).unwrap();
    let path = path.to_str().unwrap();
    let output = bench(&["compare", path, path]).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().lines().nth(1).unwrap().contains("1.000"));
}

#[test]
fn the_version_names_the_instruction_set_and_a_table_can_be_printed_quietly() {
    let output = bench(&["--version"]).output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("instruction set: "));
    let output = measured("--quiet");
    assert!(output.stderr.is_empty() && !output.stdout.is_empty());
}
