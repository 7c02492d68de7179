//! The operations under autodiff: forward on the inner backend, gradients by [`LayerGradients`].

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};

use super::{ConvolutionOptions, LayerGradients, LayerOps, NormaliseInputs, NormaliseOptions, PoolOptions};
use crate::model::synchronised;

#[derive(Debug)]
struct Convolution;

impl<B: LayerGradients> Backward<B, 2> for Convolution {
    type State = (FloatTensor<B>, FloatTensor<B>, ConvolutionOptions);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [input_node, weight_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let (input, weight, options) = ops.state;
        if let Some(node) = input_node {
            let value =
                B::convolution_input_gradient(input.clone(), weight.clone(), gradient.clone(), options);
            grads.register::<B>(node.id, value);
        }
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::convolution_weight_gradient(input, weight, gradient, options));
        }
    }
}

#[derive(Debug)]
struct Normalise;

impl<B: LayerGradients> Backward<B, 3> for Normalise {
    type State = (NormaliseInputs<B>, NormaliseOptions);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [input_node, gamma_node, beta_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let (inputs, options) = ops.state;
        let [input, statistics, gamma, _] = &inputs;
        let channels = gamma.shape()[0];
        let count = input.shape().num_elements() / channels;
        // Not needed if scale and shift are frozen and the statistics given; `statistics` has the same shape.
        let parameters = if gamma_node.is_none() && beta_node.is_none() && !options.from_batch {
            statistics.clone()
        } else {
            B::normalise_parameter_gradient(inputs.clone(), gradient.clone(), options)
        };
        for (row, node) in [gamma_node, beta_node].into_iter().enumerate() {
            if let Some(node) = node {
                let slice = [row..row + 1, 0..channels].map(Into::into);
                let value = B::float_slice(parameters.clone(), &slice);
                grads.register::<B>(node.id, B::float_reshape(value, [channels].into()));
            }
        }
        if let Some(node) = input_node {
            let parameters = if options.from_batch {
                // With statistics of all ranks, the gradient's means are over all of them, too.
                synchronised::sums::<B>(parameters, count)
            } else {
                parameters
            };
            let value = B::normalise_input_gradient(inputs, gradient, parameters, options);
            grads.register::<B>(node.id, value);
        }
    }
}

#[derive(Debug)]
struct AddRelu;

impl<B: LayerGradients> Backward<B, 2> for AddRelu {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = B::add_relu_gradient(ops.state, grads.consume::<B>(&ops.node));
        for node in ops.parents.into_iter().flatten() {
            grads.register::<B>(node.id, gradient.clone());
        }
    }
}

#[derive(Debug)]
struct MaxPool;

impl<B: LayerGradients> Backward<B, 1> for MaxPool {
    type State = (FloatTensor<B>, FloatTensor<B>, PoolOptions);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let ([node], (input, output, options)) = (ops.parents, ops.state);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::max_pool_gradient(input, output, gradient, options));
        }
    }
}

impl<B: LayerGradients, C: CheckpointStrategy> LayerOps for Autodiff<B, C> {
    fn convolution(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self> {
        let ((input, input_node), (weight, weight_node)) = (input.into_parts(), weight.into_parts());
        let output = B::convolution(input.clone(), weight.clone(), options);
        match Convolution.prepare::<C>([input_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((input, weight, options), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn batch_statistics(input: FloatTensor<Self>) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::batch_statistics(input.into_primitive()))
    }

    fn normalise(
        input: FloatTensor<Self>,
        statistics: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self> {
        let ((input, input_node), statistics) = (input.into_parts(), statistics.into_primitive());
        let ((gamma, gamma_node), (beta, beta_node)) = (gamma.into_parts(), beta.into_parts());
        let output = B::normalise(input.clone(), statistics.clone(), gamma.clone(), beta.clone(), options);
        match Normalise.prepare::<C>([input_node, gamma_node, beta_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(([input, statistics, gamma, beta], options), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn add_relu(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let ((a, a_node), (b, b_node)) = (a.into_parts(), b.into_parts());
        let output = B::add_relu(a, b);
        match AddRelu.prepare::<C>([a_node, b_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(output.clone(), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn max_pool(input: FloatTensor<Self>, options: PoolOptions) -> FloatTensor<Self> {
        let (input, node) = input.into_parts();
        let output = B::max_pool(input.clone(), options);
        match MaxPool.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((input, output.clone(), options), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}
