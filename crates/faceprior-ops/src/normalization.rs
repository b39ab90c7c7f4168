//! Batch normalisation (Ioffe & Szegedy 2015).

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, apply3, dims, small_tensor, tensor, values};
use crate::kept::Kept;
use crate::kernels::{BLOCK, Isa, pointwise};
use crate::pending::{GradientPath, Normalization, Pending, Waiting, overwrite};
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
        let (scale, shift) = (scale.unsqueeze(), shift.unsqueeze());
        x.pend(Pending::is_linear, |pending| pending.times(scale).plus(shift))
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
    let x = x.settled();
    let waiting = Waiting::default();
    let moments: Tensor<3> = apply1(
        Moments {
            channels: c,
            waiting: waiting.clone(),
            kept: x.kept.clone(),
        },
        x.tensor.clone(),
    ); // [N, 2, C]
    let known = moments.to_data().try_to_vec::<f32>().expect("an f32 tensor");
    let normalize = Normalize::new(&known, c, eps);
    let device = x.tensor.device();
    let statistic = |values: &[f64]| {
        let values: Vec<_> = values.iter().map(|value| *value as f32).collect();
        Tensor::from_floats(values.as_slice(), &device)
    };
    let (mean, var) = (statistic(&normalize.mean), statistic(&normalize.var));
    let centre = normalize.mean.iter().map(|mean| *mean as f32).collect();
    let normalization = Normalization {
        moments: moments.clone(),
        path: GradientPath::new(centre, waiting),
    };
    let coefficients: Tensor<2> = apply3(normalize, moments, weight, bias); // [2, C]
    let scale = coefficients.clone().narrow(0, 0, 1); // [1, C]
    let shift = coefficients.narrow(0, 1, 1); // [1, C]
    let y = FeatureMap::from_blocks(x, c).pend(Pending::is_linear, |_| {
        Pending::normalized(scale, shift, normalization)
    });
    (y, BatchStatistics { mean, var, count })
}

/// Mean and variance of each plane, `[N, 2, C]`.
///
/// In the backward pass it adds the gradient through itself to the one through the values that waits.
#[derive(Clone, Debug)]
struct Moments {
    channels: usize,
    waiting: Waiting,
    kept: Kept,
}

impl Moments {
    /// The moments, and the means for the backward pass.
    fn run(&self, x: &FlexTensor) -> (FlexTensor, Vec<f32>) {
        let ([n, blocks, ..], channels) = (dims::<5>(x), self.channels);
        let planes = pointwise::moments(Isa::best(), n * blocks, values(x));
        let mut moments = vec![0.0; n * 2 * channels];
        let mut means = vec![0.0; n * blocks * BLOCK];
        for (index, plane) in planes.iter().enumerate() {
            let (picture, first) = (index / blocks, index % blocks * BLOCK);
            for lane in 0..BLOCK.min(channels - first) {
                let mean = plane.centre[lane] + plane.offset[lane];
                let at = picture * 2 * channels + first + lane;
                moments[at] = mean;
                moments[at + channels] = (plane.square[lane] - plane.offset[lane].powi(2)).max(0.0);
                means[index * BLOCK + lane] = mean;
            }
        }
        (small_tensor(&moments, [n, 2, channels]), means)
    }
}

impl Function<1> for Moments {
    /// The planes' means.
    type Saved = Vec<f32>;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Vec<f32>) {
        self.kept.keep(&x);
        self.run(&x)
    }

    fn value(&self, [x]: [FlexTensor; 1]) -> FlexTensor {
        self.run(&x).0
    }

    /// With the plane's mean `m` and P pixels: `dx = dm/P + dv · 2(x − m)/P`.
    fn backward(&self, means: Vec<f32>, dy: FlexTensor, wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let waiting = self.waiting.take();
        if !wanted[0] {
            return [None];
        }
        let x = self.kept.values();
        let ([n, blocks, h, w, _], channels) = (dims(&x), self.channels);
        let (dy, pixels) = (values(&dy), (h * w) as f32);
        let mut constants = [(); 2].map(|()| vec![0.0; n * blocks * BLOCK]);
        for picture in 0..n {
            for channel in 0..channels {
                let from = picture * 2 * channels + channel;
                let (mean, square) = (dy[from] / pixels, 2.0 * dy[from + channels] / pixels);
                let at = picture * blocks * BLOCK + channel;
                constants[0][at] = square;
                constants[1][at] = mean - square * means[at];
            }
        }
        let constants = constants.each_ref().map(Vec::as_slice);
        let dx = match waiting {
            Some(dx) => overwrite(pointwise::AddScaleShift {}, &x, dx, constants).0,
            None => {
                let op = pointwise::ScaleShift {};
                let (dx, []) = pointwise::pointwise(Isa::best(), op, n * blocks, [values(&x)], constants);
                tensor(dx, dims::<5>(&x))
            }
        };
        [Some(dx)]
    }
}

/// From the moments of planes, weight and bias to a factor and a summand per channel, `[2, C]`, for `x − mean`.
///
/// Of the summand the mean's part is kept aside, as the centre of the map: it is `bias` here, and moves with the mean.
#[derive(Clone, Debug)]
struct Normalize {
    mean: Vec<f64>,
    var: Vec<f64>,
    eps: f64,
}

impl Normalize {
    /// Planes have equally many pixels, so that their moments join without weights (Chan et al. 1983).
    fn new(moments: &[f32], channels: usize, eps: f64) -> Self {
        let rows = || moments.chunks_exact(2 * channels);
        let n = (moments.len() / (2 * channels)) as f64;
        let mean: Vec<_> = (0..channels)
            .map(|channel| rows().map(|row| f64::from(row[channel])).sum::<f64>() / n)
            .collect();
        let var = (0..channels).map(|channel| {
            let squares = rows().map(|row| {
                f64::from(row[channels + channel]) + (f64::from(row[channel]) - mean[channel]).powi(2)
            });
            squares.sum::<f64>() / n
        });
        Self {
            var: var.collect(),
            mean,
            eps,
        }
    }

    /// `1/√(var + eps)` of a channel.
    fn inverse_deviation(&self, channel: usize) -> f64 {
        1.0 / (self.var[channel] + self.eps).sqrt()
    }
}

impl Function<3> for Normalize {
    /// Moments and weight.
    type Saved = [FlexTensor; 2];

    fn forward(&self, [moments, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let scales = values(&weight).iter().enumerate();
        let scales =
            scales.map(|(channel, weight)| (f64::from(*weight) * self.inverse_deviation(channel)) as f32);
        let coefficients: Vec<_> = scales.chain(values(&bias).iter().copied()).collect();
        let channels = self.mean.len();
        (small_tensor(&coefficients, [2, channels]), [moments, weight])
    }

    /// With `r = 1/√(var + eps)`, `scale = weight · r` and `shift = bias − (mean − centre) · scale` at `mean = centre`.
    fn backward(
        &self,
        [moments, weight]: Self::Saved,
        dy: FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [n, _, channels] = dims(&moments);
        let (dy, weight, means) = (values(&dy), values(&weight), values(&moments));
        let (mut weights, mut through) = (vec![0.0; channels], vec![0.0; n * 2 * channels]);
        for channel in 0..channels {
            let (scale, shift) = (f64::from(dy[channel]), f64::from(dy[channels + channel]));
            let (r, w) = (self.inverse_deviation(channel), f64::from(weight[channel]));
            weights[channel] = (scale * r) as f32;
            let mean = -shift * w * r / n as f64;
            let var = -0.5 * scale * w * r.powi(3) / n as f64;
            for row in 0..n {
                let at = row * 2 * channels + channel;
                let distance = f64::from(means[at]) - self.mean[channel];
                through[at] = (mean + 2.0 * var * distance) as f32;
                through[at + channels] = var as f32;
            }
        }
        [
            Some(small_tensor(&through, [n, 2, channels])),
            Some(small_tensor(&weights, [channels])),
            Some(small_tensor(&dy[channels..], [channels])),
        ]
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
