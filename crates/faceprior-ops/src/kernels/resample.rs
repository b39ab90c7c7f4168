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
                let weights = taps.map(|tap| L::splat(tap.1));
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

/// Keeps every `stride`-th pixel of every `stride`-th row.
pub(crate) fn subsample(x: &[f32], h: usize, w: usize, stride: usize) -> Buffer {
    let (rows, columns) = (h.div_ceil(stride), w.div_ceil(stride));
    let planes = x.len() / (h * w * BLOCK);
    let mut y = Buffer::take(planes * rows * columns * BLOCK);
    for (plane, y) in y.chunks_exact_mut(rows * columns * BLOCK).enumerate() {
        for (pixel, y) in y.chunks_exact_mut(BLOCK).enumerate() {
            let from = (plane * h + pixel / columns * stride) * w + pixel % columns * stride;
            y.copy_from_slice(&x[from * BLOCK..][..BLOCK]);
        }
    }
    y
}

/// The transpose of [`subsample`]: zeros where pixels were dropped.
pub(crate) fn subsample_transposed(dy: &[f32], h: usize, w: usize, stride: usize) -> Buffer {
    let (rows, columns) = (h.div_ceil(stride), w.div_ceil(stride));
    let planes = dy.len() / (rows * columns * BLOCK);
    let mut dx = Buffer::zeroed(planes * h * w * BLOCK);
    for (plane, dy) in dy.chunks_exact(rows * columns * BLOCK).enumerate() {
        for (pixel, dy) in dy.chunks_exact(BLOCK).enumerate() {
            let to = (plane * h + pixel / columns * stride) * w + pixel % columns * stride;
            dx[to * BLOCK..][..BLOCK].copy_from_slice(dy);
        }
    }
    dx
}
