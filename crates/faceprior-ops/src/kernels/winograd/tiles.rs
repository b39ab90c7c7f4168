//! Tiles of a picture to points and back: the matrices along both axes, borders included.

use std::ops::Range;

use super::super::Shared;
use super::super::lanes::{Kernel, Lanes};
use super::super::load::{Load, Read, with_read};
use super::form::{Form, GradientForm, Maps};
use super::grid::{Grid, Place};
use super::matrices::{Four, GradientMatrices, Half, Matrices, Three, ThreeTaps, Two, with_matrices};
use super::{BLOCK, Shape};

/// Winograd's form of a convolution with stride 1: an entry of a tile is its value at a point.
#[derive(Clone, Copy)]
pub(super) struct StrideOne {
    pub(super) grid: Grid,
}

impl Form for StrideOne {
    type Taps = ThreeTaps;

    fn grid(self) -> Grid {
        self.grid
    }

    fn planes(self) -> [usize; 2] {
        [self.grid.shape.plane(); 2]
    }

    fn side(self) -> usize {
        self.grid.edge()
    }

    fn along_axis(self, point: usize) -> Range<usize> {
        point..point + 1
    }

    fn shared_with(self, entry: usize) -> usize {
        entry
    }

    #[inline(always)]
    unsafe fn read_tile<L: Lanes>(
        self,
        Maps { x, load }: Maps,
        plane: usize,
        place: Place,
        to: *mut f32,
        point: usize,
    ) {
        let grid = self.grid;
        // SAFETY: the caller's promise.
        unsafe {
            L::call(TransformInput {
                x,
                load,
                plane,
                grid,
                place,
                to,
                point,
            });
        }
    }

    #[inline(always)]
    unsafe fn write_tile<L: Lanes>(
        self,
        from: *const f32,
        point: usize,
        y: Shared,
        plane: usize,
        place: Place,
    ) {
        let grid = self.grid;
        // SAFETY: the caller's promise.
        unsafe {
            L::call(TransformOutput {
                from,
                point,
                y,
                plane,
                grid,
                place,
            });
        }
    }
}

impl GradientForm for StrideOne {
    #[inline(always)]
    unsafe fn read_gradient_tile<L: Lanes>(
        self,
        dy: &[f32],
        plane: usize,
        place: Place,
        to: *mut f32,
        point: usize,
    ) {
        let grid = self.grid;
        // SAFETY: the caller's promise.
        unsafe {
            L::call(TransformOutputGradient {
                dy,
                plane,
                grid,
                place,
                to,
                point,
            });
        }
    }
}

/// `Bᵀ d B` of a tile of a plane of `x`, one value per point.
struct TransformInput<'a> {
    x: &'a [f32],
    load: Option<Load<'a>>,
    plane: usize,
    grid: Grid,
    place: Place,
    /// Room for the points at distances of `point`.
    to: *mut f32,
    point: usize,
}

impl Kernel for TransformInput<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [rows, columns] = self.place.outputs;
        let mut half = Half::new();
        // SAFETY: the caller promises the instructions and a plane and a place of the map.
        unsafe {
            with_read!(self.load, self.plane, |values: L| {
                with_matrices!(rows, input_columns::<L>(&self, values, &mut half))
            });
            with_matrices!(columns, input_rows::<L>(&self, &half));
        }
    }
}

/// # Safety
/// As for [`TransformInput`], whose rows the matrices are for.
#[inline(always)]
unsafe fn input_columns<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &TransformInput,
    values: impl Read<L>,
    half: &mut Half,
) {
    let Shape { h, w, .. } = task.grid.shape;
    let ([top, left], columns) = (task.place.first, task.place.outputs[1]);
    let plane = task.x.as_ptr().wrapping_add(task.plane * task.grid.shape.plane());
    let inside = top > 0 && left > 0 && top + T < h && left + columns < w;
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        for column in 0..columns + 2 {
            let mut d = [L::zero(); E];
            if inside {
                let first = plane.wrapping_add(((top - 1) * w + left - 1 + column) * BLOCK);
                for (row, d) in d.iter_mut().enumerate() {
                    let from = first.wrapping_add(row * w * BLOCK);
                    *d = values.read(from);
                    // What the next tile of the row reads and this one does not.
                    if column >= 2 {
                        L::prefetch(from.wrapping_add(columns * BLOCK));
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
            half.write_column(column, M::input_to_points(d));
        }
    }
}

/// # Safety
/// As for [`TransformInput`], whose columns the matrices are for.
#[inline(always)]
unsafe fn input_rows<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &TransformInput,
    half: &Half,
) {
    let (mut to, point, edge) = (task.to, task.point, task.grid.edge());
    for row in 0..task.place.outputs[0] + 2 {
        // SAFETY: the caller's promise.
        unsafe {
            let values = M::input_to_points(half.row::<L, E>(row));
            for (column, value) in values.into_iter().enumerate() {
                value.store(to.wrapping_add(column * point));
            }
        }
        to = to.wrapping_add(edge * point);
    }
}

/// `Aᵀ m A` of a tile of a plane of `y`, written where it lies inside the picture. The task ends with [`Shared::written`].
struct TransformOutput {
    /// The points, at distances of `point`.
    from: *const f32,
    point: usize,
    y: Shared,
    plane: usize,
    grid: Grid,
    place: Place,
}

impl Kernel for TransformOutput {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [rows, columns] = self.place.outputs;
        let mut half = Half::new();
        // SAFETY: the caller promises the instructions, a plane and a place of the map, and that it is the task's own.
        unsafe {
            with_matrices!(rows, output_columns::<L>(&self, &mut half));
            with_matrices!(columns, output_rows::<L>(&self, &half));
        }
    }
}

/// # Safety
/// As for [`TransformOutput`], whose rows the matrices are for.
#[inline(always)]
unsafe fn output_columns<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &TransformOutput,
    half: &mut Half,
) {
    let (from, point, edge) = (task.from, task.point, task.grid.edge());
    for column in 0..task.place.outputs[1] + 2 {
        // SAFETY: the caller's promise.
        unsafe {
            let mut m = [L::zero(); E];
            let first = from.wrapping_add(column * point);
            for (row, m) in m.iter_mut().enumerate() {
                *m = L::load(first.wrapping_add(row * edge * point));
            }
            half.write_column(column, M::points_to_output(m));
        }
    }
}

/// # Safety
/// As for [`TransformOutput`], whose columns the matrices are for.
#[inline(always)]
unsafe fn output_rows<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &TransformOutput,
    half: &Half,
) {
    let (shape, [top, left], y) = (task.grid.shape, task.place.first, task.y);
    let columns = T.min(shape.w - left);
    for row in 0..task.place.outputs[0].min(shape.h - top) {
        let first = task.plane * shape.plane() + ((top + row) * shape.w + left) * BLOCK;
        // SAFETY: the caller's promise; only pixels inside the picture are written.
        unsafe {
            let values = M::points_to_output(half.row::<L, E>(row));
            for (column, value) in values.into_iter().enumerate().take(columns) {
                y.write(first + column * BLOCK, value);
            }
        }
    }
}

/// `A ẏ Aᵀ` of a tile of a plane of output gradients, zero outside the picture.
struct TransformOutputGradient<'a> {
    dy: &'a [f32],
    plane: usize,
    grid: Grid,
    place: Place,
    /// Room for the points at distances of `point`.
    to: *mut f32,
    point: usize,
}

impl Kernel for TransformOutputGradient<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [rows, columns] = self.place.outputs;
        let mut half = Half::new();
        // SAFETY: the caller promises the instructions and a plane and a place of the map.
        unsafe {
            with_matrices!(rows, output_gradient_columns::<L>(&self, &mut half));
            with_matrices!(columns, output_gradient_rows::<L>(&self, &half));
        }
    }
}

/// A column of a tile of a plane of output gradients, `h`×`w` pixels, zero outside the picture.
///
/// # Safety
/// The processor has the instructions of `L`; plane, place and column are of the map.
#[inline(always)]
pub(super) unsafe fn gradient_column<L: Lanes, const T: usize>(
    dy: &[f32],
    [h, w]: [usize; 2],
    plane: usize,
    place: Place,
    column: usize,
) -> [L; T] {
    let ([top, left], columns) = (place.first, place.outputs[1]);
    let plane = dy.as_ptr().wrapping_add(plane * h * w * BLOCK);
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        let mut values = [L::zero(); T];
        for (row, value) in values.iter_mut().enumerate() {
            let (y, x) = (top + row, left + column);
            if y < h && x < w {
                let from = plane.wrapping_add((y * w + x) * BLOCK);
                *value = L::load(from);
                // The next tile of the row.
                if left + columns < w {
                    L::prefetch(from.wrapping_add(columns * BLOCK));
                }
            }
        }
        values
    }
}

/// # Safety
/// As for [`TransformOutputGradient`], whose rows the matrices are for.
#[inline(always)]
unsafe fn output_gradient_columns<L: Lanes, M: GradientMatrices<T, E>, const T: usize, const E: usize>(
    task: &TransformOutputGradient,
    half: &mut Half,
) {
    let Shape { h, w, .. } = task.grid.shape;
    for column in 0..task.place.outputs[1] {
        // SAFETY: the caller's promise.
        unsafe {
            let dy = gradient_column::<L, T>(task.dy, [h, w], task.plane, task.place, column);
            half.write_column(column, M::output_to_points(dy));
        }
    }
}

/// # Safety
/// As for [`TransformOutputGradient`], whose columns the matrices are for.
#[inline(always)]
unsafe fn output_gradient_rows<L: Lanes, M: GradientMatrices<T, E>, const T: usize, const E: usize>(
    task: &TransformOutputGradient,
    half: &Half,
) {
    let (mut to, point, edge) = (task.to, task.point, task.grid.edge());
    for row in 0..task.place.outputs[0] + 2 {
        // SAFETY: the caller's promise.
        unsafe {
            let values = M::output_to_points(half.row::<L, T>(row));
            for (column, value) in values.into_iter().enumerate() {
                value.store(to.wrapping_add(column * point));
            }
        }
        to = to.wrapping_add(edge * point);
    }
}
