#!/usr/bin/env bash
# Builds the Python package with CUDA by pip and maturin, and tries the wheel in a new environment on a machine without a GPU: its tag and
# size, results on the CPU equal to those of the wheel for the CPU to the last bit, and the error of a call for the GPU. Then the tests of
# ddtas.torch with it, if .ci/python.sh has installed torch.
# The kernels are those that .ci/cuda.sh has compiled, the wheel for the CPU that of .ci/python.sh; both are built if they are missing.
# Needs Rust, gcc/g++ and Python 3.11; the rest comes from PyPI into target/.
set -euo pipefail
cd "$(dirname "$0")/.."

source .ci/environment.sh
if [[ ! -x target/python-oldest/bin/python ]]; then
    wheel target/wheels
    fresh target/wheels python-oldest
fi
(
    source .ci/tools.sh
    # Before the tools are named: with other variables Cargo would compile the kernels again.
    KERNELS=$(kernels)
    name_tools
    # In place of nvcc: copies the image that it is asked for, and the assembler's report.
    NVCC=$PWD/target/nvcc
    export KERNELS
    cat >"$NVCC" <<'END'
#!/usr/bin/env bash
set -euo pipefail
while [[ $1 != -o ]]; do shift; done
name=$(basename "$2" .fatbin)
cp "$KERNELS/$name.fatbin" "$2"
cat "$KERNELS/$name.ptxas.txt" >&2
END
    chmod +x "$NVCC"
    wheel target/wheels-cuda --config-settings=build-args='--features cuda'
)
built=(target/wheels-cuda/*.whl)
ls -l "${built[@]}"
[[ ${#built[@]} == 1 && ${built[0]} == */ddtas-*-cp310-abi3-linux_*.whl ]]
"$python" -m zipfile --list "${built[0]}" | grep "ddtas/_ddtas\.abi3\.so"
# Some 4.1 MB where debugging symbols are removed, as they are for users.
bytes=$(stat --format %s "${built[0]}")
((bytes > 2 << 20 && bytes < 6 << 20)) || { echo "$bytes bytes: too many, or too few for the kernels"; exit 1; }
echo "built (${SECONDS}s)"

fresh target/wheels-cuda python-cuda
target/python-oldest/bin/python .ci/wheel.py cpu >target/wheel-cpu.txt
target/python-cuda/bin/python .ci/wheel.py cuda >target/wheel-cuda.txt
diff target/wheel-{cpu,cuda}.txt
if has "torch, pytest"; then
    rm -rf target/python-cuda-torch
    install --no-deps --target target/python-cuda-torch "${built[@]}"
    PYTHONPATH=$PWD/target/python-cuda-torch "$python" -m pytest -q python/tests/test_{gpu,loss,torch}.py
fi
echo "tested (${SECONDS}s)"
