//! The order of the steps of a loss, which every backend keeps.

use crate::{Error, Result};

/// Message for a threshold_gradient without a loss, or the last step of a part's loss, before it.
pub const NO_LOSS: &str = "threshold_gradient needs a loss before it, or the last step of a part's";

/// Message for a threshold_gradient of another batch than the last loss's.
pub const OTHER_LABELS: &str = "threshold_gradient needs the batch of the last loss: its labels differ";

/// The steps of a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// m+ and the positives.
    SameClass,
    /// m-, the probe and the candidates.
    Sweep,
    /// The sizes of the mined sets.
    Select,
    /// Loss and gradient.
    Gradient,
}

impl Step {
    /// Takes the state out of `last` if the step before this one has left it; `step_of` tells which step left
    /// a state. `last` is `None` afterwards, so that after any later error the steps begin anew.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`].
    pub fn take_last<T>(self, last: &mut Option<T>, step_of: impl Fn(&T) -> Option<Self>) -> Result<T> {
        let (before, needs) = match self {
            Self::SameClass | Self::Sweep => {
                (Self::SameClass, "the sweep needs the same-class step before it")
            }
            Self::Select => (Self::Sweep, "the selection needs the sweep before it"),
            Self::Gradient => (Self::Select, "the gradient needs the selection before it"),
        };
        last.take().filter(|last| step_of(last) == Some(before)).ok_or(Error::OutOfOrder(needs))
    }
}
