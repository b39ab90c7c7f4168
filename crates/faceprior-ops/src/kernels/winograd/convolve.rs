//! The convolution and its data gradient, chunk by chunk of tiles.

#![allow(
    clippy::needless_range_loop,
    reason = "columns of matrices are filled one by one"
)]

use std::marker::PhantomData;
use std::ops::Range;

use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::load::Load;
use super::super::panel::Panel;
use super::super::tile::{Row, multiply_panel};
use super::super::weights::{Columns, WeightShape, WeightTile};
use super::super::{Shared, parallel};
use super::matrices::{Four, Matrices, Two};
use super::tiles::{transform_input, transform_output};
use super::{BLOCK, Shape, Tile, pieces, unit};
use crate::pool::Buffer;

/// The weight of a convolution, `[O, I, 3, 3]`, at the points of the tiles: what [`forward`] multiplies by.
pub(crate) fn prepare(isa: Isa, shape: Shape, tile: Tile, weight: &[f32]) -> Buffer {
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Outputs,
    };
    match tile {
        Tile::Four if unit::suits(isa, shape) => unit::prepare(isa, taps),
        Tile::Two => transform_weight::<Two, 2, 4>(isa, taps),
        Tile::Four => transform_weight::<Four, 4, 6>(isa, taps),
    }
}

/// The convolution of `x` `[N, ⌈I/16⌉, H, W, 16]` with a prepared weight into `y` `[N, ⌈O/16⌉, H, W, 16]`.
pub(crate) fn forward(
    isa: Isa,
    shape: Shape,
    tile: Tile,
    x: &[f32],
    load: Option<Load>,
    prepared: &[f32],
    y: &mut [f32],
) {
    match tile {
        Tile::Four if unit::suits(isa, shape) => unit::convolve(isa, shape, prepared, x, load, y),
        Tile::Two => convolve::<Two, 2, 4>(isa, shape, prepared, x, load, y),
        Tile::Four => convolve::<Four, 4, 6>(isa, shape, prepared, x, load, y),
    }
}

/// [`forward`] with a weight `[O, I, 3, 3]` that is prepared for it alone.
pub(crate) fn forward_once(
    isa: Isa,
    shape: Shape,
    x: &[f32],
    load: Option<Load>,
    weight: &[f32],
    y: &mut [f32],
) {
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Outputs,
    };
    convolve_once(isa, shape, taps, x, load, y);
}

/// The gradient of the input, `dx`, from the gradient of the output, `dy`: a convolution with the flipped kernel.
pub(crate) fn data_gradient(isa: Isa, shape: Shape, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Inputs,
    };
    let flipped = Shape {
        i: shape.o,
        o: shape.i,
        ..shape
    };
    convolve_once(isa, flipped, taps, dy, None, dx);
}

fn convolve_once(isa: Isa, shape: Shape, taps: Taps, x: &[f32], load: Option<Load>, y: &mut [f32]) {
    if unit::suits(isa, shape) {
        unit::convolve(isa, shape, &unit::prepare(isa, taps), x, load, y);
    } else if pieces::suits(shape) {
        pieces::convolve(isa, shape, taps, x, load, y);
    } else {
        let weight = transform_weight::<Four, 4, 6>(isa, taps);
        convolve::<Four, 4, 6>(isa, shape, &weight, x, load, y);
    }
}

/// A weight, and the side of it that is the convolution's output.
#[derive(Clone, Copy)]
pub(super) struct Taps<'a> {
    pub(super) weight: &'a [f32],
    pub(super) shape: WeightShape,
    pub(super) columns: Columns,
}

impl Taps<'_> {
    /// `G g Gᵀ` of a row of sixteen kernels of a tile of the weight, one value per point at distances of `point`.
    ///
    /// # Safety
    /// Instructions of `L`; `to` has room for the points.
    #[inline(always)]
    pub(super) unsafe fn transform<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
        self,
        tile: &mut WeightTile,
        lane: usize,
        to: *mut f32,
        point: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut half = [[L::zero(); 3]; E];
            for column in 0..3 {
                let mut g = [L::zero(); 3];
                for (row, g) in g.iter_mut().enumerate() {
                    let tap = row * 3 + column;
                    let flipped = self.columns == Columns::Inputs;
                    let tap = if flipped { 8 - tap } else { tap };
                    *g = L::load(self.columns.row(tile, lane, tap));
                }
                for (row, value) in M::kernel_to_points(g).into_iter().enumerate() {
                    half[row][column] = value;
                }
            }
            for (row, half) in half.into_iter().enumerate() {
                for (column, value) in M::kernel_to_points(half).into_iter().enumerate() {
                    value.store(to.wrapping_add((row * E + column) * point));
                }
            }
        }
    }
}

fn convolve<M: Matrices<T, E>, const T: usize, const E: usize>(
    isa: Isa,
    shape: Shape,
    weight: &[f32],
    x: &[f32],
    load: Option<Load>,
    y: &mut [f32],
) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(x.len(), shape.n * in_blocks * shape.plane());
    assert_eq!(y.len(), shape.n * out_blocks * shape.plane());
    let panel = panel(shape.i, shape.o);
    assert_eq!(weight.len(), E * E * (panel.size() + BLOCK));

    let (threads, tiles) = (rayon::current_num_threads(), shape.tiles_of(T));
    // Each thread reads its part of the weight, which is more than a chunk's inputs.
    let shareable = out_blocks.div_ceil(SPLIT_BLOCKS);
    let chunks = match tiles.div_ceil(CHUNK_TILES) {
        1 if shareable >= threads => 1,
        chunks => chunks.next_multiple_of(threads).min(tiles),
    };
    let chunk_tiles = tiles.div_ceil(chunks);
    let chunks = tiles.div_ceil(chunk_tiles);
    // Too few chunks for all threads: tasks share a chunk, each for some of the output channels.
    let splits = (threads / chunks).clamp(1, shareable);
    let split_blocks = shareable.div_ceil(splits) * SPLIT_BLOCKS;

    let y = Shared::new(y);
    parallel(chunks * splits, |task| {
        let first_tile = task / splits * chunk_tiles;
        let first_block = task % splits * split_blocks;
        isa.run(Chunk::<M, T, E> {
            matrices: PhantomData,
            shape,
            x,
            load,
            panel,
            point: panel.size() + BLOCK,
            weight,
            y,
            first_tile,
            tiles: chunk_tiles.min(tiles - first_tile),
            blocks: first_block..(first_block + split_blocks).min(out_blocks),
        });
    });
}

/// Tasks share output channels by so many blocks.
const SPLIT_BLOCKS: usize = 4;

/// Tiles of a chunk. Its transformed inputs should stay in the second-level cache, but the transformed weights, which
/// stream past once per chunk, must be worth their way.
const CHUNK_TILES: usize = 64;

/// The weight of one point: input channels by output channels.
fn panel(inputs: usize, outputs: usize) -> Panel {
    Panel {
        runs: 1,
        length: inputs.next_multiple_of(BLOCK),
        blocks: outputs.div_ceil(BLOCK),
    }
}

/// `G g Gᵀ` for all pairs of channels: a panel for each point, a cache line apart, lest the streams of a transform meet
/// in one cache set.
fn transform_weight<M: Matrices<T, E>, const T: usize, const E: usize>(isa: Isa, taps: Taps) -> Buffer {
    let (outputs, inputs) = taps.columns.sides(taps.shape);
    assert_eq!(taps.weight.len(), inputs * outputs * 9);
    let panel = panel(inputs, outputs);
    let point = panel.size() + BLOCK;
    let mut transformed = Buffer::take(E * E * point);
    let to = Shared::new(&mut transformed);
    let in_blocks = panel.length / BLOCK;
    parallel(panel.blocks.div_ceil(GROUP) * in_blocks, |task| {
        isa.run(WeightBlocks::<M, T, E> {
            matrices: PhantomData,
            taps,
            panel,
            point,
            to,
            group: task / in_blocks,
            in_block: task % in_blocks,
        })
    });
    transformed
}

/// Blocks of outputs whose taps are transformed at a time.
const GROUP: usize = 4;

/// The transformed taps of a group of blocks of outputs and one block of inputs.
struct WeightBlocks<'a, M, const T: usize, const E: usize> {
    matrices: PhantomData<M>,
    taps: Taps<'a>,
    panel: Panel,
    point: usize,
    to: Shared,
    group: usize,
    in_block: usize,
}

impl<M: Matrices<T, E>, const T: usize, const E: usize> Kernel for WeightBlocks<'_, M, T, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            taps,
            panel,
            point,
            to,
            group,
            in_block,
            ..
        } = self;
        let mut tile = WeightTile::new(taps.shape);
        for block in group * GROUP..panel.blocks.min((group + 1) * GROUP) {
            // SAFETY: the caller promises the instructions.
            unsafe { taps.columns.read::<L>(&mut tile, taps.weight, block, in_block) };
            for lane in 0..BLOCK {
                let to = to.at(panel.start(block) + (in_block * BLOCK + lane) * BLOCK);
                // SAFETY: the caller promises the instructions. This task alone writes the columns of its group in
                // the rows of its input block, which lie inside the buffer by its size.
                unsafe { taps.transform::<L, M, T, E>(&mut tile, lane, to, point) };
            }
        }
    }
}

/// Some tiles and output channels of a convolution: transform, a matrix product for each point, transform back.
struct Chunk<'a, M, const T: usize, const E: usize> {
    matrices: PhantomData<M>,
    shape: Shape,
    x: &'a [f32],
    load: Option<Load<'a>>,
    panel: Panel,
    point: usize,
    weight: &'a [f32],
    y: Shared,
    first_tile: usize,
    tiles: usize,
    blocks: Range<usize>,
}

impl<M: Matrices<T, E>, const T: usize, const E: usize> Kernel for Chunk<'_, M, T, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            x,
            load,
            panel,
            point,
            weight,
            y,
            first_tile,
            tiles,
            blocks: all_blocks,
            ..
        } = self;
        let points = E * E;
        let (inputs, out_blocks) = (panel.length, panel.blocks);
        let in_blocks = inputs / BLOCK;
        let widest = L::TILE_BLOCKS.min(all_blocks.len()) * BLOCK;
        // A cache line more per point, as in the weight.
        let v_point = tiles * inputs + BLOCK;
        let m_point = tiles * widest + BLOCK;
        let mut v = Buffer::take(points * v_point);
        let mut m = Buffer::take(points * m_point);
        let (v, m) = (v.as_mut_ptr(), m.as_mut_ptr());
        let runs = panel.runs([0]);
        // SAFETY: the caller promises the instructions. Scratch is sized above; `x` and `y` are sized by the caller
        // as the shape says. This task alone writes the outputs of its tiles and blocks.
        unsafe {
            for tile in 0..tiles {
                let (n, top, left) = shape.tile_of(T, first_tile + tile);
                for block in 0..in_blocks {
                    let place = (n * in_blocks + block, top, left);
                    let to = v.wrapping_add(tile * inputs + block * BLOCK);
                    transform_input::<L, M, T, E>(x, load, shape, place, to, v_point);
                }
            }
            for first in all_blocks.clone().step_by(L::TILE_BLOCKS) {
                let blocks = L::TILE_BLOCKS.min(all_blocks.end - first);
                let width = blocks * BLOCK;
                let rows = Row::spaced(tiles, inputs, width);
                for at in 0..points {
                    let (a, weight) = (
                        v.wrapping_add(at * v_point),
                        weight.as_ptr().wrapping_add(at * point),
                    );
                    let c = m.wrapping_add(at * m_point);
                    multiply_panel::<L>(
                        &rows, &runs, a, panel, weight, first, blocks, c, BLOCK, true, false,
                    );
                }
                for tile in 0..tiles {
                    let (n, top, left) = shape.tile_of(T, first_tile + tile);
                    for block in 0..blocks {
                        let place = (n * out_blocks + first + block, top, left);
                        let from = m.wrapping_add(tile * width + block * BLOCK);
                        transform_output::<L, M, T, E>(from, m_point, y, shape, place);
                    }
                }
            }
            y.written::<L>();
        }
    }
}
