#!/usr/bin/env bash
# The training engine with its network on the GPU, without a GPU: the network's kernels, compiled for the CPU, against the CPU
# backend, then every target of train-cuda compiled and linted.
# Needs Rust, gcc/g++ and Python 3.11; the compilers come from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/tools.sh
source .ci/llvm.sh

emulated=(cargo test --release -p ddtas-train --features train-emulated,emulated)
"${emulated[@]}" --test emulated_layers --test emulated_training
# Cubes of as many units as a GPU's, each a thread.
"${emulated[@]}" --test emulated_layers -- --ignored cubes_as_large_as_a_gpus
cargo clippy --release --features train-cuda --all-targets -- -D warnings
