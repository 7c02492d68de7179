//! The device of a run, for both network and loss.

use burn::module::Module;
use burn::tensor::Device;

use crate::model::EmbeddingNetwork;
use crate::{Error, Result};
use ddtas::backend::{self, AutoDevice, Backend, DeviceSpec};

/// The device of a run, for its network and for its loss.
pub(super) struct RunDevice {
    /// For the backends of the loss; never [`DeviceSpec::Auto`].
    pub spec: DeviceSpec,
    /// For the network, with autodiff.
    pub network: Device,
    /// Why `auto` chose the CPU, if a GPU could be expected.
    pub reason: Option<String>,
}

/// Finds the device for `asked`, without opening it. Each rank of a machine takes another GPU.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) if this build has no network on that device.
pub(super) fn find(asked: DeviceSpec, local_rank: usize) -> Result<RunDevice> {
    let (spec, reason) = match asked {
        DeviceSpec::Auto => automatic(backend::auto(), local_rank),
        other => (other, None),
    };
    let network = match spec {
        DeviceSpec::Cuda(index) => gpu::device(index)?,
        DeviceSpec::Emulated => emulated(),
        DeviceSpec::Auto | DeviceSpec::Cpu => Device::flex(),
    };
    Ok(RunDevice { spec, network: network.autodiff(), reason })
}

/// Opens the backend of `--device`.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) if this build or machine does not have the device.
pub(crate) fn open(spec: &DeviceSpec) -> Result<Box<dyn Backend>> {
    backend::open(spec).map_err(|error| match error {
        ddtas::Error::Unavailable(reason) => Error::misuse("device", spec, reason),
        other => other.into(),
    })
}

/// The network's device with emulated kernels of the loss, for tests: the CPU, unless those of the network are emulated, too.
fn emulated() -> Device {
    #[cfg(feature = "train-emulated")]
    return Device::cpu();
    #[cfg(not(feature = "train-emulated"))]
    Device::flex()
}

/// Moves `network` to `device`, with weights drawn on the device where it was made.
pub(super) fn moved(network: EmbeddingNetwork, device: &Device) -> EmbeddingNetwork {
    // Burn draws a weight on first use, so moving an unused weight would draw it on `device`, from another
    // random sequence. A weight shared with a clone is drawn before it is moved.
    let shared = network.clone();
    let moved = network.fork(device);
    drop(shared);
    moved
}

/// Chooses a GPU only if the network can run there, too: the loss is too small a part of a training step to
/// be worth copies to the GPU and back.
fn automatic(found: AutoDevice, local_rank: usize) -> (DeviceSpec, Option<String>) {
    match found.spec {
        DeviceSpec::Cuda(_) if !gpu::HAS_NETWORK => {
            (DeviceSpec::Cpu, Some(format!("{} is there, but {}", found.spec, gpu::NEEDS_FEATURE)))
        }
        DeviceSpec::Cuda(first) => (DeviceSpec::Cuda(first + local_rank), found.reason),
        spec => (spec, found.reason),
    }
}

#[cfg(feature = "train-cuda")]
mod gpu {
    use burn::tensor::Device;

    use crate::Result;

    pub const HAS_NETWORK: bool = true;
    pub const NEEDS_FEATURE: &str = "";

    pub fn device(index: usize) -> Result<Device> {
        Ok(Device::cuda(index))
    }
}

#[cfg(not(feature = "train-cuda"))]
mod gpu {
    use burn::tensor::Device;

    use crate::{Error, Result};

    pub const HAS_NETWORK: bool = false;
    pub const NEEDS_FEATURE: &str =
        "this build trains on the CPU only: build with `cargo build --release --features train-cuda`";

    pub fn device(index: usize) -> Result<Device> {
        let reason = format!("{NEEDS_FEATURE}, or use the device cpu");
        Err(Error::misuse("device", format_args!("cuda:{index}"), reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BackboneKind, NetworkShape};

    #[test]
    fn weights_are_drawn_before_they_move() {
        let cpu = Device::flex().autodiff();
        let residual = NetworkShape::published(BackboneKind::Residual);
        let shape = NetworkShape { width: 2, depth: 1, embedding_dim: 3, ..residual };
        let network = EmbeddingNetwork::new(&shape, &cpu);
        assert!(!network.head.weight.is_initialized(), "Burn draws at once: `moved` needs no clone any more");
        let network = moved(network, &cpu);
        assert!(network.head.weight.is_initialized());
    }

    #[test]
    fn auto_takes_a_gpu_only_with_the_network() {
        let gpu = AutoDevice { spec: DeviceSpec::Cuda(0), reason: None };
        let (spec, reason) = automatic(gpu, 2);
        if cfg!(feature = "train-cuda") {
            assert_eq!((spec, reason), (DeviceSpec::Cuda(2), None));
        } else {
            assert_eq!(spec, DeviceSpec::Cpu);
            assert!(reason.unwrap().contains("--features train-cuda"));
        }
    }

    #[test]
    fn network_and_loss_are_on_the_same_device() {
        let cpu = find(DeviceSpec::Cpu, 0).unwrap();
        assert_eq!((cpu.spec, cpu.network, cpu.reason), (DeviceSpec::Cpu, Device::flex(), None));
        let auto = find(DeviceSpec::Auto, 0).unwrap();
        assert_eq!(auto.network == Device::flex(), auto.spec == DeviceSpec::Cpu);
        match find(DeviceSpec::Cuda(1), 0) {
            Ok(found) => assert!(found.network != Device::flex() && found.spec == DeviceSpec::Cuda(1)),
            Err(error) => assert!(error.to_string().contains("--features train-cuda"), "{error}"),
        }
    }
}
