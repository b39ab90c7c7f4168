//! Layers with parameters, under PyTorch's names and in PyTorch's layouts.
//!
//! Axes: `N` pictures, `C` or `I` input channels, `O` output channels, `H`, `W` space, `k` kernel.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    ParamId,
};
use burn::tensor::{Device, Distribution, Tensor};
use faceprior_ops::{self as ops, Conv2dOptions, FeatureMap};

use crate::init::Init;

/// Whether batch normalisation takes its statistics from the batch, and dropout drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Statistics of the batch, running statistics updated; dropout active.
    Train,
    /// Running statistics; no dropout.
    Eval,
}

/// A tensor that travels with a module but is not learnt: running statistics, constant noise, averages.
///
/// Module visitors see it as a float parameter that does not require a gradient. It can be set through a shared
/// reference, so that `forward(&self)` may update it; a clone of a module has buffers of its own, so that an
/// averaged copy or a [`Module::valid`] copy does not follow the original.
#[derive(Debug)]
pub struct Buffer<const D: usize> {
    id: ParamId,
    value: Arc<Mutex<Tensor<D>>>,
}

impl<const D: usize> Buffer<D> {
    /// A buffer that holds `value`, cut off from any gradient graph.
    pub fn new(value: Tensor<D>) -> Self {
        Self::with_id(ParamId::new(), value)
    }

    /// Every element is `value`.
    pub fn full(shape: [usize; D], value: f32, device: &Device) -> Self {
        Self::new(Tensor::full(shape, value, device))
    }

    fn with_id(id: ParamId, value: Tensor<D>) -> Self {
        Self {
            id,
            value: Arc::new(Mutex::new(value.detach())),
        }
    }

    /// The present value.
    pub fn get(&self) -> Tensor<D> {
        // A tensor handle is replaced in one assignment, so that a panic elsewhere cannot leave it half written.
        self.value.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the value, which is cut off from any gradient graph and follows the buffer in whether its
    /// operations are recorded for differentiation.
    pub fn set(&self, value: Tensor<D>) {
        let mut current = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let value = if current.is_autodiff() {
            value.autodiff().detach()
        } else {
            value.without_autodiff()
        };
        *current = value;
    }
}

impl<const D: usize> Clone for Buffer<D> {
    fn clone(&self) -> Self {
        Self::with_id(self.id, self.get())
    }
}

impl<const D: usize> Module for Buffer<D> {
    fn collect_devices(&self, mut devices: Devices) -> Devices {
        let device = self.get().device();
        if !devices.contains(&device) {
            devices.push(device);
        }
        devices
    }

    fn num_params(&self) -> usize {
        0
    }

    fn fork(self, device: &Device) -> Self {
        self.to_device(device)
    }

    fn to_device(self, device: &Device) -> Self {
        Self::with_id(self.id, self.get().to_device(device))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.visit_float(&Param::initialized(self.id, self.get()));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let mapped = mapper.map_float(Param::initialized(self.id, self.get()));
        // A mapper may ask every float to require a gradient; a buffer never does.
        Self::with_id(mapped.id, mapped.into_value().set_require_grad(false))
    }

    fn valid(&self) -> Self {
        Self::with_id(self.id, self.get().without_autodiff())
    }

    fn train(self) -> Self {
        Self::with_id(self.id, self.get().autodiff())
    }

    fn materialize(self) -> Self {
        self
    }
}

impl<const D: usize> ModuleDisplayDefault for Buffer<D> {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add_formatted(&format!("Buffer {{rank: {D}, shape: {:?}}}", self.get().dims()))
            .optional()
    }
}

impl<const D: usize> ModuleDisplay for Buffer<D> {}

/// Convolution with a weight `[O, I/groups, k, k]` and perhaps a bias `[O]`.
#[derive(Module, Debug)]
pub struct Conv2d {
    /// `[O, I/groups, kh, kw]`.
    pub weight: Param<Tensor<4>>,
    /// `[O]`.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    options: Conv2dOptions,
}

impl Conv2d {
    /// A fresh convolution without bias.
    pub fn new(
        init: &mut Init,
        inputs: usize,
        outputs: usize,
        kernel: [usize; 2],
        options: Conv2dOptions,
    ) -> Self {
        let weight = init.weight([outputs, inputs / options.groups, kernel[0], kernel[1]]);
        Self {
            weight,
            bias: None,
            options,
        }
    }

    /// The same with a fresh bias.
    pub fn with_bias(mut self, init: &mut Init) -> Self {
        let [outputs, inputs, kh, kw] = self.weight.lazy_shape().dims();
        self.bias = Some(init.bias(outputs, inputs * kh * kw));
        self
    }

    /// `[N, I, H, W]` → `[N, O, H', W']`.
    pub fn forward(&self, x: FeatureMap) -> FeatureMap {
        let x = ops::conv2d(x, self.weight.val(), self.options);
        match &self.bias {
            Some(bias) => ops::add_bias(x, bias.val()),
            None => x,
        }
    }
}

/// y = W·x + b with `W` `[O, I]`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[O, I]`.
    pub weight: Param<Tensor<2>>,
    /// `[O]`.
    pub bias: Param<Tensor<1>>,
}

impl Linear {
    /// A fresh linear layer.
    pub fn new(init: &mut Init, inputs: usize, outputs: usize) -> Self {
        Self {
            weight: init.weight([outputs, inputs]),
            bias: init.bias(outputs, inputs),
        }
    }

    /// `[N, I]` → `[N, O]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        x.matmul(self.weight.val().transpose()) + self.bias.val().unsqueeze()
    }
}

/// Batch normalisation over N, H and W (Ioffe and Szegedy 2015), eps 1e-5.
///
/// In [`Mode::Train`] the running statistics move by `running ← 0.9·running + 0.1·batch`, with the unbiased
/// variance of the batch, as PyTorch does. The weights file also gets PyTorch's `num_batches_tracked`, always 0.
#[derive(Module, Debug)]
pub struct BatchNorm {
    /// γ `[C]`, starts at 1.
    pub weight: Param<Tensor<1>>,
    /// β `[C]`, starts at 0.
    pub bias: Param<Tensor<1>>,
    /// `[C]`.
    pub running_mean: Buffer<1>,
    /// `[C]`, unbiased.
    pub running_var: Buffer<1>,
}

impl BatchNorm {
    const EPS: f64 = 1e-5;
    const MOMENTUM: f64 = 0.1;

    /// Fresh: γ 1, β 0, running mean 0, running variance 1.
    pub fn new(init: &mut Init, channels: usize) -> Self {
        Self {
            weight: init.constant([channels], 1.0),
            bias: init.constant([channels], 0.0),
            running_mean: Buffer::full([channels], 0.0, init.device()),
            running_var: Buffer::full([channels], 1.0, init.device()),
        }
    }

    /// `[N, C, H, W]` → `[N, C, H, W]`.
    pub fn forward(&self, x: FeatureMap, mode: Mode) -> FeatureMap {
        let (weight, bias) = (self.weight.val(), self.bias.val());
        match mode {
            Mode::Eval => ops::batch_norm(
                x,
                weight,
                bias,
                self.running_mean.get(),
                self.running_var.get(),
                Self::EPS,
            ),
            Mode::Train => {
                let (y, batch) = ops::batch_norm_train(x, weight, bias, Self::EPS);
                let unbiased = batch.count as f64 / (batch.count.max(2) - 1) as f64;
                update(&self.running_mean, batch.mean, 1.0);
                update(&self.running_var, batch.var, unbiased);
                y
            }
        }
    }

    /// The same for vectors: `[N, C]` → `[N, C]`.
    pub fn forward_vectors(&self, x: Tensor<2>, mode: Mode) -> Tensor<2> {
        let [n, c] = x.dims();
        let x = FeatureMap::from_nchw(x.reshape([n, c, 1, 1])); // [N, C, 1, 1]
        self.forward(x, mode).flatten() // [N, C]
    }
}

fn update(running: &Buffer<1>, batch: Tensor<1>, factor: f64) {
    let batch = batch.without_autodiff().mul_scalar(BatchNorm::MOMENTUM * factor);
    running.set(
        running
            .get()
            .without_autodiff()
            .mul_scalar(1.0 - BatchNorm::MOMENTUM)
            + batch,
    );
}

/// max(x, 0) + a·min(x, 0) with a slope `a` per channel (He et al. 2015).
#[derive(Module, Debug)]
pub struct PRelu {
    /// `[C]`, starts at 0.25.
    pub weight: Param<Tensor<1>>,
}

impl PRelu {
    /// Fresh slopes of 0.25.
    pub fn new(init: &mut Init, channels: usize) -> Self {
        Self {
            weight: init.constant([channels], 0.25),
        }
    }

    /// `[N, C, H, W]` → `[N, C, H, W]`.
    pub fn forward(&self, x: FeatureMap) -> FeatureMap {
        ops::prelu(x, self.weight.val())
    }
}

/// Drops elements with probability `p` in training and scales the rest by 1/(1 − p).
///
/// The mask comes from the device's generator: seed it ([`Device::seed`]) for a repeatable step.
#[derive(Module, Debug)]
pub struct Dropout {
    /// Probability of dropping an element.
    pub p: f64,
}

impl Dropout {
    /// Any shape to the same shape.
    pub fn forward(&self, x: FeatureMap, mode: Mode) -> FeatureMap {
        if mode == Mode::Eval || self.p == 0.0 {
            return x;
        }
        let x = x.into_nchw();
        let keep = 1.0 - self.p;
        let mask = x.random_like(Distribution::Bernoulli(keep)).detach();
        FeatureMap::from_nchw(x * mask.div_scalar(keep))
    }
}

/// `[N, C, H, W]` → `[N, C·H·W]`; it holds a position in PyTorch's numbering of a sequence.
#[derive(Module, Debug)]
pub struct Flatten {}

impl Flatten {
    /// `[N, C, H, W]` → `[N, C·H·W]`, in the order (C, H, W).
    pub fn forward(&self, x: FeatureMap) -> Tensor<2> {
        x.flatten()
    }
}

/// x for x ≥ 0, else slope·x.
#[derive(Module, Debug)]
pub struct LeakyRelu {
    /// Slope of the negative half.
    pub slope: f32,
}

/// Squeeze and excitation (Hu et al. 2018): channels scaled by sigmoid(fc2(relu(fc1(mean over H, W)))).
#[derive(Module, Debug)]
pub struct SqueezeExcitation {
    /// 1×1, C → C/r, no bias.
    pub fc1: Conv2d,
    /// 1×1, C/r → C, no bias.
    pub fc2: Conv2d,
}

impl SqueezeExcitation {
    /// A fresh gate on `channels` with the reduction `r`; at least one hidden channel.
    pub fn new(init: &mut Init, channels: usize, reduction: usize) -> Self {
        let hidden = (channels / reduction).max(1);
        Self {
            fc1: Conv2d::new(init, channels, hidden, [1, 1], Conv2dOptions::default()),
            fc2: Conv2d::new(init, hidden, channels, [1, 1], Conv2dOptions::default()),
        }
    }

    /// `[N, C, H, W]` → `[N, C, H, W]`.
    pub fn forward(&self, x: FeatureMap) -> FeatureMap {
        // 1×1 convolutions of one pixel are matrix products.
        let matrix = |conv: &Conv2d| conv.weight.val().flatten::<2>(1, 3).transpose();
        let squeezed = ops::global_average_pool(x.clone()); // [N, C]
        let hidden = burn::tensor::activation::relu(squeezed.matmul(matrix(&self.fc1))); // [N, C/r]
        let scale = burn::tensor::activation::sigmoid(hidden.matmul(matrix(&self.fc2))); // [N, C]
        ops::scale_channels(x, scale)
    }
}

/// One step of a sequence whose length depends on its config; its place in the `Vec` is PyTorch's number.
#[derive(Clone, Debug)]
pub enum Layer {
    /// See [`Conv2d`].
    Conv2d(Conv2d),
    /// See [`BatchNorm`].
    BatchNorm(BatchNorm),
    /// See [`PRelu`].
    PRelu(PRelu),
    /// See [`LeakyRelu`].
    LeakyRelu(LeakyRelu),
    /// See [`Dropout`].
    Dropout(Dropout),
    /// See [`SqueezeExcitation`].
    SqueezeExcitation(SqueezeExcitation),
}

impl Layer {
    /// `[N, I, H, W]` → `[N, O, H', W']`.
    pub fn forward(&self, x: FeatureMap, mode: Mode) -> FeatureMap {
        match self {
            Layer::Conv2d(conv) => conv.forward(x),
            Layer::BatchNorm(norm) => norm.forward(x, mode),
            Layer::PRelu(prelu) => prelu.forward(x),
            Layer::LeakyRelu(relu) => ops::leaky_relu(x, relu.slope),
            Layer::Dropout(dropout) => dropout.forward(x, mode),
            Layer::SqueezeExcitation(gate) => gate.forward(x),
        }
    }

    /// One layer after another.
    pub fn forward_all(layers: &[Layer], x: FeatureMap, mode: Mode) -> FeatureMap {
        layers.iter().fold(x, |x, layer| layer.forward(x, mode))
    }
}

// Written out because the derived form would put the variant's name into every parameter's path.
macro_rules! each_layer {
    ($layer:expr, $inner:ident => $body:expr) => {
        match $layer {
            Layer::Conv2d($inner) => $body,
            Layer::BatchNorm($inner) => $body,
            Layer::PRelu($inner) => $body,
            Layer::LeakyRelu($inner) => $body,
            Layer::Dropout($inner) => $body,
            Layer::SqueezeExcitation($inner) => $body,
        }
    };
}

macro_rules! map_layer {
    ($layer:expr, $inner:ident => $body:expr) => {
        match $layer {
            Layer::Conv2d($inner) => Layer::Conv2d($body),
            Layer::BatchNorm($inner) => Layer::BatchNorm($body),
            Layer::PRelu($inner) => Layer::PRelu($body),
            Layer::LeakyRelu($inner) => Layer::LeakyRelu($body),
            Layer::Dropout($inner) => Layer::Dropout($body),
            Layer::SqueezeExcitation($inner) => Layer::SqueezeExcitation($body),
        }
    };
}

impl Module for Layer {
    fn collect_devices(&self, devices: Devices) -> Devices {
        each_layer!(self, layer => layer.collect_devices(devices))
    }

    fn num_params(&self) -> usize {
        each_layer!(self, layer => Module::num_params(layer))
    }

    fn fork(self, device: &Device) -> Self {
        map_layer!(self, layer => layer.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        map_layer!(self, layer => layer.to_device(device))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        each_layer!(self, layer => layer.visit(visitor))
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        map_layer!(self, layer => layer.map(mapper))
    }

    fn valid(&self) -> Self {
        map_layer!(self, layer => layer.valid())
    }

    fn train(self) -> Self {
        map_layer!(self, layer => layer.train())
    }

    fn materialize(self) -> Self {
        map_layer!(self, layer => layer.materialize())
    }
}

impl ModuleDisplayDefault for Layer {
    fn content(&self, content: Content) -> Option<Content> {
        each_layer!(self, layer => content.add_single(layer)).optional()
    }
}

impl ModuleDisplay for Layer {}
