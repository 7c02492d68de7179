//! Faults in the pipeline of `mma.sync` that all passes share, and in the lists of retrieval.

use super::{BARRIER, Fault, run_faulty};

/// Output of retrieval with a fault in the pipeline.
fn run_faulty_tile(from: &'static str, to: &'static str, flags: &[&str]) -> String {
    run_faulty("retrieval", &["retrieval.cu"], &[Fault { file: "mma_tile.cuh", from, to }], flags)
}

#[test]
fn a_missing_barrier_is_caught() {
    let message = run_faulty_tile(BARRIER, "", &[]);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn reading_before_the_wait_is_caught() {
    // The newest stage may still be in flight, but not the one that is read.
    let message =
        run_faulty_tile("cp_async_wait<stage_count - 2>()", "cp_async_wait<stage_count - 1>()", &[]);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn copying_over_a_stage_that_is_read_is_caught() {
    let fault = "if (index + stage_count - 1 < count) copy(index + stage_count - 1);";
    let message = run_faulty_tile(fault, "if (index + stage_count < count) copy(index + stage_count);", &[]);
    assert!(message.contains("want"), "{message}");
}

#[test]
fn a_read_past_the_rows_is_caught_by_the_address_sanitizer() {
    let fault = "cp_async(to + i * kCopyBytes, from + i * kCopyBytes)";
    let message = run_faulty_tile(
        fault,
        "cp_async(to + i * kCopyBytes, from + i * kCopyBytes + STAGE_BYTES)",
        &["-fsanitize=address"],
    );
    assert!(message.contains("heap-buffer-overflow"), "{message}");
}

#[test]
fn faults_in_the_lists_of_retrieval_are_caught() {
    let faults = [
        // Keys are read before the previous pairs are in order, or before all keys are written.
        ("retrieval.cu", "            block_sync();  // the pairs are in order", ""),
        ("retrieval.cu", "block_sync();  // all keys are written", ""),
        // Two warps, in the next fault two teams, append to one list.
        ("retrieval.cu", "lists(p, warp_index() % 2);", "lists(p, 0);"),
        ("retrieval_hopper.cu", "lists(p, team.team);", "lists(p, 0);"),
    ];
    for (file, from, to) in faults {
        let kernels = ["retrieval.cu", "retrieval_hopper.cu"];
        let kernels = if file == "retrieval.cu" { &kernels[..1] } else { &kernels };
        let said = run_faulty("retrieval", kernels, &[Fault { file, from, to }], &[]);
        assert!(said.contains("want") || said.contains("divergent barrier"), "{from}: {said}");
    }
}

#[test]
fn divergent_barriers_stop_with_a_message() {
    let message = run_faulty_tile(
        BARRIER,
        "if (thread_index() < TILE) { block_sync(); } else { \n block_sync(); }",
        &[],
    );
    assert!(message.contains("divergent barrier"), "{message}");
    assert!(message.contains("mma_tile.cuh"), "{message}");
}

#[test]
fn a_divergent_warp_stops_with_a_message() {
    let message = run_faulty_tile(BARRIER, "block_sync(); if (lane_index() < 16) { warp_sync(); }", &[]);
    assert!(message.contains("warp"), "{message}");
}
