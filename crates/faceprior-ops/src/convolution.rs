//! Convolutions.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply2, dims, tensor, values};
use crate::kernels::direct::{self, Geometry};
use crate::kernels::winograd::{self, Shape};
use crate::kernels::{BLOCK, Isa, depthwise};
use crate::pool::Buffer;
use crate::{FeatureMap, reference, scale_channels};

/// Geometry of a 2-D convolution: square stride and zero padding, no dilation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Distance in pixels between neighbouring outputs.
    pub stride: usize,
    /// Zeros around the input, in pixels.
    pub padding: usize,
    /// Groups of channels that do not mix; `C` groups make a depthwise convolution.
    pub groups: usize,
}

impl Default for Conv2dOptions {
    fn default() -> Self {
        Self {
            stride: 1,
            padding: 0,
            groups: 1,
        }
    }
}

impl Conv2dOptions {
    /// Options of a 3×3 convolution that keeps the size.
    pub fn same3x3() -> Self {
        Self {
            padding: 1,
            ..Self::default()
        }
    }
}

/// Convolution without bias (cross-correlation, as in every deep-learning library).
///
/// # Shapes
/// `weight`: `[O, I/groups, kh, kw]`; output `[N, O, (H + 2·padding − kh)/stride + 1, …]`, rounded down.
pub fn conv2d(x: FeatureMap, weight: Tensor<4>, options: Conv2dOptions) -> FeatureMap {
    let [o, i, _, _] = weight.dims();
    assert_eq!(
        i * options.groups,
        x.channels(),
        "convolution weight does not fit the input's channels"
    );
    let depthwise = options.groups == x.channels() && options.groups == o;
    let y = if x.is_blocked() && (options.groups == 1 || depthwise) {
        apply2(Convolution { options }, x.into_blocks(), weight)
    } else {
        reference::conv2d(x.into_blocks(), weight, options)
    };
    FeatureMap::from_blocks(y, o)
}

/// StyleGAN2's modulated convolution with odd kernel and "same" padding (Karras et al. 2020, equations 1 and 3).
///
/// Scaling the weights per picture, as the paper writes it, equals scaling the activations: the inputs by the style,
/// then one convolution shared by the batch, then the outputs by the demodulation factor
/// `rsqrt(Σ_{i,k} W[o,i,k]²·s[n,i]² + 1e-8)`.
///
/// # Shapes
/// `weight`: `[O, I, k, k]`; `style`: `[N, I]`; output `[N, O, H, W]`.
pub fn modulated_conv2d(x: FeatureMap, weight: Tensor<4>, style: Tensor<2>, demodulate: bool) -> FeatureMap {
    let options = Conv2dOptions {
        padding: weight.dims()[2] / 2,
        ..Conv2dOptions::default()
    };
    let y = conv2d(scale_channels(x, style.clone()), weight.clone(), options);
    if demodulate {
        scale_channels(y, reference::demodulation(weight, style))
    } else {
        y
    }
}

/// Convolution on blocks, by whichever kernel suits the shape.
#[derive(Clone, Debug)]
struct Convolution {
    options: Conv2dOptions,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Winograd(Shape),
    Direct(Geometry),
    Depthwise(Geometry),
}

/// Below this many tiles transforming the weight costs more than Winograd's form saves.
const MIN_WINOGRAD_TILES: usize = 32;

impl Convolution {
    fn geometry(&self, x: &FlexTensor, weight: &FlexTensor) -> Geometry {
        let ([n, _, h, w, _], [o, i, kh, kw]) = (dims(x), dims(weight));
        let Conv2dOptions {
            stride,
            padding,
            groups,
        } = self.options;
        Geometry {
            n,
            i: i * groups,
            o,
            h,
            w,
            kernel: [kh, kw],
            stride,
            padding,
        }
    }

    fn algorithm(&self, geometry: Geometry) -> Algorithm {
        let Geometry {
            n,
            i,
            o,
            h,
            w,
            kernel,
            ..
        } = geometry;
        let shape = Shape { n, i, o, h, w };
        if self.options.groups > 1 {
            Algorithm::Depthwise(geometry)
        } else if self.options == Conv2dOptions::same3x3()
            && kernel == [3, 3]
            && i >= BLOCK
            && o >= BLOCK
            && shape.tiles() >= MIN_WINOGRAD_TILES
        {
            Algorithm::Winograd(shape)
        } else {
            Algorithm::Direct(geometry)
        }
    }
}

impl Function<2> for Convolution {
    type Saved = [FlexTensor; 2];

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        let geometry = self.geometry(&x, &weight);
        let ([oh, ow], blocks) = (geometry.outputs(), geometry.o.div_ceil(BLOCK));
        let mut y = Buffer::take(geometry.n * blocks * oh * ow * BLOCK);
        let (isa, from, taps) = (Isa::best(), values(&x), values(&weight));
        match self.algorithm(geometry) {
            Algorithm::Winograd(shape) => winograd::forward(isa, shape, from, taps, &mut y),
            Algorithm::Direct(geometry) => direct::forward(isa, geometry, from, taps, &mut y),
            Algorithm::Depthwise(geometry) => depthwise::forward(isa, geometry, from, taps, &mut y),
        }
        (tensor(y, [geometry.n, blocks, oh, ow, BLOCK]), [x, weight])
    }

    fn backward(
        &self,
        [x, weight]: Self::Saved,
        dy: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let geometry = self.geometry(&x, &weight);
        let (isa, algorithm) = (Isa::best(), self.algorithm(geometry));
        let (from, taps, gradient) = (values(&x), values(&weight), values(&dy));
        let dx = wanted[0].then(|| {
            let mut dx = Buffer::take(from.len());
            match algorithm {
                Algorithm::Winograd(shape) => winograd::data_gradient(isa, shape, gradient, taps, &mut dx),
                Algorithm::Direct(geometry) => direct::data_gradient(isa, geometry, gradient, taps, &mut dx),
                Algorithm::Depthwise(geometry) => {
                    depthwise::data_gradient(isa, geometry, gradient, taps, &mut dx)
                }
            }
            tensor(dx, dims::<5>(&x))
        });
        let dw = wanted[1].then(|| {
            let mut dw = Buffer::take(taps.len());
            match algorithm {
                Algorithm::Winograd(shape) => winograd::weight_gradient(isa, shape, from, gradient, &mut dw),
                Algorithm::Direct(geometry) => {
                    direct::weight_gradient(isa, geometry, from, gradient, &mut dw)
                }
                Algorithm::Depthwise(geometry) => {
                    depthwise::weight_gradient(isa, geometry, from, gradient, &mut dw)
                }
            }
            tensor(dw, dims::<4>(&weight))
        });
        [dx, dw]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{assert_close, assert_twins, random};

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Values and both gradients of whichever kernel is chosen, against Burn's own convolution.
        #[test]
        fn kernels_agree_with_their_reference(
            (n, i, o) in (1usize..5, 1usize..40, 1usize..70),
            (h, w) in (1usize..20, 1usize..20),
            (kernel, stride, padding) in prop_oneof![Just((3, 1, 1)), Just((3, 2, 1)), Just((1, 1, 0)), Just((1, 2, 0))],
            depthwise: bool,
        ) {
            let groups = if depthwise { i } else { 1 };
            let options = Conv2dOptions { stride, padding, groups };
            let weight = if depthwise { [i, 1, kernel, kernel] } else { [o, i, kernel, kernel] };
            assert_twins(
                |[x, weight]| conv2d(FeatureMap::from_nchw(x), weight, options).into_nchw(),
                |[x, weight]| {
                    let outputs = weight.dims()[0];
                    reference::unblock(reference::conv2d(reference::block(x, 1), weight, options), outputs)
                },
                [[n, i, h, w], weight],
                5e-5,
            );
        }
    }

    #[test]
    fn same3x3_of_many_tiles_takes_winograds_form() {
        let convolution = Convolution {
            options: Conv2dOptions::same3x3(),
        };
        let geometry = Geometry {
            n: 2,
            i: 16,
            o: 16,
            h: 16,
            w: 16,
            kernel: [3, 3],
            stride: 1,
            padding: 1,
        };
        assert!(matches!(convolution.algorithm(geometry), Algorithm::Winograd(_)));
        assert!(matches!(
            convolution.algorithm(Geometry { n: 1, ..geometry }),
            Algorithm::Direct(_)
        ));
    }

    #[test]
    fn grouped_convolution_falls_back_to_the_reference() {
        let (x, weight) = (random([2, 32, 5, 5], 1), random([8, 16, 3, 3], 2));
        let options = Conv2dOptions {
            groups: 2,
            ..Conv2dOptions::same3x3()
        };
        let y = conv2d(FeatureMap::from_nchw(x.clone()), weight.clone(), options).into_nchw();
        let halves = x
            .chunk(2, 1)
            .into_iter()
            .zip(weight.chunk(2, 0))
            .map(|(x, weight)| {
                conv2d(FeatureMap::from_nchw(x), weight, Conv2dOptions::same3x3()).into_nchw()
            });
        assert_close(y, Tensor::cat(halves.collect(), 1), 1e-5);
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
