//! Biases and pointwise nonlinearities.

use burn::tensor::Tensor;

use crate::{FeatureMap, reference};

/// What follows a convolution in StyleGAN2 after its bias: leaky ReLU, a gain, a clamp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BiasActivation {
    /// Slope of the leaky ReLU below zero; 1 makes it the identity.
    pub negative_slope: f32,
    /// Factor after the nonlinearity.
    pub gain: f32,
    /// Bound of the absolute value after the gain.
    pub clamp: Option<f32>,
}

/// Adds one bias per channel.
///
/// # Shapes
/// `bias`: `[C]`.
pub fn add_bias(x: FeatureMap, bias: Tensor<1>) -> FeatureMap {
    bias_activation(
        x,
        Some(bias),
        BiasActivation {
            negative_slope: 1.0,
            gain: 1.0,
            clamp: None,
        },
    )
}

/// Parametric ReLU: `max(x, 0) + slope · min(x, 0)` with one slope per channel (He et al. 2015, equation 1).
///
/// # Shapes
/// `slope`: `[C]`.
pub fn prelu(x: FeatureMap, slope: Tensor<1>) -> FeatureMap {
    assert_eq!(slope.dims(), [x.channels()], "one PReLU slope per channel");
    x.map(|x| reference::prelu(x, slope))
}

/// `max(x, 0)`.
pub fn relu(x: FeatureMap) -> FeatureMap {
    leaky_relu(x, 0.0)
}

/// `max(x, 0) + negative_slope · min(x, 0)`.
pub fn leaky_relu(x: FeatureMap, negative_slope: f32) -> FeatureMap {
    bias_activation(
        x,
        None,
        BiasActivation {
            negative_slope,
            gain: 1.0,
            clamp: None,
        },
    )
}

/// Adds a bias per channel, then leaky ReLU, gain and clamp (StyleGAN2's `bias_act`).
///
/// # Shapes
/// `bias`: `[C]`.
pub fn bias_activation(x: FeatureMap, bias: Option<Tensor<1>>, options: BiasActivation) -> FeatureMap {
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [x.channels()], "one bias per channel");
    }
    x.map(|x| reference::bias_activation(x, bias, options))
}
