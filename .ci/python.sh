#!/usr/bin/env bash
# Installs the Python package as `pip install .` does from a clean clone, and tests it: with NumPy arrays always, with torch and
# pytorch-metric-learning's trainer if torch can be installed (skips are counted and give their reason); then checks format
# and lints of its Rust code, and its types against the compiled module.
# Needs Rust, gcc and Python 3.10 or newer; the rest comes from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
export CARGO_TARGET_DIR=$PWD/target/python-build TQDM_DISABLE=1

install pytest mypy numpy ml_dtypes
rm -rf target/wheels
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir target/wheels .
install --force-reinstall --no-deps target/wheels/*.whl
echo "installed (${SECONDS}s)"

# A torch from an earlier run is kept if it can still be imported.
if ! has "torch, pytorch_metric_learning"; then
    if install scikit-learn tqdm && "$python" .ci/torch_cpu.py && install --no-deps pytorch-metric-learning==2.9.0; then
        echo "torch installed (${SECONDS}s)"
    else
        echo "torch cannot be installed here: its tests are skipped and counted below"
    fi
fi
"$python" -m pytest -q
"$python" examples/python/reference_blocks.py
if has torch; then "$python" examples/python/chunked_batch.py; fi
# The same wheel in the oldest Python at hand, with the newest NumPy for it.
for oldest in python3.10 ~/.pyenv/versions/3.10.*/bin/python3.10 python3.11 python3; do
    "$oldest" -c "" 2>/dev/null && break
done
"$oldest" -m venv --clear --without-pip target/python-oldest
PIP_CONSTRAINT= "$python" -m pip --python target/python-oldest/bin/python install --quiet --disable-pip-version-check target/wheels/*.whl
target/python-oldest/bin/python examples/python/reference_blocks.py
echo "tested (${SECONDS}s), the wheel also in $("$oldest" --version)"

cargo fmt --check --manifest-path python/Cargo.toml
cargo clippy --release --quiet --manifest-path python/Cargo.toml -- -D warnings
modules=(python/ddtas/*.py)
if has torch; then modules+=(python/ddtas/torch/*.py); fi
"$python" -m mypy --strict --follow-imports=silent "${modules[@]}"
"$python" -m mypy.stubtest ddtas._ddtas
echo "checked (${SECONDS}s)"
