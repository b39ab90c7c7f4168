//! The discriminator: picture to logit (Karras et al. 2020, figure 7c, residual).
//!
//! ```text
//! net.0      1×1 convolution from RGB
//! net.n      block: √½·(conv1(downsample(conv0(x))) + skip(downsample(x)))
//! net.last   minibatch standard deviation, 3×3 convolution, two linear layers
//! ```
//! Axes: `N` pictures, `C` channels, `H`, `W` space, `G` pictures of a group, `M` = N/G groups.

use std::f32::consts::FRAC_1_SQRT_2;

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::{Device, Tensor};
use faceprior_ops::dual::{self, Dual};
use faceprior_ops::{self as ops, FeatureMap};
use serde::{Deserialize, Serialize};

use super::layers::{Activation, EqualizedConv, FullyConnected};
use super::{channels, check_size, resolutions};
use crate::init::Init;
use crate::weights::{Weights, WeightsError};

/// What a discriminator is built from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscriminatorConfig {
    /// Height and width of the pictures: a power of two, at least 8.
    pub resolution: usize,
    /// Channels at resolution r are `channel_base`/r, at most `channel_max`.
    pub channel_base: usize,
    /// See `channel_base`.
    pub channel_max: usize,
}

impl DiscriminatorConfig {
    /// A fresh discriminator.
    ///
    /// # Panics
    /// If [`check`](Self::check) refuses the config.
    pub fn init(&self, init: &mut Init) -> Discriminator {
        if let Err(problem) = self.check() {
            panic!("{problem}");
        }
        Discriminator {
            net: Net::new(init, self),
            config: self.clone(),
        }
    }

    /// Whether a network can be built from these numbers.
    ///
    /// # Errors
    /// The first number that is out of range.
    pub fn check(&self) -> Result<(), String> {
        check_size(self.resolution, self.channel_base, self.channel_max)
    }

    fn channels(&self, resolution: usize) -> usize {
        channels(self.channel_base, self.channel_max, resolution)
    }
}

/// Tells pictures of the real set from generated ones.
#[derive(Module, Debug)]
pub struct Discriminator {
    /// The layers; the state dict numbers them.
    pub net: Net,
    #[module(skip)]
    config: DiscriminatorConfig,
}

impl Discriminator {
    /// The kind under which its weights are written.
    pub const KIND: &str = "discriminator";

    /// Pictures `[N, 3, R, R]` → logits `[N, 1]`, positive for pictures that look real.
    ///
    /// Pictures of a batch see each other through the minibatch standard deviation.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.net.from_rgb.forward(FeatureMap::from_nchw(images)); // [N, C, R, R]
        let x = self.net.blocks.iter().fold(x, |x, block| block.forward(x)); // [N, C, 4, 4]
        self.net.epilogue.forward(x)
    }

    /// [`forward`](Self::forward) with a tangent of the pictures.
    pub fn forward_dual(&self, images: Dual<Tensor<4>>) -> Dual<Tensor<2>> {
        let x = self
            .net
            .from_rgb
            .forward_dual(images.linear(FeatureMap::from_nchw));
        let x = self.net.blocks.iter().fold(x, |x, block| block.forward_dual(x));
        self.net.epilogue.forward_dual(x)
    }

    /// The outputs of the blocks, from fine to coarse: `[N, C, R/2, R/2]` … `[N, C, 4, 4]`.
    ///
    /// The blocks are convolutional, so pictures of any size will do; odd sides are halved upwards.
    pub fn features(&self, images: Tensor<4>) -> Vec<FeatureMap> {
        let mut x = self.net.from_rgb.forward(FeatureMap::from_nchw(images));
        let block = |block: &DiscriminatorBlock| {
            x = block.forward(x.clone());
            x.clone()
        };
        self.net.blocks.iter().map(block).collect()
    }

    /// What this network was built from.
    pub fn config(&self) -> &DiscriminatorConfig {
        &self.config
    }

    /// The weights under PyTorch's names, with kind and config.
    pub fn to_weights(&self) -> Weights {
        let mut weights = Weights::from_module(self, "");
        weights.describe(Self::KIND, &self.config);
        weights
    }

    /// Builds the network that the file describes.
    ///
    /// # Errors
    /// [`WeightsError`] if the file holds something else or not all of it.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        let config: DiscriminatorConfig = weights.config(Self::KIND)?;
        config.check().map_err(|problem| WeightsError::Description {
            origin: weights.origin(),
            problem,
        })?;
        let fresh = config.init(&mut Init::new(0, device));
        weights
            .subset(|name| !name.ends_with(".kernel"))
            .load_into(fresh, "")
    }
}

/// The layers of a discriminator, numbered from 0 in the state dict.
#[derive(Clone, Debug)]
pub struct Net {
    /// `0`.
    pub from_rgb: EqualizedConv,
    /// `1` and up, from fine to coarse.
    pub blocks: Vec<DiscriminatorBlock>,
    /// The last number.
    pub epilogue: Epilogue,
}

impl Net {
    fn new(init: &mut Init, config: &DiscriminatorConfig) -> Self {
        let mut resolutions: Vec<_> = resolutions(config.resolution).skip(1).collect();
        resolutions.reverse();
        let from_rgb = EqualizedConv::new(
            init,
            3,
            config.channels(config.resolution),
            1,
            Activation::LeakyRelu,
        );
        let blocks = resolutions
            .into_iter()
            .map(|res| DiscriminatorBlock::new(init, config.channels(res), config.channels(res / 2)))
            .collect();
        Self {
            from_rgb,
            blocks,
            epilogue: Epilogue::new(init, config.channels(4)),
        }
    }
}

// Written out because numbers cannot be names of fields.
impl Module for Net {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.from_rgb.collect_devices(devices);
        self.epilogue
            .collect_devices(self.blocks.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        Self {
            from_rgb: self.from_rgb.fork(device),
            blocks: self.blocks.fork(device),
            epilogue: self.epilogue.fork(device),
        }
    }

    fn to_device(self, device: &Device) -> Self {
        Self {
            from_rgb: self.from_rgb.to_device(device),
            blocks: self.blocks.to_device(device),
            epilogue: self.epilogue.to_device(device),
        }
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        const TYPE: &str = "Struct:Net";
        visitor.enter_module("0", TYPE);
        self.from_rgb.visit(visitor);
        visitor.exit_module("0", TYPE);
        for (index, block) in self.blocks.iter().enumerate() {
            let name = (index + 1).to_string();
            visitor.enter_module(&name, TYPE);
            block.visit(visitor);
            visitor.exit_module(&name, TYPE);
        }
        let name = (self.blocks.len() + 1).to_string();
        visitor.enter_module(&name, TYPE);
        self.epilogue.visit(visitor);
        visitor.exit_module(&name, TYPE);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        const TYPE: &str = "Struct:Net";
        let last = (self.blocks.len() + 1).to_string();
        mapper.enter_module("0", TYPE);
        let from_rgb = self.from_rgb.map(mapper);
        mapper.exit_module("0", TYPE);
        let map_block = |(index, block): (usize, DiscriminatorBlock)| {
            let name = (index + 1).to_string();
            mapper.enter_module(&name, TYPE);
            let block = block.map(mapper);
            mapper.exit_module(&name, TYPE);
            block
        };
        let blocks = self.blocks.into_iter().enumerate().map(map_block).collect();
        mapper.enter_module(&last, TYPE);
        let epilogue = self.epilogue.map(mapper);
        mapper.exit_module(&last, TYPE);
        Self {
            from_rgb,
            blocks,
            epilogue,
        }
    }

    fn valid(&self) -> Self {
        Self {
            from_rgb: self.from_rgb.valid(),
            blocks: self.blocks.valid(),
            epilogue: self.epilogue.valid(),
        }
    }

    fn train(self) -> Self {
        Self {
            from_rgb: self.from_rgb.train(),
            blocks: self.blocks.train(),
            epilogue: self.epilogue.train(),
        }
    }

    fn materialize(self) -> Self {
        Self {
            from_rgb: self.from_rgb.materialize(),
            blocks: self.blocks.materialize(),
            epilogue: self.epilogue.materialize(),
        }
    }
}

impl ModuleDisplayDefault for Net {
    fn content(&self, content: Content) -> Option<Content> {
        let mut content = content.add("0", &self.from_rgb);
        for (index, block) in self.blocks.iter().enumerate() {
            content = content.add(&(index + 1).to_string(), block);
        }
        content
            .add(&(self.blocks.len() + 1).to_string(), &self.epilogue)
            .optional()
    }
}

impl ModuleDisplay for Net {}

/// Halves the resolution: two convolutions beside a skip connection.
#[derive(Module, Debug)]
pub struct DiscriminatorBlock {
    /// 3×3 at the block's resolution.
    pub conv0: EqualizedConv,
    /// 3×3 at half the resolution.
    pub conv1: EqualizedConv,
    /// 1×1 at half the resolution, without bias.
    pub skip: EqualizedConv,
}

impl DiscriminatorBlock {
    fn new(init: &mut Init, inputs: usize, outputs: usize) -> Self {
        Self {
            conv0: EqualizedConv::new(init, inputs, inputs, 3, Activation::LeakyRelu),
            conv1: EqualizedConv::new(init, inputs, outputs, 3, Activation::LeakyRelu)
                .with_gain(FRAC_1_SQRT_2),
            skip: EqualizedConv::without_bias(init, inputs, outputs, 1, Activation::Linear)
                .with_gain(FRAC_1_SQRT_2),
        }
    }

    /// `[N, I, H, W]` → `[N, O, H/2, W/2]`.
    fn forward(&self, x: FeatureMap) -> FeatureMap {
        let skip = self.skip.forward(ops::downsample_smooth(x.clone()));
        let x = self.conv0.forward(x); // [N, I, H, W]
        self.conv1.forward(ops::downsample_smooth(x)).add(skip) // [N, O, H/2, W/2]
    }

    fn forward_dual(&self, x: Dual<FeatureMap>) -> Dual<FeatureMap> {
        let skip = self.skip.forward_dual(dual::downsample_smooth(x.clone()));
        let x = self.conv0.forward_dual(x);
        dual::add(self.conv1.forward_dual(dual::downsample_smooth(x)), skip)
    }
}

/// The end of a discriminator, at 4×4.
#[derive(Module, Debug)]
pub struct Epilogue {
    /// 3×3 on C + 1 channels; the extra one is the minibatch standard deviation.
    pub conv: EqualizedConv,
    /// 16·C → C.
    pub fc: FullyConnected,
    /// C → 1.
    pub out: FullyConnected,
}

impl Epilogue {
    fn new(init: &mut Init, channels: usize) -> Self {
        Self {
            conv: EqualizedConv::new(init, channels + 1, channels, 3, Activation::LeakyRelu),
            fc: FullyConnected::new(init, channels * 16, channels, Activation::LeakyRelu),
            out: FullyConnected::new(init, channels, 1, Activation::Linear),
        }
    }

    /// `[N, C, 4, 4]` → `[N, 1]`.
    fn forward(&self, x: FeatureMap) -> Tensor<2> {
        let x = x.into_nchw();
        let deviation = minibatch_deviation(x.clone()); // [N, 1, 4, 4]
        let x = FeatureMap::from_nchw(Tensor::cat(vec![x, deviation], 1)); // [N, C + 1, 4, 4]
        let x = self.conv.forward(x).flatten(); // [N, 16·C]
        self.out.forward(self.fc.forward(x)) // [N, 1]
    }

    fn forward_dual(&self, x: Dual<FeatureMap>) -> Dual<Tensor<2>> {
        let x = x.linear(FeatureMap::into_nchw);
        let deviation = minibatch_deviation_dual(x.clone());
        let with_deviation = |x, deviation| FeatureMap::from_nchw(Tensor::cat(vec![x, deviation], 1));
        let x = Dual {
            value: with_deviation(x.value, deviation.value),
            tangent: with_deviation(x.tangent, deviation.tangent),
        };
        let x = dual::flatten(self.conv.forward_dual(x));
        self.out.forward_dual(self.fc.forward_dual(x))
    }
}

const LARGEST_GROUP: usize = 4;
const DEVIATION_EPS: f32 = 1e-8;

/// The size of the groups that `n` pictures are compared in: the largest divisor of n up to 4.
fn group_size(n: usize) -> usize {
    (1..=LARGEST_GROUP.min(n))
        .rev()
        .find(|size| n.is_multiple_of(*size))
        .unwrap_or(1)
}

/// The standard deviation over a group of pictures, averaged over channels and space, as a channel of its own
/// (Karras et al. 2018, section 3). Picture n is in group n mod M.
///
/// `[N, C, H, W]` → `[N, 1, H, W]`.
fn minibatch_deviation(x: Tensor<4>) -> Tensor<4> {
    let shape = x.dims();
    let centred = centre(x); // [G, M, C·H·W]
    spread(deviation(centred).mean_dim(1), shape)
}

/// σ = √(v + ε) moves by σ̇ = mean_G((x − μ)·(ẋ − μ̇))/σ.
fn minibatch_deviation_dual(x: Dual<Tensor<4>>) -> Dual<Tensor<4>> {
    let shape = x.value.dims();
    let x = x.linear(centre);
    let sigma = deviation(x.value.clone()); // [M, C·H·W]
    let covariance = x.value.mul(x.tangent).mean_dim(0).squeeze_dim::<2>(0); // [M, C·H·W]
    Dual {
        value: spread(sigma.clone().mean_dim(1), shape),
        tangent: spread(covariance.div(sigma).mean_dim(1), shape),
    }
}

/// `[N, C, H, W]` → differences from the group's mean, `[G, M, C·H·W]`.
fn centre(x: Tensor<4>) -> Tensor<3> {
    let [n, c, h, w] = x.dims();
    let group = group_size(n);
    let x = x.reshape([group, n / group, c * h * w]);
    x.clone().sub(x.mean_dim(0))
}

/// `[G, M, C·H·W]` → `[M, C·H·W]`.
fn deviation(centred: Tensor<3>) -> Tensor<2> {
    centred
        .square()
        .mean_dim(0)
        .squeeze_dim::<2>(0)
        .add_scalar(DEVIATION_EPS)
        .sqrt()
}

/// One number per group `[M, 1]` → `[N, 1, H, W]`.
fn spread(groups: Tensor<2>, [n, _, h, w]: [usize; 4]) -> Tensor<4> {
    let m = groups.dims()[0];
    groups
        .reshape([m, 1, 1, 1])
        .repeat_dim(0, n / m)
        .expand([n, 1, h, w])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn groups_divide_any_batch() {
        let sizes: Vec<_> = (1..=9).map(group_size).collect();
        assert_eq!(sizes, [1, 2, 3, 4, 1, 3, 1, 4, 3]);
    }

    #[test]
    fn a_picture_sees_the_deviation_of_its_own_group() {
        // Groups of 4 in a batch of 8: pictures 0, 2, 4, 6 and 1, 3, 5, 7.
        let pixels: [f32; 8] = [0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0, 1.0];
        let x = Tensor::<1>::from_floats(pixels, &Device::flex()).reshape([8, 1, 1, 1]);
        let got = values(minibatch_deviation(x));
        for (index, got) in got.into_iter().enumerate() {
            let expected = if index % 2 == 0 { 1.0 } else { 1e-4 };
            assert!((got - expected).abs() < 1e-6, "{index}: {got}");
        }
    }

    #[test]
    fn the_tangent_of_the_deviation_is_its_derivative() {
        let mut init = Init::new(1, &Device::flex());
        let (x, u) = (init.normal_tensor([8, 3, 2, 2]), init.normal_tensor([8, 3, 2, 2]));
        let tangent = minibatch_deviation_dual(Dual {
            value: x.clone(),
            tangent: u.clone(),
        })
        .tangent;
        let step = 1e-2;
        let above = minibatch_deviation(x.clone() + u.clone() * step);
        let below = minibatch_deviation(x - u * step);
        for (t, d) in values(tangent)
            .into_iter()
            .zip(values((above - below) / (2.0 * step)))
        {
            assert!((t - d).abs() < 1e-3, "{t} {d}");
        }
    }

    #[test]
    fn weights_build_the_same_network_again() {
        let config = DiscriminatorConfig {
            resolution: 16,
            channel_base: 128,
            channel_max: 16,
        };
        let device = Device::flex();
        let net = config.init(&mut Init::new(3, &device));
        let weights = net.to_weights();
        let names: Vec<_> = weights.names().collect();
        assert!(
            names.contains(&"net.0.weight") && names.contains(&"net.3.out.bias"),
            "{names:?}"
        );
        let again = Discriminator::from_weights(&weights, &device).unwrap();
        let images: Tensor<4> = Init::new(4, &device).normal_tensor([3, 3, 16, 16]);
        assert_eq!(values(net.forward(images.clone())), values(again.forward(images)));
        assert_eq!(again.config(), &config);
    }

    #[test]
    fn features_halve_the_size_and_take_any() {
        let config = DiscriminatorConfig {
            resolution: 16,
            channel_base: 128,
            channel_max: 16,
        };
        let net = config.init(&mut Init::new(3, &Device::flex()));
        let shapes = |size| -> Vec<_> {
            let images = Tensor::zeros([1, 3, size, size], &Device::flex());
            net.features(images).iter().map(FeatureMap::dims).collect()
        };
        assert_eq!(shapes(16), [[1, 16, 8, 8], [1, 16, 4, 4]]);
        assert_eq!(shapes(14), [[1, 16, 7, 7], [1, 16, 4, 4]]);
    }
}
