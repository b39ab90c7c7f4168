//! The register tile: the one matrix product that all convolutions are made of.

use super::BLOCK;
use super::amx;
use super::lanes::{Kernel, Lanes, Parts};
use super::panel::Panel;

/// Rows of a register tile of several blocks: with four, 24 of AVX-512's 32 registers accumulate. A tile of one block has
/// [`Lanes::TILE_ROWS`].
const WIDE_ROWS: usize = 6;

/// Terms of the inner dimension that are summed before the next: so many rows of B, at 64 columns 25 KiB, stay in the
/// first-level cache while all rows of A pass by. A map of 14×14 pixels is two of them.
pub(super) const INNER: usize = 100;

/// How the operands of [`multiply`] lie in memory, distances in floats.
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
    /// Where the product may be for the processor's matrix unit, the parts of its factors.
    pub(crate) matrices: Option<Parts>,
    /// From B to the B of the product that comes next, whose blocks lie alike, where that is known. Then each part of B
    /// is asked for while the one before it is at work.
    pub(crate) b_next: Option<usize>,
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

/// What each sum of a product starts from, and what it goes through on its way into C.
pub(crate) trait Ends<L: Lanes>: Copy {
    /// What the sums of a block of columns start from; `c` is where they go.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; the block and the address are among those of the product.
    unsafe fn start(self, block: usize, c: *const f32) -> L;

    /// What is stored for the complete sums of a block of columns.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; the block is among those of the product.
    unsafe fn finish(self, block: usize, sums: L) -> L;
}

/// C = A·B, or C += A·B.
#[derive(Clone, Copy)]
pub(crate) struct Plain {
    pub(crate) accumulate: bool,
}

impl<L: Lanes> Ends<L> for Plain {
    #[inline(always)]
    unsafe fn start(self, _: usize, c: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe { if self.accumulate { L::load(c) } else { L::zero() } }
    }

    #[inline(always)]
    unsafe fn finish(self, _: usize, sums: L) -> L {
        sums
    }
}

/// C = A·B, or C += A·B, for all `rows` and `blocks`·16 columns, on the processor's matrix unit where that suits. The
/// inner dimension runs over blocked pixels in A and in B.
///
/// Each element of C is one chain of sums in the order of the inner dimension, however the rows are grouped, so results
/// do not depend on the split of rows between tasks.
///
/// # Safety
/// The processor has the instructions of `L`; rows, runs and strides stay inside the operands, and C overlaps neither A nor B.
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
    if strides.matrices.is_some() && amx::suits(rows, blocks, runs, strides) {
        // SAFETY: the caller's promise.
        unsafe { amx::multiply(rows, blocks, runs, strides, a, b, c, accumulate) };
        return;
    }
    assert_eq!([strides.a_inner, strides.b_inner], [BLOCK; 2]);
    // SAFETY: the caller's promise.
    unsafe {
        L::call(Product::<BLOCK> {
            rows,
            blocks,
            runs,
            strides,
            a,
            b,
            c,
            accumulate,
        });
    }
}

/// [`multiply_between`] by a function of its own, for terms of A that are `A_INNER` apart and of B that are sixteen apart.
struct Product<'a, const A_INNER: usize> {
    rows: &'a [Row],
    blocks: usize,
    runs: Runs<'a>,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    accumulate: bool,
}

impl<const A_INNER: usize> Kernel for Product<'_, A_INNER> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            rows,
            blocks,
            runs,
            strides,
            a,
            b,
            c,
            accumulate,
        } = self;
        // Known to the compiler, these become parts of the instructions' addresses.
        let strides = Strides {
            a_inner: A_INNER,
            b_inner: BLOCK,
            ..strides
        };
        // SAFETY: the caller's promise.
        unsafe { multiply_between::<L>(rows, blocks, runs, strides, a, b, c, Plain { accumulate }) }
    }
}

/// C = A·B, or C += A·B, for all `rows` and `blocks`·16 columns of a panel, from `first_block` on; `runs` are the panel's.
///
/// # Safety
/// As for [`multiply`]; `panel` is of the shape.
#[inline(always)]
pub(crate) unsafe fn multiply_panel<L: Lanes>(
    rows: &[Row],
    runs: &[(usize, usize)],
    a: *const f32,
    shape: Panel,
    panel: *const f32,
    first_block: usize,
    blocks: usize,
    c: *mut f32,
    c_block: usize,
    next: Option<usize>,
    accumulate: bool,
) {
    let runs = Runs {
        offsets: runs,
        length: shape.length,
    };
    let strides = Strides {
        a_inner: 1,
        b_inner: BLOCK,
        b_block: shape.block(),
        c_block,
        matrices: None,
        b_next: next,
    };
    let b = panel.wrapping_add(shape.start(first_block));
    // SAFETY: the caller's promise.
    unsafe {
        L::call(Product::<1> {
            rows,
            blocks,
            runs,
            strides,
            a,
            b,
            c,
            accumulate,
        });
    }
}

/// The product by register tiles, of sums that start and end as `ends` says.
///
/// Each element of C is one chain of fused multiply-adds.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
pub(crate) unsafe fn multiply_between<L: Lanes>(
    rows: &[Row],
    blocks: usize,
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ends: impl Ends<L>,
) {
    for first in (0..blocks).step_by(L::TILE_BLOCKS) {
        let left = blocks - first;
        let blocks = L::TILE_BLOCKS.min(left);
        let strides = Strides {
            b_next: match strides.b_next {
                // What comes after the last columns is a distance from the first.
                Some(next) if left == blocks => Some(next.wrapping_sub(first * strides.b_block)),
                Some(_) => Some(L::TILE_BLOCKS * strides.b_block),
                None => None,
            },
            ..strides
        };
        let (b, c) = (
            b.wrapping_add(first * strides.b_block),
            c.wrapping_add(first * strides.c_block),
        );
        // SAFETY: some of the columns that the caller promises.
        unsafe { multiply_blocks::<L>(rows, blocks, runs, strides, a, b, c, From { first, ends }) }
    }
}

/// Ends of the columns from a block on.
#[derive(Clone, Copy)]
struct From<E> {
    first: usize,
    ends: E,
}

impl<L: Lanes, E: Ends<L>> Ends<L> for From<E> {
    #[inline(always)]
    unsafe fn start(self, block: usize, c: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe { self.ends.start(self.first + block, c) }
    }

    #[inline(always)]
    unsafe fn finish(self, block: usize, sums: L) -> L {
        // SAFETY: the caller's promise.
        unsafe { self.ends.finish(self.first + block, sums) }
    }
}

/// [`multiply_between`] for the columns of a register tile.
///
/// # Safety
/// As for [`multiply`], and `blocks ≤ L::TILE_BLOCKS`.
#[inline(always)]
unsafe fn multiply_blocks<L: Lanes>(
    rows: &[Row],
    blocks: usize,
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ends: impl Ends<L>,
) {
    // SAFETY: parts of the runs are what the caller promises for the whole.
    unsafe {
        if runs.length > INNER {
            let pieces = runs.length.div_ceil(INNER);
            let last = runs.offsets.len() * pieces;
            let mut part = 0;
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
                    let which = [part == 0, part + 1 == last];
                    multiply_part::<L>(rows, blocks, piece, strides, a, b, c, ends, which);
                    first += length;
                    part += 1;
                }
            }
        } else if runs.offsets.is_empty() {
            multiply_part::<L>(rows, blocks, runs, strides, a, b, c, ends, [true; 2]);
        } else {
            let parts = runs.offsets.chunks(INNER / runs.length.max(1));
            let last = parts.len();
            for (part, offsets) in parts.enumerate() {
                let which = [part == 0, part + 1 == last];
                let part = Runs { offsets, ..runs };
                multiply_part::<L>(rows, blocks, part, strides, a, b, c, ends, which);
            }
        }
    }
}

/// Groups of rows at least for which a part of B is used before the next part is asked for ahead of time.
const AHEAD_GROUPS: usize = 4;

/// [`multiply_blocks`] for as much of the inner dimension as the cache holds: whether it is the first such part and
/// whether the last.
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
    ends: impl Ends<L>,
    part: [bool; 2],
) {
    // Groups of nearly equal height: 7 rows are 4 + 3, not 6 + 1.
    let tallest = if blocks == 1 { L::TILE_ROWS } else { WIDE_ROWS };
    let groups = rows.len().div_ceil(tallest);
    // Cache lines of each block of the next part for each group of rows to ask for.
    let lines = match strides.b_next {
        Some(_) if groups >= AHEAD_GROUPS => (runs.offsets.len() * runs.length).div_ceil(groups),
        _ => 0,
    };
    let mut next = match (strides.b_next, part[1], runs.offsets.last()) {
        (Some(next), true, _) => b.wrapping_add(next),
        (_, _, Some((_, last))) => b.wrapping_add(last + runs.length * strides.b_inner),
        (_, _, None) => b,
    };
    let mut row = 0;
    for group in 0..groups {
        for _ in 0..lines {
            for block in 0..blocks {
                // SAFETY: the caller promises the instructions.
                unsafe { L::prefetch(next.wrapping_add(block * strides.b_block)) };
            }
            next = next.wrapping_add(BLOCK);
        }
        let height = (rows.len() - row).div_ceil(groups - group);
        let rows = &rows[row..row + height];
        // SAFETY: the caller's promise.
        unsafe {
            macro_rules! dispatch {
                ($blocks:literal blocks, $tallest:expr) => {
                    match height {
                        8 if $tallest >= 8 => tile::<L, 8, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        7 if $tallest >= 8 => tile::<L, 7, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        6 if $tallest >= 6 => tile::<L, 6, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        5 if $tallest >= 6 => tile::<L, 5, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        4 if $tallest >= 6 => tile::<L, 4, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        3 => tile::<L, 3, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        2 => tile::<L, 2, $blocks>(rows, runs, strides, a, b, c, ends, part),
                        _ => tile::<L, 1, $blocks>(rows, runs, strides, a, b, c, ends, part),
                    }
                };
            }
            if L::TILE_BLOCKS == 1 || blocks == 1 {
                dispatch!(1 blocks, L::TILE_ROWS)
            } else {
                match blocks {
                    4 => dispatch!(4 blocks, WIDE_ROWS),
                    3 => dispatch!(3 blocks, WIDE_ROWS),
                    _ => dispatch!(2 blocks, WIDE_ROWS),
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
    ends: impl Ends<L>,
    [first, last]: [bool; 2],
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
        for (row, sums) in sums.iter_mut().enumerate() {
            for (block, sum) in sums.iter_mut().enumerate() {
                let c = c_at(row, block);
                *sum = if first { ends.start(block, c) } else { L::load(c) };
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
                let sum = if last { ends.finish(block, *sum) } else { *sum };
                sum.store(c_at(row, block));
            }
        }
    }
}

/// Terms of a run between two jumps: the end of a run of sixteen would otherwise be guessed wrong.
pub(super) const UNROLLED: usize = 4;

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
