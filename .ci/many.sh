#!/usr/bin/env bash
# Many processes that train together.
#
#     .ci/many.sh              everything
#     .ci/many.sh NAME...      parts of it: python (ddtas.torch over gloo, by torchrun), trainer (ddtas-train by mpirun)
#
# Needs Rust, g++ and Python 3.11; installs Open MPI where it is missing, libclang and Python packages into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

# The loss of a process group in 1 to 4 processes, and the recipe in three: one process's losses, a killed rank, resume with two.
python() {
    source .ci/environment.sh
    install pytest numpy pillow
    CARGO_TARGET_DIR=$PWD/target/python-build install --force-reinstall --no-deps .
    if ! has torch && ! "$python" .ci/torch_cpu.py; then
        echo "torch cannot be installed here: its processes are skipped"
        return
    fi
    "$python" -m pytest -q python/tests/many_group.py
    cargo build --release --quiet --bin make-fixture --bin ddtas-train
    local root
    root=$(target/release/make-fixture --dataset cub200 --classes 12 --picture-width 40 --out "$place/birds")
    target/release/ddtas-train splits --dataset cub200 --data-root "$root" >"$place/splits.tsv"
    recipe=(examples/python/train.py "$place/splits.tsv" --size 32 --dim 32 --classes 5 --pictures 4 --rate 0.003 --workers 0)
    torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node)
    export OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1

    echo "three processes train as one does"
    "$python" "${recipe[@]}" --steps 30 --out "$place/one" >"$place/one.txt"
    "${torchrun[@]}" 3 "${recipe[@]}" --steps 30 --out "$place/three" >"$place/three.txt" 2>"$place/log" || said
    paste -d ' ' <(sed -n 's/.*loss //p' "$place/one.txt") <(sed -n 's/.*loss //p' "$place/three.txt") | awk '
        { if ($1 <= 0 || ($2 - $1) ^ 2 > (0.01 * $1) ^ 2) { print "step " 10 * NR ": " $1 " and " $2; wrong = 1 } }
        END { exit wrong || NR != 3 }'
    tail -n 1 "$place/three.txt"

    echo "a killed process ends the others, and the run goes on with two"
    "${torchrun[@]}" 3 "${recipe[@]}" --steps 100000 --save-every 5 --out "$place/recipe" &>"$place/log" &
    mpirun=$!
    until grep -q "step 10," "$place/log"; do
        kill -0 "$mpirun" || said
        sleep 0.1
    done
    kill -9 "$(rank_of 1)"
    ended killed "exitcode.*-9"
    "${torchrun[@]}" 2 "${recipe[@]}" --steps 100000 --save-every 5 --out "$place/recipe" --resume &>"$place/log" &
    mpirun=$!
    until grep -q "step 20," "$place/log"; do
        kill -0 "$mpirun" || said
        sleep 0.1
    done
    ! grep -q "step 10," "$place/log" || said
    kill "$mpirun"
    wait "$mpirun" || true
}

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
    cargo clippy --release --quiet --features ddtas-train/mpi --lib --bins --test ranks -- -D warnings
    cargo run --release --quiet --bin make-fixture -- --dataset cub200 --classes 12 --picture-width 40 --out "$place/set" >/dev/null
    train=$PWD/target/release/ddtas-train
    settings=(--dataset folder --data-root "$place/set/CUB_200_2011/images" --image-size 16 --width 4 --embedding-dim 16 --evaluate-every 0
        --classes-per-batch 5 --images-per-class 3 --steps 30 --checkpoint-every 5 --generator head --memory-size 20)
    # Long enough to be ended in the middle.
    steps=150
    long=(--steps $steps --warm-up 0 --schedule constant)
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

    echo "the same bytes as threads, uneven shares among them"
    for ranks in 2 3; do
        normalise=(--batch-norm "$([[ $ranks == 2 ]] && echo trainable || echo synchronised)")
        "$train" "${settings[@]}" "${normalise[@]}" --ranks "$ranks" --output "$place/threads-$ranks" &>"$place/log" || said
        mpi "$ranks" "${settings[@]}" "${normalise[@]}" --output "$place/mpi-$ranks" &>"$place/log" || said
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
    mpi 2 --resume "$place/killed" &>"$place/log" || said
    tail -n 2 "$place/killed/metrics.jsonl" | grep -q "\"step\":$((steps - 1)),"

    echo "SIGUSR1 saves and stops, and the run goes on to the same bytes"
    started stopped
    kill -USR1 "$mpirun"
    ended stopped "ddtas-train --resume $place/stopped"
    mpi 3 --resume "$place/stopped" &>"$place/log" || said
    mpi 3 "${settings[@]}" "${long[@]}" --output "$place/unbroken" &>"$place/log" || said
    cmp "$place/stopped/last.safetensors" "$place/unbroken/last.safetensors"

    echo "an error on one rank is one line"
    run=("$train" --ranks mpi "${settings[@]}" --output "$place/bad")
    if "${launch[@]}" -n 2 "${run[@]}" : -n 1 "${run[@]}" --data-root "$place/nowhere" &>"$place/log"; then said; fi
    [[ $(grep -c "^ddtas-train: " "$place/log") == 1 ]] && grep -q "^ddtas-train: rank 2: .*$place/nowhere" "$place/log" || said
    if "${launch[@]}" -n 2 "$train" "${settings[@]}" --output "$place/apart" &>"$place/log"; then said; fi
    grep -q "add --ranks mpi" "$place/log" || said
}

# The processors are shared out among the threads of all ranks, not the ranks among the processors.
launch=(mpirun --oversubscribe --bind-to none)
mpi() { "${launch[@]}" -n "$1" "$train" --ranks mpi "${@:2}"; }

# What the last program said, and the end.
said() {
    cat "$place/log"
    exit 1
}

# A run of three ranks in the background of 150 steps, ten of them done: $mpirun is its process.
started() {
    # Not by a function, whose process would be a shell.
    "${launch[@]}" -n 3 "$train" --ranks mpi "${settings[@]}" "${long[@]}" --output "$place/$1" &>"$place/log" &
    mpirun=$!
    until [[ $(wc -l <"$place/$1/metrics.jsonl") -ge 12 ]]; do
        kill -0 "$mpirun" || said
        sleep 0.05
    done 2>/dev/null
}

# The process of a rank of that run.
rank_of() {
    for process in $(pgrep -P "$mpirun"); do
        if tr '\0' '\n' <"/proc/$process/environ" | grep -qEx "(OMPI_COMM_WORLD_)?RANK=$1"; then echo "$process"; fi
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
mpirun=
trap '[[ -z $mpirun ]] || kill "$mpirun" 2>/dev/null || true; rm -rf "$place"' EXIT
parts=("$@")
[[ $# -gt 0 ]] || parts=(python trainer)
for part in "${parts[@]}"; do "$part"; done
