//! Operations on one value at a time, with parameters per channel and sums per channel.
//!
//! All of them share [`pointwise`]: a loop over planes of sixteen channels that reads some maps, writes one, and adds
//! up terms. What is done to a value is an [`Op`].

use super::lanes::{Isa, Kernel, Lanes};
use super::{BLOCK, Shared, parallel, parallel_chunks};
use crate::pool::Buffer;

/// What happens to one value: `INPUTS` maps and `CONSTANTS` values of the channel in, a value and `SUMS` terms out.
pub(crate) trait Op<const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize>:
    Copy + Sync
{
    /// Whether the value is kept, or only the sums.
    const WRITES: bool = true;

    /// The operation on the plane of an index.
    #[inline(always)]
    fn on_plane(self, _index: usize) -> Self {
        self
    }

    /// # Safety
    /// The processor must have the instructions of `L`; `pixel` is a pixel of the plane.
    unsafe fn apply<L: Lanes>(
        self,
        pixel: usize,
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
    assert!(inputs.iter().all(|input| input.len() == length));
    let mut y = Buffer::take(if O::WRITES { length } else { 0 });
    let to = Shared::new(&mut y);
    let inputs = inputs.map(|input| Source(input.as_ptr()));
    let sums = run(isa, op, planes, length, inputs, constants, to);
    (y, sums)
}

/// [`pointwise`] of two maps, the second of which is overwritten by the result.
pub(crate) fn pointwise_in_place<O, const CONSTANTS: usize, const SUMS: usize>(
    isa: Isa,
    op: O,
    planes: usize,
    x: &[f32],
    y: &mut [f32],
    constants: [&[f32]; CONSTANTS],
) -> [Vec<f32>; SUMS]
where
    O: Op<2, CONSTANTS, SUMS>,
{
    assert_eq!(x.len(), y.len());
    let to = Shared::new(y);
    let inputs = [Source(x.as_ptr()), Source(to.at(0))];
    run(isa, op, planes, x.len(), inputs, constants, to)
}

/// A map that is read, and perhaps written by the same task after it is read.
#[derive(Clone, Copy)]
struct Source(*const f32);

// SAFETY: `Source` only carries the address to the tasks, each of which reads the planes that it alone may write.
unsafe impl Send for Source {}
// SAFETY: as above.
unsafe impl Sync for Source {}

fn run<O, const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize>(
    isa: Isa,
    op: O,
    planes: usize,
    length: usize,
    inputs: [Source; INPUTS],
    constants: [&[f32]; CONSTANTS],
    to: Shared,
) -> [Vec<f32>; SUMS]
where
    O: Op<INPUTS, CONSTANTS, SUMS>,
{
    assert!(length.is_multiple_of(planes * BLOCK));
    assert!(
        constants
            .iter()
            .all(|constant| (planes * BLOCK).is_multiple_of(constant.len()))
    );
    let mut sums = [(); SUMS].map(|()| vec![0.0; planes * BLOCK]);
    let totals = sums.each_mut().map(|sums| Shared::new(sums));
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
    sums
}

const TASK_FLOATS: usize = 16 << 10;
/// Vectors whose terms are added before they join the sum of a plane, which keeps rounding errors small.
const SUM_VECTORS: usize = 64;

struct Plane<'a, O, const INPUTS: usize, const CONSTANTS: usize, const SUMS: usize> {
    op: O,
    index: usize,
    plane: usize,
    inputs: [Source; INPUTS],
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
        // SAFETY: the caller promises the instructions; lengths have been checked; tasks have planes of their own.
        unsafe {
            let op = op.on_plane(index);
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
                        *x = L::load(input.0.wrapping_add(index * plane + at));
                    }
                    let y = op.apply::<L>(at / BLOCK, x, values, &mut sums);
                    if O::WRITES {
                        to.write(index * plane + at, y);
                    }
                }
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total = total.add(sum);
                }
            }
            to.written::<L>();
            for (total, to) in total.into_iter().zip(totals) {
                total.store(to.at(index * BLOCK));
            }
        }
    }
}

/// Moments of each channel over one plane.
#[derive(Clone, Copy, Debug, Default)]
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
    let mut moments = vec![Moments::default(); planes];
    parallel_chunks(&mut moments, 1, |task, moments| {
        let x = &x[task * plane..(task + 1) * plane];
        moments.fill(isa.run(PlaneMoments { x }));
    });
    moments
}

struct PlaneMoments<'a> {
    x: &'a [f32],
}

impl Kernel for PlaneMoments<'_> {
    type Output = Moments;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Moments {
        let (x, length) = (self.x.as_ptr(), self.x.len());
        let mut moments = Moments::default();
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
            unsafe fn apply<L: Lanes>(self, _pixel: usize, $x: [L; $inputs], $c: [L; $constants], $total: &mut [L; $sums]) -> L {
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
    /// The sum over a plane.
    Sum {} <1, 0, 1> writes false |_op, [x], [], [sum]| {
        *sum = sum.add(x);
        x
    }
}
op! {
    /// `x · scale + shift`.
    ScaleShift {} <1, 2, 0> |_op, [x], [scale, shift], _| x.mul_add(scale, shift)
}
op! {
    /// `x · scale + shift + y`.
    ScaleShiftAdd {} <2, 2, 0> |_op, [x, y], [scale, shift], _| x.mul_add(scale, shift).add(y)
}
op! {
    /// `ẋ · s + x · ṡ`.
    ScaleTangent {} <2, 2, 0> |_op, [x, x_tangent], [s, s_tangent], _| x.mul_add(s_tangent, x_tangent.mul(s))
}
op! {
    /// Gradient of [`ScaleShiftAdd`]: `dy · scale`, and the sums of `dy · (x − centre)` and `dy`.
    ScaleShiftGradient {} <2, 2, 2> |_op, [x, dy], [scale, centre], [products, gradients]| {
        *products = dy.mul_add(x.sub(centre), *products);
        *gradients = gradients.add(dy);
        dy.mul(scale)
    }
}
op! {
    /// `dy + x · a + b`, what moments add to a gradient.
    AddScaleShift {} <2, 2, 0> |_op, [x, dy], [a, b], _| x.mul_add(a, dy.add(b))
}
op! {
    /// `z = x · scale + shift`, then a slope below zero, a gain, a clamp.
    Activation { gain: f32, limit: f32 } <1, 3, 0> |op, [x], [scale, shift, slope], _| {
        let z = x.mul_add(scale, shift);
        let leaky = z.select_greater(L::zero(), z, z.mul(slope)).mul(L::splat(op.gain));
        leaky.min(L::splat(op.limit)).max(L::splat(-op.limit))
    }
}
op! {
    /// `dy` times the slope of [`Activation`] at `x`: its tangent, for a tangent of `z` in the place of `dy`.
    ActivationSlope { gain: f32, limit: f32 } <2, 3, 0> |op, [x, dy], [scale, shift, slope], _| {
        let z = x.mul_add(scale, shift);
        dy.mul(slope_at(z, slope, op.gain, op.limit))
    }
}
op! {
    /// Gradient of [`Activation`]: that of `x`, and the sums of those of scale (about a centre), shift and slope.
    ActivationGradient { gain: f32, limit: f32 } <2, 4, 3>
    |op, [x, dy], [scale, shift, slope, centre], [products, gradients, slopes]| {
        let z = x.mul_add(scale, shift);
        *slopes = dy.mul_add(z.min(L::zero()), *slopes);
        let dz = dy.mul(slope_at(z, slope, op.gain, op.limit));
        *products = dz.mul_add(x.sub(centre), *products);
        *gradients = gradients.add(dz);
        dz.mul(scale)
    }
}

/// One value per pixel, shared by all channels: `[N or 1, pixels]`, for maps of `blocks` planes a picture.
#[derive(Clone, Copy)]
pub(crate) struct Noise<'a> {
    values: &'a [f32],
    blocks: usize,
    pixels: usize,
}

impl<'a> Noise<'a> {
    pub(crate) fn new(values: &'a [f32], blocks: usize, pixels: usize) -> Self {
        assert!(values.len().is_multiple_of(pixels));
        Self {
            values,
            blocks,
            pixels,
        }
    }

    /// That of the picture of a plane.
    #[inline(always)]
    fn on_plane(self, index: usize) -> Self {
        let start = index / self.blocks * self.pixels % self.values.len();
        Self {
            values: &self.values[start..start + self.pixels],
            ..self
        }
    }

    /// # Safety
    /// The processor must have the instructions of `L`; this is a picture's noise and `pixel` one of its pixels.
    #[inline(always)]
    unsafe fn at<L: Lanes>(self, pixel: usize) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::broadcast(self.values.as_ptr().wrapping_add(pixel)) }
    }
}

/// [`Activation`] of `z = x · scale + shift + noise · strength`.
#[derive(Clone, Copy)]
pub(crate) struct NoisyActivation<'a> {
    pub(crate) activation: Activation,
    pub(crate) noise: Noise<'a>,
    pub(crate) strength: f32,
}

impl NoisyActivation<'_> {
    /// # Safety
    /// As for [`Op::apply`].
    #[inline(always)]
    unsafe fn shift<L: Lanes>(self, pixel: usize, shift: L) -> L {
        // SAFETY: the caller's promise.
        unsafe { self.noise.at::<L>(pixel).mul_add(L::splat(self.strength), shift) }
    }
}

impl Op<1, 3, 0> for NoisyActivation<'_> {
    #[inline(always)]
    fn on_plane(self, index: usize) -> Self {
        Self {
            noise: self.noise.on_plane(index),
            ..self
        }
    }

    #[inline(always)]
    unsafe fn apply<L: Lanes>(
        self,
        pixel: usize,
        x: [L; 1],
        [scale, shift, slope]: [L; 3],
        sums: &mut [L; 0],
    ) -> L {
        // SAFETY: the caller's promise.
        unsafe {
            let shift = self.shift(pixel, shift);
            self.activation.apply(pixel, x, [scale, shift, slope], sums)
        }
    }
}

/// `dy` times the slope of [`NoisyActivation`].
impl Op<2, 3, 0> for NoisyActivation<'_> {
    #[inline(always)]
    fn on_plane(self, index: usize) -> Self {
        Self {
            noise: self.noise.on_plane(index),
            ..self
        }
    }

    #[inline(always)]
    unsafe fn apply<L: Lanes>(
        self,
        pixel: usize,
        [x, dy]: [L; 2],
        [scale, shift, slope]: [L; 3],
        _: &mut [L; 0],
    ) -> L {
        let Activation { gain, limit } = self.activation;
        // SAFETY: the caller's promise.
        unsafe {
            let z = x.mul_add(scale, self.shift(pixel, shift));
            dy.mul(slope_at(z, slope, gain, limit))
        }
    }
}

/// Gradient of [`NoisyActivation`]: as [`ActivationGradient`], and the sum of the strength's.
impl Op<2, 4, 4> for NoisyActivation<'_> {
    #[inline(always)]
    fn on_plane(self, index: usize) -> Self {
        Self {
            noise: self.noise.on_plane(index),
            ..self
        }
    }

    #[inline(always)]
    unsafe fn apply<L: Lanes>(
        self,
        pixel: usize,
        [x, dy]: [L; 2],
        [scale, shift, slope, centre]: [L; 4],
        [products, gradients, slopes, strengths]: &mut [L; 4],
    ) -> L {
        let Activation { gain, limit } = self.activation;
        // SAFETY: the caller's promise.
        unsafe {
            let z = x.mul_add(scale, self.shift(pixel, shift));
            *slopes = dy.mul_add(z.min(L::zero()), *slopes);
            let dz = dy.mul(slope_at(z, slope, gain, limit));
            *products = dz.mul_add(x.sub(centre), *products);
            *gradients = gradients.add(dz);
            *strengths = dz.mul_add(self.noise.at::<L>(pixel), *strengths);
            dz.mul(scale)
        }
    }
}

/// The derivative of [`Activation`] with respect to `z`.
///
/// # Safety
/// The processor must have the instructions of `L`.
#[inline(always)]
unsafe fn slope_at<L: Lanes>(z: L, slope: L, gain: f32, limit: f32) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        let slope = z.select_greater(L::zero(), L::splat(gain), slope.mul(L::splat(gain)));
        let (y, limit) = (z.mul(slope), L::splat(limit));
        let inside = y.select_greater(limit, L::zero(), slope);
        L::zero().sub(y).select_greater(limit, L::zero(), inside)
    }
}
