//! The ranks of a run: this process, its threads, or processes that `mpirun` or another launcher started.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use ddtas::threads::MOST_THREADS;
use ddtas_train::ranks::{Collective, One, on_threads};
use ddtas_train::{Error, Result};

/// The ranks, and how they find each other.
#[derive(Debug, Clone, clap::Args)]
pub struct RankArguments {
    /// Ranks that share each batch: 1 to 1024 threads of this process, mpi for the processes that mpirun started, or nccl for
    /// those of torchrun or a similar launcher, with a GPU each.
    #[arg(long, value_name = "N|mpi|nccl", default_value = "1", hide_short_help = true)]
    ranks: Ranks,
    /// File through which the processes of --ranks nccl find each other: the same for all processes of a run, new for each
    /// run, on a disk that all can reach.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    rendezvous: Option<PathBuf>,
    /// Seconds without a message after which --ranks nccl gives up, 1 or more.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, hide_short_help = true)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    rank_timeout: u64,
}

/// The value of `--ranks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ranks {
    Threads(usize),
    Mpi,
    Nccl,
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mpi" => return Ok(Self::Mpi),
            "nccl" => return Ok(Self::Nccl),
            _ => {}
        }
        let count = text.parse().ok().filter(|count| (1..=MOST_THREADS).contains(count));
        count.map(Self::Threads).ok_or_else(|| format!("give 1 to {MOST_THREADS}, mpi or nccl"))
    }
}

impl RankArguments {
    /// Runs `work` on all ranks, and returns the result of this process.
    ///
    /// # Errors
    /// Errors of `work`; [`ddtas::Error::Unavailable`] if the ranks cannot be started.
    pub fn run(&self, work: impl Fn(Rc<dyn Collective>) -> Result<ExitCode> + Sync) -> Result<ExitCode> {
        match (self.ranks, &self.rendezvous) {
            (Ranks::Nccl, Some(file)) => work(nccl(file, Duration::from_secs(self.rank_timeout))?),
            (Ranks::Nccl, None) => {
                let needed =
                    "missing: --ranks nccl needs --rendezvous FILE, on a disk that all ranks can reach";
                Err(Error::misuse("rendezvous", "", needed))
            }
            (_, Some(file)) => Err(Error::misuse("rendezvous", file.display(), "is for --ranks nccl")),
            (Ranks::Mpi, None) => work(mpi()?),
            (Ranks::Threads(count), None) => {
                refuse_launchers()?;
                share_processors(1)?;
                if count == 1 { work(Rc::new(One)) } else { on_threads(count, work) }
            }
        }
    }
}

/// An error if a launcher has started several processes without a matching `--ranks`: all would train the same run.
fn refuse_launchers() -> Result<()> {
    let processes = |name| std::env::var(name).ok()?.parse::<usize>().ok().filter(|count| *count > 1);
    // The variables of Open MPI, and of MPICH and Slurm's PMI.
    let by_mpi = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().find_map(processes);
    let others = processes("WORLD_SIZE").filter(|_| std::env::var_os("RANK").is_some());
    let (launcher, count, flags) = match (by_mpi, others) {
        (Some(count), _) => ("mpirun", count, "--ranks mpi"),
        (None, Some(count)) => ("a launcher (RANK, WORLD_SIZE)", count, "--ranks nccl --rendezvous FILE"),
        (None, None) => return Ok(()),
    };
    let reason = format!(
        "missing: {launcher} has started {count} processes, which would all train the same run: add {flags}"
    );
    Err(Error::misuse("ranks", "", reason))
}

/// Sets the number of threads to this rank's share of the processors, with `ranks` ranks on this machine, or
/// to RAYON_NUM_THREADS.
///
/// # Errors
/// [`ddtas::Error::Unavailable`] if a thread cannot be started.
pub fn share_processors(ranks: usize) -> Result<()> {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse::<usize>().ok());
    let threads = asked.filter(|count| *count > 0).unwrap_or_else(|| {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (processors / ranks).max(1)
    });
    let threads = threads.min(MOST_THREADS);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.map_err(|error| ddtas::Error::Unavailable(format!("cannot start threads: {error}")).into())
}

/// Joins the processes that mpirun started.
#[cfg(feature = "mpi")]
fn mpi() -> Result<Rc<dyn Collective>> {
    let ranks = ddtas_train::ranks::Mpi::join()?;
    share_processors(ranks.local_size())?;
    Ok(Rc::new(ranks))
}

#[cfg(not(feature = "mpi"))]
fn mpi() -> Result<Rc<dyn Collective>> {
    Err(not_built("MPI", "mpi"))
}

/// Joins the processes that a launcher started, which find each other through `file`.
#[cfg(feature = "nccl")]
fn nccl(file: &Path, patience: Duration) -> Result<Rc<dyn Collective>> {
    let ranks = ddtas_train::ranks::Nccl::join(file, patience)?;
    share_processors(ranks.local_size())?;
    Ok(Rc::new(ranks))
}

#[cfg(not(feature = "nccl"))]
fn nccl(_: &Path, _: Duration) -> Result<Rc<dyn Collective>> {
    Err(not_built("NCCL", "nccl"))
}

#[cfg(not(all(feature = "mpi", feature = "nccl")))]
fn not_built(name: &str, feature: &str) -> Error {
    let build = format!("cargo build --release -p ddtas-train --features {feature}");
    ddtas::Error::Unavailable(format!("this build has no {name}: build with `{build}`")).into()
}
