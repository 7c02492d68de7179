#!/usr/bin/env bash
# Builds the CUDA backend without a GPU and holds its kernels to their budgets:
# every kernel for sm_80, sm_89, sm_90a, sm_100, sm_120 and PTX, no spills, registers and
# shared memory within kernels/budgets.tsv, tensor-core instructions really there.
# Needs Rust, gcc/g++ and Python 3.11; the compiler comes from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/tools.sh

# The same packages each time, and always with their tests' dependencies: the kernels and the library are compiled once.
packages=(-p ddtas -p ddtas-bench --features cuda)
# The messages name the folder this very build wrote to; older ones may lie beside it. `settings` brings the program.
tests=(--test cuda --test driver --test settings)
out=$(cargo test --release --no-run "${packages[@]}" "${tests[@]}" --message-format=json-render-diagnostics |
    python3 -c '
import json, pathlib, sys
for message in map(json.loads, sys.stdin):
    folder = pathlib.Path(message.get("out_dir", ""))
    if folder.parent.name.startswith("ddtas-"):
        print(folder)')
python3 .ci/kernel_budgets.py "$out" --table

# Without a GPU this shows the clean refusal; with one it runs the reference cases.
cargo test --release "${packages[@]}" --test cuda -- --nocapture

# What the backend asks of the driver, told by one that computes nothing.
cargo test --release "${packages[@]}" --test driver

# Programs and benches that run on a GPU compile, too.
cargo check --release "${packages[@]}" --all-targets
