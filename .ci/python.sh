#!/usr/bin/env bash
# Installs the Python package as `pip install .` does from a clean clone, and tests it: with NumPy arrays always, with torch and
# pytorch-metric-learning's trainer if torch can be installed, and with the oldest torch that is promised (skips are counted and
# give their reason); then checks format and lints of its Rust code, and its types against the compiled module.
# Needs Rust, gcc and Python 3.10 or newer; the rest comes from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
export CARGO_TARGET_DIR=$PWD/target/python-build TQDM_DISABLE=1
tests_with_oldest_torch() {
    oldest_torch || echo "torch $oldest_torch cannot be installed here: its tests are skipped and counted below"
    install pytest numpy ml_dtypes
    install --force-reinstall --no-deps target/wheels/*.whl
    "$python" -m pytest -q python/tests/test_{loss,memory,operator,torch}.py
    echo "tested with torch $oldest_torch (${SECONDS}s)"
}

install pytest mypy numpy ml_dtypes
wheel target/wheels
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
# Beside the tests with the newest torch: neither uses two cores.
tests_with_oldest_torch >target/oldest-torch.log 2>&1 &
beside=$!
"$python" -m pytest -q
"$python" examples/python/reference_blocks.py
if has torch; then "$python" examples/python/chunked_batch.py; fi
# The same wheel in the oldest Python at hand.
fresh target/wheels python-oldest
target/python-oldest/bin/python examples/python/reference_blocks.py
echo "tested (${SECONDS}s), the wheel also in $(target/python-oldest/bin/python --version)"
status=0
wait "$beside" || status=$?
cat target/oldest-torch.log
((status == 0))

cargo fmt --check --manifest-path python/Cargo.toml
cargo clippy --release --quiet --manifest-path python/Cargo.toml -- -D warnings
modules=(python/ddtas/*.py)
if has torch; then modules+=(python/ddtas/torch/*.py); fi
"$python" -m mypy --strict --follow-imports=silent "${modules[@]}"
"$python" -m mypy.stubtest ddtas._ddtas
echo "checked (${SECONDS}s)"
