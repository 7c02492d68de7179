//! Training code that the examples share: a step along dL/dE, and embedding in parts.

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::tensor::Tensor;
use ddtas_train::model::backward;
use ndarray::{Array2, Axis, concatenate};

/// Updates the weights by the optimizer, from `gradient` = dL/dE of `embeddings`.
pub fn descend<M: Module>(
    network: M,
    optimizer: &mut ModuleOptimizer,
    embeddings: Tensor<2>,
    gradient: &Array2<f32>,
    rate: f64,
) -> M {
    let gradients = backward(embeddings, gradient, &network);
    optimizer.step(rate, network, gradients)
}

/// Learning rate of a step: it falls to a tenth of the first one along half a cosine.
pub fn learning_rate(first: f64, step: usize, steps: usize) -> f64 {
    let progress = step as f64 / steps as f64;
    first * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * progress).cos()))
}

/// Concatenates the embeddings of several batches.
///
/// # Errors
/// The first error among the parts.
pub fn together(
    parts: impl Iterator<Item = ddtas_train::Result<Array2<f32>>>,
) -> ddtas_train::Result<Array2<f32>> {
    let parts = parts.collect::<ddtas_train::Result<Vec<_>>>()?;
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    concatenate(Axis(0), &views)
        .map_err(|error| ddtas_train::Error::Training(format!("embeddings of two sizes: {error}")))
}
