//! Region embeddings: classifies a detector's proposals by their nearest regions in a memory bank.
//!
//! Training uses the rectangular form: the proposals of a few scenes (anchors) are compared with themselves and with the
//! regions of earlier scenes (references). Proposals that overlap an object partly are ignored. In the test, a proposal of an
//! unseen scene gets the class of its most similar region in a bank of other scenes.
//!
//! `cargo run --release --example detection`; docs/beyond-retrieval.md shows the output.

#[path = "../drawn/backbone.rs"]
mod backbone;
#[path = "../../src/pages/lettering.rs"]
mod lettering;
#[path = "../drawn/materials.rs"]
mod materials;
mod network;
mod picture;
#[path = "../drawn/sheet.rs"]
mod sheet;
mod street;
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
use ddtas::backend::{Backend, DeviceSpec, Nearest, open};
use ddtas::loss::{LossOutput, LossSettings, Rows};
use ddtas_io::console::{self, print};
use ddtas_train::model::{Normalise, to_array};
use ddtas_train::train::Memory;
use ddtas_train::train::PairLoss;
use ndarray::Array2;

use network::{RegionNetwork, mean_over};
use street::{Scene, Truth, truths_of};
use training::{descend, learning_rate, together};

/// Trains region embeddings against a memory bank, and classifies proposals of unseen scenes by them.
#[derive(Parser)]
struct Arguments {
    /// Training steps, of eight scenes each.
    #[arg(long, default_value_t = 600)]
    steps: usize,
    /// Scenes that are tested.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    scenes: u64,
    /// Regions of earlier scenes in the memory bank of the loss.
    #[arg(long, default_value_t = 1024)]
    memory: usize,
    /// Dimensions of an embedding.
    #[arg(long, default_value_t = 16)]
    dim: usize,
    /// Loss threshold of positives and negatives. Low: six classes need not crowd together.
    #[arg(long, default_value_t = 0.3)]
    lambda: f64,
    /// Learning rate of the first step; it falls to a tenth.
    #[arg(long, default_value_t = 3e-3)]
    learning_rate: f64,
    /// Where the picture goes.
    #[arg(long, default_value = "target/detection.png")]
    picture: PathBuf,
    /// Seed of all random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Number of scenes in a training step.
const BATCH: usize = 8;
/// First scene numbers of test and bank. Those of training start at 0 and do not reach them.
const TEST: u64 = 1 << 40;
const BANK: u64 = 1 << 41;
/// Number of scenes in the bank of the test.
const BANK_SCENES: u64 = 32;
/// Number of scenes in the picture.
const SHOWN: usize = 6;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => console::failed("detection", &error),
    }
}

fn run(arguments: &Arguments) -> ddtas_train::Result<()> {
    let device = Device::flex().autodiff();
    device.seed(arguments.seed);
    let test = Test {
        queries: Scene::several(arguments.seed, TEST..TEST + arguments.scenes),
        bank: Scene::several(arguments.seed, BANK..BANK + BANK_SCENES),
    };
    let mut backend = open(&DeviceSpec::Auto)?;
    print(|out| {
        writeln!(
            out,
            "proposals of {} unseen scenes      object's kind right   object told from background",
            test.queries.len()
        )
    })?;
    test.answers(&mut *backend, |scenes| Ok(mean_colours(scenes)))?.report("colour alone")?;
    let network = RegionNetwork::new(arguments.dim, &device);
    let before = test.answers(&mut *backend, |scenes| embed(&network, scenes, &device))?;
    before.report("untrained network")?;
    let started = Instant::now();
    let network = train(network, arguments, &device)?;
    let seconds = started.elapsed().as_secs_f64();
    let after = test.answers(&mut *backend, |scenes| embed(&network, scenes, &device))?;
    after.report(&format!("trained, {} steps", arguments.steps))?;
    print(|out| writeln!(out, "{seconds:.0} s of training on {} cores", rayon::current_num_threads()))?;
    let shown = &test.queries[..SHOWN.min(test.queries.len())];
    picture::write(&arguments.picture, shown, &before.found, &after.found)?;
    print(|out| {
        writeln!(
            out,
            "proposals by what they were taken for, before and after: {}",
            arguments.picture.display()
        )
    })?;
    Ok(())
}

/// Embeddings of all proposals, scene by scene. Normalised by the scenes' own statistics, since an untrained
/// network has no running ones.
fn embed(network: &RegionNetwork, scenes: &[Scene], device: &Device) -> ddtas_train::Result<Array2<f32>> {
    let network = network.valid();
    let device = device.clone().inner();
    together(scenes.chunks(BATCH).map(|scenes| to_array(network.forward(scenes, &device, Normalise::Batch))))
}

/// The mean colour of a region as its embedding.
fn mean_colours(scenes: &[Scene]) -> Array2<f32> {
    let regions: Vec<_> = scenes
        .iter()
        .flat_map(|scene| scene.proposals.iter().map(move |(region, _)| (scene, region)))
        .collect();
    // A fourth, constant component, so that black has a direction, too.
    let mut rows = Array2::from_elem((regions.len(), 4), 0.5);
    for (mut row, (scene, region)) in rows.outer_iter_mut().zip(regions) {
        let weights = mean_over(region);
        for (c, channel) in scene.pixels.chunks(weights.len()).enumerate() {
            row[c] = channel.iter().zip(&weights).map(|(value, weight)| value * weight).sum::<f32>() - 0.5;
        }
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    rows
}

fn train(
    mut network: RegionNetwork,
    arguments: &Arguments,
    device: &Device,
) -> ddtas_train::Result<RegionNetwork> {
    let mut backend = open(&DeviceSpec::Auto)?;
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).init();
    let mut output = LossOutput::default();
    let settings = LossSettings::default().with_lambda(arguments.lambda);
    // The memory starts after a fifth of the steps: before, the network changes too fast for old regions to be useful.
    let mut memory = Memory::new(arguments.memory, arguments.steps / 5, arguments.dim);
    for step in 0..arguments.steps {
        let first = (step * BATCH) as u64;
        let scenes = Scene::several(arguments.seed, first..first + BATCH as u64);
        let labels: Vec<i64> = truths_of(&scenes).into_iter().map(Truth::label).collect();
        let embeddings = network.forward(&scenes, device, Normalise::Training);
        let values = to_array(embeddings.clone())?;
        let rows = (values.view(), labels.as_slice());
        memory.loss(&mut *backend, PairLoss::SoftContrastive, rows, &settings, &mut output)?;
        if step % 100 == 0 || step + 1 == arguments.steps {
            let (positives, negatives) = output.mined();
            print(|out| {
                writeln!(
                    out,
                    "  step {step:>3}: {} proposals and {} regions in memory, loss {:.4}, mined {positives} + {negatives}",
                    labels.len(),
                    memory.len(),
                    output.loss
                )
            })?;
        }
        memory.push(step, values.view(), &labels);
        let rate = learning_rate(arguments.learning_rate, step, arguments.steps);
        network = descend(network, &mut optimizer, embeddings, &output.gradient, rate);
    }
    Ok(network)
}

/// Scenes with the proposals to classify, and scenes with the known proposals.
struct Test {
    queries: Vec<Scene>,
    bank: Vec<Scene>,
}

/// Result of the classification.
struct Answers {
    found: Vec<Truth>,
    /// Share of the proposals on objects that got the right kind.
    kind: f64,
    /// Share of proposals that were correctly classified as object or background.
    told: f64,
}

impl Test {
    /// Gives every proposal the class of its most similar region in the bank, of those that are not unclear.
    fn answers(
        &self,
        backend: &mut dyn Backend,
        embed: impl Fn(&[Scene]) -> ddtas_train::Result<Array2<f32>>,
    ) -> ddtas_train::Result<Answers> {
        let (queries, bank) = (embed(&self.queries)?, embed(&self.bank)?);
        let (truths, known) = (truths_of(&self.queries), truths_of(&self.bank));
        let labels = |truths: &[Truth]| -> Vec<i64> { truths.iter().map(|truth| truth.label()).collect() };
        let (labels, known_labels) = (labels(&truths), labels(&known));
        // Rows with a negative label are ignored as answers, as they are in the loss.
        let rows = Rows::new(bank.view(), &known_labels);
        let nearest = backend.nearest(&Rows::new(queries.view(), &labels), Some(&rows), 1)?;
        let answer =
            |&index: &u32| if index == Nearest::NONE { Truth::Unclear } else { known[index as usize] };
        let found: Vec<Truth> = nearest.indices.column(0).iter().map(answer).collect();
        let is_object = |truth: Truth| matches!(truth, Truth::Object(_));
        let clear = || {
            truths.iter().copied().zip(found.iter().copied()).filter(|(truth, _)| *truth != Truth::Unclear)
        };
        Ok(Answers {
            kind: share(clear().filter(|(truth, _)| is_object(*truth)).map(|(truth, found)| truth == found)),
            told: share(clear().map(|(truth, found)| is_object(truth) == is_object(found))),
            found,
        })
    }
}

impl Answers {
    fn report(&self, name: &str) -> ddtas_io::Result<()> {
        print(|out| writeln!(out, "{name:<32} {:>19.1} % {:>26.1} %", 100.0 * self.kind, 100.0 * self.told))
    }
}

/// Share of `hits` that are true.
fn share(hits: impl Iterator<Item = bool>) -> f64 {
    let (right, all) = hits.fold((0usize, 0usize), |(right, all), hit| (right + usize::from(hit), all + 1));
    right as f64 / all.max(1) as f64
}
