//! `Context`: a workspace that is allocated once, and the threads that fill it.
//!
//! A forked process (a DataLoader's worker) creates both anew: it has none of the parent's threads, and the
//! parent's lock may be held.

use std::sync::{Mutex, PoisonError};

use ddtas::backend::cpu::CpuBackend;
use ddtas::process::PerProcess;
use ddtas::threads::{MOST_THREADS, Threads};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::raise;

/// A workspace on the CPU, and the threads that compute in it: `Context(threads=None, budget=None)`.
///
/// Pass it as `context=` to `loss`, `evaluate` and the other calls; without one each thread has its own.
/// Calls on one context take turns; two contexts compute side by side. The result depends on neither
/// argument.
///
/// threads: how many compute, 1 to 1,024. None shares the process's pool: `RAYON_NUM_THREADS`, `OMP_NUM_THREADS`,
/// or as many as cores.
/// budget: the most bytes kept between the passes of a loss. None is 6 KiB for each row of either side. What
/// does not fit is computed again.
///
/// `threads` and `workspace_bytes` can be read. The methods are for the package itself.
#[pyclass(frozen, module = "ddtas")]
pub struct Context {
    /// `None`: the process's own pool.
    pub threads: Option<usize>,
    /// Bytes for candidates; `None`: the library's.
    pub budget: Option<usize>,
    workspace: PerProcess<Workspace>,
}

/// The backend and threads of one process.
struct Workspace {
    backend: Mutex<CpuBackend>,
    pool: Option<Threads>,
}

impl Workspace {
    fn new(threads: Option<usize>, budget: Option<usize>) -> ddtas::Result<Self> {
        let pool = threads.map(Threads::new).transpose()?;
        let backend = budget.map_or_else(CpuBackend::new, CpuBackend::with_budget);
        Ok(Self { backend: Mutex::new(backend), pool })
    }
}

impl Context {
    /// # Errors
    /// ValueError for a number of threads out of range.
    pub fn make(threads: Option<usize>, budget: Option<usize>) -> PyResult<Self> {
        if threads.is_some_and(|count| count == 0 || count > MOST_THREADS) {
            let count = threads.unwrap_or_default();
            let message = format!("threads = {count} is out of range: 1 to {MOST_THREADS}");
            return Err(PyValueError::new_err(message));
        }
        let workspace = Workspace::new(threads, budget).map_err(raise)?;
        Ok(Self { threads, budget, workspace: PerProcess::new(workspace) })
    }

    fn here(&self) -> ddtas::Result<&Workspace> {
        self.workspace.get_or_make(|| Workspace::new(self.threads, self.budget))
    }

    /// Runs `work` on the workspace and the threads, with the interpreter detached.
    pub fn compute<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut CpuBackend) -> ddtas::Result<T> + Send,
    ) -> PyResult<T> {
        let run = || {
            let workspace = self.here()?;
            // The next call overwrites what an earlier one left half-written.
            let mut guard = workspace.backend.lock().unwrap_or_else(PoisonError::into_inner);
            let backend = &mut *guard;
            match &workspace.pool {
                Some(pool) => pool.install(|| work(backend)),
                None => work(backend),
            }
        };
        py.detach(run).map_err(raise)
    }
}
