//! The weight gradient: sums over tiles.

#![allow(
    clippy::needless_range_loop,
    reason = "columns of matrices are filled one by one"
)]

use super::super::lanes::{Isa, Kernel, Lanes, Parts};
use super::super::load::Load;
use super::super::tile::{Row, Runs, Strides, multiply};
use super::super::weights::WeightTile;
use super::super::{Shared, parallel};
use super::matrices::Four;
use super::matrices::points_to_kernel;
use super::tiles::{transform_input, transform_output_gradient};
use super::{BLOCK, EDGE, POINTS, Shape, TILE};
use crate::pool::Buffer;

/// The gradient of the weight, `dw` `[O, I, 3, 3]`, from the input and the gradient of the output.
pub(crate) fn weight_gradient(
    isa: Isa,
    shape: Shape,
    x: &[f32],
    load: Option<Load>,
    dy: &[f32],
    dw: &mut [f32],
) {
    let maps = Maps { x, load, dy };
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(x.len(), shape.n * in_blocks * shape.plane());
    assert_eq!(dy.len(), shape.n * out_blocks * shape.plane());
    assert_eq!(dw.len(), shape.i * shape.o * 9);

    // With few channels a part of the tiles has sums of its own, which stay in the cache while its tiles stream past.
    // With many, the sums are the large thing: all tiles add to one copy, and tasks divide the points.
    let size = POINTS * sums_point(shape);
    let parts = if size <= PRIVATE_FLOATS {
        shape.tiles().div_ceil(PART_TILES).min(MAX_PARTS)
    } else {
        1
    };
    let mut sums = Buffer::take(parts * size);
    if parts == 1 {
        sum_by_points(isa, shape, maps, &mut sums);
    } else {
        let part_tiles = shape.tiles().div_ceil(parts);
        let all = Shared::new(&mut sums);
        parallel(parts, |part| {
            let first_tile = (part * part_tiles).min(shape.tiles());
            let last_tile = (first_tile + part_tiles).min(shape.tiles());
            isa.run(GradientPart {
                shape,
                maps,
                sums: all,
                start: part * size,
                first_tile,
                last_tile,
            });
        });
    }

    let dw = Shared::new(dw);
    let sums = &sums;
    parallel(out_blocks.div_ceil(GROUP) * in_blocks, |task| {
        let (group, in_block) = (task / in_blocks, task % in_blocks);
        isa.run(GradientBlock {
            shape,
            sums,
            parts,
            size,
            dw,
            group,
            in_block,
        });
    });
}

/// The input, how it is read, and the gradient of the output.
#[derive(Clone, Copy)]
struct Maps<'a> {
    x: &'a [f32],
    load: Option<Load<'a>>,
    dy: &'a [f32],
}

/// Floats from the sums `[I, O]` of a point to those of the next: a cache line more than they take, lest the 36 streams of
/// [`GradientBlock`] meet in one set of a cache.
fn sums_point(shape: Shape) -> usize {
    shape.i.next_multiple_of(BLOCK) * shape.o.next_multiple_of(BLOCK) + BLOCK
}

/// Floats of sums that a part has for itself: with its tiles they stay in a second-level cache of 2 MiB.
const PRIVATE_FLOATS: usize = POINTS * (64 * 64 + BLOCK);
const PART_TILES: usize = 128;
const MAX_PARTS: usize = 16;

/// Transformed inputs and output gradients of some tiles, for a sum over tiles.
///
/// `[36][⌈C/16⌉][tiles][16]` each.
struct GradientTiles {
    inputs: Buffer,
    outputs: Buffer,
    input_point: usize,
    output_point: usize,
}

impl GradientTiles {
    fn new(shape: Shape, tiles: usize) -> Self {
        // A cache line more per point: see `Chunk`.
        let input_point = shape.i.div_ceil(BLOCK) * BLOCK * tiles + BLOCK;
        let output_point = shape.o.div_ceil(BLOCK) * BLOCK * tiles + BLOCK;
        let (inputs, outputs) = (
            Buffer::take(POINTS * input_point),
            Buffer::take(POINTS * output_point),
        );
        Self {
            inputs,
            outputs,
            input_point,
            output_point,
        }
    }
}

/// Where [`GradientTiles`] of `capacity` tiles lie.
#[derive(Clone, Copy)]
struct TilesView {
    /// Blocks of outputs that are one product, and its parts if it is for the matrix unit.
    group_blocks: usize,
    matrices: Option<Parts>,
    inputs: Shared,
    outputs: Shared,
    input_point: usize,
    output_point: usize,
    capacity: usize,
}

/// Transforms the tiles `first_tile + from .. first_tile + to` into places `from .. to`.
///
/// # Safety
/// Instructions of `L`; maps and view are of the shape; no other task writes these places.
#[inline(always)]
unsafe fn transform_gradient_tiles<L: Lanes>(
    shape: Shape,
    maps: Maps,
    view: TilesView,
    first_tile: usize,
    places: std::ops::Range<usize>,
) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    for place in places {
        let (n, top, left) = shape.tile_of(TILE, first_tile + place);
        // SAFETY: the caller's promise.
        unsafe {
            for block in 0..in_blocks {
                let at = (n * in_blocks + block, top, left);
                let to = view.inputs.at((block * view.capacity + place) * BLOCK);
                transform_input::<L, Four, TILE, EDGE>(maps.x, maps.load, shape, at, to, view.input_point);
            }
            for block in 0..out_blocks {
                let plane = maps
                    .dy
                    .as_ptr()
                    .wrapping_add((n * out_blocks + block) * shape.plane());
                let to = view.outputs.at((block * view.capacity + place) * BLOCK);
                transform_output_gradient::<L>(plane, shape, top, left, to, view.output_point);
            }
        }
    }
}

/// Adds the products of `tiles` transformed tiles at one point to that point's sums `[I, O]`.
///
/// # Safety
/// Instructions of `L`; the view holds `tiles` tiles of the shape; `sums` is one point's, written by nobody else.
#[inline(always)]
unsafe fn add_point<L: Lanes>(
    shape: Shape,
    view: TilesView,
    tiles: usize,
    point: usize,
    sums: *mut f32,
    accumulate: bool,
) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    let columns = out_blocks * BLOCK;
    let rows: Vec<_> = (0..in_blocks * BLOCK)
        .map(|input| Row {
            a: input / BLOCK * BLOCK * view.capacity + input % BLOCK,
            c: input * columns,
        })
        .collect();
    for group in 0..out_blocks.div_ceil(view.group_blocks) {
        let blocks = view.group_blocks.min(out_blocks - group * view.group_blocks);
        let strides = Strides {
            a_inner: BLOCK,
            b_inner: BLOCK,
            b_block: view.capacity * BLOCK,
            c_block: BLOCK,
            matrices: view.matrices,
            b_follows: false,
        };
        let runs = Runs {
            offsets: &[(0, 0)],
            length: tiles,
        };
        let first_column = group * view.group_blocks * BLOCK;
        // SAFETY: the caller's promise.
        unsafe {
            let a = view.inputs.at(point * view.input_point);
            let b = view
                .outputs
                .at(point * view.output_point + first_column * view.capacity);
            let c = sums.wrapping_add(first_column);
            multiply::<L>(&rows, blocks, runs, strides, a, b, c, accumulate);
        }
    }
}

/// A part of the tiles, summed into sums of its own.
struct GradientPart<'a> {
    shape: Shape,
    maps: Maps<'a>,
    sums: Shared,
    start: usize,
    first_tile: usize,
    last_tile: usize,
}

/// Tiles whose transforms fit the second-level cache beside the sums of a part.
const PART_CHUNK_TILES: usize = 32;

impl Kernel for GradientPart<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            maps,
            sums,
            start,
            first_tile,
            last_tile,
        } = self;
        let sums_point = sums_point(shape);
        let mut tiles = GradientTiles::new(shape, PART_CHUNK_TILES);
        let view = TilesView {
            group_blocks: L::TILE_BLOCKS,
            // Few channels: packing would cost more than the unit saves.
            matrices: None,
            inputs: Shared::new(&mut tiles.inputs),
            outputs: Shared::new(&mut tiles.outputs),
            input_point: tiles.input_point,
            output_point: tiles.output_point,
            capacity: PART_CHUNK_TILES,
        };
        // SAFETY: the caller promises the instructions; the scratch is this task's, and so are the sums of its part.
        unsafe {
            if first_tile == last_tile {
                for offset in 0..POINTS * sums_point {
                    *sums.at(start + offset) = 0.0;
                }
            }
            for first in (first_tile..last_tile).step_by(PART_CHUNK_TILES) {
                let count = PART_CHUNK_TILES.min(last_tile - first);
                transform_gradient_tiles::<L>(shape, maps, view, first, 0..count);
                for point in 0..POINTS {
                    let sums = sums.at(start + point * sums_point);
                    add_point::<L>(shape, view, count, point, sums, first > first_tile);
                }
            }
        }
    }
}

/// Pairs of an input and an output channel for which the matrix unit multiplies: with fewer, packing costs about what it
/// saves.
const MIN_UNIT_PAIRS: usize = 128 * 256;
/// Tiles transformed before the points are summed, when all tiles share the sums.
const SHARED_CHUNK_TILES: usize = 256;

/// All tiles summed into one copy of the sums, points divided between tasks.
fn sum_by_points(isa: Isa, shape: Shape, maps: Maps, sums: &mut [f32]) {
    let capacity = SHARED_CHUNK_TILES.min(shape.tiles());
    let mut tiles = GradientTiles::new(shape, capacity);
    let view = TilesView {
        group_blocks: isa.group_blocks(),
        matrices: isa.matrices().filter(|_| shape.i * shape.o >= MIN_UNIT_PAIRS),
        inputs: Shared::new(&mut tiles.inputs),
        outputs: Shared::new(&mut tiles.outputs),
        input_point: tiles.input_point,
        output_point: tiles.output_point,
        capacity,
    };
    let sums = Shared::new(sums);
    for first_tile in (0..shape.tiles()).step_by(capacity) {
        let count = capacity.min(shape.tiles() - first_tile);
        const TASK_TILES: usize = 8;
        parallel(count.div_ceil(TASK_TILES), |task| {
            let places = task * TASK_TILES..count.min((task + 1) * TASK_TILES);
            isa.run(TransformTiles {
                shape,
                maps,
                view,
                first_tile,
                places,
            });
        });
        parallel(POINTS, |point| {
            isa.run(AddPoint {
                shape,
                view,
                tiles: count,
                point,
                sums,
                accumulate: first_tile > 0,
            });
        });
    }
}

struct TransformTiles<'a> {
    shape: Shape,
    maps: Maps<'a>,
    view: TilesView,
    first_tile: usize,
    places: std::ops::Range<usize>,
}

impl Kernel for TransformTiles<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            maps,
            view,
            first_tile,
            places,
        } = self;
        // SAFETY: the caller promises the instructions; tasks have disjoint places.
        unsafe { transform_gradient_tiles::<L>(shape, maps, view, first_tile, places) }
    }
}

struct AddPoint {
    shape: Shape,
    view: TilesView,
    tiles: usize,
    point: usize,
    sums: Shared,
    accumulate: bool,
}

impl Kernel for AddPoint {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            view,
            tiles,
            point,
            sums,
            accumulate,
        } = self;
        // SAFETY: the caller promises the instructions; each task has a point of its own.
        unsafe {
            let sums = sums.at(point * sums_point(shape));
            add_point::<L>(shape, view, tiles, point, sums, accumulate);
        }
    }
}

/// Blocks of outputs whose taps are made at a time.
const GROUP: usize = 4;

/// Adds up the parts of sixteen inputs and a group of outputs, in order, and transforms them to taps.
struct GradientBlock<'a> {
    shape: Shape,
    sums: &'a [f32],
    parts: usize,
    size: usize,
    dw: Shared,
    group: usize,
    in_block: usize,
}

impl Kernel for GradientBlock<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            sums,
            parts,
            size,
            dw,
            group,
            in_block,
        } = self;
        let out_blocks = shape.o.div_ceil(BLOCK);
        let (columns, point) = (out_blocks * BLOCK, sums_point(shape));
        let mut tile = WeightTile::new(shape.weight());
        for block in group * GROUP..out_blocks.min((group + 1) * GROUP) {
            for lane in 0..BLOCK {
                let first = sums
                    .as_ptr()
                    .wrapping_add((in_block * BLOCK + lane) * columns + block * BLOCK);
                // SAFETY: the caller promises the instructions; `sums` holds `parts` times `size` floats.
                unsafe {
                    let mut half = [[L::zero(); EDGE]; 3];
                    for column in 0..EDGE {
                        let mut s = [L::zero(); EDGE];
                        for (row, s) in s.iter_mut().enumerate() {
                            let at = first.wrapping_add((row * EDGE + column) * point);
                            for part in 0..parts {
                                *s = s.add(L::load(at.wrapping_add(part * size)));
                            }
                        }
                        for (row, value) in points_to_kernel(s).into_iter().enumerate() {
                            half[row][column] = value;
                        }
                    }
                    for (row, half) in half.into_iter().enumerate() {
                        for (column, value) in points_to_kernel(half).into_iter().enumerate() {
                            value.store(tile.outputs(lane, row * 3 + column).as_mut_ptr());
                        }
                    }
                }
            }
            // SAFETY: `dw` is a weight of the shape; this task alone writes the tiles of its blocks.
            unsafe { tile.write::<L>(dw, block, in_block) };
        }
    }
}
