//! Few tiles of many channels: their transformed weight would be larger than all that is computed with it, and as large as
//! a third-level cache.
//!
//! Each piece of it, a few channels by a few, is made where it is multiplied and does not leave the second-level cache.

use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::panel::Panel;
use super::super::tile::{Row, multiply_panel};
use super::super::weights::WeightTile;
use super::super::{Shared, parallel};
use super::convolve::Taps;
use super::form::{Form, Maps};
use super::{BLOCK, EDGE, POINTS};
use crate::pool::Buffer;

/// Entries of all tiles up to which this way is the faster one: a task's sums of so many take 1.2 MiB.
const MAX_ENTRIES: usize = 256 * POINTS;
/// Pairs of an input and an output channel whose transformed weight would leave a second-level cache by far.
const MIN_PAIRS: usize = 256 * 256;

/// Blocks of output channels of a task, and of input channels of a piece: with the sums of 64 tiles it takes 590 KiB.
const GROUP: usize = 2;
const PIECE: usize = 4;

/// Whether a convolution with a weight of its own should be computed here.
pub(super) fn suits(form: impl Form) -> bool {
    let grid = form.grid();
    grid.tiles() * form.entries() <= MAX_ENTRIES && grid.shape.i * grid.shape.o >= MIN_PAIRS
}

/// The convolution that `form` is of, with the taps of a weight.
pub(super) fn convolve<F: Form>(isa: Isa, form: F, taps: Taps, maps: Maps, y: &mut [f32]) {
    let (shape, tiles, [from, to]) = (form.grid().shape, form.grid().tiles(), form.planes());
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(maps.x.len(), shape.n * in_blocks * from);
    assert_eq!(y.len(), shape.n * out_blocks * to);
    assert_eq!(taps.weight.len(), shape.i * shape.o * 9);
    // `[entry][piece][tile][channel]`, a cache line more for each entry, lest the streams of a transform meet in one set.
    let entry = in_blocks * tiles * BLOCK + BLOCK;
    let mut inputs = Buffer::take(form.entries() * entry);
    let to = Shared::new(&mut inputs);
    parallel(tiles, |tile| {
        isa.run(Inputs {
            form,
            maps,
            tile,
            entry,
            to,
        })
    });
    let (inputs, y) = (&*inputs, Shared::new(y));
    let group = GROUP.min(out_blocks.div_ceil(rayon::current_num_threads()));
    parallel(out_blocks.div_ceil(group), |task| {
        isa.run(Outputs {
            form,
            inputs,
            entry,
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

/// The entries of a tile of all input channels.
struct Inputs<'a, F> {
    form: F,
    maps: Maps<'a>,
    tile: usize,
    entry: usize,
    to: Shared,
}

impl<F: Form> Kernel for Inputs<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            maps,
            tile,
            entry,
            to,
        } = self;
        let grid = form.grid();
        let (in_blocks, tiles, place) = (grid.shape.i.div_ceil(BLOCK), grid.tiles(), grid.place(tile));
        for block in 0..in_blocks {
            let (first, blocks) = piece_of(block, in_blocks);
            let to = to.at((first * tiles + tile * blocks + block - first) * BLOCK);
            let plane = place.picture * in_blocks + block;
            // SAFETY: the caller promises the instructions; each task has a tile of its own.
            unsafe { form.read_tile::<L>(maps, plane, place, to, entry) };
        }
    }
}

/// Some blocks of output channels of all tiles.
struct Outputs<'a, F> {
    form: F,
    inputs: &'a [f32],
    entry: usize,
    taps: Taps<'a>,
    y: Shared,
    blocks: std::ops::Range<usize>,
}

impl<F: Form> Kernel for Outputs<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            inputs,
            entry,
            taps,
            y,
            blocks,
        } = self;
        let grid = form.grid();
        let [in_blocks, out_blocks] = [grid.shape.i, grid.shape.o].map(|channels| channels.div_ceil(BLOCK));
        let tiles = grid.tiles();
        let width = blocks.len() * BLOCK;
        let weight_point = PIECE * BLOCK * width + BLOCK;
        let sums_entry = tiles * width + BLOCK;
        let mut weight = Buffer::take(POINTS * weight_point);
        let mut sums = Buffer::take(form.entries() * sums_entry);
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
                            taps.transform::<L, F::Taps>(&mut tile, lane, EDGE, to, weight_point);
                        }
                    }
                }
                let rows = Row::spaced(tiles, panel.length, width);
                let runs = panel.runs([first * tiles * BLOCK]);
                for at in 0..POINTS {
                    let weight = weight.wrapping_add(at * weight_point);
                    for (at, having) in form.meeting(at, &(0..tiles)) {
                        multiply_panel::<L>(
                            &rows[having],
                            &runs,
                            inputs.as_ptr().wrapping_add(at * entry),
                            panel,
                            weight,
                            0,
                            blocks.len(),
                            sums.wrapping_add(at * sums_entry),
                            BLOCK,
                            None,
                            first > 0,
                        );
                    }
                }
            }
            for tile in 0..tiles {
                let place = grid.place(tile);
                for block in blocks.clone() {
                    let plane = place.picture * out_blocks + block;
                    let from = sums.wrapping_add(tile * width + (block - blocks.start) * BLOCK);
                    form.write_tile::<L>(from, sums_entry, y, plane, place);
                }
            }
            y.written::<L>();
        }
    }
}
