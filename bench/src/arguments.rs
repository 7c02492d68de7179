//! The device arguments of the programs.

use ddtas::Result;
use ddtas::backend::{AutoDevice, Backend, DeviceSpec, OpenOptions, auto, open_with};
use ddtas_io::UNKNOWN_DEVICE;

/// The device, and the precision of its products.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct DeviceArguments {
    /// Where to compute: auto (the first GPU if this build and machine have one, else the CPU), cpu, cuda or cuda:N.
    #[arg(long, visible_alias = "device", value_name = "DEVICE", default_value_t, value_parser = device)]
    pub backend: DeviceSpec,
    /// Multiply f32 rows in TF32 precision, which takes a third of the time or less; for GPUs only. Every entry is rounded
    /// to 11 bits (below 6e-5 to within 3e-8), and products are summed in f32.
    #[arg(long)]
    pub tf32: bool,
}

fn device(name: &str) -> std::result::Result<DeviceSpec, &'static str> {
    name.parse().map_err(|_| UNKNOWN_DEVICE)
}

impl DeviceArguments {
    /// The device that `auto` stands for here, and the reason if it is not the GPU that might be expected.
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
        open_with(&self.backend, &OpenOptions { tf32: self.tf32, budget: None })
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
