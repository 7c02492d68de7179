//! Whole networks on the GPU backend's kernels, compiled for the CPU: features, gradients and losses of a run
//! agree with the CPU backend's.
#![cfg(feature = "train-emulated")]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use ddtas_train::arguments::name_of;
use ddtas_train::model::{
    Backbone, BackboneKind, EmbeddingNetwork, Features, HeadKind, NetworkShape, Normalise,
};
#[cfg(feature = "emulated")]
use runs::{folder_of_pictures, records, small_run};

/// Most drawings of pictures that are tried for a network.
const PICTURES: usize = 8;

/// Collects the gradients of all weights, in the module's order.
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

/// The features, then the gradients of all weights.
fn pass(backbone: &Backbone, images: &TensorData, device: &Device, mode: Normalise) -> Vec<Vec<f32>> {
    let features: Tensor<1> = match backbone.forward(Tensor::from_data(images.clone(), device), mode) {
        Features::Map(map) => map.flatten(0, 3),
        Features::Tokens(tokens) => tokens.flatten(0, 2),
    };
    // A probe with different entries, so that gradients do not cancel.
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

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    norm(a.iter().zip(b).map(|(a, b)| f64::from(a - b)))
}

/// The first difference between both backends' passes of drawn pictures, which `first` chooses.
fn compare(backbone: BackboneKind, side: usize, first: usize) -> Result<(), String> {
    let (cpu, gpu) = (Device::flex().autodiff(), Device::cpu().autodiff());
    let (width, depth) = if backbone == BackboneKind::Residual { (8, 1) } else { (0, 0) };
    let pooling = backbone.pooling();
    let shape = NetworkShape { backbone, pooling, width, depth, embedding_dim: 8, head: HeadKind::Linear };
    cpu.seed(7);
    let network = EmbeddingNetwork::new(&shape, &cpu);
    let count = 4 * 3 * side * side;
    let images = (0..count).map(|i| ((i * 7919 + first) % 1013) as f32 / 506.0 - 1.0).collect::<Vec<f32>>();
    // The effect of rounding is measured on the CPU, with pictures that differ in their last bits.
    let nudged = images.iter().enumerate().map(|(i, x)| x * if i % 2 == 0 { 1.0 + 2e-7 } else { 1.0 - 2e-7 });
    let nudged = TensorData::new(nudged.collect::<Vec<f32>>(), [4, 3, side, side]);
    let images = TensorData::new(images, [4, 3, side, side]);
    let modes = [Normalise::Batch, Normalise::Affine];
    let on_cpu = |images| modes.map(|mode| pass(&network.backbone, images, &cpu, mode));
    let (want, other) = (on_cpu(&images), on_cpu(&nudged));
    let network = network.fork(&gpu);
    for ((mode, want), other) in modes.into_iter().zip(want).zip(other) {
        let got = pass(&network.backbone, &images, &gpu, mode);
        assert_eq!(want.len(), got.len());
        for (part, ((want, got), other)) in want.iter().zip(&got).zip(&other).enumerate() {
            let (off, rounding) = (difference(got, want), difference(other, want));
            let size = norm(want.iter().map(|&want| f64::from(want)));
            if off > 1e-4 * size.max(1e-2) + 10.0 * rounding {
                let found = format!("{off}, by rounding {rounding}, norm {size}");
                return Err(format!("pictures {first}, {mode:?}, part {part}: {found}"));
            }
        }
    }
    Ok(())
}

#[test]
fn networks_and_their_gradients() {
    // No transformer: its only layer of ours, a convolution, is in `tests/emulated_layers.rs`.
    for (backbone, side) in [
        (BackboneKind::Residual, 13),
        (BackboneKind::EfficientnetLite0, 33),
        (BackboneKind::Resnet18, 33),
        (BackboneKind::Resnet50, 32),
        (BackboneKind::BnInception, 64),
    ] {
        // Where a ReLU's input is 0 but for rounding, only one backend may pass a gradient, which changes all
        // earlier layers. Other pictures are free of that; a fault is in all of them.
        let mut differences = Vec::new();
        let agrees = (0..PICTURES).any(|first| match compare(backbone, side, first) {
            Ok(()) => true,
            Err(difference) => {
                differences.push(difference);
                false
            }
        });
        assert!(agrees, "{}: {differences:#?}", name_of(&backbone));
    }
}

#[cfg(feature = "emulated")]
#[test]
fn losses_of_a_run() {
    let place = tempfile::tempdir().unwrap();
    // Few pictures, since the evaluations at both ends run on the emulated device too.
    let data = place.path().join("data");
    folder_of_pictures(&data, 16, 4);
    let losses = |device: &str| -> Vec<f64> {
        let run = place.path().join(device);
        let mut command = small_run(&run, 4);
        command.args(["--device", device, "--dataset", "folder", "--data-root"]).arg(&data);
        command.assert().success();
        records(&run).0.iter().map(|step| f64::from(step.loss)).collect()
    };
    let (want, got) = (losses("cpu"), losses("emulated"));
    assert_eq!((want.len(), got.len()), (4, 4));
    for (step, (want, got)) in want.iter().zip(&got).enumerate() {
        assert!((want - got).abs() <= 1e-4 * want, "step {step}: {got}, on the CPU {want}");
    }
}
