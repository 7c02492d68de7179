#!/usr/bin/env bash
# Many processes that train together.
#
#     .ci/many.sh              everything
#     .ci/many.sh NAME...      parts of it: trainer (ddtas-train by mpirun)
#
# Needs Rust, g++ and Python 3.11; installs Open MPI where it is missing, libclang into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

# ddtas-train by Open MPI: two and three processes, the same bytes as threads; killed, stopped, resumed with other ranks, bad data.
# The threads against one process: train/tests/ranks.rs.
trainer() {
    if ! command -v mpirun >/dev/null || ! command -v mpicc >/dev/null; then
        local as_root=()
        [[ $(id -u) == 0 ]] || as_root=(sudo)
        "${as_root[@]}" apt-get update -qq
        "${as_root[@]}" apt-get install -qq -y --no-install-recommends openmpi-bin libopenmpi-dev >/dev/null
    fi
    source .ci/tools.sh
    # The bindings of mpi.h: libclang of PyPI comes without the compiler's own headers.
    LIBCLANG_PATH=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/clang/native
    BINDGEN_EXTRA_CLANG_ARGS="-I$(gcc -print-file-name=include)"
    export LIBCLANG_PATH BINDGEN_EXTRA_CLANG_ARGS
    # As a test, so that only this package is built once more.
    cargo test --release --quiet --no-run --features ddtas-train/mpi --test ranks
    cargo run --release --quiet --bin make-fixture -- --dataset cub200 --classes 12 --picture-width 40 --out "$place/set" >/dev/null
    train=$PWD/target/release/ddtas-train
    settings=(--dataset folder --data-root "$place/set/CUB_200_2011/images" --image-size 16 --width 4 --embedding-dim 16 --evaluate-every 0
        --classes-per-batch 5 --images-per-class 3 --steps 30 --checkpoint-every 5 --generator head --memory-size 20)
    # No rate that depends on the number of steps.
    endless=(--steps 100000 --warm-up 0 --schedule constant)
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

    echo "the same bytes as threads, uneven shares among them"
    for ranks in 2 3; do
        "$train" "${settings[@]}" --ranks "$ranks" --output "$place/threads-$ranks" &>"$place/log" || said
        mpi "$ranks" "${settings[@]}" --output "$place/mpi-$ranks" &>"$place/log" || said
        for file in metrics.jsonl last.safetensors best.safetensors; do
            cmp "$place/threads-$ranks/$file" "$place/mpi-$ranks/$file"
        done
    done
    mpi 2 "${settings[@]}" --output "$place/again" &>"$place/log" || said
    cmp "$place/again/last.safetensors" "$place/mpi-2/last.safetensors"

    echo "a killed rank ends the others, and the run goes on with fewer"
    started killed
    kill -9 "$(rank_of 1)"
    ended killed "rank 1"
    grep -q "signal 9" "$place/log" || said
    ten_more killed "$(wc -l <"$place/killed/metrics.jsonl")"
    mpi 2 --resume "$place/killed" &>"$place/log" || said
    tail -n 2 "$place/killed/metrics.jsonl" | grep -q "\"step\":$((steps - 1)),"

    echo "SIGUSR1 saves and stops, and the run goes on to the same bytes"
    started stopped
    kill -USR1 "$mpirun"
    ended stopped "ddtas-train --resume $place/stopped"
    ten_more stopped "$(sed -n 's/^stopped after \([0-9]*\) steps.*/\1/p' "$place/log")"
    mpi 3 --resume "$place/stopped" &>"$place/log" || said
    mpi 3 "${settings[@]}" "${endless[@]}" --steps "$steps" --output "$place/unbroken" &>"$place/log" || said
    cmp "$place/stopped/last.safetensors" "$place/unbroken/last.safetensors"

    echo "an error on one rank is one line"
    for picture in "$place"/set/CUB_200_2011/images/012.*/*; do echo "no picture" >"$picture"; done
    if mpi 3 "${settings[@]}" --output "$place/bad" &>"$place/log"; then said; fi
    [[ $(grep -c "^ddtas-train: " "$place/log") == 1 ]] && grep -q "^ddtas-train: rank 2: class 012" "$place/log" || said
    if mpirun --oversubscribe -n 2 "$train" "${settings[@]}" --output "$place/apart" &>"$place/log"; then said; fi
    grep -q "add --ranks mpi" "$place/log" || said
}

# ddtas-train on so many ranks; the processors are shared out among their threads, not the ranks among the processors.
mpi() { mpirun --oversubscribe --bind-to none -n "$1" "$train" --ranks mpi "${@:2}"; }

# What the last program said, and the end.
said() {
    cat "$place/log"
    exit 1
}

# A run of three ranks in the background that does not end by itself, ten steps old: $mpirun is its process.
started() {
    mpi 3 "${settings[@]}" "${endless[@]}" --output "$place/$1" &>"$place/log" &
    mpirun=$!
    until [[ $(wc -l <"$place/$1/metrics.jsonl") -ge 12 ]]; do
        kill -0 "$mpirun" || said
        sleep 0.05
    done 2>/dev/null
}

# Lets that run end ten steps after $2.
ten_more() {
    steps=$(($2 + 10))
    sed -i "s/^steps = .*/steps = $steps/" "$place/$1/config.toml"
}

# The process of a rank of that run.
rank_of() {
    for process in $(pgrep -P "$mpirun"); do
        if tr '\0' '\n' <"/proc/$process/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1"; then echo "$process"; fi
    done
}

# Waits for that run, which must end within ten seconds with an error and a line that holds $2.
ended() {
    for _ in {1..100}; do
        kill -0 "$mpirun" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$mpirun" 2>/dev/null; then
        echo "$1 has not ended"
        said
    fi
    if wait "$mpirun"; then said; fi
    grep -q "$2" "$place/log" || said
}

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
parts=("$@")
[[ $# -gt 0 ]] || parts=(trainer)
for part in "${parts[@]}"; do "$part"; done
