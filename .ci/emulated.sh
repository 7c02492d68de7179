#!/usr/bin/env bash
# Compiles the CUDA kernels with g++ and runs them on the CPU: reference cases and random
# shapes through every kernel, under shuffled schedules, planted faults caught (by
# ThreadSanitizer too, over the kernels that tests/emulation.rs names); then the reference
# cases once more under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs Rust, gcc/g++ and Python 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/tools.sh

features=(--no-default-features --features "capi,cli,emulated")
cargo test --release "${features[@]}" --test emulation --test emulated --test resident --test comparison --test capi
cargo run --release --quiet "${features[@]}" --bin ddtas-bench -- verify --backend emulated tests/golden

# A target folder of its own, for the kernels are compiled anew. The sanitizers' runtime must be loaded before Rust's.
export CARGO_TARGET_DIR=target/sanitized DDTAS_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0
runner="env LD_PRELOAD=$(g++ -print-file-name=libasan.so)"
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$runner
cargo run --release --quiet "${features[@]}" --bin ddtas-bench -- verify --backend emulated tests/golden
