//! Criterion benches of the CPU backend, with a group for each pass (docs/architecture.md).
//!
//! `cargo bench --manifest-path benches/passes/Cargo.toml` measures; `-- --test` runs each once.
//!
//! The passes of a loss depend on each other's results, so a whole loss is evaluated and the time of one pass
//! is read from [`CpuBackend::pass_times`]; `threshold` and `retrieval` are separate calls.

use std::sync::LazyLock;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ddtas::backend::Backend;
use ddtas::backend::cpu::{CpuBackend, PassTimes};
use ddtas::loss::LossOutput;
use ddtas_bench::{Density, Embeddings, draw, find_noise};

const DIM: usize = 512;
const SEED: u64 = 0;
const BATCHES: [usize; 2] = [80, 1280];
const DENSITIES: [Density; 4] = [Density::Late, Density::Middle, Density::Start, Density::All];

/// Rows at each size and density, by name.
static ROWS: LazyLock<Vec<(String, Embeddings)>> = LazyLock::new(|| {
    let noises = DENSITIES.map(|density| (density, find_noise(density, DIM, None, SEED).expect("a noise")));
    let drawn = BATCHES.iter().flat_map(|&rows| {
        noises.map(|(density, noise)| {
            (format!("{rows}/{density}"), draw(rows, None, DIM, density, noise, SEED))
        })
    });
    drawn.collect()
});

/// One pass of a loss, by name.
type Pass = (&'static str, fn(&PassTimes) -> Duration);

const PASSES: [Pass; 5] = [
    ("rows", |times| times.rows),
    ("same-class", |times| times.same_class),
    ("sweep", |times| times.sweep),
    ("select", |times| times.select),
    ("gradient", |times| times.gradient),
];

fn passes(criterion: &mut Criterion) {
    for (pass, time) in PASSES {
        let mut group = criterion.benchmark_group(pass);
        for (name, embeddings) in &*ROWS {
            let (batch, settings) = (embeddings.batch(), &embeddings.settings);
            let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut sum = Duration::ZERO;
                    for _ in 0..iterations {
                        backend.loss(&batch, settings, &mut output).expect("a loss");
                        sum += time(&backend.pass_times());
                    }
                    sum
                });
            });
        }
    }
}

fn threshold(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("threshold");
    for (name, embeddings) in &*ROWS {
        let batch = embeddings.batch();
        let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
        backend.loss(&batch, &embeddings.settings, &mut output).expect("a loss");
        // Any tangent of the right shape takes the same time.
        let tangent = embeddings.anchors.values.view();
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| backend.threshold_gradient(&batch, tangent, None).expect("a threshold gradient"));
        });
    }
}

fn retrieval(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("retrieval");
    for (name, embeddings) in &*ROWS {
        let batch = embeddings.batch();
        let mut backend = CpuBackend::new();
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| backend.nearest(&batch.anchors, None, 10).expect("neighbours"));
        });
    }
}

criterion_group!(benches, passes, threshold, retrieval);
criterion_main!(benches);
