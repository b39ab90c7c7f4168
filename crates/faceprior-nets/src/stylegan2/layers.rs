//! Layers with equalised learning rate (Karras et al. 2018, section 4.1).
//!
//! Weights start as unit normal numbers and are scaled where they are used, so that an optimiser whose steps do not
//! depend on the gradient's size moves every layer at the same relative speed.
//!
//! Axes: `N` pictures, `I` inputs, `O` outputs, `H`, `W` space, `k` kernel.

use std::f32::consts::SQRT_2;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use faceprior_ops::dual::{self, Dual};
use faceprior_ops::{self as ops, BiasActivation, Conv2dOptions, FeatureMap};

use crate::init::Init;

/// Bound of activations before a layer's extra gain.
pub(super) const CLAMP: f32 = 256.0;

/// The nonlinearity of a layer, with the gain that keeps the variance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// The identity.
    Linear,
    /// Leaky ReLU with slope 0.2, times √2.
    LeakyRelu,
}

impl Activation {
    pub(super) fn slope(self) -> f32 {
        match self {
            Activation::Linear => 1.0,
            Activation::LeakyRelu => 0.2,
        }
    }

    pub(super) fn gain(self) -> f32 {
        match self {
            Activation::Linear => 1.0,
            Activation::LeakyRelu => SQRT_2,
        }
    }
}

/// y = act(W·(m/√I)·x + m·b), with the learning-rate multiplier m.
#[derive(Module, Debug)]
pub struct FullyConnected {
    /// `[O, I]`, starts as normal numbers of standard deviation 1/m.
    pub weight: Param<Tensor<2>>,
    /// `[O]`.
    pub bias: Param<Tensor<1>>,
    #[module(skip)]
    lr_multiplier: f32,
    #[module(skip)]
    activation: Activation,
}

impl FullyConnected {
    /// A fresh layer with bias 0 and multiplier 1.
    pub fn new(init: &mut Init, inputs: usize, outputs: usize, activation: Activation) -> Self {
        Self::with(init, inputs, outputs, activation, 1.0, 0.0)
    }

    /// A fresh layer with a learning-rate multiplier and every bias at `bias`.
    pub fn with(
        init: &mut Init,
        inputs: usize,
        outputs: usize,
        activation: Activation,
        lr_multiplier: f32,
        bias: f32,
    ) -> Self {
        Self {
            weight: init.normal([outputs, inputs], lr_multiplier.recip()),
            bias: init.constant([outputs], bias),
            lr_multiplier,
            activation,
        }
    }

    /// `[N, I]` → `[N, O]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.product(x).add(self.bias().unsqueeze());
        match self.activation {
            Activation::Linear => x,
            Activation::LeakyRelu => {
                activation::leaky_relu(x, f64::from(self.activation.slope())).mul_scalar(SQRT_2)
            }
        }
    }

    /// [`forward`](Self::forward) with a tangent.
    pub fn forward_dual(&self, x: Dual<Tensor<2>>) -> Dual<Tensor<2>> {
        let value = self.forward(x.value);
        let tangent = self.product(x.tangent);
        let tangent = match self.activation {
            Activation::Linear => tangent,
            Activation::LeakyRelu => {
                // The activation keeps the sign, so its output tells the slope.
                let slope = Tensor::full_like(&tangent, SQRT_2).detach();
                let negative = value.clone().detach().lower_elem(0.0);
                tangent.mul(slope.mask_fill(negative, SQRT_2 * self.activation.slope()))
            }
        };
        Dual { value, tangent }
    }

    fn product(&self, x: Tensor<2>) -> Tensor<2> {
        let gain = self.lr_multiplier / (x.dims()[1] as f32).sqrt();
        ops::linear(x, self.weight.val()).mul_scalar(gain)
    }

    fn bias(&self) -> Tensor<1> {
        let bias = self.bias.val();
        if self.lr_multiplier == 1.0 {
            bias
        } else {
            bias.mul_scalar(self.lr_multiplier)
        }
    }
}

/// Convolution of size-keeping padding with the weight W/√(I·k²), then bias, activation, gain and clamp.
#[derive(Module, Debug)]
pub struct EqualizedConv {
    /// `[O, I, k, k]`, starts as unit normal numbers.
    pub weight: Param<Tensor<4>>,
    /// `[O]`, starts at 0.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    gain: f32,
}

impl EqualizedConv {
    /// A fresh convolution with bias.
    pub fn new(
        init: &mut Init,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        activation: Activation,
    ) -> Self {
        let conv = Self::without_bias(init, inputs, outputs, kernel, activation);
        Self {
            bias: Some(init.constant([outputs], 0.0)),
            ..conv
        }
    }

    /// A fresh convolution without bias.
    pub fn without_bias(
        init: &mut Init,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        activation: Activation,
    ) -> Self {
        let weight = init.normal([outputs, inputs, kernel, kernel], 1.0);
        Self {
            weight,
            bias: None,
            activation,
            gain: 1.0,
        }
    }

    /// The same with a gain after the activation, which also scales the clamp.
    pub fn with_gain(self, gain: f32) -> Self {
        Self { gain, ..self }
    }

    /// `[N, I, H, W]` → `[N, O, H, W]`.
    pub fn forward(&self, x: FeatureMap) -> FeatureMap {
        let (weight, options, gain) = self.convolution();
        let y = ops::conv2d(x, weight, options).mul_scalar(gain);
        ops::bias_activation(y, self.bias(), self.after())
    }

    /// [`forward`](Self::forward) with a tangent.
    pub fn forward_dual(&self, x: Dual<FeatureMap>) -> Dual<FeatureMap> {
        let (weight, options, gain) = self.convolution();
        let y = dual::mul_scalar(dual::conv2d(x, weight, options), gain);
        dual::bias_activation(y, self.bias(), self.after())
    }

    /// The weight as it is stored, and the factor √(1/(I·k²)) that the output gets instead of the weight.
    fn convolution(&self) -> (Tensor<4>, Conv2dOptions, f32) {
        let weight = self.weight.val();
        let [_, i, k, _] = weight.dims();
        (
            weight,
            Conv2dOptions::same(k),
            ((i * k * k) as f32).sqrt().recip(),
        )
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    fn after(&self) -> BiasActivation {
        BiasActivation {
            negative_slope: self.activation.slope(),
            gain: self.activation.gain() * self.gain,
            clamp: Some(CLAMP * self.gain),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn fully_connected_scales_weight_and_bias_by_the_multiplier() {
        let mut init = Init::new(1, &Device::flex());
        let mut layer = FullyConnected::with(&mut init, 4, 1, Activation::LeakyRelu, 0.5, 3.0);
        layer.weight = Param::from_data(TensorData::from([[1.0f32, 2.0, 3.0, 4.0]]), init.device());
        let x = Tensor::<2>::from_data([[1.0f32; 4], [-1.0; 4]], init.device());
        // W·x·0.5/√4 = ±2.5, bias 1.5.
        let expected = [4.0 * SQRT_2, -0.2 * SQRT_2];
        for (got, expected) in values(layer.forward(x)).into_iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }

    #[test]
    fn the_gain_scales_the_clamp_of_a_convolution() {
        let mut init = Init::new(1, &Device::flex());
        let mut conv = EqualizedConv::without_bias(&mut init, 1, 1, 1, Activation::Linear).with_gain(0.5);
        conv.weight = Param::from_data(TensorData::new(vec![1.0f32], [1, 1, 1, 1]), init.device());
        let x = Tensor::<4>::from_data([[[[100.0f32, 1000.0]]]], init.device());
        assert_eq!(
            values(conv.forward(FeatureMap::from_nchw(x)).into_nchw()),
            [50.0, 128.0]
        );
    }

    #[test]
    fn the_tangent_of_a_fully_connected_layer_is_its_derivative() {
        let mut init = Init::new(1, &Device::flex());
        let layer = FullyConnected::with(&mut init, 6, 5, Activation::LeakyRelu, 0.5, 0.1);
        let (x, u) = (init.normal_tensor([3, 6]), init.normal_tensor([3, 6]));
        let tangent = layer
            .forward_dual(Dual {
                value: x.clone(),
                tangent: u.clone(),
            })
            .tangent;
        let step = 1e-3;
        let difference = layer.forward(x.clone() + u.clone() * step) - layer.forward(x - u * step);
        for (t, d) in values(tangent).into_iter().zip(values(difference / (2.0 * step))) {
            assert!((t - d).abs() < 1e-2, "{t} {d}");
        }
    }
}
