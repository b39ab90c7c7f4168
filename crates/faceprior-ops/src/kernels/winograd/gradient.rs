//! The weight gradient: sums over tiles.

use std::ops::Range;

use super::super::lanes::{Isa, Kernel, Lanes, Parts};
use super::super::load::Load;
use super::super::tile::{Row, Runs, Strides, multiply};
use super::super::weights::WeightTile;
use super::super::{Shared, parallel};
use super::grid::Grid;
use super::matrices::{Half, points_to_kernel};
use super::tiles::{TransformInput, TransformOutputGradient};
use super::{BLOCK, EDGE, POINTS, Shape};
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
    // With many, the sums are the large thing. Tasks divide them: all tiles at once by channels, so that sums become taps
    // where they are made, or, with more tiles than that suits, by points. Either way a sum is one chain over all tiles.
    let size = POINTS * sums_point(shape);
    let [in_groups, out_groups] = groups(shape);
    if size > PRIVATE_FLOATS
        && shape.tiles() <= SHARED_CHUNK_TILES
        && in_groups * out_groups >= rayon::current_num_threads()
        && isa.matrices().is_none()
    {
        sum_by_squares(isa, shape, maps, dw);
        return;
    }
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
    parallel(out_groups * in_blocks, |task| {
        let (group, in_block) = (task / in_blocks, task % in_blocks);
        isa.run(GradientBlock {
            shape,
            sums,
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

/// Blocks of inputs and of outputs.
fn all_blocks(shape: Shape) -> [Range<usize>; 2] {
    [shape.i, shape.o].map(|channels| 0..channels.div_ceil(BLOCK))
}

/// Groups of blocks of inputs and of outputs.
fn groups(shape: Shape) -> [usize; 2] {
    all_blocks(shape).map(|blocks| blocks.len().div_ceil(GROUP))
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

    /// For products of as many columns as are a task's, on the registers.
    fn view(&mut self, capacity: usize) -> TilesView {
        TilesView {
            group_blocks: GROUP,
            matrices: None,
            inputs: Shared::new(&mut self.inputs),
            outputs: Shared::new(&mut self.outputs),
            input_point: self.input_point,
            output_point: self.output_point,
            capacity,
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
    places: Range<usize>,
) {
    let grid = Grid::new(shape);
    let [in_blocks, out_blocks] = all_blocks(shape).map(|blocks| blocks.len());
    for at in places {
        let place = grid.place(first_tile + at);
        // SAFETY: the caller's promise.
        unsafe {
            for block in 0..in_blocks {
                L::call(TransformInput {
                    x: maps.x,
                    load: maps.load,
                    plane: place.picture * in_blocks + block,
                    grid,
                    place,
                    to: view.inputs.at((block * view.capacity + at) * BLOCK),
                    point: view.input_point,
                });
            }
            for block in 0..out_blocks {
                L::call(TransformOutputGradient {
                    dy: maps.dy,
                    plane: place.picture * out_blocks + block,
                    grid,
                    place,
                    to: view.outputs.at((block * view.capacity + at) * BLOCK),
                    point: view.output_point,
                });
            }
        }
    }
}

/// Adds the products of the transformed tiles in some places at one point, of some blocks of inputs and of outputs, to
/// their sums `[inputs, outputs]`.
///
/// # Safety
/// Instructions of `L`; the view holds the blocks of these tiles; nobody else writes the sums.
#[inline(always)]
unsafe fn add_point<L: Lanes>(
    view: TilesView,
    places: Range<usize>,
    point: usize,
    [inputs, outputs]: [Range<usize>; 2],
    sums: *mut f32,
    accumulate: bool,
) {
    let (columns, block) = (outputs.len() * BLOCK, view.capacity * BLOCK);
    let rows: Vec<_> = (0..inputs.len() * BLOCK)
        .map(|input| Row {
            a: input / BLOCK * block + input % BLOCK,
            c: input * columns,
        })
        .collect();
    for first in outputs.clone().step_by(view.group_blocks) {
        let blocks = view.group_blocks.min(outputs.end - first);
        let strides = Strides {
            a_inner: BLOCK,
            b_inner: BLOCK,
            b_block: block,
            c_block: BLOCK,
            matrices: view.matrices,
            b_follows: false,
        };
        let runs = Runs {
            offsets: &[(places.start * BLOCK, places.start * BLOCK)],
            length: places.len(),
        };
        // SAFETY: the caller's promise.
        unsafe {
            let a = view.inputs.at(point * view.input_point + inputs.start * block);
            let b = view.outputs.at(point * view.output_point + first * block);
            let c = sums.wrapping_add((first - outputs.start) * BLOCK);
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
        let (grid, sums_point) = (Grid::new(shape), sums_point(shape));
        let mut tiles = GradientTiles::new(shape, PART_CHUNK_TILES);
        // On the registers: with few channels packing would cost more than the matrix unit saves.
        let view = tiles.view(PART_CHUNK_TILES);
        // SAFETY: the caller promises the instructions; the scratch is this task's, and so are the sums of its part.
        unsafe {
            if first_tile == last_tile {
                for offset in 0..POINTS * sums_point {
                    *sums.at(start + offset) = 0.0;
                }
            }
            for first in (first_tile..last_tile).step_by(PART_CHUNK_TILES) {
                let chunk = first..last_tile.min(first + PART_CHUNK_TILES);
                transform_gradient_tiles::<L>(shape, maps, view, first, 0..chunk.len());
                for point in 0..POINTS {
                    let (places, sums) = (grid.having(point, &chunk), sums.at(start + point * sums_point));
                    add_point::<L>(view, places, point, all_blocks(shape), sums, first > first_tile);
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
        ..tiles.view(capacity)
    };
    let sums = Shared::new(sums);
    for first_tile in (0..shape.tiles()).step_by(capacity) {
        let count = capacity.min(shape.tiles() - first_tile);
        transform_tiles(isa, shape, maps, view, first_tile, count);
        parallel(POINTS, |point| {
            isa.run(AddPoint {
                shape,
                view,
                places: Grid::new(shape).having(point, &(first_tile..first_tile + count)),
                point,
                sums,
                accumulate: first_tile > 0,
            });
        });
    }
}

/// Transforms `count` tiles from `first_tile` on, on all threads.
fn transform_tiles(isa: Isa, shape: Shape, maps: Maps, view: TilesView, first_tile: usize, count: usize) {
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
}

struct TransformTiles<'a> {
    shape: Shape,
    maps: Maps<'a>,
    view: TilesView,
    first_tile: usize,
    places: Range<usize>,
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
    places: Range<usize>,
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
            places,
            point,
            sums,
            accumulate,
        } = self;
        // SAFETY: the caller promises the instructions; each task has a point of its own.
        unsafe {
            let sums = sums.at(point * sums_point(shape));
            add_point::<L>(view, places, point, all_blocks(shape), sums, accumulate);
        }
    }
}

/// Blocks of outputs whose taps are made at a time, and of inputs of a square of sums.
const GROUP: usize = 4;

/// Adds up the parts of sixteen inputs and a group of outputs, in order, and transforms them to taps.
struct GradientBlock<'a> {
    shape: Shape,
    /// All parts.
    sums: &'a [f32],
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
            dw,
            group,
            in_block,
        } = self;
        let out_blocks = shape.o.div_ceil(BLOCK);
        let (columns, size) = (out_blocks * BLOCK, POINTS * sums_point(shape));
        let points = Points {
            columns,
            point: sums_point(shape),
            parts: sums.len() / size,
            size,
        };
        let mut tile = WeightTile::new(shape.weight());
        for block in group * GROUP..out_blocks.min((group + 1) * GROUP) {
            let first = sums
                .as_ptr()
                .wrapping_add(in_block * BLOCK * columns + block * BLOCK);
            // SAFETY: the caller promises the instructions; `sums` holds whole parts; `dw` is a weight of
            // the shape, and this task alone writes the tiles of its blocks.
            unsafe {
                points.taps::<L>(first, &mut tile);
                tile.write::<L>(dw, block, in_block);
            }
        }
    }
}

/// How sums `[part][point][input][output]` lie: outputs of an input, floats from point to point, and parts of `size` floats.
#[derive(Clone, Copy)]
struct Points {
    columns: usize,
    point: usize,
    parts: usize,
    size: usize,
}

impl Points {
    /// `Gᵀ s G` of sixteen inputs and outputs from `first` on, parts added up in order.
    ///
    /// # Safety
    /// Instructions of `L`; the sums lie as they say.
    #[inline(always)]
    unsafe fn taps<L: Lanes>(self, first: *const f32, tile: &mut WeightTile) {
        for lane in 0..BLOCK {
            let first = first.wrapping_add(lane * self.columns);
            // SAFETY: the caller's promise.
            unsafe {
                let mut half = Half::<EDGE>::new();
                for column in 0..EDGE {
                    let mut s = [L::zero(); EDGE];
                    for (row, s) in s.iter_mut().enumerate() {
                        let at = first.wrapping_add((row * EDGE + column) * self.point);
                        for part in 0..self.parts {
                            *s = s.add(L::load(at.wrapping_add(part * self.size)));
                        }
                    }
                    half.write_column(column, points_to_kernel(s));
                }
                for row in 0..3 {
                    let values = points_to_kernel(half.row::<L, EDGE>(row));
                    for (column, value) in values.into_iter().enumerate() {
                        value.store(tile.outputs(lane, row * 3 + column).as_mut_ptr());
                    }
                }
            }
        }
    }
}

/// The taps of all channels, a square of them after another.
fn sum_by_squares(isa: Isa, shape: Shape, maps: Maps, dw: &mut [f32]) {
    let tiles = shape.tiles();
    let mut transformed = GradientTiles::new(shape, tiles);
    let view = transformed.view(tiles);
    transform_tiles(isa, shape, maps, view, 0, tiles);
    let dw = Shared::new(dw);
    let [in_groups, out_groups] = groups(shape);
    parallel(in_groups * out_groups, |task| {
        let groups = [task % in_groups, task / in_groups];
        isa.run(GradientSquare {
            shape,
            view,
            dw,
            groups,
        });
    });
}

/// The taps of a group of inputs and a group of outputs: their sums stay in a second-level cache.
struct GradientSquare {
    shape: Shape,
    view: TilesView,
    dw: Shared,
    /// Which of the inputs and of the outputs.
    groups: [usize; 2],
}

impl Kernel for GradientSquare {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            view,
            dw,
            groups: [in_group, out_group],
        } = self;
        let grid = Grid::new(shape);
        let [all_inputs, all_outputs] = all_blocks(shape);
        let inputs = in_group * GROUP..all_inputs.end.min((in_group + 1) * GROUP);
        let outputs = out_group * GROUP..all_outputs.end.min((out_group + 1) * GROUP);
        let columns = outputs.len() * BLOCK;
        let point = inputs.len() * BLOCK * columns + BLOCK;
        let mut sums = Buffer::take(POINTS * point);
        let points = Points {
            columns,
            point,
            parts: 1,
            size: 0,
        };
        let mut tile = WeightTile::new(shape.weight());
        // SAFETY: the caller promises the instructions; the scratch is this task's, which alone writes its tiles of `dw`.
        unsafe {
            for at in 0..POINTS {
                let sums = sums.as_mut_ptr().wrapping_add(at * point);
                add_point::<L>(
                    view,
                    grid.having(at, &(0..grid.tiles())),
                    at,
                    [inputs.clone(), outputs.clone()],
                    sums,
                    false,
                );
            }
            for in_block in inputs.clone() {
                for block in outputs.clone() {
                    let (row, column) = ((in_block - inputs.start) * BLOCK, (block - outputs.start) * BLOCK);
                    points.taps::<L>(sums.as_ptr().wrapping_add(row * columns + column), &mut tile);
                    tile.write::<L>(dw, block, in_block);
                }
            }
        }
    }
}
