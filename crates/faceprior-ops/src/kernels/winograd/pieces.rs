//! Few tiles of many channels: their transformed weight would be larger than all that is computed with it, and as large as
//! a third-level cache.
//!
//! Each piece of it, a few channels by a few, is made where it is multiplied and does not leave the second-level cache.

use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::load::Load;
use super::super::panel::Panel;
use super::super::tile::{Row, multiply_panel};
use super::super::weights::WeightTile;
use super::super::{Shared, parallel};
use super::convolve::Taps;
use super::grid::Grid;
use super::matrices::ThreeTaps;
use super::tiles::{TransformInput, TransformOutput};
use super::{BLOCK, EDGE, POINTS, Shape};
use crate::pool::Buffer;

/// Tiles up to which this form is the faster one: a task's sums of so many take 1.2 MiB.
const MAX_TILES: usize = 256;
/// Pairs of an input and an output channel whose transformed weight would leave a second-level cache by far.
const MIN_PAIRS: usize = 256 * 256;

/// Blocks of output channels of a task, and of input channels of a piece: with the sums of 64 tiles it takes 590 KiB.
const GROUP: usize = 2;
const PIECE: usize = 4;

/// Whether a convolution with a weight of its own should be computed here.
pub(super) fn suits(shape: Shape) -> bool {
    shape.tiles() <= MAX_TILES && shape.i * shape.o >= MIN_PAIRS
}

/// The convolution of `x` with the taps of a weight into `y`.
pub(super) fn convolve(isa: Isa, shape: Shape, taps: Taps, x: &[f32], load: Option<Load>, y: &mut [f32]) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(x.len(), shape.n * in_blocks * shape.plane());
    assert_eq!(y.len(), shape.n * out_blocks * shape.plane());
    assert_eq!(taps.weight.len(), shape.i * shape.o * 9);
    // `[point][piece][tile][channel]`, a cache line more for each point, lest the streams of a transform meet in one set.
    let grid = Grid::new(shape);
    let tiles = grid.tiles();
    let point = in_blocks * tiles * BLOCK + BLOCK;
    let mut inputs = Buffer::take(POINTS * point);
    let to = Shared::new(&mut inputs);
    parallel(tiles, |tile| {
        isa.run(Inputs {
            grid,
            x,
            load,
            tile,
            point,
            to,
        })
    });
    let (inputs, y) = (&*inputs, Shared::new(y));
    let group = GROUP.min(out_blocks.div_ceil(rayon::current_num_threads()));
    parallel(out_blocks.div_ceil(group), |task| {
        isa.run(Outputs {
            grid,
            inputs,
            point,
            taps,
            y,
            blocks: task * group..out_blocks.min((task + 1) * group),
        });
    });
}

/// The piece that a block of input channels belongs to: its first block, and how many it has.
fn piece_of(block: usize, in_blocks: usize) -> (usize, usize) {
    let first = block / PIECE * PIECE;
    (first, PIECE.min(in_blocks - first))
}

/// The points of a tile of all input channels.
struct Inputs<'a> {
    grid: Grid,
    x: &'a [f32],
    load: Option<Load<'a>>,
    tile: usize,
    point: usize,
    to: Shared,
}

impl Kernel for Inputs<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            grid,
            x,
            load,
            tile,
            point,
            to,
        } = self;
        let (in_blocks, tiles) = (grid.shape.i.div_ceil(BLOCK), grid.tiles());
        let place = grid.place(tile);
        for block in 0..in_blocks {
            let (first, blocks) = piece_of(block, in_blocks);
            let to = to.at((first * tiles + tile * blocks + block - first) * BLOCK);
            // SAFETY: the caller promises the instructions; each task has a tile of its own.
            unsafe {
                L::call(TransformInput {
                    x,
                    load,
                    plane: place.picture * in_blocks + block,
                    grid,
                    place,
                    to,
                    point,
                });
            }
        }
    }
}

/// Some blocks of output channels of all tiles.
struct Outputs<'a> {
    grid: Grid,
    inputs: &'a [f32],
    point: usize,
    taps: Taps<'a>,
    y: Shared,
    blocks: std::ops::Range<usize>,
}

impl Kernel for Outputs<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            grid,
            inputs,
            point,
            taps,
            y,
            blocks,
        } = self;
        let [in_blocks, out_blocks] = [grid.shape.i, grid.shape.o].map(|channels| channels.div_ceil(BLOCK));
        let tiles = grid.tiles();
        let width = blocks.len() * BLOCK;
        let weight_point = PIECE * BLOCK * width + BLOCK;
        let sums_point = tiles * width + BLOCK;
        let mut weight = Buffer::take(POINTS * weight_point);
        let mut sums = Buffer::take(POINTS * sums_point);
        let (weight, sums) = (weight.as_mut_ptr(), sums.as_mut_ptr());
        let mut tile = WeightTile::new(taps.shape);
        // SAFETY: the caller promises the instructions. Scratch is sized above; this task alone writes the outputs of its
        // blocks.
        unsafe {
            for first in (0..in_blocks).step_by(PIECE) {
                let (_, piece) = piece_of(first, in_blocks);
                let panel = Panel {
                    runs: 1,
                    length: piece * BLOCK,
                    blocks: blocks.len(),
                };
                for row in 0..piece {
                    for block in blocks.clone() {
                        taps.columns.read::<L>(&mut tile, taps.weight, block, first + row);
                        let to = weight.wrapping_add(panel.start(block - blocks.start) + row * BLOCK * BLOCK);
                        for lane in 0..BLOCK {
                            let to = to.wrapping_add(lane * BLOCK);
                            taps.transform::<L, ThreeTaps>(&mut tile, lane, EDGE, to, weight_point);
                        }
                    }
                }
                let rows = Row::spaced(tiles, panel.length, width);
                let runs = panel.runs([first * tiles * BLOCK]);
                for at in 0..POINTS {
                    let a = inputs.as_ptr().wrapping_add(at * point);
                    let (b, c) = (
                        weight.wrapping_add(at * weight_point),
                        sums.wrapping_add(at * sums_point),
                    );
                    multiply_panel::<L>(
                        &rows[grid.having(at, &(0..tiles))],
                        &runs,
                        a,
                        panel,
                        b,
                        0,
                        blocks.len(),
                        c,
                        BLOCK,
                        false,
                        first > 0,
                    );
                }
            }
            for tile in 0..tiles {
                let place = grid.place(tile);
                for block in blocks.clone() {
                    L::call(TransformOutput {
                        from: sums.wrapping_add(tile * width + (block - blocks.start) * BLOCK),
                        point: sums_point,
                        y,
                        plane: place.picture * out_blocks + block,
                        grid,
                        place,
                    });
                }
            }
            y.written::<L>();
        }
    }
}
