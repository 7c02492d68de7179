//! Times each pass of the CPU backend (docs/architecture.md) at 80 and 1,280 rows and four densities.
//!
//! `cargo bench -p ddtas-bench --bench passes [-- --seconds 1]` prints milliseconds: the fastest call of each.

use std::time::{Duration, Instant};

use clap::Parser;
use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::LossOutput;
use ddtas_bench::{Density, Embeddings, draw, find_noise};

const DIM: usize = 512;
const SEED: u64 = 0;
const PASSES: [&str; 7] = ["rows", "same_class", "sweep", "select", "gradient", "threshold", "retrieval"];

#[derive(Parser)]
struct Arguments {
    /// Time for each line of the table.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let _ = arguments.bench;
    let heads: String = PASSES.iter().map(|pass| format!("{pass:>11}")).collect();
    println!("{:16}{heads}", "rows/density");
    for rows in [80, 1_280] {
        for density in [Density::Late, Density::Middle, Density::Start, Density::All] {
            let noise = find_noise(density, DIM, None, SEED)?;
            let drawn = draw(rows, None, DIM, density, noise, SEED);
            let best = fastest(&drawn, arguments.seconds)?;
            let times: String =
                best.iter().map(|time| format!("{:11.4}", 1e3 * time.as_secs_f64())).collect();
            println!("{:16}{times}", format!("{rows}/{density}"));
        }
    }
    Ok(())
}

/// The fastest call of each pass, in turns, for as long as given and at least once.
fn fastest(drawn: &Embeddings, seconds: f64) -> Result<[Duration; PASSES.len()]> {
    let (batch, mut backend, mut output) = (drawn.batch(), CpuBackend::new(), LossOutput::default());
    let (start, mut best) = (Instant::now(), [Duration::MAX; PASSES.len()]);
    loop {
        // A pass needs the results of those before it: the whole loss is computed, and its passes time themselves.
        backend.loss(&batch, &drawn.settings, &mut output)?;
        let times = backend.pass_times();
        let began = Instant::now();
        // Any tangent of the right shape takes the same time.
        backend.threshold_gradient(&batch, drawn.anchors.values.view(), None)?;
        let threshold = began.elapsed();
        let began = Instant::now();
        backend.nearest(&batch.anchors, None, 10)?;
        let retrieval = began.elapsed();
        let of_loss = [times.rows, times.same_class, times.sweep, times.select, times.gradient];
        for (best, time) in best.iter_mut().zip(of_loss.into_iter().chain([threshold, retrieval])) {
            *best = time.min(*best);
        }
        if start.elapsed().as_secs_f64() >= seconds {
            return Ok(best);
        }
    }
}
