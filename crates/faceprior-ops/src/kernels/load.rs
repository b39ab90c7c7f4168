//! What a kernel does to values as it reads them.

use super::BLOCK;
use super::lanes::Lanes;

/// A map's values pass through `z = x · scale + shift`, and perhaps a slope below zero, on their way into a kernel.
///
/// Each has one value per channel `[⌈C/16⌉·16]`, or per picture and channel `[N·⌈C/16⌉·16]`.
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) scale: &'a [f32],
    pub(crate) shift: &'a [f32],
    pub(crate) slope: Option<&'a [f32]>,
}

/// The value of an expression for one plane of a map that is read by an `Option<Load>`: in it a name stands for how
/// ([`Read`]).
macro_rules! with_read {
    ($load:expr, $plane:expr, |$values:ident: $lanes:ident| $result:expr) => {
        match $load {
            None => {
                let $values = $crate::kernels::load::AsIs;
                $result
            }
            Some(load) => {
                let linear = $crate::kernels::load::Linear::<$lanes>::new(load, $plane);
                match load.slope {
                    None => {
                        let $values = linear;
                        $result
                    }
                    Some(slope) => {
                        let $values = $crate::kernels::load::Sloped::new(linear, slope, $plane);
                        $result
                    }
                }
            }
        }
    };
}
pub(crate) use with_read;

/// The constants of one plane.
///
/// # Safety
/// The processor must have the instructions of `L`.
#[inline(always)]
unsafe fn of_plane<L: Lanes>(constants: &[f32], plane: usize) -> L {
    let constants = &constants[plane * BLOCK % constants.len()..][..BLOCK];
    // SAFETY: the caller promises the instructions; sixteen floats.
    unsafe { L::load(constants.as_ptr()) }
}

/// How sixteen values are read.
pub(crate) trait Read<L: Lanes>: Copy {
    /// # Safety
    /// The processor must have the instructions of `L`; `from` is valid for sixteen floats.
    unsafe fn read(self, from: *const f32) -> L;
}

/// As they are.
#[derive(Clone, Copy)]
pub(crate) struct AsIs;

impl<L: Lanes> Read<L> for AsIs {
    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }
}

/// [`Load`] without a slope, for one plane.
#[derive(Clone, Copy)]
pub(crate) struct Linear<L> {
    scale: L,
    shift: L,
}

impl<L: Lanes> Linear<L> {
    /// # Safety
    /// The processor must have the instructions of `L`.
    #[inline(always)]
    pub(crate) unsafe fn new(load: Load, plane: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                scale: of_plane(load.scale, plane),
                shift: of_plane(load.shift, plane),
            }
        }
    }
}

impl<L: Lanes> Read<L> for Linear<L> {
    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(from).mul_add(self.scale, self.shift) }
    }
}

/// [`Load`] with a slope, for one plane.
#[derive(Clone, Copy)]
pub(crate) struct Sloped<L> {
    linear: Linear<L>,
    slope: L,
}

impl<L: Lanes> Sloped<L> {
    /// # Safety
    /// The processor must have the instructions of `L`.
    #[inline(always)]
    pub(crate) unsafe fn new(linear: Linear<L>, slope: &[f32], plane: usize) -> Self {
        // SAFETY: the caller's promise.
        let slope = unsafe { of_plane(slope, plane) };
        Self { linear, slope }
    }
}

impl<L: Lanes> Read<L> for Sloped<L> {
    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe {
            let z = self.linear.read(from);
            z.select_greater(L::zero(), z, z.mul(self.slope))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::direct::{self, Geometry};
    use crate::kernels::testing::normal;
    use crate::kernels::winograd::{self, Shape, Tile};
    use crate::kernels::{Isa, depthwise};

    /// The map that a kernel should see.
    fn apply(load: Load, x: &[f32], planes: usize) -> Vec<f32> {
        let plane = x.len() / planes;
        let at = |constants: &[f32], index: usize| {
            constants[(index / plane * BLOCK + index % BLOCK) % constants.len()]
        };
        x.iter()
            .enumerate()
            .map(|(index, x)| {
                let z = x.mul_add(at(load.scale, index), at(load.shift, index));
                match load.slope {
                    Some(slope) if z <= 0.0 => z * at(slope, index),
                    _ => z,
                }
            })
            .collect()
    }

    #[test]
    fn kernels_read_what_a_pass_of_its_own_would_write() {
        let (n, c, h, w) = (3, 64, 13, 11);
        let x = normal(n * c * h * w, 1);
        let rows = normal(n * c, 2);
        let loads = [None, Some(&rows[c..2 * c])].map(|slope| Load {
            scale: &rows,
            shift: &rows[..c],
            slope,
        });
        // Where the processor has no fused multiply-add, the portable form rounds twice.
        let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        let sets = Isa::available()
            .into_iter()
            .filter(|isa| fused || *isa != Isa::Portable);
        for (isa, load) in sets.flat_map(|isa| loads.map(|load| (isa, load))) {
            let seen = apply(load, &x, n * c / BLOCK);
            let shape = Shape { n, i: c, o: c, h, w };
            let weight = normal(c * c * 9, 3);
            let dy = normal(n * c * h * w, 4);
            let run = |x: &[f32], load| {
                let (mut y, mut dw) = (vec![f32::NAN; dy.len()], vec![f32::NAN; weight.len()]);
                winograd::forward(
                    isa,
                    shape,
                    Tile::Four,
                    x,
                    load,
                    &winograd::prepare(isa, shape, Tile::Four, &weight),
                    &mut y,
                );
                winograd::weight_gradient(isa, shape, x, load, &dy, &mut dw);
                (y, dw)
            };
            assert_eq!(run(&x, Some(load)), run(&seen, None), "{isa:?} winograd");

            for (kernel, stride, padding) in [([3, 3], 2, 1), ([1, 1], 1, 0), ([1, 1], 2, 0)] {
                let g = Geometry {
                    n,
                    i: c,
                    o: c,
                    h,
                    w,
                    kernel,
                    stride,
                    padding,
                };
                let [oh, ow] = g.outputs();
                let (weight, dy) = (&weight[..c * c * kernel[0] * kernel[1]], &dy[..n * c * oh * ow]);
                let run = |x: &[f32], load| {
                    let (mut y, mut dw) = (vec![f32::NAN; dy.len()], vec![f32::NAN; weight.len()]);
                    direct::forward(isa, g, x, load, &direct::prepare(isa, g, weight), &mut y);
                    direct::weight_gradient(isa, g, x, load, dy, &mut dw);
                    (y, dw)
                };
                assert_eq!(run(&x, Some(load)), run(&seen, None), "{isa:?} {g:?}");
                let taps = &weight[..c * kernel[0] * kernel[1]];
                let run = |x: &[f32], load| {
                    let (mut y, mut dw) = (vec![f32::NAN; dy.len()], vec![f32::NAN; taps.len()]);
                    depthwise::forward(isa, g, x, load, taps, &mut y);
                    depthwise::weight_gradient(isa, g, x, load, dy, &mut dw);
                    (y, dw)
                };
                assert_eq!(run(&x, Some(load)), run(&seen, None), "{isa:?} depthwise {g:?}");
            }
        }
    }
}
