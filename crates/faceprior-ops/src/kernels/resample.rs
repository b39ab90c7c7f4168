//! Separable filters that change height and width, and their transposes.

use super::lanes::{Isa, Kernel, Lanes};
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// Which inputs make an output along one axis, and with what weights.
pub(crate) type Taps = [(usize, f32); 4];

/// Taps of smooth upsampling along an axis of `length` inputs; see the reference for where they come from.
pub(crate) fn upsample_taps(length: usize) -> Vec<Taps> {
    let clamp = |index: usize| index.min(length - 1);
    (0..length)
        .flat_map(|m| {
            let (before, after) = (m.saturating_sub(1), clamp(m + 1));
            [
                [(before, 0.5), (m, 0.5), (m, 0.0), (m, 0.0)],
                [(before, 0.125), (m, 0.75), (after, 0.125), (m, 0.0)],
            ]
        })
        .collect()
}

/// Taps of smooth downsampling along an axis of `length` inputs.
pub(crate) fn downsample_taps(length: usize) -> Vec<Taps> {
    let clamp = |index: usize| index.min(length - 1);
    (0..length)
        .step_by(2)
        .map(|m| {
            [
                (m.saturating_sub(2), 0.125),
                (m.saturating_sub(1), 0.375),
                (m, 0.375),
                (clamp(m + 1), 0.125),
            ]
        })
        .collect()
}

/// Filters planes of `h`×`w` pixels along both axes.
pub(crate) fn resample(isa: Isa, x: &[f32], h: usize, w: usize, rows: &[Taps], columns: &[Taps]) -> Buffer {
    let (from, to) = (h * w * BLOCK, rows.len() * columns.len() * BLOCK);
    let planes = x.len() / from;
    let mut y = Buffer::take(planes * to);
    let shared = Shared::new(&mut y);
    parallel(planes, |index| {
        let x = &x[index * from..(index + 1) * from];
        isa.run(Plane {
            x,
            y: shared,
            start: index * to,
            w,
            rows,
            columns,
            transposed: false,
        });
    });
    y
}

/// The transpose of [`resample`]: from the gradient of its output to that of its input of `h`×`w` pixels.
pub(crate) fn resample_transposed(
    isa: Isa,
    dy: &[f32],
    h: usize,
    w: usize,
    rows: &[Taps],
    columns: &[Taps],
) -> Buffer {
    let (from, to) = (rows.len() * columns.len() * BLOCK, h * w * BLOCK);
    let planes = dy.len() / from;
    let mut dx = Buffer::zeroed(planes * to);
    let shared = Shared::new(&mut dx);
    parallel(planes, |index| {
        let x = &dy[index * from..(index + 1) * from];
        isa.run(Plane {
            x,
            y: shared,
            start: index * to,
            w,
            rows,
            columns,
            transposed: true,
        });
    });
    dx
}

struct Plane<'a> {
    x: &'a [f32],
    y: Shared,
    start: usize,
    w: usize,
    rows: &'a [Taps],
    columns: &'a [Taps],
    transposed: bool,
}

impl Kernel for Plane<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            x,
            y,
            start,
            w,
            rows,
            columns,
            transposed,
        } = self;
        let mut line = Buffer::take(w * BLOCK);
        let line = line.as_mut_ptr();
        // SAFETY: the caller promises the instructions; taps lie inside the input's rows and columns; tasks have
        // planes of their own.
        unsafe {
            let (x, y) = (x.as_ptr(), y.at(start));
            for (row, taps) in rows.iter().enumerate() {
                let mut weights = [L::zero(); 4];
                for (weight, tap) in weights.iter_mut().zip(taps) {
                    *weight = L::splat(tap.1);
                }
                let outputs = row * columns.len() * BLOCK;
                if transposed {
                    for column in 0..w {
                        L::zero().store(line.wrapping_add(column * BLOCK));
                    }
                    for (column, taps) in columns.iter().enumerate() {
                        let dy = L::load(x.wrapping_add(outputs + column * BLOCK));
                        for (from, weight) in taps {
                            let to = line.wrapping_add(from * BLOCK);
                            dy.mul_add(L::splat(*weight), L::load(to)).store(to);
                        }
                    }
                    for ((from, _), weight) in taps.iter().zip(weights) {
                        for column in 0..w {
                            let to = y.wrapping_add((from * w + column) * BLOCK);
                            L::load(line.wrapping_add(column * BLOCK))
                                .mul_add(weight, L::load(to))
                                .store(to);
                        }
                    }
                } else {
                    let lines = taps.map(|(from, _)| x.wrapping_add(from * w * BLOCK));
                    for column in (0..w * BLOCK).step_by(BLOCK) {
                        let mut sum = L::load(lines[0].wrapping_add(column)).mul(weights[0]);
                        for tap in 1..4 {
                            sum = L::load(lines[tap].wrapping_add(column)).mul_add(weights[tap], sum);
                        }
                        sum.store(line.wrapping_add(column));
                    }
                    for (column, taps) in columns.iter().enumerate() {
                        let mut sum = L::zero();
                        for (from, weight) in taps {
                            sum = L::load(line.wrapping_add(from * BLOCK)).mul_add(L::splat(*weight), sum);
                        }
                        sum.store(y.wrapping_add(outputs + column * BLOCK));
                    }
                }
            }
        }
    }
}

/// Keeps every `stride`-th pixel of every `stride`-th row of planes of `h`×`w` pixels.
pub(crate) fn subsample(x: &[f32], h: usize, w: usize, stride: usize) -> Buffer {
    let (rows, columns) = (h.div_ceil(stride), w.div_ceil(stride));
    let (from, to) = (h * w * BLOCK, rows * columns * BLOCK);
    let planes = x.len() / from;
    let mut y = Buffer::take(planes * to);
    let shared = Shared::new(&mut y);
    parallel(planes, |plane| {
        // SAFETY: each task writes the plane of its index.
        let y = unsafe { std::slice::from_raw_parts_mut(shared.at(plane * to), to) };
        let x = &x[plane * from..(plane + 1) * from];
        for (pixel, y) in y.chunks_exact_mut(BLOCK).enumerate() {
            let pixel = (pixel / columns * w + pixel % columns) * stride;
            y.copy_from_slice(&x[pixel * BLOCK..(pixel + 1) * BLOCK]);
        }
    });
    y
}

/// The transpose of [`subsample`]: zeros where pixels were dropped.
pub(crate) fn subsample_transposed(dy: &[f32], h: usize, w: usize, stride: usize) -> Buffer {
    let (rows, columns) = (h.div_ceil(stride), w.div_ceil(stride));
    let (from, to) = (rows * columns * BLOCK, h * w * BLOCK);
    let planes = dy.len() / from;
    let mut dx = Buffer::take(planes * to);
    let shared = Shared::new(&mut dx);
    parallel(planes, |plane| {
        // SAFETY: each task writes the plane of its index.
        let dx = unsafe { std::slice::from_raw_parts_mut(shared.at(plane * to), to) };
        dx.fill(0.0);
        for (pixel, dy) in dy[plane * from..(plane + 1) * from]
            .chunks_exact(BLOCK)
            .enumerate()
        {
            let pixel = (pixel / columns * w + pixel % columns) * stride;
            dx[pixel * BLOCK..(pixel + 1) * BLOCK].copy_from_slice(dy);
        }
    });
    dx
}

/// Windows of a maximum over planes of `h`×`w` pixels; the last may hang over the border.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Windows {
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
}

impl Windows {
    /// Offsets of the pixels of a window, row by row.
    fn pixels(self, window: usize) -> impl Iterator<Item = usize> {
        let (top, left) = (
            window / self.columns * self.stride,
            window % self.columns * self.stride,
        );
        let (bottom, right) = (self.h.min(top + self.kernel), self.w.min(left + self.kernel));
        (top..bottom).flat_map(move |y| (left..right).map(move |x| (y * self.w + x) * BLOCK))
    }
}

/// The maximum of each window.
pub(crate) fn max_pool(isa: Isa, x: &[f32], windows: Windows) -> Buffer {
    let (from, to) = (
        windows.h * windows.w * BLOCK,
        windows.rows * windows.columns * BLOCK,
    );
    let planes = x.len() / from;
    let mut y = Buffer::take(planes * to);
    let shared = Shared::new(&mut y);
    parallel(planes, |plane| {
        isa.run(MaxPool {
            x: &x[plane * from..(plane + 1) * from],
            y: shared,
            start: plane * to,
            windows,
        });
    });
    y
}

struct MaxPool<'a> {
    x: &'a [f32],
    y: Shared,
    start: usize,
    windows: Windows,
}

impl Kernel for MaxPool<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { x, y, start, windows } = self;
        for window in 0..windows.rows * windows.columns {
            // SAFETY: the caller promises the instructions; pixels of windows lie inside the plane; tasks have planes
            // of their own.
            unsafe {
                let mut max = L::splat(f32::NEG_INFINITY);
                for pixel in windows.pixels(window) {
                    max = L::load(x.as_ptr().wrapping_add(pixel)).max(max);
                }
                max.store(y.at(start + window * BLOCK));
            }
        }
    }
}

/// Hands the gradient of each window to its first maximum.
pub(crate) fn max_pool_gradient(x: &[f32], dy: &[f32], windows: Windows) -> Buffer {
    let (from, to) = (
        windows.h * windows.w * BLOCK,
        windows.rows * windows.columns * BLOCK,
    );
    let planes = x.len() / from;
    let mut dx = Buffer::take(x.len());
    let shared = Shared::new(&mut dx);
    parallel(planes, |plane| {
        // SAFETY: each task writes the plane of its index.
        let dx = unsafe { std::slice::from_raw_parts_mut(shared.at(plane * from), from) };
        dx.fill(0.0);
        let (x, dy) = (
            &x[plane * from..(plane + 1) * from],
            &dy[plane * to..(plane + 1) * to],
        );
        for (window, dy) in dy.chunks_exact(BLOCK).enumerate() {
            for (lane, dy) in dy.iter().enumerate() {
                let mut first = f32::NEG_INFINITY;
                let mut winner = None;
                for pixel in windows.pixels(window) {
                    if winner.is_none() || x[pixel + lane] > first {
                        (first, winner) = (x[pixel + lane], Some(pixel));
                    }
                }
                if let Some(pixel) = winner {
                    dx[pixel + lane] += dy;
                }
            }
        }
    });
    dx
}
