//! Virtual step of the whole network, and the tangent of the embeddings by a central difference.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::Tensor;
use ndarray::Array2;

use super::{VirtualStep, VirtualStepKind};
use crate::Result;
use crate::model::{EmbeddingNetwork, Normalise, backward, ranks::sum_gradients, read, to_array};
use crate::ranks::Collective;

/// Distance that the weights move to either side for the central difference: small enough for the network to
/// be nearly linear, large enough for f32 to resolve the difference.
const DIFFERENCE: f64 = 3e-3;

/// The tangent of a training batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Tangent {
    /// edot, `[B, D]`.
    pub tangent: Array2<f32>,
    /// Factor of the sums of the threshold pass that gives dL^m/dlambda.
    pub factor: f64,
}

/// Takes the virtual step, evaluates the meta gradient there, and returns the tangent of `images` along it (SPEC 5).
///
/// `gradients` are those of the training loss, computed in `mode`; `meta_gradient` maps embeddings of `meta_images` to
/// dL^m/dE. Running statistics are not updated. `None` if the training or the meta batch has no mined pair. Each of the
/// `ranks` has its own images, embeddings and tangent; all have the same gradients.
///
/// # Errors
/// Errors of `meta_gradient` and of the ranks.
pub fn tangent(
    (network, mode): (&EmbeddingNetwork, Normalise),
    gradients: &GradientsParams,
    step: VirtualStep,
    images: Tensor<4>,
    meta_images: Tensor<4>,
    meta_gradient: &mut dyn FnMut(Array2<f32>) -> Result<Array2<f32>>,
    ranks: &dyn Collective,
) -> Result<Option<Tangent>> {
    let mode = mode.without_moving();
    let length = dot(network, gradients, gradients)?.sqrt();
    if length == 0.0 {
        return Ok(None);
    }
    let rate = match step.kind {
        VirtualStepKind::Plain => step.rate,
        VirtualStepKind::Unit => step.rate / length,
    };
    let virtual_network = moved(network, -rate, gradients);
    let embeddings = virtual_network.forward(meta_images, mode);
    let gradient = meta_gradient(to_array(embeddings.clone())?)?;
    let mut direction = sum_gradients(ranks, network, backward(embeddings, &gradient, &virtual_network))?;
    if step.kind == VirtualStepKind::Unit {
        let along = dot(network, &direction, gradients)? / (length * length);
        direction = combined(network, &direction, -along, gradients);
    }
    let direction_length = dot(network, &direction, &direction)?.sqrt();
    if direction_length == 0.0 {
        return Ok(None);
    }
    let distance = DIFFERENCE / direction_length;
    let at = |factor: f64| -> Result<Array2<f32>> {
        let moved = moved(network, factor, &direction);
        to_array(moved.valid().forward(images.clone(), mode))
    };
    let difference = at(distance)? - at(-distance)?;
    let scale = (0.5 / distance) as f32;
    Ok(Some(Tangent { tangent: difference * scale, factor: -rate }))
}

/// The network with `factor` times `direction` added to its weights.
fn moved(network: &EmbeddingNetwork, factor: f64, direction: &GradientsParams) -> EmbeddingNetwork {
    let direction = combined(network, direction, 0.0, direction);
    SgdConfig::new().init().step(-factor, network.clone(), direction)
}

/// `a + factor * b`.
fn combined(
    network: &EmbeddingNetwork,
    a: &GradientsParams,
    factor: f64,
    b: &GradientsParams,
) -> GradientsParams {
    struct Combine<'a> {
        a: &'a GradientsParams,
        b: &'a GradientsParams,
        factor: f64,
        sum: GradientsParams,
    }
    impl ModuleVisitor for Combine<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(a) = self.a.get::<D>(param.id) else { return };
            let sum = match self.b.get::<D>(param.id) {
                Some(b) if self.factor != 0.0 => a + b.mul_scalar(self.factor),
                _ => a,
            };
            self.sum.register(param.id, sum);
        }
    }
    let mut combine = Combine { a, b, factor, sum: GradientsParams::new() };
    network.visit(&mut combine);
    combine.sum
}

/// Sum of the products of all entries.
fn dot(network: &EmbeddingNetwork, a: &GradientsParams, b: &GradientsParams) -> Result<f64> {
    struct Dot<'a> {
        a: &'a GradientsParams,
        b: &'a GradientsParams,
        sums: Vec<Tensor<1>>,
    }
    impl ModuleVisitor for Dot<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let (Some(a), Some(b)) = (self.a.get::<D>(param.id), self.b.get::<D>(param.id)) {
                self.sums.push((a * b).sum());
            }
        }
    }
    let mut dot = Dot { a, b, sums: Vec::new() };
    network.visit(&mut dot);
    let mut total = 0.0;
    for sum in dot.sums {
        total += read(sum)?.into_iter().map(f64::from).sum::<f64>();
    }
    Ok(total)
}
