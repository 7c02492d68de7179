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
