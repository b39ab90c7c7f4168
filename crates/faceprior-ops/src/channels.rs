//! Operations that treat a channel of a picture as one thing, and StyleGAN2's noise.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, apply4, dims, tensor, values};
use crate::kept::Kept;
use crate::kernels::pointwise::{self, pointwise};
use crate::kernels::{BLOCK, Isa};
use crate::pending::{Pending, cropped_rows, overwrite, padded_rows};
use crate::pool::Buffer;
use crate::{FeatureMap, reference};

/// Multiplies each channel of each picture by its own factor: squeeze-and-excitation, modulation, demodulation.
///
/// # Shapes
/// `scale`: `[N, C]`.
pub fn scale_channels(x: FeatureMap, scale: Tensor<2>) -> FeatureMap {
    let [n, c, _, _] = x.dims();
    assert_eq!(scale.dims(), [n, c], "one factor per picture and channel");
    if x.is_blocked() {
        x.pend(Pending::is_linear, |pending| pending.times(scale))
    } else {
        x.map(|x| reference::scale_channels(x, scale))
    }
}

/// The derivative of [`scale_channels`] where map and scale both move: `ẋ · s + x · ṡ`.
pub(crate) fn scale_channels_tangent(
    x: FeatureMap,
    x_tangent: FeatureMap,
    scale: Tensor<2>,
    scale_tangent: Tensor<2>,
) -> FeatureMap {
    if !x.is_blocked() {
        let moved = scale_channels(x_tangent, scale);
        return moved.add(scale_channels(x, scale_tangent));
    }
    let (channels, x, x_tangent) = (x.channels(), x.settled(), x_tangent.settled());
    let product = ScaleTangent {
        kept: [x.kept, x_tangent.kept],
    };
    let y = apply4(product, x.tensor, x_tangent.tensor, scale, scale_tangent);
    FeatureMap::from_blocks(y, channels)
}

/// The mean over all pixels, `[N, C]`.
pub fn global_average_pool(x: FeatureMap) -> Tensor<2> {
    let channels = x.channels();
    if !x.is_blocked() {
        return reference::global_average_pool(x.into_blocks(), channels);
    }
    let pool = |blocks| apply1(GlobalAveragePool { channels }, blocks);
    let (blocks, pending) = x.into_parts();
    // The mean of a factor and a summand's result is that of the mean; where moments were taken, it is known.
    match pending {
        None => pool(blocks.tensor),
        Some(pending) if pending.is_linear() => {
            let mean = match pending.normalization {
                Some(normalization) => normalization.centred_means(),
                None => pool(blocks.tensor),
            };
            mean.mul(pending.scale).add(pending.shift)
        }
        Some(pending) => pool(pending.settle(blocks).tensor),
    }
}

/// Adds one picture of noise to every channel, times a learnt strength (StyleGAN, Karras et al. 2019, section 2).
///
/// # Shapes
/// `noise`: `[N, 1, H, W]`, or `[1, 1, H, W]` for the same noise in every picture; no gradient reaches it.
/// `strength`: `[1]`.
pub fn add_noise(x: FeatureMap, noise: Tensor<4>, strength: Tensor<1>) -> FeatureMap {
    let [n, _, h, w] = x.dims();
    let [noise_n, noise_c, noise_h, noise_w] = noise.dims();
    assert!(
        (noise_n == n || noise_n == 1) && [noise_c, noise_h, noise_w] == [1, h, w],
        "noise of shape {:?} does not fit a feature map of shape {:?}",
        noise.dims(),
        x.dims()
    );
    let noise = noise.detach();
    if x.is_blocked() {
        x.pend(Pending::is_linear, |pending| pending.with_noise(noise, strength))
    } else {
        x.map(|x| reference::add_noise(x, noise, strength))
    }
}

/// The product rule for a factor per picture and channel.
#[derive(Clone, Debug)]
struct ScaleTangent {
    /// The map and its tangent.
    kept: [Kept; 2],
}

impl Function<4> for ScaleTangent {
    type Saved = [FlexTensor; 2];

    fn forward(&self, inputs: [FlexTensor; 4]) -> (FlexTensor, Self::Saved) {
        for (kept, map) in self.kept.iter().zip(&inputs) {
            kept.keep(map);
        }
        let y = self.value(inputs.clone());
        let [_, _, scale, scale_tangent] = inputs;
        (y, [scale, scale_tangent])
    }

    fn value(&self, [x, x_tangent, scale, scale_tangent]: [FlexTensor; 4]) -> FlexTensor {
        let [n, blocks, ..] = dims::<5>(&x);
        let (y, []) = pointwise(
            Isa::best(),
            pointwise::ScaleTangent {},
            n * blocks,
            [values(&x), values(&x_tangent)],
            [&padded_rows(&scale), &padded_rows(&scale_tangent)],
        );
        tensor(y, dims::<5>(&x))
    }

    fn backward(
        &self,
        [scale, scale_tangent]: Self::Saved,
        dy: FlexTensor,
        wanted: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        let n = dims::<2>(&scale)[0];
        // Each side is a product with a constant to the other, and its gradient that of a factor.
        let centre = [0.0; BLOCK];
        let side = |map: &Kept, dy: FlexTensor, factor: &FlexTensor| {
            let [_, channels] = dims(factor);
            let constants: [&[f32]; 2] = [&padded_rows(factor), &centre];
            let (gradient, [products, _]) =
                overwrite(pointwise::ScaleShiftGradient {}, &map.values(), dy, constants);
            (gradient, cropped_rows(&products, n, channels))
        };
        let x_side = (wanted[0] || wanted[3]).then(|| side(&self.kept[0], dy.clone(), &scale_tangent));
        let tangent_side = (wanted[1] || wanted[2]).then(|| side(&self.kept[1], dy, &scale));
        let (dx, scale_tangent) = x_side.unzip();
        let (dx_tangent, scale) = tangent_side.unzip();
        [dx, dx_tangent, scale, scale_tangent]
    }
}

/// Mean over pixels.
#[derive(Clone, Debug)]
struct GlobalAveragePool {
    channels: usize,
}

impl Function<1> for GlobalAveragePool {
    type Saved = [usize; 5];

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Self::Saved) {
        let shape @ [n, blocks, h, w, _] = dims(&x);
        let (_, [mut sums]) = pointwise(Isa::best(), pointwise::Sum {}, n * blocks, [values(&x)], []);
        sums.iter_mut().for_each(|sum| *sum /= (h * w) as f32);
        (cropped_rows(&sums, n, self.channels), shape)
    }

    fn backward(&self, shape: Self::Saved, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [n, blocks, h, w, _] = shape;
        let gradients = padded_rows(&dy);
        let mut dx = Buffer::take(n * blocks * h * w * BLOCK);
        for (dx, dy) in dx
            .chunks_exact_mut(h * w * BLOCK)
            .zip(gradients.chunks_exact(BLOCK))
        {
            let dy: [f32; BLOCK] = std::array::from_fn(|lane| dy[lane] / (h * w) as f32);
            dx.chunks_exact_mut(BLOCK).for_each(|dx| dx.copy_from_slice(&dy));
        }
        [Some(tensor(dx, shape))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_twins, random, values};

    fn map(x: Tensor<5>, channels: usize) -> FeatureMap {
        FeatureMap::from_blocks(x, channels)
    }

    #[test]
    fn scale_channels_agrees_with_its_reference() {
        assert_twins(
            |[x, s]| scale_channels(FeatureMap::from_nchw(x), s.reshape([3, 20])).into_nchw(),
            |[x, s]| x.mul(s),
            [[3, 20, 5, 7], [3, 20, 1, 1]],
            1e-6,
        );
    }

    #[test]
    fn tangent_of_scale_channels_agrees_with_its_reference() {
        assert_twins(
            |[x, t, s, u]| {
                let [x, t] = [x, t].map(FeatureMap::from_nchw);
                let [s, u] = [s, u].map(|s| s.reshape([3, 20]));
                scale_channels_tangent(x, t, s, u).into_nchw()
            },
            |[x, t, s, u]| t.mul(s) + x.mul(u),
            [[3, 20, 5, 7], [3, 20, 5, 7], [3, 20, 1, 1], [3, 20, 1, 1]],
            1e-6,
        );
    }

    #[test]
    fn global_average_pool_agrees_with_its_reference() {
        assert_twins(
            |[x]| global_average_pool(map(x, 30)),
            |[x]| reference::global_average_pool(x, 30),
            [[3, 2, 5, 7, BLOCK]],
            1e-6,
        );
    }

    #[test]
    fn add_noise_agrees_with_its_reference() {
        for n in [1, 3] {
            let noise = random([n, 1, 5, 7], 7);
            assert_twins(
                |[x, s]| add_noise(map(x, 32), noise.clone(), s.reshape([1])).into_blocks(),
                |[x, s]| reference::add_noise(x, noise.clone(), s.reshape([1])),
                [[3, 2, 5, 7, BLOCK], [1, 1, 1, 1, 1]],
                1e-5,
            );
        }
    }

    /// The strength's gradient must not count the padding of the last block.
    #[test]
    fn noise_in_padding_changes_no_gradient() {
        let (x, noise) = (random([1, 3, 2, 2], 1), random([1, 1, 2, 2], 2));
        let strength = Tensor::<1>::ones([1], &x.device()).require_grad();
        let y = add_noise(FeatureMap::from_nchw(x), noise.clone(), strength.clone()).into_nchw();
        let gradient = strength.grad(&y.sum().backward()).expect("strength is tracked");
        assert_close(gradient, noise.sum().mul_scalar(3.0), 1e-6);
        assert_eq!(values(strength), [1.0]);
    }
}
