//! What the examples train alike: a step along dL/dE, and embeddings part by part.

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array2, Axis, concatenate};

/// Moves the weights along `gradient`, dL/dE of `embeddings`.
pub fn descend<M: Module>(
    network: M,
    optimizer: &mut ModuleOptimizer,
    embeddings: Tensor<2>,
    gradient: &Array2<f32>,
    rate: f64,
    device: &Device,
) -> M {
    let shape = [gradient.nrows(), gradient.ncols()];
    let gradient = TensorData::new(gradient.iter().copied().collect::<Vec<f32>>(), shape);
    let surrogate = (embeddings * Tensor::<2>::from_data(gradient, device)).sum();
    let gradients = GradientsParams::from_grads(surrogate.backward(), &network);
    optimizer.step(rate, network, gradients)
}

/// Learning rate of a step: it falls to a tenth of the first one along half a cosine.
pub fn learning_rate(first: f64, step: usize, steps: usize) -> f64 {
    let progress = step as f64 / steps as f64;
    first * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * progress).cos()))
}

/// Embeddings of several batches in one.
///
/// # Errors
/// The first of the parts'.
pub fn together(
    parts: impl Iterator<Item = ddtas_train::Result<Array2<f32>>>,
) -> ddtas_train::Result<Array2<f32>> {
    let parts = parts.collect::<ddtas_train::Result<Vec<_>>>()?;
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    concatenate(Axis(0), &views)
        .map_err(|error| ddtas_train::Error::Training(format!("embeddings of two sizes: {error}")))
}
