#!/usr/bin/env bash
# Everything there is to know about ddtas on one GPU, in one command:
#
#     benches/device.sh [OUT]            OUT: benches/records/DATE-GPU-cuda by default
#
# 1. the reference cases, every dtype, both forms, on the GPU
# 2. compute-sanitizer memcheck, racecheck and initcheck over them
# 3. throughput at several densities beside, in the same run on the same rows,
#    the floor (two bare cuBLAS GEMMs), dense torch eager and compiled, and
#    pytorch-metric-learning: table.md, plot.svg, results.json
#
# Needs an NVIDIA GPU (8.0 or newer) with driver 580 or newer, Rust, CUDA 13 (nvcc,
# compute-sanitizer), libclang, and Python with torch; pytorch-metric-learning if it
# is to be measured. Environment:
#     BATCHES, DIMS   rows and dimensions, separated by commas
#     DENSITIES       late (1 % of the negatives mined), middle (8 %), start (30 %), or shares as numbers;
#                     0.004 and these three by default, what the aims and the CPU's table are about
#     DTYPE           bf16 (default), f16 or f32, which is measured twice: exact, and in TF32 as its peers are
#     BUDGET          bytes for candidates (16 GiB); a batch takes no more than it can use
#     SKIP            any of "verify sanitize throughput", to leave out steps
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' benches/device.sh
    exit
fi

batches=${BATCHES:-1024,4096,16384,65536,262144}
dims=${DIMS:-128,512}
densities=${DENSITIES:-0.004,late,middle,start}
dtype=${DTYPE:-bf16}
budget=${BUDGET:-$((16 << 30))}
skip=" ${SKIP:-} "

fail() {
    echo "device.sh: $*" >&2
    exit 1
}
skipped() { [[ $skip == *" $1 "* ]]; }

command -v nvidia-smi >/dev/null || fail "no nvidia-smi: this needs an NVIDIA GPU and its driver"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || fail "nvidia-smi finds no GPU"
skipped throughput || python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "python3 needs a torch that sees the GPU: python3 -m pip install torch pytorch-metric-learning"
sanitizer=$(command -v compute-sanitizer || true)
[[ -n $sanitizer || ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer ]] ||
    sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
skipped sanitize || [[ -n $sanitizer ]] ||
    fail "no compute-sanitizer: install the CUDA 13 toolkit and set CUDA_HOME, or SKIP=sanitize"

out=${1:-benches/records/$(date +%Y-%m-%d)-$(tr -cs '[:alnum:]\n' - <<<"$gpu")-cuda}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

{
    echo "# ddtas on $gpu"
    echo
    echo "- command: BATCHES=$batches DIMS=$dims DENSITIES=$densities DTYPE=$dtype BUDGET=$budget SKIP=\"${SKIP:-}\" benches/device.sh"
    echo "- commit: $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ', with changes')"
    echo "- GPU, driver, clocks, power limit: $(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv,noheader | head -n 1)"
    echo "- $(python3 -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' 2>/dev/null || echo 'no torch')"
    echo "- $(rustc --version)"
} >"$out/README.md"

# Lines for compute-sanitizer; they cost nothing at run time.
export NVCC_APPEND_FLAGS=-lineinfo
cargo build --release -p ddtas-bench --features cuda
bench=target/release/ddtas-bench

if ! skipped verify; then
    echo "== reference cases on the GPU"
    "$bench" verify tests/golden --backend cuda --json >"$out/verify.json" ||
        fail "a reference case fails on the GPU: see $out/verify.json"
    # The tests add dtypes, the rectangular form and random shapes; here a skip is a failure.
    DDTAS_REQUIRE_GPU=1 cargo test --release -p ddtas --features cuda --test cuda -- --nocapture
fi

if ! skipped sanitize; then
    # Cargo's variable for what starts a program of this machine's kind.
    host=$(rustc -vV | sed -n 's/^host: //p')
    runner=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$host")_RUNNER
    for tool in memcheck racecheck initcheck; do
        echo "== compute-sanitizer $tool"
        # Through the tests' program, for the reference cases are f32 and square: every type and form.
        env "$runner=$sanitizer --tool $tool --error-exitcode 1" DDTAS_REQUIRE_GPU=1 \
            cargo test --release -p ddtas --features cuda --test cuda -- agree >"$out/$tool.txt" 2>&1 ||
            fail "compute-sanitizer $tool complains: see $out/$tool.txt"
        grep 'ERROR SUMMARY\|RACECHECK SUMMARY' "$out/$tool.txt" || true
    done
fi

if ! skipped throughput; then
    echo "== throughput"
    # Exact products, and for f32 those in TF32: no argument more, or one.
    products=("")
    [[ $dtype != f32 ]] || products+=(--tf32)
    # Built before anything is timed.
    cargo bench --quiet --no-run -p ddtas-bench --features cuda --bench resident
    for dim in ${dims//,/ }; do
        for density in ${densities//,/ }; do
            for batch in ${batches//,/ }; do
                name=$batch-$dim-$density rows=$scratch/rows.safetensors
                # The first call draws the rows that everybody is measured on.
                given=(--batch "$batch" --dim "$dim" --density "$density" --save-embeddings "$rows")
                for tf32 in "${products[@]}"; do
                    # From the host, copies included.
                    "$bench" throughput --backend cuda "${given[@]}" --dtype "$dtype" $tf32 \
                        --json >"$scratch/$name.host${tf32#-}.json"
                    given=(--embeddings "$rows")
                    # Without the copies between host and GPU, as a training step on the GPU calls it.
                    cargo bench --quiet -p ddtas-bench --features cuda --bench resident -- "${given[@]}" --dtype "$dtype" $tf32 \
                        --budget "$budget" >"$scratch/$name.ddtas${tf32#-}.json"
                done
                python3 benches/device/baselines.py "$rows" --dtype "$dtype" >"$scratch/$name.peers.json"
                rm "$rows"
            done
        done
    done
    python3 benches/device/report.py "$scratch" "$out"
fi
echo "device.sh: done, results in $out"
