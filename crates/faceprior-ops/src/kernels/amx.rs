//! Products on the matrix unit of recent Intel processors (AMX), which multiplies bfloat16 and sums float32.
//!
//! The 24 bits of a float are those of three bfloat16, `x = h + m + l`, each the upper half of what those before it
//! leave; splitting is exact. A product of floats is then nine products of parts, of which the six largest are summed,
//! each exact in float32: `h·h`, `h·m`, `m·h`, `h·l`, `m·m` and `l·h` (Henry, Tang and Heinecke 2019, "Leveraging the
//! bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations"). The other three are less than 2⁻²¹ of
//! the product, and of its sign; over many terms the result is closer to float64's than a chain of fused multiply-adds
//! (see the tests). So much is float32 arithmetic; what differs is at its ends: parts below 2⁻¹²⁶ count as zero, and an
//! infinity becomes NaN, for its parts are ∞, ∞ − ∞ and so on.
//!
//! Where maps are rounded to bfloat16 anyway, two parts will do, each the nearest to what is left: `h + m` is within 2⁻¹⁷ of
//! the float, and the sum of `m·h`, `h·m` and `h·h` within 2⁻¹⁵ of the product.
//!
//! Operands are packed a step of 32 terms at a time: rows of A as cells, the parts of a row side by side; B as tiles of
//! 1 KiB, the parts of 32 columns one after another.

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::lanes::{Avx512, Lanes, Parts};
use super::tile::{Row, Runs, Strides};
use crate::pool::Buffer;

/// Whether the processor has the unit and the system lets this process use it.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const TILES: u32 = 1 << 24;
        const BFLOAT16: u32 = 1 << 22;
        let leaves = __cpuid(0).eax;
        let features = if leaves < 7 { 0 } else { __cpuid_count(7, 0).edx };
        is_x86_feature_detected!("avx512f")
            && features & (TILES | BFLOAT16) == TILES | BFLOAT16
            && permitted()
    })
}

/// Asks the system for the unit's registers, for all threads of the process. How to ask others than Linux is not known
/// here.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call takes numbers, and changes nothing but what the system saves with a thread.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Rows and columns of a tile of sums; rows of a tile of A, and columns of one of B.
const SIDE: usize = 16;
/// Terms of a step: a row of a tile has two numbers for each of its sixteen words.
const STEP: usize = 32;
/// Rows and columns of the sums of one call of [`add_steps`], two tiles by two.
pub(super) const SQUARE: usize = 2 * SIDE;
/// Bytes of a row of a tile.
const LINE: usize = 64;
/// Bytes of a tile.
const TILE: usize = SIDE * LINE;

/// Floats that the parts of a step take for one row of A.
pub(super) const fn cell(parts: Parts) -> usize {
    parts.count() * LINE / size_of::<f32>()
}

/// Floats that the parts of a step take for a square, on either side.
pub(super) const fn square_tiles(parts: Parts) -> usize {
    SQUARE * cell(parts)
}

/// Steps that [`multiply`] packs at a time.
const STEPS: usize = 8;
/// Terms of these steps.
const INNER: usize = STEPS * STEP;

/// Whether a product is one for this unit: a weight gradient, whose rows are neighbours in memory by sixteens and evenly
/// spaced in C, in whole squares.
pub(super) fn suits(rows: &[Row], blocks: usize, runs: Runs, strides: Strides) -> bool {
    let (sixteens, others) = rows.as_chunks::<SIDE>();
    let neighbours = |rows: &[Row; SIDE]| (0..SIDE).all(|row| rows[row].a == rows[0].a + row);
    let even = || (2..rows.len()).all(|row| rows[row].c - rows[row - 1].c == rows[1].c - rows[0].c);
    let squares = others.is_empty() && sixteens.len().is_multiple_of(2) && blocks.is_multiple_of(2);
    squares
        && runs.length * runs.offsets.len() >= STEP
        && strides.c_block == SIDE
        && sixteens.iter().all(neighbours)
        && even()
}

/// C = A·B, or C += A·B.
///
/// Rows are packed 32 at a time, while the unit is still at work on the rows before.
///
/// # Safety
/// [`available`] and [`suits`]; addresses as for [`multiply`](super::tile::multiply).
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply(
    rows: &[Row],
    blocks: usize,
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    accumulate: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match strides.matrices {
            Some(Parts::Two) => multiply_parts::<2>(rows, blocks, runs, strides, a, b, c, accumulate),
            _ => multiply_parts::<3>(rows, blocks, runs, strides, a, b, c, accumulate),
        }
    }
}

/// [`multiply`] of factors in `PARTS` parts.
///
/// # Safety
/// As for [`multiply`].
#[target_feature(enable = "avx512f")]
unsafe fn multiply_parts<const PARTS: usize>(
    rows: &[Row],
    blocks: usize,
    runs: Runs,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    accumulate: bool,
) {
    let (squares, _) = rows.as_chunks::<SQUARE>();
    let column_squares = blocks / 2;
    let distance = rows[1].c - rows[0].c;
    let total = runs.offsets.len() * runs.length;
    // Tiles of a square: two for rows of A, which take turns, and one for each square of columns of B.
    let (cell, square) = (
        PARTS * LINE / size_of::<f32>(),
        SQUARE * PARTS * LINE / size_of::<f32>(),
    );
    let packed = total.min(INNER).div_ceil(STEP) * square;
    let size = (2 + column_squares) * packed;
    let mut scratch = Buffer::take(size);
    let left = scratch.as_mut_ptr();
    let right = left.wrapping_add(2 * packed);
    let mut terms = Terms::new(runs, strides);
    // SAFETY: the caller's promise; scratch is sized for the steps of all squares.
    unsafe {
        let _unit = Unit::new();
        for first in (0..total).step_by(INNER) {
            terms.take(INNER.min(total - first));
            let steps = &packed_steps::<PARTS>()[..terms.steps()];
            pack_columns::<PARTS>(blocks, strides.b_block, &terms, b, right.cast());
            pack_rows::<PARTS>(&squares[0], &terms, a, left.cast());
            for (index, rows) in squares.iter().enumerate() {
                let packed_rows = left.wrapping_add(index % 2 * packed);
                let tiles = [packed_rows, packed_rows.wrapping_add(SIDE * cell)];
                let tiles = tiles.map(|tile| tile.cast_const().cast());
                for column in 0..column_squares {
                    let b = right.wrapping_add(column * steps.len() * square);
                    let b = b.cast_const().cast();
                    // What comes next is in the cache.
                    let next = Next { from: b, lines: 1 };
                    let to = c.wrapping_add(rows[0].c + column * SQUARE);
                    add_steps::<PARTS>(tiles, cell, steps, b, next, to, distance, accumulate || first > 0);
                    if let (0, Some(rows)) = (column, squares.get(index + 1)) {
                        let to = left.wrapping_add((index + 1) % 2 * packed);
                        pack_rows::<PARTS>(rows, &terms, a, to.cast());
                    }
                }
            }
        }
    }
}

/// Bytes from the start of packed rows of A to each step.
fn packed_steps<const PARTS: usize>() -> [usize; STEPS] {
    std::array::from_fn(|step| step * SQUARE * PARTS * LINE)
}

impl Unit {
    /// A square of sums, `[32][32]`, of 32 rows of cells times the tiles of a pair of blocks of columns, at all steps: from
    /// nothing, or from what it holds.
    ///
    /// # Safety
    /// From `row` on, 32 rows at distances of `stride` cells are valid at all `steps` (offsets in bytes).
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply_cells(
        &self,
        parts: Parts,
        row: *const f32,
        stride: usize,
        steps: &[usize],
        tiles: &[f32],
        next: Next,
        sums: &mut [f32; SQUARE * SQUARE],
        accumulate: bool,
    ) {
        let cell = cell(parts);
        assert_eq!(tiles.len(), steps.len() * square_tiles(parts));
        let add_steps = match parts {
            Parts::Two => add_steps::<2>,
            Parts::Three => add_steps::<3>,
        };
        let (rows, tiles, sums) = (
            [row, row.wrapping_add(SIDE * stride * cell)].map(|row| row.cast()),
            tiles.as_ptr().cast(),
            sums.as_mut_ptr(),
        );
        // SAFETY: the caller's promise, and the registers are set up.
        unsafe { add_steps(rows, stride * cell, steps, tiles, next, sums, SQUARE, accumulate) }
    }
}

/// Splits `count` times 32 floats into cells at distances of so many floats.
///
/// # Safety
/// [`available`]; both addresses are valid for so many.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn split_cells(
    parts: Parts,
    from: *const f32,
    count: usize,
    to: *mut f32,
    distance: usize,
) {
    for cell in 0..count {
        let from = from.wrapping_add(cell * STEP);
        let to = to.wrapping_add(cell * distance).cast();
        // SAFETY: the caller's promise.
        unsafe {
            let (first, second) = (load(from), load(from.wrapping_add(SIDE)));
            match parts {
                Parts::Two => store_parts(split::<2>(first, second), to, LINE),
                Parts::Three => store_parts(split::<3>(first, second), to, LINE),
            }
        }
    }
}

/// Makes tiles of B of a square of floats.
///
/// # Safety
/// [`available`]; `square` holds 32 rows of 32 columns, and `to` has room for a step.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn pack_square(parts: Parts, square: *const f32, to: *mut f32) {
    let to = to.cast::<u8>();
    for pair in 0..SIDE {
        for tile in 0..2 {
            let first = square.wrapping_add(pair * SQUARE + tile * SIDE);
            // SAFETY: the caller's promise.
            unsafe {
                let (first, second) = (load(first), load(first.wrapping_add(SIDE * SQUARE)));
                let to = to.wrapping_add(tile * TILE + pair * LINE);
                match parts {
                    Parts::Two => store_parts(split::<2>(first, second), to, PART),
                    Parts::Three => store_parts(split::<3>(first, second), to, PART),
                }
            }
        }
    }
}

/// Offsets into A and B of up to [`INNER`] terms, step by step; terms beyond the last are zeros.
struct Terms<'a> {
    runs: Runs<'a>,
    strides: Strides,
    /// The next term: its run, and its place in it.
    run: usize,
    place: usize,
    count: usize,
    a: [[usize; STEP]; INNER / STEP],
    b: [[usize; STEP]; INNER / STEP],
}

impl<'a> Terms<'a> {
    fn new(runs: Runs<'a>, strides: Strides) -> Self {
        Self {
            runs,
            strides,
            run: 0,
            place: 0,
            count: 0,
            a: [[0; STEP]; INNER / STEP],
            b: [[0; STEP]; INNER / STEP],
        }
    }

    /// Goes on to the next `count` terms.
    fn take(&mut self, count: usize) {
        self.count = count;
        let terms = self
            .a
            .as_flattened_mut()
            .iter_mut()
            .zip(self.b.as_flattened_mut());
        for (a, b) in terms.take(count) {
            let (a_run, b_run) = self.runs.offsets[self.run];
            *a = a_run + self.place * self.strides.a_inner;
            *b = b_run + self.place * self.strides.b_inner;
            self.place += 1;
            if self.place == self.runs.length {
                (self.run, self.place) = (self.run + 1, 0);
            }
        }
    }

    fn steps(&self) -> usize {
        self.count.div_ceil(STEP)
    }

    /// How many terms of a step are not beyond the last.
    fn of_step(&self, step: usize) -> usize {
        STEP.min(self.count - step * STEP)
    }
}

/// Bytes between the parts of a tile of B.
const PART: usize = 2 * TILE;

/// Columns of B: rows of its tiles are pairs of terms, for sixteen columns each.
///
/// # Safety
/// As for [`product`]; `tiles` has room for all steps of all columns.
#[target_feature(enable = "avx512f")]
unsafe fn pack_columns<const PARTS: usize>(
    blocks: usize,
    b_block: usize,
    terms: &Terms,
    b: *const f32,
    tiles: *mut u8,
) {
    let steps = terms.steps();
    for (step, offsets) in terms.b.iter().enumerate().take(steps) {
        let count = terms.of_step(step);
        for pair in 0..SIDE {
            let (first, second) = (
                b.wrapping_add(offsets[pair]),
                b.wrapping_add(offsets[SIDE + pair]),
            );
            let (has_first, has_second) = (pair < count, SIDE + pair < count);
            for block in 0..blocks {
                let from = block * b_block;
                let to = (block / 2 * steps + step) * PARTS * PART + block % 2 * TILE + pair * LINE;
                // SAFETY: the caller's promise.
                unsafe {
                    let first = load_if(has_first, first.wrapping_add(from));
                    let second = load_if(has_second, second.wrapping_add(from));
                    store_parts(split::<PARTS>(first, second), tiles.wrapping_add(to), PART);
                }
            }
        }
    }
}

/// A square of rows of A, neighbours in memory sixteen by sixteen.
///
/// # Safety
/// As for [`product`]; `to` has room for all steps.
#[target_feature(enable = "avx512f")]
unsafe fn pack_rows<const PARTS: usize>(rows: &[Row; SQUARE], terms: &Terms, a: *const f32, to: *mut u8) {
    let steps = terms.steps();
    for (step, offsets) in terms.a.iter().enumerate().take(steps) {
        let count = terms.of_step(step);
        for (group, rows) in rows.chunks(SIDE).enumerate() {
            let a = a.wrapping_add(rows[0].a);
            let to = to.wrapping_add((2 * step + group) * SIDE * PARTS * LINE);
            // SAFETY: the caller's promise.
            unsafe {
                let mut squares = [[Avx512::zero(); SIDE]; PARTS];
                for pair in 0..SIDE {
                    let first = load_if(pair < count, a.wrapping_add(offsets[pair]));
                    let second = load_if(SIDE + pair < count, a.wrapping_add(offsets[SIDE + pair]));
                    for (square, words) in squares.iter_mut().zip(split::<PARTS>(first, second)) {
                        square[pair] = Avx512(_mm512_castsi512_ps(words));
                    }
                }
                for (part, square) in squares.into_iter().enumerate() {
                    let to = to.wrapping_add(part * LINE).cast::<f32>();
                    for (row, words) in Avx512::transpose(square).into_iter().enumerate() {
                        words.store(to.wrapping_add(row * PARTS * LINE / size_of::<f32>()));
                    }
                }
            }
        }
    }
}

/// The parts `h`, `m` and, where there are three, `l` of two times sixteen floats, side by side in words: `low` in the
/// lower halves.
#[inline]
#[target_feature(enable = "avx512f")]
fn split<const PARTS: usize>(mut low: __m512, mut high: __m512) -> [__m512i; PARTS] {
    /// `a | (b & c)`, for [`_mm512_ternarylogic_epi32`].
    const OR_OF_AND: i32 = 0xf8;
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    let mut parts = [_mm512_setzero_si512(); PARTS];
    for words in &mut parts {
        let (low_bits, high_bits) = if PARTS == 3 {
            (_mm512_castps_si512(low), _mm512_castps_si512(high))
        } else {
            (add_half(low), add_half(high))
        };
        *words = _mm512_ternarylogic_epi32::<OR_OF_AND>(_mm512_srli_epi32::<16>(low_bits), high_bits, upper);
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(low_bits, upper)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(high_bits, upper)));
    }
    parts
}

/// Floats whose upper halves are the nearest bfloat16; what is not a number stays as it is.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_half(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let numbers = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(x, x);
    _mm512_mask_add_epi32(bits, numbers, bits, _mm512_set1_epi32(0x8000))
}

/// # Safety
/// The address is valid for sixteen floats.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const f32) -> __m512 {
    // SAFETY: the caller's promise. Masked: see the lanes.
    unsafe { _mm512_maskz_loadu_ps(!0, from) }
}

/// Zeros where there is nothing to load.
///
/// # Safety
/// The address is valid for sixteen floats, if they are to be loaded.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_if(there: bool, from: *const f32) -> __m512 {
    // SAFETY: the caller's promise; nothing masked is read.
    unsafe { _mm512_maskz_loadu_ps(if there { !0 } else { 0 }, from) }
}

/// # Safety
/// The address is valid for as many lines at distances of `part` bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_parts<const PARTS: usize>(parts: [__m512i; PARTS], to: *mut u8, part: usize) {
    for (index, words) in parts.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm512_mask_storeu_epi32(to.wrapping_add(index * part).cast(), !0, words) }
    }
}

/// Eight tiles of sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration([u8; 64]);

static CONFIGURATION: Configuration = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Configuration(bytes)
};

/// The unit's registers, set up for a thread until dropped. Compiled code uses them nowhere else.
pub(super) struct Unit {
    /// Of this thread.
    _registers: PhantomData<*const ()>,
}

impl Unit {
    /// # Safety
    /// [`available`], and the thread has no other.
    pub(super) unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, preserves_flags, readonly));
        }
        Self {
            _registers: PhantomData,
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: whoever made it knew of the unit.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
    }
}

/// What is asked for ahead of time: with each step so many cache lines, one after the other.
#[derive(Clone, Copy)]
pub(super) struct Next {
    from: *const u8,
    lines: usize,
}

impl Next {
    /// Tiles for so many steps, asked for by so many calls, of which this is `call`.
    pub(super) fn tiles(parts: Parts, tiles: *const f32, steps: usize, [call, calls]: [usize; 2]) -> Self {
        let lines = (square_tiles(parts) * size_of::<f32>() / LINE).div_ceil(calls);
        Self {
            from: tiles.cast::<u8>().wrapping_add(call * steps * lines * LINE),
            lines,
        }
    }
}

/// A square of sums, plus or from nothing, the products of some steps of 32 rows and 32 columns.
///
/// # Safety
/// Within a [`Unit`]'s life. At each of the offsets `steps`, in bytes, from both of `a` on there are sixteen rows of a cell at
/// distances of `a_row` floats; `b` is valid for the steps, `sums` for 32 rows at distances of `row` floats. What is asked
/// for need not be valid, but there is some.
unsafe fn add_steps<const PARTS: usize>(
    [upper_a, lower_a]: [*const u8; 2],
    a_row: usize,
    steps: &[usize],
    b: *const u8,
    next: Next,
    sums: *mut f32,
    row: usize,
    accumulate: bool,
) {
    macro_rules! steps {
        ($($products:literal)*) => {
            asm!(
                "test {upper:e}, {upper:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "mov {lower}, {row}",
                "shl {lower}, 4",
                "add {lower}, {sums}",
                "tileloadd tmm0, [{sums} + {row}]",
                "tileloadd tmm1, [{lower} + {row}]",
                "tileloadd tmm2, [{sums} + {row} + 64]",
                "tileloadd tmm3, [{lower} + {row} + 64]",
                "3:",
                "mov {lower}, [{steps}]",
                "add {steps}, 8",
                "lea {upper}, [{upper_a} + {lower}]",
                "add {lower}, {lower_a}",
                $($products,)*
                "dec {count}",
                "jnz 3b",
                "mov {lower}, {row}",
                "shl {lower}, 4",
                "add {lower}, {sums}",
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{lower} + {row}], tmm1",
                "tilestored [{sums} + {row} + 64], tmm2",
                "tilestored [{lower} + {row} + 64], tmm3",
                upper_a = in(reg) upper_a,
                lower_a = in(reg) lower_a,
                a_row = in(reg) a_row * size_of::<f32>(),
                steps = inout(reg) steps.as_ptr() => _,
                count = inout(reg) steps.len() => _,
                b = inout(reg) b => _,
                next = inout(reg) next.from => _,
                lines = in(reg) next.lines,
                sums = in(reg) sums,
                row = in(reg) row * size_of::<f32>(),
                line = in(reg) LINE,
                upper = inout(reg) usize::from(accumulate) => _,
                lower = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }
    // SAFETY: the caller's promise. Each pair of parts shares one with the pair before.
    unsafe {
        if PARTS == 3 {
            steps! {
                // h of A, l of B
                "tileloadd tmm4, [{upper} + {a_row}]"
                "tileloadd tmm6, [{b} + {line} + 4096]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm5, [{lower} + {a_row}]"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tileloadd tmm7, [{b} + {line} + 5120]"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tdpbf16ps tmm3, tmm5, tmm7"
                // h, m
                "tileloadd tmm6, [{b} + {line} + 2048]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tileloadd tmm7, [{b} + {line} + 3072]"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tdpbf16ps tmm3, tmm5, tmm7"
                // m, m
                "tileloadd tmm4, [{upper} + {a_row} + 64]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{lower} + {a_row} + 64]"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
                // m, h
                "tileloadd tmm6, [{b} + {line}]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tileloadd tmm7, [{b} + {line} + 1024]"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tdpbf16ps tmm3, tmm5, tmm7"
                // l, h
                "tileloadd tmm4, [{upper} + {a_row} + 128]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{lower} + {a_row} + 128]"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
                // h, h
                "tileloadd tmm4, [{upper} + {a_row}]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{lower} + {a_row}]"
                "mov {upper}, {lines}"
                "4:"
                "prefetcht1 [{next}]"
                "add {next}, 64"
                "dec {upper}"
                "jnz 4b"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
                "add {b}, 6144"
            }
        } else {
            steps! {
                // m of A, h of B
                "tileloadd tmm4, [{upper} + {a_row} + 64]"
                "tileloadd tmm6, [{b} + {line}]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm5, [{lower} + {a_row} + 64]"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tileloadd tmm7, [{b} + {line} + 1024]"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tdpbf16ps tmm3, tmm5, tmm7"
                // h, h
                "tileloadd tmm4, [{upper} + {a_row}]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{lower} + {a_row}]"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
                "mov {upper}, {lines}"
                "4:"
                "prefetcht1 [{next}]"
                "add {next}, 64"
                "dec {upper}"
                "jnz 4b"
                // h, m
                "tileloadd tmm6, [{b} + {line} + 2048]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tileloadd tmm7, [{b} + {line} + 3072]"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tdpbf16ps tmm3, tmm5, tmm7"
                "add {b}, 4096"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{normal, relative_rms};

    const ROWS: usize = 64;
    const TERMS: usize = 300;
    const COLUMNS: usize = 4 * SIDE;

    /// AᵀB of `[TERMS, ROWS]` and `[TERMS, COLUMNS]`.
    fn product(parts: Parts, a: &[f32], b: &[f32]) -> Vec<f32> {
        let rows = Row::spaced(ROWS, 1, COLUMNS);
        let runs = Runs {
            offsets: &[(0, 0)],
            length: TERMS,
        };
        let strides = Strides {
            a_inner: ROWS,
            b_inner: COLUMNS,
            b_block: SIDE,
            c_block: SIDE,
            matrices: Some(parts),
            b_next: None,
        };
        let blocks = COLUMNS / SIDE;
        assert!(suits(&rows, blocks, runs, strides));
        let mut c = vec![f32::NAN; ROWS * COLUMNS];
        let (from, to) = ((a.as_ptr(), b.as_ptr()), c.as_mut_ptr());
        // SAFETY: callers make sure of the unit; operands are of the sizes that rows and runs say.
        unsafe { multiply(&rows, blocks, runs, strides, from.0, from.1, to, false) };
        c
    }

    #[test]
    fn sums_of_three_parts_are_closer_to_float64_than_chains_of_float32() {
        if !available() {
            return;
        }
        let (a, b) = (normal(TERMS * ROWS, 1), normal(TERMS * COLUMNS, 2));
        let (mut exact, mut chains) = (Vec::new(), Vec::new());
        for row in 0..ROWS {
            for column in 0..COLUMNS {
                let (mut sum, mut chain) = (0.0, 0.0_f32);
                for term in 0..TERMS {
                    let (a, b) = (a[term * ROWS + row], b[term * COLUMNS + column]);
                    sum += f64::from(a) * f64::from(b);
                    chain = a.mul_add(b, chain);
                }
                exact.push(sum);
                chains.push(chain);
            }
        }
        let error = relative_rms(&product(Parts::Three, &a, &b), &exact);
        let of_chains = relative_rms(&chains, &exact);
        assert!(error < of_chains, "{error:.1e} and {of_chains:.1e}");
        let error = relative_rms(&product(Parts::Two, &a, &b), &exact);
        assert!(error < 5e-6, "{error:.1e} in two parts");
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        if !available() {
            return;
        }
        for value in [
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::from_bits(0x7f80_0001),
            f32::from_bits(0x7fff_ffff),
        ] {
            let (mut a, b) = (normal(TERMS * ROWS, 1), normal(TERMS * COLUMNS, 2));
            a[5 * ROWS + 1] = value;
            for parts in [Parts::Two, Parts::Three] {
                for (row, sums) in product(parts, &a, &b).chunks(COLUMNS).enumerate() {
                    assert!(sums.iter().all(|sum| sum.is_finite() == (row != 1)), "row {row}");
                }
            }
        }
    }

    #[test]
    fn parts_add_up_to_the_float() {
        if !is_x86_feature_detected!("avx512f") {
            return;
        }
        let values = normal(2 * SIDE, 3);
        // SAFETY: the processor has the instructions; sixteen floats each.
        let (low, high) = unsafe { (load(values.as_ptr()), load(values[SIDE..].as_ptr())) };
        let floats = |words: __m512i, index: usize| {
            // SAFETY: both are 64 bytes, and any of them are words.
            let words = unsafe { std::mem::transmute::<__m512i, [u32; SIDE]>(words) };
            let word = words[index % SIDE];
            f32::from_bits(if index < SIDE {
                word << 16
            } else {
                word & 0xffff_0000
            })
        };
        // SAFETY: the processor has the instructions.
        let (two, three) = unsafe { (split::<2>(low, high), split::<3>(low, high)) };
        for (index, value) in values.iter().enumerate() {
            let [h, m, l] = three.map(|words| floats(words, index));
            assert_eq!(h + (m + l), *value);
            let [h, m] = two.map(|words| floats(words, index));
            assert!((h + m - value).abs() <= value.abs() / 131_072.0, "{value}");
        }
    }
}
