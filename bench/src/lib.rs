//! Time and memory of a backend's loss: `ddtas-bench throughput`.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs`, `arguments.rs` | what to measure, and where; the arguments of the program |
//! | `density.rs` | named shares of mined negatives |
//! | `embeddings.rs` | drawing rows at such a share |
//! | `file.rs` | rows read from and written to .safetensors |
//! | `measure.rs` | one row of the table: time, memory, and the time of two bare matrix products |
//! | `products.rs` | the lower bound on a GPU: two matrix products by cuBLAS |
//! | `spot_check.rs` | a device's results on a batch of any size checked against float64, for some of its anchors |
//! | `compare.rs` | comparison of two runs |
//! | `plot.rs` | time and memory against B, as SVG |

#![warn(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod compare;
mod density;
mod embeddings;
mod file;
mod measure;
mod plot;
#[cfg(feature = "cuda")]
mod products;
mod settings;
#[cfg(any(feature = "cuda", feature = "emulated"))]
pub mod spot_check;

pub use arguments::DeviceArguments;
pub use compare::{Comparison, Ratio, compare, read_rows};
pub use ddtas::loss::ElementType;
pub use ddtas_io::tensors::EmbeddedRows;
pub use density::Density;
pub use embeddings::{CLASS_SIZE, Embeddings, draw, find_noise};
pub use file::read;
pub use measure::{Row, Timed, measure, measure_on, with_batch};
pub use plot::plot;
pub use settings::ThroughputSettings;

use ddtas_io::Result;

/// Measures every combination that `settings` ask for, in order of dimension, density and batch.
///
/// `progress` is called before each with its number, from 0, the count of all, and its name.
///
/// # Errors
/// Settings out of range, files that cannot be read or written, and errors of the backend.
pub fn run(settings: &ThroughputSettings, progress: &mut dyn FnMut(usize, usize, &str)) -> Result<Vec<Row>> {
    let plan = settings.plan()?;
    if let Some(path) = &settings.embeddings {
        let embeddings = file::read(path)?;
        plan.check_shape(path, &embeddings)?;
        progress(0, 1, &embeddings.name());
        return Ok(vec![measure(&embeddings, settings)?]);
    }
    // Fails for a missing device, or a share that no noise gives, before the first file and figure.
    drop(settings.device.open()?);
    let mut noises = Vec::new();
    for &dim in &plan.dims {
        for &density in &plan.densities {
            noises.push((dim, density, find_noise(density, dim, settings.references, settings.seed)?));
        }
    }
    let count = noises.len() * plan.batches.len();
    let mut rows = Vec::with_capacity(count);
    for (dim, density, noise) in noises {
        for &batch in &plan.batches {
            let embeddings = draw(batch, settings.references, dim, density, noise, settings.seed);
            progress(rows.len(), count, &embeddings.name());
            if let Some(path) = &settings.save_embeddings {
                file::write(path, &embeddings)?;
            }
            rows.push(measure(&embeddings, settings)?);
        }
    }
    Ok(rows)
}
