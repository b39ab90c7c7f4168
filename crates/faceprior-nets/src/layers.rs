//! Layers with parameters, under PyTorch's names and in PyTorch's layouts.
//!
//! Axes: `N` pictures, `C` or `I` input channels, `O` output channels, `H`, `W` space, `k` kernel.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    ParamId,
};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
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
        ops::linear(x, self.weight.val()) + self.bias.val().unsqueeze()
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

transparent_module!(Layer {
    Conv2d,
    BatchNorm,
    PRelu,
    LeakyRelu,
    Dropout,
    SqueezeExcitation
});

/// Resizes pictures bilinearly, half-pixel centres, without antialiasing (`align_corners` false).
///
/// # Shapes
/// `[N, C, H, W]` → `[N, C, size[0], size[1]]`; pictures that have the size already are returned as they are.
pub fn resize_bilinear(images: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
    let [n, c, height, width] = images.dims();
    if [height, width] == size {
        return images;
    }
    let device = images.device();
    // Separable: one small dense matrix per axis, which every device multiplies and differentiates.
    let rows = interpolation_matrix(height, size[0], &device).unsqueeze::<3>(); // [1, H', H]
    let columns = interpolation_matrix(width, size[1], &device).transpose(); // [W, W']
    let x = images.reshape([n * c * height, width]).matmul(columns); // [N·C·H, W']
    let x = rows
        .expand([n * c, size[0], height])
        .matmul(x.reshape([n * c, height, size[1]])); // [N·C, H', W']
    x.reshape([n, c, size[0], size[1]])
}

/// `[to, from]`: row i holds the two weights that make sample i.
fn interpolation_matrix(from: usize, to: usize, device: &Device) -> Tensor<2> {
    let mut matrix = vec![0.0f32; to * from];
    let ratio = from as f64 / to as f64;
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let position = ((i as f64 + 0.5) * ratio - 0.5).max(0.0);
        let low = (position as usize).min(from - 1);
        let fraction = (position - low as f64) as f32;
        row[low] += 1.0 - fraction;
        row[(low + 1).min(from - 1)] += fraction;
    }
    Tensor::from_data(TensorData::new(matrix, [to, from]), device)
}

/// Implements [`Module`] for an enum whose variants each hold the module of the same name.
///
/// Burn's derive would put the variant's name into the path of every parameter, and the path is PyTorch's key.
macro_rules! transparent_module {
    ($name:ident { $($variant:ident),* $(,)? }) => {
        impl burn::module::Module for $name {
            fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
                match self { $(Self::$variant(inner) => inner.collect_devices(devices)),* }
            }

            fn fork(self, device: &burn::tensor::Device) -> Self {
                match self { $(Self::$variant(inner) => Self::$variant(inner.fork(device))),* }
            }

            fn to_device(self, device: &burn::tensor::Device) -> Self {
                match self { $(Self::$variant(inner) => Self::$variant(inner.to_device(device))),* }
            }

            fn visit<V: burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                match self { $(Self::$variant(inner) => inner.visit(visitor)),* }
            }

            fn map<M: burn::module::ModuleMapper>(self, mapper: &mut M) -> Self {
                match self { $(Self::$variant(inner) => Self::$variant(inner.map(mapper))),* }
            }

            fn valid(&self) -> Self {
                match self { $(Self::$variant(inner) => Self::$variant(inner.valid())),* }
            }

            fn train(self) -> Self {
                match self { $(Self::$variant(inner) => Self::$variant(inner.train())),* }
            }

            fn materialize(self) -> Self {
                match self { $(Self::$variant(inner) => Self::$variant(inner.materialize())),* }
            }
        }

        impl burn::module::ModuleDisplayDefault for $name {
            fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                match self { $(Self::$variant(inner) => content.add_single(inner)),* }.optional()
            }
        }

        impl burn::module::ModuleDisplay for $name {}
    };
}
pub(crate) use transparent_module;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fill;

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

    fn close(got: &[f32], expected: &[f32]) {
        assert_eq!(got.len(), expected.len());
        for (g, e) in got.iter().zip(expected) {
            assert!(
                (g - e).abs() <= 1e-5 * (1.0 + e.abs()),
                "{got:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn a_clone_has_buffers_of_its_own() {
        let device = Device::flex();
        let norm = BatchNorm::new(&mut Init::new(1, &device), 2);
        let (copy, valid) = (norm.clone(), norm.valid());
        let x = FeatureMap::from_nchw(fill::input("x", [2, 2, 2, 2], 1.0, &device));
        norm.forward(x, Mode::Train);
        assert_ne!(numbers(norm.running_mean.get()), [0.0; 2]);
        for untouched in [copy, valid] {
            assert_eq!(numbers(untouched.running_mean.get()), [0.0; 2]);
        }
    }

    #[test]
    fn running_statistics_follow_the_batch() {
        let device = Device::flex().autodiff();
        let norm = BatchNorm::new(&mut Init::new(1, &device), 1);
        // Mean 2.5, biased variance 1.25, unbiased 5/3.
        let x = Tensor::<4>::from_floats([[[[1.0], [2.0], [3.0], [4.0]]]], &device);
        let y = norm
            .forward(FeatureMap::from_nchw(x.clone()), Mode::Train)
            .into_nchw();
        let deviations = [-1.5, -0.5, 0.5, 1.5].map(|d| d / (1.25f32 + 1e-5).sqrt());
        close(&numbers(y), &deviations);
        close(&numbers(norm.running_mean.get()), &[0.25]);
        close(&numbers(norm.running_var.get()), &[0.9 + 0.1 * 5.0 / 3.0]);
        assert!(norm.running_mean.get().is_autodiff() && !norm.running_mean.get().is_tracked());

        let y = norm.forward(FeatureMap::from_nchw(x), Mode::Eval).into_nchw();
        let expected = [1.0f32, 2.0, 3.0, 4.0].map(|x| (x - 0.25) / (0.9f32 + 0.1 * 5.0 / 3.0 + 1e-5).sqrt());
        close(&numbers(y), &expected);
    }

    #[test]
    fn buffers_follow_the_module_between_training_and_validation() {
        let device = Device::flex().autodiff();
        let norm = BatchNorm::new(&mut Init::new(1, &device), 1);
        let valid = norm.valid();
        assert!(!valid.running_var.get().is_autodiff());
        assert!(valid.train().running_var.get().is_autodiff());
        assert!(!norm.set_require_grad(true).running_var.get().is_require_grad());
    }

    #[test]
    fn vectors_are_normalised_as_one_pixel_maps() {
        let device = Device::flex();
        let norm = fill::fill(BatchNorm::new(&mut Init::new(1, &device), 3), "n.");
        let x = fill::input::<2>("v", [4, 3], 1.0, &device);
        let map = FeatureMap::from_nchw(x.clone().reshape([4, 3, 1, 1]));
        close(
            &numbers(norm.forward_vectors(x, Mode::Eval)),
            &numbers(norm.forward(map, Mode::Eval).into_nchw()),
        );
    }

    #[test]
    fn dropout_keeps_the_mean_and_rests_in_evaluation() {
        let device = Device::flex();
        device.seed(5);
        let dropout = Dropout { p: 0.25 };
        let ones = FeatureMap::from_nchw(Tensor::ones([4, 16, 16, 16], &device));
        assert_eq!(
            numbers(dropout.forward(ones.clone(), Mode::Eval).into_nchw()),
            vec![1.0; 16384]
        );
        let dropped = numbers(dropout.forward(ones, Mode::Train).into_nchw());
        let kept = dropped.iter().filter(|&&x| x > 0.0).count();
        assert!(
            (kept as f64 / 16384.0 - 0.75).abs() < 0.02,
            "{kept} of 16384 kept"
        );
        assert!(dropped.iter().all(|&x| x == 0.0 || (x - 4.0 / 3.0).abs() < 1e-6));
    }

    #[test]
    fn resizing_interpolates_between_half_pixel_centres() {
        let device = Device::flex();
        let ramp = Tensor::<4>::from_floats([[[[0.0, 1.0, 2.0, 3.0]]]], &device);
        // PyTorch: interpolate(x, size, mode="bilinear", align_corners=False).
        close(&numbers(resize_bilinear(ramp.clone(), [1, 2])), &[0.5, 2.5]);
        close(
            &numbers(resize_bilinear(ramp.clone(), [1, 8])),
            &[0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0],
        );
        close(
            &numbers(resize_bilinear(ramp, [2, 3])),
            &[1.0 / 6.0, 1.5, 17.0 / 6.0, 1.0 / 6.0, 1.5, 17.0 / 6.0],
        );
    }

    #[test]
    fn names_are_those_of_pytorch() {
        let init = &mut Init::new(1, &Device::flex());
        let sequence = vec![
            Layer::Conv2d(Conv2d::new(init, 2, 4, [1, 1], Conv2dOptions::default()).with_bias(init)),
            Layer::LeakyRelu(LeakyRelu { slope: 0.01 }),
            Layer::BatchNorm(BatchNorm::new(init, 4)),
            Layer::SqueezeExcitation(SqueezeExcitation::new(init, 4, 2)),
        ];
        let weights = crate::weights::Weights::from_module(&sequence, "s.");
        let names: Vec<&str> = weights.names().collect();
        let expected = [
            "s.0.bias",
            "s.0.weight",
            "s.2.bias",
            "s.2.num_batches_tracked",
            "s.2.running_mean",
            "s.2.running_var",
            "s.2.weight",
            "s.3.fc1.weight",
            "s.3.fc2.weight",
        ];
        assert_eq!(names, expected);
    }
}
