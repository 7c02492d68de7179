//! A large batch in chunks through the network, its loss over the whole of it (GradCache; Gao et al., 2021).
//!
//! The embeddings of all chunks come first, without what a backward pass needs; then the loss, once over all of them; then
//! each chunk goes forward again, and back from its rows of dL/dE. So memory is a chunk's, and the gradient is the whole
//! batch's, except that BatchNorm sees a chunk at a time: the same one in both passes.

use std::ops::Range;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array2, s};

use crate::data::ImageBatch;
use crate::model::{EmbeddingNetwork, Normalise, backward};

/// Rows of a batch of `rows` that go through the network together; `size` 0 is all of them.
fn chunks(rows: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let size = if size == 0 { rows } else { size }.max(1);
    (0..rows).step_by(size).map(move |start| start..(start + size).min(rows))
}

/// Features `[B, F]` of the rank's own pictures of a batch, `size` at a time, on `device` without autodiff. Running statistics
/// stay as they are.
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

/// Gradients of the weights of `network` from dL/dE of the rank's own pictures of a batch, `size` at a time.
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

/// Some of the rank's own pictures of a batch, `[rows, 3, S, S]`.
pub(super) fn images(batch: &ImageBatch, rows: Range<usize>, device: &Device) -> Tensor<4> {
    let side = batch.image_size;
    let picture = 3 * side * side;
    let pixels = batch.pixels[rows.start * picture..rows.end * picture].to_vec();
    Tensor::from_data(TensorData::new(pixels, [rows.len(), 3, side, side]), device)
}
