//! Devices by name: what `--device` accepts, what this build and machine offer, and what is missing.

use std::path::PathBuf;

use burn::tensor::Device;

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The text is not a device name.
    #[error("unknown device {0:?}, expected auto, cpu, cuda[:N], rocm[:N], vulkan[:N], metal or wgpu[:N]")]
    Unknown(String),
    /// The program was built without the device's feature.
    #[error(
        "this build has no {device} support\nhint: build it with `cargo build --release --features {feature}`"
    )]
    NotBuilt {
        /// The device asked for.
        device: String,
        /// The Cargo feature that brings it.
        feature: &'static str,
    },
    /// The device's driver or compiler is not on this machine.
    #[error("{device} cannot be used here: {missing}\nhint: {cure}")]
    Missing {
        /// The device asked for.
        device: String,
        /// What was looked for and not found.
        missing: String,
        /// How to mend it.
        cure: String,
    },
}

/// Opens a device by name: `auto`, `cpu`, `cuda`, `cuda:1`, `rocm:0`, `vulkan`, `vulkan:0`, `metal`,
/// `wgpu`.
///
/// `auto` is the first GPU that this build and machine can use, else the CPU: never a GPU imitated by software.
///
/// # Errors
/// A name that is none of these, a device this build lacks, or one whose driver or run-time compiler is missing.
pub fn open(name: &str) -> Result<Device, DeviceError> {
    let unknown = || DeviceError::Unknown(name.to_owned());
    let (kind, index) = match name.split_once(':') {
        None => (name, None),
        Some((kind, index)) => (kind, Some(index.parse::<usize>().map_err(|_| unknown())?)),
    };
    match (kind, index) {
        ("auto", None) => Ok(["cuda", "rocm", "metal", "vulkan", "wgpu"]
            .into_iter()
            .find_map(|kind| open(kind).ok().filter(|device| !is_software(device)))
            .unwrap_or_else(Device::flex)),
        ("cpu", None) => Ok(Device::flex()),
        ("cuda", index) => cuda(name, index.unwrap_or(0)),
        ("rocm", index) => rocm(name, index.unwrap_or(0)),
        ("vulkan", index) => vulkan(name, index),
        ("metal", None) => metal(name),
        ("wgpu", index) => wgpu(name, index),
        _ => Err(unknown()),
    }
}

/// A device's name for logs and reports, such as `cpu` or `cuda`.
pub fn describe(device: &Device) -> String {
    let debug = format!("{device:?}").to_lowercase();
    ["flex", "cuda", "hip", "vulkan", "metal", "wgpu"]
        .into_iter()
        .find(|kind| debug.contains(kind))
        .map_or(debug.clone(), |kind| match kind {
            "flex" => "cpu".to_owned(),
            "hip" => "rocm".to_owned(),
            kind => kind.to_owned(),
        })
}

/// The processor's name, where the system tells it.
pub fn processor() -> String {
    let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    listed
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or(std::env::consts::ARCH, |(_, name)| name.trim())
        .to_owned()
}

/// The GPU features this program was built with.
pub fn built_features() -> Vec<&'static str> {
    [
        ("cuda", cfg!(feature = "cuda")),
        ("rocm", cfg!(feature = "rocm")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("metal", cfg!(feature = "metal")),
        ("wgpu", cfg!(feature = "wgpu")),
    ]
    .into_iter()
    .filter_map(|(feature, built)| built.then_some(feature))
    .collect()
}

/// What CUDA needs at run time and this machine lacks, with the cure; empty where all is there.
///
/// Kernels are compiled when they are first used, by NVIDIA's run-time compiler and its headers, so the
/// driver alone is not enough.
pub fn missing_for_cuda() -> Vec<(String, String)> {
    let mut missing = Vec::new();
    if !library_exists("libcuda.so") {
        missing.push((
            "NVIDIA's driver library libcuda.so was not found".to_owned(),
            "install NVIDIA's driver, or use --device cpu".to_owned(),
        ));
    }
    if !library_exists("libnvrtc.so") {
        missing.push((
            "CUDA's run-time compiler libnvrtc.so was not found".to_owned(),
            "install the CUDA toolkit's nvrtc package and add its folder to LD_LIBRARY_PATH".to_owned(),
        ));
    }
    let header = cuda_root().map(|root| root.join("include/cuda_runtime.h"));
    if !header.as_ref().is_some_and(|header| header.is_file()) {
        missing.push((
            match header {
                Some(header) => format!("CUDA's header {} was not found", header.display()),
                None => "no CUDA toolkit was found (CUDA_PATH, /usr/local/cuda, /opt/cuda)".to_owned(),
            },
            "install the CUDA toolkit's headers and set CUDA_PATH to the folder that holds include/"
                .to_owned(),
        ));
    }
    missing
}

fn cuda_root() -> Option<PathBuf> {
    std::env::var_os("CUDA_PATH")
        .map(PathBuf::from)
        .into_iter()
        .chain(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from))
        .find(|root| root.is_dir())
}

/// Whether a shared library, or a numbered version of it, lies where the loader looks.
fn library_exists(stem: &str) -> bool {
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&listed).collect();
    folders.extend(
        [
            "/lib",
            "/lib64",
            "/usr/lib",
            "/usr/lib64",
            "/lib/x86_64-linux-gnu",
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/local/nvidia/lib64",
            "/usr/lib/wsl/lib",
        ]
        .map(PathBuf::from),
    );
    folders.extend(cuda_root().into_iter().map(|root| root.join("lib64")));
    folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .flatten()
        .any(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(stem))
        })
}

#[cfg(feature = "cuda")]
fn cuda(name: &str, index: usize) -> Result<Device, DeviceError> {
    if let Some((missing, cure)) = missing_for_cuda().into_iter().next() {
        return Err(DeviceError::Missing {
            device: name.to_owned(),
            missing,
            cure,
        });
    }
    Ok(Device::cuda(index))
}

#[cfg(not(feature = "cuda"))]
fn cuda(name: &str, _index: usize) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt {
        device: name.to_owned(),
        feature: "cuda",
    })
}

#[cfg(feature = "rocm")]
fn rocm(name: &str, index: usize) -> Result<Device, DeviceError> {
    if !library_exists("libamdhip64.so") {
        return Err(DeviceError::Missing {
            device: name.to_owned(),
            missing: "AMD's HIP library libamdhip64.so was not found".to_owned(),
            cure: "install ROCm and add its lib folder to LD_LIBRARY_PATH".to_owned(),
        });
    }
    Ok(Device::rocm(index))
}

#[cfg(not(feature = "rocm"))]
fn rocm(name: &str, _index: usize) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt {
        device: name.to_owned(),
        feature: "rocm",
    })
}

#[cfg(feature = "vulkan")]
fn vulkan(name: &str, index: Option<usize>) -> Result<Device, DeviceError> {
    use burn::tensor::{DeviceKind, DeviceType};

    let missing = || DeviceError::Missing {
        device: name.to_owned(),
        missing: "no Vulkan device was found".to_owned(),
        cure: "install your GPU's Vulkan driver, or use --device cpu".to_owned(),
    };
    if !library_exists("libvulkan.so") {
        return Err(missing());
    }
    match index {
        Some(index) => Ok(Device::vulkan(DeviceKind::DiscreteGpu(index))),
        None => best(Device::enumerate(DeviceType::Vulkan)).ok_or_else(missing),
    }
}

#[cfg(not(feature = "vulkan"))]
fn vulkan(name: &str, _index: Option<usize>) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt {
        device: name.to_owned(),
        feature: "vulkan",
    })
}

#[cfg(feature = "metal")]
fn metal(_name: &str) -> Result<Device, DeviceError> {
    Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice))
}

#[cfg(not(feature = "metal"))]
fn metal(name: &str) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt {
        device: name.to_owned(),
        feature: "metal",
    })
}

#[cfg(feature = "wgpu")]
fn wgpu(name: &str, index: Option<usize>) -> Result<Device, DeviceError> {
    use burn::tensor::{DeviceKind, DeviceType};

    match index {
        Some(index) => Ok(Device::wgpu(DeviceKind::DiscreteGpu(index))),
        None => best(Device::enumerate(DeviceType::Wgpu)).ok_or_else(|| DeviceError::Missing {
            device: name.to_owned(),
            missing: "no device of Vulkan, Metal or DirectX 12 was found".to_owned(),
            cure: "install your GPU's driver, or Mesa's software one (Debian: mesa-vulkan-drivers), or use --device \
                   cpu"
                .to_owned(),
        }),
    }
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(name: &str, _index: Option<usize>) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt {
        device: name.to_owned(),
        feature: "wgpu",
    })
}

/// The first GPU, or else the first device.
#[cfg(any(feature = "vulkan", feature = "wgpu"))]
fn best(devices: impl IntoIterator<Item = Device>) -> Option<Device> {
    let devices: Vec<_> = devices.into_iter().collect();
    let gpu = devices.iter().position(|device| !is_software(device));
    devices.into_iter().nth(gpu.unwrap_or(0))
}

/// Whether a graphics device is imitated by the processor, as Mesa's lavapipe is.
fn is_software(device: &Device) -> bool {
    format!("{device:?}").contains("kind: Cpu")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(matches!(open("gpu"), Err(DeviceError::Unknown(_))));
        assert!(matches!(open("cuda:x"), Err(DeviceError::Unknown(_))));
        assert!(matches!(open("cpu:3"), Err(DeviceError::Unknown(_))));
        assert_eq!(describe(&open("cpu").expect("the CPU is always there")), "cpu");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_missing_feature_names_its_cure() {
        let message = open("cuda:0").expect_err("built without cuda").to_string();
        assert!(message.contains("--features cuda"), "{message}");
    }
}
