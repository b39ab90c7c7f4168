//! The convolution and its data gradient, chunk by chunk of tiles.

use std::marker::PhantomData;
use std::ops::Range;

use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::load::Load;
use super::super::panel::Panel;
use super::super::tile::{Row, multiply_panel};
use super::super::weights::{Columns, WeightShape, WeightTile};
use super::super::{Shared, parallel};
use super::form::{Form, Maps};
use super::matrices::{Half, KernelMatrix, ThreeTaps};
use super::tiles::StrideOne;
use super::{BLOCK, EDGE, POINTS, Shape, Tile, pieces, unit};
use crate::pool::Buffer;

/// The weight of a convolution, `[O, I, 3, 3]`, at the points of the tiles: what [`forward`] multiplies by, with any number
/// of pictures.
pub(crate) fn prepare(isa: Isa, shape: Shape, tile: Tile, weight: &[f32]) -> Buffer {
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Outputs,
    };
    transform_weight::<ThreeTaps>(isa, taps, tile.grid(shape).edge())
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
    let form = StrideOne {
        grid: tile.grid(shape),
    };
    convolve(isa, form, prepared, Maps { x, load }, y);
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
    convolve_once(isa, shape, taps, Maps { x, load }, y);
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
    convolve_once(isa, flipped, taps, Maps { x: dy, load: None }, dx);
}

fn convolve_once(isa: Isa, shape: Shape, taps: Taps, maps: Maps, y: &mut [f32]) {
    if let Some(parts) = unit::parts(isa, shape) {
        unit::convolve(isa, parts, shape, &unit::prepare(isa, parts, taps), maps, y);
        return;
    }
    let form = StrideOne {
        grid: Tile::Four.grid(shape),
    };
    convolve_taps(isa, form, taps, maps, y);
}

/// The convolution that `form` is of, with the taps of a weight.
pub(super) fn convolve_taps<F: Form>(isa: Isa, form: F, taps: Taps, maps: Maps, y: &mut [f32]) {
    if pieces::suits(form) {
        pieces::convolve(isa, form, taps, maps, y);
    } else {
        let weight = transform_weight::<F::Taps>(isa, taps, form.grid().edge());
        convolve(isa, form, &weight, maps, y);
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
    /// `G g Gᵀ`, G as given, of a row of sixteen kernels of a tile of the weight, one value for each of `edge`² points at distances of
    /// `point`.
    ///
    /// # Safety
    /// Instructions of `L`; `to` has room for the points.
    #[inline(always)]
    pub(super) unsafe fn transform<L: Lanes, G: KernelMatrix>(
        self,
        tile: &mut WeightTile,
        lane: usize,
        edge: usize,
        to: *mut f32,
        point: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut half = Half::<EDGE>::new();
            for column in 0..3 {
                let mut g = [L::zero(); 3];
                for (row, g) in g.iter_mut().enumerate() {
                    let tap = row * 3 + column;
                    let flipped = self.columns == Columns::Inputs;
                    let tap = if flipped { 8 - tap } else { tap };
                    *g = L::load(self.columns.row(tile, lane, tap));
                }
                half.write_column(column, G::taps_to_points(g));
            }
            for row in 0..edge {
                let values = G::taps_to_points(half.row::<L, 3>(row));
                for (column, value) in values.into_iter().enumerate().take(edge) {
                    value.store(to.wrapping_add((row * edge + column) * point));
                }
            }
        }
    }
}

/// The same with a weight that is transformed already.
fn convolve<F: Form>(isa: Isa, form: F, weight: &[f32], maps: Maps, y: &mut [f32]) {
    let (grid, [from, to]) = (form.grid(), form.planes());
    let shape = grid.shape;
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(maps.x.len(), shape.n * in_blocks * from);
    assert_eq!(y.len(), shape.n * out_blocks * to);
    let panel = panel(shape.i, shape.o);
    assert_eq!(weight.len(), grid.points() * (panel.size() + BLOCK));

    let (threads, tiles) = (rayon::current_num_threads(), grid.tiles());
    // Each thread reads its part of the weight, which is more than a chunk's inputs.
    let shareable = out_blocks.div_ceil(SPLIT_BLOCKS);
    let chunks = match tiles.div_ceil((CHUNK_ENTRIES / form.entries()).min(CHUNK_TILES)) {
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
        isa.run(Chunk {
            form,
            maps,
            panel,
            point: panel.size() + BLOCK,
            weight,
            y,
            tiles: first_tile..tiles.min(first_tile + chunk_tiles),
            blocks: first_block..(first_block + split_blocks).min(out_blocks),
        });
    });
}

/// Tasks share output channels by so many blocks.
const SPLIT_BLOCKS: usize = 4;

/// Tiles of a chunk, and entries of those. Its transformed inputs should stay in the second-level cache, but the
/// transformed weights, which stream past once per chunk, must be worth their way.
const CHUNK_TILES: usize = 64;
const CHUNK_ENTRIES: usize = CHUNK_TILES * POINTS;

/// The weight of one point: input channels by output channels.
fn panel(inputs: usize, outputs: usize) -> Panel {
    Panel {
        runs: 1,
        length: inputs.next_multiple_of(BLOCK),
        blocks: outputs.div_ceil(BLOCK),
    }
}

/// `G g Gᵀ` for all pairs of channels: a panel for each of `edge`² points, a cache line apart, lest the streams of a
/// transform meet in one cache set.
fn transform_weight<G: KernelMatrix>(isa: Isa, taps: Taps, edge: usize) -> Buffer {
    let (outputs, inputs) = taps.columns.sides(taps.shape);
    assert_eq!(taps.weight.len(), inputs * outputs * 9);
    let panel = panel(inputs, outputs);
    let point = panel.size() + BLOCK;
    let mut transformed = Buffer::take(edge * edge * point);
    let to = Shared::new(&mut transformed);
    let in_blocks = panel.length / BLOCK;
    parallel(panel.blocks.div_ceil(GROUP) * in_blocks, |task| {
        isa.run(WeightBlocks::<G> {
            matrix: PhantomData,
            taps,
            edge,
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
struct WeightBlocks<'a, G> {
    matrix: PhantomData<G>,
    taps: Taps<'a>,
    edge: usize,
    panel: Panel,
    point: usize,
    to: Shared,
    group: usize,
    in_block: usize,
}

impl<G: KernelMatrix> Kernel for WeightBlocks<'_, G> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            taps,
            edge,
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
                unsafe { taps.transform::<L, G>(&mut tile, lane, edge, to, point) };
            }
        }
    }
}

/// Some tiles and output channels of a convolution: to entries, a matrix product for each, and back.
struct Chunk<'a, F> {
    form: F,
    maps: Maps<'a>,
    panel: Panel,
    point: usize,
    weight: &'a [f32],
    y: Shared,
    tiles: Range<usize>,
    blocks: Range<usize>,
}

impl<F: Form> Kernel for Chunk<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            maps,
            panel,
            point,
            weight,
            y,
            tiles,
            blocks: all_blocks,
        } = self;
        let grid = form.grid();
        let (inputs, out_blocks) = (panel.length, panel.blocks);
        let in_blocks = inputs / BLOCK;
        let width = L::TILE_BLOCKS.min(all_blocks.len()) * BLOCK;
        // A cache line more per entry, as per point of the weight.
        let v_entry = tiles.len() * inputs + BLOCK;
        let m_entry = tiles.len() * width + BLOCK;
        let mut v = Buffer::take(form.entries() * v_entry);
        let mut m = Buffer::take(form.entries() * m_entry);
        let (v, m) = (v.as_mut_ptr(), m.as_mut_ptr());
        let runs = panel.runs([0]);
        let places: Vec<_> = tiles.clone().map(|tile| grid.place(tile)).collect();
        let rows = Row::spaced(tiles.len(), inputs, width);
        // SAFETY: the caller promises the instructions. Scratch is sized above; the maps are sized as `convolve` checked.
        // This task alone writes the outputs of its tiles and blocks.
        unsafe {
            for (at, place) in places.iter().enumerate() {
                for block in 0..in_blocks {
                    let plane = place.picture * in_blocks + block;
                    let to = v.wrapping_add(at * inputs + block * BLOCK);
                    form.read_tile::<L>(maps, plane, *place, to, v_entry);
                }
            }
            for first in all_blocks.clone().step_by(L::TILE_BLOCKS) {
                let blocks = L::TILE_BLOCKS.min(all_blocks.end - first);
                for at in 0..grid.points() {
                    let weight = weight.as_ptr().wrapping_add(at * point);
                    // The next point's weight, or the next columns' at the first.
                    let next = if at + 1 < grid.points() {
                        point
                    } else {
                        panel.start(L::TILE_BLOCKS).wrapping_sub(at * point)
                    };
                    for (entry, having) in form.meeting(at, &tiles) {
                        let (a, c) = (v.wrapping_add(entry * v_entry), m.wrapping_add(entry * m_entry));
                        let rows = &rows[having];
                        multiply_panel::<L>(
                            rows,
                            &runs,
                            a,
                            panel,
                            weight,
                            first,
                            blocks,
                            c,
                            BLOCK,
                            Some(next),
                            false,
                        );
                    }
                }
                for (at, place) in places.iter().enumerate() {
                    for block in 0..blocks {
                        let plane = place.picture * out_blocks + first + block;
                        let from = m.wrapping_add(at * width + block * BLOCK);
                        form.write_tile::<L>(from, m_entry, y, plane, *place);
                    }
                }
            }
            y.written::<L>();
        }
    }
}
