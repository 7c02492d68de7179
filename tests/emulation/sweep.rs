//! Faults in Hopper's sweep, in the teams' pipeline that retrieval shares, and in the preparation of rows.

use super::{Fault, assert_caught, run_faulty};

/// Output of Hopper's sweep with a fault in `file`.
fn run_faulty_sweep_of(file: &'static str, from: &'static str, to: &'static str) -> String {
    run_faulty("sweep", &["sweep_hopper.cu"], &[Fault { file, from, to }], &[])
}

fn run_faulty_sweep(from: &'static str, to: &'static str) -> String {
    run_faulty_sweep_of("sweep_hopper.cu", from, to)
}

/// Output of Hopper's preparation of split rows with a fault.
fn run_faulty_prepare(file: &'static str, from: &'static str, to: &'static str) -> String {
    run_faulty("prepare", &["prepare.cu"], &[Fault { file, from, to }], &[])
}

/// Output of Hopper's sweep with a fault in the pipeline that retrieval shares.
fn run_faulty_team(from: &'static str, to: &'static str) -> String {
    run_faulty_sweep_of("ping_pong.cuh", from, to)
}

#[test]
fn a_team_that_waits_by_parity_alone_is_caught() {
    // Without its turn, the team takes an earlier phase of a stage for the one that it waits for.
    let turn = "if (walk.tiles_before > 0) mbarrier_wait(&shared.order[team]";
    assert_caught(&run_faulty_team(turn, "if (false) mbarrier_wait(&shared.order[team]"));
}

#[test]
fn a_team_s_stage_that_is_given_back_too_early_is_caught() {
    let release = "is running\n                arrive_as_warp(&shared.empty[(stage + SWEEP_HOPPER_STAGES - 1) % SWEEP_HOPPER_STAGES]);";
    let early = "is running\n                arrive_as_warp(&shared.empty[stage]);";
    assert_caught(&run_faulty_team(release, early));
    // All stages are released before the products that read them are done.
    let wait = "wgmma_wait<1>();  // the previous product is done, this one is running";
    assert_caught(&run_faulty_team(wait, ""));
    // The last stage, right before the wait for its product.
    let release = "wgmma_wait<0>();
        fence_accumulators(acc);
        arrive_as_warp(&shared.empty[(stage + SWEEP_HOPPER_STAGES - 1) % SWEEP_HOPPER_STAGES]);";
    let early = "arrive_as_warp(&shared.empty[(stage + SWEEP_HOPPER_STAGES - 1) % SWEEP_HOPPER_STAGES]);
        wgmma_wait<0>();
        fence_accumulators(acc);";
    assert_caught(&run_faulty_team(release, early));
}

#[test]
fn a_row_tile_that_is_overwritten_is_caught() {
    // A row tile with fewer parts than there are stages: products may still read it.
    let wait = "back <= filled; ++back) wait_until_empty(filled - back);";
    assert_caught(&run_faulty_team(wait, "false; ++back) wait_until_empty(filled - back);"));
    // A stage is filled again, and with it a part of the row tile.
    let wait = "if (fill >= SWEEP_HOPPER_STAGES) wait_until_empty(fill - SWEEP_HOPPER_STAGES);";
    assert_caught(&run_faulty_team(wait, ""));
}

#[test]
fn stages_of_split_rows_that_are_overwritten_are_caught() {
    let wait = "back <= stages.fill; ++back) wait_until_empty(stages.fill - back);";
    assert_caught(&run_faulty_team(wait, "false; ++back) wait_until_empty(stages.fill - back);"));
    let wait = "if (stages.fill >= stages.count) wait_until_empty(stages.fill - stages.count);";
    assert_caught(&run_faulty_team(wait, ""));
    // Releases the columns' high parts, which products still read, in place of the rows' low parts.
    let release = "arrive_as_warp(&shared.empty[low_rows]);";
    assert_caught(&run_faulty_team(release, "arrive_as_warp(&shared.empty[high_columns]);"));
}

#[test]
fn values_staged_over_those_that_are_still_being_stored_are_caught() {
    let wait = "if (windows > 0) mbarrier_wait(&shared.stored[team], (windows - 1) % 2);";
    assert_caught(&run_faulty_sweep(wait, ""));
    // The team waits, but the store that it waits for may still be reading.
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
fn a_named_barrier_after_a_branch_of_one_lane_without_a_warp_sync_is_caught() {
    let message = run_faulty_sweep("before -= own;\n        warp_sync();", "before -= own;");
    assert!(message.contains("lanes are apart, no warp_sync() before named_sync"), "{message}");
}

#[test]
fn multiplying_tiles_of_ignored_rows_alone_is_caught() {
    let pairs = "return tile.row * TILE < valid_anchors && tile.column * TILE < valid_references;";
    let message = run_faulty_sweep(pairs, "return true;");
    assert!(message.contains("products 0: got"), "{message}");
    let fault = Fault { file: "sweep.cu", from: "if (sweep_leaves_out(pairs, tile)) return;", to: "" };
    let message = run_faulty("sweep", &["sweep_hopper.cu", "sweep.cu"], &[fault], &[]);
    assert!(message.contains("products 0: got"), "{message}");
}

#[test]
fn a_missing_fence_of_global_memory_is_caught() {
    let fence = "fence_proxy_async_all();";
    // No fence, one of shared memory only, and one by a single lane for its warp.
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
fn a_barrier_in_a_stage_and_one_begun_twice_are_caught() {
    let barrier = "reinterpret_cast<Barrier *>(bytes + stage_bytes)}";
    let within = "reinterpret_cast<Barrier *>(bytes + stage_bytes) - 1}";
    let message = run_faulty_prepare("prepare.cu", barrier, within);
    assert!(message.contains("a bulk copy over what a thread has written"), "{message}");
    let once = "        if (thread_index() != 0) return;\n        for (int stage = 0";
    let message = run_faulty_prepare("wgmma_tile.cuh", once, "        for (int stage = 0");
    assert!(message.contains("a barrier is begun again"), "{message}");
}
