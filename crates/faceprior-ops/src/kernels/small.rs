//! Convolutions of small channel-last maps, bias, PReLU and max pool in the same call.
//!
//! Rows of the product are output pixels, of one picture or of all; columns are output channels, which lie side by
//! side in channel-last maps. The taps of one kernel row are one run of the inner dimension where no padding lies
//! between pixels. Bias is what sums start from, PReLU comes with the store.

use super::lanes::{Isa, Kernel, Lanes};
use super::tile::{Ends, Row, Runs, Strides, multiply_between};
use super::{BLOCK, Shared};
use crate::pool::Buffer;

/// Values of an array.
///
/// # Panics
/// If there are more than memory can hold.
pub(crate) fn count(dims: [usize; 4]) -> usize {
    let product = dims
        .iter()
        .try_fold(size_of::<f32>(), |product, &size| product.checked_mul(size));
    product.expect("an array that fits memory") / size_of::<f32>()
}

/// A convolution with padding 0 and stride 1, its bias and its PReLU.
#[derive(Debug)]
pub(crate) struct Packed {
    isa: Isa,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) kernel: [usize; 2],
    /// `[group of blocks][ky][kx][input][blocks·16]`.
    panels: Buffer,
    /// `[blocks·16]`.
    bias: Buffer,
    /// `[blocks·16]`; 1 where there is no PReLU.
    slope: Buffer,
}

impl Packed {
    /// Weight `[O, I, kh, kw]`, bias and slopes `[O]`.
    pub(crate) fn new(
        isa: Isa,
        weight: &[f32],
        [outputs, inputs, kh, kw]: [usize; 4],
        bias: &[f32],
        slope: Option<&[f32]>,
    ) -> Self {
        assert_eq!(weight.len(), count([outputs, inputs, kh, kw]));
        assert!(!weight.is_empty(), "a weight without values");
        let blocks = outputs.div_ceil(BLOCK);
        let inner = kh * kw * inputs;
        let mut panels = Buffer::zeroed(blocks * BLOCK * inner);
        for (index, value) in weight.iter().enumerate() {
            let (output, input, tap) = (index / inner, index / (kh * kw) % inputs, index % (kh * kw));
            let at = (tap * inputs + input) * blocks * BLOCK + output;
            panels[at] = *value;
        }
        let padded = |values: &[f32], rest: f32| {
            assert_eq!(values.len(), outputs);
            let mut padded = Buffer::take(blocks * BLOCK);
            padded.fill(rest);
            padded[..outputs].copy_from_slice(values);
            padded
        };
        Self {
            isa,
            inputs,
            outputs,
            kernel: [kh, kw],
            panels,
            bias: padded(bias, 0.0),
            slope: padded(slope.unwrap_or(&vec![1.0; outputs]), 1.0),
        }
    }

    fn blocks(&self) -> usize {
        self.outputs.div_ceil(BLOCK)
    }

    /// Height and width of what the convolution makes of a map, at least as large as the kernel.
    fn convolved(&self, [h, w]: [usize; 2]) -> [usize; 2] {
        let [kh, kw] = self.kernel;
        assert!(h >= kh && w >= kw, "a map of {h}x{w} under a kernel of {kh}x{kw}");
        [h + 1 - kh, w + 1 - kw]
    }

    /// `x` `[N, H, W, pixel]` with `pixel` ≥ I floats from one pixel to the next, to the convolution
    /// `[N, H − kh + 1, W − kw + 1, ⌈O/16⌉·16]` and its size.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        n: usize,
        size: [usize; 2],
        pixel: usize,
    ) -> (Buffer, [usize; 2]) {
        let [oh, ow] = self.convolved(size);
        assert!(pixel >= self.inputs && x.len() == n * size[0] * size[1] * pixel);
        let mut y = Buffer::take(count([n, oh, ow, self.blocks() * BLOCK]));
        self.convolve(x, n, size, pixel, &mut y);
        (y, [oh, ow])
    }

    /// [`forward`](Self::forward), then the largest of each `pool`×`pool` window at stride 2, sizes rounded up. The
    /// convolution of one picture at a time is kept.
    pub(crate) fn forward_pooled(
        &self,
        x: &[f32],
        n: usize,
        size: [usize; 2],
        pixel: usize,
        pool: usize,
    ) -> (Buffer, [usize; 2]) {
        let [oh, ow] = self.convolved(size);
        assert!(pixel >= self.inputs && x.len() == n * size[0] * size[1] * pixel);
        let width = self.blocks() * BLOCK;
        let [rows, columns] = [oh, ow].map(|size| size.saturating_sub(pool).div_ceil(2) + 1);
        let mut map = Buffer::take(count([1, oh, ow, width]));
        let mut y = Buffer::take(count([n, rows, columns, width]));
        let pictures = x.chunks_exact(size[0] * size[1] * pixel);
        for (x, y) in pictures.zip(y.chunks_exact_mut(rows * columns * width)) {
            self.convolve(x, 1, size, pixel, &mut map);
            let (map, size, y) = (&map[..], [oh, ow], Shared::new(y));
            match pool {
                2 => self.isa.run(Pool::<2> { map, size, width, y }),
                3 => self.isa.run(Pool::<3> { map, size, width, y }),
                _ => panic!("a pool of {pool}, expected 2 or 3"),
            }
        }
        (y, [rows, columns])
    }

    fn convolve(&self, x: &[f32], n: usize, [h, w]: [usize; 2], pixel: usize, y: &mut [f32]) {
        let [oh, ow] = self.convolved([h, w]);
        let width = self.blocks() * BLOCK;
        assert_eq!((x.len(), y.len()), (n * h * w * pixel, n * oh * ow * width));
        let [kh, kw] = self.kernel;
        let mut rows = Vec::with_capacity(n * oh * ow);
        for line in (0..n).flat_map(|picture| (0..oh).map(move |y| (picture * h + y) * w)) {
            let c = rows.len() * width;
            rows.extend((0..ow).map(|x| Row {
                a: (line + x) * pixel,
                c: c + x * width,
            }));
        }
        // Without padding between pixels, the taps of a kernel row are one run.
        let (taps, length) = if pixel == self.inputs {
            (1, kw * self.inputs)
        } else {
            (kw, self.inputs)
        };
        let runs: Vec<(usize, usize)> = (0..kh * taps)
            .map(|run| ((run / taps * w + run % taps) * pixel, run * length))
            .collect();
        self.isa.run(Convolve {
            packed: self,
            x,
            rows: &rows,
            runs: &runs,
            length,
            y: Shared::new(y),
        });
    }
}

/// The convolution of some maps.
struct Convolve<'a> {
    packed: &'a Packed,
    x: &'a [f32],
    rows: &'a [Row],
    /// Where runs start in `x` and in the inner dimension.
    runs: &'a [(usize, usize)],
    length: usize,
    y: Shared,
}

impl Kernel for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            packed,
            x,
            rows,
            runs,
            length,
            y,
        } = self;
        let width = packed.blocks() * BLOCK;
        let offsets: Vec<_> = runs.iter().map(|run| (run.0, run.1 * width)).collect();
        let runs = Runs {
            offsets: &offsets,
            length,
        };
        let strides = Strides {
            a_inner: 1,
            b_inner: width,
            b_block: BLOCK,
            c_block: BLOCK,
            matrices: None,
            b_next: None,
        };
        let ends = BiasAndPrelu {
            bias: packed.bias.as_ptr(),
            slope: packed.slope.as_ptr(),
        };
        let (x, panels) = (x.as_ptr(), packed.panels.as_ptr());
        // SAFETY: the caller promises the instructions; `convolve` made rows and runs for maps of the sizes that it
        // checked.
        unsafe {
            multiply_between::<L>(rows, packed.blocks(), runs, strides, x, panels, y.at(0), ends);
        }
    }
}

/// Sums that start from a bias and go through a PReLU.
#[derive(Clone, Copy)]
struct BiasAndPrelu {
    bias: *const f32,
    slope: *const f32,
}

impl<L: Lanes> Ends<L> for BiasAndPrelu {
    #[inline(always)]
    unsafe fn start(self, block: usize, _: *const f32) -> L {
        // SAFETY: the caller promises the instructions and the block; there is a bias for each.
        unsafe { L::load(self.bias.wrapping_add(block * BLOCK)) }
    }

    #[inline(always)]
    unsafe fn finish(self, block: usize, sums: L) -> L {
        // SAFETY: as above.
        unsafe {
            let slope = L::load(self.slope.wrapping_add(block * BLOCK));
            slope.mul_add(sums.min(L::zero()), sums.max(L::zero()))
        }
    }
}

/// The largest of each window of up to `SIDE`×`SIDE` pixels at stride 2 of a map `[H, W, width]`.
struct Pool<'a, const SIDE: usize> {
    map: &'a [f32],
    size: [usize; 2],
    width: usize,
    y: Shared,
}

impl<const SIDE: usize> Kernel for Pool<'_, SIDE> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            map,
            size: [h, w],
            width,
            y,
        } = self;
        let [rows, columns] = [h, w].map(|size| size.saturating_sub(SIDE).div_ceil(2) + 1);
        for row in 0..rows {
            for column in 0..columns {
                // At the edge a window is smaller: its last pixels count twice.
                let mut window = [[0; SIDE]; SIDE];
                for (i, line) in window.iter_mut().enumerate() {
                    let start = (2 * row + i).min(h - 1) * w;
                    for (j, at) in line.iter_mut().enumerate() {
                        *at = (start + (2 * column + j).min(w - 1)) * width;
                    }
                }
                let to = y.at((row * columns + column) * width);
                for channel in (0..width).step_by(BLOCK) {
                    let x = map.as_ptr().wrapping_add(channel);
                    // SAFETY: the caller promises the instructions; windows lie inside the map, which has `width`
                    // channels, a multiple of sixteen, and so does the result.
                    unsafe {
                        let mut largest = L::load(x.wrapping_add(window[0][0]));
                        for line in &window {
                            for at in line {
                                largest = largest.max(L::load(x.wrapping_add(*at)));
                            }
                        }
                        largest.store(to.wrapping_add(channel));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::direct::Geometry;
    use super::super::testing::{naive_forward, normal};
    use super::*;

    /// `[N, C, pixels]` to `[N, pixels, stride]`, with something between the pixels that nobody may read.
    fn channels_last(x: &[f32], n: usize, c: usize, pixels: usize, stride: usize) -> Vec<f32> {
        let mut last = vec![f32::NAN; n * pixels * stride];
        for (index, value) in x.iter().enumerate() {
            let (picture, channel, pixel) = (index / (c * pixels), index / pixels % c, index % pixels);
            last[(picture * pixels + pixel) * stride + channel] = *value;
        }
        last
    }

    /// The largest of each window of a plane.
    fn pooled(x: &[f64], [h, w]: [usize; 2], pool: usize) -> Vec<f64> {
        let [rows, columns] = [h, w].map(|size| size.saturating_sub(pool).div_ceil(2) + 1);
        let window = |at: usize| {
            let (top, left) = (at / columns * 2, at % columns * 2);
            let lines = top..(top + pool).min(h);
            lines
                .flat_map(|y| (left..(left + pool).min(w)).map(move |x| y * w + x))
                .map(|at| x[at])
                .fold(f64::NEG_INFINITY, f64::max)
        };
        (0..rows * columns).map(window).collect()
    }

    #[test]
    fn agrees_with_float64_on_every_instruction_set() {
        // Channels with and without padding between pixels, one to eight blocks of outputs, runs longer than a part of
        // the inner dimension, widths around every height of a tile.
        for (seed, (i, pixel, o, [kh, kw])) in [
            (3, 3, 10, [3, 3]),
            (10, 16, 16, [3, 3]),
            (28, 32, 48, [3, 3]),
            (64, 64, 128, [2, 2]),
            (40, 48, 33, [1, 2]),
            (128, 128, 7, [1, 1]),
        ]
        .into_iter()
        .enumerate()
        {
            for (n, h, w) in [
                (1, kh, kw),
                (3, kh, kw + 1),
                (2, kh + 2, kw + 4),
                (1, kh + 1, kw + 25),
            ] {
                let geometry = Geometry {
                    n,
                    i,
                    o,
                    h,
                    w,
                    kernel: [kh, kw],
                    stride: 1,
                    padding: 0,
                };
                let values = |count, what| normal(count, 10 * seed as u64 + what);
                let (x, weight) = (values(n * i * h * w, 0), values(o * i * kh * kw, 1));
                let (bias, slope) = (values(o, 2), values(o, 3));
                let [oh, ow] = geometry.outputs();
                let mut exact = naive_forward(geometry, &x, &weight);
                for (index, value) in exact.iter_mut().enumerate() {
                    let channel = index / (oh * ow) % o;
                    *value += f64::from(bias[channel]);
                    if *value < 0.0 {
                        *value *= f64::from(slope[channel]);
                    }
                }
                let x = channels_last(&x, n, i, h * w, pixel);
                let width = o.next_multiple_of(BLOCK);
                let check = |got: &[f32], exact: &[f64], pixels: usize| {
                    for (index, exact) in exact.iter().enumerate() {
                        let (picture, channel) = (index / (o * pixels), index / pixels % o);
                        let got = got[(picture * pixels + index % pixels) * width + channel];
                        assert!(
                            (f64::from(got) - exact).abs() < 2e-4,
                            "{geometry:?}: {got} {exact}"
                        );
                    }
                };
                let mut fused = Vec::new();
                for isa in Isa::available() {
                    let packed = Packed::new(isa, &weight, [o, i, kh, kw], &bias, Some(&slope));
                    let (y, size) = packed.forward(&x, n, [h, w], pixel);
                    assert_eq!(size, [oh, ow]);
                    check(&y, &exact, oh * ow);
                    let mut results = vec![y];
                    for pool in [2, 3] {
                        let (y, [rows, columns]) = packed.forward_pooled(&x, n, [h, w], pixel, pool);
                        let planes = exact.chunks_exact(oh * ow);
                        let exact: Vec<f64> = planes.flat_map(|x| pooled(x, [oh, ow], pool)).collect();
                        assert_eq!(exact.len(), n * o * rows * columns);
                        check(&y, &exact, rows * columns);
                        results.push(y);
                    }
                    if isa != Isa::Portable {
                        fused.push(results);
                    }
                }
                for pair in fused.windows(2) {
                    let same = pair[0].iter().zip(&pair[1]).all(|(a, b)| a[..] == b[..]);
                    assert!(same, "{geometry:?}: vector paths differ");
                }
            }
        }
    }
}
