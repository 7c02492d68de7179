//! Who shares the work of a run: this process, its threads, or the processes that `mpirun` started.

use std::process::ExitCode;
use std::rc::Rc;
use std::str::FromStr;

use ddtas_train::ranks::{Collective, One, on_threads};
use ddtas_train::{Error, Result};

/// More threads than any machine has.
const MOST_THREADS: usize = 1024;

/// What `--ranks` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranks {
    Threads(usize),
    Mpi,
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "mpi" {
            return Ok(Self::Mpi);
        }
        let count = text.parse().ok().filter(|count| (1..=MOST_THREADS).contains(count));
        count.map(Self::Threads).ok_or_else(|| format!("a number of 1 to {MOST_THREADS}, or mpi"))
    }
}

impl Ranks {
    /// Does `work` on all ranks, and returns what came of it on this process.
    ///
    /// # Errors
    /// Those of `work`; [`ddtas::Error::Unavailable`] if the ranks cannot be had.
    pub fn run(self, work: impl Fn(Rc<dyn Collective>) -> Result<ExitCode> + Sync) -> Result<ExitCode> {
        match self {
            Self::Mpi => mpi::run(work),
            Self::Threads(count) => {
                refuse_mpirun()?;
                if count == 1 { work(Rc::new(One)) } else { on_threads(count, work) }
            }
        }
    }
}

/// Refuses to be one of several processes that know nothing of each other.
fn refuse_mpirun() -> Result<()> {
    let processes = |name| std::env::var(name).ok()?.parse::<usize>().ok().filter(|count| *count > 1);
    // Open MPI's, and that of MPICH and of Slurm's PMI.
    match ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().find_map(processes) {
        Some(count) => Err(Error::Training(format!(
            "mpirun has started {count} processes, which would all train the same run: add --ranks mpi"
        ))),
        None => Ok(()),
    }
}

#[cfg(feature = "mpi")]
mod mpi {
    use super::*;
    use ddtas_train::ranks::Mpi;

    pub fn run(work: impl Fn(Rc<dyn Collective>) -> Result<ExitCode>) -> Result<ExitCode> {
        let ranks = Mpi::join()?;
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = (processors / ranks.local_size()).max(1);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
            pool.map_err(|error| ddtas::Error::Unavailable(format!("cannot start threads: {error}")))?;
        }
        work(Rc::new(ranks))
    }
}

#[cfg(not(feature = "mpi"))]
mod mpi {
    use super::*;

    pub fn run(_work: impl Fn(Rc<dyn Collective>) -> Result<ExitCode>) -> Result<ExitCode> {
        let reason =
            "this build has no MPI: build with `cargo build --release -p ddtas-train --features mpi`";
        Err(ddtas::Error::Unavailable(reason.into()).into())
    }
}
