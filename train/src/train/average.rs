//! An exponential moving average of the weights (EMA), which a run evaluates and saves.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::checkpoint;
use super::checkpoint::archive::Archive;
use crate::model::EmbeddingNetwork;

/// Prefix of the average's tensor names in a checkpoint.
const PREFIX: &str = "ema.";

/// The moving average of a network's weights and running statistics.
pub(super) struct Average {
    network: EmbeddingNetwork,
    decay: f64,
}

impl Average {
    /// An average that starts with the weights of `network`.
    pub fn new(network: &EmbeddingNetwork, decay: f64) -> Self {
        Self { network: network.valid(), decay }
    }

    /// Includes `network` after `step`. The decay is lower in the first steps, to forget the initial weights soon.
    pub fn update(&mut self, network: &EmbeddingNetwork, step: usize) {
        let decay = self.decay.min((1 + step) as f64 / (10 + step) as f64);
        let mut latest = Latest(GradientsParams::new());
        // Evaluation mode makes Burn apply pending updates of the running statistics.
        network.valid().visit(&mut latest);
        self.network = self.network.clone().map(&mut Mix { latest: latest.0, share: 1.0 - decay });
    }

    /// The network with the averaged weights.
    pub fn network(&self) -> &EmbeddingNetwork {
        &self.network
    }

    /// Adds the average to a checkpoint.
    pub fn put(&self, archive: &mut Archive) -> Result<(), String> {
        let mut tensors = checkpoint::tensors(&self.network)?;
        tensors
            .take_all("")
            .into_iter()
            .for_each(|(name, entry)| archive.put(format!("{PREFIX}{name}"), entry));
        Ok(())
    }

    /// Restores the average from a checkpoint; the error says what does not fit.
    pub fn take(&mut self, archive: &mut Archive) -> Result<(), String> {
        let mut tensors = Archive::default();
        tensors.facts.clone_from(&archive.facts);
        archive.take_all(PREFIX).into_iter().for_each(|(name, entry)| tensors.put(name, entry));
        self.network = checkpoint::filled(self.network.clone(), &tensors)
            .map_err(|reason| format!("its mean weights do not fit the network: {reason}"))?;
        Ok(())
    }
}

/// Every float tensor of a module, by parameter id.
struct Latest(GradientsParams);

impl ModuleVisitor for Latest {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.register(param.id, param.val());
    }
}

/// Moves every tensor a `share` of the way to `latest`; a tensor that has not changed keeps its bits.
struct Mix {
    latest: GradientsParams,
    share: f64,
}

impl ModuleMapper for Mix {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let latest = self.latest.remove::<D>(param.id);
        param.map(|mean| match latest {
            Some(latest) => mean.clone().add(latest.sub(mean).mul_scalar(self.share)),
            None => mean,
        })
    }
}
