//! The operations on Burn's CPU backend. All tensors are f32.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{Shape, TensorData};

use super::geometry::Geometry;
use super::normalisation::{self, Normalisation, Planes};
use super::pooling::MaxPool;
use super::{ConvolutionOptions, LayerGradients, LayerOps, NormaliseInputs, NormaliseOptions, PoolOptions};
use super::{convolution, depthwise, matrix, weight_gradient};

type CpuTensor = FloatTensor<Flex>;

/// A tensor's values in row-major order.
struct Values(CpuTensor);

impl Values {
    fn new(tensor: CpuTensor) -> Self {
        Self(tensor.to_contiguous())
    }

    fn get(&self) -> &[f32] {
        let from = self.0.layout().start_offset();
        &self.0.storage::<f32>()[from..from + self.0.shape().num_elements()]
    }
}

fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> CpuTensor {
    CpuTensor::from_data(TensorData::new(values, shape))
}

fn geometry(input: &Shape, weight: &Shape, options: ConvolutionOptions) -> Geometry {
    Geometry {
        images: input[0],
        channels_in: input[1],
        channels_out: weight[0],
        input: [input[2], input[3]],
        kernel: weight[2],
        stride: options.stride,
        padding: options.padding,
    }
}

type Pass = fn(&Geometry, &[f32], &[f32]) -> Vec<f32>;
type DepthwisePass = fn(&Geometry, usize, &[f32], &[f32]) -> Vec<f32>;

/// Runs one pass of a convolution on two tensors' values: depthwise, as a matrix product where that pays, or direct.
fn pass(
    g: &Geometry,
    is_depthwise: bool,
    (depthwise, product, direct): (DepthwisePass, Pass, Pass),
    [a, b]: [&[f32]; 2],
) -> Vec<f32> {
    if is_depthwise {
        let plane = Geometry { images: 1, channels_in: 1, channels_out: 1, ..*g };
        depthwise(&plane, g.channels_in, a, b)
    } else if matrix::fits(g) {
        product(g, a, b)
    } else {
        direct(g, a, b)
    }
}

fn planes(input: &Shape) -> Planes {
    Planes { channels: input[1], area: input[2] * input[3] }
}

/// Values and options of a normalisation.
struct Inputs {
    shape: Shape,
    input: Values,
    statistics: Values,
    gamma: Values,
    beta: Values,
    options: NormaliseOptions,
}

impl Inputs {
    fn new(tensors: NormaliseInputs<Flex>, options: NormaliseOptions) -> Self {
        let shape = tensors[0].shape();
        let [input, statistics, gamma, beta] = tensors.map(Values::new);
        Self { shape, input, statistics, gamma, beta, options }
    }

    fn planes(&self) -> Planes {
        planes(&self.shape)
    }

    fn settings(&self) -> Normalisation<'_> {
        let (mean, variance) = self.statistics.get().split_at(self.gamma.get().len());
        let NormaliseOptions { epsilon, activation, from_batch } = self.options;
        Normalisation {
            mean,
            variance,
            gamma: self.gamma.get(),
            beta: self.beta.get(),
            epsilon,
            activation,
            from_batch,
        }
    }
}

impl LayerOps for Flex {
    fn convolution(input: CpuTensor, weight: CpuTensor, options: ConvolutionOptions) -> CpuTensor {
        let g = geometry(&input.shape(), &weight.shape(), options);
        let (input, weight) = (Values::new(input), Values::new(weight));
        let passes: (DepthwisePass, Pass, Pass) = (depthwise::forward, matrix::forward, convolution::forward);
        let values = pass(&g, options.depthwise, passes, [input.get(), weight.get()]);
        let [height, width] = g.output();
        tensor(values, [g.images, g.channels_out, height, width])
    }

    fn batch_statistics(input: CpuTensor) -> CpuTensor {
        let planes = planes(&input.shape());
        tensor(normalisation::statistics(planes, Values::new(input).get()), [2, planes.channels])
    }

    fn normalise(
        input: CpuTensor,
        statistics: CpuTensor,
        gamma: CpuTensor,
        beta: CpuTensor,
        options: NormaliseOptions,
    ) -> CpuTensor {
        let inputs = Inputs::new([input, statistics, gamma, beta], options);
        let values = normalisation::forward(inputs.planes(), inputs.input.get(), &inputs.settings());
        tensor(values, inputs.shape)
    }

    fn add_relu(a: CpuTensor, b: CpuTensor) -> CpuTensor {
        let shape = a.shape();
        tensor(normalisation::add_relu(Values::new(a).get(), Values::new(b).get()), shape)
    }

    fn max_pool(input: CpuTensor, options: PoolOptions) -> CpuTensor {
        let [images, channels, height, width] = input.shape().dims();
        let pool = MaxPool::new([height, width], options);
        let [height, width] = pool.output();
        tensor(pool.forward(Values::new(input).get()), [images, channels, height, width])
    }
}

impl LayerGradients for Flex {
    fn convolution_input_gradient(
        input: CpuTensor,
        weight: CpuTensor,
        output_gradient: CpuTensor,
        options: ConvolutionOptions,
    ) -> CpuTensor {
        let shape = input.shape();
        let g = geometry(&shape, &weight.shape(), options);
        let (gradient, weight) = (Values::new(output_gradient), Values::new(weight));
        let passes: (DepthwisePass, Pass, Pass) =
            (depthwise::input_gradient, matrix::input_gradient, convolution::input_gradient);
        let values = pass(&g, options.depthwise, passes, [gradient.get(), weight.get()]);
        tensor(values, shape)
    }

    fn convolution_weight_gradient(
        input: CpuTensor,
        weight: CpuTensor,
        output_gradient: CpuTensor,
        options: ConvolutionOptions,
    ) -> CpuTensor {
        let g = geometry(&input.shape(), &weight.shape(), options);
        let (input, gradient) = (Values::new(input), Values::new(output_gradient));
        let passes: (DepthwisePass, Pass, Pass) =
            (depthwise::weight_gradient, weight_gradient::weight_gradient, weight_gradient::weight_gradient);
        let values = pass(&g, options.depthwise, passes, [input.get(), gradient.get()]);
        tensor(values, weight.shape())
    }

    fn normalise_parameter_gradient(
        inputs: NormaliseInputs<Self>,
        output_gradient: CpuTensor,
        options: NormaliseOptions,
    ) -> CpuTensor {
        let (inputs, gradient) = (Inputs::new(inputs, options), Values::new(output_gradient));
        let (planes, input) = (inputs.planes(), inputs.input.get());
        let values = normalisation::parameter_gradient(planes, input, gradient.get(), &inputs.settings());
        tensor(values, [2, planes.channels])
    }

    fn normalise_input_gradient(
        inputs: NormaliseInputs<Self>,
        output_gradient: CpuTensor,
        parameter_gradient: CpuTensor,
        options: NormaliseOptions,
    ) -> CpuTensor {
        let inputs = Inputs::new(inputs, options);
        let [gradient, parameter_gradient] = [output_gradient, parameter_gradient].map(Values::new);
        let values = normalisation::input_gradient(
            inputs.planes(),
            inputs.input.get(),
            gradient.get(),
            parameter_gradient.get(),
            &inputs.settings(),
        );
        tensor(values, inputs.shape)
    }

    fn add_relu_gradient(output: CpuTensor, output_gradient: CpuTensor) -> CpuTensor {
        let shape = output.shape();
        let (output, gradient) = (Values::new(output), Values::new(output_gradient));
        tensor(normalisation::add_relu_gradient(output.get(), gradient.get()), shape)
    }

    fn max_pool_gradient(
        input: CpuTensor,
        output: CpuTensor,
        output_gradient: CpuTensor,
        options: PoolOptions,
    ) -> CpuTensor {
        let shape = input.shape();
        let [input, output, gradient] = [input, output, output_gradient].map(Values::new);
        let pool = MaxPool::new([shape[2], shape[3]], options);
        tensor(pool.gradient(input.get(), output.get(), gradient.get()), shape)
    }
}
