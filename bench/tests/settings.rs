//! Invalid settings: each is refused by a line that names it, before anything is written.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use assert_cmd::Command;
use clap::Args;
use ddtas_bench::ThroughputSettings;

#[test]
fn throughput_refuses_what_cannot_work_and_leaves_no_file() {
    let place = tempfile::tempdir().unwrap();
    let table = [
        ("--batch 0", "batch"),
        ("--batch 80,99999999999", "--batch 99999999999"),
        ("--batch 80,0", "--batch 0"),
        ("--dim 0", "dim"),
        ("--dim 65537", "dim"),
        ("--dim 1 --density late", "--density late at --dim 1: cannot be reached by any noise"),
        ("--references 0", "references"),
        ("--density 0.7", "--density 0.7"),
        ("--density early", "--density early"),
        ("--dtype f64", "--dtype"),
        ("--dtype bf16 --tf32", "--dtype bf16: --tf32 is for f32 rows"),
        ("--tf32", "TF32"),
        ("--backend toaster", "--backend"),
        ("--seconds=-1", "seconds"),
        ("--seconds NaN", "seconds"),
        ("--seed=-1", "--seed"),
        ("--embeddings nowhere", "nowhere"),
        ("--save-embeddings nowhere/rows.safetensors", "save-embeddings"),
        ("--save-embeddings .", "save-embeddings"),
        ("--plot nowhere/plot.svg", "plot"),
    ];
    for (arguments, flag) in table {
        let mut all: Vec<&str> = arguments.split(' ').collect();
        for usual in [
            "--batch 40",
            "--dim 8",
            "--density all",
            "--backend cpu",
            "--save-embeddings rows",
            "--plot p.svg",
        ] {
            let (name, value) = usual.split_once(' ').unwrap();
            let rows_from_elsewhere =
                arguments.contains("--embeddings") && ["--density", "--save-embeddings"].contains(&name);
            if !arguments.contains(name) && !rows_from_elsewhere {
                all.extend([name, value]);
            }
        }
        let mut program = Command::cargo_bin("ddtas-bench").unwrap();
        program.current_dir(place.path()).arg("throughput").args(&all);
        let output = program.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments}: {said}");
        assert!(
            said.contains(flag) && !said.contains("panicked"),
            "{arguments} does not name {flag}: {said}"
        );
        assert!(output.stdout.is_empty());
        assert_eq!(place.path().read_dir().unwrap().count(), 0, "{arguments} leaves something");
    }
    // The table tries a bad value of every setting, so that a new one needs a check.
    let command = ThroughputSettings::augment_args(clap::Command::new("test"));
    for flag in command.get_arguments().filter_map(clap::Arg::get_long).filter(|&flag| flag != "tf32") {
        let tried = |arguments: &str| arguments.split([' ', '=']).any(|word| word == format!("--{flag}"));
        assert!(table.iter().any(|row| tried(row.0)), "no bad value of --{flag} is tried");
    }
}
