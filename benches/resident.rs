//! Times the loss on rows that are in the GPU's memory already, as a training step on the
//! GPU calls it: no copy of rows or gradient, one wait for the scalars.
//!
//! `cargo bench --no-default-features --features cli,cuda --bench resident -- FILE.safetensors`
//! prints one JSON array with the fields of `ddtas-bench throughput --json`.
//! FILE holds `embeddings` [B, D] f32 and `labels` [B] i64 (benches/device/embeddings.py).

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use ddtas::backend::Backend;
use ddtas::backend::cuda::{self, CudaBackend, CudaDevice};
use ddtas::backend::device::{Device, Options, ResidentBatch, ResidentRows, ResidentType};
use ddtas::loss::{Batch, Embeddings, LossOutput, LossSettings, UnitCheck};
use half::{bf16, f16};
use ndarray::Array2;
use safetensors::SafeTensors;

#[derive(Parser)]
struct Arguments {
    /// File of embeddings; without one there is nothing to time.
    file: Option<PathBuf>,
    /// Type the rows are rounded to.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    /// Time spent measuring.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes for candidates; the rest is recomputed.
    #[arg(long, default_value_t = Options::default().budget)]
    budget: usize,
    /// One TF32 product instead of three, for f32 rows.
    #[arg(long)]
    fast: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    F32,
    F16,
    Bf16,
}

#[derive(serde::Serialize)]
struct Row {
    batch: usize,
    dim: usize,
    dtype: Dtype,
    backend: String,
    density: Option<String>,
    mined_share: f64,
    time_ms: f64,
    time_spread_ms: f64,
    gflops: f64,
    peak_extra_bytes: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let _ = arguments.bench;
    let Some(file) = &arguments.file else {
        println!("nothing to time: name a file of embeddings");
        return Ok(());
    };
    match cuda::device_count() {
        Ok(1..) => println!("{}", serde_json::to_string_pretty(&[time(file, &arguments)?])?),
        Ok(0) => println!("skipped: the driver shows no GPU"),
        Err(reason) => println!("skipped: {reason}"),
    }
    Ok(())
}

fn time(file: &PathBuf, arguments: &Arguments) -> Result<Row, Box<dyn Error>> {
    let bytes = std::fs::read(file)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let density = header.metadata().as_ref().and_then(|metadata| metadata.get("density").cloned());
    let tensors = SafeTensors::deserialize(&bytes)?;
    let (embeddings, labels) = (tensors.tensor("embeddings")?, tensors.tensor("labels")?);
    let [batch, dim] = *embeddings.shape() else { return Err("embeddings are no matrix".into()) };
    let rows: Vec<f32> = words(embeddings.data(), f32::from_le_bytes);
    let rows = Array2::from_shape_vec((batch, dim), rows)?;
    let labels: Vec<i64> = words(labels.data(), i64::from_le_bytes);

    let options = Options { budget: arguments.budget, exact: !arguments.fast };
    let mut backend = CudaBackend::new(CudaDevice::new(0)?, options);
    let seconds = arguments.seconds;
    let (mined_share, times) = match arguments.dtype {
        Dtype::F32 => {
            run(&mut backend, (rows.view().into(), ResidentType::F32, as_bytes(&rows)?), &labels, seconds)
        }
        Dtype::F16 => {
            let rows = rows.mapv(f16::from_f32);
            let rows_of = (Embeddings::F16(rows.view()), ResidentType::F16, as_bytes(&rows)?);
            run(&mut backend, rows_of, &labels, seconds)
        }
        Dtype::Bf16 => {
            let rows = rows.mapv(bf16::from_f32);
            let rows_of = (Embeddings::Bf16(rows.view()), ResidentType::Bf16, as_bytes(&rows)?);
            run(&mut backend, rows_of, &labels, seconds)
        }
    }?;
    let median = times[times.len() / 2];
    Ok(Row {
        batch,
        dim,
        dtype: arguments.dtype,
        backend: backend.name(),
        density,
        mined_share,
        time_ms: median,
        time_spread_ms: times[times.len() * 9 / 10] - times[times.len() / 10],
        // Of the two products of an unfused loss, whatever was really multiplied.
        gflops: 4.0 * (batch as f64).powi(2) * dim as f64 / median / 1e6,
        peak_extra_bytes: backend.workspace_bytes(),
    })
}

/// Share of the negatives that is mined, and sorted times in milliseconds.
fn run<'a>(
    backend: &mut CudaBackend,
    (view, dtype, bytes): (Embeddings<'a>, ResidentType, &[u8]),
    labels: &'a [i64],
    seconds: f64,
) -> Result<(f64, Vec<f64>), Box<dyn Error>> {
    let settings = LossSettings::default();
    let mut output = LossOutput::default();
    // Once from the host, for what the resident form does not return.
    let batch = Batch { check: UnitCheck::Check, ..Batch::square(view, labels) };
    backend.loss(&batch, &settings, &mut output)?;
    let (count, dim) = (view.rows(), view.dim());
    let negatives = (count as f64).powi(2) - count as f64 - output.total_pos as f64;
    let mined = output.mined().1 as f64 / negatives;

    // A device of its own: the same GPU and context, another stream.
    let mut memory = CudaDevice::new(0)?;
    let mut rows = memory.allocate(bytes.len())?;
    memory.upload(&mut rows, 0, bytes)?;
    let mut classes = memory.allocate(labels.len() * 8)?;
    memory.upload(&mut classes, 0, bytemuck::cast_slice(labels))?;
    let gradient = memory.allocate(count * dim * 4)?;
    let resident = ResidentBatch {
        dim,
        dtype,
        anchors: ResidentRows {
            count,
            embeddings: memory.address(&rows),
            labels: memory.address(&classes),
            gradient: memory.address(&gradient),
        },
        references: None,
        check: UnitCheck::Check,
    };
    let mut times = Vec::new();
    let mut warm_up = 3;
    let begin = Instant::now();
    while times.len() < 5 || begin.elapsed() < Duration::from_secs_f64(seconds) {
        let start = Instant::now();
        // SAFETY: the three allocations above are complete, of these lengths, and outlive the loop.
        unsafe { backend.loss_resident(&resident, &settings, &mut output) }?;
        if warm_up > 0 {
            warm_up -= 1;
        } else {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok((mined, times))
}

fn as_bytes<T: bytemuck::Pod>(rows: &Array2<T>) -> Result<&[u8], Box<dyn Error>> {
    Ok(bytemuck::cast_slice(rows.as_slice().ok_or("rows with gaps")?))
}

/// Little-endian values of `N` bytes each.
fn words<T, const N: usize>(data: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    data.as_chunks::<N>().0.iter().map(|chunk| from(*chunk)).collect()
}
