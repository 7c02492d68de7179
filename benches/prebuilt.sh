#!/usr/bin/env bash
# Builds the programs for benches/device.sh --prebuilt DIR, for a machine with a GPU but without Rust:
#
#     benches/prebuilt.sh DIR
#
# Writes to DIR `ddtas-bench`, `resident` (bench/benches/resident.rs), `tests` (tests/cuda.rs), the Python wheel, and `commit`
# with the state of the sources: some 12 MB, stripped and without line tables. The other machine needs this repository at
# that commit, and the same glibc or a newer one.
# Needs Rust, gcc and Python 3.11; nvcc comes from PyPI, as in .ci/cuda.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
    "" | -*)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' benches/prebuilt.sh
        exit
        ;;
esac
source .ci/tools.sh
mkdir -p "$1"
out=$(cd "$1" && pwd)
export CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_STRIP=symbols NVCC_APPEND_FLAGS=--compress-mode=size
CARGO_TARGET_DIR=$PWD/target/prebuilt
export CARGO_TARGET_DIR CARGO_PROFILE_BENCH_DEBUG=false CARGO_PROFILE_BENCH_STRIP=symbols
name_tools

# Path of the executable of target $1, from the messages of the build on stdin.
program() {
    python3 -c '
import json, sys
made = [json.loads(line) for line in sys.stdin]
print([one["executable"] for one in made if one.get("executable") and one["target"]["name"] == sys.argv[1]][-1])' "$1"
}
cargo build --release -p ddtas-bench --features cuda
cp "$CARGO_TARGET_DIR/release/ddtas-bench" "$out/ddtas-bench"
cp "$(cargo bench --no-run -p ddtas-bench --features cuda --bench resident --message-format=json-render-diagnostics | program resident)" "$out/resident"
cp "$(cargo test --no-run --release -p ddtas --features cuda --test cuda --message-format=json-render-diagnostics | program cuda)" "$out/tests"
rm -f "$out"/*.whl
python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out" . --config-settings=build-args='--features cuda'
echo "$(git rev-parse HEAD)$(git diff --quiet HEAD || echo ', with changes'), $(rustc --version)" >"$out/commit"
du -h "$out"/*
bytes=$(du -cb "$out"/* | tail -n 1 | cut -f 1)
((bytes <= 64 << 20)) || {
    echo "prebuilt.sh: $out holds $((bytes >> 20)) MiB, more than the 64 that a machine should have to receive" >&2
    exit 1
}
