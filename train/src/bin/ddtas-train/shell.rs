//! Version, shell completions and manual pages.

use std::io::Write;
use std::path::PathBuf;

use clap_complete::Shell;
use clap_mangen::Man;
use ddtas_io::console::{self, print};
use ddtas_train::{Error, Result};

#[derive(clap::Args)]
pub struct CompletionsArguments {
    /// The shell.
    shell: Shell,
}

#[derive(clap::Args)]
pub struct ManArguments {
    /// Write a page for each command into this existing folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Version, features and the instruction set in use.
pub fn version() -> String {
    let features = [
        ("cuda", cfg!(feature = "cuda")),
        ("emulated", cfg!(feature = "emulated")),
        ("mpi", cfg!(feature = "mpi")),
        ("nccl", cfg!(feature = "nccl")),
        ("train-cuda", cfg!(feature = "train-cuda")),
    ];
    console::version(env!("CARGO_PKG_VERSION"), &features)
}

/// Prints the completion script of a shell.
pub fn completions(arguments: &CompletionsArguments, mut command: clap::Command) -> Result<()> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    Ok(print(|out| out.write_all(&script))?)
}

/// Prints the program's page, or writes all pages.
pub fn man(arguments: &ManArguments, command: clap::Command) -> Result<()> {
    match &arguments.out {
        Some(folder) if !folder.is_dir() => {
            Err(Error::misuse("out", folder.display(), "must be an existing folder"))
        }
        Some(folder) => clap_mangen::generate_to(command, folder).map_err(Error::io("write into", folder)),
        None => Ok(print(|out| Man::new(command).render(out))?),
    }
}
