#!/usr/bin/env bash
# Compares the reader of MAT-files with SciPy, and runs the loader's bench on a small fixture.
# Needs Rust and Python 3.11; installs NumPy and SciPy.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
install numpy==2.4.6 scipy==1.17.1
DDTAS_PYTHON="$PWD/$python" cargo test --release --test mat

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
fixture=(--dataset cars196 --layout class-folders --classes 32 --images-per-class 2 --picture-width 500)
cargo run --release --quiet --bin make-fixture -- "${fixture[@]}" --out "$place/pictures"
# With cargo test, so that the library is not built again for the bench profile.
cargo test --release --quiet --bench loader -- --data-root "$place/pictures" --batches 4
