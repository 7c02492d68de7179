#!/usr/bin/env bash
# Holds `ddtas-train eval` to the definitions in numpy and to scikit-learn's NMI; to pytorch-metric-learning too
# where the environment (DDTAS_PYTHON) has it. Needs Rust and Python 3.11; installs numpy, scikit-learn and safetensors.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${DDTAS_PYTHON:-}
if [[ -z $python ]]; then
    packages=(numpy==2.4.6 scikit-learn==1.9.1 safetensors==0.8.0)
    environment=target/evaluation-tools
    if [[ "$(cat "$environment/packages" 2>/dev/null)" != "${packages[*]}" ]]; then
        python3 -m venv --clear "$environment"
        "$environment/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
        echo "${packages[*]}" >"$environment/packages"
    fi
    python=$environment/bin/python3
fi
source .ci/train.sh
"$python" train/tests/evaluation.py --binary "$DDTAS_TRAIN"
