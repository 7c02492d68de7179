# Sourced by the other scripts for builds with the feature train-cuda: provides a static LLVM for Burn's CUDA backend.
#
# Its build script (tracel-llvm-bundler) would download one from its project's releases, which cannot be reached
# everywhere. This puts the same major version from PyPI into target/llvm, with the layout of that download.
llvm=$PWD/target/llvm
llvm_packages=(mlc-llvm-static==23.1.1.post0 mlc-llvm-static-extra-targets==23.1.1.post0)
if [[ "$(cat "$llvm/packages" 2>/dev/null)" != "${llvm_packages[*]}" ]]; then
    rm -rf "$llvm"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --no-deps --target "$llvm/python" "${llvm_packages[@]}"
    bundle=$(sed -n '/^name = "tracel-llvm-bundler"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock)
    mkdir -p "$llvm/tracel"
    ln -s "$llvm/python/mlc_llvm_static/static" "$llvm/tracel/tracel-llvm-$bundle"
    touch "$llvm/tracel/tracel-llvm-$bundle/.tracel-llvm-installed"
    echo "${llvm_packages[*]}" >"$llvm/packages"
fi
# Where the build script looks for earlier downloads.
export XDG_DATA_HOME=$llvm
