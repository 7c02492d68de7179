//! The loss of tensors in a GPU's memory, given by address and issued without waiting, for `ddtas.torch`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ddtas::Error;
#[cfg(feature = "cuda")]
pub use ddtas::backend::cuda::CudaBackend;
#[cfg(feature = "cuda")]
use ddtas::backend::cuda::{CudaDevice, Gpu};
use ddtas::backend::device::{
    Options, ResidentBatch, ResidentIdentity, ResidentPart, ResidentRows, ResidentSettings,
};
use ddtas::process::PerProcess;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

#[cfg(not(feature = "cuda"))]
pub use crate::emulated::CudaBackend;
#[cfg(not(feature = "cuda"))]
use crate::emulated::{CudaDevice, Gpu, OnStream};
use crate::settings::Settings;
use crate::sides::unit_check;
use crate::tensors::element_type;

/// Addresses of the rows and of their int64 labels, number of rows, dimensions, type, and address of the
/// gradient, or 0.
pub type Target = (usize, usize, usize, usize, u8, usize);

/// A GPU's number, and a stream there.
pub type Where = (usize, usize);

/// What a workspace is for: calls that run when they are issued, or a captured graph, whose replays must find
/// it unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum WorkspaceKey {
    Calls(usize),
    Graph(usize, u64),
}

/// Workspaces on GPUs: one for each GPU, and one for each graph that was captured there.
pub struct Workspaces {
    options: Options,
    /// A forked process has none of its parent's, and is refused by the driver with a message. The lock is
    /// held for a look-up, never for a computation.
    found: PerProcess<Mutex<Found>>,
}

#[derive(Default)]
struct Found {
    gpus: HashMap<usize, Gpu>,
    workspaces: HashMap<WorkspaceKey, Arc<Mutex<CudaBackend>>>,
}

impl Workspaces {
    pub fn new(options: Options) -> Self {
        Self { options, found: PerProcess::empty() }
    }

    /// Runs `work` on `stream` in a workspace of that GPU, after everything issued there before.
    pub fn compute<T>(
        &self,
        (ordinal, stream): Where,
        work: impl FnOnce(&mut CudaBackend) -> ddtas::Result<T>,
    ) -> ddtas::Result<T> {
        let stream: *mut c_void = std::ptr::with_exposed_provenance_mut(stream);
        let workspace = self.workspace(ordinal, stream)?;
        let mut backend = lock(&workspace);
        // SAFETY: torch's current stream of that GPU, which lives during the call; it is not used after
        // `mark`.
        unsafe { backend.device_mut().follow(stream) }?;
        let done = work(&mut backend);
        backend.device_mut().mark()?;
        done
    }

    fn workspace(&self, ordinal: usize, stream: *mut c_void) -> ddtas::Result<Arc<Mutex<CudaBackend>>> {
        let mut found = lock(self.found.get_or_make(|| Ok::<_, Error>(Mutex::default()))?);
        let Found { gpus, workspaces } = &mut *found;
        let gpu = match gpus.entry(ordinal) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(Gpu::new(ordinal)?),
        };
        // SAFETY: as in `compute`.
        let capture = unsafe { gpu.capture(stream) }?;
        let calls = WorkspaceKey::Calls(ordinal);
        let key = capture.map_or(calls, |graph| WorkspaceKey::Graph(ordinal, graph));
        if let Some(workspace) = workspaces.get(&key) {
            return Ok(workspace.clone());
        }
        let workspace = match (capture, workspaces.remove(&calls)) {
            // The calls' workspace becomes the graph's: its replays must not share it with other calls.
            (Some(_), Some(workspace)) => workspace,
            (Some(_), None) => {
                let reason = "memory cannot be allocated while a graph is captured: call it once with this shape before";
                return Err(Error::Unavailable(reason.into()));
            }
            (None, _) => {
                // SAFETY: as in `compute`.
                let device = unsafe { CudaDevice::on_stream(ordinal, stream) }?;
                Arc::new(Mutex::new(CudaBackend::new(device, self.options)))
            }
        };
        workspaces.insert(key, workspace.clone());
        Ok(workspace)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn side((embeddings, labels, count, _, _, gradient): Target) -> ResidentRows {
    ResidentRows { count, embeddings: embeddings as u64, labels: labels as u64, gradient: gradient as u64 }
}

/// Which references the anchors are: the first one's index if they follow each other there, else the address of a
/// uint32 for each anchor, or 0.
pub type Known = (Option<usize>, usize);

/// The anchors of one side, compared with those of the second if there is one.
pub fn batch_of(sides: &[Target], check: bool) -> PyResult<ResidentBatch> {
    let (anchors, references) = match sides {
        [anchors] => (anchors, None),
        [anchors, references] if (anchors.3, anchors.4) == (references.3, references.4) => {
            (anchors, Some(*references))
        }
        _ => return Err(PyTypeError::new_err("rows of both sides must have one type and one dimension")),
    };
    let refused = || PyTypeError::new_err("embeddings on a GPU must be float32, float16 or bfloat16");
    let dtype = element_type(anchors.4).ok_or_else(refused)?;
    Ok(ResidentBatch {
        dim: anchors.3,
        dtype,
        anchors: side(*anchors),
        references: references.map(side),
        check: unit_check(check),
    })
}

/// The same as a part; `total` anchors have all parts together. With `normalize` rows may have any length, and
/// the gradients are with respect to the rows as given.
pub fn part_of(
    sides: &[Target],
    identity: Known,
    total: usize,
    (check, normalize): (bool, bool),
) -> PyResult<ResidentPart> {
    let identity = match identity {
        (Some(first), _) => ResidentIdentity::From(first),
        (None, 0) => ResidentIdentity::ByValue,
        (None, address) => ResidentIdentity::List(address as u64),
    };
    Ok(ResidentPart { batch: batch_of(sides, check)?, identity, total, normalize })
}

/// Settings with the address of both thresholds in float64, or 0.
pub fn settings_of(mining: &str, numbers: [f64; 8], lambdas: usize) -> PyResult<ResidentSettings> {
    let settings = Settings::of_numbers(mining, numbers).to_library()?;
    Ok(ResidentSettings { settings, lambda: lambdas as u64 })
}
