//! The program `ddtas-bench throughput`: figures, files, exit codes and messages.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod patched;

use std::path::Path;

use assert_cmd::Command;
use patched::patch;
use serde_json::Value;

fn throughput(arguments: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = Command::cargo_bin("ddtas-bench").unwrap();
    command.arg("throughput").args(arguments);
    // The tests are for the CPU, also on a machine with a GPU.
    if !arguments.contains(&"--backend") {
        command.args(["--backend", "cpu"]);
    }
    if !arguments.contains(&"--seconds") {
        command.args(["--seconds", "0"]);
    }
    command.assert()
}

fn json(arguments: &[&str]) -> Vec<Value> {
    let output = throughput(&[arguments, &["--json"]].concat()).success().get_output().clone();
    assert!(output.stderr.is_empty());
    serde_json::from_slice::<Value>(&output.stdout).unwrap().as_array().unwrap().clone()
}

/// The only line that a failed run prints.
fn complaint(arguments: &[&str]) -> String {
    let output = throughput(&[arguments, &["--json"]].concat()).failure().get_output().clone();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(output.stdout.is_empty());
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_row_for_every_combination() {
    let rows = json(&["--batch", "60,200", "--dim", "16,33", "--density", "middle,0.2"]);
    assert_eq!(rows.len(), 8);
    for row in &rows {
        assert_eq!((&row["backend"], &row["dtype"]), (&"cpu".into(), &"f32".into()));
        assert_eq!(row["tf32"], false);
        for figure in ["time_ms", "gflops", "floor_share", "noise", "peak_extra_bytes"] {
            assert!(row[figure].as_f64().unwrap() > 0.0, "{figure}: {row}");
        }
        assert!(row["time_spread_ms"].as_f64().unwrap() >= 0.0);
        let wanted = if row["density"] == "middle" { 0.08 } else { 0.2 };
        if row["batch"] == 200 {
            let share = row["mined_share"].as_f64().unwrap();
            assert!((share / wanted - 1.0).abs() < 0.5, "{row}");
        }
    }
}

#[test]
fn all_mines_nearly_everything_in_every_type() {
    for dtype in ["f32", "f16", "bf16"] {
        let rows = json(&["--batch", "100", "--dim", "24", "--density", "all", "--dtype", dtype]);
        assert!(rows[0]["mined_share"].as_f64().unwrap() > 0.99, "{}", rows[0]);
        assert_eq!(rows[0]["dtype"], dtype);
    }
}

#[test]
fn memory_counts_what_the_backend_allocates() {
    let bytes = |batch| {
        json(&["--batch", batch, "--dim", "64", "--density", "late"])[0]["peak_extra_bytes"].as_u64().unwrap()
    };
    // At least two packed copies of the rows, and far less than B x B floats.
    let extra = bytes("2000");
    assert!((2 * 2000 * 64 * 4..2000 * 2000 * 4).contains(&extra), "{extra}");
    assert!(bytes("100") < extra);
}

#[test]
fn saved_embeddings_give_the_same_batch_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.safetensors");
    for form in [&[][..], &["--references", "130"][..]] {
        let drawn = ["--batch", "90", "--dim", "20", "--density", "all", "--save-embeddings", text(&path)];
        let first = json(&[&drawn[..], form].concat());
        let again = json(&[&["--embeddings", text(&path), "--batch", "90", "--dim", "20"], form].concat());
        for field in ["batch", "references", "dim", "density", "noise", "mined_share"] {
            assert_eq!(first[0][field], again[0][field], "{field}");
        }
        assert_eq!((&first[0]["seed"], &again[0]["seed"]), (&0.into(), &Value::Null));
        assert_eq!(again.len(), 1);
    }
}

#[test]
fn a_table_with_progress_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plot.svg");
    let arguments = ["--batch", "40,80", "--dim", "16", "--density", "start", "--plot", text(&path)];
    let output = throughput(&arguments).success().get_output().clone();
    let (table, progress) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(table.lines().count(), 4, "{table}");
    assert_eq!(progress.lines().collect::<Vec<_>>(), ["1 of 2: 40 x 16, start", "2 of 2: 80 x 16, start"]);
    assert!(table.trim_end().ends_with(", seed 0"), "{table}");
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.contains("start, D = 16") && svg.contains("extra memory, MB"));
}

#[test]
fn settings_that_do_not_go_together_are_named() {
    assert!(complaint(&["--save-embeddings", "rows.safetensors"]).contains("one --batch"));
    let small = ["--batch", "8", "--dim", "8", "--density", "late", "--tf32"];
    assert!(complaint(&small).contains("the CPU does not multiply in TF32"));
    assert!(
        complaint(&["--backend", "cuda:0", "--batch", "8", "--dim", "8", "--density", "late"])
            .contains("cuda")
    );
}

#[test]
fn files_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.safetensors");
    assert!(complaint(&["--embeddings", text(&path)]).contains("rows.safetensors"));
    std::fs::write(&path, b"no tensors").unwrap();
    assert!(complaint(&["--embeddings", text(&path)]).contains("not a safetensors file"));

    json(&["--batch", "10", "--dim", "4", "--density", "0.2", "--save-embeddings", text(&path)]);
    for (flag, given) in [("--batch", "11"), ("--dim", "5"), ("--references", "10")] {
        let line = complaint(&["--embeddings", text(&path), flag, given]);
        assert!(line.contains("the file has"), "{line}");
    }
    assert!(
        complaint(&["--embeddings", text(&path), "--batch", "10,20"])
            .contains("--batch 10,20: --embeddings goes with one")
    );

    let before = std::fs::read(&path).unwrap();
    for flag in ["--embeddings", "--save-embeddings"] {
        let line = complaint(&[flag, text(&path), "--plot", text(&path)]);
        assert!(line.contains(&format!("is also the file of {flag}")), "{line}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);

    // A value that makes the first row longer than a unit row.
    patch(&path, "embeddings", 0, &2f32.to_le_bytes());
    let line = complaint(&["--embeddings", text(&path)]);
    assert!(line.contains("row 0 of the anchors has L2 norm"), "{line}");

    // A file that holds no tensors.
    assert!(complaint(&["--embeddings", "../tests/golden/README.md"]).contains("README.md"));
}
