//! Convolutions on the matrix unit, as an implicit product.
//!
//! The source is split into the unit's numbers, once for several products or by each task for what it needs. A cell
//! holds 32 channels of a pixel, part by part; a tile of the left operand is sixteen cells, wherever a tap finds them.
//! So that neighbouring outputs are always equally far apart, across rows too, outputs are counted in a grid as wide as
//! the source's; what falls between rows is left out when the sums are written.

use std::ops::Range;

use super::amx::{self, SQUARE};
use super::direct::Outputs;
use super::lanes::{Isa, Kernel, Lanes, Parts};
use super::load::{Load, Read, with_read};
use super::weights::{Columns, WeightShape, WeightTile};
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// The parts of floats where a convolution should be computed here. Each pixel of the source takes part in `taps` products
/// with each of the columns, spread over `stride`·`stride` pixels: with few of them, as in every 1×1 convolution, splitting
/// it costs more than the unit saves. With few channels half of each cell would be empty.
pub(super) fn parts(isa: Isa, [inner, columns]: [usize; 2], taps: usize, stride: usize) -> Option<Parts> {
    let worthwhile = taps > 1 && taps * columns >= MIN_PRODUCTS * stride * stride;
    isa.matrices()
        .filter(|_| inner > BLOCK && columns > BLOCK && worthwhile)
}

/// Products of a pixel of the source that pay for its being split.
const MIN_PRODUCTS: usize = 144;

/// Where the cells of a source lie: `[picture][pair of blocks][row modulo stride][row][column]`.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    parts: Parts,
    pictures: usize,
    blocks: usize,
    size: [usize; 2],
    before: [usize; 2],
    after: [usize; 2],
    stride: usize,
    /// Rows of each phase.
    rows: usize,
    columns: usize,
}

impl Grid {
    /// A grid for maps of `size` within borders, of whose rows and columns every `stride`-th belongs to an output.
    pub(super) fn new(
        parts: Parts,
        [pictures, blocks]: [usize; 2],
        size: [usize; 2],
        before: [usize; 2],
        after: [usize; 2],
        stride: usize,
    ) -> Self {
        // With stride 1 the columns after a row are those before the next.
        let borders = if stride == 1 {
            before[1].max(after[1])
        } else {
            before[1] + after[1]
        };
        Self {
            parts,
            pictures,
            blocks,
            size,
            before,
            after,
            stride,
            rows: (before[0] + size[0] + after[0]).div_ceil(stride),
            columns: (size[1] + borders).next_multiple_of(stride),
        }
    }

    /// Cells before a row and column of the source, borders included, in its plane.
    fn offset(self, row: usize, column: usize) -> usize {
        (row % self.stride * self.rows + row / self.stride) * self.columns + column
    }

    /// Cells of a plane: after the last row, zeros for what comes after its columns.
    fn plane(self) -> usize {
        self.stride * self.rows * self.columns + self.after[1]
    }

    fn pairs(self) -> usize {
        self.blocks.div_ceil(2)
    }

    /// Rows of a plane, borders included.
    fn all_rows(self) -> Range<usize> {
        0..self.before[0] + self.size[0] + self.after[0]
    }

    /// Floats of a cell.
    fn cell(self) -> usize {
        amx::cell(self.parts)
    }

    /// Floats of the cells of some pictures: the last square of a plane reaches beyond it.
    fn floats(self, pictures: usize) -> usize {
        (pictures * self.pairs() * self.plane() + SQUARE * self.stride) * self.cell()
    }

    /// Splits maps `[N, blocks, H, W, 16]` into cells.
    pub(super) fn split(self, isa: Isa, x: &[f32]) -> Buffer {
        let mut split = Buffer::take(self.floats(self.pictures));
        let to = Shared::new(&mut split);
        let maps = Maps { x, load: None };
        parallel(self.pictures * self.pairs(), |plane| {
            isa.run(SplitRows {
                grid: self,
                maps,
                plane,
                rows: self.all_rows(),
                to: to.at(plane * self.plane() * self.cell()),
            });
        });
        split
    }
}

/// Maps `[N, blocks, H, W, 16]`, and how they are read.
#[derive(Clone, Copy)]
pub(super) struct Maps<'a> {
    pub(super) x: &'a [f32],
    pub(super) load: Option<Load<'a>>,
}

/// Rows of the cells of a pair of blocks of a picture, borders included.
struct SplitRows<'a> {
    grid: Grid,
    maps: Maps<'a>,
    plane: usize,
    rows: Range<usize>,
    /// A plane of the grid, of which nobody else writes these rows.
    to: *mut f32,
}

impl SplitRows<'_> {
    /// Reads a row of a block into every second sixteen floats.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; `to` has room.
    #[inline(always)]
    unsafe fn read<L: Lanes>(&self, block: usize, y: usize, values: impl Read<L>, to: *mut f32) {
        let [h, w] = self.grid.size;
        let from = self.maps.x.as_ptr().wrapping_add((block * h + y) * w * BLOCK);
        for x in 0..w {
            // SAFETY: the caller's promise; the row is inside the map.
            unsafe {
                let value = values.read(from.wrapping_add(x * BLOCK));
                value.store(to.wrapping_add(x * SQUARE));
            }
        }
    }
}

impl Kernel for SplitRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let grid = self.grid;
        let (picture, pair) = (self.plane / grid.pairs(), self.plane % grid.pairs());
        let blocks = 2 * pair..grid.blocks.min(2 * pair + 2);
        let mut cells = Buffer::zeroed(grid.columns.max(grid.after[1]) * SQUARE);
        for row in self.rows.clone() {
            let y = row.wrapping_sub(grid.before[0]);
            // SAFETY: the caller promises the instructions and a unit; the row is one of the plane's.
            unsafe {
                if y < grid.size[0] {
                    for block in blocks.clone() {
                        let to = grid.before[1] * SQUARE + block % 2 * BLOCK;
                        let (to, block) =
                            (cells.as_mut_ptr().wrapping_add(to), picture * grid.blocks + block);
                        with_read!(self.maps.load, block, |values: L| {
                            self.read::<L>(block, y, values, to)
                        });
                    }
                } else {
                    cells.fill(0.0);
                }
                let to = self.to.wrapping_add(grid.offset(row, 0) * grid.cell());
                amx::split_cells(grid.parts, cells.as_ptr(), grid.columns, to, grid.cell());
            }
        }
        if self.rows.end == grid.all_rows().end {
            cells.fill(0.0);
            let end = grid.plane() - grid.after[1];
            // SAFETY: as above.
            unsafe {
                let to = self.to.wrapping_add(end * grid.cell());
                amx::split_cells(grid.parts, cells.as_ptr(), grid.after[1], to, grid.cell());
            }
        }
    }
}

/// Packs some taps of a weight as the unit's tiles, `[pair of column blocks][pair of inner blocks][tap]`.
pub(super) fn pack(
    isa: Isa,
    parts: Parts,
    weight: &[f32],
    shape: WeightShape,
    side: Columns,
    taps: &[usize],
) -> Buffer {
    let (columns, inner) = side.sides(shape);
    let (pairs, inner_pairs) = (columns.div_ceil(SQUARE), inner.div_ceil(SQUARE));
    let square = taps.len() * amx::square_tiles(parts);
    let mut tiles = Buffer::take(pairs * inner_pairs * square);
    let to = Shared::new(&mut tiles);
    parallel(pairs * inner_pairs, |task| {
        isa.run(PackSquare {
            parts,
            weight,
            shape,
            side,
            taps,
            pair: task / inner_pairs,
            inner_pair: task % inner_pairs,
            to: to.at(task * square),
        });
    });
    tiles
}

/// Two blocks of columns of two of the inner side.
struct PackSquare<'a> {
    parts: Parts,
    weight: &'a [f32],
    shape: WeightShape,
    side: Columns,
    taps: &'a [usize],
    pair: usize,
    inner_pair: usize,
    /// Tiles of a square for each tap, which nobody else writes.
    to: *mut f32,
}

impl Kernel for PackSquare<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (columns, inner) = self.side.sides(self.shape);
        let mut squares = Buffer::take(self.taps.len() * SQUARE * SQUARE);
        if (self.pair + 1) * SQUARE > columns || (self.inner_pair + 1) * SQUARE > inner {
            squares.fill(0.0);
        }
        let mut tile = WeightTile::new(self.shape);
        for inner_block in 0..(inner.div_ceil(BLOCK) - 2 * self.inner_pair).min(2) {
            for block in 0..(columns.div_ceil(BLOCK) - 2 * self.pair).min(2) {
                let (column, row) = (2 * self.pair + block, 2 * self.inner_pair + inner_block);
                // SAFETY: the caller promises the instructions; squares have room for the blocks.
                unsafe {
                    self.side.read::<L>(&mut tile, self.weight, column, row);
                    for (place, tap) in self.taps.iter().enumerate() {
                        for lane in 0..BLOCK {
                            let row = (place * SQUARE + inner_block * BLOCK + lane) * SQUARE;
                            let to = squares.as_mut_ptr().wrapping_add(row + block * BLOCK);
                            L::load(self.side.row(&mut tile, lane, *tap)).store(to);
                        }
                    }
                }
            }
        }
        for place in 0..self.taps.len() {
            let square = squares.as_ptr().wrapping_add(place * SQUARE * SQUARE);
            // SAFETY: the caller promises the instructions and a unit; this task alone writes these tiles.
            unsafe {
                let to = self.to.wrapping_add(place * amx::square_tiles(self.parts));
                amx::pack_square(self.parts, square, to);
            }
        }
    }
}

/// Where a product takes its cells from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// What [`Grid::split`] made, for several products.
    Cells(&'a [f32]),
    /// Maps, of which each task splits what it needs: it does not leave the second-level cache.
    Maps(Maps<'a>),
}

/// For each output pixel, the sum over taps and source channels.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) grid: Grid,
    pub(super) source: Source<'a>,
    /// Row and column of the source that each tap takes for the output at the first row and column.
    pub(super) taps: &'a [(usize, usize)],
    /// What [`pack`] made.
    pub(super) weight: &'a [f32],
    /// Blocks of output channels.
    pub(super) blocks: usize,
    pub(super) outputs: Outputs,
}

/// Squares of outputs of a task, at most.
const TASK_SQUARES: usize = 16;
/// Floats of cells that are multiplied before the next, at most, and of tiles for a pair of blocks of columns: all cells,
/// these tiles and the next stay in the second-level cache.
const PART_CELLS: usize = 192 << 10;
const PART_TILES: usize = 96 << 10;

impl Product<'_> {
    pub(super) fn run(self, isa: Isa) {
        let grid = self.grid;
        assert!(self.outputs.pixels <= self.pitch(), "outputs that would overlap");
        let (of_picture, pairs) = (self.picture_squares(), self.blocks.div_ceil(2));
        let threads = rayon::current_num_threads();
        // Tasks have whole pictures, or equal parts of one.
        let divisions = of_picture.div_ceil(TASK_SQUARES);
        let task_pictures = (TASK_SQUARES / of_picture)
            .min(grid.pictures.div_ceil(2 * threads))
            .max(1);
        let task_squares = of_picture.div_ceil(divisions);
        let row_tasks = grid.pictures.div_ceil(task_pictures) * divisions;
        // With few rows, tasks share them: each reads a part of the weight, which is the larger part then.
        let task_pairs = pairs.div_ceil(threads.div_ceil(row_tasks));
        let pair_tasks = pairs.div_ceil(task_pairs);

        // Blocks of the source by pairs, some at a time.
        let cells = task_pictures * grid.plane() * grid.cell();
        let tiles = self.taps.len() * amx::square_tiles(grid.parts);
        let part = (PART_CELLS / cells)
            .min(PART_TILES / tiles)
            .clamp(1, grid.pairs());
        let part = grid.pairs().div_ceil(grid.pairs().div_ceil(part));
        let taps = self.taps.iter().map(|(row, column)| grid.offset(*row, *column));
        let taps: Vec<_> = taps.collect();
        let steps: Vec<_> = (0..part)
            .flat_map(|pair| taps.iter().map(move |tap| pair * grid.plane() + tap))
            .map(|cell| cell * grid.cell() * size_of::<f32>())
            .collect();
        parallel(row_tasks * pair_tasks, |task| {
            let (task, pair) = (task / pair_tasks, task % pair_tasks * task_pairs);
            let (group, division) = (task / divisions, task % divisions);
            let first = group * task_pictures;
            isa.run(Task {
                product: self,
                steps: &steps,
                part,
                pictures: first..grid.pictures.min(first + task_pictures),
                squares: division * task_squares..of_picture.min((division + 1) * task_squares),
                pairs: pair..pairs.min(pair + task_pairs),
            });
        });
    }

    /// Squares of 32 outputs of a picture.
    fn picture_squares(&self) -> usize {
        ((self.outputs.rows - 1) * self.pitch() + self.outputs.pixels).div_ceil(SQUARE)
    }

    /// Outputs between rows, those that are left out included.
    fn pitch(&self) -> usize {
        self.grid.columns / self.grid.stride
    }
}

/// Some squares of outputs of each of some pictures, and some pairs of blocks of columns.
struct Task<'a> {
    product: Product<'a>,
    /// Offsets of the steps of a part in bytes.
    steps: &'a [usize],
    /// Pairs of blocks of the source of a part.
    part: usize,
    pictures: Range<usize>,
    squares: Range<usize>,
    pairs: Range<usize>,
}

impl Task<'_> {
    /// The rows of a plane, borders included, that the squares need.
    fn rows(&self) -> Range<usize> {
        let Product { grid, outputs, .. } = self.product;
        let pitch = self.product.pitch();
        let top = self.squares.start * SQUARE / pitch;
        let bottom = (self.squares.end * SQUARE - 1) / pitch;
        let reach = self
            .product
            .taps
            .iter()
            .map(|(row, _)| row + 1)
            .max()
            .unwrap_or(0);
        top * grid.stride..bottom.min(outputs.rows - 1) * grid.stride + reach
    }

    /// Writes sixteen columns of a square, those outputs that are in the picture, which nobody else writes.
    ///
    /// # Safety
    /// Instructions of `L`; `from` is a square's, and the plane at `to` is a picture's.
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, from: *const f32, square: usize, to: *mut f32) {
        let (outputs, pitch) = (self.product.outputs, self.product.pitch());
        let first = square * SQUARE;
        let (mut row, mut pixel) = (first / pitch, first % pitch);
        for output in 0..SQUARE {
            if pixel < outputs.pixels && row < outputs.rows {
                // SAFETY: the caller's promise.
                unsafe {
                    let sums = L::load(from.wrapping_add(output * SQUARE));
                    sums.store(to.wrapping_add(row * outputs.row + pixel * outputs.pixel));
                }
            }
            pixel += 1;
            if pixel == pitch {
                (row, pixel) = (row + 1, 0);
            }
        }
    }
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Product {
            grid,
            source,
            weight,
            blocks,
            outputs,
            taps,
        } = self.product;
        let (in_pairs, plane, cell) = (grid.pairs(), grid.plane(), grid.cell());
        let tiles = taps.len() * amx::square_tiles(grid.parts);
        let rows = self.rows();
        // Rows lie where those of the first squares would.
        let before = rows.start / grid.stride * grid.columns;
        let mut split = match source {
            Source::Cells(_) => Buffer::take(0),
            Source::Maps(_) => {
                Buffer::take((self.pictures.len() * self.part * plane + SQUARE * grid.stride) * cell)
            }
        };
        let calls = self.pictures.len() * self.squares.len();
        // Where there is one part alone, sums are written one by one.
        let kept = if self.part < in_pairs {
            calls * self.pairs.len()
        } else {
            1
        };
        let mut sums = Buffer::take(kept * SQUARE * SQUARE);
        let (sums, _) = sums.as_chunks_mut::<{ SQUARE * SQUARE }>();
        for first in (0..in_pairs).step_by(self.part) {
            let part = first..in_pairs.min(first + self.part);
            let (cells, of_picture) = match source {
                Source::Cells(cells) => {
                    let first = (self.pictures.start * in_pairs + first) * plane;
                    (cells.as_ptr().wrapping_add(first * cell), in_pairs * plane)
                }
                Source::Maps(maps) => {
                    let to = split.as_mut_ptr().wrapping_sub(before * cell);
                    for (index, picture) in self.pictures.clone().enumerate() {
                        for (place, pair) in part.clone().enumerate() {
                            let to = to.wrapping_add((index * part.len() + place) * plane * cell);
                            // SAFETY: the caller promises the instructions; there is a unit, or nobody would have packed
                            // the weight; the buffer has room for the rows of so many planes.
                            unsafe {
                                L::call(SplitRows {
                                    grid,
                                    maps,
                                    plane: picture * in_pairs + pair,
                                    rows: rows.clone(),
                                    to,
                                });
                            }
                        }
                    }
                    (to.cast_const(), part.len() * plane)
                }
            };
            let steps = &self.steps[..part.len() * taps.len()];
            // SAFETY: as above; nothing else here uses it.
            let unit = unsafe { amx::Unit::new() };
            for (place, pair) in self.pairs.clone().enumerate() {
                let weight_at = |pair: usize| (pair * in_pairs + first) * tiles;
                let pair_weight = &weight[weight_at(pair)..][..part.len() * tiles];
                let next = weight.as_ptr().wrapping_add(weight_at(pair + 1));
                for call in 0..calls {
                    let (index, square) = (call / self.squares.len(), call % self.squares.len());
                    let square = self.squares.start + square;
                    let row = cells.wrapping_add((index * of_picture + square * SQUARE * grid.stride) * cell);
                    let next = amx::Next::tiles(grid.parts, next, steps.len(), [call, calls]);
                    let sums = &mut sums[(place * calls + call) % kept];
                    // SAFETY: every tap of every output lies inside the cells; the caller promises the instructions,
                    // and the square and the planes are some of the product's.
                    unsafe {
                        let more = first > 0;
                        unit.multiply_cells(
                            grid.parts,
                            row,
                            grid.stride,
                            steps,
                            pair_weight,
                            next,
                            sums,
                            more,
                        );
                        if part.end < in_pairs {
                            continue;
                        }
                        for block in 2 * pair..blocks.min(2 * pair + 2) {
                            let plane = (self.pictures.start + index) * blocks + block;
                            let to = outputs.y.at(plane * outputs.plane + outputs.first);
                            self.write::<L>(sums.as_ptr().wrapping_add(block % 2 * BLOCK), square, to);
                        }
                    }
                }
            }
        }
    }
}
