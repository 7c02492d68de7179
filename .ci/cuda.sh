#!/usr/bin/env bash
# Builds the CUDA backend without a GPU and checks its kernels against their budgets:
# every kernel is compiled for sm_80, sm_89, sm_90a, sm_100, sm_120 and PTX, without spills, with registers and
# shared memory within kernels/budgets.tsv, and with the tensor-core instructions expected.
# Needs Rust, gcc/g++ and Python 3.11; the compiler comes from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/tools.sh

out=$(kernels)
python3 .ci/kernel_budgets.py "$out" --table

# Without a GPU this tests the error message; with one it runs the reference cases.
cargo test --release "${kernel_packages[@]}" --test cuda -- --nocapture

# The backend's calls of the driver, recorded by a stand-in that computes nothing.
cargo test --release "${kernel_packages[@]}" --test driver

# Programs and benches for a GPU are checked, too.
cargo clippy --release "${kernel_packages[@]}" --all-targets -- -D warnings
