//! Forward-mode derivatives: operations on pairs of a value and its tangent.
//!
//! A [`Dual`] carries `x` and `ẋ = dx/dt` for one direction `t` of the network's input. Both are ordinary tensors to
//! Burn's autodiff, so a loss built on tangents can be differentiated once more by `backward`: that is how first-order
//! autodiff gives the exact gradient of R1 (the squared gradient of a discriminator) and of path length.
//!
//! Parameters (weights, biases, noise) have no tangent; styles have one, since they depend on the latent code.
//! Nonlinearities are linear in pieces, so the slope at each value is a constant for the second derivative.

use burn::tensor::Tensor;

use crate::activation::bias_activation_tangent;
use crate::channels::scale_channels_tangent;
use crate::modulation::{demodulation, energy};
use crate::{BiasActivation, Conv2dOptions, FeatureMap};

/// A value and its derivative along one direction.
#[derive(Clone, Debug)]
pub struct Dual<T> {
    /// The value.
    pub value: T,
    /// The value's derivative, of the value's shape.
    pub tangent: T,
}

impl<T> Dual<T> {
    /// Applies a linear function, which maps value and tangent alike.
    pub fn linear<U>(self, f: impl Fn(T) -> U) -> Dual<U> {
        Dual {
            value: f(self.value),
            tangent: f(self.tangent),
        }
    }
}

/// [`crate::conv2d`] of a dual.
pub fn conv2d(x: Dual<FeatureMap>, weight: Tensor<4>, options: Conv2dOptions) -> Dual<FeatureMap> {
    if x.value.is_blocked() {
        // Kernels are as fast on the parts as on the whole, which would have to be copied together and apart again.
        return x.linear(|x| crate::conv2d(x, weight.clone(), options));
    }
    let n = x.value.dims()[0];
    let both = FeatureMap::cat_batch(vec![x.value, x.tangent]);
    let (value, tangent) = crate::conv2d(both, weight, options).split_batch(n);
    Dual { value, tangent }
}

/// [`crate::bias_activation`] of a dual.
pub fn bias_activation(
    x: Dual<FeatureMap>,
    bias: Option<Tensor<1>>,
    options: BiasActivation,
) -> Dual<FeatureMap> {
    let tangent = bias_activation_tangent(x.value.clone(), bias.clone(), x.tangent, options);
    Dual {
        value: crate::bias_activation(x.value, bias, options),
        tangent,
    }
}

/// [`crate::scale_channels`] of a dual by a dual: the product rule.
pub fn scale_channels(x: Dual<FeatureMap>, scale: Dual<Tensor<2>>) -> Dual<FeatureMap> {
    let tangent = scale_channels_tangent(x.value.clone(), x.tangent, scale.value.clone(), scale.tangent);
    Dual {
        value: crate::scale_channels(x.value, scale.value),
        tangent,
    }
}

/// [`FeatureMap::mul_scalar`] of a dual.
pub fn mul_scalar(x: Dual<FeatureMap>, factor: f32) -> Dual<FeatureMap> {
    x.linear(|x| x.mul_scalar(factor))
}

/// [`FeatureMap::add`] of duals.
pub fn add(x: Dual<FeatureMap>, y: Dual<FeatureMap>) -> Dual<FeatureMap> {
    Dual {
        value: x.value.add(y.value),
        tangent: x.tangent.add(y.tangent),
    }
}

/// [`crate::add_noise`] to a dual: noise is a constant and leaves the tangent as it is.
pub fn add_noise(x: Dual<FeatureMap>, noise: Tensor<4>, strength: Tensor<1>) -> Dual<FeatureMap> {
    Dual {
        value: crate::add_noise(x.value, noise, strength),
        tangent: x.tangent,
    }
}

/// [`crate::upsample_smooth`] of a dual.
pub fn upsample_smooth(x: Dual<FeatureMap>) -> Dual<FeatureMap> {
    x.linear(crate::upsample_smooth)
}

/// [`crate::downsample_smooth`] of a dual.
pub fn downsample_smooth(x: Dual<FeatureMap>) -> Dual<FeatureMap> {
    x.linear(crate::downsample_smooth)
}

/// [`FeatureMap::flatten`] of a dual.
pub fn flatten(x: Dual<FeatureMap>) -> Dual<Tensor<2>> {
    x.linear(FeatureMap::flatten)
}

/// [`crate::modulated_conv2d`] of a dual by a dual style.
///
/// The demodulation factor `d = (Σ E·s² + 1e-8)^(−1/2)`, with `E[o,i] = Σ_k W²`, moves with the style:
/// `ḋ = −d³ · Σ E·s·ṡ`.
pub fn modulated_conv2d(
    x: Dual<FeatureMap>,
    weight: Tensor<4>,
    style: Dual<Tensor<2>>,
    demodulate: bool,
) -> Dual<FeatureMap> {
    let options = Conv2dOptions::same(weight.dims()[2]);
    let y = conv2d(scale_channels(x, style.clone()), weight.clone(), options);
    if !demodulate {
        return y;
    }
    let energy = energy(weight); // [O, I]
    let factor = demodulation(energy.clone(), style.value.clone()); // [N, O]
    let growth = style.value.mul(style.tangent).matmul(energy.transpose()); // [N, O]
    let tangent = factor.clone().powi_scalar(3).mul(growth).neg();
    scale_channels(
        y,
        Dual {
            value: factor,
            tangent,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random, values};

    /// Checks a dual operation against central differences of its plain form, and that the tangent, an ordinary
    /// tensor, is differentiable: `d⟨v, J·u⟩/du = Jᵀ·v`, which the plain form's backward pass knows.
    fn check<const I: usize>(
        shape: [usize; I],
        plain: impl Fn(Tensor<I>) -> Tensor<4>,
        dual: impl Fn(Dual<Tensor<I>>) -> Dual<Tensor<4>>,
    ) {
        let (x, u) = (random(shape, 1), random(shape, 2));
        let (tracked_x, tracked_u) = (x.clone().require_grad(), u.clone().require_grad());
        let out = dual(Dual {
            value: tracked_x.clone(),
            tangent: tracked_u.clone(),
        });
        assert_close(out.value.clone(), plain(x.clone()), 1e-6);

        let step = 1e-3;
        let above = plain(x.clone().add(u.clone().mul_scalar(step)));
        let below = plain(x.clone().sub(u.clone().mul_scalar(step)));
        let difference = above.sub(below).div_scalar(2.0 * step);
        let (difference, tangent) = (values(difference), values(out.tangent.clone()));
        let off: Vec<_> = difference
            .iter()
            .zip(&tangent)
            .filter(|(d, t)| (*d - *t).abs() > 5e-3 * (1.0 + t.abs()))
            .collect();
        assert!(
            off.len() * 100 < tangent.len(),
            "tangent differs from the differences in {} values",
            off.len()
        );

        let v = random(out.tangent.dims(), 3);
        let by_tangent = tracked_u
            .grad(&out.tangent.mul(v.clone()).sum().backward())
            .expect("tangent is tracked");
        let y = plain(tracked_x.clone());
        let by_value = tracked_x
            .grad(&y.mul(v).sum().backward())
            .expect("value is tracked");
        assert_close(by_tangent, by_value, 1e-5);
    }

    fn map(x: Dual<Tensor<4>>) -> Dual<FeatureMap> {
        x.linear(FeatureMap::from_nchw)
    }

    fn nchw(x: Dual<FeatureMap>) -> Dual<Tensor<4>> {
        x.linear(FeatureMap::into_nchw)
    }

    #[test]
    fn convolution() {
        let weight = random([5, 7, 3, 3], 9);
        let options = Conv2dOptions::same3x3();
        check(
            [2, 7, 5, 4],
            |x| crate::conv2d(FeatureMap::from_nchw(x), weight.clone(), options).into_nchw(),
            |x| nchw(conv2d(map(x), weight.clone(), options)),
        );
    }

    #[test]
    fn activation_with_bias_gain_and_clamp() {
        let bias = random([7], 9);
        let options = BiasActivation {
            negative_slope: 0.2,
            gain: 1.5,
            clamp: Some(1.2),
        };
        check(
            [2, 7, 5, 4],
            |x| crate::bias_activation(FeatureMap::from_nchw(x), Some(bias.clone()), options).into_nchw(),
            |x| nchw(bias_activation(map(x), Some(bias.clone()), options)),
        );
    }

    #[test]
    fn smooth_resampling() {
        check(
            [2, 3, 5, 4],
            |x| crate::upsample_smooth(FeatureMap::from_nchw(x)).into_nchw(),
            |x| nchw(upsample_smooth(map(x))),
        );
        check(
            [2, 3, 6, 4],
            |x| crate::downsample_smooth(FeatureMap::from_nchw(x)).into_nchw(),
            |x| nchw(downsample_smooth(map(x))),
        );
    }

    #[test]
    fn modulated_convolution_in_the_activation_and_in_the_style() {
        let weight = random([6, 7, 3, 3], 9);
        let (image, style) = (random([2, 7, 4, 4], 10), random([2, 7], 11));
        for demodulate in [false, true] {
            check(
                [2, 7, 4, 4],
                |x| {
                    crate::modulated_conv2d(
                        FeatureMap::from_nchw(x),
                        weight.clone(),
                        style.clone(),
                        demodulate,
                    )
                    .into_nchw()
                },
                |x| {
                    let still = Dual {
                        value: style.clone(),
                        tangent: style.zeros_like(),
                    };
                    nchw(modulated_conv2d(map(x), weight.clone(), still, demodulate))
                },
            );
            check(
                [2, 7],
                |s| {
                    crate::modulated_conv2d(
                        FeatureMap::from_nchw(image.clone()),
                        weight.clone(),
                        s,
                        demodulate,
                    )
                    .into_nchw()
                },
                |s| {
                    let still = Dual {
                        value: image.clone(),
                        tangent: image.zeros_like(),
                    };
                    nchw(modulated_conv2d(map(still), weight.clone(), s, demodulate))
                },
            );
        }
    }

    /// The gradient of ‖∂f/∂x‖² with respect to a weight, by tangents and by differences of first derivatives.
    #[test]
    fn a_tangent_gives_second_derivatives() {
        let options = Conv2dOptions::same3x3();
        let activation = BiasActivation {
            negative_slope: 0.2,
            gain: 1.0,
            clamp: None,
        };
        let (x, weight, last) = (
            random([1, 3, 4, 4], 1),
            random([4, 3, 3, 3], 2),
            random([1, 4, 3, 3], 3),
        );
        let net = |x: Tensor<4>, weight: Tensor<4>| {
            let y = crate::bias_activation(
                crate::conv2d(FeatureMap::from_nchw(x), weight, options),
                None,
                activation,
            );
            crate::conv2d(y, last.clone(), options).into_nchw().sum()
        };
        let gradient = |weight: Tensor<4>| {
            let x = x.clone().require_grad();
            x.grad(&net(x.clone(), weight).backward()).expect("x is tracked")
        };
        // The surrogate ⟨∂f/∂x, u⟩ with u = 2·∂f/∂x held fixed has the penalty's gradient.
        let u = Tensor::from_inner(gradient(weight.clone())).mul_scalar(2.0);
        let tracked = weight.clone().require_grad();
        let input = Dual {
            value: FeatureMap::from_nchw(x.clone()),
            tangent: FeatureMap::from_nchw(u),
        };
        let y = bias_activation(conv2d(input, tracked.clone(), options), None, activation);
        let surrogate = conv2d(y, last.clone(), options).tangent.into_nchw().sum();
        let got = values(tracked.grad(&surrogate.backward()).expect("weight is tracked"));

        let penalty = |weight: Tensor<4>| f64::from(values(gradient(weight).square().sum())[0]);
        for index in [0, 17, 50, 107] {
            let mut bump = vec![0.0f32; 108];
            bump[index] = 1e-2;
            let bump = Tensor::<1>::from_floats(bump.as_slice(), &weight.device()).reshape([4, 3, 3, 3]);
            let slope =
                (penalty(weight.clone().add(bump.clone())) - penalty(weight.clone().sub(bump))) / 2e-2;
            assert!(
                (f64::from(got[index]) - slope).abs() < 2e-2 * slope.abs().max(1.0),
                "{} {slope}",
                got[index]
            );
        }
    }
}
