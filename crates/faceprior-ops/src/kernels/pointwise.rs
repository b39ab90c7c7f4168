//! Operations on one value at a time, with parameters per channel and sums per channel.
//!
//! All of them share [`pointwise`]: a loop over planes of sixteen channels that reads some maps, writes one, and adds
//! up terms. What is done to a value is an [`Op`].

use rayon::prelude::*;

use super::lanes::{Isa, Kernel, Lanes};
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// What happens to one value: `INPUTS` maps and `CONSTANTS` values of the channel in, a value and `SUMS` terms out.
pub(crate) trait Op<const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize>:
    Copy + Sync
{
    /// Whether the value is kept, or only the sums.
    const WRITES: bool = true;

    /// # Safety
    /// The processor must have the instructions of `L`.
    unsafe fn apply<L: Lanes>(
        self,
        inputs: [L; INPUTS],
        constants: [L; CONSTANTS],
        sums: &mut [L; SUMS],
    ) -> L;
}

/// Applies an operation to all planes of a map with `planes` planes.
///
/// Constants have one value per channel `[⌈C/16⌉·16]`, or per picture and channel `[N·⌈C/16⌉·16]`. Returns the written
/// map (empty for operations that write none) and each sum per picture and channel, `[SUMS][N·⌈C/16⌉·16]`.
pub(crate) fn pointwise<O, const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize>(
    isa: Isa,
    op: O,
    planes: usize,
    inputs: [&[f32]; INPUTS],
    constants: [&[f32]; CONSTANTS],
) -> (Buffer, [Vec<f32>; SUMS])
where
    O: Op<INPUTS, CONSTANTS, SUMS>,
{
    let length = inputs[0].len();
    assert!(inputs.iter().all(|input| input.len() == length) && length.is_multiple_of(planes * BLOCK));
    assert!(
        constants
            .iter()
            .all(|constant| (planes * BLOCK).is_multiple_of(constant.len()))
    );
    let mut y = Buffer::take(if O::WRITES { length } else { 0 });
    let mut sums = [(); SUMS].map(|()| vec![0.0; planes * BLOCK]);
    let (to, totals) = (Shared::new(&mut y), sums.each_mut().map(|sums| Shared::new(sums)));
    // Small planes, as of 7×7 pixels, go several to a task; the order of sums stays that of one plane.
    let plane = length / planes;
    let task_planes = (TASK_FLOATS / plane).clamp(1, planes);
    parallel(planes.div_ceil(task_planes), |task| {
        for index in task * task_planes..planes.min((task + 1) * task_planes) {
            isa.run(Plane {
                op,
                index,
                plane,
                inputs,
                constants,
                to,
                totals,
            });
        }
    });
    (y, sums)
}

const TASK_FLOATS: usize = 16 << 10;
/// Vectors whose terms are added before they join the sum of a plane, which keeps rounding errors small.
const SUM_VECTORS: usize = 64;

struct Plane<'a, O, const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize> {
    op: O,
    index: usize,
    plane: usize,
    inputs: [&'a [f32]; INPUTS],
    constants: [&'a [f32]; CONSTANTS],
    to: Shared,
    totals: [Shared; SUMS],
}

impl<O, const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize> Kernel
    for Plane<'_, O, INPUTS, CONSTANTS, SUMS>
where
    O: Op<INPUTS, CONSTANTS, SUMS>,
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            op,
            index,
            plane,
            inputs,
            constants,
            to,
            totals,
        } = self;
        // SAFETY: the caller promises the instructions; `pointwise` has checked the lengths; tasks have planes of
        // their own.
        unsafe {
            let mut values = [L::zero(); CONSTANTS];
            for (value, constants) in values.iter_mut().zip(constants) {
                *value = L::load(constants[index * BLOCK % constants.len()..].as_ptr());
            }
            let mut total = [L::zero(); SUMS];
            for first in (0..plane).step_by(SUM_VECTORS * BLOCK) {
                let mut sums = [L::zero(); SUMS];
                for at in (first..plane.min(first + SUM_VECTORS * BLOCK)).step_by(BLOCK) {
                    let mut x = [L::zero(); INPUTS];
                    for (x, input) in x.iter_mut().zip(inputs) {
                        *x = L::load(input.as_ptr().wrapping_add(index * plane + at));
                    }
                    let y = op.apply::<L>(x, values, &mut sums);
                    if O::WRITES {
                        y.store(to.at(index * plane + at));
                    }
                }
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total = total.add(sum);
                }
            }
            for (total, to) in total.into_iter().zip(totals) {
                total.store(to.at(index * BLOCK));
            }
        }
    }
}

/// Moments of each channel over one plane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moments {
    /// About the mean, rounded as it is.
    pub(crate) centre: [f32; BLOCK],
    /// Mean distance from the centre: what rounding took from it.
    pub(crate) offset: [f32; BLOCK],
    /// Mean squared distance from the centre.
    pub(crate) square: [f32; BLOCK],
}

/// The moments of all planes, taken in two passes while a plane is in the cache. Distances from the plane's own centre
/// lose no digits to a large common mean.
pub(crate) fn moments(isa: Isa, planes: usize, x: &[f32]) -> Vec<Moments> {
    let plane = x.len() / planes;
    x.par_chunks_exact(plane)
        .map(|x| isa.run(PlaneMoments { x }))
        .collect()
}

struct PlaneMoments<'a> {
    x: &'a [f32],
}

impl Kernel for PlaneMoments<'_> {
    type Output = Moments;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Moments {
        let (x, length) = (self.x.as_ptr(), self.x.len());
        let mut moments = Moments {
            centre: [0.0; BLOCK],
            offset: [0.0; BLOCK],
            square: [0.0; BLOCK],
        };
        // SAFETY: the caller promises the instructions; a plane is a whole number of vectors.
        unsafe {
            let scale = L::splat(BLOCK as f32 / length as f32);
            let mut centre = L::zero();
            for first in (0..length).step_by(SUM_VECTORS * BLOCK) {
                let mut sum = L::zero();
                for at in (first..length.min(first + SUM_VECTORS * BLOCK)).step_by(BLOCK) {
                    sum = sum.add(L::load(x.wrapping_add(at)));
                }
                centre = sum.mul_add(scale, centre);
            }
            let (mut offset, mut square) = (L::zero(), L::zero());
            for first in (0..length).step_by(SUM_VECTORS * BLOCK) {
                let (mut distances, mut squares) = (L::zero(), L::zero());
                for at in (first..length.min(first + SUM_VECTORS * BLOCK)).step_by(BLOCK) {
                    let distance = L::load(x.wrapping_add(at)).sub(centre);
                    distances = distances.add(distance);
                    squares = distance.mul_add(distance, squares);
                }
                offset = distances.mul_add(scale, offset);
                square = squares.mul_add(scale, square);
            }
            centre.store(moments.centre.as_mut_ptr());
            offset.store(moments.offset.as_mut_ptr());
            square.store(moments.square.as_mut_ptr());
        }
        moments
    }
}

/// Adds up sums `[N][channels]` of pictures, in order.
pub(crate) fn over_pictures(sums: &[f32], channels: usize) -> Vec<f32> {
    let padded = channels.next_multiple_of(BLOCK);
    let sum = |channel: usize| {
        sums[channel..]
            .iter()
            .step_by(padded)
            .map(|sum| f64::from(*sum))
            .sum::<f64>()
    };
    (0..channels).map(|channel| sum(channel) as f32).collect()
}

/// A parameter per channel, followed by zeros up to whole blocks.
pub(crate) fn padded(values: &[f32]) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(BLOCK), 0.0);
    padded
}

macro_rules! op {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $type:ty),* } <$inputs:literal, $constants:literal, $sums:literal>
     $(writes $writes:literal)?
     |$self:ident, $x:pat_param, $c:pat_param, $total:pat_param| $body:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name { $(pub(crate) $field: $type),* }

        impl Op<$inputs, $constants, $sums> for $name {
            $(const WRITES: bool = $writes;)?

            #[inline(always)]
            unsafe fn apply<L: Lanes>(self, $x: [L; $inputs], $c: [L; $constants], $total: &mut [L; $sums]) -> L {
                let $self = self;
                // SAFETY: the caller promises the instructions of `L`.
                unsafe { $body }
            }
        }
    };
}

op! {
    /// `x + y`.
    Add {} <2, 0, 0> |_op, [x, y], [], _| x.add(y)
}
op! {
    /// `x · factor`.
    MulScalar { factor: f32 } <1, 0, 0> |op, [x], [], _| x.mul(L::splat(op.factor))
}
op! {
    /// `x · scale`.
    Scale {} <1, 1, 0> |_op, [x], [scale], _| x.mul(scale)
}
op! {
    /// `x · scale + shift`.
    ScaleShift {} <1, 2, 0> |_op, [x], [scale, shift], _| x.mul_add(scale, shift)
}
op! {
    /// Gradient of [`Scale`] and [`ScaleShift`]: `dy · scale`, and the sums of `dy · x` and `dy`.
    ScaleShiftGradient {} <2, 1, 2> |_op, [x, dy], [scale], [products, gradients]| {
        *products = dy.mul_add(x, *products);
        *gradients = gradients.add(dy);
        dy.mul(scale)
    }
}
op! {
    /// The sum over a plane.
    Sum {} <1, 0, 1> writes false |_op, [x], [], [sum]| {
        *sum = sum.add(x);
        x
    }
}
op! {
    /// What batch normalisation's gradient needs of the batch: the sums of `dy` and of `dy · (x − mean)`.
    NormalizationSums {} <2, 1, 2> writes false |_op, [x, dy], [mean], [gradients, products]| {
        *gradients = gradients.add(dy);
        *products = dy.mul_add(x.sub(mean), *products);
        dy
    }
}
op! {
    /// Batch normalisation's gradient, `dy · a + x · b + c`.
    NormalizationGradient {} <2, 3, 0> |_op, [x, dy], [a, b, c], _| dy.mul_add(a, x.mul_add(b, c))
}
op! {
    /// Parametric ReLU.
    Prelu {} <1, 1, 0> |_op, [x], [slope], _| x.select_greater(L::zero(), x, x.mul(slope))
}
op! {
    /// Gradient of [`Prelu`], and the sum of the slope's.
    PreluGradient {} <2, 1, 1> |_op, [x, dy], [slope], [slopes]| {
        *slopes = dy.mul_add(x.min(L::zero()), *slopes);
        x.select_greater(L::zero(), dy, dy.mul(slope))
    }
}
op! {
    /// Bias, leaky ReLU, gain, clamp.
    BiasActivation { negative_slope: f32, gain: f32, limit: f32 } <1, 1, 0> |op, [x], [bias], _| {
        let x = x.add(bias);
        let leaky = x.select_greater(L::zero(), x, x.mul(L::splat(op.negative_slope))).mul(L::splat(op.gain));
        leaky.min(L::splat(op.limit)).max(L::splat(-op.limit))
    }
}
op! {
    /// `dy` times the slope of [`BiasActivation`] at `x`, and its sum, the bias's gradient. The same is the tangent
    /// of the activation, for a tangent of `x` in the place of `dy`.
    BiasActivationSlope { negative_slope: f32, gain: f32, limit: f32 } <2, 1, 1> |op, [x, dy], [bias], [sum]| {
        let x = x.add(bias);
        let slope = x.select_greater(L::zero(), L::splat(op.gain), L::splat(op.gain * op.negative_slope));
        let (y, limit) = (x.mul(slope), L::splat(op.limit));
        let inside = y.select_greater(limit, L::zero(), slope);
        let inside = L::zero().sub(y).select_greater(limit, L::zero(), inside);
        let dx = dy.mul(inside);
        *sum = sum.add(dx);
        dx
    }
}
