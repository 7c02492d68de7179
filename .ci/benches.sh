#!/usr/bin/env bash
# Runs every criterion bench of the CPU backend's passes once, as a test. Needs only Rust; the package
# does not include the training engine, so this builds in about a minute on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo test --release --quiet --manifest-path benches/passes/Cargo.toml --target-dir target --bench passes -- --test
