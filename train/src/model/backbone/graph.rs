//! Convolutional networks as lists of steps.
//!
//! A [`Builder`] lists the steps of a network and, for each convolution, its tensor names in published files.
//! [`Graph`] executes the list; autodiff computes the gradients.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

use crate::model::batch_norm::{Activation, BatchNorm, NormOptions, Normalise};
use crate::model::layers::{self, ConvolutionOptions, PoolOptions};

/// Zeros around the input of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Padding {
    /// The same number on all sides.
    Even(usize),
    /// As TensorFlow pads ("SAME"): the output has `ceil(side / stride)` positions; an odd number has one
    /// zero more at the end.
    TensorFlow,
}

impl Padding {
    /// Number of zeros before and after `side` values.
    fn around(self, side: usize, kernel: usize, stride: usize) -> [usize; 2] {
        match self {
            Self::Even(padding) => [padding, padding],
            Self::TensorFlow => {
                let reach = (side.div_ceil(stride) - 1) * stride + kernel;
                let total = reach.saturating_sub(side);
                [total / 2, total - total / 2]
            }
        }
    }
}

/// A convolution with batch normalisation and an activation.
#[derive(Module, Debug)]
pub struct Unit {
    weight: Param<Tensor<4>>,
    bias: Option<Param<Tensor<1>>>,
    norm: BatchNorm,
    stride: usize,
    depthwise: bool,
    #[module(skip)]
    padding: Padding,
}

impl Unit {
    fn forward(&self, input: Tensor<4>, mode: Normalise) -> Tensor<4> {
        let [_, _, height, width] = input.dims();
        let [_, _, kernel, _] = self.weight.shape().dims();
        let around = |side| self.padding.around(side, kernel, self.stride);
        let options = ConvolutionOptions {
            stride: self.stride,
            padding: [around(height), around(width)],
            depthwise: self.depthwise,
        };
        let output = layers::convolution(input, self.weight.val(), options);
        self.norm.forward_biased(output, self.bias.as_ref().map(Param::val), mode)
    }
}

/// The result of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Value {
    index: usize,
    /// Channels of the result.
    pub channels: usize,
}

#[derive(Debug, Clone)]
enum Step {
    /// Unit number `unit`, applied to result `input`.
    Unit { unit: usize, input: usize },
    /// The sum of two results.
    Add { terms: [usize; 2], relu: bool },
    /// A pooling with windows of 3 x 3.
    Pool { pool: Pool, input: usize },
    /// Concatenates results along the channels.
    Concat { inputs: Vec<usize> },
}

/// A pooling with windows of 3 x 3.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pool {
    /// The maximum of each window.
    Max(PoolOptions),
    /// The average with stride 1 and padding 1; zeros of the padding count.
    Average,
}

impl Pool {
    /// Side of the output for an input of side `side`.
    fn side(self, side: usize) -> usize {
        match self {
            Self::Max(options) => options.side(side),
            Self::Average => side,
        }
    }

    fn forward(self, input: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Max(options) => layers::max_pool(input, options),
            Self::Average => {
                // PERF: on the CPU the depthwise convolution takes a fraction of the time of Burn's average pooling.
                const SIDE: usize = PoolOptions::WINDOW;
                let shape = [input.dims()[1], 1, SIDE, SIDE];
                let weight = Tensor::full(shape, 1.0 / (SIDE * SIDE) as f32, &input.device());
                let options = ConvolutionOptions { depthwise: true, ..ConvolutionOptions::new(1, 1) };
                layers::convolution(input, weight, options)
            }
        }
    }
}

/// A network from images to a feature map.
#[derive(Module, Debug)]
pub struct Graph {
    units: Vec<Unit>,
    /// Result 0 is the images; result n is the output of step n - 1.
    #[module(skip)]
    steps: Vec<Step>,
    /// Names in files of each unit's convolution and normalisation.
    #[module(skip)]
    names: Vec<[String; 2]>,
    /// Whether files use PyTorch's names for the tensors of a normalisation.
    published: bool,
    features: usize,
}

impl Graph {
    /// Channels of the feature map.
    #[must_use]
    pub fn features(&self) -> usize {
        self.features
    }

    /// Images `[N, 3, H, W]` to a feature map, the result of the last step.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, mode: Normalise) -> Tensor<4> {
        let mut last_use = vec![0; self.steps.len() + 1];
        for (at, step) in self.steps.iter().enumerate() {
            step.inputs().iter().for_each(|&input| last_use[input] = at);
        }
        // Each result is dropped after its last use: without gradients, a chain of layers needs the memory of two.
        let mut results: Vec<Option<Tensor<4>>> = vec![Some(images)];
        for (at, step) in self.steps.iter().enumerate() {
            let mut take = |input: usize| {
                let result =
                    if last_use[input] == at { results[input].take() } else { results[input].clone() };
                result.expect("a step uses results of earlier steps, and each is kept up to its last use")
            };
            let result = match step {
                Step::Unit { unit, input } => self.units[*unit].forward(take(*input), mode),
                Step::Add { terms: [a, b], relu } => {
                    let (a, b) = (take(*a), take(*b));
                    if *relu { layers::add_relu(a, b) } else { a + b }
                }
                Step::Pool { pool, input } => pool.forward(take(*input)),
                Step::Concat { inputs } => Tensor::cat(inputs.iter().map(|&input| take(input)).collect(), 1),
            };
            results.push(Some(result));
        }
        results.pop().flatten().expect("the last result is there")
    }

    /// Channels and side of every result, for a square picture.
    fn results(&self, side: usize) -> Vec<[usize; 2]> {
        let mut results = vec![[3, side]];
        for step in &self.steps {
            let [channels, side] = results[step.inputs()[0]];
            results.push(match step {
                Step::Unit { unit, .. } => {
                    let Unit { weight, padding, stride, .. } = &self.units[*unit];
                    let [channels, _, kernel, _] = weight.shape().dims();
                    let [before, behind] = padding.around(side, kernel, *stride);
                    [channels, (before + side + behind - kernel) / stride + 1]
                }
                Step::Pool { pool, .. } => [channels, pool.side(side)],
                Step::Add { .. } => [channels, side],
                Step::Concat { inputs } => [inputs.iter().map(|&input| results[input][0]).sum(), side],
            });
        }
        results
    }

    /// Lower bound on the values in memory at once for a square picture: the largest sum of a step's inputs and output.
    pub(super) fn least_values(&self, side: usize) -> usize {
        let sizes: Vec<usize> =
            self.results(side).iter().map(|[channels, side]| channels * side * side).collect();
        let taken = |step: &Step| step.inputs().iter().map(|&input| sizes[input]).sum::<usize>();
        self.steps.iter().zip(&sizes[1..]).map(|(step, made)| taken(step) + made).max().unwrap_or(0)
    }

    /// Name in files of the tensor with Burn's path `path`, such as `units.N.weight` or `units.N.norm.gamma`.
    #[must_use]
    pub fn file_name(&self, path: &str) -> String {
        let known = || {
            let (number, tensor) = path.strip_prefix("units.")?.split_once('.')?;
            let [convolution, norm] = self.names.get(number.parse::<usize>().ok()?)?;
            Some(match tensor.strip_prefix("norm.") {
                Some(tensor) if self.published => format!("{norm}.{}", BatchNorm::file_name(tensor)),
                Some(tensor) => format!("{norm}.{tensor}"),
                None => format!("{convolution}.{tensor}"),
            })
        };
        known().unwrap_or_else(|| path.to_owned())
    }
}

impl Step {
    fn inputs(&self) -> &[usize] {
        match self {
            Self::Unit { input, .. } | Self::Pool { input, .. } => std::slice::from_ref(input),
            Self::Add { terms, .. } => terms,
            Self::Concat { inputs } => inputs,
        }
    }
}

/// Parameters of [`Builder::unit`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Convolution {
    pub channels: usize,
    pub kernel: usize,
    pub stride: usize,
    pub depthwise: bool,
    pub bias: bool,
    pub activation: Activation,
}

impl Convolution {
    /// A convolution of stride 1 with ReLU; `Builder::unit` applies the network's own activation in its place.
    pub fn new(channels: usize, kernel: usize) -> Self {
        Self { channels, kernel, stride: 1, depthwise: false, bias: false, activation: Activation::Relu }
    }
}

/// Builds a [`Graph`] step by step.
pub(super) struct Builder {
    graph: Graph,
    norm: NormOptions,
    tensorflow: bool,
    device: Device,
}

impl Builder {
    /// An empty network, and the images as its first value.
    pub fn new(norm: NormOptions, device: &Device) -> (Self, Value) {
        let graph =
            Graph { units: Vec::new(), steps: Vec::new(), names: Vec::new(), published: true, features: 0 };
        let images = Value { index: 0, channels: 3 };
        (Self { graph, norm, tensorflow: false, device: device.clone() }, images)
    }

    /// Pads convolutions as TensorFlow does.
    pub fn with_tensorflow_padding(mut self) -> Self {
        self.tensorflow = true;
        self
    }

    /// Uses [`BatchNorm`]'s own tensor names, for a network without published files.
    pub fn with_own_names(mut self) -> Self {
        self.graph.published = false;
        self
    }

    /// A convolution and its normalisation; `names` are their names in files.
    pub fn unit(&mut self, names: [String; 2], c: Convolution, input: Value) -> Value {
        let groups = if c.depthwise { input.channels } else { 1 };
        let (channels_in, area) = (input.channels / groups, c.kernel * c.kernel);
        let initializer = Initializer::KaimingNormal { gain: 2f64.sqrt(), fan_out_only: true };
        let fans = [channels_in * area, c.channels / groups * area];
        let shape = [c.channels, channels_in, c.kernel, c.kernel];
        let options = NormOptions { activation: c.activation, ..self.norm };
        self.graph.units.push(Unit {
            weight: initializer.init_with(shape, Some(fans[0]), Some(fans[1]), &self.device),
            bias: c.bias.then(|| Initializer::Zeros.init([c.channels], &self.device)),
            norm: BatchNorm::with_options(c.channels, options, &self.device),
            stride: c.stride,
            depthwise: c.depthwise,
            padding: if self.tensorflow { Padding::TensorFlow } else { Padding::Even(c.kernel / 2) },
        });
        self.graph.names.push(names);
        let unit = self.graph.units.len() - 1;
        self.step(Step::Unit { unit, input: input.index }, c.channels)
    }

    /// The sum of two results, with ReLU on request.
    pub fn add(&mut self, a: Value, b: Value, relu: bool) -> Value {
        self.step(Step::Add { terms: [a.index, b.index], relu }, a.channels)
    }

    /// A pooling with windows of 3 x 3.
    pub fn pool(&mut self, pool: Pool, input: Value) -> Value {
        self.step(Step::Pool { pool, input: input.index }, input.channels)
    }

    /// Concatenates results along the channels.
    pub fn concat(&mut self, inputs: &[Value]) -> Value {
        let channels = inputs.iter().map(|input| input.channels).sum();
        self.step(Step::Concat { inputs: inputs.iter().map(|input| input.index).collect() }, channels)
    }

    fn step(&mut self, step: Step, channels: usize) -> Value {
        self.graph.steps.push(step);
        Value { index: self.graph.steps.len(), channels }
    }

    /// The network whose feature map is `last`, the result of the last step.
    pub fn build(mut self, last: Value) -> Graph {
        self.graph.features = last.channels;
        self.graph
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensorflow_puts_the_odd_zero_behind() {
        let around = |side, kernel, stride| Padding::TensorFlow.around(side, kernel, stride);
        assert_eq!(around(96, 3, 2), [0, 1]);
        assert_eq!(around(97, 3, 2), [1, 1]);
        assert_eq!(around(96, 5, 2), [1, 2]);
        assert_eq!(around(7, 5, 1), [2, 2]);
        assert_eq!(around(1, 1, 2), [0, 0]);
        assert_eq!(Padding::Even(3).around(96, 7, 2), [3, 3]);
    }

    #[test]
    fn initial_weights_keep_the_scale_of_the_gradients() {
        let (mut builder, images) = Builder::new(NormOptions::new(Activation::Relu), &Device::flex());
        let names = || [String::new(), String::new()];
        let wide = builder.unit(names(), Convolution::new(64, 3), images);
        let depthwise = Convolution { depthwise: true, ..Convolution::new(64, 5) };
        let last = builder.unit(names(), depthwise, wide);
        // The values that each input reaches: 64 channels of 3 x 3, and one of 5 x 5.
        for (unit, reached) in builder.build(last).units.iter().zip([64 * 9, 25]) {
            let weights = crate::model::read(unit.weight.val()).unwrap();
            let square = weights.iter().map(|weight| weight * weight).sum::<f32>() / weights.len() as f32;
            let ratio = square * reached as f32 / 2.0;
            assert!((0.8..1.25).contains(&ratio), "{reached}: {ratio}");
        }
    }

    #[test]
    fn sizes_are_those_of_the_tensors() {
        let device = Device::flex();
        let [lite0, resnet18] =
            [super::super::efficientnet::lite0(&device), super::super::resnet::resnet18(&device)];
        for network in [&lite0, &resnet18, &super::super::bn_inception::bn_inception(&device)] {
            for side in [96, 97] {
                let map = network.forward(Tensor::zeros([1, 3, side, side], &device), Normalise::Running);
                let [_, channels, rows, _] = map.dims();
                assert_eq!(network.results(side).last(), Some(&[channels, rows]));
            }
        }
        // The largest operation: the pooling after the first convolution, or a residual sum.
        assert_eq!(resnet18.least_values(224), 64 * (112 * 112 + 56 * 56));
        assert_eq!(super::super::residual::small(8, 2, &device).least_values(48), 3 * 8 * 48 * 48);
    }
}
