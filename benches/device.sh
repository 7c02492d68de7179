#!/usr/bin/env bash
# Verifies, sanitizes, compares and times ddtas on one GPU, in one command:
#
#     benches/device.sh [--quick] [--prebuilt DIR] [OUT]
#
# 1. the reference cases on the GPU, in every dtype and both forms
# 2. the same under compute-sanitizer's memcheck, racecheck and initcheck
# 3. throughput at several densities, compared in the same run and on the same rows with a lower bound (two bare
#    cuBLAS GEMMs), dense torch eager and compiled, and pytorch-metric-learning: table.md, plot.svg, results.json.
#    Before a shape is timed its results are checked: m+, m-, counts, terms of the loss and gradient of 128 anchors against
#    float64, counts against the kernels for other GPUs than Hopper, and budget 0 bit for bit. A wrong shape is not timed.
#    Where there is ncu, the times of the kernels: kernels.csv. table.md ends with every aim of docs/kernels.md: met, NOT met
#    or not measured in this run.
# 4. the PyTorch module on tensors in GPU memory: its tests (python/tests/test_{gpu,operator}.py), a comparison with dense torch
#    in float64, and times: python.json
#
#     --quick          4 minutes at most: the shapes that have aims at 512 dimensions, that is 16,384 rows at middle, 0.004 and
#                      start, and 1,024, 80 and 65,536 at middle; beside them two GEMMs, and compiled torch at 65,536; kernels at
#                      16,384 and middle; only memcheck. Not 128 dimensions nor 262,144 rows. What there is no time for is
#                      left out and named
#     --prebuilt DIR   use the programs that `benches/prebuilt.sh DIR` built elsewhere: `ddtas-bench`, `resident`, `tests`
#                      and a wheel. Then neither Rust nor nvcc is needed.
#     OUT              benches/records/DATE-GPU-cuda by default
#
# After a failure the rest still runs: the failure is named when it happens, at the end and in OUT/README.md, and the exit code is 1.
# A command that does not end within its limit, such as one with a hanging kernel, is killed and run once more, one kernel
# at a time, to name the kernel. After a second such command the rest of its step is left out.
#
# Needs an NVIDIA GPU (compute capability 8.0 or newer) with driver 580 or newer, Rust, gcc, CUDA 13 (nvcc, compute-sanitizer),
# libclang, and Python with torch; for its measurement pytorch-metric-learning; for step 4 ddtas (docs/python.md) and pytest.
# Environment:
#     BATCHES, DIMS   rows and dimensions, separated by commas
#     DENSITIES       late (1 % of the negatives mined), middle (8 %), start (30 %), or shares as numbers;
#                     by default 0.004 and these three, those of the aims and of the CPU's table
#                     If any of the three is set, --quick measures every combination, like the long form.
#     DTYPE           bf16 (default), f16 or f32, which is measured twice: exact, and in TF32 like its peers
#     BUDGET          most bytes for candidates (16 GiB)
#     SKIP            steps to leave out, any of "verify sanitize throughput kernels python"; kernels are part of throughput
#     QUICK_SECONDS   seconds after which --quick starts nothing more and ends what runs (215)
#     LIMIT           seconds after which a command is ended, except compute-sanitizer (600; with --quick 40); peers have twice that, the
#                     module's tests three times
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "device.sh: $*" >&2
    exit 1
}

quick="" prebuilt="" out=""
while (($#)); do
    case $1 in
        --help | -h)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' benches/device.sh
            exit
            ;;
        --quick) quick=1 ;;
        --prebuilt)
            prebuilt=${2:?device.sh: --prebuilt names a folder}
            shift
            ;;
        -*) fail "$1: --help names the options" ;;
        *) out=$1 ;;
    esac
    shift
done

batches=${BATCHES:-${quick:+80,1024,16384,65536}} dims=${DIMS:-${quick:+512}} densities=${DENSITIES:-${quick:+0.004,middle}}
batches=${batches:-80,1024,4096,16384,65536,262144} dims=${dims:-128,512} densities=${densities:-0.004,late,middle,start}
shapes=()
if [[ -n $quick && -z ${BATCHES:-}${DIMS:-}${DENSITIES:-} ]]; then
    # Those with most aims first; the slowest last, because its peer has to be compiled.
    shapes=(16384-512-{middle,0.004,start} {1024,80,65536}-512-middle)
else
    for dim in ${dims//,/ }; do
        for density in ${densities//,/ }; do
            for batch in ${batches//,/ }; do shapes+=("$batch-$dim-$density"); done
        done
    done
fi
dtype=${DTYPE:-bf16}
budget=${BUDGET:-$((16 << 30))}
skip=" ${SKIP:-} "
seconds=${quick:+0.2} seconds=${seconds:-1} quick_seconds=${QUICK_SECONDS:-215}
limit=${LIMIT:-${quick:+40}} limit=${limit:-600}
skipped() { [[ $skip == *" $1 "* ]]; }

command -v nvidia-smi >/dev/null || fail "no nvidia-smi: this needs an NVIDIA GPU and its driver"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || fail "nvidia-smi finds no GPU"
if [[ -n $prebuilt ]]; then
    prebuilt=$(cd "$prebuilt" 2>/dev/null && pwd) || fail "--prebuilt $prebuilt is no folder"
    for program in ddtas-bench resident tests; do
        [[ -x $prebuilt/$program ]] || fail "--prebuilt $prebuilt holds no $program: benches/prebuilt.sh makes it"
    done
fi

out=${out:-benches/records/$(date +%Y-%m-%d)-$(tr -cs '[:alnum:]\n' - <<<"$gpu")-cuda}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

{
    echo "# ddtas on $gpu"
    echo
    echo "- command: ${BATCHES:+BATCHES=$BATCHES }${DIMS:+DIMS=$DIMS }${DENSITIES:+DENSITIES=$DENSITIES }DTYPE=$dtype BUDGET=$budget" \
        "SKIP=\"${SKIP:-}\" benches/device.sh${quick:+ --quick}${prebuilt:+ --prebuilt DIR}"
    echo "- rows, dimensions, density: ${shapes[*]}"
    if [[ -n $prebuilt ]]; then
        echo "- built elsewhere from commit $(cat "$prebuilt/commit")"
    else
        echo "- commit: $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ', with changes')"
        echo "- $(rustc --version)"
    fi
    echo "- GPU, driver, clocks, power limit: $(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv,noheader | head -n 1)"
    echo "- $(python3 -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' 2>/dev/null || echo 'no torch')"
} >"$out/README.md"

tell() {
    echo "$1" | tee -a "$out/README.md" >&2
}
failures=()
broken() {
    failures+=("$1")
    tell "FAILED: $1"
}
# Seconds that a command may take: LIMIT, or with --quick the seconds left if fewer.
allowed() {
    local left=$((quick_seconds - SECONDS))
    [[ -n $quick ]] && ((left < limit)) && echo "$left" || echo "$limit"
}
hangs=0 # commands of this step that were ended
# `attempt NAME COMMAND...` runs a command and reports a failure. True if the command succeeded.
attempt() {
    local name=$1 status=0 seconds
    shift
    ((hangs < 2)) || {
        tell "left out after two commands without an answer: $name"
        return 1
    }
    seconds=$(allowed)
    ((seconds <= 0)) || timeout --kill-after 5 "$seconds" "$@" || status=$?
    if ((seconds <= 0 || ((status == 124 || status == 137) && seconds < limit))); then
        tell "left out for want of time: $name"
        return 1
    elif ((status == 124 || status == 137)); then
        hangs=$((hangs + 1))
        broken "$name: no answer in $limit s"
        seconds=$(allowed)
        ((seconds < 20)) || seconds=20
        if ((hangs == 1 && seconds > 0)); then
            tell "the last kernel it began: $(DDTAS_TRACE_KERNELS=1 timeout --kill-after 5 "$seconds" "$@" 2>&1 >/dev/null |
                sed -n 's/^kernel //p' | tail -n 1)"
        fi
    elif ((status != 0)); then
        broken "$name: exit code $status"
    fi
    return "$status"
}

skipped throughput && skipped python || timeout 120 python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    broken "python3 needs a torch that sees the GPU: python3 -m pip install torch pytorch-metric-learning"
    skip+="throughput python "
}
# Path of a program of the CUDA toolkit; nothing without it.
toolkit() {
    PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v "$1" || true
}
sanitizer=$(toolkit compute-sanitizer)
ncu=""
skipped throughput || skipped kernels || {
    ncu=$(toolkit ncu)
    [[ -n $ncu ]] || tell "no ncu: the times of the kernels are not measured"
}
skipped sanitize || [[ -n $sanitizer ]] || {
    broken "no compute-sanitizer: install the CUDA 13 toolkit and set CUDA_HOME, or SKIP=sanitize"
    skip+="sanitize "
}

if [[ -n $prebuilt ]]; then
    bench=$prebuilt/ddtas-bench resident=("$prebuilt/resident") tests=("$prebuilt/tests")
    for wheel in "$prebuilt"/*.whl; do
        [[ ! -e $wheel ]] || timeout 60 python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/python" "$wheel" ||
            broken "pip does not install $wheel"
    done
    export PYTHONPATH=$scratch/python${PYTHONPATH:+:$PYTHONPATH}
else
    # Line numbers for compute-sanitizer; they cost nothing at run time.
    export NVCC_APPEND_FLAGS=-lineinfo
    cargo build --release -p ddtas-bench --features cuda
    bench=target/release/ddtas-bench
    resident=(cargo bench --quiet -p ddtas-bench --features cuda --bench resident --)
    tests=(cargo test --release -p ddtas --features cuda --test cuda --)
    # Built before anything is timed.
    cargo bench --quiet --no-run -p ddtas-bench --features cuda --bench resident
    cargo test --quiet --no-run --release -p ddtas --features cuda --test cuda
    # The time of compiling does not count.
    SECONDS=0
fi

if ! skipped verify; then
    echo "== reference cases on the GPU"
    attempt "reference cases, $out/verify.json" "$bench" verify tests/golden --backend cuda --json >"$out/verify.json" || true
    attempt "reference cases with --tf32, $out/verify-tf32.json" \
        "$bench" verify tests/golden --backend cuda --tf32 --json >"$out/verify-tf32.json" || true
    # The tests add dtypes, the rectangular form and random shapes; here a skip is a failure. Each runs by itself, so that a
    # hanging kernel does not prevent the others.
    names=$(timeout 60 "${tests[@]}" --list 2>/dev/null | sed -n 's/: test$//p')
    [[ -n $names ]] || broken "there are no tests to run"
    export DDTAS_REQUIRE_GPU=1
    for name in $names; do
        # If a test hangs, the last case in this file is the one.
        echo "== $name" >>"$out/tests.txt"
        attempt "test $name, $out/tests.txt" "${tests[@]}" --exact "$name" --nocapture >>"$out/tests.txt" 2>&1 || true
    done
fi

if ! skipped throughput; then
    echo "== throughput"
    hangs=0
    # Arguments for exact products (none), and for f32 also for TF32.
    products=("")
    [[ $dtype != f32 ]] || products+=(--tf32)
    for name in "${shapes[@]}"; do
        IFS=- read -r batch dim density <<<"$name"
        rows=$scratch/rows.safetensors
        # The first call draws the rows; all others read them.
        given=(--batch "$batch" --dim "$dim" --density "$density" --save-embeddings "$rows")
        for tf32 in "${products[@]}"; do
            # Rows on the host, with copies.
            attempt "$name from the host" "$bench" throughput --backend cuda "${given[@]}" --dtype "$dtype" $tf32 \
                --seconds "$seconds" --json >"$scratch/host" || continue 2
            given=(--embeddings "$rows")
            ours=("${resident[@]}" "${given[@]}" --dtype "$dtype" $tf32 --budget "$budget")
            # Checked; then timed with rows on the GPU, as in a training step there.
            attempt "$name" "${ours[@]}" --compare 128 --seconds "$seconds" >"$scratch/ours" || continue 2
            mv "$scratch/host" "$scratch/$name.host${tf32#-}.json"
            mv "$scratch/ours" "$scratch/$name.ddtas${tf32#-}.json"
            if [[ -n $ncu && (-z $quick || $name == 16384-512-middle) ]]; then
                # The fewest losses, seven. ncu sees all of their kernels; report.py finds where a loss begins and ends.
                log=$scratch/ncu
                if attempt "the kernels of $name" "$ncu" --clock-control none --metrics gpu__time_duration.sum --print-units base \
                    --target-processes all --csv --log-file "$log" "${ours[@]}" --seconds 0 >/dev/null; then
                    mv "$log" "$scratch/$name.kernels${tf32#-}.csv"
                else
                    tell "no more times of kernels (SKIP=kernels leaves them out): $(grep -sm 1 ==ERROR== "$log" || true)"
                    ncu=""
                fi
            fi
        done
        # To compile dense torch takes some 20 seconds, so --quick does it only for its aim.
        peers=gemms
        [[ $name != 65536-512-middle ]] || peers+=,compiled
        limit=$((2 * limit)) attempt "the peers of $name" python3 benches/device/baselines.py "$rows" --dtype "$dtype" \
            --seconds "$seconds" ${quick:+--peers "$peers"} >"$scratch/peers" || echo '[]' >"$scratch/peers"
        mv "$scratch/peers" "$scratch/$name.peers.json"
        rm -f "$rows"
    done
    if compgen -G "$scratch/*.peers.json" >/dev/null; then attempt "the report" python3 benches/device/report.py "$scratch" "$out" || true; fi
fi

if ! skipped python; then
    echo "== the module of PyTorch"
    hangs=0
    if timeout 120 python3 -c 'import ddtas.torch' 2>/dev/null; then
        if python3 -c 'import pytest' 2>/dev/null; then
            # If a test hangs, it is the last one in this file.
            # They compile.
            limit=$((3 * limit)) attempt "tests of the module, $out/python_tests.txt" \
                python3 -m pytest -v -rs -p no:cacheprovider python/tests/test_{gpu,operator}.py -k "not cpu and not emulated" >"$out/python_tests.txt" 2>&1 || true
            # Pytest's last line counts passed and skipped tests.
            echo "tests of the module: $(tail -n 1 "$out/python_tests.txt")" | tee -a "$out/README.md"
        else
            echo "tests of the module: all skipped, python3 has no pytest" | tee -a "$out/README.md"
        fi
        attempt "the module's loss and times" \
            python3 benches/device/module.py --batch "$batches" --dtype "$dtype" --seconds "$seconds" >"$out/python.json" || true
    else
        echo "skipped: python3 has no ddtas (docs/python.md)" | tee -a "$out/README.md"
    fi
fi

if ! skipped sanitize; then
    hangs=0
    # Cargo's variable for the runner of programs for this machine's target.
    host=$(rustc -vV 2>/dev/null | sed -n 's/^host: //p') || host=""
    runner=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$host")_RUNNER
    # Runs the tests, which have every type and form; the reference cases are f32 and square only.
    tools=(memcheck)
    [[ -n $quick ]] || tools+=(racecheck initcheck)
    for tool in "${tools[@]}"; do
        echo "== compute-sanitizer $tool"
        command=("$sanitizer" --tool "$tool" --error-exitcode 1)
        if [[ -n $prebuilt ]]; then
            run=("${command[@]}" "${tests[@]}" agree)
        else
            run=(env "$runner=${command[*]}" "${tests[@]}" agree)
        fi
        # compute-sanitizer is slow: with --quick it gets all the time left.
        DDTAS_REQUIRE_GPU=1 limit=3600 attempt "compute-sanitizer $tool, $out/$tool.txt" "${run[@]}" >"$out/$tool.txt" 2>&1 || true
        grep 'ERROR SUMMARY\|RACECHECK SUMMARY' "$out/$tool.txt" || true
    done
fi
echo "device.sh: done, results in $out (${SECONDS}s)"
((${#failures[@]} == 0)) || {
    printf 'device.sh: FAILED: %s\n' "${failures[@]}" >&2
    exit 1
}
