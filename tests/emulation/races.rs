//! Races found by ThreadSanitizer, to which each thread of a block is a thread.

use super::{BARRIER, Fault, THREADS, run, run_faulty, said};

/// ThreadSanitizer's output for a kernel with a fault.
fn run_racing(program: &str, file: &'static str, from: &'static str, to: &'static str) -> String {
    let kernel = match program {
        "order" => "order.cu",
        "retrieval" => "retrieval.cu",
        "sweep" => "sweep_hopper.cu",
        _ => "gradient_hopper.cu",
    };
    run_faulty(program, &[kernel], &[Fault { file, from, to }], THREADS)
}

#[test]
fn a_team_s_missing_barrier_is_named_by_the_thread_sanitizer() {
    let bounds = "            warp_sync();\n            sync();\n        });";
    let without = "            warp_sync();\n        });";
    let message = run_racing("sweep", "sweep_hopper.cu", bounds, without);
    assert!(message.contains("data race") && message.contains("sweep_hopper.cu"), "{message}");
}

/// A program without a fault has no race. Each is a test, so that they run side by side.
fn has_no_race(program: &str, kernels: &[&str]) {
    let output = run(program, kernels, None, THREADS);
    assert!(output.status.success() && !said(&output).contains("data race"), "{program}: {}", said(&output));
}

#[test]
fn retrieval_has_no_race() {
    has_no_race("retrieval", &["retrieval.cu", "retrieval_hopper.cu"]);
}

#[test]
fn the_gradient_has_no_race() {
    has_no_race("gradient", &["gradient_hopper.cu"]);
}

#[test]
fn the_gradient_of_exact_f32_has_no_race() {
    has_no_race("gradient_split", &["gradient_hopper_f32.cu"]);
}

#[test]
fn the_sweep_has_no_race() {
    has_no_race("sweep", &["sweep_hopper.cu"]);
}

#[test]
fn the_order_has_no_race() {
    has_no_race("order", &["order.cu"]);
}

#[test]
fn a_plain_access_that_races_another_block_is_caught_by_the_thread_sanitizer() {
    // The emulation runs blocks one after the other, so the count itself stays right.
    let message = run_racing("order", "order.cu", "atomic_add(p.valid, in_run);", "*p.valid += in_run;");
    assert!(message.contains("data race") && message.contains("order.cu"), "{message}");
}

#[test]
fn a_race_within_a_block_is_named_by_the_thread_sanitizer() {
    let read = "named_sync(kBuildBarrier, kBuildThreads);  // the similarities have been read";
    let message = run_racing("gradient", "hopper_roles.cuh", read, "");
    assert!(message.contains("data race") && message.contains("gradient_hopper.cu"), "{message}");
}

#[test]
fn an_arrival_that_is_missing_between_roles_is_named_by_the_thread_sanitizer() {
    // A part of M is built without waiting for the recomputed values that it needs.
    let wait = "mbarrier_wait(&my.shared.values_ready[part], work.recomputed % 2);";
    let message = run_racing("gradient", "hopper_roles.cuh", wait, "");
    assert!(message.contains("data race") && message.contains("gradient_hopper.cu"), "{message}");
}

#[test]
fn an_asynchronous_copy_that_races_is_named_by_the_thread_sanitizer() {
    // Neither the copy nor its reader is compiled code: the emulation reports both to ThreadSanitizer.
    let message = run_racing("retrieval", "mma_tile.cuh", BARRIER, "");
    assert!(message.contains("data race") && message.contains("mma_tile.cuh"), "{message}");
}
