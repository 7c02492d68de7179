//! Faults in Hopper's gradient, whose warps have roles: wrong sums, hangs and broken counts of barriers.

use super::{Fault, assert_caught, run_faulty};

/// Output of Hopper's gradient product with a fault.
fn run_faulty_hopper(file: &'static str, from: &'static str, to: &'static str) -> String {
    run_faulty_hopper_by(&[Fault { file, from, to }])
}

/// As [`run_faulty_hopper`], for a fault that needs several replacements.
fn run_faulty_hopper_by(faults: &[Fault]) -> String {
    run_faulty("gradient", &["gradient_hopper.cu"], faults, &[])
}

/// Output of Hopper's gradient product of exact f32 with a fault.
fn run_faulty_split(file: &'static str, from: &'static str, to: &'static str) -> String {
    run_faulty("gradient_split", &["gradient_hopper_f32.cu"], &[Fault { file, from, to }], &[])
}

/// Source text: the wait for the rows of a bulk copy.
const LANDED: &str = "mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));\n            warp_sync();\n            unsigned char *matrix";

/// Source text: the copying warp's wait for an empty stage.
const ACQUIRED: &str =
    "if (fill >= stages) mbarrier_wait(empty_of(shared, fill), parity_of(shared, fill - stages));";

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
fn products_without_a_wgmma_fence_are_caught() {
    let fenced = "k_major_descriptor(weights);\n    wgmma_fence();";
    let message = run_faulty_hopper("gradient_hopper.cu", fenced, "k_major_descriptor(weights);");
    assert!(message.contains("a group of products without a wgmma_fence()"), "{message}");
}

#[test]
fn a_wait_that_may_come_two_phases_late_is_caught() {
    // The stage is filled again just before the wait: a warp delayed between the two finds a phase too late.
    let message = run_faulty_split(
        "gradient_hopper_f32.cu",
        "walk.rows_fills - 1 : RolesF32::stages - 1;",
        "walk.rows_fills - 1 : RolesF32::stages;",
    );
    assert!(message.contains("a phase that nobody ends"), "{message}");
}

#[test]
fn writing_over_what_a_product_reads_is_caught() {
    // M is released before its product is done.
    let wait = "wgmma_wait<1>();  // the previous product is done, this one is running";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", wait, ""));
}

#[test]
fn copying_over_rows_that_are_read_is_caught() {
    assert_caught(&run_faulty_hopper("hopper_roles.cuh", ACQUIRED, ""));
}

#[test]
fn a_stage_that_is_given_back_too_early_is_caught() {
    let release = "if (open) arrive_as_warp(empty_of(shared, fill - 1));";
    let early = "if (open) arrive_as_warp(empty_of(shared, fill));";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", release, early));
}

#[test]
fn a_stage_that_is_given_back_right_before_the_wait_for_its_product_is_caught() {
    // Only a warp that is preempted between the two does harm.
    assert_caught(&run_faulty_hopper(
        "gradient_hopper.cu",
        "wgmma_wait<0>();\n        arrive_as_warp(empty_of(shared, fill));",
        "arrive_as_warp(empty_of(shared, fill));\n        wgmma_wait<0>();",
    ));
    assert_caught(&run_faulty_hopper(
        "gradient_hopper.cu",
        "wgmma_wait<0>();\n            if (open) {\n                arrive_as_warp(empty_of(shared, work.fill - 1));",
        "if (open) {\n                arrive_as_warp(empty_of(shared, work.fill - 1));\n                wgmma_wait<0>();",
    ));
    assert_caught(&run_faulty_split(
        "gradient_hopper_f32.cu",
        "wgmma_wait<0>();\n    fence_accumulators(sums);\n    arrive_as_warp(empty_of(shared, fill - 1));",
        "arrive_as_warp(empty_of(shared, fill - 1));\n    wgmma_wait<0>();\n    fence_accumulators(sums);",
    ));
}

#[test]
fn a_matrix_that_one_lane_announces_for_lanes_that_still_store_is_caught() {
    let synced = "warp_sync();\n        arrive_as_warp(&shared.built";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", synced, "arrive_as_warp(&shared.built"));
}

#[test]
fn filling_a_matrix_before_it_is_given_back_is_caught() {
    // One matrix fewer: zeros are written to a matrix that the product before the last still reads.
    let file = "hopper_roles.cuh";
    assert_caught(&run_faulty_hopper_by(&[
        Fault { file, from: "return index % Roles::matrices;", to: "return index % 2;" },
        Fault { file, from: "return index / Roles::matrices % 2;", to: "return index / 2 % 2;" },
    ]));
}

#[test]
fn faults_in_the_gradient_of_split_rows_are_caught() {
    let own = "gradient_hopper_f32.cu";
    let faults = [
        // Stages are released before the product that reads them is done.
        (own, "wgmma_wait<1>();  // the previous product is done, this one is running"),
        // Stages, and in the next fault a matrix, are filled again before they are released.
        ("hopper_roles.cuh", ACQUIRED),
        (own, "if (first > 0) mbarrier_wait(empty_of(shared, first - 1), parity_of(shared, first - 1));"),
        // Weights are stored before the zeros; a product reads M before it is built.
        (own, "mbarrier_wait(&shared.zeroed[work.matrix()], work.matrix_parity());"),
        (own, "mbarrier_wait(&shared.built[work.matrix()], work.matrix_parity());"),
    ];
    for (file, from) in faults {
        assert_caught(&run_faulty_split(file, from, ""));
    }
}

#[test]
fn a_wait_by_parity_alone_is_caught() {
    // One barrier for both halves of a recomputed tile: two phases may end before a waiter looks at it,
    // and the parity then says that the first has not ended.
    let message = run_faulty_hopper_by(&[
        Fault {
            file: "gradient_hopper.cu",
            from: "recompute_values<Precision>(shared, &shared.values_ready[part],",
            to: "recompute_values<Precision>(shared, &shared.values_ready[0],",
        },
        Fault {
            file: "hopper_roles.cuh",
            from: "mbarrier_wait(&my.shared.values_ready[part], work.recomputed % 2);",
            to: "mbarrier_wait(&my.shared.values_ready[0], part);",
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
fn a_named_barrier_after_a_branch_of_one_lane_without_a_warp_sync_is_caught() {
    let synced = "== blocks - 1;\n        warp_sync();";
    let message = run_faulty_hopper("hopper_roles.cuh", synced, "== blocks - 1;");
    assert!(message.contains("lanes are apart, no warp_sync() before named_sync"), "{message}");
}

#[test]
fn a_barrier_of_the_block_after_a_wait_of_one_lane_is_caught() {
    let begun = "for (Barrier &barrier : shared.values_ready) mbarrier_init(&barrier, kMmaWarps);";
    let message = run_faulty_hopper(
        "hopper_roles.cuh",
        begun,
        "for (Barrier &barrier : shared.values_ready) mbarrier_init(&barrier, kMmaWarps);
        mbarrier_wait(&shared.values_ready[0], 1);",
    );
    assert!(message.contains("lanes are apart, no warp_sync() before block_sync"), "{message}");
}

#[test]
fn a_named_barrier_of_too_many_threads_is_caught() {
    let read = "named_sync(kBuildBarrier, kBuildThreads);  // the similarities have been read";
    let message = run_faulty_hopper(
        "hopper_roles.cuh",
        read,
        "named_sync(kBuildBarrier, kBuildThreads + 32);  // the similarities have been read",
    );
    let caught = message.contains("a named barrier") || message.contains("a phase that nobody ends");
    assert!(caught, "{message}");
}

#[test]
fn a_named_barrier_that_is_missing_is_caught() {
    let read = "named_sync(kBuildBarrier, kBuildThreads);  // the similarities have been read";
    assert_caught(&run_faulty_hopper("hopper_roles.cuh", read, ""));
}

#[test]
fn storing_before_the_zeros_are_there_is_caught() {
    let wait = "mbarrier_wait(&shared.zeroed[work.matrix()], work.matrix_parity());";
    assert_caught(&run_faulty_hopper("gradient_hopper.cu", wait, ""));
}

#[test]
fn zeros_without_a_fence_are_caught() {
    let fence = "fence_proxy_async();\n    warp_sync();\n    arrive_as_warp(&shared.zeroed[matrix]);";
    let without = "warp_sync();\n    arrive_as_warp(&shared.zeroed[matrix]);";
    assert_caught(&run_faulty_hopper("hopper_roles.cuh", fence, without));
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
    // The last row of the last matrix is written over the barriers.
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
