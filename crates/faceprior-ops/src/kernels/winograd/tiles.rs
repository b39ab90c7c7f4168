//! Tiles of a picture to points and back: the matrices along both axes, borders included.

#![allow(
    clippy::needless_range_loop,
    reason = "columns of matrices are filled one by one"
)]

use super::super::Shared;
use super::super::lanes::Lanes;
use super::super::load::{AsIs, Load, Read};
use super::matrices::{Matrices, output_to_points};
use super::{BLOCK, EDGE, Shape, TILE};

/// `Bᵀ d B` of the tile of plane `index` of `x` whose outputs start at (`top`, `left`), one value per point at
/// distances of `point`.
///
/// # Safety
/// Instructions of `L`; `x` is of the shape; `to` has room for the points.
#[inline(always)]
pub(super) unsafe fn transform_input<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    x: &[f32],
    load: Option<Load>,
    shape: Shape,
    (index, top, left): (usize, usize, usize),
    to: *mut f32,
    point: usize,
) {
    let plane = x.as_ptr().wrapping_add(index * shape.plane());
    // SAFETY: the caller's promise.
    unsafe {
        match load {
            Some(load) => {
                transform_input_as::<L, M, T, E>(plane, load.plane::<L>(index), shape, top, left, to, point);
            }
            None => transform_input_as::<L, M, T, E>(plane, AsIs, shape, top, left, to, point),
        }
    }
}

/// # Safety
/// As for [`transform_input`]; `plane` is a plane of the shape.
#[inline(always)]
unsafe fn transform_input_as<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    plane: *const f32,
    values: impl Read<L>,
    shape: Shape,
    top: usize,
    left: usize,
    to: *mut f32,
    point: usize,
) {
    let Shape { h, w, .. } = shape;
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        let mut half = [[L::zero(); E]; E];
        let inside = top > 0 && left > 0 && top + T < h && left + T < w;
        for column in 0..E {
            let mut d = [L::zero(); E];
            if inside {
                let first = plane.wrapping_add(((top - 1) * w + left - 1 + column) * BLOCK);
                for (row, d) in d.iter_mut().enumerate() {
                    let from = first.wrapping_add(row * w * BLOCK);
                    *d = values.read(from);
                    // What the next tile of the row reads and this one does not.
                    if column >= E - T {
                        L::prefetch(from.wrapping_add(T * BLOCK));
                    }
                }
            } else {
                for (row, d) in d.iter_mut().enumerate() {
                    // One too far above or left wraps around to a huge number, which is outside too.
                    let (y, x) = ((top + row).wrapping_sub(1), (left + column).wrapping_sub(1));
                    if y < h && x < w {
                        *d = values.read(plane.wrapping_add((y * w + x) * BLOCK));
                    }
                }
            }
            for (row, value) in M::input_to_points(d).into_iter().enumerate() {
                half[row][column] = value;
            }
        }
        for (row, half) in half.into_iter().enumerate() {
            for (column, value) in M::input_to_points(half).into_iter().enumerate() {
                value.store(to.wrapping_add((row * E + column) * point));
            }
        }
    }
}

/// `Aᵀ m A` of the tile of plane `index` of `y` whose outputs start at (`top`, `left`), written where it lies inside the
/// picture.
///
/// # Safety
/// Instructions of `L`; `from` holds the points at distances of `point`; `y` is of the shape, and the outputs are the
/// task's own. The task ends with [`Shared::written`].
#[inline(always)]
pub(super) unsafe fn transform_output<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    from: *const f32,
    point: usize,
    y: Shared,
    shape: Shape,
    (index, top, left): (usize, usize, usize),
) {
    // SAFETY: the caller's promise; only pixels inside the picture are written.
    unsafe {
        let mut half = [[L::zero(); E]; T];
        for column in 0..E {
            let mut m = [L::zero(); E];
            for (row, m) in m.iter_mut().enumerate() {
                *m = L::load(from.wrapping_add((row * E + column) * point));
            }
            for (row, value) in M::points_to_output(m).into_iter().enumerate() {
                half[row][column] = value;
            }
        }
        let columns = T.min(shape.w - left);
        for (row, half) in half.into_iter().enumerate().take(shape.h - top) {
            let first = index * shape.plane() + ((top + row) * shape.w + left) * BLOCK;
            for (column, value) in M::points_to_output(half).into_iter().enumerate().take(columns) {
                y.write(first + column * BLOCK, value);
            }
        }
    }
}

/// `A ẏ Aᵀ` of one tile of output gradients, zero outside the picture.
///
/// # Safety
/// Instructions of `L`; `plane` is a plane of the shape; `to` has room for the points.
#[inline(always)]
pub(super) unsafe fn transform_output_gradient<L: Lanes>(
    plane: *const f32,
    shape: Shape,
    top: usize,
    left: usize,
    to: *mut f32,
    point: usize,
) {
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        let mut half = [[L::zero(); TILE]; EDGE];
        for column in 0..TILE {
            let mut dy = [L::zero(); TILE];
            for (row, dy) in dy.iter_mut().enumerate() {
                let (y, x) = (top + row, left + column);
                if y < shape.h && x < shape.w {
                    let from = plane.wrapping_add((y * shape.w + x) * BLOCK);
                    *dy = L::load(from);
                    // The next tile of the row.
                    if left + TILE < shape.w {
                        L::prefetch(from.wrapping_add(TILE * BLOCK));
                    }
                }
            }
            for (row, value) in output_to_points(dy).into_iter().enumerate() {
                half[row][column] = value;
            }
        }
        for (row, half) in half.into_iter().enumerate() {
            for (column, value) in output_to_points(half).into_iter().enumerate() {
                value.store(to.wrapping_add((row * EDGE + column) * point));
            }
        }
    }
}
