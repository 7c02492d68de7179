//! dL^m/dlambda of a training step, against a central difference of the meta loss: for every lambda the
//! virtual step is taken again, by passes through the whole network.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use burn::module::Module;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Tensor, TensorData};
use ddtas::backend::{Backend, cpu::CpuBackend};
use ddtas::loss::{Batch, LossSettings, Mining, reference};
use ddtas_train::data::ImageBatch;
use ddtas_train::generator::{GeneratorKind, Lambda, Thresholds, VirtualStepKind};
use ddtas_train::model::{EmbeddingNetwork, Normalise, to_array};
use ddtas_train::train::{BatchNorm, Engine, Generator, TrainSettings};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SIDE: usize = 16;

fn settings(kind: GeneratorKind, batch_norm: BatchNorm) -> TrainSettings {
    let mut settings = TrainSettings { lambda: 0.7, ..TrainSettings::default() };
    (settings.image_size, settings.width, settings.embedding_dim) = (SIDE, 16, 10);
    (settings.mining, settings.alpha, settings.batch_norm) = (Mining::None, 4.0, batch_norm);
    let generator = &mut settings.generator;
    (generator.kind, generator.lambda_pair, generator.lambda_reference) = (kind, true, 0.9);
    (generator.virtual_step, generator.virtual_rate) = (VirtualStepKind::Plain, Some(0.1));
    settings
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
    let rate = settings.generator.step().rate;
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
        for batch_norm in [BatchNorm::Trainable, BatchNorm::FrozenStatistics, BatchNorm::Frozen] {
            let case = format!("{kind:?}, {batch_norm:?}");
            let settings = settings(kind, batch_norm);
            device.seed(3);
            let network = EmbeddingNetwork::new(&settings.network_shape(), &device);
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
                assert!(error < 1e-2, "{case}, {what}: {got} is not {want}, off by {error:.1e}");
            }
        }
    }
}
