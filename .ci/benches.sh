#!/usr/bin/env bash
# Runs every criterion bench of the CPU backend's passes once. Needs Rust alone; the package
# leaves the training engine out, so this builds in about a minute of two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo bench --manifest-path benches/passes/Cargo.toml -- --test
