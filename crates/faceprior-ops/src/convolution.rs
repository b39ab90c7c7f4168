//! Convolutions.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply2, apply4, apply5, dims, tensor, values};
use crate::kernels::direct::{self, Geometry};
use crate::kernels::load::Load;
use crate::kernels::winograd::{self, Shape};
use crate::kernels::{BLOCK, Isa, depthwise};
use crate::pending::{Activation, Constants, GradientPath, deliver};
use crate::pool::Buffer;
use crate::prepared::{self, Form, prepared};
use crate::{FeatureMap, reference};

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
        Self::same(3)
    }

    /// Options of a convolution with an odd kernel that keeps the size.
    pub fn same(kernel: usize) -> Self {
        Self {
            padding: kernel / 2,
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
    if !(x.is_blocked() && (options.groups == 1 || depthwise)) {
        return FeatureMap::from_blocks(reference::conv2d(x.into_blocks(), weight, options), o);
    }
    let (x, pending) = x.into_parts();
    let convolution = |path| Convolution { options, path };
    let y = match pending {
        None => apply2(convolution(None), x, weight),
        Some(pending) => {
            let path = pending.path();
            match pending.slope {
                None => apply4(convolution(path), x, weight, pending.scale, pending.shift),
                Some(slope) => apply5(convolution(path), x, weight, pending.scale, pending.shift, slope),
            }
        }
    };
    FeatureMap::from_blocks(y, o)
}

/// Convolution on blocks, by whichever kernel suits the shape, of a map or of what is still to be done to it.
#[derive(Clone, Debug)]
struct Convolution {
    options: Conv2dOptions,
    path: Option<GradientPath>,
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

impl Convolution {
    /// The output; `prepare` makes the weight ready for a kernel.
    fn output(
        &self,
        x: &FlexTensor,
        load: Option<Load>,
        weight: &FlexTensor,
        prepare: impl Fn(Form, &dyn Fn(&[f32]) -> Buffer) -> Arc<Buffer>,
    ) -> FlexTensor {
        let geometry = self.geometry(x, weight);
        let ([oh, ow], blocks) = (geometry.outputs(), geometry.o.div_ceil(BLOCK));
        let mut y = Buffer::take(geometry.n * blocks * oh * ow * BLOCK);
        let (isa, from) = (Isa::best(), values(x));
        match self.algorithm(geometry) {
            Algorithm::Winograd(shape) => {
                let prepared = prepare(Form::Winograd, &|weight| winograd::prepare(isa, shape, weight));
                winograd::forward(isa, shape, from, load, &prepared, &mut y);
            }
            Algorithm::Direct(geometry) => {
                let prepared = prepare(Form::Direct, &|weight| direct::prepare(isa, geometry, weight));
                direct::forward(isa, geometry, from, load, &prepared, &mut y);
            }
            Algorithm::Depthwise(geometry) => {
                depthwise::forward(isa, geometry, from, load, values(weight), &mut y);
            }
        }
        tensor(y, [geometry.n, blocks, oh, ow, BLOCK])
    }

    /// The output where a gradient will be asked for.
    fn tracked(&self, x: &FlexTensor, load: Option<Load>, weight: &FlexTensor) -> FlexTensor {
        prepared::forget_dead();
        self.output(x, load, weight, |_, prepare| Arc::new(prepare(values(weight))))
    }

    /// The output where none will: weights may stay prepared, if that is a good part of the work.
    fn untracked(&self, x: &FlexTensor, load: Option<Load>, weight: &FlexTensor) -> FlexTensor {
        let [n, _, h, w, _] = dims(x);
        if n * h * w > MAX_PREPARED_PIXELS {
            return self.output(x, load, weight, |_, prepare| Arc::new(prepare(values(weight))));
        }
        self.output(x, load, weight, |form, prepare| prepared(weight, form, prepare))
    }

    /// The gradients of what was read and of the weight.
    fn gradients(
        &self,
        x: &FlexTensor,
        load: Option<Load>,
        weight: &FlexTensor,
        dy: &FlexTensor,
        [of_x, of_weight]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let geometry = self.geometry(x, weight);
        let (isa, algorithm) = (Isa::best(), self.algorithm(geometry));
        let (from, taps, gradient) = (values(x), values(weight), values(dy));
        let dw = of_weight.then(|| {
            let mut dw = Buffer::take(taps.len());
            match algorithm {
                Algorithm::Winograd(shape) => {
                    winograd::weight_gradient(isa, shape, from, load, gradient, &mut dw);
                }
                Algorithm::Direct(geometry) => {
                    direct::weight_gradient(isa, geometry, from, load, gradient, &mut dw);
                }
                Algorithm::Depthwise(geometry) => {
                    depthwise::weight_gradient(isa, geometry, from, load, gradient, &mut dw);
                }
            }
            tensor(dw, dims::<4>(weight))
        });
        let dx = of_x.then(|| {
            let mut dx = Buffer::take(from.len());
            match algorithm {
                Algorithm::Winograd(shape) => winograd::data_gradient(isa, shape, gradient, taps, &mut dx),
                Algorithm::Direct(geometry) => direct::data_gradient(isa, geometry, gradient, taps, &mut dx),
                Algorithm::Depthwise(geometry) => {
                    depthwise::data_gradient(isa, geometry, gradient, taps, &mut dx);
                }
            }
            tensor(dx, dims::<5>(x))
        });
        [dx, dw]
    }

    /// The gradients of the map as it is and of scale, shift and slope, and that of the weight.
    fn loading_gradients(
        &self,
        Loaded { x, weight, constants }: Loaded,
        dy: &FlexTensor,
        wanted: [bool; 2],
    ) -> (Option<FlexTensor>, Option<FlexTensor>, [Option<FlexTensor>; 3]) {
        let [of_x, of_weight] = wanted;
        let [read, dw] = self.gradients(&x, Some(constants.load()), &weight, dy, [true, of_weight]);
        let Some(read) = read else {
            return (None, dw, [None, None, None]);
        };
        let (dx, parameters) = constants.gradients(&x, read, Activation::LINEAR);
        (deliver(self.path.as_ref(), of_x, dx), dw, parameters.map(Some))
    }
}

/// Above this many input pixels preparing a weight is a small part of the work.
const MAX_PREPARED_PIXELS: usize = 2048;

/// What a convolution with something pending keeps.
#[derive(Clone, Debug)]
struct Loaded {
    x: FlexTensor,
    weight: FlexTensor,
    constants: Constants,
}

impl Function<2> for Convolution {
    type Saved = [FlexTensor; 2];

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        (self.tracked(&x, None, &weight), [x, weight])
    }

    fn value(&self, [x, weight]: [FlexTensor; 2]) -> FlexTensor {
        self.untracked(&x, None, &weight)
    }

    fn backward(
        &self,
        [x, weight]: Self::Saved,
        dy: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        self.gradients(&x, None, &weight, &dy, wanted)
    }
}

impl Function<4> for Convolution {
    type Saved = Loaded;

    fn forward(&self, [x, weight, scale, shift]: [FlexTensor; 4]) -> (FlexTensor, Loaded) {
        let constants = Constants::linear(&scale, &shift, self.path.as_ref());
        let y = self.tracked(&x, Some(constants.load()), &weight);
        (y, Loaded { x, weight, constants })
    }

    fn value(&self, [x, weight, scale, shift]: [FlexTensor; 4]) -> FlexTensor {
        let constants = Constants::linear(&scale, &shift, self.path.as_ref());
        self.untracked(&x, Some(constants.load()), &weight)
    }

    fn backward(&self, saved: Loaded, dy: FlexTensor, wanted: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let (dx, dw, [scale, shift, _]) = self.loading_gradients(saved, &dy, [wanted[0], wanted[1]]);
        [dx, dw, scale, shift]
    }
}

impl Function<5> for Convolution {
    type Saved = Loaded;

    fn forward(&self, [x, weight, scale, shift, slope]: [FlexTensor; 5]) -> (FlexTensor, Loaded) {
        let constants = Constants::new(&scale, &shift, values(&slope), self.path.as_ref());
        let y = self.tracked(&x, Some(constants.load()), &weight);
        (y, Loaded { x, weight, constants })
    }

    fn value(&self, [x, weight, scale, shift, slope]: [FlexTensor; 5]) -> FlexTensor {
        let constants = Constants::new(&scale, &shift, values(&slope), self.path.as_ref());
        self.untracked(&x, Some(constants.load()), &weight)
    }

    fn backward(&self, saved: Loaded, dy: FlexTensor, wanted: [bool; 5]) -> [Option<FlexTensor>; 5] {
        let (dx, dw, [scale, shift, slope]) = self.loading_gradients(saved, &dy, [wanted[0], wanted[1]]);
        [dx, dw, scale, shift, slope]
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
            path: None,
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
}
