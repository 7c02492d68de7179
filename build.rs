//! Compiles what a feature needs, and nothing with the features off.

#[cfg(feature = "cuda")]
#[path = "build/cuda.rs"]
mod cuda;
#[cfg(feature = "emulated")]
#[path = "build/emulated.rs"]
mod emulated;
#[cfg(feature = "kernels")]
#[path = "build/layout.rs"]
mod layout;
#[cfg(feature = "kernels")]
#[path = "build/tools.rs"]
mod tools;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    if let Err(message) = build() {
        // Cargo prints this as an error of the package and stops.
        println!("cargo::error={message}");
    }
}

fn build() -> Result<(), String> {
    #[cfg(feature = "kernels")]
    layout::build()?;
    #[cfg(feature = "cuda")]
    cuda::build()?;
    #[cfg(feature = "emulated")]
    emulated::build()?;
    Ok(())
}
