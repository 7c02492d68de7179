#!/usr/bin/env bash
# Runs every criterion bench of the CPU backend's passes once, as a test. Needs Rust alone; the package
# leaves the training engine out, so this builds in about a minute of two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo test --release --quiet --manifest-path benches/passes/Cargo.toml --target-dir target --bench passes -- --test
