//! Issues the kernels of one call.

use super::plan::{LaunchPlan, variant};
use super::shape::Shape;
use super::{Device, Kernel, Params};
use crate::Result;

/// Issues the kernels of one call, all on memory at `base`.
pub(super) struct Launcher<'a, D: Device> {
    pub(super) device: &'a mut D,
    pub(super) shape: Shape,
}

impl<D: Device> Launcher<'_, D> {
    pub(super) fn launch<P: Params>(
        &mut self,
        kernel: Kernel,
        of_references: bool,
        params: &P,
    ) -> Result<()> {
        self.launch_with(kernel, of_references, params, |plan| plan)
    }

    /// As [`launch`](Self::launch), with the plan that `change` returns.
    pub(super) fn launch_with<P: Params>(
        &mut self,
        kernel: Kernel,
        of_references: bool,
        params: &P,
        change: impl FnOnce(LaunchPlan) -> LaunchPlan,
    ) -> Result<()> {
        let gpu = self.device.properties();
        let kernel = variant(kernel, gpu);
        let plan = change(LaunchPlan::new(kernel, &self.shape, of_references, gpu));
        // SAFETY: `params` is built in this folder. Its addresses are regions of a layout for this very shape,
        // laid over a buffer that lives in the backend; or the caller's (rows, labels, gradients, tangents,
        // identity, thresholds, scalars, a step's numbers), which whoever calls the unsafe functions on device
        // memory vouches for. No such address is kept for a later safe call: see `sum_threshold` and `go_on`.
        // tests/emulated runs every kernel with the gaps watched.
        unsafe { self.device.launch(kernel, plan, params) }
    }
}
