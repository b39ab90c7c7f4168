//! Operations that treat a channel of a picture as one thing, and StyleGAN2's noise.

use burn::tensor::Tensor;

use crate::{FeatureMap, reference};

/// Multiplies each channel of each picture by its own factor: squeeze-and-excitation, modulation, demodulation.
///
/// # Shapes
/// `scale`: `[N, C]`.
pub fn scale_channels(x: FeatureMap, scale: Tensor<2>) -> FeatureMap {
    let [n, c, _, _] = x.dims();
    assert_eq!(scale.dims(), [n, c], "one factor per picture and channel");
    x.map(|x| reference::scale_channels(x, scale))
}

/// The mean over all pixels, `[N, C]`.
pub fn global_average_pool(x: FeatureMap) -> Tensor<2> {
    let channels = x.channels();
    reference::global_average_pool(x.into_blocks(), channels)
}

/// Adds one picture of noise to every channel, times a learnt strength (StyleGAN, Karras et al. 2019, section 2).
///
/// # Shapes
/// `noise`: `[N, 1, H, W]`, or `[1, 1, H, W]` for the same noise in every picture; `strength`: `[1]`.
pub fn add_noise(x: FeatureMap, noise: Tensor<4>, strength: Tensor<1>) -> FeatureMap {
    let [n, _, h, w] = x.dims();
    let [noise_n, noise_c, noise_h, noise_w] = noise.dims();
    assert!(
        (noise_n == n || noise_n == 1) && [noise_c, noise_h, noise_w] == [1, h, w],
        "noise of shape {:?} does not fit a feature map of shape {:?}",
        noise.dims(),
        x.dims()
    );
    x.map(|x| reference::add_noise(x, noise, strength))
}
