//! Embeds regions: the backbone processes whole scenes, its features are averaged over each proposal, and the
//! embedding head of the training engine follows.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use ddtas_train::model::{EmbeddingHead, Normalise};

use crate::backbone::{Backbone, WIDTH};
use crate::street::{PROPOSALS, Region, SIDE, Scene};

/// A network from scenes to unit embeddings of their proposals.
#[derive(Module, Debug)]
pub struct RegionNetwork {
    backbone: Backbone,
    head: EmbeddingHead,
}

impl RegionNetwork {
    /// A network with random weights, drawn from the device's generator.
    pub fn new(dim: usize, device: &Device) -> Self {
        Self { backbone: Backbone::new(device), head: EmbeddingHead::new(WIDTH, dim, device) }
    }

    /// Embeddings of all proposals, `[N * PROPOSALS, dim]`, scene by scene.
    pub fn forward(&self, scenes: &[Scene], device: &Device, mode: Normalise) -> Tensor<2> {
        let values: Vec<f32> =
            scenes.iter().flat_map(|scene| scene.pixels.iter().map(|v| 2.0 * v - 1.0)).collect();
        let pictures = Tensor::from_data(TensorData::new(values, [scenes.len(), 3, SIDE, SIDE]), device);
        let features = self.backbone.forward(pictures, mode);
        let weights: Vec<f32> = scenes
            .iter()
            .flat_map(|scene| scene.proposals.iter().flat_map(|(region, _)| mean_over(region)))
            .collect();
        let shape = [scenes.len(), PROPOSALS, SIDE * SIDE];
        let means = Tensor::<3>::from_data(TensorData::new(weights, shape), device).matmul(features);
        self.head.forward(means.reshape([scenes.len() * PROPOSALS, WIDTH]))
    }
}

/// Weights of all pixels of a scene for the mean over a region.
pub fn mean_over(region: &Region) -> Vec<f32> {
    let [columns, rows] = [region.x, region.y].map(|[from, to]| from..to);
    let share = 1.0 / (columns.len() * rows.len()) as f32;
    let weight = |at: usize| {
        let inside = columns.contains(&(at % SIDE)) && rows.contains(&(at / SIDE));
        if inside { share } else { 0.0 }
    };
    (0..SIDE * SIDE).map(weight).collect()
}
