//! Times the loss on rows that are in the GPU's memory already, as a training step on the
//! GPU calls it: no copy of rows or gradient, one wait for the scalars.
//!
//! `cargo bench -p ddtas-bench --features cuda --bench resident -- --embeddings FILE --dtype bf16`
//! prints what `ddtas-bench throughput --backend cuda --json` does, which copies both. FILE is one of its
//! `--save-embeddings`.

use std::process::ExitCode;

use clap::Parser;
use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::backend::cuda::{self, CudaBackend, CudaDevice};
use ddtas::backend::device::{Device, ElementType, Options, ResidentBatch, ResidentRows};
use ddtas::loss::{Batch, Embeddings, LossOutput, LossSettings};
use ddtas_bench::spot_check::{Figures, Way, compare};
use ddtas_bench::{Embeddings as Drawn, ThroughputSettings, Timed, measure_on, read, with_batch};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: ThroughputSettings,
    /// Bytes for candidates; the rest is recomputed. Left out: a quarter of the GPU's free memory.
    #[arg(long)]
    budget: Option<usize>,
    /// Before timing, hold so many anchors to float64, and the answers of budget 0 and of the kernels that are
    /// not Hopper's to this one.
    #[arg(long, value_name = "ANCHORS")]
    compare: Option<usize>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let _ = arguments.bench;
    match cuda::device_count() {
        Ok(1..) => {}
        Ok(0) => {
            println!("skipped: the driver shows no GPU");
            return ExitCode::SUCCESS;
        }
        Err(reason) => {
            println!("skipped: {reason}");
            return ExitCode::SUCCESS;
        }
    }
    match time(&arguments) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("resident: {error}");
            ExitCode::FAILURE
        }
    }
}

fn time(arguments: &Arguments) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let file = arguments.settings.embeddings.as_ref().ok_or("name a file of rows: --embeddings FILE")?;
    let options = Options { budget: arguments.budget, tf32: arguments.settings.device.tf32 };
    let opened = || Ok(Resident::new(options)?);
    let embeddings = read(file)?;
    let compared =
        arguments.compare.map(|anchors| hold(arguments, &embeddings, options, anchors)).transpose()?;
    let mut row = serde_json::to_value(measure_on(opened, &embeddings, &arguments.settings)?)?;
    row["compared"] = serde_json::to_value(compared)?;
    Ok(serde_json::to_string_pretty(&[row])?)
}

/// Refuses to time what is wrong.
fn hold(
    arguments: &Arguments,
    embeddings: &Drawn,
    options: Options,
    anchors: usize,
) -> std::result::Result<Figures, Box<dyn std::error::Error>> {
    let open = |way| {
        let device = CudaDevice::new(0)?;
        let device = if way == Way::EveryGpu { device.without_warpgroup_products() } else { device };
        let budget = if way == Way::NothingStored { Some(0) } else { options.budget };
        Ok(CudaBackend::new(device, Options { budget, ..options }))
    };
    let (settings, tf32) = (&embeddings.settings, arguments.settings.device.tf32);
    let compared = with_batch(embeddings, &arguments.settings, |batch| {
        Ok(compare(open, batch, settings, tf32, anchors)?)
    })?;
    Ok(compared.map_err(|wrong| format!("the GPU's answer is wrong, and is not timed: {wrong}"))?)
}

/// The CUDA backend, with the batch of its first call kept on the GPU: every call is taken to be about it.
struct Resident {
    backend: CudaBackend,
    /// A device of its own: the same GPU and context, another stream.
    memory: CudaDevice,
    /// Rows, labels, gradient, and where they are.
    kept: Option<([<CudaDevice as Device>::Buffer; 3], ResidentBatch)>,
}

impl Resident {
    fn new(options: Options) -> Result<Self> {
        let backend = CudaBackend::new(CudaDevice::new(0)?, options);
        Ok(Self { backend, memory: CudaDevice::new(0)?, kept: None })
    }

    fn keep(&mut self, batch: &Batch<'_>) -> Result<()> {
        let gaps = || ddtas::Error::NotContiguous { rows: "anchors" };
        let view = &batch.anchors.embeddings;
        let (dtype, bytes): (_, &[u8]) = match view {
            Embeddings::F32(m) => (ElementType::F32, bytemuck::cast_slice(m.as_slice().ok_or_else(gaps)?)),
            Embeddings::F16(m) => (ElementType::F16, bytemuck::cast_slice(m.as_slice().ok_or_else(gaps)?)),
            Embeddings::Bf16(m) => (ElementType::Bf16, bytemuck::cast_slice(m.as_slice().ok_or_else(gaps)?)),
        };
        let (count, dim) = (view.rows(), view.dim());
        let memory = &mut self.memory;
        let mut rows = memory.allocate(bytes.len())?;
        memory.upload(&mut rows, 0, bytes)?;
        let labels: &[u8] = bytemuck::cast_slice(batch.anchors.labels);
        let mut classes = memory.allocate(labels.len())?;
        memory.upload(&mut classes, 0, labels)?;
        let gradient = memory.allocate(count * dim * size_of::<f32>())?;
        let anchors = ResidentRows {
            count,
            embeddings: memory.address(&rows),
            labels: memory.address(&classes),
            gradient: memory.address(&gradient),
        };
        let batch = ResidentBatch { dim, dtype, anchors, references: None, check: batch.check };
        self.kept = Some(([rows, classes, gradient], batch));
        Ok(())
    }
}

impl Timed for Resident {
    fn name(&self) -> String {
        self.backend.name()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        let Some((_, kept)) = &self.kept else {
            self.keep(batch)?;
            return self.backend.loss(batch, settings, output);
        };
        // Into an output of its own: the resident form returns no counts, and those of the first call stand.
        let mut scalars = LossOutput::default();
        // SAFETY: the three buffers of `keep` are complete, of these lengths, and live in `self`.
        unsafe { self.backend.loss_resident(kept, settings, &mut scalars) }
    }

    fn workspace_bytes(&self) -> usize {
        self.backend.workspace_bytes()
    }
}
