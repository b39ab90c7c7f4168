//! What is still to be done to the values of a feature map: a factor and a summand per channel, then a slope below
//! zero.
//!
//! Normalisation, squeeze and excitation, modulation, biases and PReLU are all of this form. A map carries them along
//! unapplied: the convolution that comes next applies them as it reads, a sum or an activation applies them in its own
//! pass. No normalised or rectified copy is written, and none is kept for the gradient. Factors and summands are small
//! tensors of the graph; whatever made them is differentiated by itself.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply3, apply4, apply5, dims, small_tensor, tensor, values};
use crate::feature_map::Blocks;
use crate::kept::Kept;
use crate::kernels::load::Load;
use crate::kernels::pointwise::{self, over_pictures, pointwise, pointwise_in_place};
use crate::kernels::{BLOCK, Isa};

/// `y = max(z, 0) + slope · min(z, 0)` with `z = (x − centre) · scale + shift + noise · strength`.
///
/// Noise and a slope exclude each other: nothing wants both, and a pass knows one of the two.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    /// `[1 or N, C]`.
    pub(crate) scale: Tensor<2>,
    /// `[1 or N, C]`.
    pub(crate) shift: Tensor<2>,
    /// `[C]`.
    pub(crate) slope: Option<Tensor<1>>,
    /// `[N or 1, 1, H, W]` and its strength `[1]`.
    pub(crate) noise: Option<(Tensor<4>, Tensor<1>)>,
    /// Where scale and shift came from the moments of the map itself.
    pub(crate) normalization: Option<Normalization>,
    /// The map with everything applied, once somebody needed it.
    settled: Arc<OnceLock<Blocks>>,
}

/// What a batch-normalised map knows of its statistics.
#[derive(Clone, Debug)]
pub(crate) struct Normalization {
    /// Mean and variance of each plane of `x`, `[N, 2, C]`.
    pub(crate) moments: Tensor<3>,
    pub(crate) path: GradientPath,
}

impl Normalization {
    /// The mean of each plane about the centre, `[N, C]`.
    pub(crate) fn centred_means(&self) -> Tensor<2> {
        let [n, _, c] = self.moments.dims();
        let means = self.moments.clone().slice([0..n, 0..1, 0..c]).reshape([n, c]);
        let centre = Tensor::<1>::from_floats(&*self.path.centre, &means.device());
        means.sub(centre.unsqueeze())
    }
}

/// How a gradient reaches a map whose scale and shift depend on its own moments.
///
/// Two gradients meet there: one through the values, and one through the moments, which is known later. The first
/// waits, and the second takes it along in its own pass.
#[derive(Clone, Debug)]
pub(crate) struct GradientPath {
    /// `[C]`: where products with `x` are taken about, so that they lose no digits to a large mean.
    centre: Arc<[f32]>,
    waiting: Waiting,
}

impl GradientPath {
    pub(crate) fn new(centre: Arc<[f32]>, waiting: Waiting) -> Self {
        Self { centre, waiting }
    }
}

/// The sum of all gradients of a map's values that came so far in a backward pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting(Arc<Mutex<Option<FlexTensor>>>);

impl Waiting {
    fn leave(&self, gradient: FlexTensor) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting = Some(match waiting.take() {
            Some(other) => overwrite(pointwise::Add {}, &gradient, other, []).0,
            None => gradient,
        });
    }

    pub(crate) fn take(&self) -> Option<FlexTensor> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Pending {
    /// A factor and a summand.
    pub(crate) fn new(scale: Tensor<2>, shift: Tensor<2>) -> Self {
        Self {
            scale,
            shift,
            slope: None,
            noise: None,
            normalization: None,
            settled: Arc::default(),
        }
    }

    /// Nothing yet, on the device of `like`.
    pub(crate) fn identity(channels: usize, like: &Tensor<5>) -> Self {
        let device = like.device();
        Self::new(
            Tensor::ones([1, channels], &device),
            Tensor::zeros([1, channels], &device),
        )
    }

    pub(crate) fn normalized(scale: Tensor<2>, shift: Tensor<2>, normalization: Normalization) -> Self {
        Self {
            normalization: Some(normalization),
            ..Self::new(scale, shift)
        }
    }

    /// Whether more factors can join: nothing but a factor and a summand is pending.
    pub(crate) fn is_linear(&self) -> bool {
        self.slope.is_none() && self.noise.is_none()
    }

    /// Whether more summands can join.
    pub(crate) fn takes_summands(&self) -> bool {
        self.slope.is_none()
    }

    /// Whether filters along height and width may go before this, since both are linear and borders are replicated.
    pub(crate) fn commutes_with_filters(&self) -> bool {
        self.is_linear() && self.normalization.is_none()
    }

    /// The same for other blocks.
    pub(crate) fn moved(self) -> Self {
        Self {
            settled: Arc::default(),
            ..self
        }
    }

    /// The same with a slope below zero.
    pub(crate) fn with_slope(self, slope: Tensor<1>) -> Self {
        Self {
            slope: Some(slope),
            ..self.moved()
        }
    }

    /// The same with noise.
    pub(crate) fn with_noise(self, noise: Tensor<4>, strength: Tensor<1>) -> Self {
        Self {
            noise: Some((noise, strength)),
            ..self.moved()
        }
    }

    /// The same followed by `· factor`, `[1 or N, C]`.
    pub(crate) fn times(self, factor: Tensor<2>) -> Self {
        Self {
            scale: self.scale.clone().mul(factor.clone()),
            shift: self.shift.clone().mul(factor),
            ..self.moved()
        }
    }

    /// The same followed by `· factor`.
    pub(crate) fn times_scalar(self, factor: f32) -> Self {
        Self {
            scale: self.scale.clone().mul_scalar(factor),
            shift: self.shift.clone().mul_scalar(factor),
            ..self.moved()
        }
    }

    /// The same followed by `+ summand`, `[1 or N, C]`.
    pub(crate) fn plus(self, summand: Tensor<2>) -> Self {
        Self {
            shift: self.shift.clone().add(summand),
            ..self.moved()
        }
    }

    pub(crate) fn path(&self) -> Option<GradientPath> {
        self.normalization
            .as_ref()
            .map(|normalization| normalization.path.clone())
    }

    /// The blocks of a map after everything; computed once, however many ask.
    pub(crate) fn settle(&self, x: Blocks) -> Blocks {
        let settle = || match self.slope.clone() {
            Some(slope) => {
                let apply = Apply {
                    activation: Activation::LINEAR,
                    path: self.path(),
                    kept: x.kept,
                };
                apply4(apply, x.tensor, self.scale.clone(), self.shift.clone(), slope).into()
            }
            None => self.clone().activate(x, Activation::LINEAR).into(),
        };
        self.settled.get_or_init(settle).clone()
    }

    /// The blocks of a map after everything, an activation following in the same pass; there is no slope yet.
    pub(crate) fn activate(self, x: Blocks, activation: Activation) -> Tensor<5> {
        let (path, kept) = (self.path(), x.kept);
        let apply = Apply {
            activation,
            path,
            kept,
        };
        match self.noise {
            Some((noise, strength)) => apply5(apply, x.tensor, self.scale, self.shift, noise, strength),
            None => apply3(apply, x.tensor, self.scale, self.shift),
        }
    }

    /// The blocks of a map after a factor and a summand, plus another map.
    pub(crate) fn add(self, x: Blocks, other: Tensor<5>) -> Tensor<5> {
        let (path, kept) = (self.path(), x.kept);
        apply4(
            ApplyAndAdd { path, kept },
            x.tensor,
            self.scale,
            self.shift,
            other,
        )
    }
}

/// The values of a [`Pending`], in whole blocks.
#[derive(Clone, Debug)]
pub(crate) struct Constants {
    channels: usize,
    scale_rows: usize,
    shift_rows: usize,
    scale: Vec<f32>,
    /// The centre folded in.
    shift: Vec<f32>,
    slope: Vec<f32>,
    centre: Vec<f32>,
}

impl Constants {
    /// # Shapes
    /// `scale`, `shift`: `[1 or N, C]`; `slope`: `[C]`.
    pub(crate) fn new(
        scale: &FlexTensor,
        shift: &FlexTensor,
        slope: &[f32],
        path: Option<&GradientPath>,
    ) -> Self {
        let ([scale_rows, channels], [shift_rows, _]) = (dims(scale), dims(shift));
        let blocks = channels.next_multiple_of(BLOCK);
        let centre = path.map_or_else(|| vec![0.0; blocks], |path| pointwise::padded(&path.centre));
        let (scale, mut shift) = (padded_rows(scale), padded_rows(shift));
        if path.is_some() {
            let rows = scale_rows.max(shift_rows);
            shift = (0..rows * blocks)
                .map(|at| {
                    let (scale, shift) = (scale[at % scale.len()], shift[at % shift.len()]);
                    (f64::from(shift) - f64::from(scale) * f64::from(centre[at % blocks])) as f32
                })
                .collect();
        }
        Self {
            channels,
            scale_rows,
            shift_rows,
            scale,
            shift,
            slope: pointwise::padded(slope),
            centre,
        }
    }

    /// Factor and summand alone.
    pub(crate) fn linear(scale: &FlexTensor, shift: &FlexTensor, path: Option<&GradientPath>) -> Self {
        let [_, channels] = dims(scale);
        Self::new(scale, shift, &vec![1.0; channels], path)
    }

    /// How a kernel reads the map.
    pub(crate) fn load(&self) -> Load<'_> {
        let [scale, shift, slope] = self.as_slices();
        let linear = slope[..self.channels].iter().all(|slope| *slope == 1.0);
        Load {
            scale,
            shift,
            slope: (!linear).then_some(slope),
        }
    }

    /// Scale, shift and slope.
    pub(crate) fn as_slices(&self) -> [&[f32]; 3] {
        [&self.scale, &self.shift, &self.slope]
    }

    /// From the gradient `dy` of the applied map that of the map as it is, and those of scale, shift and slope.
    pub(crate) fn gradients(
        &self,
        x: &FlexTensor,
        dy: FlexTensor,
        activation: Activation,
    ) -> (FlexTensor, [FlexTensor; 3]) {
        let Activation { gain, limit, .. } = activation;
        let op = pointwise::ActivationGradient { gain, limit };
        let constants: [&[f32]; 4] = [&self.scale, &self.shift, &self.slope, &self.centre];
        let (dx, [products, gradients, slopes]) = overwrite(op, x, dy, constants);
        let slopes = over_pictures(&slopes, self.channels);
        let parameters = [
            self.rows(&products, self.scale_rows),
            self.rows(&gradients, self.shift_rows),
            small_tensor(&slopes, [self.channels]),
        ];
        (dx, parameters)
    }

    /// Sums per picture and channel in the shape `[rows, C]` of a parameter.
    fn rows(&self, sums: &[f32], rows: usize) -> FlexTensor {
        match rows {
            1 => small_tensor(&over_pictures(sums, self.channels), [1, self.channels]),
            _ => cropped_rows(sums, rows, self.channels),
        }
    }
}

/// Where the gradient of a map goes: to the tape, or to the pass that follows.
pub(crate) fn deliver(path: Option<&GradientPath>, wanted: bool, dx: FlexTensor) -> Option<FlexTensor> {
    match path {
        _ if !wanted => None,
        Some(path) => {
            path.waiting.leave(dx);
            None
        }
        None => Some(dx),
    }
}

/// What follows factor and summand: a slope below zero, a gain, a clamp.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activation {
    pub(crate) negative_slope: f32,
    pub(crate) gain: f32,
    pub(crate) limit: f32,
}

impl Activation {
    pub(crate) const LINEAR: Self = Self {
        negative_slope: 1.0,
        gain: 1.0,
        limit: f32::INFINITY,
    };
}

/// A pending function as a pass of its own.
#[derive(Clone, Debug)]
struct Apply {
    /// Its slope stands for a slope per channel where there is none.
    activation: Activation,
    path: Option<GradientPath>,
    kept: Kept,
}

impl Apply {
    fn constants(&self, scale: &FlexTensor, shift: &FlexTensor, slope: Option<&FlexTensor>) -> Constants {
        let path = self.path.as_ref();
        match slope {
            Some(slope) => Constants::new(scale, shift, values(slope), path),
            None => {
                let [_, channels] = dims(scale);
                Constants::new(
                    scale,
                    shift,
                    &vec![self.activation.negative_slope; channels],
                    path,
                )
            }
        }
    }

    fn run(&self, x: &FlexTensor, constants: &Constants) -> FlexTensor {
        let [n, blocks, ..] = dims::<5>(x);
        let Activation { gain, limit, .. } = self.activation;
        let op = pointwise::Activation { gain, limit };
        let (y, []) = pointwise(Isa::best(), op, n * blocks, [values(x)], constants.as_slices());
        tensor(y, dims::<5>(x))
    }
}

impl Apply {
    fn noisy<'a>(
        &self,
        x: &FlexTensor,
        noise: &'a FlexTensor,
        strength: f32,
    ) -> pointwise::NoisyActivation<'a> {
        let ([_, blocks, h, w, _], Activation { gain, limit, .. }) = (dims(x), self.activation);
        pointwise::NoisyActivation {
            activation: pointwise::Activation { gain, limit },
            noise: pointwise::Noise::new(values(noise), blocks, h * w),
            strength,
        }
    }

    fn run_noisy(
        &self,
        [x, scale, shift, noise, strength]: [FlexTensor; 5],
    ) -> (FlexTensor, (Constants, FlexTensor, f32)) {
        let [n, blocks, ..] = dims::<5>(&x);
        let strength = values(&strength)[0];
        let constants = self.constants(&scale, &shift, None);
        let (y, []) = pointwise(
            Isa::best(),
            self.noisy(&x, &noise, strength),
            n * blocks,
            [values(&x)],
            constants.as_slices(),
        );
        (tensor(y, dims::<5>(&x)), (constants, noise, strength))
    }
}

impl Function<3> for Apply {
    type Saved = Constants;

    fn forward(&self, [x, scale, shift]: [FlexTensor; 3]) -> (FlexTensor, Constants) {
        self.kept.keep(&x);
        let constants = self.constants(&scale, &shift, None);
        (self.run(&x, &constants), constants)
    }

    fn value(&self, [x, scale, shift]: [FlexTensor; 3]) -> FlexTensor {
        self.run(&x, &self.constants(&scale, &shift, None))
    }

    fn backward(&self, constants: Constants, dy: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let (dx, [scale, shift, _]) = constants.gradients(&self.kept.values(), dy, self.activation);
        let dx = deliver(self.path.as_ref(), wanted[0], dx);
        [dx, Some(scale), Some(shift)]
    }
}

impl Function<4> for Apply {
    type Saved = Constants;

    fn forward(&self, [x, scale, shift, slope]: [FlexTensor; 4]) -> (FlexTensor, Constants) {
        self.kept.keep(&x);
        let constants = self.constants(&scale, &shift, Some(&slope));
        (self.run(&x, &constants), constants)
    }

    fn value(&self, [x, scale, shift, slope]: [FlexTensor; 4]) -> FlexTensor {
        self.run(&x, &self.constants(&scale, &shift, Some(&slope)))
    }

    fn backward(&self, constants: Constants, dy: FlexTensor, wanted: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let (dx, [scale, shift, slope]) = constants.gradients(&self.kept.values(), dy, self.activation);
        let dx = deliver(self.path.as_ref(), wanted[0], dx);
        [dx, Some(scale), Some(shift), Some(slope)]
    }
}

impl Function<5> for Apply {
    /// The constants, the noise and its strength.
    type Saved = (Constants, FlexTensor, f32);

    fn forward(&self, inputs: [FlexTensor; 5]) -> (FlexTensor, Self::Saved) {
        self.kept.keep(&inputs[0]);
        self.run_noisy(inputs)
    }

    fn value(&self, inputs: [FlexTensor; 5]) -> FlexTensor {
        self.run_noisy(inputs).0
    }

    fn backward(
        &self,
        (constants, noise, strength): Self::Saved,
        dy: FlexTensor,
        wanted: [bool; 5],
    ) -> [Option<FlexTensor>; 5] {
        let x = self.kept.values();
        let (dx, [products, gradients, _, strengths]) = overwrite(
            self.noisy(&x, &noise, strength),
            &x,
            dy,
            [
                &constants.scale,
                &constants.shift,
                &constants.slope,
                &constants.centre,
            ],
        );
        let strength = over_pictures(&strengths, constants.channels);
        let strength = strength.iter().map(|sum| f64::from(*sum)).sum::<f64>() as f32;
        [
            deliver(self.path.as_ref(), wanted[0], dx),
            Some(constants.rows(&products, constants.scale_rows)),
            Some(constants.rows(&gradients, constants.shift_rows)),
            None,
            Some(small_tensor(&[strength], [1])),
        ]
    }
}

/// A pending factor and summand, and the sum with another map.
#[derive(Clone, Debug)]
struct ApplyAndAdd {
    path: Option<GradientPath>,
    kept: Kept,
}

impl ApplyAndAdd {
    fn run(&self, [x, scale, shift, other]: &[FlexTensor; 4]) -> (FlexTensor, Constants) {
        let [n, blocks, ..] = dims::<5>(x);
        let constants = Constants::new(scale, shift, &[], self.path.as_ref());
        let (y, []) = pointwise(
            Isa::best(),
            pointwise::ScaleShiftAdd {},
            n * blocks,
            [values(x), values(other)],
            [&constants.scale, &constants.shift],
        );
        (tensor(y, dims::<5>(x)), constants)
    }
}

impl Function<4> for ApplyAndAdd {
    type Saved = Constants;

    fn forward(&self, inputs: [FlexTensor; 4]) -> (FlexTensor, Constants) {
        self.kept.keep(&inputs[0]);
        self.run(&inputs)
    }

    fn value(&self, inputs: [FlexTensor; 4]) -> FlexTensor {
        self.run(&inputs).0
    }

    fn backward(&self, constants: Constants, dy: FlexTensor, wanted: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let other = wanted[3].then(|| dy.clone());
        let op = pointwise::ScaleShiftGradient {};
        let around: [&[f32]; 2] = [&constants.scale, &constants.centre];
        let (dx, [products, gradients]) = overwrite(op, &self.kept.values(), dy, around);
        let scale = constants.rows(&products, constants.scale_rows);
        let shift = constants.rows(&gradients, constants.shift_rows);
        let dx = deliver(self.path.as_ref(), wanted[0], dx);
        [dx, Some(scale), Some(shift), other]
    }
}

/// An operation on two maps, in the memory of the second where nobody else holds it.
pub(crate) fn overwrite<O, const CONSTANTS: usize, const SUMS: usize>(
    op: O,
    x: &FlexTensor,
    mut y: FlexTensor,
    constants: [&[f32]; CONSTANTS],
) -> (FlexTensor, [Vec<f32>; SUMS])
where
    O: pointwise::Op<2, CONSTANTS, SUMS>,
{
    let [n, blocks, ..] = dims::<5>(x);
    let x = values(x);
    if let Some(storage) = y.try_storage_mut::<f32>()
        && storage.len() == x.len()
    {
        let sums = pointwise_in_place(Isa::best(), op, n * blocks, x, storage, constants);
        return (y, sums);
    }
    let (result, sums) = pointwise(Isa::best(), op, n * blocks, [x, values(&y)], constants);
    (tensor(result, dims::<5>(&y)), sums)
}

/// `[N, C]` with zeros up to whole blocks.
pub(crate) fn padded_rows(x: &FlexTensor) -> Vec<f32> {
    let [_, channels] = dims(x);
    values(x)
        .chunks_exact(channels)
        .flat_map(pointwise::padded)
        .collect()
}

/// The first `channels` values of each of `n` rows, `[N, C]`.
pub(crate) fn cropped_rows(values: &[f32], n: usize, channels: usize) -> FlexTensor {
    let rows = values.chunks_exact(values.len() / n);
    let cropped: Vec<_> = rows.flat_map(|row| row[..channels].iter().copied()).collect();
    small_tensor(&cropped, [n, channels])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_twins, random};
    use crate::{
        BiasActivation, Conv2dOptions, FeatureMap, add_bias, add_noise, batch_norm, batch_norm_train,
        bias_activation, conv2d, downsample_smooth, global_average_pool, prelu, reference, scale_channels,
        upsample_smooth,
    };

    /// Channels that do not fill their last block, pictures enough for both kinds of constants.
    const N: usize = 3;
    const C: usize = 20;
    const MAP: [usize; 4] = [N, C, 9, 7];
    const WEIGHT: [usize; 4] = [C, C, 3, 3];
    const CHANNEL: [usize; 4] = [1, C, 1, 1];

    fn vector(x: Tensor<4>) -> Tensor<1> {
        x.reshape([C])
    }

    /// One residual unit with everything that can be pending, against plain tensor code.
    #[test]
    fn a_unit_of_pending_functions_agrees_with_plain_passes() {
        let norm = |x: Tensor<4>, weight, bias| {
            reference::batch_norm_train(reference::block(x, 1), vector(weight), vector(bias), 1e-5)
                .0
                .reshape(MAP)
        };
        let conv = |x: Tensor<4>, weight| {
            let y = reference::conv2d(reference::block(x, 1), weight, Conv2dOptions::same3x3());
            reference::unblock(y, C)
        };
        assert_twins(
            |[x, w1, w2, g1, b1, slope, g2, b2, gate]| {
                let x = FeatureMap::from_nchw(x);
                let y = batch_norm_train(x.clone(), vector(g1), vector(b1), 1e-5).0;
                let y = conv2d(y, w1, Conv2dOptions::same3x3());
                let y = conv2d(prelu(y, vector(slope)), w2, Conv2dOptions::same3x3());
                let y = batch_norm_train(y, vector(g2), vector(b2), 1e-5).0;
                let factor = global_average_pool(y.clone()).mul(gate.reshape([1, C]));
                scale_channels(y, factor).add(x).into_nchw()
            },
            |[x, w1, w2, g1, b1, slope, g2, b2, gate]| {
                let y = conv(norm(x.clone(), g1, b1), w1);
                let y = y.clone().clamp_min(0.0) + y.clamp_max(0.0).mul(slope);
                let y = norm(conv(y, w2), g2, b2);
                let factor = y.clone().mean_dims(&[2, 3]).mul(gate);
                y.mul(factor) + x
            },
            [
                MAP, WEIGHT, WEIGHT, CHANNEL, CHANNEL, CHANNEL, CHANNEL, CHANNEL, CHANNEL,
            ],
            5e-5,
        );
    }

    /// A synthesis layer: modulation before, demodulation, upsampling, noise, bias and activation after.
    #[test]
    fn a_synthesis_layer_agrees_with_plain_passes() {
        let noise = random([N, 1, 18, 14], 5);
        let options = BiasActivation {
            negative_slope: 0.2,
            gain: 1.4,
            clamp: Some(2.0),
        };
        assert_twins(
            |[x, weight, style, factor, strength, bias]| {
                let x = scale_channels(FeatureMap::from_nchw(x), style.reshape([N, C]));
                let y = conv2d(x, weight, Conv2dOptions::same3x3());
                let y = upsample_smooth(scale_channels(y, factor.reshape([N, C])));
                let y = add_noise(y, noise.clone(), strength.reshape([1]));
                bias_activation(y, Some(vector(bias)), options).into_nchw()
            },
            |[x, weight, style, factor, strength, bias]| {
                let x = reference::block(x.mul(style), 1);
                let y = reference::unblock(reference::conv2d(x, weight, Conv2dOptions::same3x3()), C);
                let y = reference::upsample_smooth(reference::block(y.mul(factor), 1));
                let y = reference::unblock(y, C) + noise.clone().mul(strength) + bias;
                reference::unblock(
                    reference::bias_activation(reference::block(y, 1), None, options),
                    C,
                )
            },
            [MAP, WEIGHT, [N, C, 1, 1], [N, C, 1, 1], [1; 4], CHANNEL],
            5e-5,
        );
    }

    /// Every way out of a map settles what is pending.
    #[test]
    fn whoever_reads_a_map_sees_what_was_pending() {
        let (x, shift) = (random(MAP, 1), random([C], 2));
        let plain = x.clone() + shift.clone().reshape(CHANNEL);
        let map = || add_bias(FeatureMap::from_nchw(x.clone()), shift.clone());
        assert_close(map().into_nchw(), plain.clone(), 1e-6);
        assert_close(map().detach().into_nchw(), plain.clone(), 1e-6);
        assert_close(map().flatten(), plain.clone().flatten(1, 3), 1e-6);
        assert_close(
            map().mul_scalar(3.0).into_nchw(),
            plain.clone().mul_scalar(3.0),
            1e-6,
        );
        let (first, rest) = map().split_batch(1);
        let both = FeatureMap::cat_batch(vec![first, rest]);
        assert_close(both.add(map()).into_nchw(), plain.clone().mul_scalar(2.0), 1e-6);
        let down = reference::downsample_smooth(reference::block(plain.clone(), 1));
        assert_close(
            downsample_smooth(map()).into_nchw(),
            reference::unblock(down, C),
            1e-5,
        );
        // A slope, and then more: twice the same map.
        let slope = random([C], 3);
        let rectified =
            |x: Tensor<4>| x.clone().clamp_min(0.0) + x.clamp_max(0.0).mul(slope.clone().reshape(CHANNEL));
        let once = prelu(map(), slope.clone());
        let twice = prelu(once.clone(), slope.clone()).add(once);
        let expected = rectified(rectified(plain.clone())) + rectified(plain);
        assert_close(twice.into_nchw(), expected, 1e-6);
    }

    #[test]
    fn evaluation_after_evaluation_folds_into_one() {
        let x = random(MAP, 1);
        let [weight, bias, mean] = [2, 3, 4].map(|seed| random([C], seed));
        let var = random([C], 5).exp();
        let once = |x| batch_norm(x, weight.clone(), bias.clone(), mean.clone(), var.clone(), 1e-5);
        let twice = once(once(FeatureMap::from_nchw(x.clone()))).into_nchw();
        let settled = FeatureMap::from_nchw(once(FeatureMap::from_nchw(x)).into_nchw());
        assert_close(twice, once(settled).into_nchw(), 1e-5);
    }
}
