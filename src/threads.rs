//! Threads that compute: pools with an owner, and the one a call finds if it brings none.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use rayon::{Scope, ThreadPool, ThreadPoolBuilder};

use crate::process::PerProcess;
use crate::{Error, Result};

/// More threads than this are a mistake.
pub const MOST_THREADS: usize = 1024;

/// A pool whose threads have ended when it is dropped.
///
/// In a forked child it is dead, for its threads stayed with the parent: keep it in a [`PerProcess`].
#[derive(Debug)]
pub struct Threads {
    process: u32,
    pool: ManuallyDrop<ThreadPool>,
    handles: ManuallyDrop<Vec<JoinHandle<()>>>,
}

impl Threads {
    /// A pool of `count` threads; 0 stands for as many as there are cores.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for more than [`MOST_THREADS`]; [`Error::Unavailable`] if the system refuses
    /// one.
    pub fn new(count: usize) -> Result<Self> {
        if count > MOST_THREADS {
            let (name, value) = ("threads", count.to_string());
            return Err(Error::InvalidSetting { name, value, range: "at most 1024" });
        }
        let mut handles = Vec::new();
        let built = ThreadPoolBuilder::new()
            .num_threads(count)
            .spawn_handler(|thread| {
                let named = std::thread::Builder::new().name(format!("ddtas-{}", thread.index()));
                handles.push(named.spawn(|| thread.run())?);
                Ok(())
            })
            .build();
        match built {
            Ok(pool) => Ok(Self {
                process: std::process::id(),
                pool: ManuallyDrop::new(pool),
                handles: ManuallyDrop::new(handles),
            }),
            Err(error) => {
                join(handles);
                Err(Error::Unavailable(format!("the threads could not be started: {error}")))
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` on these threads, and waits for it.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // A child has nobody to wait for.
        if self.process != std::process::id() {
            return;
        }
        // SAFETY: neither field is used after this. The pool first: its end is what sends the threads home.
        unsafe { ManuallyDrop::drop(&mut self.pool) };
        // SAFETY: as above.
        join(unsafe { ManuallyDrop::take(&mut self.handles) });
    }
}

fn join(handles: Vec<JoinHandle<()>>) {
    for handle in handles {
        // A panic in a task went to whoever waits for the task, not here.
        let _ = handle.join();
    }
}

/// Where a call without threads of its own finds some.
enum Fallback {
    /// The pool that the calling thread belongs to, or else rayon's global one.
    Ambient,
    /// In a forked child, whose global pool has no threads.
    StandIn(&'static Threads),
    /// A child that may not start threads.
    Nobody,
}

/// The process in which rayon's global pool was first asked for; 0: in none so far.
static HOME: AtomicU32 = AtomicU32::new(0);
static STAND_IN: PerProcess<Threads> = PerProcess::empty();

fn find() -> Fallback {
    if rayon::current_thread_index().is_some() {
        return Fallback::Ambient;
    }
    // Noted before the pool is built: a fork meanwhile would leave the child with half a pool.
    let here = std::process::id();
    match HOME.compare_exchange(0, here, Ordering::AcqRel, Ordering::Acquire) {
        Err(home) if home != here => {
            STAND_IN.get_or_make(|| Threads::new(0)).map_or(Fallback::Nobody, Fallback::StandIn)
        }
        _ => Fallback::Ambient,
    }
}

/// Threads that a call made here computes with: those of the pool it is made in, else of the process.
#[must_use]
pub fn available() -> usize {
    match find() {
        Fallback::Ambient => rayon::current_num_threads(),
        Fallback::StandIn(threads) => threads.count(),
        Fallback::Nobody => 1,
    }
}

/// `rayon::in_place_scope` on those threads; `None` if there are none but the caller.
pub(crate) fn scope<'scope, R>(work: impl FnOnce(Option<&Scope<'scope>>) -> R) -> R {
    match find() {
        Fallback::Ambient => rayon::in_place_scope(|scope| work(Some(scope))),
        Fallback::StandIn(threads) => threads.pool.in_place_scope(|scope| work(Some(scope))),
        Fallback::Nobody => work(None),
    }
}

/// Runs `work`, which uses rayon by itself, on those threads.
///
/// # Errors
/// [`Error::Unavailable`] in a forked child that may not start any.
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R> {
    match find() {
        Fallback::Ambient => Ok(work()),
        Fallback::StandIn(threads) => Ok(threads.install(work)),
        Fallback::Nobody => {
            Err(Error::Unavailable("the threads of this forked process could not be started".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_threads_are_refused_before_one_is_started() {
        for count in [MOST_THREADS + 1, 100_000, usize::MAX] {
            let refused = Threads::new(count);
            assert!(matches!(refused, Err(Error::InvalidSetting { name: "threads", .. })), "{count}");
        }
    }

    #[test]
    fn dropping_a_pool_waits_for_its_threads() {
        struct Left<'a>(&'a std::sync::atomic::AtomicUsize);
        impl Drop for Left<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        static LEFT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        thread_local! { static MINE: Left<'static> = const { Left(&LEFT) } }
        let threads = Threads::new(5).unwrap();
        assert_eq!(threads.count(), 5);
        threads.pool.broadcast(|_| MINE.with(|_| ()));
        assert_eq!(LEFT.load(Ordering::SeqCst), 0);
        drop(threads);
        // Values of a thread go when it ends.
        assert_eq!(LEFT.load(Ordering::SeqCst), 5);
    }
}
