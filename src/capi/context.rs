//! A context: one backend, its threads and its workspace behind a lock, and the message of its last failure.
//!
//! All of these are created anew in a forked child, where the parent's threads and locks are of no use.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::engine::{Engine, EngineOptions, open};
use super::failure::{Failure, Outcome};
use super::input::{RowBuffer, check_typed, choose, read};
use super::types::{ContextOptions, Status, StreamMode};
use crate::Error;
use crate::backend::{Backend, DeviceSpec};
use crate::loss::LossOutput;
use crate::process::PerProcess;
use crate::threads::Threads;

/// One device with its threads and workspace. Make it with ddtas_context_create.
pub struct Context {
    settings: ContextSettings,
    made: PerProcess<Made>,
}

/// The options from which a forked child creates its own.
#[derive(Debug, Clone, Copy)]
struct ContextSettings {
    /// The device that was opened, never `auto`.
    spec: DeviceSpec,
    threads: usize,
    budget: Option<usize>,
    tf32: bool,
}

/// One process's part of a context.
pub struct Made {
    state: Mutex<State>,
    message: Mutex<String>,
}

/// Engine and buffers of a call. Fields are borrowed separately.
pub struct State {
    /// The threads of a CPU context, which are its own and no other's.
    pool: Option<Threads>,
    pub engine: Box<dyn Engine>,
    pub output: LossOutput,
    /// B of the last loss, if that is the loss of a part.
    pub total: Option<usize>,
    pub anchors: RowBuffer,
    pub references: RowBuffer,
    pub tangents: [Vec<f32>; 2],
}

impl State {
    /// Runs `work` on the context's threads.
    pub fn compute<R: Send>(
        pool: &Option<Threads>,
        engine: &mut dyn Engine,
        work: impl FnOnce(&mut dyn Backend) -> R + Send,
    ) -> R {
        match pool {
            Some(pool) => pool.install(|| work(engine)),
            None => work(engine),
        }
    }

    /// The fields a call needs at the same time.
    pub fn parts(&mut self) -> (&Option<Threads>, &mut dyn Engine, Buffers<'_>) {
        let Self { pool, engine, output, total, anchors, references, tangents } = self;
        let rows = [anchors, references];
        (pool, &mut **engine, Buffers { output, total, rows, tangents })
    }
}

/// The buffers of a context.
pub struct Buffers<'a> {
    pub output: &'a mut LossOutput,
    pub total: &'a mut Option<usize>,
    /// Of anchors and references.
    pub rows: [&'a mut RowBuffer; 2],
    pub tangents: &'a mut [Vec<f32>; 2],
}

impl Context {
    /// Creates a context from the caller's options; NULL means the defaults.
    ///
    /// # Safety
    /// As `read`, or NULL; the device is NULL or a NUL-terminated string; the stream is as its comment says.
    pub unsafe fn new(options: *const ContextOptions) -> Outcome<Self> {
        let given = if options.is_null() {
            super::types::Versioned::initial()
        } else {
            // SAFETY: handed on to the caller.
            unsafe { read(options) }?
        };
        let spec = if given.device.is_null() {
            DeviceSpec::Auto
        } else {
            // SAFETY: the caller's promise.
            let text = unsafe { CStr::from_ptr(given.device) };
            text.to_string_lossy().parse::<DeviceSpec>()?
        };
        let mode = choose("stream_mode", given.stream_mode, &[StreamMode::Own, StreamMode::Given])?;
        let settings = ContextSettings {
            spec,
            threads: given.threads,
            budget: (given.workspace_bytes != 0).then_some(given.workspace_bytes),
            tf32: given.allow_tf32 != 0,
        };
        let stream = (mode == StreamMode::Given).then_some(given.stream);
        // SAFETY: handed on to the caller.
        let made = unsafe { settings.make(stream) }?;
        let spec = made.lock_state().engine.name().parse()?;
        Ok(Self { settings: ContextSettings { spec, ..settings }, made: PerProcess::new(made) })
    }

    /// This process's part of the context, created if there is none.
    pub fn here(&self) -> Outcome<&Made> {
        self.made.get_or_make(|| {
            if let DeviceSpec::Cuda(_) = self.settings.spec {
                return Err(Failure::from(Error::Unavailable(AFTER_FORK.into())));
            }
            // SAFETY: there is no stream.
            unsafe { self.settings.make(None) }
        })
    }
}

/// Why a child cannot compute on its parent's GPU.
const AFTER_FORK: &str = "this context is on a GPU and the process was forked since: CUDA does not survive a fork, \
                          start the process anew (exec, spawn) and make a context there";

impl ContextSettings {
    /// # Safety
    /// As `open`.
    unsafe fn make(&self, stream: Option<*mut c_void>) -> Outcome<Made> {
        let options = EngineOptions { budget: self.budget, tf32: self.tf32, stream };
        // SAFETY: handed on to the caller.
        let engine = unsafe { open(self.spec, options) }?;
        let pool = (engine.name() == "cpu").then(|| threads(self.threads)).transpose()?;
        let state = State {
            pool,
            engine,
            output: LossOutput::default(),
            total: None,
            anchors: RowBuffer::default(),
            references: RowBuffer::default(),
            tangents: [Vec::new(), Vec::new()],
        };
        Ok(Made { state: Mutex::new(state), message: Mutex::default() })
    }
}

impl Made {
    fn lock_state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The message of the last call, empty if it worked.
    pub fn message(&self) -> MutexGuard<'_, String> {
        lock(&self.message)
    }
}

fn threads(count: usize) -> Outcome<Threads> {
    Threads::new(count).map_err(|error| match error {
        Error::Unavailable(reason) => Failure::new(Status::OutOfMemory, reason),
        other => other.into(),
    })
}

/// Locks. A call that panicked left nothing half-done that the next one would read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The one way into a context: one call at a time, panics are caught, the message is kept.
///
/// # Safety
/// `context` is NULL, misaligned, or a live context.
pub unsafe fn enter(context: *const Context, work: impl FnOnce(&mut State) -> Outcome<()>) -> Status {
    if let Err(failure) = check_typed("context", context) {
        return failure.status;
    }
    // SAFETY: the caller's promise. Other calls have shared references too; what changes is behind locks.
    let context = unsafe { &*context };
    let made = match guard(|| context.here()) {
        Ok(made) => made,
        Err(failure) => return failure.status,
    };
    let outcome = guard(|| work(&mut made.lock_state()));
    let (status, message) = match outcome {
        Ok(()) => (Status::Ok, String::new()),
        Err(failure) => (failure.status, failure.message),
    };
    *made.message() = message;
    status
}

/// Turns a panic into a failure.
pub fn guard<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Failure::from_panic(&*panic)))
}
