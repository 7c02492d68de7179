#!/usr/bin/env bash
# Tests benches/device.sh without a GPU, with --prebuilt and --quick: stand-ins print the output of the real programs. Checks the
# arguments of the programs, that a wrong result is not timed and fails the run, that the other programs run after a wrong result or
# a program that hangs, that --quick leaves out what takes too long, and which aims are met, missed or not measured. Needs Python 3.10
# or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{bin,built}

# Writes the stand-in $1, which appends its arguments to the file DEVICE_CALLS and runs $2.
stub() {
    printf '#!/usr/bin/env bash\necho "%s $*" >>"$DEVICE_CALLS"\n%s\n' "${1##*/}" "$2" >"$1"
    chmod +x "$1"
}
row='[{"batch": 64, "dim": 8, "dtype": "bf16", "time_ms": 1.0, "mined_share": 0.08, "peak_extra_bytes": 1, "compared": {"anchors": 64, "thresholds": 0.1, "terms": 0.2, "gradient": 0.3}}]'
stub "$work/bin/nvidia-smi" 'echo "A GPU, 1, 2, 3, 4"'
stub "$work/bin/compute-sanitizer" 'while [[ $1 == --* ]]; do shift 2; done; echo "ERROR SUMMARY: 0 errors"; exec "$@"'
# Python without torch: scripts that need torch are replaced by their output; report.py runs for real.
stub "$work/bin/python3" "case \"\$*\" in *report.py*) exec $(command -v python3) \"\$@\" ;; *baselines.py*) echo '[{\"name\": \"gemms\", \"time_ms\": 0.9}, {\"name\": \"compiled\", \"time_ms\": 5.0}]' ;; *module.py*) echo '[]' ;; *test_gpu.py*) echo '6 passed, 2 skipped' ;; esac"
stub "$work/built/ddtas-bench" "case \$1 in verify) echo '[]' ;; throughput) echo '$row' ;; esac"
tests='case $* in --list) printf "one: test\ntwo: test\n\n2 tests, 0 benchmarks\n" ;; *one*) '
stub "$work/built/tests" "$tests true ;; esac"
stub "$work/built/resident" "echo '$row'"
# Writes three losses and one cut off, beside kernels of another library. Medians, us: sweep 200, select 100 (two kernels),
# gradient 400, the small ones 10 each.
cat >"$work/ncu.py" <<'END'
import sys
print('==PROF== Connected to process 1\n"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
loss = {"order_tiles": 5, "order_merge": 5, "prepare_hopper_bf16": 10, "same_class_hopper_bf16": 10, "sweep_hopper_bf16": 200,
        "select_stored_hopper": 60, "select_recomputed_hopper_bf16": 40, "weigh": 10, "gradient_hopper_bf16": 400}
launches = [("cublas", 999)]
for scale, kernels in (1, 9), (9, 5), (3, 9), (1, 9):
    launches += [(name, scale * time) for name, time in list(loss.items())[:kernels]] + [("cublas", 999)]
for index, (name, time) in enumerate(launches):
    print(f'"{index}","1","{name}","launch__grid_size","","16"')
    print(f'"{index}","1","{name}","gpu__time_duration.sum","ns","{1000 * time:,}"')
END
stub "$work/bin/ncu" "while [[ \$1 == -* ]]; do case \$1 in --csv) shift ;; --log-file) log=\$2; shift 2 ;; *) shift 2 ;; esac; done
$(command -v python3) $work/ncu.py >\"\$log\"; exec \"\$@\""
touch "$work/built/ddtas-0.1.0-cp310-abi3-linux_x86_64.whl"
echo 0123abc >"$work/built/commit"

run() {
    : >"$work/calls"
    rm -rf "$work/out"
    status=0
    said=$(env PATH="$work/bin:$PATH" DEVICE_CALLS="$work/calls" BATCHES="${BATCHES-64}" DIMS="${DIMS-8}" \
        DENSITIES="${DENSITIES-middle}" benches/device.sh --prebuilt "$work/built" "$@" "$work/out" 2>&1) || status=$?
}
# `expect WHAT TEXT FILE`: fails unless FILE contains TEXT.
expect() {
    grep -qF -- "$2" "$3" || {
        echo "device.sh: $1: no \"$2\" in $(basename "$3"): $(cat "$3"); it said: $said"
        exit 1
    }
}

for quick in "" --quick; do
    run $quick
    ((status == 0)) || { echo "device.sh $quick failed: $said"; exit 1; }
    expect "compared before timed" "resident --embeddings" "$work/calls"
    expect "compared before timed" "--compare 128" "$work/calls"
    expect "each test by itself" "tests --exact one --nocapture" "$work/calls"
    expect "each test by itself" "tests --exact two --nocapture" "$work/calls"
    expect "the wheel" "--target" "$work/calls"
    expect "the module" "module.py --batch 64" "$work/calls"
    expect "the module's tests" "test_gpu.py" "$work/calls"
    expect "what was skipped" "tests of the module: 6 passed, 2 skipped" "$work/out/README.md"
    expect "the record" "built elsewhere from commit 0123abc" "$work/out/README.md"
    expect "the table" "| 8 | middle | 64 |" "$work/out/table.md"
    expect "memcheck" "ERROR SUMMARY: 0 errors" "$work/out/memcheck.txt"
done
! grep -q racecheck "$work/calls" || { echo "device.sh --quick takes racecheck too"; exit 1; }

# Every shape takes 1 ms.
BATCHES="" DIMS="" DENSITIES="" run --quick
((status == 0)) || { echo "device.sh --quick failed: $said"; exit 1; }
for aim in "B = 16384, middle, bf16, of two GEMMs: 1.111 (aim: at most 1): NOT met" \
    "B = 16384, start, bf16, of two GEMMs: 1.111 (aim: at most 1.5): met" \
    "B = 16384, middle, f32 in TF32, of two GEMMs: - (aim: at most 1): not measured" \
    "B = 65536, compiled torch / ddtas: 5 (aim: at least 4): met" \
    "B = 262144 / B = 65536, the largest of every D and density measured: - (aim: at most 16.5): not measured" \
    "B = 80: 1 ms (aim: at most 0.06 ms): NOT met" \
    "B = 16384, D = 512, sweep: 0.2 ms (aim: at most 0.22 ms): met" \
    "B = 16384, D = 512, select: 0.1 ms (aim: at most 0.08 ms): NOT met" \
    "B = 16384, order, prepare, same_class and weigh: 0.04 ms (aim: at most 0.06 ms): met" \
    "B = 65536, D = 512, sweep: - (aim: at most 3.52 ms): not measured"; do
    expect "the aims" "- $aim" "$work/out/table.md"
done
expect "the kernels" "16384,512,middle,bf16,exact,order_merge,0.005000" "$work/out/kernels.csv"
! grep -q cublas "$work/out/kernels.csv" || { echo "device.sh: a kernel of cuBLAS counts"; exit 1; }
[[ $(grep -c '^ncu .* --seconds 0$' "$work/calls") == 1 && $(grep -c 'peers gemms,compiled' "$work/calls") == 1 ]] ||
    { echo "device.sh --quick takes too many kernels or peers: $(cat "$work/calls")"; exit 1; }

stub "$work/bin/ncu" 'while [[ $1 != --log-file ]]; do shift; done; echo "==ERROR== ERR_NVGPUCTRPERM" >"$2"; exit 1'
BATCHES=16384,65536 DIMS=512 run
((status != 0)) || { echo "device.sh: ncu's failure is none: $said"; exit 1; }
expect "ncu's failure" "leaves them out): ==ERROR== ERR_NVGPUCTRPERM" "$work/out/README.md"
expect "kernels that were not measured" "sweep: - (aim: at most 0.22 ms): not measured" "$work/out/table.md"
expect "the other aims" "compiled torch / ddtas: 5 (aim: at least 4): met" "$work/out/table.md"
rm "$work/bin/ncu"

stub "$work/built/resident" 'echo "resident: the answer is wrong, and is not timed: m+ of anchor 3" >&2; exit 1'
run
((status != 0)) && [[ $said == *"m+ of anchor 3"* ]] || { echo "device.sh: a wrong answer passed: $status, $said"; exit 1; }
expect "a wrong answer" "FAILED: 64-8-middle: exit code 1" "$work/out/README.md"
expect "the module in spite of it" "module.py --batch 64" "$work/calls"
expect "memcheck in spite of it" "ERROR SUMMARY: 0 errors" "$work/out/memcheck.txt"
[[ ! -e $work/out/table.md ]] || { echo "device.sh times a wrong answer"; exit 1; }

stub "$work/built/resident" 'sleep 600'
QUICK_SECONDS=5 run --quick
((status == 0)) || { echo "device.sh --quick: $status, $said"; exit 1; }
expect "what takes too long" "left out for want of time: 64-8-middle" "$work/out/README.md"

stub "$work/built/resident" "echo '$row'"
stub "$work/built/tests" "$tests [[ -z \${DDTAS_TRACE_KERNELS:-} ]] || echo 'kernel sweep' >&2; sleep 600 ;; esac"
LIMIT=3 run
((status != 0)) || { echo "device.sh: no answer is none: $said"; exit 1; }
expect "a test without an answer" "FAILED: test one, $work/out/tests.txt: no answer in 3 s" "$work/out/README.md"
expect "its kernel" "the last kernel it began: sweep" "$work/out/README.md"
expect "the next test" "tests --exact two --nocapture" "$work/calls"
expect "the table in spite of it" "| 8 | middle | 64 |" "$work/out/table.md"

rm "$work/built/resident"
run
((status != 0)) && [[ $said == *"holds no resident"* ]] || { echo "device.sh runs without a program: $said"; exit 1; }
echo "device.sh: as it should be"
