//! Region embeddings: proposals of a detector are told apart by comparing them with a bank of regions.
//!
//! Training is the rectangular form: the proposals of a few scenes (anchors) against the regions of the
//! last hundreds of scenes (references, without gradient). The test has designs that training never saw: a
//! few example regions of each make up a new bank, and a proposal is of the design of its most similar one.
//!
//! `cargo run --release --example detection`; docs/beyond-retrieval.md has what it prints.

mod bank;
mod street;

use std::process::ExitCode;
use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use clap::Parser;
use ddtas::backend::{Backend, DeviceSpec, Nearest, open};
use ddtas::data::synthetic::Fleet;
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows};
use ddtas::model::{EmbeddingNetwork, NetworkShape, Normalise, to_array};
use ndarray::Array2;

use bank::Bank;
use street::{REGION, Scene, Truth};

/// Trains region embeddings against a memory bank and classifies proposals of designs it has not seen.
#[derive(Parser)]
struct Arguments {
    /// Training steps, of six scenes each.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Scenes that are tested.
    #[arg(long, default_value_t = 60)]
    scenes: u64,
    /// Regions the memory bank holds in training.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    bank: u32,
    /// What all random numbers come from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Designs that train, and all of them; the rest is the test's.
const TRAIN: usize = 60;
const DESIGNS: usize = 80;
/// Scenes of a training step.
const BATCH: u64 = 6;
const DIM: usize = 64;
const LEARNING_RATE: f64 = 2e-3;
/// Numbers of the scenes, apart from each other and from the training's.
const TEST: u64 = 1 << 40;
const SUPPORT: u64 = 1 << 41;
/// Scenes that the test's bank is made from: some five examples of each design.
const SUPPORT_SCENES: u64 = 25;

/// Regions of some scenes, cut out, with their truths.
#[derive(Default)]
struct Cuts {
    values: Vec<f32>,
    truths: Vec<Truth>,
}

impl Cuts {
    fn add(&mut self, scene: &Scene, region: &street::Region, truth: Truth) {
        self.values.extend(scene.cut(region));
        self.truths.push(truth);
    }

    /// The proposals of scenes.
    fn proposals(scenes: impl Iterator<Item = Scene>) -> Self {
        let mut cuts = Self::default();
        for scene in scenes {
            for (region, truth) in &scene.proposals {
                cuts.add(&scene, region, *truth);
            }
        }
        cuts
    }

    fn tensor(&self, device: &Device) -> Tensor<4> {
        let side = REGION as usize;
        Tensor::from_data(TensorData::new(self.values.clone(), [self.truths.len(), 3, side, side]), device)
    }

    /// Labels of the loss. A background is a class of its own: it must be far from everything, and
    /// two backgrounds need not be alike. Unclear regions are ignored.
    fn labels(&self, next_background: &mut i64) -> Vec<i64> {
        let label = |truth: &Truth| match truth {
            Truth::Car(design) => *design as i64,
            Truth::Unclear => -1,
            Truth::Background => {
                *next_background += 1;
                *next_background
            }
        };
        self.truths.iter().map(label).collect()
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("detection: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> ddtas::Result<()> {
    let device = Device::flex().autodiff();
    device.seed(arguments.seed);
    let fleet = Fleet::new(DESIGNS, 64, arguments.seed)?;
    let shape = NetworkShape { width: 16, depth: 1, embedding_dim: DIM };
    let network = EmbeddingNetwork::new(&shape, &device);
    let mut backend = open(&DeviceSpec::Auto)?;
    let test = Test::new(&fleet, arguments);
    println!(
        "{} proposals of {} unseen designs against a bank of {} regions",
        test.queries.truths.len(),
        DESIGNS - TRAIN,
        test.support.truths.len()
    );
    println!("                                 design right   background told from car");
    test.report("pixels", &mut *backend, |cuts| Ok(pixel_rows(cuts)))?;
    let embed = |network: &EmbeddingNetwork, cuts: &Cuts, mode| embed(network, cuts, mode, &device);
    test.report("untrained network", &mut *backend, |cuts| embed(&network, cuts, Normalise::Batch))?;

    let started = Instant::now();
    let network = train(network, &fleet, arguments, &device)?;
    let seconds = started.elapsed().as_secs_f64();
    let name = format!("trained, {} steps", arguments.steps);
    test.report(&name, &mut *backend, |cuts| embed(&network, cuts, Normalise::Running))?;
    println!("{seconds:.0} s of training on {} cores", rayon::current_num_threads());
    Ok(())
}

fn embed(
    network: &EmbeddingNetwork,
    cuts: &Cuts,
    mode: Normalise,
    device: &Device,
) -> ddtas::Result<Array2<f32>> {
    to_array(network.valid().forward(cuts.tensor(&device.clone().inner()), mode))
}

fn train(
    mut network: EmbeddingNetwork,
    fleet: &Fleet,
    arguments: &Arguments,
    device: &Device,
) -> ddtas::Result<EmbeddingNetwork> {
    let mut backend = open(&DeviceSpec::Auto)?;
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).init();
    let mut output = LossOutput::default();
    let mut bank = Bank::new(arguments.bank as usize, DIM);
    // Backgrounds are numbered behind the designs.
    let mut next_background = DESIGNS as i64;
    for step in 0..arguments.steps {
        let first = step as u64 * BATCH;
        let scenes = (first..first + BATCH).map(|i| Scene::draw(fleet, 0..TRAIN, arguments.seed, i));
        let cuts = Cuts::proposals(scenes);
        let labels = cuts.labels(&mut next_background);
        let embeddings = network.forward(cuts.tensor(device), Normalise::Training);
        let values = to_array(embeddings.clone())?;
        // A proposal's own copy in the bank is an exact duplicate, which is never a positive.
        bank.push(values.view(), &labels);
        let batch = Batch::rectangular(Rows::new(values.view(), &labels), bank.rows());
        backend.loss(&batch, &LossSettings::default(), &mut output)?;
        if step % 50 == 0 || step + 1 == arguments.steps {
            let (positives, negatives) = output.mined();
            println!(
                "  step {step:>3}: {} proposals against {} regions, loss {:.4}, mined {positives} + {negatives}",
                labels.len(),
                bank.rows().labels.len(),
                output.loss
            );
        }
        let shape = [values.nrows(), values.ncols()];
        let gradient = TensorData::new(output.gradient.iter().copied().collect::<Vec<f32>>(), shape);
        let surrogate = (embeddings * Tensor::<2>::from_data(gradient, device)).sum();
        let gradients = GradientsParams::from_grads(surrogate.backward(), &network);
        let progress = step as f64 / arguments.steps as f64;
        let rate = LEARNING_RATE * (0.05 + 0.475 * (1.0 + (std::f64::consts::PI * progress).cos()));
        network = optimizer.step(rate, network, gradients);
    }
    Ok(network)
}

/// Proposals and example regions of designs that training does not see.
struct Test {
    queries: Cuts,
    support: Cuts,
}

impl Test {
    fn new(fleet: &Fleet, arguments: &Arguments) -> Self {
        let draw = |index| Scene::draw(fleet, TRAIN..DESIGNS, arguments.seed, index);
        let mut support = Cuts::default();
        for scene in (SUPPORT..SUPPORT + SUPPORT_SCENES).map(draw) {
            for (design, region) in &scene.cars {
                support.add(&scene, region, Truth::Car(*design));
            }
            let nothing = |(_, truth): &&(_, Truth)| *truth == Truth::Background;
            for (region, truth) in scene.proposals.iter().filter(nothing) {
                support.add(&scene, region, *truth);
            }
        }
        Self { queries: Cuts::proposals((TEST..TEST + arguments.scenes).map(draw)), support }
    }

    /// Every proposal is what the most similar region of the bank is.
    fn report(
        &self,
        name: &str,
        backend: &mut dyn Backend,
        embed: impl Fn(&Cuts) -> ddtas::Result<Array2<f32>>,
    ) -> ddtas::Result<()> {
        let (queries, support) = (embed(&self.queries)?, embed(&self.support)?);
        let unlabelled = |cuts: &Cuts| vec![0i64; cuts.truths.len()];
        let (query_labels, support_labels) = (unlabelled(&self.queries), unlabelled(&self.support));
        let bank = Rows::new(support.view(), &support_labels);
        let nearest = backend.nearest(&Rows::new(queries.view(), &query_labels), Some(&bank), 1)?;
        let [mut cars, mut right, mut counted, mut told] = [0usize; 4];
        for (truth, &index) in self.queries.truths.iter().zip(&nearest.indices) {
            let found =
                if index == Nearest::NONE { Truth::Unclear } else { self.support.truths[index as usize] };
            if *truth == Truth::Unclear {
                continue;
            }
            counted += 1;
            told += usize::from((*truth == Truth::Background) == (found == Truth::Background));
            if let Truth::Car(_) = truth {
                cars += 1;
                right += usize::from(found == *truth);
            }
        }
        let share = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
        println!("{name:<32} {:>10.1} % {:>24.1} %", share(right, cars), share(told, counted));
        Ok(())
    }
}

/// Regions themselves as embeddings: pixel values, mean taken off, scaled to unit length.
fn pixel_rows(cuts: &Cuts) -> Array2<f32> {
    let dim = 3 * (REGION * REGION) as usize;
    let mut rows = Array2::from_shape_fn((cuts.truths.len(), dim), |(row, d)| cuts.values[row * dim + d]);
    for mut row in rows.outer_iter_mut() {
        let mean = row.sum() / dim as f32;
        row -= mean;
        let norm = row.dot(&row).sqrt();
        row /= norm.max(f32::MIN_POSITIVE);
    }
    rows
}
