#!/usr/bin/env bash
# Tests the training engine with its network on the GPU, without a GPU: compares the network's kernels, compiled for the CPU, with the
# CPU backend, then compiles and lints every target of train-cuda.
# Needs Rust, gcc/g++ and Python 3.11; the compilers come from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/tools.sh
source .ci/llvm.sh

emulated=(cargo test --release -p ddtas-train --features train-emulated,emulated)
"${emulated[@]}" --test emulated_layers --test emulated_training
# Cubes with as many units as on a GPU, each a thread.
"${emulated[@]}" --test emulated_layers -- --ignored cubes_as_large_as_a_gpus
cargo clippy --release --features train-cuda --all-targets -- -D warnings
