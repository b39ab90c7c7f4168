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

/// Squares of sums of a task, 4 KiB each: they stay in the second-level cache.
const TASK_SQUARES: usize = 64;
/// Squares of rows of a task, at most.
const TASK_ROWS: usize = 8;
/// Pairs of blocks of columns of a task, at most.
const TASK_PAIRS: usize = 8;

impl Product<'_> {
    pub(super) fn run(self, isa: Isa) {
        let grid = self.grid;
        let taps = self.taps.iter().map(|(row, column)| grid.offset(*row, *column));
        let taps: Vec<_> = taps.collect();
        let steps: Vec<_> = (0..grid.pairs())
            .flat_map(|pair| taps.iter().map(move |tap| pair * grid.plane() + tap))
            .map(|cell| cell * grid.cell() * size_of::<f32>())
            .collect();
        assert!(self.outputs.pixels <= self.pitch(), "outputs that would overlap");
        let squares = grid.pictures * self.picture_squares();
        let pairs = self.blocks.div_ceil(2);
        let threads = rayon::current_num_threads();
        let task_rows = (TASK_SQUARES / pairs.min(TASK_PAIRS)).min(TASK_ROWS);
        let row_tasks = squares.div_ceil(task_rows);
        // With few rows, tasks share them: each reads a part of the weight, which is the larger part then.
        let pair_tasks = pairs.div_ceil(TASK_PAIRS).max(threads.div_ceil(row_tasks));
        let task_pairs = pairs.div_ceil(pair_tasks);
        let pair_tasks = pairs.div_ceil(task_pairs);
        parallel(row_tasks * pair_tasks, |task| {
            let (first, pair) = (task / pair_tasks * task_rows, task % pair_tasks * task_pairs);
            let squares = first..squares.min(first + task_rows);
            self.multiply(isa, &steps, squares, pair..pairs.min(pair + task_pairs));
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

    /// Splits what the outputs of some squares need; the cells of the first picture, and how many are left out before.
    fn split(&self, isa: Isa, maps: Maps, squares: &Range<usize>) -> (Buffer, usize) {
        let (grid, of_picture) = (self.grid, self.picture_squares());
        let (first, last) = (squares.start / of_picture, (squares.end - 1) / of_picture);
        // Rows of a part of a picture lie where those of the first part would.
        let (rows, before) = if first == last {
            let top = squares.start % of_picture * SQUARE / self.pitch();
            let bottom = ((squares.end - 1) % of_picture * SQUARE + SQUARE - 1) / self.pitch();
            let reach = self.taps.iter().map(|(row, _)| row + 1).max().unwrap_or(0);
            let end = bottom.min(self.outputs.rows - 1) * grid.stride + reach;
            (top * grid.stride..end, top * grid.columns)
        } else {
            (grid.all_rows(), 0)
        };
        let mut cells = Buffer::take(grid.floats(last + 1 - first));
        let to = Shared::new(&mut cells);
        for plane in first * grid.pairs()..(last + 1) * grid.pairs() {
            let at = (plane - first * grid.pairs()) * grid.plane() * grid.cell();
            isa.run(SplitRows {
                grid,
                maps,
                plane,
                rows: rows.clone(),
                to: to.at(at).wrapping_sub(before * grid.cell()),
            });
        }
        (cells, first * grid.pairs() * grid.plane() + before)
    }

    fn multiply(&self, isa: Isa, steps: &[usize], squares: Range<usize>, pairs: Range<usize>) {
        let of_picture = self.picture_squares();
        let picture_cells = self.grid.pairs() * self.grid.plane();
        let (split, before);
        let (cells, before) = match self.source {
            Source::Cells(cells) => (cells, 0),
            Source::Maps(maps) => {
                (split, before) = self.split(isa, maps, &squares);
                (&*split, before)
            }
        };
        let mut rows = [std::ptr::null(); TASK_ROWS];
        for (row, square) in rows.iter_mut().zip(squares.clone()) {
            let (picture, first) = (square / of_picture, square % of_picture * SQUARE);
            let cell = picture * picture_cells + first * self.grid.stride - before;
            *row = cells.as_ptr().wrapping_add(cell * self.grid.cell());
        }
        let rows = &rows[..squares.len()];
        let tiles = steps.len() * amx::square_tiles(self.grid.parts);
        let weight = &self.weight[pairs.start * tiles..pairs.end * tiles];
        let mut sums = Buffer::take(squares.len() * pairs.len() * SQUARE * SQUARE);
        // SAFETY: there is a unit, or nobody would have packed the weight; every tap of every output lies inside the
        // cells.
        unsafe { amx::multiply_cells(self.grid.parts, rows, self.grid.stride, steps, weight, &mut sums) };
        isa.run(WriteSums {
            product: self,
            sums: &sums,
            squares,
            pairs,
        });
    }
}

/// Writes the sums of some squares for some pairs of blocks, `[square][pair][32][32]`, to the outputs, which nobody else
/// writes.
struct WriteSums<'a> {
    product: &'a Product<'a>,
    sums: &'a [f32],
    squares: Range<usize>,
    pairs: Range<usize>,
}

impl WriteSums<'_> {
    /// Writes sixteen columns of a square, those outputs that are in the picture.
    ///
    /// # Safety
    /// Instructions of `L`; `from` is a square's, and the plane at `to` is a picture's.
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, from: *const f32, first: usize, to: *mut f32) {
        let (outputs, pitch) = (self.product.outputs, self.product.pitch());
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

impl Kernel for WriteSums<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Product { blocks, outputs, .. } = *self.product;
        let of_picture = self.product.picture_squares();
        let mut sums = self.sums.as_ptr();
        for square in self.squares.clone() {
            let (picture, first) = (square / of_picture, square % of_picture * SQUARE);
            for pair in self.pairs.clone() {
                for block in 2 * pair..blocks.min(2 * pair + 2) {
                    let to = outputs
                        .y
                        .at((picture * blocks + block) * outputs.plane + outputs.first);
                    // SAFETY: the caller promises the instructions; the square and the plane are some of the product's.
                    unsafe { self.write::<L>(sums.wrapping_add(block % 2 * BLOCK), first, to) };
                }
                sums = sums.wrapping_add(SQUARE * SQUARE);
            }
        }
    }
}
