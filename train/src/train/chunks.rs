//! A large batch goes through the network in chunks, with one loss over the whole batch (GradCache; Gao et al., 2021).
//!
//! First all chunks are embedded, without keeping activations; then the loss is evaluated once over all embeddings; then each
//! chunk has another forward pass, and a backward pass from its rows of dL/dE. So memory is that of a chunk, and the gradient
//! that of the whole batch, except that BatchNorm normalises each chunk by itself, in both passes.

use std::ops::Range;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array2, s};

use crate::data::ImageBatch;
use crate::model::{EmbeddingNetwork, Normalise, backward};

/// Divides a batch of `rows` rows into chunks of `size`; 0 is one chunk.
fn chunks(rows: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let size = if size == 0 { rows } else { size }.max(1);
    (0..rows).step_by(size).map(move |start| start..(start + size).min(rows))
}

/// Features of the rank's own pictures of a batch, `[own, F]`, computed in chunks of `size` on `device`
/// without autodiff. Running statistics are not updated.
pub fn features(
    network: &EmbeddingNetwork,
    batch: &ImageBatch,
    size: usize,
    mode: Normalise,
    device: &Device,
) -> Tensor<2> {
    let (network, device) = (network.valid(), device.clone().inner());
    let mode = mode.without_moving();
    let chunks = chunks(batch.own.len(), size);
    Tensor::cat(chunks.map(|rows| network.features(images(batch, rows, &device), mode)).collect(), 0)
}

/// Gradients of the weights of `network` from `gradient` = dL/dE of the rank's own pictures, in chunks of `size`.
pub fn gradients(
    network: &EmbeddingNetwork,
    batch: &ImageBatch,
    gradient: &Array2<f32>,
    size: usize,
    mode: Normalise,
    device: &Device,
) -> GradientsParams {
    let mut sum = GradientsAccumulator::new();
    for rows in chunks(batch.own.len(), size) {
        let embeddings = network.forward(images(batch, rows.clone(), device), mode);
        let gradient = gradient.slice(s![rows, ..]).to_owned();
        sum.accumulate(network, backward(embeddings, &gradient, network));
    }
    sum.grads()
}

/// The pictures `rows` of the rank's own ones, `[rows, 3, S, S]`.
pub(super) fn images(batch: &ImageBatch, rows: Range<usize>, device: &Device) -> Tensor<4> {
    let side = batch.image_size;
    let picture = 3 * side * side;
    let pixels = batch.pixels[rows.start * picture..rows.end * picture].to_vec();
    Tensor::from_data(TensorData::new(pixels, [rows.len(), 3, side, side]), device)
}
