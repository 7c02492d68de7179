#!/usr/bin/env bash
# Compares `ddtas-train eval` with the definitions in numpy and with scikit-learn's NMI; also with pytorch-metric-learning,
# if .ci/python.sh has installed it. Needs Rust and Python 3.11; installs numpy, scikit-learn and safetensors.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
install numpy==2.4.6 scikit-learn==1.9.1 safetensors==0.8.0
cargo build --release --quiet --bin ddtas-train
"$python" train/tests/evaluation.py --binary target/release/ddtas-train
