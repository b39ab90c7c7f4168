//! The convolution on the matrix unit.
//!
//! A tile's point is a row of cells, one for each pair of input blocks, and the weight's are the unit's tiles. There are
//! four times as many weights as in the direct form, and a quarter of its products.

use std::ops::Range;

use super::super::lanes::{Isa, Kernel, Lanes, Parts};
use super::super::weights::WeightTile;
use super::super::{Shared, amx, parallel};
use super::convolve::Taps;
use super::form::{Form, Maps};
use super::grid::Grid;
use super::matrices::ThreeTaps;
use super::tiles::StrideOne;
use super::{BLOCK, EDGE, POINTS, Shape, TILE};
use crate::pool::Buffer;

use amx::SQUARE;

/// Channels on either side that pay for splitting them.
const MIN_CHANNELS: usize = 64;
/// Squares of tiles of a chunk, at most, where the weight has so many squares of channels that it does not stay in the
/// second-level cache: it streams past once for each chunk.
const CHUNK_SQUARES: usize = 4;
const LARGE_WEIGHT: usize = 16;

/// The parts of floats where a convolution should be computed here.
pub(super) fn parts(isa: Isa, shape: Shape) -> Option<Parts> {
    let squares = shape.tiles_of(TILE) / SQUARE;
    isa.matrices()
        .filter(|parts| shape.i.min(shape.o) >= MIN_CHANNELS && squares >= min_squares(*parts))
}

/// Squares of tiles that pay for splitting a weight's points.
const fn min_squares(parts: Parts) -> usize {
    match parts {
        Parts::Two => 2,
        Parts::Three => 4,
    }
}

/// `G g Gᵀ` as tiles, `[point][pair of output blocks][pair of input blocks]`.
pub(super) fn prepare(isa: Isa, parts: Parts, taps: Taps) -> Buffer {
    let square_tiles = amx::square_tiles(parts);
    let (outputs, inputs) = taps.columns.sides(taps.shape);
    let (pairs, steps) = (outputs.div_ceil(SQUARE), inputs.div_ceil(SQUARE));
    let mut tiles = Buffer::take(pairs * POINTS * steps * square_tiles);
    let to = Shared::new(&mut tiles);
    parallel(pairs * steps, |task| {
        let (pair, step) = (task / steps, task % steps);
        isa.run(WeightSquares {
            parts,
            taps,
            pair,
            step,
            to: to.at((pair * steps + step) * square_tiles),
            point: pairs * steps * square_tiles,
        });
    });
    tiles
}

/// Two blocks of outputs of two of inputs.
struct WeightSquares<'a> {
    parts: Parts,
    taps: Taps<'a>,
    pair: usize,
    step: usize,
    /// Tiles of a square for each point at distances of `point`, which nobody else writes.
    to: *mut f32,
    point: usize,
}

impl Kernel for WeightSquares<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let taps = self.taps;
        let (outputs, inputs) = taps.columns.sides(taps.shape);
        let mut squares = Buffer::take(POINTS * SQUARE * SQUARE);
        if (self.pair + 1) * SQUARE > outputs || (self.step + 1) * SQUARE > inputs {
            squares.fill(0.0);
        }
        let squares = squares.as_mut_ptr();
        let mut tile = WeightTile::new(taps.shape);
        for half in 0..(outputs.div_ceil(BLOCK) - 2 * self.pair).min(2) {
            for inner in 0..(inputs.div_ceil(BLOCK) - 2 * self.step).min(2) {
                let (block, in_block) = (2 * self.pair + half, 2 * self.step + inner);
                // SAFETY: the caller promises the instructions; the squares have room for the blocks.
                unsafe {
                    taps.columns.read::<L>(&mut tile, taps.weight, block, in_block);
                    for lane in 0..BLOCK {
                        let to = squares.wrapping_add((inner * BLOCK + lane) * SQUARE + half * BLOCK);
                        taps.transform::<L, ThreeTaps>(&mut tile, lane, EDGE, to, SQUARE * SQUARE);
                    }
                }
            }
        }
        for point in 0..POINTS {
            let square = squares.wrapping_add(point * SQUARE * SQUARE);
            // SAFETY: the caller promises the instructions and a unit; this task alone writes these tiles.
            unsafe { amx::pack_square(self.parts, square, self.to.wrapping_add(point * self.point)) };
        }
    }
}

/// The convolution of `x` with a prepared weight into `y`.
pub(super) fn convolve(isa: Isa, parts: Parts, shape: Shape, weight: &[f32], maps: Maps, y: &mut [f32]) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(maps.x.len(), shape.n * in_blocks * shape.plane());
    assert_eq!(y.len(), shape.n * out_blocks * shape.plane());
    // A row of the unit's is a tile at every point, so that smaller tiles at borders would save nothing.
    let form = StrideOne {
        grid: Grid::of_equal(shape, TILE),
    };
    let (tiles, pairs) = (form.grid.tiles(), out_blocks.div_ceil(2));
    let (threads, squares) = (rayon::current_num_threads(), tiles.div_ceil(SQUARE));
    let most = if in_blocks.div_ceil(2) * pairs < LARGE_WEIGHT {
        1
    } else {
        CHUNK_SQUARES
    };
    let chunks = match squares.div_ceil(most) {
        1 => 1,
        chunks => chunks.next_multiple_of(threads).min(squares),
    };
    let chunk_tiles = squares.div_ceil(chunks) * SQUARE;
    let chunks = tiles.div_ceil(chunk_tiles);
    // Too few chunks for all threads: tasks share a chunk, each for some of the output channels.
    let splits = (threads / chunks).clamp(1, pairs);
    let split_pairs = pairs.div_ceil(splits);
    let y = Shared::new(y);
    parallel(chunks * splits, |task| {
        let (chunk, first) = (task / splits, task % splits * split_pairs);
        isa.run(Chunk {
            parts,
            form,
            maps,
            weight,
            y,
            tiles: chunk * chunk_tiles..tiles.min((chunk + 1) * chunk_tiles),
            pairs: first.min(pairs)..pairs.min(first + split_pairs),
        });
    });
}

/// A square of tiles and some pairs of output blocks of a convolution: transform, products for each point, transform
/// back. The weight streams past, in the order in which it lies in memory.
struct Chunk<'a> {
    parts: Parts,
    form: StrideOne,
    maps: Maps<'a>,
    weight: &'a [f32],
    y: Shared,
    tiles: Range<usize>,
    pairs: Range<usize>,
}

impl Kernel for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            parts,
            form,
            maps,
            weight,
            y,
            tiles,
            pairs,
        } = self;
        let (cell_floats, square_tiles) = (amx::cell(parts), amx::square_tiles(parts));
        let grid = form.grid;
        let [in_blocks, out_blocks] = [grid.shape.i, grid.shape.o].map(|channels| channels.div_ceil(BLOCK));
        let (steps, all_pairs) = (in_blocks.div_ceil(2), out_blocks.div_ceil(2));
        // A cache line more per point, lest the streams of a transform meet in one cache set.
        let squares = tiles.len().div_ceil(SQUARE);
        let cells_point = squares * steps * SQUARE * cell_floats + BLOCK;
        let sums_point = squares * pairs.len() * SQUARE * SQUARE + BLOCK;
        let mut cells = Buffer::take(POINTS * cells_point);
        let mut sums = Buffer::take(POINTS * sums_point);
        let mut values = [0.0; POINTS * SQUARE];
        for (row, tile) in tiles.clone().enumerate() {
            let place = grid.place(tile);
            for step in 0..steps {
                for block in 2 * step..in_blocks.min(2 * step + 2) {
                    let plane = place.picture * in_blocks + block;
                    let to = values.as_mut_ptr().wrapping_add(block % 2 * BLOCK);
                    // SAFETY: the caller promises the instructions; the place is one of `x`.
                    unsafe { form.read_tile::<L>(maps, plane, place, to, SQUARE) };
                }
                if in_blocks < 2 * step + 2 {
                    for values in values.chunks_exact_mut(SQUARE) {
                        values[BLOCK..].fill(0.0);
                    }
                }
                let cell = (row / SQUARE * steps + step) * SQUARE + row % SQUARE;
                let to = cells.as_mut_ptr().wrapping_add(cell * cell_floats);
                // SAFETY: there is a unit, or nobody would have prepared the weight; the cells have room.
                unsafe { amx::split_cells(parts, values.as_ptr(), POINTS, to, cells_point) };
            }
        }
        let offsets: Vec<_> = (0..steps)
            .map(|step| step * SQUARE * cell_floats * size_of::<f32>())
            .collect();
        {
            // SAFETY: there is a unit, or nobody would have prepared the weight; nothing else here uses it.
            let unit = unsafe { amx::Unit::new() };
            for point in 0..POINTS {
                let cells = cells.as_ptr().wrapping_add(point * cells_point);
                let (sums, _) = sums[point * sums_point..].as_chunks_mut::<{ SQUARE * SQUARE }>();
                for (pair, sums) in pairs.clone().zip(sums.chunks_exact_mut(squares)) {
                    let tiles =
                        &weight[(point * all_pairs + pair) * steps * square_tiles..][..steps * square_tiles];
                    for (square, sums) in sums.iter_mut().enumerate() {
                        let row = cells.wrapping_add(square * steps * SQUARE * cell_floats);
                        let next =
                            amx::Next::tiles(parts, tiles.as_ptr_range().end, steps, [square, squares]);
                        // SAFETY: each of 32 rows has all steps.
                        unsafe { unit.multiply_cells(parts, row, 1, &offsets, tiles, next, sums, false) };
                    }
                }
            }
        }
        for (row, tile) in tiles.enumerate() {
            let place = grid.place(tile);
            for block in 2 * pairs.start..out_blocks.min(2 * pairs.end) {
                let square = (block / 2 - pairs.start) * squares + row / SQUARE;
                let at = (square * SQUARE + row % SQUARE) * SQUARE + block % 2 * BLOCK;
                let (from, plane) = (sums.as_ptr().wrapping_add(at), place.picture * out_blocks + block);
                // SAFETY: the caller promises the instructions; this task alone writes these outputs.
                unsafe { form.write_tile::<L>(from, sums_point, y, plane, place) };
            }
        }
        // SAFETY: the caller promises the instructions.
        unsafe { y.written::<L>() };
    }
}
