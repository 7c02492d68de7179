//! A forked child computes with threads of its own: rayon's global pool has none there, and would hang.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

use std::sync::atomic::{AtomicUsize, Ordering};

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows};
use ddtas::process::PerProcess;
use ddtas::retrieval::{KMeansSettings, k_means};
use ddtas::threads::Threads;
use ndarray::Array2;

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(child: i32, status: *mut i32, options: i32) -> i32;
    fn alarm(seconds: u32) -> u32;
    fn _exit(status: i32) -> !;
}

/// Runs `work` in a forked child; whether it returned true there.
fn in_a_child(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: no arguments; this test checks what a child may do.
    let child = unsafe { fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: as above. The alarm kills a child that hangs.
        unsafe { alarm(30) };
        let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(false);
        // SAFETY: ends the child without flushing or dropping anything of the parent.
        unsafe { _exit(i32::from(!well)) };
    }
    let mut status = -1;
    // SAFETY: one integer is written.
    let waited = unsafe { waitpid(child, &raw mut status, 0) };
    waited == child && status == 0
}

#[test]
fn a_child_neither_drops_its_parent_s_values_nor_waits_for_its_threads() {
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    struct Counted;
    impl Drop for Counted {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::SeqCst);
        }
    }
    let (value, threads) = (PerProcess::new(Counted), Threads::new(2).unwrap());
    // The closure owns both; the parent drops it when the child has ended.
    assert!(in_a_child(move || {
        drop((value, threads));
        DROPPED.load(Ordering::SeqCst) == 0
    }));
    assert_eq!(DROPPED.load(Ordering::SeqCst), 1);
}

fn rows() -> (Array2<f32>, Vec<i64>) {
    let mut rows =
        Array2::from_shape_fn((500, 64), |(i, d)| ((i * 7 + d * 13) as f32).sin() + (i % 40) as f32 / 40.0);
    for mut row in rows.outer_iter_mut() {
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    (rows, (0..500).map(|i| i % 40).collect())
}

fn every_entry(backend: &mut CpuBackend) -> (LossOutput, Vec<u32>, Vec<u32>) {
    let (rows, labels) = rows();
    let (batch, mut output) = (Batch::square(rows.view(), &labels), LossOutput::default());
    backend.loss(&batch, &LossSettings::default(), &mut output).unwrap();
    backend.threshold_gradient(&batch, rows.view(), None).unwrap();
    let nearest = backend.nearest(&Rows::new(rows.view(), &labels), None, 4).unwrap();
    let settings = KMeansSettings { clusters: 40, iterations: 3, seed: 1 };
    let clusters = k_means(backend, rows.view(), &settings, &mut |_, _| ()).unwrap();
    (output, nearest.indices.into_iter().collect(), clusters.assignment)
}

#[test]
fn a_child_computes_what_its_parent_computes() {
    // The program's own pool, which the library has not used before the fork.
    rayon::join(|| (), || ());
    assert!(in_a_child(|| every_entry(&mut CpuBackend::new()).0.active > 0));
    let mut backend = CpuBackend::new();
    let want = every_entry(&mut backend);
    assert!(want.0.active > 0);
    assert!(in_a_child(|| {
        let again = every_entry(&mut backend) == want && every_entry(&mut CpuBackend::new()) == want;
        again && in_a_child(|| every_entry(&mut CpuBackend::new()) == want)
    }));
    assert_eq!(every_entry(&mut backend), want, "the parent goes on");
}
