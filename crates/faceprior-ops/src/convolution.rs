//! Convolutions.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply2, apply4, apply5, dims, tensor, values};
use crate::feature_map::Blocks;
use crate::kept::{Activations, Kept, WeakKept};
use crate::kernels::direct::{self, Geometry};
use crate::kernels::load::Load;
use crate::kernels::winograd::{self, Shape, Tile, strided};
use crate::kernels::{BLOCK, Isa, depthwise};
use crate::pending::{Activation, Constants, GradientPath, Pending, deliver};
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
    let (x, input, kept) = (x.tensor, x.kept, Kept::default());
    let convolution = Convolution {
        options,
        isa: if Activations::current().bf16 {
            Isa::best().for_rounded()
        } else {
            Isa::best()
        },
        path: pending.as_ref().and_then(Pending::path),
        input,
        output: kept.downgrade(),
    };
    let tensor = match pending {
        None => apply2(convolution, x, weight),
        Some(Pending {
            scale,
            shift,
            slope: None,
            ..
        }) => apply4(convolution, x, weight, scale, shift),
        Some(Pending {
            scale,
            shift,
            slope: Some(slope),
            ..
        }) => apply5(convolution, x, weight, scale, shift, slope),
    };
    FeatureMap::from_blocks(Blocks { tensor, kept }, o)
}

/// Convolution on blocks, by whichever kernel suits the shape, of a map or of what is still to be done to it.
#[derive(Clone, Debug)]
struct Convolution {
    options: Conv2dOptions,
    /// What it is computed on, but for weights that stay prepared: those serve any convolution.
    isa: Isa,
    path: Option<GradientPath>,
    input: Kept,
    output: WeakKept,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Winograd(Shape, Tile),
    /// Winograd's form with stride 2; where weights are prepared, direct.
    Strided(Geometry),
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
        if self.options.groups > 1 {
            return Algorithm::Depthwise(geometry);
        }
        match self.winograd(geometry) {
            Some(shape) if shape.tiles_of(4) >= MIN_WINOGRAD_TILES => Algorithm::Winograd(shape, Tile::Four),
            None if strided::suits(self.isa, geometry) => Algorithm::Strided(geometry),
            _ => Algorithm::Direct(geometry),
        }
    }

    /// How the gradient of the weight is computed.
    fn algorithm_of_weight(&self, geometry: Geometry) -> Algorithm {
        match self.algorithm(geometry) {
            Algorithm::Direct(geometry) if strided::suits_weight_gradient(geometry) => {
                Algorithm::Strided(geometry)
            }
            algorithm => algorithm,
        }
    }

    /// How the output is where the weight is prepared already.
    fn algorithm_prepared(&self, geometry: Geometry) -> Algorithm {
        match (self.algorithm(geometry), self.winograd(geometry)) {
            (Algorithm::Direct(_), Some(shape)) if shape.tiles_of(2) >= MIN_WINOGRAD_TILES => {
                Algorithm::Winograd(shape, Tile::Two)
            }
            (algorithm, _) => algorithm,
        }
    }

    /// The shape, if it is one that Winograd's form can compute and has full blocks for.
    fn winograd(&self, geometry: Geometry) -> Option<Shape> {
        let Geometry {
            n,
            i,
            o,
            h,
            w,
            kernel,
            ..
        } = geometry;
        let fits = self.options == Conv2dOptions::same3x3() && kernel == [3, 3] && i >= BLOCK && o >= BLOCK;
        fits.then_some(Shape { n, i, o, h, w })
    }
}

impl Convolution {
    /// The output, which `compute` fills.
    fn output(
        &self,
        x: &FlexTensor,
        weight: &FlexTensor,
        compute: impl FnOnce(Geometry, &mut [f32]),
    ) -> FlexTensor {
        let geometry = self.geometry(x, weight);
        let ([oh, ow], blocks) = (geometry.outputs(), geometry.o.div_ceil(BLOCK));
        let mut y = Buffer::take(geometry.n * blocks * oh * ow * BLOCK);
        compute(geometry, &mut y);
        tensor(y, [geometry.n, blocks, oh, ow, BLOCK])
    }

    /// The output with a weight that is prepared for it alone.
    fn fresh(&self, x: &FlexTensor, load: Option<Load>, weight: &FlexTensor) -> FlexTensor {
        let (isa, from, taps) = (self.isa, values(x), values(weight));
        self.output(x, weight, |geometry, y| match self.algorithm(geometry) {
            Algorithm::Winograd(shape, _) => winograd::forward_once(isa, shape, from, load, taps, y),
            Algorithm::Strided(geometry) => strided::forward(isa, geometry, from, load, taps, y),
            Algorithm::Direct(geometry) => {
                let prepared = direct::prepare(isa, geometry, taps);
                direct::forward(isa, geometry, from, load, &prepared, y);
            }
            Algorithm::Depthwise(geometry) => depthwise::forward(isa, geometry, from, load, taps, y),
        })
    }

    /// The output where a gradient will be asked for, and what the tape keeps.
    fn tracked(
        &self,
        x: &FlexTensor,
        constants: Option<Constants>,
        weight: FlexTensor,
    ) -> (FlexTensor, Saved) {
        prepared::forget_dead();
        self.input.keep(x);
        let saved = Saved { weight, constants };
        let y = self.fresh(x, saved.load(), &saved.weight);
        self.output.compute_again(&self.input, || {
            let (this, saved) = (self.clone(), saved.clone());
            move || this.fresh(&this.input.values(), saved.load(), &saved.weight)
        });
        (y, saved)
    }

    /// The output where none will: weights may stay prepared, if that is a good part of the work.
    fn untracked(&self, x: &FlexTensor, constants: Option<&Constants>, weight: &FlexTensor) -> FlexTensor {
        let ([n, _, h, w, _], load) = (dims(x), constants.map(Constants::load));
        if n * h * w > MAX_PREPARED_PIXELS {
            return self.fresh(x, load, weight);
        }
        let (isa, from) = (Isa::best(), values(x));
        self.output(x, weight, |geometry, y| match self.algorithm_prepared(geometry) {
            Algorithm::Winograd(shape, tile) => {
                let prepare = |taps: &[f32]| winograd::prepare(isa, shape, tile, taps);
                let prepared = prepared(weight, Form::Winograd(tile), prepare);
                winograd::forward(isa, shape, tile, from, load, &prepared, y);
            }
            Algorithm::Direct(geometry) | Algorithm::Strided(geometry) => {
                let prepare = |taps: &[f32]| direct::prepare(isa, geometry, taps);
                let prepared = prepared(weight, Form::Direct, prepare);
                direct::forward(isa, geometry, from, load, &prepared, y);
            }
            Algorithm::Depthwise(geometry) => {
                depthwise::forward(isa, geometry, from, load, values(weight), y)
            }
        })
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
        let isa = self.isa;
        let (from, taps, gradient) = (values(x), values(weight), values(dy));
        let dw = of_weight.then(|| {
            let mut dw = Buffer::take(taps.len());
            match self.algorithm_of_weight(geometry) {
                Algorithm::Winograd(shape, _) => {
                    winograd::weight_gradient(isa, shape, from, load, gradient, &mut dw);
                }
                Algorithm::Strided(geometry) => {
                    strided::weight_gradient(isa, geometry, from, load, gradient, &mut dw);
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
            match self.algorithm(geometry) {
                Algorithm::Winograd(shape, _) => winograd::data_gradient(isa, shape, gradient, taps, &mut dx),
                Algorithm::Strided(geometry) => {
                    strided::data_gradient(isa, geometry, gradient, taps, &mut dx);
                }
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
        saved: &Saved,
        dy: &FlexTensor,
        wanted: [bool; 2],
    ) -> (Option<FlexTensor>, Option<FlexTensor>, [Option<FlexTensor>; 3]) {
        let ([of_x, of_weight], x) = (wanted, self.input.values());
        let [read, dw] = self.gradients(&x, saved.load(), &saved.weight, dy, [true, of_weight]);
        let (Some(read), Some(constants)) = (read, &saved.constants) else {
            return (None, dw, [None, None, None]);
        };
        let (dx, parameters) = constants.gradients(&x, read, Activation::LINEAR);
        (deliver(self.path.as_ref(), of_x, dx), dw, parameters.map(Some))
    }
}

/// Above this many input pixels preparing a weight is a small part of the work.
const MAX_PREPARED_PIXELS: usize = 2048;

/// What a convolution keeps beside its input.
#[derive(Clone, Debug)]
struct Saved {
    weight: FlexTensor,
    /// Where something was pending.
    constants: Option<Constants>,
}

impl Saved {
    fn load(&self) -> Option<Load<'_>> {
        self.constants.as_ref().map(Constants::load)
    }
}

impl Function<2> for Convolution {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> (FlexTensor, Saved) {
        self.tracked(&x, None, weight)
    }

    fn value(&self, [x, weight]: [FlexTensor; 2]) -> FlexTensor {
        self.untracked(&x, None, &weight)
    }

    fn backward(&self, saved: Saved, dy: FlexTensor, wanted: [bool; 2]) -> [Option<FlexTensor>; 2] {
        self.gradients(&self.input.values(), None, &saved.weight, &dy, wanted)
    }
}

impl Function<4> for Convolution {
    type Saved = Saved;

    fn forward(&self, [x, weight, scale, shift]: [FlexTensor; 4]) -> (FlexTensor, Saved) {
        let constants = Constants::linear(&scale, &shift, self.path.as_ref());
        self.tracked(&x, Some(constants), weight)
    }

    fn value(&self, [x, weight, scale, shift]: [FlexTensor; 4]) -> FlexTensor {
        let constants = Constants::linear(&scale, &shift, self.path.as_ref());
        self.untracked(&x, Some(&constants), &weight)
    }

    fn backward(&self, saved: Saved, dy: FlexTensor, wanted: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let (dx, dw, [scale, shift, _]) = self.loading_gradients(&saved, &dy, [wanted[0], wanted[1]]);
        [dx, dw, scale, shift]
    }
}

impl Function<5> for Convolution {
    type Saved = Saved;

    fn forward(&self, [x, weight, scale, shift, slope]: [FlexTensor; 5]) -> (FlexTensor, Saved) {
        let constants = Constants::new(&scale, &shift, values(&slope), self.path.as_ref());
        self.tracked(&x, Some(constants), weight)
    }

    fn value(&self, [x, weight, scale, shift, slope]: [FlexTensor; 5]) -> FlexTensor {
        let constants = Constants::new(&scale, &shift, values(&slope), self.path.as_ref());
        self.untracked(&x, Some(&constants), &weight)
    }

    fn backward(&self, saved: Saved, dy: FlexTensor, wanted: [bool; 5]) -> [Option<FlexTensor>; 5] {
        let (dx, dw, [scale, shift, slope]) = self.loading_gradients(&saved, &dy, [wanted[0], wanted[1]]);
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
            isa: Isa::best(),
            path: None,
            input: Kept::default(),
            output: Kept::default().downgrade(),
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
        let one = Geometry { n: 1, ..geometry };
        let winograd = |algorithm| match algorithm {
            Algorithm::Winograd(_, tile) => Some(tile),
            _ => None,
        };
        assert_eq!(winograd(convolution.algorithm(geometry)), Some(Tile::Four));
        assert_eq!(
            winograd(convolution.algorithm_prepared(geometry)),
            Some(Tile::Four)
        );
        assert_eq!(winograd(convolution.algorithm(one)), None);
        assert_eq!(winograd(convolution.algorithm_prepared(one)), Some(Tile::Two));
        let small = Geometry { h: 7, w: 7, ..one };
        assert_eq!(winograd(convolution.algorithm_prepared(small)), None);
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
