//! Work shared out among threads: tasks by number, taken in order, results by task.
//!
//! A loss at 80 rows takes some 100 us in five passes, too little to wake the pool's threads for each: a
//! [`Team`] enters the pool once a call, and its threads wait awake for the next pass. Compared with a
//! `rayon::scope` per pass this takes 0.87 to 0.90 of the time at 80 rows (fastest calls; 0.5 to 0.6 of the
//! median) and the same time from 1,280 rows on: benches/records/2026-11-27-cpu-threads.
//!
//! The caller waits for threads that are in its work, never for the pool: it runs none of the pool's other
//! tasks meanwhile, which might need a lock that it holds, and a pool that is busy leaves it alone.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::threads;

/// The threads of the current pool, or the caller alone where a batch is too small to share.
#[derive(Debug, Clone, Copy)]
pub struct Workers<'a> {
    threads: usize,
    /// Threads that stay awake between passes; `None`: each pass calls its own.
    team: Option<&'a Team>,
}

impl Workers<'static> {
    /// Threads for a call whose largest pass has `operations` multiply-adds.
    pub fn new(operations: usize) -> Self {
        let worth = operations / 1_000_000 + 1;
        // Work for one thread starts no pool.
        let threads = if worth == 1 { 1 } else { threads::available().min(worth) };
        Self { threads, team: None }
    }
}

impl Workers<'_> {
    pub fn count(self) -> usize {
        self.threads
    }

    /// Runs `body` with threads that stay for all its passes. `body` must not use the pool otherwise: a pool
    /// thread that waits there could pick up the team's task, which ends only after `body`.
    pub fn stay<R>(self, body: impl FnOnce(Workers<'_>) -> R) -> R {
        if self.threads <= 1 || self.team.is_some() {
            return body(Workers { threads: self.threads, team: self.team });
        }
        let team = Arc::new(Team::default());
        for worker in 1..self.threads {
            let team = team.clone();
            threads::spawn(move || team.help(worker));
        }
        // Ends the team whether `body` returns or panics: a thread that comes later leaves at once.
        let _end = AtEnd(|| team.over.store(true, Ordering::Release));
        body(Workers { threads: self.threads, team: Some(&team) })
    }

    /// Runs tasks `0..count`. Which thread runs a task is left to chance, so a
    /// task must write only what is its own.
    pub fn for_each<T: Send>(self, count: usize, scratch: &[Mutex<T>], task: impl Fn(usize, &mut T) + Sync) {
        let next = AtomicUsize::new(0);
        self.run(count, &|worker| {
            let mut scratch = lock(&scratch[worker]);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                task(index, &mut scratch);
            }
        });
    }

    /// Runs `task` on chunks of a buffer.
    pub fn for_each_chunk<T: Send>(
        self,
        buffer: &mut [T],
        size: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.for_each_item(buffer.chunks_mut(size).enumerate(), |(index, chunk)| task(index, chunk));
    }

    /// Runs `task` on every item.
    pub fn for_each_item<T>(self, items: impl ExactSizeIterator<Item = T> + Send, task: impl Fn(T) + Sync) {
        let count = items.len();
        let items = Mutex::new(items);
        self.run(count, &|_| {
            loop {
                let next = lock(&items).next();
                let Some(item) = next else { return };
                task(item);
            }
        });
    }

    /// Runs `job` on the caller's thread and, for more than one task, on the other threads.
    fn run(self, tasks: usize, job: &(dyn Fn(usize) + Sync)) {
        match self.team {
            _ if self.threads <= 1 || tasks <= 1 => job(0),
            Some(team) => team.run(job),
            None => self.stay(|workers| workers.run(tasks, job)),
        }
    }
}

/// A job, called with the worker's number. It may be used only while [`Team::run`] runs.
type Job = &'static (dyn Fn(usize) + Sync);

/// Threads that wait awake for jobs.
#[derive(Default)]
struct Team {
    /// Jobs announced so far.
    announced: AtomicUsize,
    /// The current job. A thread that takes it is counted in `busy` before it releases the lock.
    job: Mutex<Option<Job>>,
    busy: AtomicUsize,
    over: AtomicBool,
    /// A panic of the current job in one of the team's threads, for the caller.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("announced", &self.announced).field("busy", &self.busy).finish()
    }
}

impl Team {
    /// Runs a job on the caller's thread and on those of the team that are free, until all have left it.
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes. The job is reached through `self.job` alone; `withdraw` clears
        // that and then waits until no thread that took it is busy, before this function returns or unwinds.
        let forever = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job) };
        let withdraw = AtEnd(|| {
            *lock(&self.job) = None;
            wait_until(|| self.busy.load(Ordering::Acquire) == 0);
        });
        *lock(&self.job) = Some(forever);
        self.announced.fetch_add(1, Ordering::Release);
        job(0);
        drop(withdraw);
        if let Some(panic) = lock(&self.panic).take() {
            resume_unwind(panic);
        }
    }

    /// Takes part in jobs until the work is over.
    fn help(&self, worker: usize) {
        let mut seen = 0;
        loop {
            let over = || self.over.load(Ordering::Acquire);
            wait_until(|| self.announced.load(Ordering::Acquire) != seen || over());
            if over() {
                return;
            }
            seen = self.announced.load(Ordering::Acquire);
            let job = {
                let job = lock(&self.job);
                self.busy.fetch_add(usize::from(job.is_some()), Ordering::Relaxed);
                *job
            };
            if let Some(job) = job {
                // In a task of its own a panic would end the process.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(worker))) {
                    *lock(&self.panic) = Some(panic);
                }
                self.busy.fetch_sub(1, Ordering::Release);
            }
        }
    }
}

/// Waits until `ready`: spins for a while, then yields.
fn wait_until(ready: impl Fn() -> bool) {
    /// Turns of spinning, about 100 us: longer than a small batch's work between two passes.
    const AWAKE: usize = 4000;
    let mut turns = 0;
    while !ready() {
        turns += 1;
        if turns < AWAKE {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Runs a closure when it goes out of scope.
struct AtEnd<F: Fn()>(F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Locks, poisoned or not: a panic elsewhere leaves nothing half-written that a later pass would read.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Many short passes, each of which needs the values of the previous one.
    fn passes(workers: Workers<'_>) {
        let scratch: Vec<Mutex<u64>> = (0..workers.count()).map(|_| Mutex::default()).collect();
        let mut values = vec![0u64; 1000];
        for pass in 0..500 {
            workers.for_each_chunk(&mut values, 7, |_, chunk| {
                chunk.iter_mut().for_each(|value| *value = value.wrapping_mul(3).wrapping_add(pass));
            });
        }
        let wanted = (0..500).fold(0u64, |value, pass| value.wrapping_mul(3).wrapping_add(pass));
        assert!(values.iter().all(|&value| value == wanted));
        workers.for_each(1000, &scratch, |index, sum| *sum += index as u64);
        assert_eq!(scratch.iter().map(|sum| *lock(sum)).sum::<u64>(), 499_500);
    }

    #[test]
    fn every_task_runs_once_whether_the_threads_stay_or_not() {
        for threads in [1, 2, 3, 9] {
            let workers = Workers { threads, team: None };
            passes(workers);
            workers.stay(passes);
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller() {
        let workers = Workers { threads: 3, team: None };
        for bad in 0..8 {
            let tasks = AssertUnwindSafe(|| {
                workers.stay(|workers| {
                    let scratch: Vec<Mutex<()>> = (0..3).map(|_| Mutex::default()).collect();
                    workers.for_each(8, &scratch, |index, ()| assert_ne!(index, bad));
                });
            });
            assert!(catch_unwind(tasks).is_err());
        }
        workers.stay(passes);
    }
}
