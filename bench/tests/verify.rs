//! The program `ddtas-bench verify`: exit codes and messages.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod patched;

use assert_cmd::Command;
use ddtas::backend::{AutoDevice, auto};
use patched::patch;

/// A quick case.
const CASE: &str = "../tests/golden/one_class.safetensors";

fn verify(arguments: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("ddtas-bench").unwrap().arg("verify").args(arguments).assert()
}

/// The only line that a failed run on `device` prints.
fn complaint(device: &str, arguments: &[&str]) -> String {
    let output = verify(&[&["--device", device], arguments].concat()).failure().get_output().clone();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn the_golden_cases_pass() {
    let output = verify(&["--backend", "cpu", "../tests/golden"]).success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("12 of 12 cases passed on cpu (bound 1e-5)"), "{text}");
}

#[test]
fn the_default_is_a_gpu_if_there_is_one_and_says_why_not() {
    let output = verify(&["--json", CASE]).success().get_output().clone();
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let AutoDevice { spec, reason } = auto();
    assert_eq!(rows[0]["backend"], spec.to_string());
    let said = reason.map_or(String::new(), |reason| format!("computing on {spec}: {reason}\n"));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), said);
}

#[test]
fn the_cpu_refuses_tf32() {
    let text = complaint("cpu", &["--tf32", CASE]);
    assert!(text.contains("the CPU does not multiply in TF32"), "{text}");
}

#[cfg(feature = "emulated")]
#[test]
fn tf32_products_are_those_of_the_rounded_rows() {
    let output =
        verify(&["--backend", "emulated", "--tf32", "../tests/golden"]).success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("12 of 12 cases passed on emulated (bound 1e-3)"), "{text}");
}

#[test]
fn json_is_an_array_with_an_object_a_case() {
    let output = verify(&["--json", CASE]).success().get_output().clone();
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["case"], "one_class");
    assert_eq!(rows[0]["passed"], true);
    assert!(rows[0]["gradient"].is_number());
}

#[test]
fn a_case_with_a_wrong_expectation_fails() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.safetensors");
    std::fs::copy("../tests/golden/paper_batch80.safetensors", &path).unwrap();
    patch(&path, "expected.count_neg", 0, &[0xff]);
    let output = verify(&[path.to_str().unwrap()]).failure().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("count_neg[0]") && text.contains("0 of 1 cases passed"), "{text}");

    // Half of the file is no safetensors file.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(complaint("cpu", &[path.to_str().unwrap()]).contains("not a safetensors file"));
}

#[test]
fn expectations_that_no_answer_can_meet_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let odd = |tensor: &str, at: usize, value: &[u8]| {
        std::fs::copy(CASE, &path).unwrap();
        patch(&path, tensor, at, value);
        complaint("cpu", &[path.to_str().unwrap()])
    };
    for tensor in ["expected.dloss_dlambda_pos", "expected.dloss_dlambda_neg", "expected.min_pos"] {
        let line = odd(tensor, 0, &f64::NAN.to_le_bytes());
        assert!(line.contains(&format!("`{tensor}` holds a NaN")), "{line}");
    }
    // The fifth byte of a count adds 2^32.
    let line = odd("expected.count_pos", 4, &[1]);
    assert!(line.contains("`expected.count_pos` holds 42949"), "{line}");
}

#[test]
fn device_is_another_word_for_backend() {
    for device in ["cpu", "auto"] {
        verify(&["--device", device, CASE]).success();
    }
    // No machine has this GPU, and one line says so.
    let text = complaint("cuda:4096", &[CASE]);
    assert!(text.contains("cuda"), "{text}");
}

#[test]
fn what_cannot_be_read_is_named() {
    assert!(complaint("cpu", &["no/such/folder"]).contains("no/such/folder"));
    assert!(complaint("cpu", &["Cargo.toml"]).contains("Cargo.toml: not a safetensors file"));
    let empty = tempfile::tempdir().unwrap();
    assert!(complaint("cpu", &[empty.path().to_str().unwrap()]).contains("no .safetensors file"));
}
