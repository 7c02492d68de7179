#!/usr/bin/env bash
# The training engine with its network on the GPU, without a GPU: compiles and lints every target of train-cuda.
# Needs Rust, gcc/g++ and Python 3.11; the compilers come from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/tools.sh
source .ci/llvm.sh

cargo clippy --release --features train-cuda --all-targets -- -D warnings
