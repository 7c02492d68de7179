//! dL^m/dlambda of a training step, against a central difference of the meta loss: for every lambda the
//! virtual step is taken again, by passes through the whole network.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::store::ModuleSnapshot;
use burn::tensor::{Device, Tensor, TensorData};
use ddtas::backend::{Backend, cpu::CpuBackend};
use ddtas::loss::{Batch, LossSettings, Mining, reference};
use ddtas_train::data::ImageBatch;
use ddtas_train::generator::{GeneratorKind, Lambda, Thresholds, VirtualStep, VirtualStepKind};
use ddtas_train::model::{EmbeddingNetwork, HeadKind, Normalise, read, seeded, to_array};
use ddtas_train::train::{BatchNorm, Engine, Generator, TrainSettings};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SIDE: usize = 16;

type Case = (BatchNorm, VirtualStepKind, HeadKind);

fn settings(kind: GeneratorKind, (batch_norm, step, head): Case) -> TrainSettings {
    let mut settings = TrainSettings { lambda: 0.7, ..TrainSettings::default() };
    (settings.image_size, settings.width, settings.embedding_dim) = (SIDE, 16, 10);
    (settings.mining, settings.alpha, settings.batch_norm) = (Mining::None, 4.0, batch_norm);
    settings.head = head;
    let generator = &mut settings.generator;
    (generator.kind, generator.lambda_pair, generator.lambda_reference) = (kind, true, 0.9);
    (generator.virtual_step, generator.virtual_rate) = (step, Some(0.1));
    settings
}

fn network(settings: &TrainSettings, device: &Device) -> EmbeddingNetwork {
    seeded(device, 3, || {
        let network = EmbeddingNetwork::new(&settings.network_shape(), device);
        let _ = network.forward(Tensor::zeros([1, 3, SIDE, SIDE], device), Normalise::Running);
        network
    })
}

/// Pictures of noise, `images` of each of `classes` classes.
fn batch(classes: usize, images: usize, rng: &mut ChaCha8Rng) -> ImageBatch {
    let count = classes * images;
    ImageBatch {
        pixels: (0..count * 3 * SIDE * SIDE).map(|_| rng.random_range(-1.0..1.0)).collect(),
        labels: (0..count).map(|row| (row / images) as i64).collect(),
        indices: (0..count).collect(),
        own: 0..count,
        image_size: SIDE,
        replaced: 0,
    }
}

fn tensor(batch: &ImageBatch, device: &Device) -> Tensor<4> {
    let shape = [batch.labels.len(), 3, SIDE, SIDE];
    Tensor::from_data(TensorData::new(batch.pixels.clone(), shape), device)
}

fn loss(embeddings: &Array2<f32>, labels: &[i64], settings: &LossSettings) -> (f64, Vec<f32>) {
    let found = reference(&Batch::square(embeddings.view(), labels), settings).unwrap();
    (found.weighted.loss, found.gradient.iter().map(|&value| value as f32).collect())
}

/// The sum of the squares of all gradients.
struct Square<'a>(&'a GradientsParams, f64);

impl ModuleVisitor for Square<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let found = self.0.get::<D>(param.id).map(|gradient| read(gradient).unwrap());
        self.1 += found.into_iter().flatten().map(|value| f64::from(value).powi(2)).sum::<f64>();
    }
}

/// The meta loss after a virtual step at `lambda` from `network`.
fn meta_loss(
    network: &EmbeddingNetwork,
    settings: &TrainSettings,
    lambda: Lambda,
    (train, meta): (&ImageBatch, &ImageBatch),
    device: &Device,
) -> f64 {
    let mode = match settings.batch_norm {
        BatchNorm::Trainable | BatchNorm::Synchronised => Normalise::Batch,
        BatchNorm::FrozenStatistics => Normalise::Affine,
        BatchNorm::Frozen => Normalise::Running,
    };
    let features = network.features(tensor(train, device), mode);
    let whole = settings.generator.kind == GeneratorKind::Full;
    let embeddings = network.head.forward(if whole { features } else { features.detach() });
    let values = to_array(embeddings.clone()).unwrap();
    let (_, gradient) = loss(&values, &train.labels, &lambda.applied_to(&settings.loss_settings()));
    let gradient = Tensor::<2>::from_data(TensorData::new(gradient, embeddings.dims()), device);
    let gradients = GradientsParams::from_grads((embeddings * gradient).sum().backward(), network);
    let mut square = Square(&gradients, 0.0);
    network.visit(&mut square);
    let rate = match settings.generator.step() {
        VirtualStep { kind: VirtualStepKind::Plain, rate } => rate,
        VirtualStep { kind: VirtualStepKind::Unit, rate } => rate / square.1.sqrt(),
    };
    let moved = SgdConfig::new().init().step(rate, network.clone(), gradients);
    let values = to_array(moved.valid().forward(tensor(meta, &device.clone().inner()), mode)).unwrap();
    let reference = settings.loss_settings().with_lambda(settings.generator.lambda_reference);
    loss(&values, &meta.labels, &reference).0
}

#[test]
fn both_generators_find_the_derivative_of_the_meta_loss_in_both_normalisations() {
    let device = Device::flex().autodiff();
    let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new()) };
    for kind in [GeneratorKind::Full, GeneratorKind::Head] {
        // The whole network's central difference is less exact through a layer normalisation, and with a unit step.
        let last = if kind == GeneratorKind::Head { HeadKind::LayerNormLinear } else { HeadKind::Linear };
        for case in [
            (BatchNorm::Trainable, VirtualStepKind::Plain, HeadKind::Linear),
            (BatchNorm::FrozenStatistics, VirtualStepKind::Plain, HeadKind::Linear),
            (BatchNorm::Frozen, VirtualStepKind::Plain, HeadKind::Linear),
            (BatchNorm::Frozen, VirtualStepKind::Unit, last),
        ] {
            let is_rough = kind == GeneratorKind::Full && case.1 == VirtualStepKind::Unit;
            let most = if is_rough { 5e-2 } else { 1e-2 };
            let settings = settings(kind, case);
            let case = format!("{kind:?}, {case:?}");
            let network = network(&settings, &device);
            let mut rng = ChaCha8Rng::seed_from_u64(6);
            let (train, meta) = (batch(8, 3, &mut rng), batch(5, 4, &mut rng));
            // Running statistics that differ from the batch's.
            for _ in 0..20 {
                let _ = network.forward(tensor(&batch(4, 3, &mut rng), &device), Normalise::Training);
            }
            let start = settings.first_lambda();
            let thresholds = Thresholds::new(start, &settings.generator);
            let generator = Generator::new(settings.generator.clone(), thresholds, cpu());
            let mut engine = Engine::new(network.clone(), &settings, cpu(), Some(generator), device.clone());
            engine.step(0, &train, Some(&meta)).unwrap();
            let found = engine.generator().unwrap().last_hypergradient().unwrap();

            let at = |pos: f64, neg: f64| {
                let lambda = Lambda { pos: start.pos + pos, neg: start.neg + neg };
                meta_loss(&network, &settings, lambda, (&train, &meta), &device)
            };
            // A wide step, since networks are f32; Richardson extrapolation cancels the third-order term.
            let derivative = |pos: f64, neg: f64| {
                let central = |h: f64| (at(pos * h, neg * h) - at(-pos * h, -neg * h)) / (2.0 * h);
                (4.0 * central(0.02) - central(0.04)) / 3.0
            };
            for (what, got, want) in
                [("pos", found.pos, derivative(1.0, 0.0)), ("neg", found.neg, derivative(0.0, 1.0))]
            {
                let error = (got - want).abs() / want.abs();
                assert!(error < most, "{case}, {what}: {got} is not {want}, off by {error:.1e}");
            }
        }
    }
}

#[test]
fn a_virtual_step_leaves_the_running_statistics_alone() {
    let device = Device::flex().autodiff();
    let case = (BatchNorm::Trainable, VirtualStepKind::Plain, HeadKind::Linear);
    let network = network(&settings(GeneratorKind::Full, case), &device);
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (train, meta) = (batch(8, 3, &mut rng), batch(5, 4, &mut rng));
    let statistics = |kind: Option<GeneratorKind>| {
        let settings = settings(kind.unwrap_or_default(), case);
        let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new()) };
        let thresholds = Thresholds::new(settings.first_lambda(), &settings.generator);
        let generator = kind.map(|_| Generator::new(settings.generator.clone(), thresholds, cpu()));
        let record = network.clone().into_record();
        let network = EmbeddingNetwork::new(&settings.network_shape(), &device).load_record(record);
        let mut engine = Engine::new(network, &settings, cpu(), generator, device.clone());
        engine.step(0, &train, Some(&meta)).unwrap();
        let tensors = engine.network.valid().collect(None, None, true).into_iter();
        let moving = tensors.filter(|tensor| tensor.name.contains("running"));
        moving.map(|tensor| tensor.into_parts().unwrap().4.to_vec()).collect::<Vec<_>>()
    };
    let without = statistics(None);
    for kind in [GeneratorKind::Full, GeneratorKind::Head] {
        assert!(statistics(Some(kind)) == without, "{kind:?}");
    }
}
