//! Biases and pointwise nonlinearities.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, apply2, apply3, dims, small_tensor, tensor, values};
use crate::kernels::pointwise::{self, over_pictures, padded, pointwise};
use crate::kernels::{BLOCK, Isa};
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
    if x.is_blocked() {
        x.map(|x| apply2(Prelu, x, slope))
    } else {
        x.map(|x| reference::prelu(x, slope))
    }
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
    if !x.is_blocked() {
        return x.map(|x| reference::bias_activation(x, bias, options));
    }
    x.map(|x| match bias {
        Some(bias) => apply2(options, x, bias),
        None => apply1(options, x),
    })
}

/// The derivative of [`bias_activation`] at `x` in the direction `tangent`, the slope taken as a constant.
pub(crate) fn bias_activation_tangent(
    x: FeatureMap,
    bias: Option<Tensor<1>>,
    tangent: FeatureMap,
    options: BiasActivation,
) -> FeatureMap {
    if !x.is_blocked() {
        return tangent.map(|t| reference::bias_activation_tangent(x.into_blocks(), bias, t, options));
    }
    let bias = bias.unwrap_or_else(|| Tensor::zeros([x.channels()], &x.device()));
    let (x, bias) = (x.into_blocks().detach(), bias.detach());
    tangent.map(|tangent| apply3(ActivationTangent(options), x, bias, tangent))
}

/// Parametric ReLU on blocks, and its slope's gradient.
#[derive(Clone, Debug)]
struct Prelu;

impl Function<2> for Prelu {
    type Saved = (FlexTensor, Vec<f32>);

    fn forward(&self, [x, slope]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        let [n, blocks, ..] = dims::<5>(&x);
        let slope = values(&slope).to_vec();
        let (y, []) = pointwise(
            Isa::best(),
            pointwise::Prelu {},
            n * blocks,
            [values(&x)],
            [&padded(&slope)],
        );
        (tensor(y, dims::<5>(&x)), (x, slope))
    }

    fn backward(&self, (x, slope): Self::Saved, dy: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let [n, blocks, ..] = dims::<5>(&x);
        let inputs = [values(&x), values(&dy)];
        let (dx, [slopes]) = pointwise(
            Isa::best(),
            pointwise::PreluGradient {},
            n * blocks,
            inputs,
            [&padded(&slope)],
        );
        let channels = slope.len();
        let slopes = small_tensor(&over_pictures(&slopes, channels), [channels]);
        [Some(tensor(dx, dims::<5>(&x))), Some(slopes)]
    }
}

impl BiasActivation {
    fn limit(self) -> f32 {
        self.clamp.unwrap_or(f32::INFINITY)
    }

    fn value(self, x: &FlexTensor, bias: &[f32]) -> FlexTensor {
        let [n, blocks, ..] = dims::<5>(x);
        let Self {
            negative_slope, gain, ..
        } = self;
        let op = pointwise::BiasActivation {
            negative_slope,
            gain,
            limit: self.limit(),
        };
        let (y, []) = pointwise(Isa::best(), op, n * blocks, [values(x)], [bias]);
        tensor(y, dims::<5>(x))
    }

    /// `dy` times the slope at `x + bias`, and its sums per picture and channel.
    fn times_slope(self, x: &FlexTensor, bias: &[f32], dy: &FlexTensor) -> (FlexTensor, Vec<f32>) {
        let [n, blocks, ..] = dims::<5>(x);
        let Self {
            negative_slope, gain, ..
        } = self;
        let op = pointwise::BiasActivationSlope {
            negative_slope,
            gain,
            limit: self.limit(),
        };
        let (dx, [sums]) = pointwise(Isa::best(), op, n * blocks, [values(x), values(dy)], [bias]);
        (tensor(dx, dims::<5>(x)), sums)
    }
}

impl Function<1> for BiasActivation {
    type Saved = FlexTensor;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        (self.value(&x, &[0.0; BLOCK]), x)
    }

    fn backward(&self, x: FlexTensor, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.times_slope(&x, &[0.0; BLOCK], &dy).0)]
    }
}

impl Function<2> for BiasActivation {
    type Saved = (FlexTensor, Vec<f32>);

    fn forward(&self, [x, bias]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        let bias = values(&bias).to_vec();
        (self.value(&x, &padded(&bias)), (x, bias))
    }

    fn backward(&self, (x, bias): Self::Saved, dy: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let (dx, sums) = self.times_slope(&x, &padded(&bias), &dy);
        [
            Some(dx),
            Some(small_tensor(&over_pictures(&sums, bias.len()), [bias.len()])),
        ]
    }
}

/// A tangent times the activation's slope: linear in the tangent, constant in the rest.
#[derive(Clone, Debug)]
struct ActivationTangent(BiasActivation);

impl Function<3> for ActivationTangent {
    type Saved = (FlexTensor, Vec<f32>);

    fn forward(&self, [x, bias, tangent]: [FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let bias = padded(values(&bias));
        (self.0.times_slope(&x, &bias, &tangent).0, (x, bias))
    }

    fn backward(&self, (x, bias): Self::Saved, dy: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        [None, None, Some(self.0.times_slope(&x, &bias, &dy).0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_twins, random};

    const SHAPE: [usize; 5] = [3, 2, 5, 7, BLOCK];

    fn map(x: Tensor<5>) -> FeatureMap {
        FeatureMap::from_blocks(x, 32)
    }

    #[test]
    fn prelu_agrees_with_its_reference() {
        assert_twins(
            |[x, slope]| prelu(map(x), slope.reshape([32])).into_blocks(),
            |[x, slope]| reference::prelu(x, slope.reshape([32])),
            [SHAPE, [1, 1, 1, 1, 32]],
            1e-6,
        );
    }

    #[test]
    fn bias_activation_agrees_with_its_reference() {
        for (negative_slope, gain, clamp) in [
            (0.2, 1.5, Some(1.0)),
            (0.2, 2.0, None),
            (1.0, 1.0, Some(0.5)),
            (0.0, 1.0, None),
            (1.0, 1.0, None),
        ] {
            let options = BiasActivation {
                negative_slope,
                gain,
                clamp,
            };
            assert_twins(
                |[x, bias]| bias_activation(map(x), Some(bias.reshape([32])), options).into_blocks(),
                |[x, bias]| reference::bias_activation(x, Some(bias.reshape([32])), options),
                [SHAPE, [1, 1, 1, 1, 32]],
                1e-6,
            );
            assert_twins(
                |[x]| bias_activation(map(x), None, options).into_blocks(),
                |[x]| reference::bias_activation(x, None, options),
                [SHAPE],
                1e-6,
            );
            let x = random(SHAPE, 5);
            assert_twins(
                |[t]| bias_activation_tangent(map(x.clone()), None, map(t), options).into_blocks(),
                |[t]| reference::bias_activation_tangent(x.clone(), None, t, options),
                [SHAPE],
                1e-6,
            );
        }
    }

    #[test]
    fn channels_that_do_not_fill_a_block_are_treated_alike() {
        let (x, bias) = (random([2, 5, 3, 3], 1), random([5], 2));
        let y = prelu(
            add_bias(FeatureMap::from_nchw(x.clone()), bias.clone()),
            bias.clone(),
        )
        .into_nchw();
        let biased = x.add(bias.clone().reshape([1, 5, 1, 1]));
        let expected = biased
            .clone()
            .clamp_min(0.0)
            .add(biased.clamp_max(0.0).mul(bias.reshape([1, 5, 1, 1])));
        assert_close(y, expected, 1e-6);
    }
}
