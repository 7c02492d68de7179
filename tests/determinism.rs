//! The CPU backend's results are the same bits whatever the thread count and the budget.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, LossOutput, LossSettings, Mining, Rows};
use ddtas_cases::random::{Draw, draw, tangent};

/// Every number of a loss, a threshold gradient and a search, as text that shows all bits.
fn everything(threads: usize, budget: usize, mining: Mining) -> String {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        // Large enough that the work is split among threads.
        let how = Draw { rows: 700, dim: 96, classes: 120, noise: 1.6, ignored: 9, duplicates: 9 };
        let (anchors, labels) = draw(how, 1);
        let (references, reference_labels) = draw(Draw { rows: 500, ..how }, 2);
        let references = Rows::new(references.view(), &reference_labels);
        let settings = LossSettings { mining, ..LossSettings::default() };
        let square = Batch::square(anchors.view(), &labels);
        let rectangular = Batch::rectangular(square.anchors, references).with_reference_gradient();
        let mut text = String::new();
        let mut backend = CpuBackend::with_budget(budget);
        for batch in [square, rectangular] {
            let mut output = LossOutput::default();
            backend.loss(&batch, &settings, &mut output).unwrap();
            let (own, other) = (tangent(700, 96, 1), tangent(500, 96, 2));
            let sums = backend.threshold_gradient(&batch, own.view(), Some(other.view())).unwrap();
            let bits = |x: &f32| x.to_bits();
            let gradient: Vec<u32> = output.gradient.iter().map(bits).collect();
            let back: Vec<u32> = output.reference_gradient.iter().flatten().map(bits).collect();
            output.gradient.fill(0.0);
            text += &format!("{gradient:?} {back:?} {output:?} {sums:?}");
        }
        let found = backend.nearest(&square.anchors, None, 10).unwrap();
        text + &format!("{found:?}")
    })
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for mining in [Mining::AtAsms, Mining::None] {
        let alone = everything(1, 1 << 26, mining);
        // With more threads than blocks of rows, dimensions are split among threads too.
        for threads in [2, 3, 7, 20] {
            assert!(alone == everything(threads, 1 << 26, mining), "{threads} threads, {mining:?}");
        }
    }
}

/// Loss and both gradients of a small batch, as bits.
fn gradients(threads: usize, rows: usize, dim: usize) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let how = Draw { rows, dim, classes: rows / 5, noise: 1.6, ignored: 0, duplicates: 0 };
        let (anchors, labels) = draw(how, 1);
        let (references, reference_labels) = draw(how, 2);
        let references = Rows::new(references.view(), &reference_labels);
        let square = Batch::square(anchors.view(), &labels);
        let rectangular = Batch::rectangular(square.anchors, references).with_reference_gradient();
        let (mut backend, mut bits) = (CpuBackend::new(), Vec::new());
        for batch in [square, rectangular] {
            let mut output = LossOutput::default();
            backend.loss(&batch, &LossSettings::default(), &mut output).unwrap();
            bits.push(output.loss.to_bits() as u32);
            let both = output.gradient.iter().chain(output.reference_gradient.iter().flatten());
            bits.extend(both.map(|x| x.to_bits()));
        }
        bits
    })
}

#[test]
fn few_blocks_of_any_dimension_are_divided_among_any_number_of_threads() {
    for (rows, dim) in [(140, 500), (170, 200), (170, 193), (165, 273), (20, 40), (300, 17), (80, 512)] {
        let alone = gradients(1, rows, dim);
        for threads in [2, 3, 4, 5, 6, 7, 8, 10, 16, 33, 64] {
            assert!(alone == gradients(threads, rows, dim), "{rows} x {dim}, {threads} threads");
        }
    }
}

#[test]
fn the_budget_changes_no_bit() {
    let kept = everything(2, 1 << 26, Mining::AtAsms);
    assert!(kept == everything(2, 0, Mining::AtAsms), "nothing kept");
    // From budgets too small for some tiles, over weights that overwrite similarities, to room for both.
    for budget in [20_000, 60_000, 100_000, 150_000, 250_000, 400_000] {
        assert!(kept == everything(3, budget, Mining::AtAsms), "some kept: {budget}");
    }
}
