//! The optimizer: Adam or AdamW, learning rates of head and backbone, weight decay.

use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::decay::WeightDecayConfig;
use burn::optim::{AdamConfig, AdamWConfig, LearningRate, ModuleOptimizer, Optimizer};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::schedule::ScheduleKind;
use crate::Result;
use crate::arguments::defaults;
use crate::error::{check, fits};
use crate::generator::GeneratorKind;
use crate::model::EmbeddingNetwork;

/// PyTorch's default. Burn's, 1e-5, is as large as many of these gradients and would make steps smaller.
const ADAM_EPSILON: f32 = 1e-8;

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// Adam, with weight decay added to the gradient (L2 regularisation).
    Adam,
    /// Adam with decoupled weight decay.
    #[default]
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
}

/// Which weights decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decayed {
    /// All of them.
    #[default]
    All,
    /// Those of convolutions and linear layers: not biases, normalisation layers, class token and position embedding.
    Weights,
}

/// Settings of the optimizer besides learning rate and weight decay.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerSettings {
    /// The optimizer.
    #[arg(long, value_enum, default_value_t, hide_short_help = true)]
    pub optimizer: OptimizerKind,
    /// Weights that --weight-decay applies to.
    #[arg(long, value_enum, default_value_t, hide_short_help = true)]
    pub weight_decay_on: Decayed,
    /// Peak learning rate of the embedding head [default: --learning-rate].
    #[arg(long, value_name = "RATE", hide_short_help = true)]
    pub head_learning_rate: Option<f64>,
    /// First steps in which only the embedding head is trained.
    #[arg(long, value_name = "STEPS", default_value_t = 0, hide_short_help = true)]
    pub head_steps: usize,
    /// The learning rate after the warm-up.
    #[arg(long, value_enum, default_value_t, hide_short_help = true)]
    pub schedule: ScheduleKind,
    /// Steps at which the learning rate falls (--schedule step), separated by commas, such as 4000,6000.
    #[arg(long, value_name = "STEPS", value_delimiter = ',', hide_short_help = true)]
    pub milestones: Vec<usize>,
    /// Factor of the learning rate at each milestone.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.1, hide_short_help = true)]
    pub milestone_factor: f64,
    /// Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 for none.
    #[arg(long, value_name = "DECAY", default_value_t = 0.0, hide_short_help = true)]
    pub ema: f64,
    /// Pictures that go through the network at a time, with the loss over the whole batch (GradCache); 0 for all at once.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Batches", hide_short_help = true)]
    pub chunk_size: usize,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        defaults()
    }
}

impl OptimizerSettings {
    /// Checks every range, and the combination of settings with `generator` and each other.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) names the first wrong setting.
    pub(super) fn validate(&self, generator: GeneratorKind) -> Result<()> {
        let rate = self.head_learning_rate.unwrap_or(1.0);
        check(rate > 0.0 && rate.is_finite(), "head-learning-rate", rate, "above 0")?;
        let alone = self.head_steps;
        check(alone <= 1 << 31, "head-steps", alone, "0 to 2147483648")?;
        fits(
            alone == 0 || generator != GeneratorKind::Full,
            "head-steps",
            alone,
            "does not go with --generator full, whose virtual step moves the whole network: use --generator head",
        )?;
        check((0.0..1.0).contains(&self.ema), "ema", self.ema, "0 to 1, 1 excluded")?;
        let chunk = self.chunk_size;
        check(chunk <= 1 << 20, "chunk-size", chunk, "0 to 1048576")?;
        fits(
            chunk == 0 || generator != GeneratorKind::Full,
            "chunk-size",
            chunk,
            "does not go with --generator full, which passes the whole batch at once: use --generator head",
        )?;
        let milestones = self.milestones.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let is_step = self.schedule == ScheduleKind::Step;
        let needed = "needs --milestones, rising steps such as 4000,6000";
        fits(!is_step || !self.milestones.is_empty(), "schedule", "step", needed)?;
        fits(is_step || self.milestones.is_empty(), "milestones", &milestones, "needs --schedule step")?;
        let rising = self.milestones.is_sorted_by(|a, b| a < b) && self.milestones.first() != Some(&0);
        fits(rising, "milestones", &milestones, "give rising steps of 1 or more, such as 4000,6000")?;
        let last = self.milestones.last().copied().unwrap_or(1);
        check(last <= 1 << 31, "milestones", &milestones, "1 to 2147483648")?;
        let factor = self.milestone_factor;
        check(factor > 0.0 && factor <= 1.0, "milestone-factor", factor, "above 0, at most 1")
    }
}

impl OptimizerSettings {
    /// An optimizer for `network`; `rate` is the learning rate of the backbone. Groups select parameters by
    /// id, not by path, since the moments of a resumed run are restored by id.
    pub(super) fn optimizer(&self, network: &EmbeddingNetwork, rate: f64, decay: f32) -> ModuleOptimizer {
        match self.optimizer {
            OptimizerKind::AdamW => self.grouped(network, rate, decay, |decay| {
                AdamWConfig::new().with_epsilon(ADAM_EPSILON).with_weight_decay(decay).build()
            }),
            OptimizerKind::Adam => self.grouped(network, rate, decay, |decay| {
                let decay = (decay > 0.0).then(|| WeightDecayConfig::new(decay));
                AdamConfig::new().with_epsilon(ADAM_EPSILON).with_weight_decay(decay).build()
            }),
        }
    }

    /// An optimizer with groups for the weights that decay and for the head. `build` makes one with a given weight decay.
    fn grouped<O: Optimizer>(
        &self,
        network: &EmbeddingNetwork,
        rate: f64,
        decay: f32,
        build: impl Fn(f32) -> O,
    ) -> ModuleOptimizer {
        let on_others = if self.weight_decay_on == Decayed::All { decay } else { 0.0 };
        let of_head = self.head_learning_rate.unwrap_or(rate) / rate;
        let (all, head) = (Numbers::of(network), Numbers::of(&network.head));
        let mut optimizer = ModuleOptimizer::from(build(decay));
        // If a parameter is in several groups, the last one applies.
        for (numbers, decay, factor) in
            [(all.others, on_others, 1.0), (head.weights, decay, of_head), (head.others, on_others, of_head)]
        {
            let scaled = Scaled { optimizer: build(decay), factor };
            optimizer = optimizer.with_group(ParamGroup::from_ids(numbers), scaled, None);
        }
        optimizer
    }
}

/// Ids of a module's parameters.
#[derive(Default)]
struct Numbers {
    /// Weights of convolutions and linear maps.
    weights: Vec<ParamId>,
    others: Vec<ParamId>,
    /// Names of the fields on the path to the parameter being visited.
    path: Vec<String>,
}

impl Numbers {
    fn of(module: &impl Module) -> Self {
        let mut numbers = Self::default();
        module.visit(&mut numbers);
        numbers
    }
}

impl ModuleVisitor for Numbers {
    fn enter_module(&mut self, name: &str, _kind: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _kind: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // By name: a position embedding has as many dimensions as a weight. A layer norm's scale is also named `weight`.
        let mut names = self.path.iter().rev();
        let is_weight = names.next().is_some_and(|name| name == "weight");
        let of_norm = names.next().is_some_and(|name| name.starts_with("norm"));
        let numbers = if is_weight && !of_norm { &mut self.weights } else { &mut self.others };
        numbers.push(param.id);
    }
}

/// An optimizer that multiplies its learning rate by `factor`: Burn's module optimizer has one rate for all groups.
#[derive(Clone)]
struct Scaled<O> {
    optimizer: O,
    factor: f64,
}

impl<O: Optimizer> Optimizer for Scaled<O> {
    type State<const D: usize> = O::State<D>;

    fn step<const D: usize>(
        &self,
        rate: LearningRate,
        tensor: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        self.optimizer.step(rate * self.factor, tensor, gradient, state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        O::to_device(state, device)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use burn::store::ModuleSnapshot;
    use clap::Parser;

    use super::*;
    use crate::model::ranks::tests::constant_gradients;
    use crate::train::TrainSettings;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        settings: TrainSettings,
    }

    #[test]
    fn decay_is_for_convolutions_and_linear_maps() {
        for (arguments, kept, decayed) in [
            (
                "test --backbone vit-s16 --image-size 96",
                &["cls_token", "pos_embed", "norm.weight", "blocks.3.norm1.weight", "blocks.3.mlp.fc1.bias"]
                    [..],
                &["patch_embed.proj.weight", "blocks.3.attn.qkv.weight"][..],
            ),
            (
                "test --backbone bn-inception --image-size 96 --pooling gem",
                &["units.0.bias", "units.0.norm.gamma", "units.0.norm.beta"],
                &["units.0.weight"],
            ),
        ] {
            let settings = Arguments::parse_from(arguments.split(' ')).settings;
            let network = EmbeddingNetwork::new(&settings.network_shape(), &Device::flex());
            let numbers = Numbers::of(&network);
            let named = |ids: &[ParamId]| -> BTreeSet<String> {
                let tensors = network.collect(None, None, true).into_iter();
                let known = |tensor: &burn::store::burn_pack::Tensor| {
                    tensor.param_id.is_some_and(|id| ids.iter().any(|known| known.val() == id))
                };
                tensors.filter(known).map(|tensor| tensor.name).collect()
            };
            let (weights, others) = (named(&numbers.weights), named(&numbers.others));
            let name = |name: &&str| format!("backbone.{name}");
            assert!(kept.iter().all(|kept| others.contains(&name(kept))), "{others:?}");
            assert!(decayed.iter().all(|decayed| weights.contains(&name(decayed))), "{weights:?}");
            assert!(weights.contains("head.weight") && others.contains("head.bias"), "{weights:?}");
            assert_eq!(others.contains("pooling.exponent"), arguments.contains("gem"));
        }
    }
    /// Gradients of three steps, as small as late in a run, where a larger epsilon would shorten the steps.
    const GRADIENTS: [f64; 3] = [2e-6, -1e-6, 3e-6];

    /// Every entry of every tensor of the network, by Burn's names.
    fn entries(network: &EmbeddingNetwork) -> BTreeMap<String, Vec<f32>> {
        let named = |tensor: burn::store::burn_pack::Tensor| {
            let (name, .., bytes) = tensor.into_parts().unwrap();
            (name, bytemuck::pod_collect_to_vec(&bytes))
        };
        network.collect(None, None, true).into_iter().map(named).collect()
    }

    /// A weight after three steps of Adam or AdamW, in float64.
    fn stepped(kind: OptimizerKind, mut value: f64, rate: f64, decay: f64) -> f64 {
        let (mut mean, mut square) = (0.0, 0.0);
        for (step, gradient) in (1..).zip(GRADIENTS) {
            let (added, kept) = match kind {
                OptimizerKind::Adam => (decay * value, 1.0),
                OptimizerKind::AdamW => (0.0, 1.0 - rate * decay),
            };
            let gradient = gradient + added;
            mean = 0.9 * mean + 0.1 * gradient;
            square = 0.999 * square + 0.001 * gradient * gradient;
            let unbiased = |value: f64, decay: f64| value / (1.0 - decay.powi(step));
            value = kept * value - rate * unbiased(mean, 0.9) / (unbiased(square, 0.999).sqrt() + 1e-8);
        }
        value
    }

    #[test]
    fn steps_are_those_of_the_formulas_in_every_group() {
        let device = Device::flex().autodiff();
        for (arguments, kind, on_others) in [
            ("--optimizer adamw", OptimizerKind::AdamW, 0.5),
            ("--optimizer adamw --weight-decay-on weights", OptimizerKind::AdamW, 0.0),
            ("--optimizer adam", OptimizerKind::Adam, 0.5),
            ("--optimizer adam --weight-decay-on weights", OptimizerKind::Adam, 0.0),
        ] {
            let all = format!("test --width 4 --embedding-dim 6 --head-learning-rate 5e-3 {arguments}");
            let settings = Arguments::parse_from(all.split(' ')).settings;
            let mut network = EmbeddingNetwork::new(&settings.network_shape(), &device);
            let before = entries(&network);
            let mut optimizer = settings.optimizer.optimizer(&network, 1e-3, 0.5);
            for value in GRADIENTS {
                let gradients = constant_gradients(&network, value);
                network = optimizer.step(1e-3, network, gradients);
            }
            for (name, got) in entries(&network) {
                let rate = if name.starts_with("head.") { 5e-3 } else { 1e-3 };
                let decay = if name.ends_with(".weight") { 0.5 } else { on_others };
                for (got, &old) in got.iter().zip(&before[&name]) {
                    let old = f64::from(old);
                    let moves = !name.contains("running");
                    let want = if moves { stepped(kind, old, rate, decay) } else { old };
                    assert!((f64::from(*got) - want).abs() < 2e-6, "{arguments}, {name}: {got}, not {want}");
                }
            }
        }
    }
}
