//! Tensor operations without parameters for face networks.
//!
//! The bodies of all networks are written on [`FeatureMap`], an activation `[N, C, H, W]` whose memory layout is its
//! own secret, and on the functions of this crate. Nothing here owns a parameter, touches a file or knows a network.
//!
//! Each operation exists once as plain tensor code (the crate's `reference` module), which runs on every device
//! of Burn and differentiates by Burn's autodiff. On the CPU, operations are replaced by kernels with their own
//! gradients; a test of each kernel demands that values and gradients agree with its reference.
//!
//! Layers that a forward-mode tangent crosses (R1 and path-length regularisation need second derivatives, Burn's
//! autodiff gives first ones) have a second form of the same name in [`dual`].
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use faceprior_ops::{Conv2dOptions, FeatureMap, conv2d, relu};
//!
//! let device = Device::flex();
//! let images = Tensor::<4>::zeros([2, 3, 32, 32], &device);
//! let weight = Tensor::<4>::ones([16, 3, 3, 3], &device);
//! let features = relu(conv2d(FeatureMap::from_nchw(images), weight, Conv2dOptions::same3x3()));
//! assert_eq!(features.dims(), [2, 16, 32, 32]);
//! ```
//!
//! # Axis legend
//!
//! `N` pictures, `C` channels (`I` in, `O` out of a convolution), `H` rows, `W` columns, `b` channels in a block.

mod activation;
mod backend;
#[doc(hidden)]
pub mod bench;
mod channels;
mod convolution;
pub mod dual;
mod feature_map;
mod kept;
mod kernels;
mod linear;
mod margin;
mod modulation;
mod normalization;
mod pending;
mod pool;
mod prepared;
mod reference;
mod resampling;
pub mod small;
#[cfg(test)]
mod testing;
mod update;

pub use activation::{BiasActivation, add_bias, bias_activation, leaky_relu, prelu, relu};
pub use channels::{add_noise, global_average_pool, scale_channels};
pub use convolution::{Conv2dOptions, conv2d};
pub use feature_map::{FeatureMap, is_cpu};
pub use kept::Activations;
pub use kernels::crew::lead;
pub use linear::linear;
pub use margin::{TargetMargin, margin_cross_entropy, margin_logits};
pub use modulation::modulated_conv2d;
pub use normalization::{BatchStatistics, batch_norm, batch_norm_train};
pub use resampling::{downsample_smooth, max_pool2d, subsample, upsample_smooth};
pub use update::{AdamStep, RangerStep, SgdStep, adam_step, moving_average, ranger_step, sgd_step};

/// The instruction set that the CPU kernels use: `amx`, `avx512`, `avx2` or `portable`. The best of the processor, unless the
/// environment variable `FACEPRIOR_ISA` names another.
///
/// # Errors
/// The variable names none, or one that this processor lacks. Kernels panic then, so a program asks here first.
pub fn instruction_set() -> Result<&'static str, String> {
    kernels::Isa::chosen().map(kernels::Isa::name)
}
