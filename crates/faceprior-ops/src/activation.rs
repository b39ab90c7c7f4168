//! Biases and pointwise nonlinearities.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply4, apply5, dims, values};
use crate::feature_map::Blocks;
use crate::kept::Kept;
use crate::kernels::pointwise;
use crate::pending::{Activation, Constants, GradientPath, Pending, overwrite};
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
    assert_eq!(bias.dims(), [x.channels()], "one bias per channel");
    if x.is_blocked() {
        x.pend(Pending::takes_summands, |pending| pending.plus(bias.unsqueeze()))
    } else {
        x.map(|x| reference::add_bias(x, bias))
    }
}

/// Parametric ReLU: `max(x, 0) + slope · min(x, 0)` with one slope per channel (He et al. 2015, equation 1).
///
/// # Shapes
/// `slope`: `[C]`.
pub fn prelu(x: FeatureMap, slope: Tensor<1>) -> FeatureMap {
    assert_eq!(slope.dims(), [x.channels()], "one PReLU slope per channel");
    if x.is_blocked() {
        x.pend(Pending::is_linear, |pending| pending.with_slope(slope))
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
    let channels = x.channels();
    let (x, pending) = with_bias(x, bias);
    FeatureMap::from_blocks(pending.activate(x, options.into()), channels)
}

/// The map without what is pending, to which the bias is added.
fn with_bias(x: FeatureMap, bias: Option<Tensor<1>>) -> (Blocks, Pending) {
    let channels = x.channels();
    let (blocks, pending) = x
        .pend(Pending::takes_summands, |pending| match bias {
            Some(bias) => pending.plus(bias.unsqueeze()),
            None => pending,
        })
        .into_parts();
    let pending = pending.unwrap_or_else(|| Pending::identity(channels, &blocks.tensor));
    (blocks, pending)
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
    let (x, pending) = with_bias(x, bias);
    let tangent_of = ActivationTangent {
        activation: options.into(),
        path: pending.path(),
        kept: x.kept,
    };
    let x = x.tensor.detach();
    let Pending {
        scale, shift, noise, ..
    } = pending;
    let (scale, shift) = (scale.detach(), shift.detach());
    tangent.map(|tangent| match noise {
        Some((noise, strength)) => {
            let noise = noise.mul(strength.reshape([1, 1, 1, 1])).detach();
            apply5(tangent_of, x, scale, shift, noise, tangent)
        }
        None => apply4(tangent_of, x, scale, shift, tangent),
    })
}

impl From<BiasActivation> for Activation {
    fn from(options: BiasActivation) -> Self {
        Self {
            negative_slope: options.negative_slope,
            gain: options.gain,
            limit: options.clamp.unwrap_or(f32::INFINITY),
        }
    }
}

/// A tangent times the activation's slope: linear in the tangent, constant in the rest.
#[derive(Clone, Debug)]
struct ActivationTangent {
    activation: Activation,
    path: Option<GradientPath>,
    kept: Kept,
}

impl ActivationTangent {
    fn constants(&self, scale: &FlexTensor, shift: &FlexTensor) -> Constants {
        let [_, channels] = dims(scale);
        let slope = vec![self.activation.negative_slope; channels];
        Constants::new(scale, shift, &slope, self.path.as_ref())
    }

    fn times_slope(
        &self,
        x: &FlexTensor,
        constants: &Constants,
        noise: Option<&FlexTensor>,
        tangent: FlexTensor,
    ) -> FlexTensor {
        let [_, blocks, h, w, _] = dims(x);
        let Activation { gain, limit, .. } = self.activation;
        let constants = constants.as_slices();
        let Some(noise) = noise else {
            return overwrite(pointwise::ActivationSlope { gain, limit }, x, tangent, constants).0;
        };
        let op = pointwise::NoisyActivation {
            activation: pointwise::Activation { gain, limit },
            noise: pointwise::Noise::new(values(noise), blocks, h * w),
            strength: 1.0,
        };
        overwrite(op, x, tangent, constants).0
    }
}

impl Function<4> for ActivationTangent {
    type Saved = Constants;

    fn forward(&self, [x, scale, shift, tangent]: [FlexTensor; 4]) -> (FlexTensor, Constants) {
        self.kept.keep(&x);
        let constants = self.constants(&scale, &shift);
        (self.times_slope(&x, &constants, None, tangent), constants)
    }

    fn value(&self, [x, scale, shift, tangent]: [FlexTensor; 4]) -> FlexTensor {
        self.times_slope(&x, &self.constants(&scale, &shift), None, tangent)
    }

    fn backward(&self, constants: Constants, dy: FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let tangent = self.times_slope(&self.kept.values(), &constants, None, dy);
        [None, None, None, Some(tangent)]
    }
}

impl Function<5> for ActivationTangent {
    type Saved = (Constants, FlexTensor);

    fn forward(&self, [x, scale, shift, noise, tangent]: [FlexTensor; 5]) -> (FlexTensor, Self::Saved) {
        self.kept.keep(&x);
        let constants = self.constants(&scale, &shift);
        let y = self.times_slope(&x, &constants, Some(&noise), tangent);
        (y, (constants, noise))
    }

    fn value(&self, [x, scale, shift, noise, tangent]: [FlexTensor; 5]) -> FlexTensor {
        self.times_slope(&x, &self.constants(&scale, &shift), Some(&noise), tangent)
    }

    fn backward(
        &self,
        (constants, noise): Self::Saved,
        dy: FlexTensor,
        _: [bool; 5],
    ) -> [Option<FlexTensor>; 5] {
        let tangent = self.times_slope(&self.kept.values(), &constants, Some(&noise), dy);
        [None, None, None, None, Some(tangent)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::BLOCK;
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
