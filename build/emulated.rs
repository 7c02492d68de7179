//! kernels/*.cu compiled by g++ against kernels/emulation, for tests.
//!
//! DDTAS_SANITIZE=address,undefined builds them, and links the programs, with
//! sanitizers; tests/emulated.rs says how to run those.

use std::fs;
use std::path::Path;

use crate::tools::{cargo_path, variable};

pub fn build() -> Result<(), String> {
    let folder = cargo_path("CARGO_MANIFEST_DIR")?.join("kernels");
    println!("cargo::rerun-if-changed={}", folder.display());
    let failed = |error: std::io::Error| format!("cannot read {}: {error}", folder.display());
    let parts = ["machine", "instructions", "hopper", "fiber"];
    let mut sources: Vec<_> = parts.iter().map(|part| folder.join(format!("emulation/{part}.cpp"))).collect();
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(true)
        // g++ does not know the suffix .cu, nor nvcc's pragmas.
        .flag("-xc++")
        .flag("-Wall")
        .flag("-Wextra")
        .flag("-Wno-unknown-pragmas")
        // The switch of fibers is inline assembly, and truth is IEEE arithmetic.
        .flag("-ffp-contract=off")
        .files(sources)
        // Kernels register themselves: nothing refers to them by symbol.
        .link_lib_modifier("+whole-archive");
    if let Some(sanitizers) = variable("DDTAS_SANITIZE") {
        compiler
            .flag(format!("-fsanitize={sanitizers}"))
            .flag("-fno-sanitize-recover=all")
            .flag("-fno-omit-frame-pointer");
    }
    compiler.try_compile("ddtas_emulated").map_err(|error| format!("g++ refused the kernels: {error}"))?;
    // rustc links without the compiler's default libraries: the runtimes are named one by one.
    for (sanitizer, library) in [("address", "asan"), ("undefined", "ubsan"), ("thread", "tsan")] {
        if variable("DDTAS_SANITIZE").is_some_and(|named| named.split(',').any(|one| one == sanitizer)) {
            link_runtime(&compiler, library);
        }
    }
    Ok(())
}

/// Links the sanitizer's runtime that belongs to the compiler.
fn link_runtime(compiler: &cc::Build, library: &str) {
    let path = compiler.get_compiler().to_command().arg(format!("-print-file-name=lib{library}.so")).output();
    if let Some(folder) = path.ok().and_then(|output| String::from_utf8(output.stdout).ok())
        && let Some(folder) = Path::new(folder.trim()).parent()
    {
        println!("cargo::rustc-link-search=native={}", folder.display());
    }
    println!("cargo::rustc-link-lib=dylib={library}");
}
