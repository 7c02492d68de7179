#!/usr/bin/env bash
# Tests processes that train together.
#
#     .ci/many.sh              everything
#     .ci/many.sh NAME...      parts of it: python (ddtas.torch over gloo, by torchrun), trainer (ddtas-train by mpirun), nccl (ddtas-train over stand-ins for NCCL)
#
# Needs Rust, g++ and Python 3.11; installs Open MPI if it is missing, and libclang and Python packages into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

# The loss of a process group in 1 to 4 processes; the recipe in three: the same losses as in one, a killed rank,
# resuming with two.
python() {
    source .ci/environment.sh
    install pytest numpy pillow
    if ! has torch && ! "$python" .ci/torch_cpu.py; then
        echo "torch cannot be installed here: its processes are skipped"
        return
    fi
    # The package with the emulated device in place of a GPU, in a folder of its own.
    (
        source .ci/tools.sh
        export CARGO_TARGET_DIR=$PWD/target/python-build
        cargo build --release --locked --quiet --manifest-path python/Cargo.toml --features emulated
        cargo clippy --release --locked --quiet --manifest-path python/Cargo.toml --features emulated -- -D warnings
    )
    mkdir "$place/emulated"
    cp -r python/ddtas "$place/emulated"
    cp target/python-build/release/lib_ddtas.so "$place/emulated/ddtas/_ddtas.abi3.so"
    export PYTHONPATH=$place/emulated
    "$python" -m pytest -q python/tests/{many_group,test_emulated,test_operator}.py -k "many_group or emulated"
    cargo build --release --quiet --bin make-fixture --bin ddtas-train
    local root
    root=$(target/release/make-fixture --dataset cub200 --classes 12 --picture-width 40 --out "$place/birds")
    target/release/ddtas-train splits --dataset cub200 --data-root "$root" >"$place/splits.tsv"
    recipe=(examples/python/train.py "$place/splits.tsv" --image-size 32 --embedding-dim 32 --classes-per-batch 5 --images-per-class 4
        --learning-rate 0.003 --workers 0 --lambda 0.5 --generator head)
    torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node)
    export OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1

    echo "three processes train as one does"
    # Ten steps: the last bits, which differ, grow to some per cent of the loss in thirty.
    "$python" "${recipe[@]}" --steps 10 --output "$place/one" >"$place/one.txt"
    "${torchrun[@]}" 3 "${recipe[@]}" --steps 10 --output "$place/three" >"$place/three.txt" 2>"$place/log" || said
    figures() { sed -n 's/step 10, loss \([0-9.]*\), lambda \([0-9.]*\)$/\1 \2/p' "$place/$1.txt"; }
    paste -d ' ' <(figures one) <(figures three) | awk '
        function differ(a, b) { return a <= 0 || (b - a) ^ 2 > (0.001 * a) ^ 2 }
        { if (differ($1, $3) || differ($2, $4) || $2 == 0.5) { print "step 10: " $0; wrong = 1 } }
        END { exit wrong || NR != 1 }'
    tail -n 1 "$place/three.txt"

    echo "a killed process ends the others, and the run goes on with two"
    "${torchrun[@]}" 3 "${recipe[@]}" --steps 100000 --checkpoint-every 5 --output "$place/recipe" &>"$place/log" &
    mpirun=$!
    # By then the checkpoint of step 10 is complete.
    until grep -q "step 20," "$place/log"; do
        kill -0 "$mpirun" || said
        sleep 0.1
    done
    kill -9 "$(rank_of 1)"
    ended killed "exitcode.*-9"
    "${torchrun[@]}" 2 "${recipe[@]}" --steps 100000 --checkpoint-every 5 --output "$place/recipe" --resume &>"$place/log" &
    mpirun=$!
    until grep -q "step 30," "$place/log"; do
        kill -0 "$mpirun" || said
        sleep 0.1
    done
    ! grep -q "step 10," "$place/log" || said
    kill "$mpirun"
    wait "$mpirun" || true
}

# Builds ddtas-train with MPI and NCCL, and makes its training pictures.
build() {
    # The build links to Open MPI.
    if ! command -v mpirun >/dev/null || ! command -v mpicc >/dev/null; then
        local as_root=()
        [[ $(id -u) == 0 ]] || as_root=(sudo)
        "${as_root[@]}" apt-get -o Acquire::Retries=5 update -qq
        "${as_root[@]}" apt-get -o Acquire::Retries=5 install -qq -y --no-install-recommends openmpi-bin libopenmpi-dev >/dev/null
    fi
    source .ci/tools.sh
    # For the bindings of mpi.h: PyPI's libclang lacks the compiler's own headers.
    name_tools
    BINDGEN_EXTRA_CLANG_ARGS="-I$(gcc -print-file-name=include)"
    export BINDGEN_EXTRA_CLANG_ARGS
    # Through a test, so that only this package is built again.
    cargo test --release --quiet --no-run --features ddtas-train/mpi,ddtas-train/nccl --test ranks
    cargo clippy --release --quiet --features ddtas-train/mpi,ddtas-train/nccl --lib --bins --test ranks -- -D warnings
    cargo run --release --quiet --bin make-fixture -- --dataset cub200 --classes 12 --picture-width 40 --out "$place/set" >/dev/null
    train=$PWD/target/release/ddtas-train
    settings=(--dataset folder --data-root "$place/set/CUB_200_2011/images" --image-size 16 --width 4 --embedding-dim 16 --evaluate-every 0
        --classes-per-batch 5 --images-per-class 3 --steps 30 --checkpoint-every 5 --generator head --memory-size 20)
    # Long enough to be interrupted in the middle.
    steps=600
    long=(--steps $steps --warm-up 0 --schedule constant)
}

# ddtas-train with Open MPI: two and three processes give the same bytes as threads; killed, stopped, resumed with other ranks, bad data.
# train/tests/ranks.rs compares threads with one process.
trainer() {
    [[ -n $train ]] || build
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

    echo "the same bytes as threads, uneven shares among them"
    for ranks in 2 3; do
        by_threads "$ranks"
        mpi "$ranks" "${settings[@]}" "${normalise[@]}" --output "$place/mpi-$ranks" &>"$place/log" || said
        same_as_threads "$ranks" mpi
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
    ended stopped "mpirun -n 3 .*ddtas-train --ranks mpi --resume $place/stopped"
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

# ddtas-train over NCCL, as a launcher starts it: the same bytes as threads; a rank that is killed, hangs, or does not come; files left by other runs; missing libraries and settings.
# NCCL and the driver are stand-ins (train/tests/nccl); the real ones have not been run.
nccl() {
    [[ -n $train ]] || build
    mkdir "$place/libraries" "$place/driver"
    g++ -std=c++17 -O1 -Wall -Wextra -shared -fPIC -pthread -o "$place/libraries/libcuda.so" train/tests/nccl/{driver,nccl}.cpp
    ln -s libcuda.so "$place/libraries/libnccl.so"
    ln -s ../libraries/libcuda.so "$place/driver/libcuda.so"
    export LD_LIBRARY_PATH=$place/libraries

    echo "the same bytes as threads over NCCL"
    for ranks in 2 3; do
        by_threads "$ranks"
        over_nccl "$ranks" "${settings[@]}" "${normalise[@]}" --output "$place/nccl-$ranks"
        all_succeed
        same_as_threads "$ranks" nccl
    done

    echo "a killed rank ends the others, and the run goes on with fewer, past what is left of ranks that did not meet"
    over_nccl 3 "${settings[@]}" "${long[@]}" --output "$place/nccl-killed"
    under_way nccl-killed "${processes[0]}"
    killed "${processes[1]}"
    each_says "ended without a word: rank 1 (process" 0 2
    grep -q "then run: 3 processes of ddtas-train --ranks nccl --rendezvous FILE --resume $place/nccl-killed" "$place/log.0" || said
    # Rank 1 alone, which leaves its file.
    RANK=1 WORLD_SIZE=2 "$train" --ranks nccl --rendezvous "$place/id" --device cpu --resume "$place/nccl-killed" &>"$place/log.1" &
    processes=($!)
    until [[ -e $place/id.1 ]]; do
        kill -0 "${processes[0]}" || said
        sleep 0.02
    done
    killed "${processes[@]}"
    over_nccl 2 --resume "$place/nccl-killed"
    all_succeed
    tail -n 2 "$place/nccl-killed/metrics.jsonl" | grep -q "\"step\":$((steps - 1)),"
    [[ -z $(ls "$place"/id* 2>/dev/null) ]]

    echo "rank 0 is killed, and NCCL notices"
    FAKE_DEAD=error over_nccl 2 "${settings[@]}" "${long[@]}" --output "$place/nccl-first"
    under_way nccl-first "${processes[0]}"
    killed "${processes[0]}"
    each_says "ended without a word: rank 0 (process" 1

    echo "a rank that hangs or does not come is given up after a time"
    over_nccl 2 "${settings[@]}" "${long[@]}" --output "$place/nccl-hangs" --rank-timeout 15
    under_way nccl-hangs "${processes[0]}"
    kill -STOP "${processes[1]}"
    each_says "no message from the other ranks for 15 s" 0
    killed "${processes[1]}"
    refused "rank 1 did not come" RANK=0 WORLD_SIZE=2 --rank-timeout 1
    refused "rank 0 did not come" RANK=1 WORLD_SIZE=2 --rank-timeout 1

    echo "an error on one rank is one line"
    last=(--data-root "$place/nowhere")
    over_nccl 3 "${settings[@]}" --output "$place/nccl-bad"
    last=()
    each_says "rank 2: .*$place/nowhere" 0
    if wait "${processes[1]}" || wait "${processes[2]}"; then said; fi
    [[ ! -s $place/log.1 && ! -s $place/log.2 ]] || said

    echo "what is missing is said in one line"
    refused "no NVIDIA driver" RANK=0 WORLD_SIZE=1 LD_LIBRARY_PATH=
    refused "ln -s libnccl.so.2 libnccl.so" RANK=0 WORLD_SIZE=1 "LD_LIBRARY_PATH=$place/driver"
    refused "libnccl.so is version 2806" RANK=0 WORLD_SIZE=1 FAKE_VERSION=2806
    refused "rank 0 needs GPU 1 of .*, where it sees 1: NCCL takes a GPU for each rank" RANK=0 WORLD_SIZE=1 LOCAL_RANK=1 FAKE_GPUS=1
    refused "RANK is not set" WORLD_SIZE=2
    refused "RANK=2 is out of range" RANK=2 WORLD_SIZE=2
    LOCAL_RANK=0 over_nccl 2 "${settings[@]}" --output "$place/nccl-one-gpu"
    each_says "rank 0 and rank 1 both on CUDA device 0; NCCL does not allow two ranks on one GPU" 0
    each_says "NCCL does not allow two ranks on one GPU" 1
    if RANK=0 WORLD_SIZE=2 "$train" "${settings[@]}" --output "$place/apart" &>"$place/log"; then said; fi
    grep -q "add --ranks nccl --rendezvous FILE" "$place/log" || said
}

# Starts $1 ranks in the background with the arguments $2 and so on, the last rank also with those in $last. Sets $processes.
over_nccl() {
    processes=()
    for ((rank = 0; rank < $1; rank++)); do
        # Not by a function, whose process would be a shell. Two ranks get torchrun's variables, three srun's.
        local variables=("RANK=$rank" "WORLD_SIZE=$1")
        [[ $1 == 2 ]] || variables=("SLURM_PROCID=$rank" "SLURM_NTASKS=$1" "SLURM_LOCALID=$rank")
        local apart=()
        [[ $rank -lt $(($1 - 1)) ]] || apart=("${last[@]}")
        env "${variables[@]}" "$train" --ranks nccl --rendezvous "$place/id" --device cpu "${@:2}" "${apart[@]}" &>"$place/log.$rank" &
        processes+=($!)
    done
}

# Kills processes, without the shell's message.
killed() {
    kill -9 "$@"
    wait "$@" 2>/dev/null || true
}

all_succeed() {
    for rank in "${!processes[@]}"; do
        wait "${processes[rank]}" || said
    done
}

# Waits until run $1 of process $2 has done ten steps.
under_way() {
    until [[ $(wc -l <"$place/$1/metrics.jsonl") -ge 12 ]]; do
        kill -0 "$2" || said
        sleep 0.05
    done 2>/dev/null
}

# Waits for process $1, named $2, which must end within thirty seconds with an error.
fails_soon() {
    for _ in {1..300}; do
        kill -0 "$1" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$1" 2>/dev/null; then
        echo "$2 has not ended"
        said
    fi
    if wait "$1"; then said; fi
}

# The ranks $2 and so on must end within thirty seconds with an error, in one last line that contains $1.
each_says() {
    for rank in "${@:2}"; do
        fails_soon "${processes[rank]}" "rank $rank"
        tail -n 1 "$place/log.$rank" | grep -q "^ddtas-train: .*$1" || said
        [[ $(grep -c "^ddtas-train: " "$place/log.$rank") == 1 ]] || said
    done
}

# Runs a single rank with the variables and flags $2 and so on; its one line must contain $1.
refused() {
    local variables=() flags=()
    for argument in "${@:2}"; do
        if [[ $argument == *=* ]]; then variables+=("$argument"); else flags+=("$argument"); fi
    done
    if env "${variables[@]}" "$train" --ranks nccl --rendezvous "$place/id" --device cpu "${settings[@]}" --output "$place/refused" "${flags[@]}" &>"$place/log"; then said; fi
    [[ $(wc -l <"$place/log") == 1 ]] && grep -q "^ddtas-train: .*$1" "$place/log" || said
}

# Runs $1 ranks as threads, unless that was done before. Sets $normalise, the way of normalising.
by_threads() {
    normalise=(--batch-norm "$([[ $1 == 2 ]] && echo trainable || echo synchronised)")
    [[ -d $place/threads-$1 ]] || "$train" "${settings[@]}" "${normalise[@]}" --ranks "$1" --output "$place/threads-$1" &>"$place/log" || said
}

same_as_threads() {
    for file in metrics.jsonl last.safetensors best.safetensors; do
        cmp "$place/threads-$1/$file" "$place/$2-$1/$file"
    done
}

# --bind-to none, since each rank uses several threads; the ranks divide the processors themselves.
launch=(mpirun --oversubscribe --bind-to none)
mpi() { "${launch[@]}" -n "$1" "$train" --ranks mpi "${@:2}"; }

# Prints the output of the last program and exits.
said() {
    tail -n +1 "$place"/log*
    exit 1
}

# Starts a run of three ranks and $steps steps in the background, and waits for ten of them. Sets $mpirun, its process.
started() {
    # Not by a function, whose process would be a shell.
    "${launch[@]}" -n 3 "$train" --ranks mpi "${settings[@]}" "${long[@]}" --output "$place/$1" &>"$place/log" &
    mpirun=$!
    under_way "$1" "$mpirun"
}

# Process id of rank $1 of that run.
rank_of() {
    for process in $(pgrep -P "$mpirun"); do
        if tr '\0' '\n' <"/proc/$process/environ" | grep -qEx "(OMPI_COMM_WORLD_)?RANK=$1"; then echo "$process"; fi
    done
}

# Waits for that run, named $1, which must end within thirty seconds with an error and a line that contains $2.
ended() {
    fails_soon "$mpirun" "$1"
    grep -q "$2" "$place/log" || said
}

place=$(mktemp -d)
mpirun= train=
processes=() last=()
# -9, since ranks save a checkpoint after a SIGTERM.
trap 'kill $mpirun 2>/dev/null || true; kill -9 "${processes[@]}" 2>/dev/null || true; rm -rf "$place" || true' EXIT
parts=("$@")
[[ $# -gt 0 ]] || parts=(python trainer nccl)
for part in "${parts[@]}"; do "$part"; done
