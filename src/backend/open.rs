//! Opening a backend by name: the only code that depends on which backends this build has.

use std::fmt;
use std::str::FromStr;

use super::Backend;
use super::cpu::CpuBackend;
use crate::{Error, Result};

/// Which device to compute on, as the programs spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceSpec {
    /// The first GPU if this build and machine have one, else the CPU.
    #[default]
    Auto,
    /// The processor's cores.
    Cpu,
    /// A GPU by its index.
    Cuda(usize),
    /// The CUDA kernels, run on the CPU; for tests.
    Emulated,
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::InvalidSetting {
            name: "device",
            value: text.to_owned(),
            range: "auto, cpu, cuda, cuda:N (a GPU's index) or emulated",
        };
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                index.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

/// The device that [`DeviceSpec::Auto`] stands for on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoDevice {
    /// The first GPU, or the CPU.
    pub spec: DeviceSpec,
    /// Why no GPU is used, in a build that supports GPUs.
    pub reason: Option<String>,
}

/// Looks for a GPU that can be used; its absence is no error.
#[must_use]
pub fn auto() -> AutoDevice {
    match gpu::check(0) {
        Ok(()) => AutoDevice { spec: DeviceSpec::Cuda(0), reason: None },
        Err(reason) => AutoDevice { spec: DeviceSpec::Cpu, reason },
    }
}

/// How a backend is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Multiplies f32 rows with TF32's precision: rounded to 11 significant bits, products summed in f32. The
    /// CPU refuses it, unlike `allow_tf32` of C and Python, which permits it only.
    pub tf32: bool,
    /// Most bytes kept between the passes; `None`: the backend's default.
    pub budget: Option<usize>,
}

/// Opens a backend.
///
/// # Errors
/// [`Error::Unavailable`] if this build or this machine does not have the device.
pub fn open(spec: &DeviceSpec) -> Result<Box<dyn Backend>> {
    open_with(spec, &OpenOptions::default())
}

/// Opens a backend with options.
///
/// # Errors
/// As [`open`]; [`Error::Unavailable`] also for TF32 on the CPU.
pub fn open_with(spec: &DeviceSpec, options: &OpenOptions) -> Result<Box<dyn Backend>> {
    match spec {
        DeviceSpec::Auto => open_with(&auto().spec, options),
        DeviceSpec::Cpu if options.tf32 => {
            Err(Error::Unavailable("the CPU does not multiply in TF32: do without it, or name a GPU".into()))
        }
        DeviceSpec::Cpu => Ok(Box::new(options.budget.map_or_else(CpuBackend::new, CpuBackend::with_budget))),
        DeviceSpec::Cuda(index) => gpu::open(*index, options),
        DeviceSpec::Emulated => emulation::open(options),
    }
}

#[cfg(feature = "kernels")]
impl From<&OpenOptions> for super::device::Options {
    fn from(&OpenOptions { tf32, budget }: &OpenOptions) -> Self {
        Self { tf32, budget }
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::OpenOptions;
    use crate::backend::{Backend, cuda};
    use crate::{Error, Result};

    /// Whether the GPU can be used; if not, why.
    pub fn check(index: usize) -> std::result::Result<(), Option<String>> {
        cuda::check(index).map_err(|error| Some(error.to_string()))
    }

    pub fn open(index: usize, options: &OpenOptions) -> Result<Box<dyn Backend>> {
        cuda::open(index, options.into()).map_err(|error| match error {
            Error::Unavailable(reason) => Error::Unavailable(format!("{reason}: use the device cpu")),
            other => other,
        })
    }
}

#[cfg(not(feature = "cuda"))]
mod gpu {
    use super::OpenOptions;
    use crate::{Result, backend::Backend};

    /// This build has no GPU support, so there is no reason to give.
    pub fn check(_index: usize) -> std::result::Result<(), Option<String>> {
        Err(None)
    }

    pub fn open(_index: usize, _options: &OpenOptions) -> Result<Box<dyn Backend>> {
        Err(super::needs_feature("cuda"))
    }
}

#[cfg(feature = "emulated")]
mod emulation {
    use super::OpenOptions;
    use crate::backend::Backend;
    use crate::backend::emulated::{self, SCHEDULE_SEED};

    pub fn open(options: &OpenOptions) -> crate::Result<Box<dyn Backend>> {
        Ok(emulated::open(options.into(), SCHEDULE_SEED))
    }
}

#[cfg(not(feature = "emulated"))]
mod emulation {
    use super::OpenOptions;
    use crate::{Result, backend::Backend};

    pub fn open(_options: &OpenOptions) -> Result<Box<dyn Backend>> {
        Err(super::needs_feature("emulated"))
    }
}

#[cfg(not(all(feature = "cuda", feature = "emulated")))]
fn needs_feature(feature: &str) -> Error {
    Error::Unavailable(format!(
        "this build has no backend `{feature}`: build with `cargo build --release --features {feature}`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_read_back() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3", "emulated"] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(0));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(text.parse::<DeviceSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_cpu_refuses_tf32() {
        let options = OpenOptions { tf32: true, ..OpenOptions::default() };
        let Err(error) = open_with(&DeviceSpec::Cpu, &options) else { panic!("TF32 on the CPU") };
        assert!(matches!(error, Error::Unavailable(_)), "{error}");
        assert_eq!(error.to_string(), "the CPU does not multiply in TF32: do without it, or name a GPU");
    }

    #[test]
    fn auto_opens_the_device_it_names() {
        assert_eq!(open(&DeviceSpec::Cpu).unwrap().name(), "cpu");
        let AutoDevice { spec, reason } = auto();
        assert_eq!(open(&DeviceSpec::Auto).unwrap().name(), spec.to_string());
        // Only a build that could use a GPU gives a reason for not using one.
        assert_eq!(reason.is_some(), cfg!(feature = "cuda") && spec == DeviceSpec::Cpu);
    }
}
