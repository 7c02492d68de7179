//! The vision transformer ViT-S/16 (Dosovitskiy et al., 2021; Touvron et al., 2021). Names and layouts of the
//! weights are those of timm and DINO.

use burn::module::{Initializer, Module, Param};
use burn::tensor::activation::{gelu, softmax};
use burn::tensor::module::layer_norm;
use burn::tensor::{Device, Tensor, TensorData};

/// Side of a patch.
pub(super) const PATCH: usize = 16;

const CHANNELS: usize = 384;
const HEADS: usize = 6;
const DEPTH: usize = 12;
/// Ratio of the hidden width of a block's perceptron to CHANNELS.
const EXPANSION: usize = 4;
/// Patches along a side of the position table, which is for pictures of 224 pixels.
const GRID: usize = 14;
const EPSILON: f64 = 1e-6;
/// Standard deviation of the initial weights.
const DEVIATION: f64 = 0.02;

/// `y = x W^T + b`, with W `[out, in]` as in PyTorch.
#[derive(Module, Debug)]
struct Linear {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

impl Linear {
    fn new(channels_in: usize, channels_out: usize, device: &Device) -> Self {
        Self {
            weight: normal().init([channels_out, channels_in], device),
            bias: Initializer::Zeros.init([channels_out], device),
        }
    }

    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        let ([count, length, channels], [channels_out]) = (input.dims(), self.bias.dims());
        let rows = input.reshape([count * length, channels]).matmul(self.weight.val().transpose());
        (rows + self.bias.val().unsqueeze()).reshape([count, length, channels_out])
    }
}

fn normal() -> Initializer {
    Initializer::Normal { mean: 0.0, std: DEVIATION }
}

/// Normalises the channels of each token.
#[derive(Module, Debug)]
struct LayerNorm {
    weight: Param<Tensor<1>>,
    bias: Param<Tensor<1>>,
}

impl LayerNorm {
    fn new(device: &Device) -> Self {
        Self {
            weight: Initializer::Ones.init([CHANNELS], device),
            bias: Initializer::Zeros.init([CHANNELS], device),
        }
    }

    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        layer_norm(input, self.weight.val(), Some(self.bias.val()), EPSILON)
    }
}

/// Divides pictures into patches and maps each to a token.
#[derive(Module, Debug)]
struct PatchEmbed {
    proj: Projection,
}

/// A convolution whose stride is its kernel: a linear map of patches.
#[derive(Module, Debug)]
struct Projection {
    weight: Param<Tensor<4>>,
    bias: Param<Tensor<1>>,
}

impl PatchEmbed {
    fn new(device: &Device) -> Self {
        let weight = normal().init([CHANNELS, 3, PATCH, PATCH], device);
        Self { proj: Projection { weight, bias: Initializer::Zeros.init([CHANNELS], device) } }
    }

    /// `[N, 3, H, W]` to `[N, H / 16 * W / 16, C]`, row by row.
    fn forward(&self, images: Tensor<4>) -> Tensor<3> {
        let [count, channels, height, width] = images.dims();
        let (rows, columns, values) = (height / PATCH, width / PATCH, channels * PATCH * PATCH);
        let patches = images
            .reshape([count, channels, rows, PATCH, columns, PATCH])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([count * rows * columns, values]);
        let weight = self.proj.weight.val().reshape([CHANNELS, values]);
        let tokens = patches.matmul(weight.transpose()) + self.proj.bias.val().unsqueeze();
        tokens.reshape([count, rows * columns, CHANNELS])
    }
}

/// Self-attention of several heads.
#[derive(Module, Debug)]
struct Attention {
    qkv: Linear,
    proj: Linear,
}

impl Attention {
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        let [count, length, channels] = input.dims();
        let width = channels / HEADS;
        // [3, N, heads, T, width]
        let qkv = self.qkv.forward(input).reshape([count, length, 3, HEADS, width]).permute([2, 0, 3, 1, 4]);
        let part = |index: usize| {
            let part = qkv.clone().slice([index..index + 1, 0..count, 0..HEADS, 0..length, 0..width]);
            part.reshape([count, HEADS, length, width])
        };
        let (queries, keys, values) = (part(0), part(1), part(2));
        let scores = queries.mul_scalar((width as f32).sqrt().recip()).matmul(keys.transpose());
        let mixed = softmax(scores, 3).matmul(values).swap_dims(1, 2);
        self.proj.forward(mixed.reshape([count, length, channels]))
    }
}

/// The perceptron of a block.
#[derive(Module, Debug)]
struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

/// Attention and a perceptron, each with a normalised input and a shortcut.
#[derive(Module, Debug)]
struct Block {
    norm1: LayerNorm,
    attn: Attention,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(device: &Device) -> Self {
        let attn = Attention {
            qkv: Linear::new(CHANNELS, 3 * CHANNELS, device),
            proj: Linear::new(CHANNELS, CHANNELS, device),
        };
        let mlp = Mlp {
            fc1: Linear::new(CHANNELS, EXPANSION * CHANNELS, device),
            fc2: Linear::new(EXPANSION * CHANNELS, CHANNELS, device),
        };
        Self { norm1: LayerNorm::new(device), attn, norm2: LayerNorm::new(device), mlp }
    }

    fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        let tokens = tokens.clone() + self.attn.forward(self.norm1.forward(tokens));
        let inner = gelu(self.mlp.fc1.forward(self.norm2.forward(tokens.clone())));
        tokens + self.mlp.fc2.forward(inner)
    }
}

/// A network from images to tokens.
#[derive(Module, Debug)]
pub struct VisionTransformer {
    cls_token: Param<Tensor<3>>,
    /// Position embeddings of the class token, then of 14 x 14 patches.
    pos_embed: Param<Tensor<3>>,
    patch_embed: PatchEmbed,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl VisionTransformer {
    /// ViT-S/16 with random weights.
    #[must_use]
    pub fn small(device: &Device) -> Self {
        Self {
            cls_token: normal().init([1, 1, CHANNELS], device),
            pos_embed: normal().init([1, 1 + GRID * GRID, CHANNELS], device),
            patch_embed: PatchEmbed::new(device),
            blocks: (0..DEPTH).map(|_| Block::new(device)).collect(),
            norm: LayerNorm::new(device),
        }
    }

    /// Channels of a token.
    #[must_use]
    pub fn features(&self) -> usize {
        CHANNELS
    }

    /// Lower bound on the values in memory at once for one picture: its tokens and the hidden layer of a perceptron.
    pub(super) fn least_values(side: usize) -> usize {
        (1 + EXPANSION) * CHANNELS * (1 + (side / PATCH).pow(2))
    }

    /// Images `[N, 3, H, W]`, sides multiples of 16, to tokens `[N, 1 + H / 16 * W / 16, C]`.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>) -> Tensor<3> {
        let [count, _, height, width] = images.dims();
        let class = self.cls_token.val().expand([count, 1, CHANNELS]);
        let patches = self.patch_embed.forward(images);
        let mut tokens =
            Tensor::cat(vec![class, patches], 1) + self.positions([height / PATCH, width / PATCH]);
        for block in &self.blocks {
            tokens = block.forward(tokens);
        }
        self.norm.forward(tokens)
    }

    /// The position table for `rows` x `columns` patches, resized as timm does: bicubically, antialiased.
    fn positions(&self, [rows, columns]: [usize; 2]) -> Tensor<3> {
        let table = self.pos_embed.val();
        if [rows, columns] == [GRID, GRID] {
            return table;
        }
        let (old, new) = (GRID * GRID, rows * columns);
        let class = table.clone().slice([0..1, 0..1, 0..CHANNELS]);
        let patches = table.clone().slice([0..1, 1..1 + old, 0..CHANNELS]).reshape([old, CHANNELS]);
        let (down, across) = (bicubic(GRID, rows), bicubic(GRID, columns));
        let weights: Vec<f32> = (0..new * old)
            .map(|at| {
                let (to, from) = (at / old, at % old);
                (down[to / columns][from / GRID] * across[to % columns][from % GRID]) as f32
            })
            .collect();
        let weights = Tensor::<2>::from_data(TensorData::new(weights, [new, old]), &table.device());
        let resized = weights.matmul(patches).reshape([1, new, CHANNELS]);
        Tensor::cat(vec![class, resized], 1)
    }
}

/// Weights of `old` values in each of `new` values: cubic convolution (a = -0.5), stretched if `new` is smaller.
fn bicubic(old: usize, new: usize) -> Vec<Vec<f64>> {
    let cubic = |x: f64| match x.abs() {
        x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        x if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
        _ => 0.0,
    };
    let scale = old as f64 / new as f64;
    let stretch = scale.max(1.0);
    let row = |to: usize| {
        let centre = scale * (to as f64 + 0.5);
        let weights: Vec<f64> = (0..old).map(|from| cubic((from as f64 + 0.5 - centre) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    };
    (0..new).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_the_same_size_is_left_alone_and_weights_sum_to_one() {
        for (to, row) in bicubic(5, 5).iter().enumerate() {
            let want = |from| if from == to { 1.0 } else { 0.0 };
            assert!(
                row.iter().enumerate().all(|(from, &weight)| (weight - want(from)).abs() < 1e-12),
                "{row:?}"
            );
        }
        for new in [1, 6, 14, 20] {
            for row in bicubic(14, new) {
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            }
        }
    }
}
