//! The .cu files of kernels/ to fatbins: machine code for five GPU generations and PTX for later ones.
//!
//! Writes `kernels.rs` to OUT_DIR, a table of the images that
//! `src/backend/cuda/module.rs` embeds, and `NAME.ptxas.txt` beside each image,
//! the assembler's report of registers and spills that `.ci/cuda.sh` reads.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::tools::{cargo_path, files, site_packages, variable};

/// `sm_90a` and not `sm_90`: wgmma and TMA exist only there.
const MACHINE_CODE: [&str; 5] = ["80", "89", "90a", "100", "120"];
/// PTX, which the driver compiles for a GPU newer than all of these when it loads the module.
const PTX: &str = "100";

const INSTALL: &str = "feature `cuda`: nvcc (CUDA 13) was not found. Install it with: python3 -m pip install \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 (found in the active Python environment), \
    or set NVCC to an nvcc or CUDA_HOME to a toolkit";

pub fn build() -> Result<(), String> {
    let nvcc = find_nvcc().ok_or(INSTALL)?;
    let folder = cargo_path("CARGO_MANIFEST_DIR")?.join("kernels");
    let out = cargo_path("OUT_DIR")?;
    // nvcc reads it by itself; -lineinfo gives profilers and compute-sanitizer the lines.
    println!("cargo::rerun-if-env-changed=NVCC_APPEND_FLAGS");
    // The whole folder: every .cu includes shared headers, by their paths in it.
    println!("cargo::rerun-if-changed={}", folder.display());

    // All files at once: they are few, and each nvcc compiles for its targets in turn.
    let running = files(&folder, "cu")?
        .into_iter()
        .map(|source| start(&nvcc, &folder, &source, &out))
        .collect::<Result<Vec<_>, _>>()?;
    let mut table = String::from(
        "/// Name and image of every .cu file of kernels/.\npub const IMAGES: &[(&str, &[u8])] = &[\n",
    );
    for compilation in running {
        let (name, image) = compilation.finish()?;
        let _ = writeln!(table, "    ({name:?}, include_bytes!({:?})),", image.display().to_string());
    }
    table.push_str("];\n");
    write(&out.join("kernels.rs"), table.as_bytes())
}

/// Looks for nvcc in NVCC, CUDA_HOME, PATH and the Python environment, in this order.
fn find_nvcc() -> Option<PathBuf> {
    if let Some(named) = variable("NVCC") {
        return Some(PathBuf::from(named));
    }
    println!("cargo::rerun-if-env-changed=PATH");
    let home = variable("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    home.into_iter()
        .chain(std::env::split_paths(&path))
        .chain(site_packages().into_iter().map(|packages| packages.join("nvidia/cu13/bin")))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

/// One running nvcc.
struct Compilation {
    name: String,
    image: PathBuf,
    nvcc: PathBuf,
    child: Child,
}

fn start(nvcc: &Path, folder: &Path, source: &Path, out: &Path) -> Result<Compilation, String> {
    let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let image = out.join(format!("{name}.fatbin"));
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xptxas", "-warn-spills"]);
    for target in MACHINE_CODE {
        command.arg(format!("-gencode=arch=compute_{target},code=sm_{target}"));
    }
    command.arg(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
    command
        .arg("-I")
        .arg(folder)
        .arg("-o")
        .arg(&image)
        .arg(source)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child = command.spawn().map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
    Ok(Compilation { name, image, nvcc: nvcc.to_path_buf(), child })
}

impl Compilation {
    /// Waits, keeps the assembler's report and returns the image's name and path.
    fn finish(self) -> Result<(String, PathBuf), String> {
        let Self { name, image, nvcc, child } = self;
        let output = child.wait_with_output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
        if !output.status.success() {
            // Cargo shows standard error of a script that fails; its error is one line.
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
            return Err(format!("nvcc refused {name}.cu ({}): its messages are above", output.status));
        }
        write(&image.with_extension("ptxas.txt"), &output.stderr)?;
        Ok((name, image))
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), String> {
    fs::write(path, content).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
