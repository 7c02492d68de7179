#!/usr/bin/env bash
# Compiles the CUDA kernels with g++ and runs them on the CPU: reference cases and random shapes
# through every kernel, with shuffled schedules, and with planted faults that must be detected; then the
# reference cases, searches and calls on device rows under AddressSanitizer and UndefinedBehaviorSanitizer;
# then every kernel under ThreadSanitizer, which treats every thread of a block as a thread.
# Needs Rust, gcc/g++ and Python 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/tools.sh
say() { printf -- '-- %s (%ss)\n' "$1" "$SECONDS"; }

packages=(-p ddtas -p ddtas-bench -p ddtas-cases --features emulated)
# Builds the program through its tests, so that the library is compiled once for both.
verify() {
    cargo test --release --quiet --no-run "${packages[@]}" --test verify
    env ${preload:+LD_PRELOAD="$preload"} target/release/ddtas-bench verify --backend emulated "$@"
}
cargo test --release "${packages[@]}" --lib --test emulation --test emulated --test nearest --test launches --test resident --test comparison --test spot_check --test capi --test verify
verify tests/golden

# With DDTAS_SANITIZE build.rs compiles the kernels again, and so this crate, but none of its dependencies.
# The sanitizer's runtime must be loaded before Rust's.
sanitize() {
    export DDTAS_SANITIZE=$1
    preload=$(g++ -print-file-name="$2")
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$preload"
}

say "AddressSanitizer and UndefinedBehaviorSanitizer"
sanitize address,undefined libasan.so
export ASAN_OPTIONS=detect_leaks=0
verify tests/golden
cargo test --release --quiet "${packages[@]}" --test nearest --test resident

say "ThreadSanitizer: a barrier taken out of select.cu is noticed"
sanitize thread libtsan.so
# ThreadSanitizer sees Rust's copies and allocations, but not the synchronisation between its threads
# (kernels/emulation/races.h).
export TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_interceptors_accesses=1"
faulty=$(mktemp -d)
trap 'rm -rf "$faulty"' EXIT
cp -r kernels/. "$faulty"
sed -i 's/block_sync();  \/\/ all words and sums are written//' "$faulty/selection/select.cu"
status=0
said=$(DDTAS_KERNELS=$faulty verify tests/golden/paper_batch80.safetensors 2>&1) || status=$?
if [[ $status != 66 || $said != *"data race"*select.cu* ]]; then
    echo "the race went unnoticed, exit code $status: $said"
    exit 1
fi

say "ThreadSanitizer: every kernel"
# Two processes in parallel instead of test threads, whose synchronisation ThreadSanitizer would not see.
cargo test --release --quiet --no-run "${packages[@]}" --test emulated
cargo test --release "${packages[@]}" --test emulated every_kernel_of_f32 -- --test-threads 1 &
cargo test --release "${packages[@]}" --test emulated every_kernel -- --skip f32 --test-threads 1
wait $!
verify tests/golden
say "done"
