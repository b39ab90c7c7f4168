//! Products of plain row-major matrices, of which one is large and passes once through the cache.

use std::ops::Range;

use super::lanes::{Isa, Kernel, Lanes};
use super::tile::{Plain, Row, Runs, Strides, multiply_between};
use super::{BLOCK, Shared, parallel};

/// Rows of B that a task of [`rows_by_rows`] multiplies by all rows of A.
const TASK_ROWS: usize = 8;

/// C = A·Bᵀ for A `[M, inner]` and B `[N, inner]`: products of rows with rows. C is `[M, N]`.
pub(crate) fn rows_by_rows(isa: Isa, inner: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    let (columns, task) = dot_rows(inner, a, b, c);
    parallel(columns.div_ceil(TASK_ROWS), |index| {
        let first = index * TASK_ROWS;
        isa.run(task(first..columns.min(first + TASK_ROWS)));
    });
}

/// [`rows_by_rows`] on the calling thread.
pub(crate) fn rows_by_rows_here(isa: Isa, inner: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    let (columns, task) = dot_rows(inner, a, b, c);
    isa.run(task(0..columns));
}

/// The number of columns of C, and what makes some of them.
fn dot_rows<'a>(
    inner: usize,
    a: &'a [f32],
    b: &'a [f32],
    c: &mut [f32],
) -> (usize, impl Fn(Range<usize>) -> DotRows<'a> + Sync) {
    let (rows, columns) = (a.len() / inner, b.len() / inner);
    assert_eq!(
        (a.len(), b.len(), c.len()),
        (rows * inner, columns * inner, rows * columns)
    );
    let c = Shared::new(c);
    let task = move |of_task: Range<usize>| DotRows {
        inner,
        a,
        b,
        c,
        columns,
        first: of_task.start,
        last: of_task.end,
    };
    (columns, task)
}

struct DotRows<'a> {
    inner: usize,
    a: &'a [f32],
    b: &'a [f32],
    c: Shared,
    columns: usize,
    first: usize,
    last: usize,
}

/// Rows of A, and of B, whose products are made together.
const SIDE: usize = 4;

impl Kernel for DotRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            inner,
            a,
            b,
            c,
            columns,
            first,
            last,
        } = self;
        let (rows, whole) = (a.len() / inner, inner / BLOCK * BLOCK);
        for column in (first..last).step_by(SIDE) {
            for row in (0..rows).step_by(SIDE) {
                // Beyond the last row the last one is taken again, and its product left out.
                let mut a_rows = [a.as_ptr(); SIDE];
                let mut b_rows = [b.as_ptr(); SIDE];
                for side in 0..SIDE {
                    a_rows[side] = a[rows.min(row + side + 1) * inner - inner..].as_ptr();
                    b_rows[side] = b[last.min(column + side + 1) * inner - inner..].as_ptr();
                }
                // SAFETY: the caller promises the instructions; rows have `inner` floats; each task writes its
                // columns of C.
                unsafe {
                    let mut sums = [[L::zero(); SIDE]; SIDE];
                    for at in (0..whole).step_by(BLOCK) {
                        let mut from_b = [L::zero(); SIDE];
                        for (value, row) in from_b.iter_mut().zip(b_rows) {
                            *value = L::load(row.wrapping_add(at));
                        }
                        for (sums, row) in sums.iter_mut().zip(a_rows) {
                            let value = L::load(row.wrapping_add(at));
                            for (sum, other) in sums.iter_mut().zip(from_b) {
                                *sum = value.mul_add(other, *sum);
                            }
                        }
                    }
                    for (i, sums) in sums.into_iter().enumerate().take(rows - row) {
                        for (j, sum) in sums.into_iter().enumerate().take(last - column) {
                            let mut lanes = [0.0; BLOCK];
                            sum.store(lanes.as_mut_ptr());
                            let mut total = 0.0;
                            for lane in lanes {
                                total += lane;
                            }
                            for at in whole..inner {
                                total += *a_rows[i].wrapping_add(at) * *b_rows[j].wrapping_add(at);
                            }
                            *c.at((row + i) * columns + column + j) = total;
                        }
                    }
                }
            }
        }
    }
}

/// A matrix `[rows, inner]`, or one of that shape that is stored as its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) transposed: bool,
}

/// C = A·B for B `[inner, columns]`, by columns of B. C is `[rows, columns]`.
pub(crate) fn by_columns(isa: Isa, a: Matrix, b: &[f32], columns: usize, c: &mut [f32]) {
    assert_eq!(a.values.len(), a.rows * a.inner);
    assert_eq!((b.len(), c.len()), (a.inner * columns, a.rows * columns));
    let c = Shared::new(c);
    let width = TASK_BLOCKS * BLOCK;
    parallel(columns.div_ceil(width), |task| {
        let first = task * width;
        isa.run(Columns {
            a,
            b,
            c,
            columns,
            first,
        });
    });
}

/// [`by_columns`] on the calling thread.
pub(crate) fn by_columns_here(isa: Isa, a: Matrix, b: &[f32], columns: usize, c: &mut [f32]) {
    assert_eq!(a.values.len(), a.rows * a.inner);
    assert_eq!((b.len(), c.len()), (a.inner * columns, a.rows * columns));
    let c = Shared::new(c);
    for first in (0..columns).step_by(TASK_BLOCKS * BLOCK) {
        isa.run(Columns {
            a,
            b,
            c,
            columns,
            first,
        });
    }
}

/// Blocks of sixteen columns that a task computes.
const TASK_BLOCKS: usize = 4;

struct Columns<'a> {
    a: Matrix<'a>,
    b: &'a [f32],
    c: Shared,
    columns: usize,
    first: usize,
}

impl Kernel for Columns<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            a,
            b,
            c,
            columns,
            first,
        } = self;
        let (a_row, a_inner) = if a.transposed { (1, a.rows) } else { (a.inner, 1) };
        let width = (columns - first).min(TASK_BLOCKS * BLOCK);
        let (blocks, strides) = (
            width / BLOCK,
            Strides {
                a_inner,
                b_inner: columns,
                b_block: BLOCK,
                c_block: BLOCK,
                matrices: None,
                b_next: None,
            },
        );
        let runs = Runs {
            offsets: &[(0, 0)],
            length: a.inner,
        };
        // SAFETY: the caller promises the instructions; operands are sized as checked; each task writes its columns.
        unsafe {
            if blocks > 0 {
                let rows = Row::spaced(a.rows, a_row, columns);
                let (b, c) = (b.as_ptr().wrapping_add(first), c.at(first));
                // B passes once, for few rows: packing it for a matrix unit would be most of the work.
                let ends = Plain { accumulate: false };
                multiply_between::<L>(&rows, blocks, runs, strides, a.values.as_ptr(), b, c, ends);
            }
            for row in 0..a.rows {
                for column in first + blocks * BLOCK..first + width {
                    let mut sum = 0.0;
                    for at in 0..a.inner {
                        sum += a.values[row * a_row + at * a_inner] * b[at * columns + column];
                    }
                    *c.at(row * columns + column) = sum;
                }
            }
        }
    }
}
