//! Batch normalisation (Ioffe & Szegedy 2015).

use std::sync::Arc;

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, apply3, dims, small_tensor, tensor, values};
use crate::kernels::pointwise::{self, over_pictures, padded, pointwise};
use crate::kernels::{BLOCK, Isa};
use crate::{FeatureMap, reference};

/// What one training batch says about each channel; not part of the graph of derivatives.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// Mean over pictures and pixels, `[C]`.
    pub mean: Tensor<1>,
    /// Biased variance over pictures and pixels, `[C]`. The unbiased one is `var · count / (count − 1)`.
    pub var: Tensor<1>,
    /// Values per channel: N·H·W.
    pub count: usize,
}

/// Batch normalisation by given statistics, as in evaluation: `(x − mean) / √(var + eps) · weight + bias`.
///
/// # Shapes
/// `weight`, `bias`, `mean`, `var`: `[C]`.
pub fn batch_norm(
    x: FeatureMap,
    weight: Tensor<1>,
    bias: Tensor<1>,
    mean: Tensor<1>,
    var: Tensor<1>,
    eps: f64,
) -> FeatureMap {
    for parameter in [&weight, &bias, &mean, &var] {
        assert_eq!(
            parameter.dims(),
            [x.channels()],
            "one value per channel in batch normalisation"
        );
    }
    let scale = weight.mul(var.add_scalar(eps).sqrt().recip());
    let shift = bias.sub(mean.mul(scale.clone()));
    if x.is_blocked() {
        x.map(|x| apply3(ScaleShift, x, scale, shift))
    } else {
        x.map(|x| reference::scale_shift(x, scale, shift))
    }
}

/// Batch normalisation by the batch's own statistics, as in training; gradients pass through the statistics.
///
/// # Shapes
/// `weight`, `bias`: `[C]`.
pub fn batch_norm_train(
    x: FeatureMap,
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
) -> (FeatureMap, BatchStatistics) {
    let [n, c, h, w] = x.dims();
    for parameter in [&weight, &bias] {
        assert_eq!(
            parameter.dims(),
            [c],
            "one value per channel in batch normalisation"
        );
    }
    let count = n * h * w;
    if !x.is_blocked() {
        let (y, mean, var) = reference::batch_norm_train(x.into_blocks(), weight, bias, eps);
        return (
            FeatureMap::from_blocks(y, c),
            BatchStatistics { mean, var, count },
        );
    }
    let x = x.into_blocks();
    let statistics: Tensor<2> = apply1(Statistics { channels: c }, x.clone().detach()); // [2, C]
    let known = statistics.to_data().try_to_vec::<f32>().expect("an f32 tensor");
    let (mean, var) = (Arc::from(&known[..c]), Arc::from(&known[c..]));
    let y = apply3(BatchNorm { mean, var, eps }, x, weight, bias);
    let mean = statistics.clone().slice([0..1, 0..c]).reshape([c]);
    let var = statistics.slice([1..2, 0..c]).reshape([c]);
    (
        FeatureMap::from_blocks(y, c),
        BatchStatistics { mean, var, count },
    )
}

/// A factor and a summand per channel.
#[derive(Clone, Debug)]
struct ScaleShift;

impl Function<3> for ScaleShift {
    type Saved = (FlexTensor, Vec<f32>);

    fn forward(&self, [x, scale, shift]: [FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let scale = values(&scale).to_vec();
        (scale_shift(&x, &scale, values(&shift)), (x, scale))
    }

    fn backward(&self, (x, scale): Self::Saved, dy: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let [n, blocks, ..] = dims::<5>(&x);
        let inputs = [values(&x), values(&dy)];
        let op = pointwise::ScaleShiftGradient {};
        let (dx, sums) = pointwise(Isa::best(), op, n * blocks, inputs, [&padded(&scale)]);
        let channels = scale.len();
        let [scales, shifts] =
            sums.map(|sums| Some(small_tensor(&over_pictures(&sums, channels), [channels])));
        [Some(tensor(dx, dims::<5>(&x))), scales, shifts]
    }
}

fn scale_shift(x: &FlexTensor, scale: &[f32], shift: &[f32]) -> FlexTensor {
    let [n, blocks, ..] = dims::<5>(x);
    let constants: [&[f32]; 2] = [&padded(scale), &padded(shift)];
    let (y, []) = pointwise(
        Isa::best(),
        pointwise::ScaleShift {},
        n * blocks,
        [values(x)],
        constants,
    );
    tensor(y, dims::<5>(x))
}

/// Mean and biased variance of each channel, `[2, C]`; has no gradient.
#[derive(Clone, Debug)]
struct Statistics {
    channels: usize,
}

impl Function<1> for Statistics {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        let ([n, blocks, ..], channels) = (dims::<5>(&x), self.channels);
        let planes = pointwise::moments(Isa::best(), n * blocks, values(&x));
        let mut statistics = vec![0.0; 2 * channels];
        for channel in 0..channels {
            // Planes have equally many pixels, so that their moments join without weights (Chan et al. 1983).
            let lane = channel % BLOCK;
            let of_pictures = || {
                planes.iter().skip(channel / BLOCK).step_by(blocks).map(|plane| {
                    [plane.centre, plane.offset, plane.square].map(|moment| f64::from(moment[lane]))
                })
            };
            let mean = of_pictures()
                .map(|[centre, offset, _]| centre + offset)
                .sum::<f64>()
                / n as f64;
            let squares = of_pictures().map(|[centre, offset, square]| {
                let distance = centre - mean;
                square + distance * (distance + 2.0 * offset)
            });
            let var = (squares.sum::<f64>() / n as f64).max(0.0);
            (statistics[channel], statistics[channels + channel]) = (mean as f32, var as f32);
        }
        (small_tensor(&statistics, [2, channels]), ())
    }

    fn backward(&self, (): (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [None]
    }
}

/// Batch normalisation by statistics that are functions of the input.
#[derive(Clone, Debug)]
struct BatchNorm {
    mean: Arc<[f32]>,
    var: Arc<[f32]>,
    eps: f64,
}

impl BatchNorm {
    /// `1/√(var + eps)` of a channel.
    fn inverse_deviation(&self, channel: usize) -> f64 {
        1.0 / (f64::from(self.var[channel]) + self.eps).sqrt()
    }
}

impl Function<3> for BatchNorm {
    type Saved = (FlexTensor, Vec<f32>);

    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let weight = values(&weight).to_vec();
        let (scale, shift): (Vec<_>, Vec<_>) = values(&bias)
            .iter()
            .enumerate()
            .map(|(channel, bias)| {
                let scale = self.inverse_deviation(channel) * f64::from(weight[channel]);
                (
                    scale as f32,
                    (f64::from(*bias) - scale * f64::from(self.mean[channel])) as f32,
                )
            })
            .unzip();
        (scale_shift(&x, &scale, &shift), (x, weight))
    }

    /// With `x̂ = (x − mean)·r`, `r = 1/√(var + eps)` and means over the batch:
    /// `dx = w·r·(dy − mean(dy) − x̂·mean(dy·x̂))`.
    fn backward(&self, (x, weight): Self::Saved, dy: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let [n, blocks, h, w, _] = dims(&x);
        let (planes, channels, count) = (n * blocks, weight.len(), (n * h * w) as f64);
        let inputs = [values(&x), values(&dy)];
        let op = pointwise::NormalizationSums {};
        let (_, sums) = pointwise(Isa::best(), op, planes, inputs, [&padded(&self.mean)]);
        let [gradients, products] = sums.map(|sums| over_pictures(&sums, channels));
        let mut weights = vec![0.0; channels];
        let mut constants = [(); 3].map(|()| vec![0.0; blocks * BLOCK]);
        for channel in 0..channels {
            let (r, mean) = (self.inverse_deviation(channel), f64::from(self.mean[channel]));
            let product = f64::from(products[channel]) * r; // Σ dy·x̂
            let scale = f64::from(weight[channel]) * r;
            let along_x = -scale * r * product / count;
            weights[channel] = product as f32;
            constants[0][channel] = scale as f32;
            constants[1][channel] = along_x as f32;
            constants[2][channel] = (-scale * f64::from(gradients[channel]) / count - along_x * mean) as f32;
        }
        let constants = constants.each_ref().map(Vec::as_slice);
        let (dx, []) = pointwise(
            Isa::best(),
            pointwise::NormalizationGradient {},
            planes,
            inputs,
            constants,
        );
        let [weights, biases] = [weights, gradients].map(|values| Some(small_tensor(&values, [channels])));
        [Some(tensor(dx, dims::<5>(&x))), weights, biases]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_twins, random};

    const SHAPE: [usize; 5] = [3, 2, 9, 7, BLOCK];
    const CHANNEL: [usize; 5] = [1, 1, 1, 1, 32];

    fn map(x: Tensor<5>) -> FeatureMap {
        FeatureMap::from_blocks(x, 32)
    }

    #[test]
    fn evaluation_agrees_with_its_reference() {
        assert_twins(
            |[x, weight, bias, mean, var]| {
                let [weight, bias, mean, var] = [weight, bias, mean, var.exp()].map(|t| t.reshape([32]));
                batch_norm(map(x), weight, bias, mean, var, 1e-5).into_blocks()
            },
            |[x, weight, bias, mean, var]| {
                let [weight, bias, mean, var] =
                    [weight, bias, mean, var.exp()].map(|t| t.reshape([1, 2, 1, 1, BLOCK]));
                x.sub(mean).div(var.add_scalar(1e-5).sqrt()).mul(weight).add(bias)
            },
            [SHAPE, CHANNEL, CHANNEL, CHANNEL, CHANNEL],
            1e-5,
        );
    }

    #[test]
    fn training_agrees_with_its_reference() {
        assert_twins(
            |[x, weight, bias]| {
                let [weight, bias] = [weight, bias].map(|t| t.reshape([32]));
                batch_norm_train(map(x), weight, bias, 1e-5).0.into_blocks()
            },
            |[x, weight, bias]| {
                let [weight, bias] = [weight, bias].map(|t| t.reshape([32]));
                reference::batch_norm_train(x, weight, bias, 1e-5).0
            },
            [SHAPE, CHANNEL, CHANNEL],
            1e-5,
        );
    }

    #[test]
    fn statistics_survive_a_mean_far_from_zero() {
        let x = random([4, 20, 6, 5], 1).add_scalar(1000.0);
        let ones = Tensor::ones([20], &x.device());
        let map = FeatureMap::from_nchw(x.clone());
        let (_, statistics) = batch_norm_train(map, ones.clone(), ones, 1e-5);
        let flat = x.sub_scalar(1000.0).permute([1, 0, 2, 3]).reshape([20, 120]);
        let (var, mean) = flat.var_mean_bias(1);
        assert_close(statistics.mean.sub_scalar(1000.0), mean.reshape([20]), 1e-3);
        assert_close(statistics.var, var.reshape([20]), 1e-3);
        assert_eq!(statistics.count, 120);
    }
}
