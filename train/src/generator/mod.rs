//! The online threshold generator: the loss threshold, learned while training (SPEC 5).
//!
//! Each step asks: had lambda been a little higher, would the weights after
//! this step serve other pictures better? The answer, dL^m/dlambda, needs no
//! second-order differentiation: a tangent of the embeddings, and the fused
//! threshold pass of the backend over the pairs that the loss has mined.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | settings |
//! | `update.rs` | from hyper-gradients to the next lambda: rates, pull, range, ensemble |
//! | `head.rs` | virtual step of the embedding head alone, in closed form |
//! | `full.rs` | virtual step of the whole network, tangent by central difference |
//! | `neighbours.rs` | a meta objective without a threshold |

pub mod full;
pub mod head;
mod neighbours;
mod settings;
mod update;

pub use neighbours::neighbours;
pub(crate) use settings::defaults;
pub use settings::{
    GeneratorKind, GeneratorSettings, MetaObjective, MetaSource, Optimizer, VirtualStep, VirtualStepKind,
};
pub use update::{Member, Thresholds, UpdateRule};

use ddtas::loss::LossSettings;

/// Both loss thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Lambda {
    /// lambda_pos.
    pub pos: f64,
    /// lambda_neg.
    pub neg: f64,
}

impl Lambda {
    /// `settings` with these thresholds.
    #[must_use]
    pub fn applied_to(self, settings: &LossSettings) -> LossSettings {
        LossSettings { lambda_pos: self.pos, lambda_neg: self.neg, ..*settings }
    }
}
