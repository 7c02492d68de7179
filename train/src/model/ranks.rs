//! Combines gradients and running statistics of all ranks, and compares their weights.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

use super::{EmbeddingNetwork, checksum, read};
use crate::ranks::{Collective, gather};
use crate::{Error, Result};

/// The gradients of the weights of `module`, summed over all ranks; each rank must have gradients of the same weights.
pub(crate) fn sum_gradients<M: Module>(
    ranks: &dyn Collective,
    module: &M,
    gradients: GradientsParams,
) -> Result<GradientsParams> {
    if ranks.size() == 1 {
        return Ok(gradients);
    }
    let mut flat = Flat { gradients: &gradients, values: Ok(Vec::new()) };
    module.visit(&mut flat);
    let mut values = flat.values?;
    ranks.all_reduce(&mut values)?;
    let mut sums = Sums { gradients: &gradients, values: values.into_iter(), sums: GradientsParams::new() };
    module.visit(&mut sums);
    Ok(sums.sums)
}

/// Replaces every running statistic by its mean over all ranks, weighted by each one's `share` of the batch.
pub(crate) fn mean_statistics(
    ranks: &dyn Collective,
    network: EmbeddingNetwork,
    share: f64,
) -> Result<EmbeddingNetwork> {
    if ranks.size() == 1 {
        return Ok(network);
    }
    // Evaluation mode makes Burn apply pending updates of the running statistics.
    drop(network.valid());
    let mut found = Statistics(Ok(Vec::new()));
    network.visit(&mut found);
    let mut values: Vec<f32> = found.0?.into_iter().map(|value| (f64::from(value) * share) as f32).collect();
    ranks.all_reduce(&mut values)?;
    Ok(network.map(&mut Replace { values: values.into_iter() }))
}

/// Checks that all ranks have the same weights.
pub(crate) fn check_same_weights(
    ranks: &dyn Collective,
    network: &EmbeddingNetwork,
    step: usize,
) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let all: Vec<u32> = gather(ranks, &[checksum(&network.valid())?])?;
    match all.iter().position(|&other| other != all[0]) {
        Some(rank) => Err(Error::Training(format!(
            "rank {rank} has other weights than rank 0 before step {}: all ranks need the same program, the same kind of processor, \
             and the same files",
            step + 1
        ))),
        None => Ok(()),
    }
}

/// Collects the gradients of a module in one vector.
struct Flat<'a> {
    gradients: &'a GradientsParams,
    values: Result<Vec<f32>>,
}

impl ModuleVisitor for Flat<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let (Ok(values), Some(gradient)) = (&mut self.values, self.gradients.get::<D>(param.id)) {
            match read(gradient) {
                Ok(found) => values.extend(found),
                Err(error) => self.values = Err(error),
            }
        }
    }
}

/// Makes gradients from values in the order of [`Flat`].
struct Sums<'a> {
    gradients: &'a GradientsParams,
    values: std::vec::IntoIter<f32>,
    sums: GradientsParams,
}

impl ModuleVisitor for Sums<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(own) = self.gradients.get::<D>(param.id) else { return };
        self.sums.register(param.id, like(&own, &mut self.values));
    }
}

/// Collects the tensors of a module without gradient, the running statistics, in one vector.
struct Statistics(Result<Vec<f32>>);

impl ModuleVisitor for Statistics {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        if let (Ok(values), false) = (&mut self.0, tensor.is_require_grad()) {
            match read(tensor) {
                Ok(found) => values.extend(found),
                Err(error) => self.0 = Err(error),
            }
        }
    }
}

/// Replaces the tensors without gradient by values.
struct Replace {
    values: std::vec::IntoIter<f32>,
}

impl ModuleMapper for Replace {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.val().is_require_grad() {
            return param;
        }
        param.map(|old| like(&old, &mut self.values))
    }
}

/// The next values as a tensor with the shape and device of `tensor`.
fn like<const D: usize>(tensor: &Tensor<D>, values: &mut impl Iterator<Item = f32>) -> Tensor<D> {
    let shape = tensor.shape();
    let values: Vec<f32> = values.take(shape.num_elements()).collect();
    Tensor::from_data(TensorData::new(values, shape), &tensor.device())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
pub(crate) mod tests {
    use std::rc::Rc;

    use burn::tensor::Device;

    use super::*;
    use crate::model::{BackboneKind, NetworkShape};
    use crate::ranks::{on_threads, together};

    /// Gradients of a network that are `value` in every entry.
    pub(crate) fn constant_gradients(network: &EmbeddingNetwork, value: f64) -> GradientsParams {
        struct Constant(f64, GradientsParams);
        impl ModuleVisitor for Constant {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if param.val().is_require_grad() {
                    let zeros = param.val().inner().zeros_like();
                    self.1.register(param.id, zeros.add_scalar(self.0));
                }
            }
        }
        let mut constant = Constant(value, GradientsParams::new());
        network.visit(&mut constant);
        constant.1
    }

    #[test]
    fn gradients_are_summed_and_statistics_weighted_by_share() {
        let residual = NetworkShape::published(BackboneKind::Residual);
        let shape = NetworkShape { width: 2, depth: 1, embedding_dim: 3, ..residual };
        let done = on_threads(2, |ranks| {
            let value = 1.0 + 2.0 * ranks.rank() as f32;
            together(&Rc::clone(&ranks), || {
                let network = EmbeddingNetwork::new(&shape, &Device::flex().autodiff());
                let own = constant_gradients(&network, f64::from(value));
                let sums = sum_gradients(&*ranks, &network, own)?;
                let mut flat = Flat { gradients: &sums, values: Ok(Vec::new()) };
                network.visit(&mut flat);
                let sums = flat.values?;
                assert!(sums.len() > 100 && sums.iter().all(|&sum| sum == 4.0), "{sums:?}");

                let network = network.map(&mut Replace { values: vec![value; 10_000].into_iter() });
                let share = [0.25, 0.75][ranks.rank()];
                let mut found = Statistics(Ok(Vec::new()));
                mean_statistics(&*ranks, network, share)?.visit(&mut found);
                let means = found.0?;
                assert!(means.len() > 10 && means.iter().all(|&mean| mean == 2.5), "{means:?}");
                Ok(())
            })
        });
        done.unwrap();
    }
}
