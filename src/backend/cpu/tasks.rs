//! Work shared out among threads: tasks by number, taken in order, results by task.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

/// The threads of the current pool, or the caller alone where a batch is too small to share.
#[derive(Debug, Clone, Copy)]
pub struct Workers {
    threads: usize,
}

impl Workers {
    /// `operations`: multiply-adds of the largest pass. Waking a thread costs some 10 us.
    pub fn new(operations: usize) -> Self {
        let worth = operations / 1_000_000 + 1;
        Self { threads: rayon::current_num_threads().min(worth) }
    }

    pub fn count(self) -> usize {
        self.threads
    }

    /// Runs tasks `0..count`. Which thread runs a task is left to chance, so a
    /// task must write only what is its own.
    pub fn for_each<T: Send>(self, count: usize, scratch: &[Mutex<T>], task: impl Fn(usize, &mut T) + Sync) {
        let next = AtomicUsize::new(0);
        let run = |worker: usize| {
            let mut scratch = lock(&scratch[worker]);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                task(index, &mut scratch);
            }
        };
        if self.threads <= 1 || count <= 1 {
            run(0);
        } else {
            (0..self.threads.min(count)).into_par_iter().with_max_len(1).for_each(run);
        }
    }

    /// Runs `task` on chunks of a buffer.
    pub fn for_each_chunk<T: Send>(
        self,
        buffer: &mut [T],
        size: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        if self.threads <= 1 || buffer.len() <= size {
            buffer.chunks_mut(size).enumerate().for_each(|(i, chunk)| task(i, chunk));
        } else {
            buffer.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| task(i, chunk));
        }
    }
}

/// Locks; a panic elsewhere leaves nothing half-written that a later pass would read.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
