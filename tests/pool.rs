//! The CPU backend in pools that do other work, too: a call waits for its own work alone.
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, LossOutput, LossSettings};
use ddtas::threads::Threads;
use ndarray::Array2;

/// Losses that are large enough to share.
fn losses(backend: &Mutex<CpuBackend>, count: usize) {
    let rows = Array2::from_shape_fn((150, 128), |(i, d)| if d == i % 128 { 1.0f32 } else { 0.0 });
    let labels: Vec<i64> = (0..150).map(|i| i / 5).collect();
    let mut output = LossOutput::default();
    for _ in 0..count {
        let mut backend = backend.lock().unwrap();
        backend.loss(&Batch::square(rows.view(), &labels), &LossSettings::default(), &mut output).unwrap();
    }
}

/// Fails if `work` has not returned after a minute.
fn in_time(work: impl FnOnce() + Send + 'static) {
    let (send, done) = channel();
    std::thread::spawn(move || {
        work();
        send.send(()).unwrap();
    });
    done.recv_timeout(Duration::from_secs(60)).expect("the work has ended");
}

#[test]
fn a_lock_may_be_held_during_a_loss_in_a_shared_pool() {
    for threads in [2, 4] {
        in_time(move || {
            let (pool, backend) = (Threads::new(threads).unwrap(), Mutex::new(CpuBackend::new()));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| (0..200).for_each(|_| pool.install(|| losses(&backend, 1))));
                }
            });
        });
    }
}

#[test]
fn a_loss_does_not_wait_for_a_pool_that_is_busy() {
    // The first call takes the global pool; one that did not answer then would not be used.
    losses(&Mutex::new(CpuBackend::new()), 1);
    let over = Arc::new(AtomicBool::new(false));
    for _ in 0..rayon::current_num_threads() {
        let over = over.clone();
        rayon::spawn(move || {
            while !over.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }
    // More calls than tasks that may wait for the pool.
    in_time(|| losses(&Mutex::new(CpuBackend::new()), 1000));
    over.store(true, Ordering::Release);
}
