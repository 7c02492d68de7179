//! Dense embeddings: a network learns to distinguish materials pixel by pixel, without boundary pixels. Then
//! one loss is evaluated on every pixel of sixteen scenes, B = 65,536, where a B x B matrix would be 17 GB.
//!
//! `cargo run --release --example segmentation`; docs/beyond-retrieval.md shows the output.

#[path = "../drawn/backbone.rs"]
mod backbone;
mod evaluation;
#[path = "../../src/pages/lettering.rs"]
mod lettering;
#[path = "../drawn/materials.rs"]
mod materials;
mod network;
mod picture;
mod scenes;
#[path = "../drawn/sheet.rs"]
mod sheet;
#[path = "../drawn/training.rs"]
mod training;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::Device;
use clap::Parser;
use ddtas::backend::{DeviceSpec, open};
use ddtas::loss::{Batch, LossOutput, LossSettings};
use ddtas_io::console::{self, print};
use ddtas_train::model::{Normalise, to_array};
use ndarray::Array2;
use peak_alloc::PeakAlloc;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use evaluation::{Accuracy, evaluate, prototypes};
use materials::Material;
use network::{PixelNetwork, tensor};
use scenes::{IGNORED, SIDE, Scene, labels_of};
use training::{descend, learning_rate, together};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Trains pixel embeddings on drawn scenes and measures them on scenes they have not seen.
#[derive(Parser)]
struct Arguments {
    /// Training steps, of eight scenes each.
    #[arg(long, default_value_t = 500)]
    steps: usize,
    /// Scenes that are tested, and whose pixels are the one large batch (4,096 pixels each).
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(2..=64))]
    scenes: u64,
    /// Pixels of each material that enter the loss of a training step; the others are ignored.
    #[arg(long, default_value_t = 64)]
    pixels: usize,
    /// Dimensions of an embedding.
    #[arg(long, default_value_t = 16)]
    dim: usize,
    /// Loss threshold of positives and negatives. Low: six materials need not crowd together.
    #[arg(long, default_value_t = 0.1)]
    lambda: f64,
    /// Learning rate of the first step; it falls to a tenth.
    #[arg(long, default_value_t = 3e-3)]
    learning_rate: f64,
    /// Where the picture goes.
    #[arg(long, default_value = "target/segmentation.png")]
    picture: PathBuf,
    /// Seed of all random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Number of scenes in a training step.
const BATCH: usize = 8;
/// First scene numbers of test and prototypes. Those of training start at 0 and do not reach them.
const TEST: u64 = 1 << 40;
const SUPPORT: u64 = 1 << 41;
/// Number of scenes in the picture.
const SHOWN: usize = 6;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => console::failed("segmentation", &error),
    }
}

fn run(arguments: &Arguments) -> ddtas_train::Result<()> {
    let device = Device::flex().autodiff();
    device.seed(arguments.seed);
    let mut backend = open(&DeviceSpec::Auto)?;
    let test = Scene::several(arguments.seed, TEST..TEST + arguments.scenes);
    let support = Scene::several(arguments.seed, SUPPORT..SUPPORT + BATCH as u64);
    let mut measure = |network: &PixelNetwork| -> ddtas_train::Result<(Accuracy, Array2<f32>)> {
        let support_rows = embed(network, &support, &device)?;
        let prototypes = prototypes(support_rows.view(), &labels_of(&support));
        let rows = embed(network, &test, &device)?;
        let accuracy = evaluate(&mut *backend, &prototypes, rows.view(), &labels_of(&test))?;
        Ok((accuracy, rows))
    };

    let colours = colour_accuracy(&support, &test)?;
    print(|out| {
        writeln!(
            out,
            "pixels of {} unseen scenes        nearest prototype   nearest pixel of other scenes",
            test.len()
        )
    })?;
    report("colour alone", &colours)?;
    let network = PixelNetwork::new(arguments.dim, &device);
    let (before, _) = measure(&network)?;
    report("untrained network", &before)?;
    let started = Instant::now();
    let network = train(network, arguments, &device)?;
    let seconds = started.elapsed().as_secs_f64();
    let (after, rows) = measure(&network)?;
    report(&format!("trained, {} steps", arguments.steps), &after)?;
    print(|out| writeln!(out, "{seconds:.0} s of training on {} cores\n", rayon::current_num_threads()))?;

    large_batch(&rows, &labels_of(&test), &LossSettings::default().with_lambda(arguments.lambda))?;
    let shown = &test[..SHOWN.min(test.len())];
    picture::write(&arguments.picture, shown, &before.predicted, &after.predicted)?;
    print(|out| writeln!(out, "scenes, truth, before, after: {}", arguments.picture.display()))?;
    Ok(())
}

fn report(name: &str, accuracy: &Accuracy) -> ddtas_io::Result<()> {
    print(|out| {
        writeln!(
            out,
            "{name:<32} {:>17.1} % {:>27.1} %",
            100.0 * accuracy.prototype,
            100.0 * accuracy.retrieval
        )
    })
}

/// The accuracy with a pixel's colour as its embedding.
fn colour_accuracy(support: &[Scene], test: &[Scene]) -> ddtas_train::Result<Accuracy> {
    let rows = |scenes: &[Scene]| {
        let area = SIDE * SIDE;
        // A fourth, constant component, so that black has a direction, too.
        let mut rows = Array2::from_shape_fn((scenes.len() * area, 4), |(row, c)| {
            if c == 3 { 0.5 } else { scenes[row / area].pixels[c * area + row % area] - 0.5 }
        });
        for mut row in rows.outer_iter_mut() {
            let norm = row.dot(&row).sqrt();
            row /= norm;
        }
        rows
    };
    let prototypes = prototypes(rows(support).view(), &labels_of(support));
    let mut backend = open(&DeviceSpec::Auto)?;
    evaluate(&mut *backend, &prototypes, rows(test).view(), &labels_of(test))
}

/// Embeddings of all pixels, scene by scene.
fn embed(network: &PixelNetwork, scenes: &[Scene], device: &Device) -> ddtas_train::Result<Array2<f32>> {
    let network = network.valid();
    let device = device.clone().inner();
    // Normalised by the scenes' own statistics, since an untrained network has no running ones.
    together(
        scenes
            .chunks(BATCH)
            .map(|scenes| to_array(network.forward(tensor(scenes, &device), Normalise::Batch))),
    )
}

fn train(
    mut network: PixelNetwork,
    arguments: &Arguments,
    device: &Device,
) -> ddtas_train::Result<PixelNetwork> {
    let mut backend = open(&DeviceSpec::Auto)?;
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).init();
    let mut output = LossOutput::default();
    let settings = LossSettings::default().with_lambda(arguments.lambda);
    let mut rng = ChaCha8Rng::seed_from_u64(arguments.seed ^ 0x5eed);
    for step in 0..arguments.steps {
        let first = (step * BATCH) as u64;
        let scenes = Scene::several(arguments.seed, first..first + BATCH as u64);
        let labels = sample(&labels_of(&scenes), arguments.pixels, &mut rng);
        let embeddings = network.forward(tensor(&scenes, device), Normalise::Training);
        let values = to_array(embeddings.clone())?;
        backend.loss(&Batch::square(values.view(), &labels), &settings, &mut output)?;
        if step % 100 == 0 || step + 1 == arguments.steps {
            let (positives, negatives) = output.mined();
            print(|out| {
                writeln!(out, "  step {step:>3}: loss {:.4}, mined {positives} + {negatives}", output.loss)
            })?;
        }
        // Ignored pixels have a gradient of zero, and cost little.
        let rate = learning_rate(arguments.learning_rate, step, arguments.steps);
        network = descend(network, &mut optimizer, embeddings, &output.gradient, rate);
    }
    Ok(network)
}

/// Keeps the labels of `count` random pixels of every material, and ignores the rest.
fn sample(labels: &[i64], count: usize, rng: &mut impl RngExt) -> Vec<i64> {
    let mut order: Vec<usize> = (0..labels.len()).collect();
    order.shuffle(rng);
    let mut room = [count; Material::ALL.len()];
    let mut kept = vec![IGNORED; labels.len()];
    for pixel in order {
        if let Ok(label) = usize::try_from(labels[pixel])
            && room[label] > 0
        {
            room[label] -= 1;
            kept[pixel] = labels[pixel];
        }
    }
    kept
}

/// Evaluates one loss over every pixel, and prints its time, its memory, and the size of a B x B matrix.
fn large_batch(rows: &Array2<f32>, labels: &[i64], settings: &LossSettings) -> ddtas_train::Result<()> {
    let count = labels.len();
    let mut output = LossOutput { gradient: Array2::zeros(rows.dim()), ..LossOutput::default() };
    let before = PeakAlloc.current_usage();
    PeakAlloc.reset_peak_usage();
    let mut backend = open(&DeviceSpec::Auto)?;
    let started = Instant::now();
    backend.loss(&Batch::square(rows.view(), labels), settings, &mut output)?;
    let seconds = started.elapsed().as_secs_f64();
    let peak = PeakAlloc.peak_usage().saturating_sub(before);
    let ignored = labels.iter().filter(|label| **label < 0).count();
    let (positives, negatives) = output.mined();
    print(|out| {
        writeln!(
            out,
            "one loss over B = {count} pixels of {} dimensions ({ignored} at boundaries ignored):",
            rows.ncols()
        )
    })?;
    print(|out| {
        writeln!(
            out,
            "  {seconds:.1} s on {}, {:.0} MB beside embeddings and gradient; one B x B matrix of floats: {:.1} GB",
            backend.name(),
            peak as f64 / 1e6,
            4.0 * (count as f64).powi(2) / 1e9
        )
    })?;
    print(|out| {
        writeln!(
            out,
            "  loss {:.4}, {} anchors active, {:.0} M positive and {:.0} M negative pairs mined\n",
            output.loss,
            output.active,
            positives as f64 / 1e6,
            negatives as f64 / 1e6
        )
    })?;
    Ok(())
}
