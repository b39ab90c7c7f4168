//! Every operation once in plain tensor code: what runs where no kernel does, and what kernels are tested against.
//!
//! Functions take the blocks `[N, C/b, H, W, b]` of a feature map for any `b`, and parameters in their usual shapes.

use burn::tensor::activation::log_softmax;
use burn::tensor::{
    IndexingUpdateOp, Int, Tensor,
    module::{self, BatchNormTrainOutput},
    ops::{ConvOptions, MaxPoolOptions, PadMode},
    s,
};

use crate::margin::{MIN_SINE_SQUARE, TargetMargin};
use crate::{BiasActivation, Conv2dOptions};

/// `[N, C, H, W]` to `[N, ⌈C/b⌉, H, W, b]`; lanes above `C` are zero.
pub(crate) fn block(x: Tensor<4>, b: usize) -> Tensor<5> {
    let [n, c, h, w] = x.dims();
    if b == 1 {
        return x.reshape([n, c, h, w, 1]);
    }
    let padded = c.next_multiple_of(b);
    let x = if padded == c {
        x
    } else {
        x.pad([(0, padded - c), (0, 0), (0, 0)], PadMode::Constant(0.0))
    };
    x.reshape([n, padded / b, b, h, w]).permute([0, 1, 3, 4, 2])
}

/// `[N, ⌈C/b⌉, H, W, b]` to `[N, C, H, W]`.
pub(crate) fn unblock(x: Tensor<5>, channels: usize) -> Tensor<4> {
    let [n, blocks, h, w, b] = x.dims();
    if b == 1 {
        return x.reshape([n, channels, h, w]);
    }
    let x = x.permute([0, 1, 4, 2, 3]).reshape([n, blocks * b, h, w]);
    if blocks * b == channels {
        x
    } else {
        x.narrow(1, 0, channels)
    }
}

/// One value per channel `[C]` as a view that broadcasts over blocks, `[1, C/b, 1, 1, b]`.
fn per_channel(values: Tensor<1>, x: &Tensor<5>) -> Tensor<5> {
    let channels = values.dims()[0];
    per_sample_channel(values.reshape([1, channels]), x)
}

/// One value per picture and channel `[N, C]` as a view that broadcasts over blocks, `[N, C/b, 1, 1, b]`.
fn per_sample_channel(values: Tensor<2>, x: &Tensor<5>) -> Tensor<5> {
    let [_, blocks, _, _, b] = x.dims();
    let [n, channels] = values.dims();
    let padding = blocks * b - channels;
    let values = if padding == 0 {
        values
    } else {
        values.pad([(0, padding)], PadMode::Constant(0.0))
    };
    values.reshape([n, blocks, 1, 1, b])
}

pub(crate) fn conv2d(x: Tensor<5>, weight: Tensor<4>, options: Conv2dOptions) -> Tensor<5> {
    let b = x.dims()[4];
    let x = unblock(x, weight.dims()[1] * options.groups);
    let Conv2dOptions {
        stride,
        padding,
        groups,
    } = options;
    let options = ConvOptions::new([stride; 2], [padding; 2], [1; 2], groups);
    block(module::conv2d(x, weight, None, options), b)
}

/// The sum of squares of each pair of channels, `[O, I]`.
pub(crate) fn energy(weight: Tensor<4>) -> Tensor<2> {
    let [o, i, _, _] = weight.dims();
    weight.square().sum_dims(&[2, 3]).reshape([o, i])
}

pub(crate) fn add_bias(x: Tensor<5>, bias: Tensor<1>) -> Tensor<5> {
    let bias = per_channel(bias, &x);
    x.add(bias)
}

pub(crate) fn scale_channels(x: Tensor<5>, scale: Tensor<2>) -> Tensor<5> {
    let scale = per_sample_channel(scale, &x);
    x.mul(scale)
}

/// `x · scale + shift` per channel.
pub(crate) fn scale_shift(x: Tensor<5>, scale: Tensor<1>, shift: Tensor<1>) -> Tensor<5> {
    let (scale, shift) = (per_channel(scale, &x), per_channel(shift, &x));
    x.mul(scale).add(shift)
}

pub(crate) fn batch_norm_train(
    x: Tensor<5>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
) -> (Tensor<5>, Tensor<1>, Tensor<1>) {
    let b = x.dims()[4];
    let x = unblock(x, weight.dims()[0]);
    let BatchNormTrainOutput {
        output,
        mean,
        variance,
    } = module::batch_norm_train(x, weight, bias, eps);
    (block(output, b), mean, variance)
}

pub(crate) fn prelu(x: Tensor<5>, slope: Tensor<1>) -> Tensor<5> {
    let slope = per_channel(slope, &x);
    let negative = x.clone().clamp_max(0.0);
    x.clamp_min(0.0).add(negative.mul(slope))
}

pub(crate) fn bias_activation(x: Tensor<5>, bias: Option<Tensor<1>>, options: BiasActivation) -> Tensor<5> {
    let BiasActivation {
        negative_slope,
        gain,
        clamp,
    } = options;
    let x = match bias {
        Some(bias) => add_bias(x, bias),
        None => x,
    };
    let x = match negative_slope {
        1.0 => x,
        0.0 => burn::tensor::activation::relu(x),
        slope => burn::tensor::activation::leaky_relu(x, f64::from(slope)),
    };
    let x = if gain == 1.0 { x } else { x.mul_scalar(gain) };
    match clamp {
        Some(limit) => x.clamp(-limit, limit),
        None => x,
    }
}

/// The derivative of [`bias_activation`] in the direction `tangent`. The slope at each value is a constant: the
/// function is linear in pieces.
pub(crate) fn bias_activation_tangent(
    x: Tensor<5>,
    bias: Option<Tensor<1>>,
    tangent: Tensor<5>,
    options: BiasActivation,
) -> Tensor<5> {
    let BiasActivation {
        negative_slope,
        gain,
        clamp,
    } = options;
    let x = x.detach();
    let x = match bias {
        Some(bias) => add_bias(x, bias.detach()),
        None => x,
    };
    let slope = Tensor::full_like(&x, gain).mask_fill(x.clone().lower_equal_elem(0.0), gain * negative_slope);
    let slope = match clamp {
        Some(limit) => {
            let beyond = x.mul(slope.clone()).abs().greater_equal_elem(limit);
            slope.mask_fill(beyond, 0.0)
        }
        None => slope,
    };
    tangent.mul(slope)
}

pub(crate) fn global_average_pool(x: Tensor<5>, channels: usize) -> Tensor<2> {
    let [n, blocks, _, _, b] = x.dims();
    let mean = x.mean_dims(&[2, 3]).reshape([n, blocks * b]);
    if blocks * b == channels {
        mean
    } else {
        mean.narrow(1, 0, channels)
    }
}

pub(crate) fn max_pool2d(
    x: Tensor<5>,
    channels: usize,
    kernel: usize,
    stride: usize,
    ceil_mode: bool,
) -> Tensor<5> {
    let b = x.dims()[4];
    let options = MaxPoolOptions::new([kernel; 2])
        .with_stride([stride; 2])
        .with_ceil_mode(ceil_mode);
    block(module::max_pool2d(unblock(x, channels), options), b)
}

pub(crate) fn subsample(x: Tensor<5>, stride: usize) -> Tensor<5> {
    x.slice(s![.., .., ..;stride as isize, ..;stride as isize, ..])
}

pub(crate) fn add_noise(x: Tensor<5>, noise: Tensor<4>, strength: Tensor<1>) -> Tensor<5> {
    let [n, _, h, w] = noise.dims();
    let noise = noise.mul(strength.reshape([1, 1, 1, 1])).reshape([n, 1, h, w, 1]);
    x.add(noise)
}

/// Smooth upsampling: nearest ×2, replication pad (2 before, 1 after), FIR [1, 3, 3, 1]/8 along each axis.
///
/// Of the four taps that meet an output pixel, pairs fall on the same input pixel, which leaves per axis
/// `y[2m] = (x[m−1] + x[m])/2` and `y[2m+1] = (x[m−1] + 6·x[m] + x[m+1])/8`, the border replicated.
pub(crate) fn upsample_smooth(x: Tensor<5>) -> Tensor<5> {
    [2, 3].into_iter().fold(x, |x, axis| {
        let (before, after) = (shift(x.clone(), axis, -1), shift(x.clone(), axis, 1));
        let even = before.clone().add(x.clone()).mul_scalar(0.5);
        let odd = before.add(after).mul_scalar(0.125).add(x.mul_scalar(0.75));
        let mut dims = even.dims();
        dims[axis] *= 2;
        Tensor::stack::<6>(vec![even, odd], axis + 1).reshape(dims)
    })
}

/// Smooth downsampling: replication pad (2 before, 1 after), FIR [1, 3, 3, 1]/8 along each axis, every second pixel.
pub(crate) fn downsample_smooth(x: Tensor<5>) -> Tensor<5> {
    [2, 3].into_iter().fold(x, |x, axis| {
        let length = x.dims()[axis];
        let padded = replicate(x, axis, 2, 1);
        let taps = [0.125, 0.375, 0.375, 0.125].into_iter().enumerate();
        let outputs = length.div_ceil(2);
        taps.map(|(tap, weight)| {
            let every_second: Vec<_> = (0..5)
                .map(|a| {
                    if a == axis {
                        (tap..tap + 2 * outputs - 1, 2)
                    } else {
                        (0..padded.dims()[a], 1)
                    }
                })
                .map(|(range, step)| {
                    burn::tensor::Slice::new(range.start as isize, Some(range.end as isize), step)
                })
                .collect();
            padded.clone().slice(every_second.as_slice()).mul_scalar(weight)
        })
        .reduce(Tensor::add)
        .expect("four taps")
    })
}

/// `y[j] = x[j + by]` along an axis, the border replicated.
fn shift(x: Tensor<5>, axis: usize, by: isize) -> Tensor<5> {
    let length = x.dims()[axis];
    match by {
        -1 => replicate(x, axis, 1, 0).narrow(axis, 0, length),
        _ => replicate(x, axis, 0, 1).narrow(axis, 1, length),
    }
}

/// Replication pad along one axis.
fn replicate(x: Tensor<5>, axis: usize, before: usize, after: usize) -> Tensor<5> {
    let length = x.dims()[axis];
    let first = x.clone().narrow(axis, 0, 1);
    let last = x.clone().narrow(axis, length - 1, 1);
    let mut parts = vec![first; before];
    parts.push(x);
    parts.extend(vec![last; after]);
    Tensor::cat(parts, axis)
}

/// Logits of a margin head, `[N, C]`; see [`crate::margin_cross_entropy`].
pub(crate) fn margin_logits(
    x: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: f32,
    target: TargetMargin,
) -> Tensor<2> {
    let cosines = normalize(x).matmul(normalize(weight).transpose()); // [N, C]
    let labels = labels.unsqueeze_dim::<2>(1); // [N, 1]
    let cos = cosines.clone().gather(1, labels.clone()); // [N, 1]
    let with_margin = match target {
        TargetMargin::Cosine { margin } => cos.clone().sub_scalar(margin),
        TargetMargin::Angle { margin, easy } => {
            let (sin_m, cos_m) = margin.sin_cos();
            // sin θ = √(1 − cos² θ), kept off 0 where its derivative is infinite.
            let square = cos.clone().square().neg().add_scalar(1.0);
            let sine = square.clamp(MIN_SINE_SQUARE, 1.0).sqrt();
            let moved = cos.clone().mul_scalar(cos_m) - sine.mul_scalar(sin_m); // cos(θ + m)
            let (threshold, otherwise) = if easy {
                (0.0, cos.clone())
            } else {
                // cos(π − m) = −cos m; m·sin(π − m) = m·sin m.
                (-cos_m, cos.clone().sub_scalar(margin * sin_m))
            };
            moved.mask_where(cos.clone().lower_equal_elem(threshold), otherwise)
        }
    };
    cosines
        .scatter(1, labels, with_margin - cos, IndexingUpdateOp::Add)
        .mul_scalar(scale)
}

/// Mean cross-entropy of logits `[N, C]`, and the number of classes above each target.
pub(crate) fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> (Tensor<1>, Vec<u32>) {
    let labels = labels.unsqueeze_dim::<2>(1); // [N, 1]
    let target = logits.clone().gather(1, labels.clone()); // [N, 1]
    let above: Vec<f32> = logits
        .clone()
        .greater(target)
        .float()
        .sum_dim(1)
        .into_data()
        .try_to_vec()
        .expect("a float tensor holds floats");
    let loss = log_softmax(logits, 1).gather(1, labels).mean().neg();
    (loss, above.into_iter().map(|count| count as u32).collect())
}

/// Rows of length 1; rows shorter than 1e-12 are divided by that.
fn normalize(vectors: Tensor<2>) -> Tensor<2> {
    let length = vectors.clone().square().sum_dim(1).clamp_min(1e-24).sqrt(); // [N, 1]
    vectors / length
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_twins;
    use crate::{FeatureMap, dual};

    /// A map in the layout of devices without kernels.
    fn plain(x: Tensor<4>) -> FeatureMap {
        let channels = x.dims()[1];
        FeatureMap::from_blocks(block(x, 1), channels)
    }

    /// A chain of all operations on the public interface, in the layout that `map` makes.
    fn chain(map: fn(Tensor<4>) -> FeatureMap, [x, weight, vector]: [Tensor<4>; 3]) -> Tensor<4> {
        let (n, style) = (x.dims()[0], vector.clone().reshape([2, 20]));
        let channel = vector.narrow(0, 0, 1).reshape([20]);
        let noise = crate::testing::random([n, 1, 8, 6], 9);
        let same = Conv2dOptions::same3x3();
        let activation = BiasActivation {
            negative_slope: 0.2,
            gain: 1.5,
            clamp: Some(2.0),
        };

        let x = crate::conv2d(map(x), weight.clone(), same).add(map(noise.clone().repeat_dim(1, 20)));
        let x = crate::bias_activation(x, Some(channel.clone()), activation);
        let x = crate::prelu(x, channel.clone()).mul_scalar(1.3);
        let (x, _) = crate::batch_norm_train(x, channel.clone(), channel.clone(), 1e-5);
        let x = crate::batch_norm(
            x,
            channel.clone(),
            channel.clone(),
            channel.clone(),
            channel.clone().square(),
            0.1,
        );
        let x = crate::add_noise(x, noise, channel.clone().narrow(0, 0, 1));
        let x = crate::modulated_conv2d(x, weight.clone(), style.clone(), true);
        let x = crate::downsample_smooth(crate::upsample_smooth(x));
        let x = crate::max_pool2d(crate::relu(crate::leaky_relu(x, 0.1)), 3, 1, false);
        let (first, rest) = x.split_batch(1);
        let x = FeatureMap::cat_batch(vec![rest, first]);
        let x = crate::scale_channels(x.clone(), crate::global_average_pool(x));

        let x = dual::Dual {
            value: x.clone(),
            tangent: x.mul_scalar(0.5),
        };
        let x = dual::add_noise(
            dual::conv2d(x.clone(), weight.clone(), same),
            crate::testing::random([n, 1, 6, 4], 9),
            channel.clone().narrow(0, 0, 1),
        );
        let x = dual::bias_activation(x, Some(channel), activation);
        let style = dual::Dual {
            value: style.clone(),
            tangent: style,
        };
        let x = dual::modulated_conv2d(
            dual::upsample_smooth(dual::downsample_smooth(x)),
            weight,
            style,
            true,
        );
        let both = dual::flatten(dual::add(x.clone(), x));
        let [_, columns] = both.value.dims();
        both.value.add(both.tangent).reshape([n, columns, 1, 1])
    }

    #[test]
    fn a_network_gives_the_same_in_either_layout() {
        assert_twins(
            |inputs| chain(FeatureMap::from_nchw, inputs),
            |inputs| chain(plain, inputs),
            [[2, 20, 8, 6], [20, 20, 3, 3], [2, 20, 1, 1]],
            1e-4,
        );
    }
}
