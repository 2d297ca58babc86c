//! Where a model computes: the device string, what is compiled in, and what is there.

mod memory;
mod survey;

use std::fmt;
use std::str::FromStr;

use burn::tensor::{Device as BurnDevice, Tensor, TensorData};

use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
pub use survey::DeviceReport;

/// A place to compute, as its string says: `auto`, `cpu`, `wgpu`, `vulkan`, `metal`, `webgpu`,
/// `cuda`, `ndarray`, the GPUs with an optional index (`cuda:1`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    backend: Backend,
    index: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Backend {
    Auto,
    Cpu,
    Wgpu,
    Vulkan,
    Metal,
    WebGpu,
    Cuda,
    NdArray,
}

/// Backend, name, cargo feature, whether it is compiled in.
const BACKENDS: [(Backend, &str, &str, bool); 7] = [
    (Backend::Cpu, "cpu", "cpu", cfg!(feature = "cpu")),
    (Backend::Cuda, "cuda", "cuda", cfg!(feature = "cuda")),
    (
        Backend::Vulkan,
        "vulkan",
        "vulkan",
        cfg!(feature = "vulkan"),
    ),
    (Backend::Metal, "metal", "metal", cfg!(feature = "metal")),
    (Backend::Wgpu, "wgpu", "wgpu", cfg!(feature = "wgpu")),
    (
        Backend::WebGpu,
        "webgpu",
        "webgpu",
        cfg!(feature = "webgpu"),
    ),
    (
        Backend::NdArray,
        "ndarray",
        "ndarray",
        cfg!(feature = "ndarray"),
    ),
];

impl Device {
    /// The best device that is compiled in and present: CUDA, then a discrete GPU, then the CPU.
    pub const fn auto() -> Self {
        Self {
            backend: Backend::Auto,
            index: None,
        }
    }

    /// The processor.
    pub const fn cpu() -> Self {
        Self {
            backend: Backend::Cpu,
            index: None,
        }
    }

    /// The devices of this build, by name.
    pub fn compiled() -> Vec<&'static str> {
        BACKENDS
            .iter()
            .filter(|row| row.3)
            .map(|row| row.1)
            .collect()
    }

    /// Whether this is a GPU, whose memory is not the host's.
    pub(crate) fn is_gpu(&self) -> bool {
        !matches!(
            self.backend,
            Backend::Auto | Backend::Cpu | Backend::NdArray
        )
    }

    /// Whether the kernels of `ops/cpu` run here.
    pub(crate) fn is_cpu(&self) -> bool {
        self.backend == Backend::Cpu
    }

    /// Whether this is an NVIDIA GPU through CUDA, which has every precision.
    pub(crate) fn is_cuda(&self) -> bool {
        self.backend == Backend::Cuda
    }

    /// Opens the device; `auto` becomes the one that was found.
    ///
    /// # Errors
    /// `DeviceUnavailable` if it is not compiled in, not there, or computes wrong results.
    pub(crate) fn open(&self) -> Result<(Self, BurnDevice)> {
        if self.backend == Backend::Auto {
            return Self::open_auto();
        }
        let Some(row) = BACKENDS.iter().find(|row| row.0 == self.backend && row.3) else {
            return Err(self.unavailable("not compiled in").with_help(format!(
                "build with the cargo feature `{}`; this build has {}",
                self.feature(),
                Self::compiled().join(", ")
            )));
        };
        tracing::debug!(device = row.1, "opening");
        if self.would_crash() {
            return Err(self
                .unavailable(
                    "no GPU was found; drivers in software are not used, cubecl's SPIR-V crashes them",
                )
                .with_help("install the GPU's driver, or build with `wgpu` and without `vulkan`"));
        }
        let opened = fenced(|| {
            let device = self.burn_device()?;
            self.probe(&device).map(|()| device)
        });
        match opened {
            Ok(result) => result.map(|device| (self.clone(), device)),
            Err(panic) => Err(self.unavailable(&panic).with_help(
                "is the driver installed, and does the device exist? `cpu` works everywhere",
            )),
        }
    }

    fn open_auto() -> Result<(Self, BurnDevice)> {
        let order = [
            Backend::Cuda,
            Backend::Metal,
            Backend::Vulkan,
            Backend::Wgpu,
        ];
        for backend in order {
            let candidate = Self {
                backend,
                index: None,
            };
            let compiled = BACKENDS.iter().any(|row| row.0 == backend && row.3);
            if compiled && candidate.is_discrete() {
                match candidate.open() {
                    Ok(found) => return Ok(found),
                    Err(error) => tracing::info!(%error, "not used"),
                }
            }
        }
        let last = if cfg!(feature = "cpu") {
            Backend::Cpu
        } else {
            Backend::NdArray
        };
        Self {
            backend: last,
            index: None,
        }
        .open()
    }

    /// Whether the first device of the backend is a GPU of its own, not a processor in disguise.
    fn is_discrete(&self) -> bool {
        match self.backend {
            Backend::Cuda => cuda_driver_is_there(),
            _ => adapters(self.backend).unwrap_or(0) > 0,
        }
    }

    #[allow(clippy::unnecessary_wraps)] // without GPU features nothing here can fail
    fn burn_device(&self) -> Result<BurnDevice> {
        match self.backend {
            #[cfg(feature = "cpu")]
            Backend::Cpu => Ok(BurnDevice::flex()),
            #[cfg(feature = "ndarray")]
            #[allow(deprecated)]
            // by burn, in favour of flex; it stays a second opinion
            Backend::NdArray => Ok(BurnDevice::ndarray()),
            #[cfg(feature = "cuda")]
            Backend::Cuda if !cuda_driver_is_there() => {
                Err(self.unavailable("the CUDA driver library was not found"))
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda => Ok(BurnDevice::cuda(self.index.unwrap_or(0))),
            #[cfg(feature = "wgpu")]
            Backend::Wgpu => Ok(BurnDevice::wgpu(self.kind())),
            #[cfg(feature = "webgpu")]
            Backend::WebGpu => Ok(BurnDevice::webgpu(self.kind())),
            #[cfg(feature = "vulkan")]
            Backend::Vulkan => Ok(BurnDevice::vulkan(self.kind())),
            #[cfg(feature = "metal")]
            Backend::Metal => Ok(BurnDevice::metal(self.kind())),
            _ => Err(self.unavailable("not compiled in")),
        }
    }

    #[cfg(feature = "wgpu")]
    fn kind(&self) -> burn::tensor::DeviceKind {
        use burn::tensor::DeviceKind;
        self.index
            .map_or(DeviceKind::DefaultDevice, DeviceKind::DiscreteGpu)
    }

    /// One small matrix product, whose result is known, and on GPUs our kernels beside the portable
    /// operations, before the device is trusted with a model.
    fn probe(&self, device: &BurnDevice) -> Result<()> {
        let x: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let x = Tensor::<2>::from_data(TensorData::new(x, [2, 3]), device);
        let y = x.clone().matmul(x.transpose()).try_into_data();
        let y = y.map_err(|error| self.unavailable(&format!("{error:?}")))?;
        if y.as_slice::<f32>().ok() != Some(&[5.0, 14.0, 14.0, 50.0]) {
            return Err(self.wrong("a product"));
        }
        #[cfg(feature = "gpu")]
        if self.is_gpu() {
            crate::ops::check(device).map_err(|what| self.wrong(&what))?;
        }
        Ok(())
    }

    fn wrong(&self, what: &str) -> Error {
        self.unavailable(&format!("its self-test gave wrong numbers: {what}"))
            .with_help("update the driver, or use another device; `cpu` works everywhere")
    }

    /// Whether cubecl (0.11) would hand a software driver SPIR-V that ends the process: for devices
    /// without VK_KHR_workgroup_memory_explicit_layout it declares shared memory by its pointer.
    fn would_crash(&self) -> bool {
        cfg!(feature = "vulkan")
            && matches!(self.backend, Backend::Vulkan | Backend::Wgpu)
            && adapters(self.backend) == Some(0)
    }

    fn unavailable(&self, why: &str) -> Error {
        Error::new(ErrorKind::DeviceUnavailable, "device is not available")
            .with_key(self.to_string())
            .with_why(why)
    }

    fn feature(&self) -> &'static str {
        BACKENDS
            .iter()
            .find(|row| row.0 == self.backend)
            .map_or("cpu", |row| row.2)
    }
}

/// How many real GPUs the backend sees; `None` where it cannot tell.
#[cfg(feature = "wgpu")]
fn adapters(backend: Backend) -> Option<usize> {
    use burn::tensor::DeviceType;
    let kind = match backend {
        Backend::Wgpu => DeviceType::Wgpu,
        #[cfg(feature = "vulkan")]
        Backend::Vulkan => DeviceType::Vulkan,
        #[cfg(feature = "metal")]
        Backend::Metal => DeviceType::Metal,
        _ => return None,
    };
    let is_card = |device: &BurnDevice| {
        let identity = device.identity();
        identity.is_some_and(|identity| identity.physical.is_some())
    };
    let count = || {
        let devices = BurnDevice::enumerate(kind);
        devices.into_iter().filter(is_card).count()
    };
    fenced(count).ok()
}

#[cfg(not(feature = "wgpu"))]
fn adapters(_: Backend) -> Option<usize> {
    None
}

/// Whether the driver's library can be loaded; asking the backend would panic without it.
fn cuda_driver_is_there() -> bool {
    let names: &[&str] = if cfg!(windows) {
        &["nvcuda.dll"]
    } else {
        &["libcuda.so.1", "libcuda.so"]
    };
    let folders = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let fixed = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/lib/wsl/lib",
        "/usr/local/nvidia/lib64",
        "C:\\Windows\\System32",
    ];
    folders
        .split(':')
        .chain(fixed)
        .filter(|folder| !folder.is_empty())
        .any(|folder| {
            names
                .iter()
                .any(|name| std::path::Path::new(folder).join(name).exists())
        })
}

impl Default for Device {
    fn default() -> Self {
        Self::auto()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = BACKENDS
            .iter()
            .find(|row| row.0 == self.backend)
            .map_or("auto", |row| row.1);
        match self.index {
            Some(index) => write!(f, "{name}:{index}"),
            None => f.write_str(name),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, index) = match text.split_once(':') {
            Some((name, index)) => (
                name,
                Some(index.parse::<usize>().map_err(|_| unknown(text))?),
            ),
            None => (text, None),
        };
        if name == "auto" && index.is_none() {
            return Ok(Self::auto());
        }
        let row = BACKENDS
            .iter()
            .find(|row| row.1 == name)
            .ok_or_else(|| unknown(text))?;
        let device = Self {
            backend: row.0,
            index,
        };
        if index.is_some() && !device.is_gpu() {
            return Err(unknown(text));
        }
        Ok(device)
    }
}

fn unknown(text: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, "unknown device")
        .with_key("device")
        .with_why(format!("`{}`", text.escape_debug()))
        .with_help("one of auto, cpu, wgpu, vulkan, metal, webgpu, cuda, ndarray; GPUs take an index, as in cuda:1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_strings_round_trip() {
        for text in [
            "auto", "cpu", "wgpu", "wgpu:1", "vulkan", "metal:0", "webgpu", "cuda:3", "ndarray",
        ] {
            assert_eq!(text.parse::<Device>().expect(text).to_string(), text);
        }
        for text in [
            "", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1", "CPU",
        ] {
            let error = text.parse::<Device>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{text}");
        }
    }

    #[test]
    fn a_device_that_is_not_compiled_in_names_the_feature() {
        if let Some(row) = BACKENDS.iter().find(|row| !row.3) {
            let error = row
                .1
                .parse::<Device>()
                .expect("a known name")
                .open()
                .expect_err("not compiled in");
            assert_eq!(error.kind(), ErrorKind::DeviceUnavailable);
            assert!(
                error.help().is_some_and(|help| help.contains(row.2)),
                "{error:?}"
            );
        }
    }
}
