#!/usr/bin/env bash
# Holds the named backbones to PyTorch's: features and the gradients of all weights, drawn by torch; reads what torch writes and lets
# torch read what a checkpoint holds.
# Needs Rust, gcc and Python 3.10 or newer; the rest comes from PyPI into target/. Sizes may be given: .ci/backbones.sh 96,97,224
set -euo pipefail
cd "$(dirname "$0")/.."

environment=target/python
python="$environment/bin/python"
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-compile)
[ -x "$python" ] || python3 -m venv "$environment"
if ! "$python" -c 'import torch, torchvision, timm, pretrainedmodels, efficientnet_lite_pytorch, safetensors' 2>/dev/null; then
    "$python" -c 'import torch' 2>/dev/null || "$python" .ci/torch_cpu.py
    # Without what they would bring along: torch as built for CUDA, data sets, a hub.
    "${pip[@]}" numpy pillow safetensors pyyaml huggingface_hub munch six tqdm setuptools
    "${pip[@]}" --no-deps torchvision==0.29.2 timm==1.0.31 efficientnet_lite_pytorch==0.1.0
    "${pip[@]}" --no-deps --no-build-isolation pretrainedmodels==0.7.4
fi
echo "installed (${SECONDS}s)"
cargo build --release --quiet -p ddtas-train --example gradients
"$python" train/tests/backbones.py target/release/examples/gradients --size "${1:-96,97}"
echo "compared (${SECONDS}s)"
