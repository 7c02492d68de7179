//! Whole networks on the GPU backend's kernels, compiled for the CPU: features, gradients and the losses of a run are those of
//! the CPU backend.
#![cfg(feature = "train-emulated")]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use ddtas_train::model::{
    Backbone, BackboneKind, EmbeddingNetwork, Features, HeadKind, NetworkShape, Normalise,
};
#[cfg(feature = "emulated")]
use runs::{records, small_run};

/// Gradients of all weights, in the module's order.
struct Visitor<'a> {
    gradients: &'a GradientsParams,
    found: Vec<Vec<f32>>,
}

impl ModuleVisitor for Visitor<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.found.push(gradient.into_data().try_to_vec().unwrap());
        }
    }
}

/// Features, then gradients of all weights.
fn pass(backbone: &Backbone, images: &TensorData, device: &Device, mode: Normalise) -> Vec<Vec<f32>> {
    let features: Tensor<1> = match backbone.forward(Tensor::from_data(images.clone(), device), mode) {
        Features::Map(map) => map.flatten(0, 3),
        Features::Tokens(tokens) => tokens.flatten(0, 2),
    };
    // Some probe, so that gradients do not cancel.
    let [count] = features.dims();
    let probe: Vec<f32> = (0..count).map(|i| (i % 7) as f32 - 2.5).collect();
    let probe = Tensor::<1>::from_data(TensorData::new(probe, [count]), device);
    let gradients = (features.clone() * probe).sum().backward();
    let gradients = GradientsParams::from_grads(gradients, backbone);
    let mut visitor =
        Visitor { gradients: &gradients, found: vec![features.into_data().try_to_vec().unwrap()] };
    backbone.visit(&mut visitor);
    visitor.found
}

/// By the norm of the difference, relative to that of the values.
fn assert_close(what: &str, got: &[f32], want: &[f32], most: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(got - want)));
    let size = norm(&mut want.iter().map(|&want| f64::from(want)));
    assert!(off <= most * size.max(1e-6), "{what}: off by {off}, norm {size}");
}

#[test]
fn networks_and_their_gradients() {
    let (cpu, gpu) = (Device::flex().autodiff(), Device::cpu().autodiff());
    for (backbone, side) in [
        (BackboneKind::Residual, 13),
        (BackboneKind::EfficientNetLite0, 33),
        (BackboneKind::ResNet18, 33),
        (BackboneKind::ResNet50, 32),
        (BackboneKind::BnInception, 64),
        (BackboneKind::VitS16, 32),
    ] {
        let (width, depth) = if backbone == BackboneKind::Residual { (8, 1) } else { (0, 0) };
        let pooling = backbone.pooling();
        let shape =
            NetworkShape { backbone, pooling, width, depth, embedding_dim: 8, head: HeadKind::Linear };
        cpu.seed(7);
        let network = EmbeddingNetwork::new(&shape, &cpu);
        let count = 4 * 3 * side * side;
        let images = (0..count).map(|i| ((i * 7919) % 1013) as f32 / 506.0 - 1.0).collect::<Vec<f32>>();
        let images = TensorData::new(images, [4, 3, side, side]);
        let modes = [Normalise::Batch, Normalise::Affine];
        let want = modes.map(|mode| pass(&network.backbone, &images, &cpu, mode));
        let network = network.fork(&gpu);
        for (mode, want) in modes.into_iter().zip(want) {
            let got = pass(&network.backbone, &images, &gpu, mode);
            assert_eq!(want.len(), got.len());
            for (part, (want, got)) in want.iter().zip(&got).enumerate() {
                assert_close(&format!("{}, {mode:?}, part {part}", backbone.name()), got, want, 2e-3);
            }
        }
    }
}

#[cfg(feature = "emulated")]
#[test]
fn losses_of_a_run() {
    let place = tempfile::tempdir().unwrap();
    for (name, flags) in [("default", &[][..]), ("lite0", &["--backbone", "efficientnet-lite0"][..])] {
        let losses = |device: &str| -> Vec<f64> {
            let run = place.path().join(format!("{name}-{device}"));
            let mut command = small_run(&run, 4);
            command.args(["--device", device]).args(flags).assert().success();
            records(&run).0.iter().map(|step| f64::from(step.loss)).collect()
        };
        let (want, got) = (losses("cpu"), losses("emulated"));
        assert_eq!(want.len(), 4);
        for (step, (want, got)) in want.iter().zip(&got).enumerate() {
            assert!((want - got).abs() <= 1e-2 * want, "{name}, step {step}: {got}, on the CPU {want}");
        }
    }
}
