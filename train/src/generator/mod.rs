//! The online threshold generator: the loss threshold, learned while training (SPEC 5).
//!
//! Each step computes dL^m/dlambda: whether a slightly higher lambda would have given, after this step,
//! weights with a lower loss on other pictures (the meta batch). That needs no second-order differentiation,
//! only a tangent of the embeddings and the backend's fused threshold pass over the pairs that the loss has
//! mined.
//!
//! | file | what |
//! | --- | --- |
//! | `settings.rs` | settings |
//! | `update.rs` | from hyper-gradients to the next lambda: rates, regularisation, range, ensemble |
//! | `head.rs` | virtual step of the embedding head only, in closed form |
//! | `full.rs` | virtual step of the whole network, tangent by central difference |

pub mod full;
pub mod head;
mod settings;
mod update;

pub use settings::{GeneratorKind, GeneratorSettings, MetaSource, Optimizer, VirtualStep, VirtualStepKind};
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
