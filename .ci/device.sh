#!/usr/bin/env bash
# Tests benches/device.sh without a GPU, with --prebuilt and --quick: stand-ins print the output of the real programs. Checks the
# arguments of the programs, that a wrong result is not timed and fails the run, that the other programs run after a wrong result or
# a program that hangs, and that --quick leaves out what takes too long. Needs Python 3.10 or newer.
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
row='[{"batch": 64, "dim": 8, "time_ms": 1.0, "mined_share": 0.08, "peak_extra_bytes": 1, "compared": {"anchors": 64, "thresholds": 0.1, "terms": 0.2, "gradient": 0.3}}]'
stub "$work/bin/nvidia-smi" 'echo "A GPU, 1, 2, 3, 4"'
stub "$work/bin/compute-sanitizer" 'while [[ $1 == --* ]]; do shift 2; done; echo "ERROR SUMMARY: 0 errors"; exec "$@"'
# Python without torch: scripts that need torch are replaced by their output; report.py runs for real.
stub "$work/bin/python3" "case \"\$*\" in *report.py*) exec $(command -v python3) \"\$@\" ;; *baselines.py*) echo '[{\"name\": \"gemms\", \"time_ms\": 2.0}]' ;; *module.py*) echo '[]' ;; *test_gpu.py*) echo '6 passed, 2 skipped' ;; esac"
stub "$work/built/ddtas-bench" "case \$1 in verify) echo '[]' ;; throughput) echo '$row' ;; esac"
tests='case $* in --list) printf "one: test\ntwo: test\n\n2 tests, 0 benchmarks\n" ;; *one*) '
stub "$work/built/tests" "$tests true ;; esac"
stub "$work/built/resident" "echo '$row'"
touch "$work/built/ddtas-0.1.0-cp310-abi3-linux_x86_64.whl"
echo 0123abc >"$work/built/commit"

run() {
    : >"$work/calls"
    rm -rf "$work/out"
    status=0
    said=$(env PATH="$work/bin:$PATH" DEVICE_CALLS="$work/calls" BATCHES=64 DIMS=8 DENSITIES=middle benches/device.sh \
        --prebuilt "$work/built" "$@" "$work/out" 2>&1) || status=$?
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
