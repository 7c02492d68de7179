//! How the programs are told where to compute.

use ddtas::Result;
use ddtas::backend::{AutoDevice, Backend, DeviceSpec, auto, open_with};

/// The device of a program, and how it multiplies.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct DeviceArguments {
    /// auto (the first GPU if this build and machine have one, else the CPU), cpu, cuda, cuda:N or emulated;
    /// --device, as ddtas-train has it, is the same.
    #[arg(long, visible_alias = "device", default_value_t)]
    pub backend: DeviceSpec,
    /// f32 rows on a GPU only: multiply them to TF32's precision, for a third of the work or less. Every entry is rounded to
    /// 11 bits (f16; below 6e-5 to an absolute 3e-8), and products are summed in f32. The CPU refuses it.
    #[arg(long)]
    pub tf32: bool,
}

impl DeviceArguments {
    /// Names the device that `auto` comes to, and says why it is not a GPU where one was to be expected.
    #[must_use]
    pub fn resolve(self) -> (Self, Option<String>) {
        if self.backend != DeviceSpec::Auto {
            return (self, None);
        }
        let AutoDevice { spec, reason } = auto();
        (Self { backend: spec, ..self }, reason)
    }

    /// Opens the device.
    ///
    /// # Errors
    /// As [`open_with`].
    pub fn open(&self) -> Result<Box<dyn Backend>> {
        open_with(&self.backend, self.tf32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_resolved_and_what_was_named_is_kept() {
        let named = DeviceArguments { backend: DeviceSpec::Cuda(3), tf32: true };
        let (same, reason) = named.resolve();
        assert_eq!((same.backend, same.tf32, reason), (DeviceSpec::Cuda(3), true, None));
        let (found, reason) = DeviceArguments::default().resolve();
        assert_eq!(AutoDevice { spec: found.backend, reason }, auto());
    }
}
