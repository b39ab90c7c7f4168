//! Depthwise convolution: each channel of the output from the same channel of the input.

use super::direct::{CopyPlane, Geometry};
use super::lanes::{Isa, Kernel, Lanes};
use super::load::Load;
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// The convolution of `x` `[N, ⌈C/16⌉, H, W, 16]` with `weight` `[C, 1, kh, kw]`.
pub(crate) fn forward(isa: Isa, g: Geometry, x: &[f32], load: Option<Load>, weight: &[f32], y: &mut [f32]) {
    let [oh, ow] = g.outputs();
    let (planes, to) = (g.n * g.in_blocks(), oh * ow * BLOCK);
    assert_eq!((x.len(), y.len()), (planes * g.h * g.w * BLOCK, planes * to));
    let weight = pack(g, weight);
    let y = Shared::new(y);
    parallel(planes, |index| {
        let x = PaddedPlane::new(isa, g, x, load, index);
        let (y, weight) = (y.at(index * to), of_block(g, &weight, index));
        match (g.kernel, g.stride) {
            ([3, 3], 1) => isa.run(Forward3x3::<1> { g, x, weight, y }),
            ([3, 3], 2) => isa.run(Forward3x3::<2> { g, x, weight, y }),
            _ => isa.run(Forward { g, x, weight, y }),
        }
    });
}

/// The gradient of the input, `dx`, from the gradient of the output, `dy`.
pub(crate) fn data_gradient(isa: Isa, g: Geometry, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
    let [oh, ow] = g.outputs();
    let (planes, from, to) = (g.n * g.in_blocks(), oh * ow * BLOCK, g.h * g.w * BLOCK);
    assert_eq!((dy.len(), dx.len()), (planes * from, planes * to));
    let weight = pack(g, weight);
    let (padded_h, padded_w, row) = (g.h + 2 * g.padding, g.w + 2 * g.padding, g.w * BLOCK);
    let dx = Shared::new(dx);
    parallel(planes, |index| {
        // Products are scattered into a padded plane, whose border is then cut off.
        let mut padded = Buffer::zeroed(padded_h * padded_w * BLOCK);
        let plane = Plane {
            g,
            width: padded_w,
            offsets: &offsets(g, padded_w),
        };
        let (dy, weight) = (&dy[index * from..(index + 1) * from], of_block(g, &weight, index));
        isa.run(Scatter {
            plane,
            dy,
            weight,
            dx: padded.as_mut_ptr(),
        });
        let lines = padded.chunks_exact(padded_w * BLOCK).skip(g.padding).take(g.h);
        for (line, padded) in lines.enumerate() {
            let padded = &padded[g.padding * BLOCK..g.padding * BLOCK + row];
            // SAFETY: each task writes the plane of its index, line by line.
            unsafe {
                dx.at(index * to + line * row)
                    .copy_from_nonoverlapping(padded.as_ptr(), row)
            };
        }
    });
}

/// The gradient of the weight, `dw` `[C, 1, kh, kw]`, from the input and the gradient of the output.
pub(crate) fn weight_gradient(
    isa: Isa,
    g: Geometry,
    x: &[f32],
    load: Option<Load>,
    dy: &[f32],
    dw: &mut [f32],
) {
    let [oh, ow] = g.outputs();
    let (planes, from, size) = (g.n * g.in_blocks(), oh * ow * BLOCK, g.taps() * BLOCK);
    assert_eq!((x.len(), dy.len()), (planes * g.h * g.w * BLOCK, planes * from));
    assert_eq!(dw.len(), g.i * g.taps());
    let mut sums = Buffer::take(planes * size);
    let shared = Shared::new(&mut sums);
    parallel(planes, |index| {
        let x = PaddedPlane::new(isa, g, x, load, index);
        let dy = &dy[index * from..(index + 1) * from];
        isa.run(Weight {
            g,
            x,
            dy,
            sums: shared.at(index * size),
        });
    });
    for (at, dw) in dw.iter_mut().enumerate() {
        let (channel, tap) = (at / g.taps(), at % g.taps());
        let first = channel / BLOCK * size + tap * BLOCK + channel % BLOCK;
        *dw = sums[first..].iter().step_by(g.in_blocks() * size).sum();
    }
}

/// `[C, 1, kh, kw]` to `[⌈C/16⌉][tap][16]`.
fn pack(g: Geometry, weight: &[f32]) -> Vec<f32> {
    assert_eq!(weight.len(), g.i * g.taps());
    let mut packed = vec![0.0; g.in_blocks() * BLOCK * g.taps()];
    for (index, value) in weight.iter().enumerate() {
        let (channel, tap) = (index / g.taps(), index % g.taps());
        packed[(channel / BLOCK * g.taps() + tap) * BLOCK + channel % BLOCK] = *value;
    }
    packed
}

/// The packed taps of the block that a plane belongs to.
fn of_block(g: Geometry, packed: &[f32], plane: usize) -> &[f32] {
    let size = g.taps() * BLOCK;
    &packed[plane % g.in_blocks() * size..][..size]
}

/// Offset of each tap into a padded plane of the given width.
fn offsets(g: Geometry, width: usize) -> Vec<usize> {
    (0..g.taps())
        .map(|tap| (tap / g.kernel[1] * width + tap % g.kernel[1]) * BLOCK)
        .collect()
}

/// A padded plane and how the kernel walks over it.
#[derive(Clone, Copy)]
struct Plane<'a> {
    g: Geometry,
    width: usize,
    offsets: &'a [usize],
}

impl Plane<'_> {
    /// Offset of the first tap of an output pixel.
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> usize {
        (row * self.width + column) * self.g.stride * BLOCK
    }
}

/// One plane of the input within its border, [`Load`] applied; it stays in the cache while its outputs are made.
struct PaddedPlane<'a> {
    x: &'a [f32],
    copy: Option<Buffer>,
    width: usize,
}

impl<'a> PaddedPlane<'a> {
    fn new(isa: Isa, g: Geometry, x: &'a [f32], load: Option<Load>, plane: usize) -> Self {
        if load.is_none() && g.padding == 0 {
            let size = g.h * g.w * BLOCK;
            return Self {
                x: &x[plane * size..][..size],
                copy: None,
                width: g.w,
            };
        }
        let gathered @ [height, width] = [g.h + 2 * g.padding, g.w + 2 * g.padding];
        let mut copy = Buffer::take(height * width * BLOCK);
        isa.run(CopyPlane {
            x,
            load,
            plane,
            size: [g.h, g.w],
            before: [g.padding; 2],
            stride: 1,
            phases: [1; 2],
            first: [0; 2],
            gathered,
            to: copy.as_mut_ptr(),
        });
        Self {
            x: &[],
            copy: Some(copy),
            width,
        }
    }

    fn as_ptr(&self) -> *const f32 {
        self.copy.as_deref().unwrap_or(self.x).as_ptr()
    }
}

/// Output pixels that share a load of each tap.
const QUAD: usize = 4;

struct Forward<'a> {
    g: Geometry,
    x: PaddedPlane<'a>,
    weight: &'a [f32],
    y: *mut f32,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { g, x, weight, y } = self;
        let offsets = offsets(g, x.width);
        let plane = Plane {
            g,
            width: x.width,
            offsets: &offsets,
        };
        let ([oh, ow], x) = (g.outputs(), x.as_ptr());
        for row in 0..oh {
            for column in (0..ow).step_by(QUAD) {
                let count = QUAD.min(ow - column);
                // A short last group computes its last pixel again.
                let mut first = [0; QUAD];
                for (pixel, first) in first.iter_mut().enumerate() {
                    *first = plane.at(row, column + pixel.min(count - 1));
                }
                // SAFETY: the caller promises the instructions; planes are padded so that every tap of every output
                // lies inside; `y` is this task's plane.
                unsafe {
                    let mut sums = [L::zero(); QUAD];
                    for (tap, offset) in plane.offsets.iter().enumerate() {
                        let weight = L::load(weight.as_ptr().wrapping_add(tap * BLOCK));
                        for (sum, first) in sums.iter_mut().zip(first) {
                            *sum = L::load(x.wrapping_add(first + offset)).mul_add(weight, *sum);
                        }
                    }
                    for (pixel, sum) in sums.into_iter().enumerate().take(count) {
                        sum.store(y.wrapping_add((row * ow + column + pixel) * BLOCK));
                    }
                }
            }
        }
    }
}

/// [`Forward`] for 3×3 taps at a known stride: neighbouring outputs share their inputs.
struct Forward3x3<'a, const STRIDE: usize> {
    g: Geometry,
    x: PaddedPlane<'a>,
    weight: &'a [f32],
    y: *mut f32,
}

impl<const STRIDE: usize> Kernel for Forward3x3<'_, STRIDE> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { g, x, weight, y } = self;
        let ([oh, ow], width, x) = (g.outputs(), x.width, x.as_ptr());
        // SAFETY: as for `Forward`.
        unsafe {
            let mut taps = [L::zero(); 9];
            for (tap, value) in taps.iter_mut().enumerate() {
                *value = L::load(weight.as_ptr().wrapping_add(tap * BLOCK));
            }
            for row in 0..oh {
                let x = x.wrapping_add(row * STRIDE * width * BLOCK);
                let y = y.wrapping_add(row * ow * BLOCK);
                let whole = ow / QUAD * QUAD;
                for column in (0..whole).step_by(QUAD) {
                    outputs3x3::<L, STRIDE, QUAD>(x, width, taps, column, y);
                }
                for column in whole..ow {
                    outputs3x3::<L, STRIDE, 1>(x, width, taps, column, y);
                }
            }
        }
    }
}

/// `COUNT` neighbouring outputs of a row.
///
/// # Safety
/// Instructions of `L`; `x` is the first of three padded rows of `width` pixels, and `y` a row of outputs, in which
/// the outputs and their inputs lie.
#[inline(always)]
unsafe fn outputs3x3<L: Lanes, const STRIDE: usize, const COUNT: usize>(
    x: *const f32,
    width: usize,
    taps: [L; 9],
    column: usize,
    y: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [L::zero(); COUNT];
        for row in 0..3 {
            let x = x.wrapping_add((row * width + column * STRIDE) * BLOCK);
            for at in 0..(COUNT - 1) * STRIDE + 3 {
                let value = L::load(x.wrapping_add(at * BLOCK));
                for (pixel, sum) in sums.iter_mut().enumerate() {
                    if at >= pixel * STRIDE && at < pixel * STRIDE + 3 {
                        *sum = value.mul_add(taps[row * 3 + at - pixel * STRIDE], *sum);
                    }
                }
            }
        }
        for (pixel, sum) in sums.into_iter().enumerate() {
            sum.store(y.wrapping_add((column + pixel) * BLOCK));
        }
    }
}

struct Scatter<'a> {
    plane: Plane<'a>,
    dy: &'a [f32],
    weight: &'a [f32],
    dx: *mut f32,
}

impl Kernel for Scatter<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            plane,
            dy,
            weight,
            dx,
        } = self;
        let [oh, ow] = plane.g.outputs();
        for pixel in 0..oh * ow {
            let first = plane.at(pixel / ow, pixel % ow);
            // SAFETY: as for `Forward`; `dx` is this task's padded plane.
            unsafe {
                let dy = L::load(dy.as_ptr().wrapping_add(pixel * BLOCK));
                for (tap, offset) in plane.offsets.iter().enumerate() {
                    let (to, weight) = (
                        dx.wrapping_add(first + offset),
                        weight.as_ptr().wrapping_add(tap * BLOCK),
                    );
                    dy.mul_add(L::load(weight), L::load(to)).store(to);
                }
            }
        }
    }
}

struct Weight<'a> {
    g: Geometry,
    x: PaddedPlane<'a>,
    dy: &'a [f32],
    sums: *mut f32,
}

impl Kernel for Weight<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { g, x, dy, sums } = self;
        let offsets = offsets(g, x.width);
        let plane = Plane {
            g,
            width: x.width,
            offsets: &offsets,
        };
        let ([oh, ow], x) = (g.outputs(), x.as_ptr());
        for (tap, offset) in plane.offsets.iter().enumerate() {
            // SAFETY: as for `Forward`; `sums` is this task's, one vector per tap.
            unsafe {
                let mut sum = L::zero();
                for pixel in 0..oh * ow {
                    let x = x.wrapping_add(plane.at(pixel / ow, pixel % ow) + offset);
                    sum = L::load(x).mul_add(L::load(dy.as_ptr().wrapping_add(pixel * BLOCK)), sum);
                }
                sum.store(sums.wrapping_add(tap * BLOCK));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{block, naive_forward, naive_gradients, normal, relative_rms, unblock};

    /// A depthwise convolution is an ordinary one whose weight is zero between different channels.
    #[test]
    fn agrees_with_float64_on_every_instruction_set() {
        const BOUND: f64 = 1e-6;
        for isa in Isa::available() {
            for (n, c, h, w, kernel, stride, padding) in [
                (2, 20, 7, 6, [3, 3], 1, 1),
                (1, 32, 8, 9, [3, 3], 2, 1),
                (2, 16, 7, 6, [7, 6], 1, 0),
            ] {
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
                let (x, weight) = (normal(n * c * h * w, 1), normal(c * g.taps(), 2));
                let dy = normal(n * c * oh * ow, 3);
                let mut full = vec![0.0; c * c * g.taps()];
                for (channel, taps) in weight.chunks_exact(g.taps()).enumerate() {
                    full[channel * (c + 1) * g.taps()..][..g.taps()].copy_from_slice(taps);
                }
                let (blocked_x, blocked_dy) = (block(&x, n, c, h * w), block(&dy, n, c, oh * ow));

                let mut y = vec![f32::NAN; blocked_dy.len()];
                forward(isa, g, &blocked_x, None, &weight, &mut y);
                let error = relative_rms(&unblock(&y, n, c, oh * ow), &naive_forward(g, &x, &full));
                assert!(error < BOUND, "{isa:?} {g:?}: forward is off by {error:.1e}");

                let (exact_dx, exact_dw) = naive_gradients(g, &x, &full, &dy);
                let mut dx = vec![f32::NAN; blocked_x.len()];
                data_gradient(isa, g, &blocked_dy, &weight, &mut dx);
                let error = relative_rms(&unblock(&dx, n, c, h * w), &exact_dx);
                assert!(
                    error < BOUND,
                    "{isa:?} {g:?}: data gradient is off by {error:.1e}"
                );

                let mut dw = vec![f32::NAN; weight.len()];
                weight_gradient(isa, g, &blocked_x, None, &blocked_dy, &mut dw);
                let exact: Vec<_> = (0..c)
                    .flat_map(|channel| exact_dw[channel * (c + 1) * g.taps()..][..g.taps()].to_vec())
                    .collect();
                let error = relative_rms(&dw, &exact);
                assert!(
                    error < BOUND,
                    "{isa:?} {g:?}: weight gradient is off by {error:.1e}"
                );
            }
        }
    }
}
