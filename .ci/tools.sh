# Sourced by the other scripts: installs nvcc, the disassembler and libclang from PyPI into
# target/cuda-tools, and puts that folder first in PATH.

# All are pinned: nvcc alone would pull newer parts that do not fit it. The disassembler of 13.2 can read 13.0.
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78 libclang==18.1.1
)
environment=target/cuda-tools
if [[ "$(cat "$environment/packages" 2>/dev/null)" != "${packages[*]}" ]]; then
    python3 -m venv --clear "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
    echo "${packages[*]}" >"$environment/packages"
fi
PATH="$PWD/$environment/bin:$PATH"
PATH="$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/bin:$PATH"
export PATH

# Names nvcc and libclang to builds that would not find them: pip's have another Python first in PATH, the bindings of mpi.h search none.
name_tools() {
    NVCC=$(command -v nvcc)
    LIBCLANG_PATH=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/clang/native
    export NVCC LIBCLANG_PATH
}

# Compiles the CUDA kernels, the library and its tests unless that was done before. Prints the folder of the images and of the assembler's
# reports. Always the same packages with their tests' dependencies: the kernels and the library are compiled once.
kernel_packages=(-p ddtas -p ddtas-bench --features cuda)
kernels() {
    # `settings` brings the program.
    local tests=(--test cuda --test driver --test settings)
    cargo test --release --no-run "${kernel_packages[@]}" "${tests[@]}" --message-format=json-render-diagnostics |
        python3 -c '
# The folder that this build wrote to: folders of earlier builds may exist beside it.
import json, pathlib, sys
for message in map(json.loads, sys.stdin):
    folder = pathlib.Path(message.get("out_dir", ""))
    if folder.parent.name.startswith("ddtas-"):
        print(folder)'
}
