//! StyleGAN2's modulated convolution (Karras et al. 2020, section 2.2).

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, dims, small_tensor, tensor, values};
use crate::feature_map::is_cpu;
use crate::kernels::parallel_chunks;
use crate::pool::Buffer;
use crate::{Conv2dOptions, FeatureMap, conv2d, reference, scale_channels};

/// Modulated convolution with odd kernel and "same" padding (equations 1 and 3).
///
/// Scaling the weights per picture, as the paper writes it, equals scaling the activations: the inputs by the style,
/// then one convolution shared by the batch, then the outputs by the demodulation factor
/// `rsqrt(Σ_{i,k} W[o,i,k]²·s[n,i]² + 1e-8)`.
///
/// # Shapes
/// `weight`: `[O, I, k, k]`; `style`: `[N, I]`; output `[N, O, H, W]`.
pub fn modulated_conv2d(x: FeatureMap, weight: Tensor<4>, style: Tensor<2>, demodulate: bool) -> FeatureMap {
    let options = Conv2dOptions::same(weight.dims()[2]);
    let y = conv2d(scale_channels(x, style.clone()), weight.clone(), options);
    if demodulate {
        scale_channels(y, demodulation(energy(weight), style))
    } else {
        y
    }
}

/// The factor per picture and output channel that gives a modulated convolution unit variance.
///
/// # Shapes
/// `energy`: `[O, I]`; `style`: `[N, I]`; output `[N, O]`.
pub(crate) fn demodulation(energy: Tensor<2>, style: Tensor<2>) -> Tensor<2> {
    let variance = style.square().matmul(energy.transpose());
    variance.add_scalar(1e-8).sqrt().recip()
}

/// The sum of squares of each pair of channels, `[O, I, k, k]` → `[O, I]`.
pub(crate) fn energy(weight: Tensor<4>) -> Tensor<2> {
    if is_cpu(&weight.device()) {
        apply1(Energy, weight)
    } else {
        reference::energy(weight)
    }
}

#[derive(Clone, Debug)]
struct Energy;

impl Function<1> for Energy {
    type Saved = FlexTensor;

    fn forward(&self, [weight]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let [o, i, kh, kw] = dims(&weight);
        let (taps, from) = (kh * kw, values(&weight));
        let mut energy = vec![0.0; o * i];
        parallel_chunks(&mut energy, PAIRS, |task, energy| {
            let weight = &from[task * PAIRS * taps..][..energy.len() * taps];
            for (energy, taps) in energy.iter_mut().zip(weight.chunks_exact(taps)) {
                *energy = taps.iter().map(|tap| tap * tap).sum();
            }
        });
        (small_tensor(&energy, [o, i]), weight)
    }

    fn backward(&self, weight: FlexTensor, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let shape @ [_, _, kh, kw] = dims(&weight);
        let (weight, dy, taps) = (values(&weight), values(&dy), kh * kw);
        let mut dw = Buffer::take(weight.len());
        parallel_chunks(&mut dw, PAIRS * taps, |task, dw| {
            let weight = &weight[task * PAIRS * taps..];
            let pairs = dw.chunks_exact_mut(taps).zip(weight.chunks_exact(taps));
            for ((dw, weight), dy) in pairs.zip(&dy[task * PAIRS..]) {
                for (dw, weight) in dw.iter_mut().zip(weight) {
                    *dw = 2.0 * dy * weight;
                }
            }
        });
        [Some(tensor(dw, shape))]
    }
}

/// Pairs of channels that are worth a task.
const PAIRS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_twins, random};

    #[test]
    fn energy_agrees_with_its_reference() {
        assert_twins(
            |[weight]| energy(weight),
            |[weight]| reference::energy(weight),
            [[70, 80, 3, 3]],
            1e-6,
        );
    }

    /// Against weights scaled per picture, as the paper has it.
    #[test]
    fn modulated_convolution_equals_its_definition() {
        let (x, weight, style) = (
            random([2, 20, 6, 6], 1),
            random([24, 20, 3, 3], 2),
            random([2, 20], 3),
        );
        for demodulate in [false, true] {
            let got = modulated_conv2d(
                FeatureMap::from_nchw(x.clone()),
                weight.clone(),
                style.clone(),
                demodulate,
            );
            let pictures = (0..2).map(|n| {
                let style = style.clone().narrow(0, n, 1).reshape([1, 20, 1, 1]);
                let modulated = weight.clone().mul(style);
                let modulated = if demodulate {
                    let energy = modulated.clone().square().sum_dims(&[1, 2, 3]);
                    modulated.mul(energy.add_scalar(1e-8).sqrt().recip())
                } else {
                    modulated
                };
                let x = FeatureMap::from_nchw(x.clone().narrow(0, n, 1));
                conv2d(x, modulated, Conv2dOptions::same3x3()).into_nchw()
            });
            assert_close(got.into_nchw(), Tensor::cat(pictures.collect(), 0), 1e-5);
        }
    }
}
