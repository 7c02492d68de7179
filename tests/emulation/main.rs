//! Tests of the emulation itself: its instructions compute the right values, and it catches faults.
//!
//! Each test compiles a copy of `kernels/` with g++, most with a fault planted by replacing source text,
//! and runs it under many schedules.
//!
//! | file | where the faults are |
//! | --- | --- |
//! | `gradient.rs` | the gradient on Hopper |
//! | `sweep.rs` | Hopper's sweep, teams and preparation of rows |
//! | `retrieval.rs` | the pipeline of `mma.sync`, lists of retrieval |
//! | `races.rs` | races in any of these kernels and in the class order |

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

mod gradient;
mod races;
mod retrieval;
mod sweep;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// A fault: in `file`, a file of kernels/, the text `from` is replaced by `to`.
struct Fault {
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

/// Number of schedules of each program, and of one that a sanitizer slows down.
const SEEDS: &str = "96";
const SANITIZED_SEEDS: &str = "8";

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// The file of this name in a subfolder of a folder.
fn found(folder: &Path, name: &str) -> PathBuf {
    let folders =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let mut paths = folders.map(|inner| inner.join(name)).filter(|path| path.is_file());
    paths.next().unwrap_or_else(|| panic!("no {name} in {}", folder.display()))
}

fn compiler(folder: &Path) -> Command {
    let mut compiler = Command::new(std::env::var("CXX").unwrap_or_else(|_| "g++".into()));
    compiler.args(["-std=c++17", "-g1", "-Wno-unknown-pragmas", "-ffp-contract=off"]).current_dir(folder);
    compiler
}

fn compile(mut compiler: Command) {
    let built = compiler.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// The object files of the emulated machine for these flags, compiled once for all tests, without faults.
fn machine(flags: &[&str]) -> Vec<PathBuf> {
    static COMPILED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("machine{}", flags.concat()));
    let parts = ["machine", "instructions", "hopper", "roles", "fiber"];
    // A test that failed to compile it has reported why; the next one tries again.
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if !compiled.contains(&folder) {
        fs::create_dir_all(&folder).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emulation");
        let mut machine = compiler(&folder);
        // ThreadSanitizer does not watch the machine, which tells it how threads are ordered: races.h.
        machine.args(if flags == THREADS { &["-DDDTAS_EMULATION_RACES"] } else { flags });
        machine
            .args(["-O2", "-march=native", "-c"])
            .args(parts.map(|part| sources.join(format!("{part}.cpp"))));
        compile(machine);
        compiled.insert(folder.clone());
    }
    parts.map(|part| folder.join(format!("{part}.o"))).into()
}

/// Compiles tests/emulation/PROGRAM.cpp with a copy of the kernels, and runs it.
fn run<'a>(
    program: &str,
    kernels: &[&str],
    faults: impl IntoIterator<Item = &'a Fault>,
    flags: &[&str],
) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("kernels");
    copy_folder(&root.join("kernels"), &copy);
    for Fault { file, from, to } in faults {
        let path = found(&copy, file);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches(from).count(), 1, "the fault has one place in {file}: {from}");
        fs::write(&path, text.replace(from, to)).unwrap();
    }
    let binary = folder.path().join(program);
    let mut program_and_kernels = compiler(folder.path());
    program_and_kernels.arg("-O1").args(flags).arg("-I").arg(&copy).arg("-o").arg(&binary);
    program_and_kernels.args(machine(flags)).arg(root.join(format!("tests/emulation/{program}.cpp")));
    program_and_kernels.arg("-xc++").args(kernels.iter().map(|file| found(&copy, file)));
    compile(program_and_kernels);
    let mut program = Command::new(&binary);
    program.arg(if flags.is_empty() { SEEDS } else { SANITIZED_SEEDS });
    program.env("ASAN_OPTIONS", "detect_leaks=0").env("TSAN_OPTIONS", "halt_on_error=1");
    program.output().unwrap()
}

/// Output of the program with these faults, which must make it fail.
fn run_faulty(program: &str, kernels: &[&str], faults: &[Fault], flags: &[&str]) -> String {
    let output = run(program, kernels, faults, flags);
    let planted: Vec<_> = faults.iter().map(|fault| fault.from).collect();
    assert!(!output.status.success(), "the fault went unnoticed: {}", planted.join(", "));
    said(&output)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

const THREADS: &[&str] = &["-fsanitize=thread"];

/// Source text: the barrier of the pipeline; its comment makes it unique.
const BARRIER: &str =
    "block_sync();  // all threads' copies of this stage are complete, and the previous stage has been read";

/// Asserts that `message` reports wrong sums, a missing fence or wait, a hang, or a barrier's broken count.
fn assert_caught(message: &str) {
    let signs = [
        "want",
        "without a fence",
        "bulk stores nobody waited for",
        "a phase that nobody ends",
        "more arrivals at a barrier",
        "waits at a named barrier for threads that never come",
        "bulk copies nobody waited for",
    ];
    assert!(signs.iter().any(|sign| message.contains(sign)), "{message}");
}

#[test]
fn the_class_order_is_a_stable_sort() {
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let output = run("order", &["order.cu"], None, &flags);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn tensor_core_wrappers_agree_with_plain_products() {
    let output = run("instructions", &[], None, &[]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn kernels_without_a_fault_pass() {
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let output = run("retrieval", &["retrieval.cu", "retrieval_hopper.cu"], None, &flags);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn hopper_s_kernel_without_a_fault_passes() {
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    for (program, kernels) in [
        ("gradient", &["gradient_hopper.cu"] as &[_]),
        ("gradient_split", &["gradient_hopper_f32.cu"]),
        ("sweep", &["sweep_hopper.cu", "sweep.cu"]),
        ("prepare", &["prepare.cu"]),
    ] {
        let output = run(program, kernels, None, &flags);
        assert!(output.status.success(), "{program}: {}", said(&output));
    }
}
