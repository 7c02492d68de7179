//! Thread pools with an owner, and the pool that a call uses if it is given none.

use std::error::Error as _;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::{AccessError, JoinHandle};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::process::PerProcess;
use crate::{Error, Result};

/// Most threads of a pool; a larger count is taken for a mistake.
pub const MOST_THREADS: usize = 1024;

/// A pool that joins its threads when it is dropped.
///
/// In a forked child it has no threads, as they stayed with the parent: keep it in a [`PerProcess`].
#[derive(Debug)]
pub struct Threads {
    process: u32,
    pool: ManuallyDrop<ThreadPool>,
    handles: ManuallyDrop<Vec<JoinHandle<()>>>,
}

impl Threads {
    /// A pool of `count` threads; 0 stands for as many as `RAYON_NUM_THREADS` says, else one per core.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for more than [`MOST_THREADS`]; [`Error::Unavailable`] if a thread cannot be
    /// started.
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

    /// Number of threads.
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
        // A forked child has no threads to join.
        if self.process != std::process::id() {
            return;
        }
        // SAFETY: neither field is used after this. Dropping the pool first ends the threads to join.
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

/// The threads that a call without a pool of its own uses.
enum Fallback {
    /// The pool that the calling thread belongs to, or else rayon's global one.
    Ambient,
    /// The stand-in pool of a forked child, whose copy of the global pool has no threads.
    ForkedPool(&'static Threads),
    /// None: this forked child cannot start threads.
    CallerOnly,
}

/// Number of threads of the process's pool; 0: as rayon chooses.
static DEFAULT_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Sets the number of threads of the process's pool, which calls use that are given no other; 0 stands for
/// `RAYON_NUM_THREADS`, or else as many as there are cores.
///
/// The pool is created at the first such call, or by the program itself as rayon's global pool: after that
/// this has no effect, except in forked children.
pub fn set_default_count(count: usize) {
    DEFAULT_COUNT.store(count.min(MOST_THREADS), Ordering::Relaxed);
}

/// Id of the process whose threads rayon's global pool has; 0 if this is not known yet.
static POOL_PROCESS: AtomicU32 = AtomicU32::new(0);
/// A [`POOL_PROCESS`] that is no process: the pool is the program's own, which it created before it forked, or it has no threads.
const AN_ANCESTOR: u32 = u32::MAX;
static FORKED_POOL: PerProcess<Threads> = PerProcess::empty();

fn forked_pool() -> Fallback {
    let made = FORKED_POOL.get_or_make(|| Threads::new(DEFAULT_COUNT.load(Ordering::Relaxed)));
    made.map_or(Fallback::CallerOnly, Fallback::ForkedPool)
}

/// Whether the global pool, which the program created, has threads: it has none in a child that was forked after that.
fn global_pool_answers() -> bool {
    /// An idle pool takes some 50 us. One that is busy for longer gets the same treatment as one without threads.
    const LONGEST: Duration = Duration::from_secs(1);
    let (answered, begin) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let answer = answered.clone();
    rayon::spawn(move || answer.store(true, Ordering::Release));
    while !answered.load(Ordering::Acquire) {
        if begin.elapsed() > LONGEST {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

fn find() -> Fallback {
    if rayon::current_thread_index().is_some() {
        return Fallback::Ambient;
    }
    // Set before the pool is built: a child forked during that would inherit half a pool.
    let here = std::process::id();
    match POOL_PROCESS.compare_exchange(0, here, Ordering::AcqRel, Ordering::Acquire) {
        Err(process) if process != here => forked_pool(),
        Ok(_) => {
            let count = DEFAULT_COUNT.load(Ordering::Relaxed);
            match ThreadPoolBuilder::new().num_threads(count).build_global() {
                Ok(()) => Fallback::Ambient,
                // Without a source it says that there is a global pool already.
                Err(error) if error.source().is_none() && global_pool_answers() => Fallback::Ambient,
                Err(_) => {
                    POOL_PROCESS.store(AN_ANCESTOR, Ordering::Release);
                    forked_pool()
                }
            }
        }
        Err(_) => Fallback::Ambient,
    }
}

/// Number of threads that a call from here uses: those of the current pool, else of the process's pool.
#[must_use]
pub fn available() -> usize {
    match find() {
        Fallback::Ambient => rayon::current_num_threads(),
        Fallback::ForkedPool(threads) => threads.count(),
        Fallback::CallerOnly => 1,
    }
}

/// Most tasks of a thread that have not begun.
const MOST_WAITING: usize = 256;

/// Has `work` run on one of the threads of [`available`] when it is free. Never, if only the caller is left, or if the pool has been
/// too busy to begin what this thread gave it before.
pub(crate) fn spawn(work: impl FnOnce() + Send + 'static) {
    thread_local! { static WAITING: PerProcess<Arc<AtomicUsize>> = const { PerProcess::empty() } }
    // A thread that is ending has none any more.
    let waiting =
        WAITING.try_with(|waiting| waiting.get_or_make(|| Ok::<_, AccessError>(Arc::default())).cloned());
    let Ok(Ok(waiting)) = waiting else { return };
    if waiting.load(Ordering::Relaxed) >= MOST_WAITING {
        return;
    }
    waiting.fetch_add(1, Ordering::Relaxed);
    let task = move || {
        waiting.fetch_sub(1, Ordering::Relaxed);
        work();
    };
    match find() {
        Fallback::Ambient => rayon::spawn(task),
        Fallback::ForkedPool(threads) => threads.pool.spawn(task),
        Fallback::CallerOnly => {}
    }
}

/// Runs `work`, which uses rayon itself, on the threads of [`available`].
///
/// # Errors
/// [`Error::Unavailable`] in a forked child that cannot start threads.
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R> {
    match find() {
        Fallback::Ambient => Ok(work()),
        Fallback::ForkedPool(threads) => Ok(threads.install(work)),
        Fallback::CallerOnly => {
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
    fn tasks_that_began_make_room_for_others_and_a_busy_pool_gets_a_bounded_number() {
        static RUN: AtomicUsize = AtomicUsize::new(0);
        let task = || {
            RUN.fetch_add(1, Ordering::SeqCst);
        };
        let pool = Threads::new(2).unwrap();
        let begin = Instant::now();
        pool.install(|| {
            for count in 1..=1000 {
                spawn(task);
                while RUN.load(Ordering::SeqCst) < count {
                    assert!(begin.elapsed() < Duration::from_secs(60), "task {count} never ran");
                    rayon::yield_now();
                }
            }
        });
        // The only thread is busy here, so that none of these can begin.
        let pool = Threads::new(1).unwrap();
        pool.install(|| (0..1000).for_each(|_| spawn(task)));
        drop(pool);
        assert_eq!(RUN.load(Ordering::SeqCst), 1000 + MOST_WAITING);
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
        // Thread-local values are dropped when their thread ends.
        assert_eq!(LEFT.load(Ordering::SeqCst), 5);
    }
}
