//! The shared library's name as other programs record it: libddtas.so.ABI, after `DDTAS_ABI_VERSION`.

/// As in src/capi/types.rs; tests/header.rs compares.
const ABI: u32 = 1;

pub fn build() {
    println!("cargo::rerun-if-env-changed=CARGO_CFG_CARGO_C");
    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    // cargo-c gives the library a name of its own (Cargo.toml, package.metadata.capi).
    let cargo_c = std::env::var_os("CARGO_CFG_CARGO_C").is_some();
    if linux && !cargo_c {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libddtas.so.{ABI}");
    }
}
