#!/usr/bin/env bash
# Tests the library for C and C++: builds it without Burn and CUDA, installs it to a separate prefix,
# compares its symbols with the header's, builds the examples by pkg-config and by CMake and runs them,
# and runs the C tests (tests/capi) under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs Rust, gcc/g++ and Python 3.11; installs make and pkg-config from Debian, CMake from PyPI if they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf -- '-- %s (%ss)\n' "$1" "$SECONDS"; }

work=target/linked
rm -rf "$work"
mkdir -p "$work"
prefix=$PWD/$work/prefix
if ! command -v make >/dev/null || ! command -v pkg-config >/dev/null; then
    as_root=()
    [[ $(id -u) == 0 ]] || as_root=(sudo)
    "${as_root[@]}" apt-get -o Acquire::Retries=5 update -qq
    "${as_root[@]}" apt-get -o Acquire::Retries=5 install -y -qq make pkg-config
fi
if ! command -v cmake >/dev/null; then
    tools=target/linked-tools
    [[ -x $tools/bin/cmake ]] || { python3 -m venv "$tools" && "$tools/bin/pip" install --quiet --disable-pip-version-check cmake==3.31.6; }
    PATH=$PWD/$tools/bin:$PATH
fi

say "install: from a target folder of its own, to a path with characters that sed knows; then the tree is moved"
CARGO_BUILD_TARGET_DIR=$PWD/target/linked-build packaging/install.sh "$work/first & | only"
mv "$work/first & | only" "$prefix"
export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
pkg-config --exact-version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)" ddtas

say "exported symbols: those of the header, no others"
grep -o 'ddtas_[a-z_]*(' include/ddtas.h | tr -d '(' | sort -u >"$work/header"
nm --dynamic --defined-only --format=just-symbols "$prefix/lib/libddtas.so" | sort -u >"$work/exported"
diff "$work/header" "$work/exported"
readelf -d "$prefix/lib/libddtas.so" | grep -q "SONAME.*libddtas.so.$(sed -n 's/^#define DDTAS_ABI_VERSION //p' include/ddtas.h)"
readelf -d "$prefix/lib/libddtas.so" | grep -q 'Flags:.*NODELETE'
ls -l "$prefix"/lib/libddtas.*

say "the header alone, as C11 and as C++"
warnings=(-Wall -Wextra -Wpedantic -Werror)
echo '#include <ddtas.h>' | gcc -std=c11 "${warnings[@]}" -fsyntax-only -I"$prefix/include" -x c -
echo '#include <ddtas.h>' | g++ -std=c++11 "${warnings[@]}" -fsyntax-only -I"$prefix/include" -x c++ -

say "examples/c: make and pkg-config"
cp -r examples/c "$work/c"
make --silent -C "$work/c"
"$work/c/loss"

say "examples/cpp: CMake find_package"
cmake -S examples/cpp -B "$work/cpp" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release >"$work/cmake.log"
cmake --build "$work/cpp" >>"$work/cmake.log" || { cat "$work/cmake.log"; exit 1; }
"$work/cpp/memory_bank"
"$work/cpp/memory_bank_static" | diff - <("$work/cpp/memory_bank")

say "the archive in a shared library by CMake, which exports none of its symbols, and in a static program by pkg-config"
mkdir "$work/plugin"
cat >"$work/plugin/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.16)
project(plugin C)
find_package(ddtas 0.1 REQUIRED)
add_library(plugin SHARED $PWD/examples/c/loss.c)
target_link_libraries(plugin PRIVATE ddtas::static)
END
cmake -S "$work/plugin" -B "$work/plugin" -DCMAKE_PREFIX_PATH="$prefix" >"$work/cmake.log"
cmake --build "$work/plugin" >>"$work/cmake.log" || { cat "$work/cmake.log"; exit 1; }
nm --dynamic --defined-only --format=just-symbols "$work/plugin/libplugin.so" | diff - <(echo main)
# shellcheck disable=SC2046
gcc -static examples/c/loss.c $(pkg-config --static --cflags --libs ddtas) -Wl,--no-warnings -o "$work/static"
"$work/static" | diff - <("$work/c/loss")

say "tests/capi under AddressSanitizer and UndefinedBehaviorSanitizer"
sanitize=(-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
read -ra include < <(pkg-config --cflags ddtas)
read -ra system < <(sed -n 's/^Libs.private: //p' "$prefix/lib/pkgconfig/ddtas.pc")
for test in hostile memory parts threads; do
    gcc -std=c11 "${warnings[@]}" "${sanitize[@]}" "${include[@]}" "tests/capi/$test.c" -o "$work/$test" \
        "$prefix/lib/libddtas.a" "${system[@]}"
    "$work/$test"
done

# AddressSanitizer's allocator can deadlock in a fork while another thread allocates; glibc's does not.
say "tests/capi/fork.c under UndefinedBehaviorSanitizer"
gcc -std=c11 "${warnings[@]}" -g -O1 -fsanitize=undefined -fno-sanitize-recover=all "${include[@]}" tests/capi/fork.c \
    -o "$work/fork" "$prefix/lib/libddtas.a" "${system[@]}"
"$work/fork"
say "done"
