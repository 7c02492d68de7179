//! The .cu files of kernels/ compiled by g++ against kernels/emulation, for tests.
//!
//! DDTAS_SANITIZE=address,undefined or DDTAS_SANITIZE=thread builds them, and links the programs, with
//! sanitizers; tests/emulated/main.rs says how to run those. DDTAS_KERNELS names another folder to compile
//! them from: a copy of kernels/ with a fault planted in it.

use std::path::{Path, PathBuf};

use crate::tools::{cargo_path, files, variable};

/// Each sanitizer's name and that of its runtime.
const RUNTIMES: [(&str, &str); 3] = [("address", "asan"), ("undefined", "ubsan"), ("thread", "tsan")];

pub fn build() -> Result<(), String> {
    let folder = match variable("DDTAS_KERNELS") {
        Some(named) => PathBuf::from(named),
        None => cargo_path("CARGO_MANIFEST_DIR")?.join("kernels"),
    };
    println!("cargo::rerun-if-changed={}", folder.display());
    let sanitizers = variable("DDTAS_SANITIZE").unwrap_or_default();
    let named = |sanitizer: &str| sanitizers.split(',').any(|one| one == sanitizer);

    let mut machine = compiler();
    machine.include(&folder).files(files(&folder.join("emulation"), "cpp")?);
    let mut kernels = compiler();
    kernels.include(&folder);
    // g++ does not know the suffix .cu.
    kernels.flag("-xc++").files(files(&folder, "cu")?);
    if !sanitizers.is_empty() {
        sanitize(&mut kernels, &sanitizers);
        if named("thread") {
            // The machine's own accesses are not a kernel's: it tells what orders these instead (races.h).
            machine.define("DDTAS_EMULATION_RACES", None);
        } else {
            sanitize(&mut machine, &sanitizers);
        }
    }
    let failed = |error| format!("g++ refused the kernels: {error}");
    kernels.try_compile("ddtas_emulated_kernels").map_err(failed)?;
    machine.try_compile("ddtas_emulated_machine").map_err(failed)?;
    // rustc links without the compiler's default libraries: the runtimes are named one by one.
    for (sanitizer, library) in RUNTIMES {
        if named(sanitizer) {
            link_runtime(&machine, library);
        }
    }
    Ok(())
}

fn compiler() -> cc::Build {
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        // Line tables, for the messages of sanitizers.
        .debug(false)
        .flag("-g1")
        .flag("-Wall")
        .flag("-Wextra")
        // Those of nvcc.
        .flag("-Wno-unknown-pragmas")
        // No contraction: products and sums are rounded as IEEE arithmetic has it.
        .flag("-ffp-contract=off")
        // Only run where it is built; a third of the time is products.
        .flag("-march=native")
        // Kernels register themselves: nothing refers to them by symbol.
        .link_lib_modifier("+whole-archive");
    compiler
}

fn sanitize(compiler: &mut cc::Build, sanitizers: &str) {
    compiler
        .flag(format!("-fsanitize={sanitizers}"))
        .flag("-fno-sanitize-recover=all")
        .flag("-fno-omit-frame-pointer");
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
