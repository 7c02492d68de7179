//! The emulation itself: what its instructions compute, and that it catches faults.
//!
//! Each test compiles a copy of `kernels/` with g++, the faulty ones with a fault
//! planted in the pipeline that all passes share, or in Hopper's, and runs it under many schedules.

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// A text of a file of kernels/ and what a fault makes of it.
struct Fault {
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

/// Schedules that each program runs under.
const SEEDS: &str = "8";

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

/// The file of this name in a folder or in one of its subfolders.
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

/// The object files of the machine for programs of these flags, compiled once for all tests: no fault is planted in it.
fn machine(flags: &[&str]) -> Vec<PathBuf> {
    static COMPILED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("machine{}", flags.concat()));
    let parts = ["machine", "instructions", "hopper", "roles", "fiber"];
    // A test that failed here has said why, and the next one tries again.
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if !compiled.contains(&folder) {
        fs::create_dir_all(&folder).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emulation");
        let mut machine = compiler(&folder);
        // It is not watched for races, but says what orders the kernels' threads: races.h.
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
    program.arg(SEEDS).env("ASAN_OPTIONS", "detect_leaks=0").env("TSAN_OPTIONS", "halt_on_error=1");
    program.output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What the gradient's product on Hopper says with a fault in it.
fn run_faulty_hopper(file: &'static str, from: &'static str, to: &'static str) -> String {
    let output = run("gradient", &["gradient_hopper.cu"], Some(&Fault { file, from, to }), &[]);
    assert!(!output.status.success(), "the fault went unnoticed");
    said(&output)
}

/// The same with two faults that are one.
fn run_faulty_hopper_twice(faults: [Fault; 2]) -> String {
    let output = run("gradient", &["gradient_hopper.cu"], &faults, &[]);
    assert!(!output.status.success(), "the fault went unnoticed");
    said(&output)
}

/// What Hopper's sweep says with a fault in one of its files.
fn run_faulty_sweep_of(file: &'static str, from: &'static str, to: &'static str) -> String {
    let output = run("sweep", &["sweep_hopper.cu"], Some(&Fault { file, from, to }), &[]);
    assert!(!output.status.success(), "the fault went unnoticed");
    said(&output)
}

fn run_faulty_sweep(from: &'static str, to: &'static str) -> String {
    run_faulty_sweep_of("sweep_hopper.cu", from, to)
}

/// What Hopper's preparation of rows in two parts says with a fault in it.
fn run_faulty_prepare(file: &'static str, from: &'static str, to: &'static str) -> String {
    let output = run("prepare", &["prepare.cu"], Some(&Fault { file, from, to }), &[]);
    assert!(!output.status.success(), "the fault went unnoticed");
    said(&output)
}

/// In what it shares with retrieval.
fn run_faulty_team(from: &'static str, to: &'static str) -> String {
    run_faulty_sweep_of("ping_pong.cuh", from, to)
}

fn run_faulty(from: &'static str, to: &'static str, flags: &[&str]) -> String {
    let fault = Fault { file: "mma_tile.cuh", from, to };
    let output = run("retrieval", &["retrieval.cu"], Some(&fault), flags);
    assert!(!output.status.success(), "the fault went unnoticed");
    said(&output)
}

const THREADS: &[&str] = &["-fsanitize=thread"];

/// What ThreadSanitizer says of a kernel with a fault in it.
fn run_racing(program: &str, file: &'static str, from: &'static str, to: &'static str) -> String {
    let kernel = match program {
        "order" => "order.cu",
        "retrieval" => "retrieval.cu",
        "sweep" => "sweep_hopper.cu",
        _ => "gradient_hopper.cu",
    };
    let output = run(program, &[kernel], Some(&Fault { file, from, to }), THREADS);
    assert!(!output.status.success(), "the race went unnoticed");
    said(&output)
}

/// The barrier of the pipeline; its comment makes the text unique.
const BARRIER: &str =
    "block_sync();  // everybody's copies of this stage are there, and the stage before is read";

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
    for (program, kernel) in [
        ("gradient", "gradient_hopper.cu"),
        ("gradient_split", "gradient_hopper_f32.cu"),
        ("sweep", "sweep_hopper.cu"),
        ("prepare", "prepare.cu"),
    ] {
        let output = run(program, &[kernel], None, &flags);
        assert!(output.status.success(), "{program}: {}", said(&output));
    }
}

#[test]
fn a_team_that_waits_by_parity_alone_is_caught() {
    // It takes the phase before the other team's for its own stage's.
    let turn = "if (walk.tiles_before > 0) mbarrier_wait(&shared.order[team]";
    assert_caught(&run_faulty_team(turn, "if (false) mbarrier_wait(&shared.order[team]"));
}

#[test]
fn a_team_s_stage_that_is_given_back_too_early_is_caught() {
    let release = "is done\n                arrive_as_warp(&shared.empty[(stage + SWEEP_HOPPER_STAGES - 1) % SWEEP_HOPPER_STAGES]);";
    let early = "is done\n                arrive_as_warp(&shared.empty[stage]);";
    assert_caught(&run_faulty_team(release, early));
    // All of them, but before the products that read them are through.
    let wait = "wgmma_wait<1>();  // this product goes on, that before it is done";
    assert_caught(&run_faulty_team(wait, ""));
}

#[test]
fn a_row_tile_that_is_overwritten_is_caught() {
    // Of fewer parts than there are stages: products may still read it.
    let wait = "back <= filled; ++back) wait_until_empty(filled - back);";
    assert_caught(&run_faulty_team(wait, "false; ++back) wait_until_empty(filled - back);"));
    // A stage, and with it a part of the row tile.
    let wait = "if (fill >= SWEEP_HOPPER_STAGES) wait_until_empty(fill - SWEEP_HOPPER_STAGES);";
    assert_caught(&run_faulty_team(wait, ""));
}

#[test]
fn stages_of_split_rows_that_are_overwritten_are_caught() {
    let wait = "back <= stages.fill; ++back) wait_until_empty(stages.fill - back);";
    assert_caught(&run_faulty_team(wait, "false; ++back) wait_until_empty(stages.fill - back);"));
    let wait = "if (stages.fill >= stages.count) wait_until_empty(stages.fill - stages.count);";
    assert_caught(&run_faulty_team(wait, ""));
    // The rows' low parts are read by the products that the columns' high ones wait for.
    let release = "arrive_as_warp(&shared.empty[low_rows]);";
    assert_caught(&run_faulty_team(release, "arrive_as_warp(&shared.empty[high_columns]);"));
}

#[test]
fn values_staged_over_those_that_are_still_being_stored_are_caught() {
    let wait = "if (windows > 0) mbarrier_wait(&shared.stored[team], (windows - 1) % 2);";
    assert_caught(&run_faulty_sweep(wait, ""));
    // The team waits, but for a store that may still be reading.
    let read = "bulk_store_wait_read();\n        }\n        mbarrier_arrive(&shared.stored[team]);";
    assert_caught(&run_faulty_sweep(read, "}\n        mbarrier_arrive(&shared.stored[team]);"));
}

#[test]
fn a_bulk_store_without_a_proxy_fence_is_caught() {
    assert_caught(&run_faulty_sweep("fence_proxy_async();\n            warp_sync();", "warp_sync();"));
}

#[test]
fn a_bulk_store_before_the_team_has_staged_all_is_caught() {
    assert_caught(&run_faulty_sweep(
        "for (Barrier &barrier : shared.filled) mbarrier_init(&barrier, kTeamWarps);",
        "for (Barrier &barrier : shared.filled) mbarrier_init(&barrier, 1);",
    ));
}

#[test]
fn a_block_that_ends_before_its_bulk_stores_have_been_read_is_caught() {
    let read = "bulk_store_wait_read();\n        }\n        mbarrier_arrive(&shared.stored[team]);";
    let at_once = "}\n        mbarrier_arrive(&shared.stored[team]);\n        if (windows == 0) bulk_store_wait_read();";
    let message = run_faulty_sweep(read, at_once);
    assert!(message.contains("left with bulk stores nobody waited for"), "{message}");
}

#[test]
fn a_team_s_missing_barrier_is_named_by_the_thread_sanitizer() {
    let bounds = "            warp_sync();\n            sync();\n        });";
    let without = "            warp_sync();\n        });";
    let message = run_racing("sweep", "sweep_hopper.cu", bounds, without);
    assert!(message.contains("data race") && message.contains("sweep_hopper.cu"), "{message}");
}

/// Where the gradient on Hopper waits for the rows that a bulk copy brings.
const LANDED: &str = "mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));\n            warp_sync();\n            unsigned char *matrix";

/// The faults that a pipeline of roles invites: each gives wrong sums, stops, or breaks a barrier's count.
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
fn reading_before_a_bulk_copy_has_landed_is_caught() {
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", LANDED, "unsigned char *matrix"));
}

#[test]
fn waiting_for_the_wrong_phase_is_caught() {
    let parity = "return fill / kStageCount<Shared> % 2;";
    assert_caught(&run_faulty_hopper("hopper_roles.cuh", parity, "return fill % 2;"));
}

#[test]
fn a_missing_proxy_fence_is_caught() {
    let fenced = "fence_proxy_async();\n        warp_sync();\n        arrive_as_warp(&shared.built";
    let message = run_faulty_hopper("gradient_hopper.cu", fenced, "arrive_as_warp(&shared.built");
    assert!(message.contains("a product reads what a thread has written without a fence"), "{message}");
}

#[test]
fn a_proxy_fence_of_one_lane_for_all_is_caught() {
    let fenced = "fence_proxy_async();\n        warp_sync();\n        arrive_as_warp(&shared.built";
    let one = "warp_sync();\n        if (lane_index() == 0) fence_proxy_async();\n        warp_sync();\n        arrive_as_warp(&shared.built";
    let message = run_faulty_hopper("gradient_hopper.cu", fenced, one);
    assert!(message.contains("a product reads what a thread has written without a fence"), "{message}");
}

#[test]
fn a_bulk_copy_over_what_was_written_without_a_fence_is_caught() {
    let fenced = "    fence_proxy_async();  // bulk copies fill the stage next\n    warp_sync();";
    let message = run_faulty_hopper("hopper_roles.cuh", fenced, "    warp_sync();");
    assert!(message.contains("a bulk copy over what a thread has written without a fence"), "{message}");
}

#[test]
fn a_missing_fence_of_global_memory_is_caught() {
    let fence = "fence_proxy_async_all();";
    // None, one of shared memory alone, and one of some threads for all.
    for to in
        ["", "fence_proxy_async();", "if (lane_index() == 0) fence_proxy_async_all();\n    warp_sync();"]
    {
        let message = run_faulty_prepare("prepare.cu", fence, to);
        assert!(message.contains("want") || message.contains("without a fence"), "{to}: {message}");
    }
}

#[test]
fn reading_global_memory_after_a_wait_for_what_a_bulk_store_has_read_is_caught() {
    let read = "            bulk_store_wait_read();\n";
    let back = "            bulk_store_wait_read();
            if (window == 0 && pairs.pool_words[segment] != shared.masks[team][0]) pairs.tile_counts[0] = NO_ROW;\n";
    let message = run_faulty_sweep(read, back);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn products_without_a_wgmma_fence_are_caught() {
    let fenced = "k_major_descriptor(weights);\n    wgmma_fence();";
    let message = run_faulty_hopper("gradient_hopper.cu", fenced, "k_major_descriptor(weights);");
    assert!(message.contains("a group of products without a wgmma_fence()"), "{message}");
}

#[test]
fn a_barrier_in_a_stage_and_one_begun_twice_are_caught() {
    let barrier = "reinterpret_cast<Barrier *>(bytes + stage_bytes)}";
    let within = "reinterpret_cast<Barrier *>(bytes + stage_bytes) - 1}";
    let message = run_faulty_prepare("prepare.cu", barrier, within);
    assert!(message.contains("a bulk copy over what a thread has written"), "{message}");
    let once = "        if (thread_index() != 0) return;\n        for (int stage = 0";
    let message = run_faulty_prepare("wgmma_tile.cuh", once, "        for (int stage = 0");
    assert!(message.contains("a barrier is begun again"), "{message}");
}

#[test]
fn a_wait_that_may_come_two_phases_late_is_caught() {
    // The stage is filled again just before: a warp that is held up between the two finds the phase after the next.
    let fault = Fault {
        file: "gradient_hopper_f32.cu",
        from: "walk.rows_fills - 1 : RolesF32::stages - 1;",
        to: "walk.rows_fills - 1 : RolesF32::stages;",
    };
    let output = run("gradient_split", &["gradient_hopper_f32.cu"], Some(&fault), &[]);
    assert!(said(&output).contains("a phase that nobody ends"), "{}", said(&output));
}

#[test]
fn writing_over_what_a_product_reads_is_caught() {
    // M is given back before its product is through.
    let wait = "wgmma_wait<1>();  // this product goes on, that before it is done";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", wait, ""));
}

#[test]
fn copying_over_rows_that_are_read_is_caught() {
    let wait = "if (fill >= GRADIENT_HOPPER_STAGES) mbarrier_wait(empty_of";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", wait, "if (false) mbarrier_wait(empty_of"));
}

#[test]
fn a_stage_that_is_given_back_too_early_is_caught() {
    let release = "if (open) arrive_as_warp(empty_of(shared, fill - 1));";
    let early = "if (open) arrive_as_warp(empty_of(shared, fill));";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", release, early));
}

#[test]
fn filling_a_matrix_before_it_is_given_back_is_caught() {
    // One matrix fewer: zeros land while the product before the last reads it.
    let file = "hopper_roles.cuh";
    assert_caught(&run_faulty_hopper_twice([
        Fault { file, from: "return index % Roles::matrices;", to: "return index % 2;" },
        Fault { file, from: "return index / Roles::matrices % 2;", to: "return index / 2 % 2;" },
    ]));
}

#[test]
fn faults_in_the_gradient_of_split_rows_are_caught() {
    let faults = [
        // Stages are given back before the product that reads them is through.
        "wgmma_wait<1>();  // this product goes on, that before it is done",
        // Stages, and then a matrix, are filled again before they are given back.
        "if (fill >= RolesF32::stages) mbarrier_wait(empty_of(shared, fill), parity_of(shared, fill - RolesF32::stages));",
        "if (first > 0) mbarrier_wait(empty_of(shared, first - 1), parity_of(shared, first - 1));",
        // Weights are stored before zeros have landed, and products read before bulk copies have.
        "mbarrier_wait(&shared.zeroed[work.matrix()], work.matrix_parity());",
        "mbarrier_wait(&shared.built[work.matrix()], work.matrix_parity());",
    ];
    for from in faults {
        let fault = Fault { file: "gradient_hopper_f32.cu", from, to: "" };
        let output = run("gradient_split", &["gradient_hopper_f32.cu"], Some(&fault), &[]);
        assert!(!output.status.success(), "the fault went unnoticed: {from}");
        assert_caught(&said(&output));
    }
}

#[test]
fn a_wait_by_parity_alone_is_caught() {
    // One barrier for both halves of a recomputed tile: the phase that is waited for may be over twice
    // before somebody looks, and its parity then says that it is still to come.
    let message = run_faulty_hopper_twice([
        Fault {
            file: "gradient_hopper.cu",
            from: "recompute_values<Precision>(shared, &shared.valued[part],",
            to: "recompute_values<Precision>(shared, &shared.valued[0],",
        },
        Fault {
            file: "hopper_roles.cuh",
            from: "mbarrier_wait(&my.shared.valued[part], work.recomputed % 2);",
            to: "mbarrier_wait(&my.shared.valued[0], part);",
        },
    ]);
    assert!(message.contains("a phase that nobody ends") || message.contains("want"), "{message}");
}

#[test]
fn an_aligned_instruction_after_a_wait_without_a_warp_sync_is_caught() {
    let synced = "warp_sync();\n            unsigned char *matrix";
    let message = run_faulty_hopper("gradient_hopper.cu", synced, "unsigned char *matrix");
    assert!(message.contains("lanes are apart, no warp_sync() before wgmma_fence"), "{message}");
}

#[test]
fn a_barrier_of_the_block_after_a_wait_of_one_lane_is_caught() {
    let begun = "for (Barrier &barrier : shared.valued) mbarrier_init(&barrier, kMmaWarps);";
    let message = run_faulty_hopper(
        "hopper_roles.cuh",
        begun,
        "for (Barrier &barrier : shared.valued) mbarrier_init(&barrier, kMmaWarps);
        mbarrier_wait(&shared.valued[0], 1);",
    );
    assert!(message.contains("lanes are apart, no warp_sync() before block_sync"), "{message}");
}

#[test]
fn a_named_barrier_of_too_many_threads_is_caught() {
    let read = "named_sync(kBuildBarrier, kBuildThreads);  // the values are read";
    let message = run_faulty_hopper(
        "hopper_roles.cuh",
        read,
        "named_sync(kBuildBarrier, kBuildThreads + 32);  // the values are read",
    );
    let caught = message.contains("a named barrier") || message.contains("a phase that nobody ends");
    assert!(caught, "{message}");
}

#[test]
fn a_named_barrier_that_is_missing_is_caught() {
    let read = "named_sync(kBuildBarrier, kBuildThreads);  // the values are read";
    assert_caught(&run_faulty_hopper("hopper_roles.cuh", read, ""));
}

#[test]
fn storing_before_zeros_have_landed_is_caught() {
    let wait = "mbarrier_wait(&shared.zeroed[work.matrix()], work.matrix_parity());";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", wait, ""));
}

#[test]
fn more_registers_than_a_block_has_are_caught() {
    let message = run_faulty_hopper("gradient_hopper.cu", "mma_registers = 200", "mma_registers = 208");
    assert!(message.contains("more registers than the block has"), "{message}");
}

#[test]
fn a_wrong_swizzle_is_caught() {
    let place = "swizzled(row, byte % STAGE_BYTES / 16)";
    let message = run_faulty_hopper("weight_tile.cuh", place, "swizzled(row ^ 1, byte % STAGE_BYTES / 16)");
    assert!(message.contains("want"), "{message}");
    // The last matrix's last row goes where the barriers are.
    let message = run_faulty_hopper("weight_tile.cuh", place, "swizzled(row + 1, byte % STAGE_BYTES / 16)");
    assert!(message.contains("somebody has written over a barrier"), "{message}");
}

#[test]
fn a_descriptor_of_the_wrong_stride_is_caught() {
    let panels = "mn_major_descriptor(stage_of(shared, fill), kStagePanel)";
    let message = run_faulty_hopper(
        "gradient_hopper.cu",
        panels,
        "mn_major_descriptor(stage_of(shared, fill), kStagePanel / 2)",
    );
    assert!(message.contains("want"), "{message}");
}

#[test]
fn a_missing_barrier_is_caught() {
    let message = run_faulty(BARRIER, "", &[]);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn reading_before_the_wait_is_caught() {
    // The newest stage may be under way, the one that is read must not.
    let message = run_faulty("cp_async_wait<stage_count - 2>()", "cp_async_wait<stage_count - 1>()", &[]);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn copying_over_a_stage_that_is_read_is_caught() {
    let fault = "if (index + stage_count - 1 < count) copy(index + stage_count - 1);";
    let message = run_faulty(fault, "if (index + stage_count < count) copy(index + stage_count);", &[]);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn a_read_past_the_rows_is_caught_by_the_address_sanitizer() {
    let fault = "cp_async(to + i * kCopyBytes, from + i * kCopyBytes)";
    let message = run_faulty(
        fault,
        "cp_async(to + i * kCopyBytes, from + i * kCopyBytes + STAGE_BYTES)",
        &["-fsanitize=address"],
    );
    assert!(message.contains("heap-buffer-overflow"), "{message}");
}

#[test]
fn the_thread_sanitizer_sees_no_race_in_kernels_without_a_fault() {
    let programs: [(_, &[_]); 5] = [
        ("retrieval", &["retrieval.cu", "retrieval_hopper.cu"]),
        ("gradient", &["gradient_hopper.cu"]),
        ("gradient_split", &["gradient_hopper_f32.cu"]),
        ("sweep", &["sweep_hopper.cu"]),
        ("order", &["order.cu"]),
    ];
    for (program, kernels) in programs {
        let output = run(program, kernels, None, THREADS);
        assert!(output.status.success(), "{program}: {}", said(&output));
        assert!(!said(&output).contains("data race"), "{program}: {}", said(&output));
    }
}

#[test]
fn faults_in_the_lists_of_retrieval_are_caught() {
    let faults = [
        // Keys are read before the pairs before are in order, or before all are there.
        ("retrieval.cu", "            block_sync();  // pairs are in order", ""),
        ("retrieval.cu", "block_sync();  // all keys are there", ""),
        // Two warps, and two teams, append to one list.
        ("retrieval.cu", "lists(p, warp_index() % 2);", "lists(p, 0);"),
        ("retrieval_hopper.cu", "lists(p, team.team);", "lists(p, 0);"),
    ];
    for (file, from, to) in faults {
        let kernels = ["retrieval.cu", "retrieval_hopper.cu"];
        let kernels = if file == "retrieval.cu" { &kernels[..1] } else { &kernels };
        let output = run("retrieval", kernels, Some(&Fault { file, from, to }), &[]);
        assert!(!output.status.success(), "the fault went unnoticed: {from}");
        let said = said(&output);
        assert!(said.contains("want") || said.contains("divergent barrier"), "{from}: {said}");
    }
}

#[test]
fn a_plain_access_that_races_another_block_is_caught_by_the_thread_sanitizer() {
    // Blocks of the emulation run one after the other: the count is right all the same.
    let message = run_racing("order", "order.cu", "atomic_add(p.valid, in_run);", "*p.valid += in_run;");
    assert!(message.contains("data race") && message.contains("order.cu"), "{message}");
}

#[test]
fn a_race_within_a_block_is_named_by_the_thread_sanitizer() {
    let read = "named_sync(kBuildBarrier, kBuildThreads);  // the values are read";
    let message = run_racing("gradient", "hopper_roles.cuh", read, "");
    assert!(message.contains("data race") && message.contains("gradient_hopper.cu"), "{message}");
}

#[test]
fn an_arrival_that_is_missing_between_roles_is_named_by_the_thread_sanitizer() {
    // M is built again without waiting for what else its builders wrote and read.
    let wait = "mbarrier_wait(&my.shared.valued[part], work.recomputed % 2);";
    let message = run_racing("gradient", "hopper_roles.cuh", wait, "");
    assert!(message.contains("data race") && message.contains("gradient_hopper.cu"), "{message}");
}

#[test]
fn an_asynchronous_copy_that_races_is_named_by_the_thread_sanitizer() {
    // Neither the copy nor what reads it is an access of compiled code: the emulation tells of both.
    let message = run_racing("retrieval", "mma_tile.cuh", BARRIER, "");
    assert!(message.contains("data race") && message.contains("mma_tile.cuh"), "{message}");
}

#[test]
fn divergent_barriers_stop_with_a_message() {
    let message =
        run_faulty(BARRIER, "if (thread_index() < TILE) { block_sync(); } else { \n block_sync(); }", &[]);
    assert!(message.contains("divergent barrier"), "{message}");
    assert!(message.contains("mma_tile.cuh"), "{message}");
}

#[test]
fn a_divergent_warp_stops_with_a_message() {
    let message = run_faulty(BARRIER, "block_sync(); if (lane_index() < 16) { warp_sync(); }", &[]);
    assert!(message.contains("warp"), "{message}");
}
