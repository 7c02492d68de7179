#!/usr/bin/env bash
# Builds libddtas and installs it for C, C++ and other languages that link C libraries:
#
#   packaging/install.sh PREFIX [FEATURES]
#
# Installs PREFIX/include/ddtas.h, PREFIX/lib/libddtas.{a,so}, lib/pkgconfig/ddtas.pc and
# lib/cmake/ddtas. FEATURES are built besides `capi`: `cuda` for rows in GPU memory.
# Needs Rust; with `cuda` also nvcc and libclang. Linux.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: packaging/install.sh PREFIX [FEATURES]" >&2
    exit 2
fi
mkdir -p "$1"
prefix=$(cd "$1" && pwd)
features=capi${2:+,$2}
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
abi=$(sed -n 's/^#define DDTAS_ABI_VERSION \([0-9]*\)$/\1/p' include/ddtas.h)
soname=libddtas.so.$abi
shared=$soname.$version
# `nodelete`: threads of the caller have thread-local variables of the library, whose keys an unloaded library would not give
# back. Cargo is asked where it wrote the libraries, since the environment and its configuration can move its target folder.
built=$(cargo rustc --release -p ddtas --lib --no-default-features --features "$features" \
    --message-format=json-render-diagnostics --crate-type staticlib,cdylib \
    -- -C "link-arg=-Wl,-soname,$soname" -C link-arg=-Wl,-z,nodelete | sed -n 's|.*"\([^"]*\)/libddtas\.so".*|\1|p')
# System libraries that Rust's standard library needs when linked statically; gcc adds its own for unwinding.
system_libraries="-lpthread -lm -ldl -lc"

fill() {
    sed -e "s|@VERSION@|$version|g" -e "s|@MAJOR_MINOR@|${version%.*}|g" \
        -e "s|@SHARED@|$shared|g" -e "s|@SONAME@|$soname|g" \
        -e "s|@SYSTEM_LIBRARIES@|${2:-$system_libraries}|g" "packaging/$1.in"
}
install -d "$prefix/include" "$prefix/lib/pkgconfig" "$prefix/lib/cmake/ddtas"
install -m 644 include/ddtas.h "$prefix/include/"
install -m 644 "$built/libddtas.a" "$prefix/lib/"
install -m 755 "$built/libddtas.so" "$prefix/lib/$shared"
ln -sf "$shared" "$prefix/lib/$soname"
ln -sf "$soname" "$prefix/lib/libddtas.so"
fill ddtas.pc >"$prefix/lib/pkgconfig/ddtas.pc"
fill ddtasConfig.cmake "${system_libraries// /;}" >"$prefix/lib/cmake/ddtas/ddtasConfig.cmake"
fill ddtasConfigVersion.cmake >"$prefix/lib/cmake/ddtas/ddtasConfigVersion.cmake"
echo "installed ddtas $version (features $features) to $prefix"
