//! The register tile: the one matrix product that all convolutions are made of.

use super::lanes::Lanes;

/// Rows of a register tile: with four blocks of columns, 24 of AVX-512's 32 registers accumulate.
pub(crate) const TILE_ROWS: usize = 6;

/// Terms of the inner dimension that are summed before the next: so many rows of B, at 64 columns 24 KiB, stay in the
/// first-level cache while all rows of A pass by.
const INNER: usize = 96;

/// How the operands of [`multiply`] lie in memory, all distances in floats.
#[derive(Clone, Copy)]
pub(crate) struct Strides {
    /// Between neighbours along the inner dimension of A.
    pub(crate) a_inner: usize,
    /// Between neighbours along the inner dimension of B.
    pub(crate) b_inner: usize,
    /// Between blocks of sixteen columns of B.
    pub(crate) b_block: usize,
    /// Between blocks of sixteen columns of C.
    pub(crate) c_block: usize,
}

/// Where a row of the product starts in A and in C.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) a: usize,
    pub(crate) c: usize,
}

impl Row {
    /// Rows at equal distances.
    pub(crate) fn spaced(count: usize, a: usize, c: usize) -> Vec<Self> {
        (0..count)
            .map(|row| Self {
                a: row * a,
                c: row * c,
            })
            .collect()
    }
}

/// Runs of the inner dimension: `length` terms for each pair of offsets into A and B.
///
/// A dense product is one run. An implicit product (a convolution that is never unrolled in memory) has one run for
/// each kernel tap and block of input channels.
#[derive(Clone, Copy)]
pub(crate) struct Runs<'a> {
    pub(crate) offsets: &'a [(usize, usize)],
    pub(crate) length: usize,
}

/// C = A·B, or C += A·B, for all `rows` and `blocks`·16 columns.
///
/// Each element of C is one chain of fused multiply-adds in the order of the inner dimension, however the rows are
/// grouped, so results do not depend on the split of rows between tasks.
///
/// # Safety
/// The processor has the instructions of `L`; `blocks ≤ L::TILE_BLOCKS`; rows, runs and strides stay inside the
/// operands, and C overlaps neither A nor B.
#[inline(always)]
pub(crate) unsafe fn multiply<L: Lanes>(
    rows: &[Row],
    blocks: usize,
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    accumulate: bool,
) {
    let mut accumulate = accumulate;
    // SAFETY: parts of the runs are what the caller promises for the whole.
    unsafe {
        if runs.length > INNER {
            let pieces = runs.length.div_ceil(INNER);
            for (a_offset, b_offset) in runs.offsets {
                let mut first = 0;
                for piece in 0..pieces {
                    let length = (runs.length - first).div_ceil(pieces - piece);
                    let offset = (
                        a_offset + first * strides.a_inner,
                        b_offset + first * strides.b_inner,
                    );
                    let piece = Runs {
                        offsets: &[offset],
                        length,
                    };
                    multiply_part::<L>(rows, blocks, piece, strides, a, b, c, accumulate);
                    first += length;
                    accumulate = true;
                }
            }
        } else if runs.offsets.is_empty() {
            multiply_part::<L>(rows, blocks, runs, strides, a, b, c, accumulate);
        } else {
            for offsets in runs.offsets.chunks(INNER / runs.length.max(1)) {
                let part = Runs { offsets, ..runs };
                multiply_part::<L>(rows, blocks, part, strides, a, b, c, accumulate);
                accumulate = true;
            }
        }
    }
}

/// [`multiply`] for as much of the inner dimension as the cache holds.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn multiply_part<L: Lanes>(
    rows: &[Row],
    blocks: usize,
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    accumulate: bool,
) {
    // Groups of nearly equal height: 7 rows are 4 + 3, not 6 + 1.
    let groups = rows.len().div_ceil(TILE_ROWS);
    let mut row = 0;
    for group in 0..groups {
        let height = (rows.len() - row).div_ceil(groups - group);
        let rows = &rows[row..row + height];
        // SAFETY: the caller's promise.
        unsafe {
            macro_rules! dispatch {
                ($blocks:literal) => {
                    match height {
                        6 => tile::<L, 6, $blocks>(rows, runs, strides, a, b, c, accumulate),
                        5 => tile::<L, 5, $blocks>(rows, runs, strides, a, b, c, accumulate),
                        4 => tile::<L, 4, $blocks>(rows, runs, strides, a, b, c, accumulate),
                        3 => tile::<L, 3, $blocks>(rows, runs, strides, a, b, c, accumulate),
                        2 => tile::<L, 2, $blocks>(rows, runs, strides, a, b, c, accumulate),
                        _ => tile::<L, 1, $blocks>(rows, runs, strides, a, b, c, accumulate),
                    }
                };
            }
            if L::TILE_BLOCKS == 1 || blocks == 1 {
                dispatch!(1)
            } else {
                match blocks {
                    4 => dispatch!(4),
                    3 => dispatch!(3),
                    _ => dispatch!(2),
                }
            }
        }
        row += height;
    }
}

/// One register tile of `ROWS` rows and `BLOCKS`·16 columns.
///
/// # Safety
/// As for [`multiply`]; there are `ROWS` rows.
#[inline(always)]
unsafe fn tile<L: Lanes, const ROWS: usize, const BLOCKS: usize>(
    rows: &[Row],
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    accumulate: bool,
) {
    // Offsets are computed once and added without overflow checks, which debug builds would otherwise make in the
    // innermost loop.
    let mut a_rows = [0; ROWS];
    let mut c_rows = [0; ROWS];
    for ((row, a), c) in rows.iter().zip(&mut a_rows).zip(&mut c_rows) {
        (*a, *c) = (row.a, row.c);
    }
    let b_blocks: [usize; BLOCKS] = std::array::from_fn(|block| block * strides.b_block);
    let c_at = |row: usize, block: usize| c.wrapping_add(c_rows[row] + block * strides.c_block);
    // SAFETY: the caller promises instructions and addresses.
    unsafe {
        let mut sums = [[L::zero(); BLOCKS]; ROWS];
        if accumulate {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (block, sum) in sums.iter_mut().enumerate() {
                    *sum = L::load(c_at(row, block));
                }
            }
        }
        for &(a_offset, b_offset) in runs.offsets {
            let (mut a, mut b) = (a.wrapping_add(a_offset), b.wrapping_add(b_offset));
            for _ in 0..runs.length / UNROLLED {
                for _ in 0..UNROLLED {
                    add_term(&mut sums, a, a_rows, b, b_blocks);
                    a = a.wrapping_add(strides.a_inner);
                    b = b.wrapping_add(strides.b_inner);
                }
            }
            for _ in 0..runs.length % UNROLLED {
                add_term(&mut sums, a, a_rows, b, b_blocks);
                a = a.wrapping_add(strides.a_inner);
                b = b.wrapping_add(strides.b_inner);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (block, sum) in sums.iter().enumerate() {
                sum.store(c_at(row, block));
            }
        }
    }
}

/// Terms of a run between two jumps: the end of a run of sixteen would otherwise be guessed wrong.
const UNROLLED: usize = 4;

/// One term of the inner dimension.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn add_term<L: Lanes, const ROWS: usize, const BLOCKS: usize>(
    sums: &mut [[L; BLOCKS]; ROWS],
    a: *const f32,
    a_rows: [usize; ROWS],
    b: *const f32,
    b_blocks: [usize; BLOCKS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut columns = [L::zero(); BLOCKS];
        for (column, block) in columns.iter_mut().zip(b_blocks) {
            *column = L::load(b.wrapping_add(block));
        }
        for (sums, row) in sums.iter_mut().zip(a_rows) {
            let factor = L::broadcast(a.wrapping_add(row));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = factor.mul_add(column, *sum);
            }
        }
    }
}
