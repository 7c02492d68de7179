//! kernels/params.h to Rust: the structs that kernels take, defined once.
//!
//! bindgen adds a compile-time assertion for the size, the alignment and every
//! offset, so a struct that Rust and C lay out differently does not compile.

use std::panic::catch_unwind;
use std::path::Path;
use std::process::Command;

use crate::tools::{cargo_path, site_packages, variable};

const INSTALL: &str = "libclang is needed to read kernels/params.h and was not found. Install it with: \
    python3 -m pip install libclang==18.1.1 (found in the active Python environment), \
    or set LIBCLANG_PATH to the folder of libclang.so";

pub fn build() -> Result<(), String> {
    let header = cargo_path("CARGO_MANIFEST_DIR")?.join("kernels/params.h");
    println!("cargo::rerun-if-changed={}", header.display());
    point_to_libclang();
    let mut builder = bindgen::Builder::default()
        .header(header.display().to_string())
        .allowlist_file(header.display().to_string())
        .default_enum_style(bindgen::EnumVariation::ModuleConsts)
        .layout_tests(true)
        .merge_extern_blocks(true)
        .clang_args(["-x", "c", "-std=c11"]);
    // The PyPI libclang comes without the compiler's own headers (stddef.h).
    if let Some(folder) = compiler_headers() {
        builder = builder.clang_args(["-isystem", &folder]);
    }
    // Without libclang bindgen panics instead of returning an error.
    let bindings = catch_unwind(std::panic::AssertUnwindSafe(|| builder.generate()))
        .map_err(|_| INSTALL.to_string())?
        .map_err(|error| format!("kernels/params.h: {error}"))?;
    let target = cargo_path("OUT_DIR")?.join("params.rs");
    bindings.write_to_file(&target).map_err(|error| format!("cannot write {}: {error}", target.display()))
}

/// Points bindgen to the libclang of the Python environment, unless one was named.
fn point_to_libclang() {
    if variable("LIBCLANG_PATH").is_some() {
        return;
    }
    let found =
        site_packages().into_iter().map(|path| path.join("clang/native")).find(|path| has_libclang(path));
    if let Some(path) = found {
        // SAFETY: this build script has one thread.
        unsafe { std::env::set_var("LIBCLANG_PATH", path) };
    }
}

fn has_libclang(folder: &Path) -> bool {
    folder.join("libclang.so").is_file() || folder.join("libclang.dylib").is_file()
}

fn compiler_headers() -> Option<String> {
    let output = Command::new("gcc").arg("-print-file-name=include").output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?.trim().to_string();
    Path::new(&folder).join("stddef.h").is_file().then_some(folder)
}
