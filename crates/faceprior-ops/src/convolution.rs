//! Convolutions.

use burn::tensor::Tensor;

use crate::{FeatureMap, reference, scale_channels};

/// Geometry of a 2-D convolution: square stride and zero padding, no dilation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Distance in pixels between neighbouring outputs.
    pub stride: usize,
    /// Zeros around the input, in pixels.
    pub padding: usize,
    /// Groups of channels that do not mix; `C` groups make a depthwise convolution.
    pub groups: usize,
}

impl Default for Conv2dOptions {
    fn default() -> Self {
        Self {
            stride: 1,
            padding: 0,
            groups: 1,
        }
    }
}

impl Conv2dOptions {
    /// Options of a 3×3 convolution that keeps the size.
    pub fn same3x3() -> Self {
        Self {
            padding: 1,
            ..Self::default()
        }
    }
}

/// Convolution without bias (cross-correlation, as in every deep-learning library).
///
/// # Shapes
/// `weight`: `[O, I/groups, kh, kw]`; output `[N, O, (H + 2·padding − kh)/stride + 1, …]`, rounded down.
pub fn conv2d(x: FeatureMap, weight: Tensor<4>, options: Conv2dOptions) -> FeatureMap {
    let [o, i, _, _] = weight.dims();
    assert_eq!(
        i * options.groups,
        x.channels(),
        "convolution weight does not fit the input's channels"
    );
    FeatureMap::from_blocks(reference::conv2d(x.into_blocks(), weight, options), o)
}

/// StyleGAN2's modulated convolution with odd kernel and "same" padding (Karras et al. 2020, equations 1 and 3).
///
/// Scaling the weights per picture, as the paper writes it, equals scaling the activations: the inputs by the style,
/// then one convolution shared by the batch, then the outputs by the demodulation factor
/// `rsqrt(Σ_{i,k} W[o,i,k]²·s[n,i]² + 1e-8)`.
///
/// # Shapes
/// `weight`: `[O, I, k, k]`; `style`: `[N, I]`; output `[N, O, H, W]`.
pub fn modulated_conv2d(x: FeatureMap, weight: Tensor<4>, style: Tensor<2>, demodulate: bool) -> FeatureMap {
    let options = Conv2dOptions {
        padding: weight.dims()[2] / 2,
        ..Conv2dOptions::default()
    };
    let y = conv2d(scale_channels(x, style.clone()), weight.clone(), options);
    if demodulate {
        scale_channels(y, reference::demodulation(weight, style))
    } else {
        y
    }
}
