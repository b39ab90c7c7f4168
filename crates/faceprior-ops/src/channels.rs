//! Operations that treat a channel of a picture as one thing, and StyleGAN2's noise.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, apply2, apply3, dims, small_tensor, tensor, values};
use crate::kernels::pointwise::{self, pointwise};
use crate::kernels::{BLOCK, Isa, noise as kernels};
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
        x.map(|x| apply2(ScaleChannels, x, scale))
    } else {
        x.map(|x| reference::scale_channels(x, scale))
    }
}

/// The mean over all pixels, `[N, C]`.
pub fn global_average_pool(x: FeatureMap) -> Tensor<2> {
    let channels = x.channels();
    if x.is_blocked() {
        apply1(GlobalAveragePool { channels }, x.into_blocks())
    } else {
        reference::global_average_pool(x.into_blocks(), channels)
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
        x.map(|x| apply3(AddNoise, x, noise, strength))
    } else {
        x.map(|x| reference::add_noise(x, noise, strength))
    }
}

/// One factor per picture and channel.
#[derive(Clone, Debug)]
struct ScaleChannels;

/// `[N, C]` with zeros up to whole blocks.
fn padded_rows(x: &FlexTensor) -> Vec<f32> {
    let [_, channels] = dims(x);
    values(x)
        .chunks_exact(channels)
        .flat_map(pointwise::padded)
        .collect()
}

/// The first `channels` values of each picture, `[N, C]`.
fn cropped_rows(values: &[f32], n: usize, channels: usize) -> FlexTensor {
    let rows = values.chunks_exact(values.len() / n);
    let cropped: Vec<_> = rows.flat_map(|row| row[..channels].iter().copied()).collect();
    small_tensor(&cropped, [n, channels])
}

impl Function<2> for ScaleChannels {
    type Saved = [FlexTensor; 2];

    fn forward(&self, [x, scale]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        let [n, blocks, ..] = dims::<5>(&x);
        let constants = [padded_rows(&scale)];
        let constants = constants.each_ref().map(Vec::as_slice);
        let (y, []) = pointwise(
            Isa::best(),
            pointwise::Scale {},
            n * blocks,
            [values(&x)],
            constants,
        );
        (tensor(y, dims::<5>(&x)), [x, scale])
    }

    fn backward(&self, [x, scale]: Self::Saved, dy: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let ([n, blocks, ..], [_, channels]) = (dims::<5>(&x), dims(&scale));
        let (inputs, constants) = ([values(&x), values(&dy)], padded_rows(&scale));
        let (dx, [products, _]) = pointwise(
            Isa::best(),
            pointwise::ScaleShiftGradient {},
            n * blocks,
            inputs,
            [&constants],
        );
        [
            Some(tensor(dx, dims::<5>(&x))),
            Some(cropped_rows(&products, n, channels)),
        ]
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

/// Noise times a strength in every channel.
#[derive(Clone, Debug)]
struct AddNoise;

impl Function<3> for AddNoise {
    type Saved = FlexTensor;

    fn forward(&self, [x, noise, strength]: [FlexTensor; 3]) -> (FlexTensor, FlexTensor) {
        let shape @ [_, blocks, h, w, _] = dims(&x);
        let strength = values(&strength)[0];
        let y = kernels::add_noise(Isa::best(), values(&x), blocks, values(&noise), h * w, strength);
        (tensor(y, shape), noise)
    }

    fn backward(&self, noise: FlexTensor, dy: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let [_, blocks, h, w, _] = dims(&dy);
        let strength = kernels::strength_gradient(Isa::best(), values(&dy), blocks, values(&noise), h * w);
        [Some(dy), None, Some(small_tensor(&[strength], [1]))]
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
