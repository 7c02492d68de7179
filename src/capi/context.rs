//! A context: one backend, its threads and its workspace behind a lock, and the message of its last failure.

use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::engine::{Engine, EngineOptions, open};
use super::failure::{Failure, Outcome};
use super::input::{RowBuffer, check_typed, choose, read};
use super::types::{ContextOptions, Status, StreamMode};
use crate::backend::{Backend, DeviceSpec};
use crate::loss::LossOutput;

/// More threads than this are a mistake.
const MOST_THREADS: usize = 1024;

/// One device with its threads and workspace. Make it with ddtas_context_create.
pub struct Context {
    state: Mutex<State>,
    message: Mutex<String>,
}

/// What a call works with. Fields are borrowed apart.
pub struct State {
    /// The threads of a CPU context, which are its own and no other's.
    pool: Option<ThreadPool>,
    pub engine: Box<dyn Engine>,
    pub output: LossOutput,
    pub anchors: RowBuffer,
    pub references: RowBuffer,
    pub tangents: [Vec<f32>; 2],
}

impl State {
    /// Runs `work` on the context's threads.
    pub fn compute<R: Send>(
        pool: &Option<ThreadPool>,
        engine: &mut dyn Engine,
        work: impl FnOnce(&mut dyn Backend) -> R + Send,
    ) -> R {
        match pool {
            Some(pool) => pool.install(|| work(engine)),
            None => work(engine),
        }
    }

    /// The fields a call needs at the same time.
    pub fn parts(&mut self) -> (&Option<ThreadPool>, &mut dyn Engine, Buffers<'_>) {
        let Self { pool, engine, output, anchors, references, tangents } = self;
        (pool, &mut **engine, Buffers { output, anchors, references, tangents })
    }
}

/// The buffers of a context.
pub struct Buffers<'a> {
    pub output: &'a mut LossOutput,
    pub anchors: &'a mut RowBuffer,
    pub references: &'a mut RowBuffer,
    pub tangents: &'a mut [Vec<f32>; 2],
}

impl Context {
    /// A context by the caller's options; NULL stands for the defaults.
    ///
    /// # Safety
    /// As `read` or NULL; the device is NULL or a string that ends; the stream is as its comment says.
    pub unsafe fn new(options: *const ContextOptions) -> Outcome<Self> {
        let given = if options.is_null() {
            super::input::Versioned::initial()
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
        if given.threads > MOST_THREADS {
            let message = format!("threads = {} is out of range: 0 to {MOST_THREADS}", given.threads);
            return Err(Failure::new(Status::InvalidValue, message));
        }
        let mode = choose("stream_mode", given.stream_mode, &[StreamMode::Own, StreamMode::Given])?;
        let options = EngineOptions {
            budget: given.workspace_bytes,
            tf32: given.allow_tf32 != 0,
            stream: (mode == StreamMode::Given).then_some(given.stream),
        };
        // SAFETY: handed on to the caller.
        let engine = unsafe { open(spec, options) }?;
        let pool = (engine.name() == "cpu").then(|| threads(given.threads)).transpose()?;
        let state = State {
            pool,
            engine,
            output: LossOutput::default(),
            anchors: RowBuffer::default(),
            references: RowBuffer::default(),
            tangents: [Vec::new(), Vec::new()],
        };
        Ok(Self { state: Mutex::new(state), message: Mutex::default() })
    }

    /// The message of the last call, empty if it worked.
    pub fn message(&self) -> MutexGuard<'_, String> {
        lock(&self.message)
    }
}

fn threads(count: usize) -> Outcome<ThreadPool> {
    let named = ThreadPoolBuilder::new().thread_name(|index| format!("ddtas-{index}"));
    named.num_threads(count).build().map_err(|error| {
        Failure::new(Status::OutOfMemory, format!("the context's threads could not be started: {error}"))
    })
}

/// Locks. A call that panicked left nothing half-done that the next one would read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The one way into a context: one call at a time, no panic comes out, the message is kept.
///
/// # Safety
/// `context` is NULL, misaligned, or a live context.
pub unsafe fn enter(context: *const Context, work: impl FnOnce(&mut State) -> Outcome<()>) -> Status {
    if let Err(failure) = check_typed("context", context) {
        return failure.status;
    }
    // SAFETY: the caller's promise. Other calls have shared references too; what changes is behind locks.
    let context = unsafe { &*context };
    let outcome = guard(|| work(&mut lock(&context.state)));
    let (status, message) = match outcome {
        Ok(()) => (Status::Ok, String::new()),
        Err(failure) => (failure.status, failure.message),
    };
    *context.message() = message;
    status
}

/// Turns a panic into a failure.
pub fn guard<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Failure::from_panic(&*panic)))
}
