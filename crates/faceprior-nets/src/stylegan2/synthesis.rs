//! The synthesis network: codes to picture (Karras et al. 2020, figure 2c, with output skips).
//!
//! ```text
//! layer:  x ← lrelu√2(resample(modulated conv(x, A·w)) + strength·noise + b), clamped to ±256
//! block:  x ← layers(x)          image ← upsample(image) + toRGB(x)
//! ```
//! The smooth upsampling replicates borders and has gain 1, as in the lightning port of StyleGAN2-ADA, whose weights
//! this network reads; NVIDIA's own pads with zeros.
//!
//! Axes: `N` pictures, `K` codes, `L` latent dimensions, `I`, `O` channels, `H`, `W` space.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
};
use burn::tensor::{Device, Tensor, TensorData};
use faceprior_ops::dual::{self, Dual};
use faceprior_ops::{self as ops, BiasActivation, FeatureMap};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::GeneratorConfig;
use super::layers::{Activation, CLAMP, FullyConnected};
use crate::init::Init;
use crate::layers::Buffer;

/// Standard normal numbers from `rng`: latents, noise pictures, directions.
pub fn normal<const D: usize>(rng: &mut impl Rng, shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| StandardNormal.sample(rng))
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Where the noise that each synthesis layer adds comes from.
///
/// A clone of `Random` repeats its draws, so that two passes can share their noise.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one is made for a whole forward pass")]
pub enum Noise {
    /// Fresh numbers for each picture, drawn layer by layer.
    Random(ChaCha8Rng),
    /// The stored `noise_const` of each layer, the same for every picture.
    Constant,
    /// No noise.
    None,
}

/// Modulated 3×3 convolution with noise, bias and leaky ReLU.
#[derive(Module, Debug)]
pub struct SynthesisLayer {
    /// `[O, I, 3, 3]`, unit normal; demodulation makes a scale superfluous.
    pub weight: Param<Tensor<4>>,
    /// `[1]`, starts at 0. The port's has no dimension; PyTorch loads either into the other.
    pub noise_strength: Param<Tensor<1>>,
    /// `[O]`, starts at 0.
    pub bias: Param<Tensor<1>>,
    /// Code to style: `L` → `I`, bias starts at 1.
    pub affine: FullyConnected,
    /// `[H, W]` of the output, normal numbers drawn once.
    pub noise_const: Buffer<2>,
    #[module(skip)]
    upsamples: bool,
}

impl SynthesisLayer {
    fn new(
        init: &mut Init,
        latent_dim: usize,
        inputs: usize,
        outputs: usize,
        resolution: usize,
        upsamples: bool,
    ) -> Self {
        Self {
            weight: init.normal([outputs, inputs, 3, 3], 1.0),
            noise_strength: init.constant([1], 0.0),
            bias: init.constant([outputs], 0.0),
            affine: style_layer(init, latent_dim, inputs),
            noise_const: Buffer::new(init.normal_tensor([resolution, resolution])),
            upsamples,
        }
    }

    const AFTER: BiasActivation = BiasActivation {
        negative_slope: 0.2,
        gain: std::f32::consts::SQRT_2,
        clamp: Some(CLAMP),
    };

    /// `[N, I, H, W]`, code `[N, L]` → `[N, O, H, W]`, or twice the size.
    fn forward(&self, x: FeatureMap, w: Tensor<2>, noise: &mut Noise) -> FeatureMap {
        debug_assert_eq!(Activation::LeakyRelu.gain(), Self::AFTER.gain);
        let style = self.affine.forward(w); // [N, I]
        let mut x = ops::modulated_conv2d(x, self.weight.val(), style, true); // [N, O, h, w]
        if self.upsamples {
            x = ops::upsample_smooth(x); // [N, O, H, W]
        }
        if let Some(noise) = self.noise(noise, &x) {
            x = ops::add_noise(x, noise, self.noise_strength.val());
        }
        ops::bias_activation(x, Some(self.bias.val()), Self::AFTER)
    }

    fn forward_dual(&self, x: Dual<FeatureMap>, w: Dual<Tensor<2>>, noise: &mut Noise) -> Dual<FeatureMap> {
        let style = self.affine.forward_dual(w);
        let mut x = dual::modulated_conv2d(x, self.weight.val(), style, true);
        if self.upsamples {
            x = dual::upsample_smooth(x);
        }
        if let Some(noise) = self.noise(noise, &x.value) {
            x = dual::add_noise(x, noise, self.noise_strength.val());
        }
        dual::bias_activation(x, Some(self.bias.val()), Self::AFTER)
    }

    fn noise(&self, noise: &mut Noise, x: &FeatureMap) -> Option<Tensor<4>> {
        let [n, _, h, w] = x.dims();
        match noise {
            Noise::Random(rng) => Some(normal(rng, [n, 1, h, w], &x.device())),
            Noise::Constant => Some(self.noise_const.get().reshape([1, 1, h, w])),
            Noise::None => None,
        }
    }
}

/// Modulated 1×1 convolution to RGB, without demodulation.
#[derive(Module, Debug)]
pub struct ToRgb {
    /// `[3, I, 1, 1]`, unit normal.
    pub weight: Param<Tensor<4>>,
    /// `[3]`, starts at 0.
    pub bias: Param<Tensor<1>>,
    /// Code to style: `L` → `I`, bias starts at 1; the style is divided by √I.
    pub affine: FullyConnected,
}

impl ToRgb {
    fn new(init: &mut Init, latent_dim: usize, inputs: usize) -> Self {
        Self {
            weight: init.normal([3, inputs, 1, 1], 1.0),
            bias: init.constant([3], 0.0),
            affine: style_layer(init, latent_dim, inputs),
        }
    }

    const AFTER: BiasActivation = BiasActivation {
        negative_slope: 1.0,
        gain: 1.0,
        clamp: Some(CLAMP),
    };

    /// `[N, I, H, W]`, code `[N, L]` → `[N, 3, H, W]`.
    fn forward(&self, x: FeatureMap, w: Tensor<2>) -> FeatureMap {
        let gain = (x.dims()[1] as f32).sqrt().recip();
        let style = self.affine.forward(w).mul_scalar(gain); // [N, I]
        let rgb = ops::modulated_conv2d(x, self.weight.val(), style, false);
        ops::bias_activation(rgb, Some(self.bias.val()), Self::AFTER)
    }

    fn forward_dual(&self, x: Dual<FeatureMap>, w: Dual<Tensor<2>>) -> Dual<FeatureMap> {
        let gain = (x.value.dims()[1] as f32).sqrt().recip();
        let style = self.affine.forward_dual(w).linear(|style| style.mul_scalar(gain));
        let rgb = dual::modulated_conv2d(x, self.weight.val(), style, false);
        dual::bias_activation(rgb, Some(self.bias.val()), Self::AFTER)
    }
}

fn style_layer(init: &mut Init, latent_dim: usize, channels: usize) -> FullyConnected {
    FullyConnected::with(init, latent_dim, channels, Activation::Linear, 1.0, 1.0)
}

/// The block at 4×4, which starts from a learnt constant.
#[derive(Clone, Debug)]
pub struct FirstBlock {
    /// `[C, 4, 4]`, unit normal; `const` in the state dict.
    pub constant: Param<Tensor<3>>,
    /// Takes code 0.
    pub conv1: SynthesisLayer,
    /// Takes code 1.
    pub torgb: ToRgb,
}

impl FirstBlock {
    fn new(init: &mut Init, config: &GeneratorConfig) -> Self {
        let (latent_dim, channels) = (config.latent_dim, config.channels(4));
        Self {
            constant: init.normal([channels, 4, 4], 1.0),
            conv1: SynthesisLayer::new(init, latent_dim, channels, channels, 4, false),
            torgb: ToRgb::new(init, latent_dim, channels),
        }
    }

    fn start(&self, n: usize) -> FeatureMap {
        let constant = self.constant.val().unsqueeze::<4>(); // [1, C, 4, 4]
        FeatureMap::from_nchw(constant.repeat_dim(0, n)) // [N, C, 4, 4]
    }

    fn forward(&self, codes: &Codes<Tensor<3>>, noise: &mut Noise) -> (FeatureMap, FeatureMap) {
        let x = self.conv1.forward(self.start(codes.batch()), codes.get(0), noise);
        let image = self.torgb.forward(x.clone(), codes.get(1));
        (x, image)
    }

    fn forward_dual(
        &self,
        codes: &Codes<Dual<Tensor<3>>>,
        noise: &mut Noise,
    ) -> (Dual<FeatureMap>, Dual<FeatureMap>) {
        let value = self.start(codes.batch());
        let tangent = value.clone().detach().mul_scalar(0.0);
        let x = self
            .conv1
            .forward_dual(Dual { value, tangent }, codes.get(0), noise);
        let image = self.torgb.forward_dual(x.clone(), codes.get(1));
        (x, image)
    }
}

// Written out because the state dict's `const` cannot be a field's name.
impl Module for FirstBlock {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.constant.collect_devices(devices);
        self.torgb.collect_devices(self.conv1.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        Self {
            constant: self.constant.fork(device),
            conv1: self.conv1.fork(device),
            torgb: self.torgb.fork(device),
        }
    }

    fn to_device(self, device: &Device) -> Self {
        Self {
            constant: self.constant.to_device(device),
            conv1: self.conv1.to_device(device),
            torgb: self.torgb.to_device(device),
        }
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        const TYPE: &str = "Struct:FirstBlock";
        visitor.enter_module("const", TYPE);
        self.constant.visit(visitor);
        visitor.exit_module("const", TYPE);
        visitor.enter_module("conv1", TYPE);
        self.conv1.visit(visitor);
        visitor.exit_module("conv1", TYPE);
        visitor.enter_module("torgb", TYPE);
        self.torgb.visit(visitor);
        visitor.exit_module("torgb", TYPE);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        const TYPE: &str = "Struct:FirstBlock";
        mapper.enter_module("const", TYPE);
        let constant = Module::map(self.constant, mapper);
        mapper.exit_module("const", TYPE);
        mapper.enter_module("conv1", TYPE);
        let conv1 = self.conv1.map(mapper);
        mapper.exit_module("conv1", TYPE);
        mapper.enter_module("torgb", TYPE);
        let torgb = self.torgb.map(mapper);
        mapper.exit_module("torgb", TYPE);
        Self {
            constant,
            conv1,
            torgb,
        }
    }

    fn valid(&self) -> Self {
        Self {
            constant: self.constant.valid(),
            conv1: self.conv1.valid(),
            torgb: self.torgb.valid(),
        }
    }

    fn train(self) -> Self {
        Self {
            constant: self.constant.train(),
            conv1: self.conv1.train(),
            torgb: self.torgb.train(),
        }
    }

    fn materialize(self) -> Self {
        Self {
            constant: self.constant.materialize(),
            conv1: self.conv1.materialize(),
            torgb: self.torgb.materialize(),
        }
    }
}

impl ModuleDisplayDefault for FirstBlock {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add("const", &self.constant)
            .add("conv1", &self.conv1)
            .add("torgb", &self.torgb)
            .optional()
    }
}

impl ModuleDisplay for FirstBlock {}

/// A block that doubles the resolution.
#[derive(Module, Debug)]
pub struct SynthesisBlock {
    /// Upsamples; takes the block's first code.
    pub conv0: SynthesisLayer,
    /// Takes the second code.
    pub conv1: SynthesisLayer,
    /// Takes the third code.
    pub torgb: ToRgb,
}

impl SynthesisBlock {
    fn new(init: &mut Init, config: &GeneratorConfig, resolution: usize) -> Self {
        let latent_dim = config.latent_dim;
        let (inputs, outputs) = (config.channels(resolution / 2), config.channels(resolution));
        Self {
            conv0: SynthesisLayer::new(init, latent_dim, inputs, outputs, resolution, true),
            conv1: SynthesisLayer::new(init, latent_dim, outputs, outputs, resolution, false),
            torgb: ToRgb::new(init, latent_dim, outputs),
        }
    }

    fn forward(
        &self,
        (x, image): (FeatureMap, FeatureMap),
        codes: &Codes<Tensor<3>>,
        first: usize,
        noise: &mut Noise,
    ) -> (FeatureMap, FeatureMap) {
        let x = self.conv0.forward(x, codes.get(first), noise); // [N, O, 2h, 2w]
        let x = self.conv1.forward(x, codes.get(first + 1), noise); // [N, O, H, W]
        let rgb = self.torgb.forward(x.clone(), codes.get(first + 2)); // [N, 3, H, W]
        (x, ops::upsample_smooth(image).add(rgb))
    }

    fn forward_dual(
        &self,
        (x, image): (Dual<FeatureMap>, Dual<FeatureMap>),
        codes: &Codes<Dual<Tensor<3>>>,
        first: usize,
        noise: &mut Noise,
    ) -> (Dual<FeatureMap>, Dual<FeatureMap>) {
        let x = self.conv0.forward_dual(x, codes.get(first), noise);
        let x = self.conv1.forward_dual(x, codes.get(first + 1), noise);
        let rgb = self.torgb.forward_dual(x.clone(), codes.get(first + 2));
        (x, dual::add(dual::upsample_smooth(image), rgb))
    }
}

/// The codes of a batch, taken out one at a time.
struct Codes<T>(T);

impl Codes<Tensor<3>> {
    fn batch(&self) -> usize {
        self.0.dims()[0]
    }

    fn get(&self, index: usize) -> Tensor<2> {
        code(self.0.clone(), index)
    }
}

impl Codes<Dual<Tensor<3>>> {
    fn batch(&self) -> usize {
        self.0.value.dims()[0]
    }

    fn get(&self, index: usize) -> Dual<Tensor<2>> {
        self.0.clone().linear(|codes| code(codes, index))
    }
}

fn code(codes: Tensor<3>, index: usize) -> Tensor<2> {
    codes.narrow(1, index, 1).squeeze_dim::<2>(1)
}

/// Codes to pictures.
#[derive(Module, Debug)]
pub struct Synthesis {
    /// 4×4; takes codes 0 and 1.
    pub first_block: FirstBlock,
    /// 8×8 and up; block n ≥ 1 takes codes 2n−1, 2n and 2n+1.
    pub blocks: Vec<SynthesisBlock>,
}

impl Synthesis {
    pub(super) fn new(init: &mut Init, config: &GeneratorConfig) -> Self {
        Self {
            first_block: FirstBlock::new(init, config),
            blocks: config
                .resolutions()
                .skip(1)
                .map(|res| SynthesisBlock::new(init, config, res))
                .collect(),
        }
    }

    /// Codes `[N, K, L]` → pictures `[N, 3, R, R]`, in [-1, 1] once trained (not clamped). The last two of the K codes
    /// are not used.
    pub fn forward(&self, codes: Tensor<3>, mut noise: Noise) -> Tensor<4> {
        let codes = Codes(codes);
        let mut state = self.first_block.forward(&codes, &mut noise);
        for (index, block) in self.blocks.iter().enumerate() {
            state = block.forward(state, &codes, 2 * index + 1, &mut noise);
        }
        state.1.into_nchw()
    }

    /// [`forward`](Self::forward) with a tangent of the codes.
    pub fn forward_dual(&self, codes: Dual<Tensor<3>>, mut noise: Noise) -> Dual<Tensor<4>> {
        let codes = Codes(codes);
        let mut state = self.first_block.forward_dual(&codes, &mut noise);
        for (index, block) in self.blocks.iter().enumerate() {
            state = block.forward_dual(state, &codes, 2 * index + 1, &mut noise);
        }
        state.1.linear(FeatureMap::into_nchw)
    }
}
