#!/usr/bin/env bash
# Tests random batches and files, different ones in every run: .ci/random.sh [CASES] [SEED].
# The usual tests have a fixed seed; cases that fail here are added to them by name (tests/cpu.rs). A tenth as many run on the emulated GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/tools.sh
export PROPTEST_CASES=${1:-20000} PROPTEST_RNG_SEED=${2:-$(date +%s)}
echo "$PROPTEST_CASES cases of each test, seed $PROPTEST_RNG_SEED"
cargo test --release -p ddtas --test cpu any_batch
cargo test --release --test data --test mat
export DDTAS_RANDOM_CASES=$((PROPTEST_CASES / 10)) DDTAS_RANDOM_SEED=$PROPTEST_RNG_SEED
cargo test --release -p ddtas --features emulated --test emulated random_batches
