#!/usr/bin/env bash
# Reads the event files of a run that was killed and resumed with the tensorboard package.
# Needs the release build and Python 3.11 or later; without network it prints that and passes.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/environment.sh
if ! install "tensorboard>=2.20,<3" "setuptools<81"; then
    echo "skipped: the tensorboard package cannot be installed here"
    exit 0
fi
cargo build --release --quiet --bin ddtas-train
run=$(mktemp -d)/run
trap 'rm -r "$(dirname "$run")" || true' EXIT
settings=(--image-size 16 --width 4 --embedding-dim 16 --steps 60 --evaluate-every 1 --classes-per-batch 8
    --images-per-class 20 --generator head --checkpoint-every 7 --output "$run")
target/release/ddtas-train "${settings[@]}" 2> "$run.log" &
process=$!
until [ "$(cat "$run/metrics.jsonl" 2> /dev/null | wc -l)" -ge 20 ]; do
    kill -0 "$process" || { cat "$run.log"; exit 1; }
    sleep 0.01
done
kill -9 "$process"
wait "$process" 2> /dev/null || true
target/release/ddtas-train --resume "$run" > "$run.table" 2>> "$run.log" || { cat "$run.log"; exit 1; }
"$python" .ci/event_files.py "$run"
