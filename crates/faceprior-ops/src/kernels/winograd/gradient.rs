//! The weight gradient: sums over tiles.

use std::marker::PhantomData;
use std::ops::Range;

use super::super::lanes::{Isa, Kernel, Lanes, Parts};
use super::super::load::Load;
use super::super::tile::{Row, Runs, Strides, multiply};
use super::super::weights::WeightTile;
use super::super::{Shared, parallel};
use super::form::{Form, GradientForm, Maps};
use super::grid::Grid;
use super::matrices::{Half, KernelMatrix};
use super::tiles::StrideOne;
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
    let form = StrideOne {
        grid: Grid::new(shape),
    };
    sum(
        isa,
        form,
        Pair {
            x: Maps { x, load },
            dy,
        },
        dw,
    );
}

/// The gradient of the weight of the convolution that `form` is of.
pub(super) fn sum<F: GradientForm>(isa: Isa, form: F, maps: Pair, dw: &mut [f32]) {
    let (shape, tiles, [from, to]) = (form.grid().shape, form.grid().tiles(), form.planes());
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(maps.x.x.len(), shape.n * in_blocks * from);
    assert_eq!(maps.dy.len(), shape.n * out_blocks * to);
    assert_eq!(dw.len(), shape.i * shape.o * 9);

    // With few channels a part of the tiles has sums of its own, which stay in the cache while its tiles stream past: those
    // of all outputs, or of a share of them. With many, the sums are the large thing. Tasks divide them: all tiles at once
    // by channels, so that sums become taps where they are made, or, with more tiles than that suits, by points. Either way
    // a sum is one chain over all tiles.
    let size = POINTS * sums_point(shape);
    let [in_groups, out_groups] = groups(shape);
    let share_blocks = share_blocks(shape);
    if share_blocks < out_blocks
        && tiles * form.entries() <= SHARED_CHUNK_ENTRIES
        && in_groups * out_groups >= rayon::current_num_threads()
        && isa.matrices().is_none()
    {
        sum_by_squares(isa, form, maps, dw);
        return;
    }
    let shares = out_blocks.div_ceil(share_blocks.max(1));
    let parts = if share_blocks > 0 && shares <= MAX_SHARES {
        tiles.div_ceil(PART_TILES).min(MAX_PARTS / shares)
    } else {
        1
    };
    let mut sums = Buffer::take(parts * size);
    if parts == 1 {
        sum_by_points(isa, form, maps, &mut sums);
    } else {
        // No part is empty: there are more tiles than the square of parts.
        let part_tiles = tiles.div_ceil(parts);
        let all = Shared::new(&mut sums);
        parallel(parts * shares, |task| {
            let (part, share) = (task / shares, task % shares);
            isa.run(GradientPart {
                form,
                maps,
                sums: all,
                start: part * size,
                tiles: part * part_tiles..tiles.min((part + 1) * part_tiles),
                outputs: share * share_blocks..out_blocks.min((share + 1) * share_blocks),
            });
        });
    }

    let dw = Shared::new(dw);
    let sums = &sums;
    parallel(out_groups * in_blocks, |task| {
        let (group, in_block) = (task / in_blocks, task % in_blocks);
        isa.run(GradientBlock {
            taps: PhantomData::<F::Taps>,
            shape,
            sums,
            dw,
            group,
            in_block,
        });
    });
}

/// The input and the gradient of the output.
#[derive(Clone, Copy)]
pub(super) struct Pair<'a> {
    pub(super) x: Maps<'a>,
    pub(super) dy: &'a [f32],
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

/// Blocks of outputs whose sums a task may have for itself, or none: with its tiles, the sums of 64 inputs and 64 outputs stay
/// in a second-level cache of 2 MiB.
fn share_blocks(shape: Shape) -> usize {
    let fitting = 64 * 64 / (shape.i.next_multiple_of(BLOCK) * BLOCK);
    let all = shape.o.div_ceil(BLOCK);
    if fitting >= all {
        all
    } else {
        fitting / GROUP * GROUP
    }
}

const PART_TILES: usize = 128;
/// Parts, times shares.
const MAX_PARTS: usize = 16;
/// Shares of the outputs: each makes the entries of all inputs again.
const MAX_SHARES: usize = 4;

/// Entries of the inputs and output gradients of some tiles, for a sum over tiles.
///
/// `[entries][⌈C/16⌉][tiles][16]` each.
struct GradientTiles {
    inputs: Buffer,
    outputs: Buffer,
    input_entry: usize,
    output_entry: usize,
}

impl GradientTiles {
    fn new(form: impl Form, tiles: usize) -> Self {
        // A cache line more per entry: see `Chunk`.
        let Shape { i, o, .. } = form.grid().shape;
        let input_entry = i.div_ceil(BLOCK) * BLOCK * tiles + BLOCK;
        let output_entry = o.div_ceil(BLOCK) * BLOCK * tiles + BLOCK;
        let (inputs, outputs) = (
            Buffer::take(form.entries() * input_entry),
            Buffer::take(form.entries() * output_entry),
        );
        Self {
            inputs,
            outputs,
            input_entry,
            output_entry,
        }
    }

    /// For products of as many columns as are a task's, on the registers.
    fn view(&mut self, capacity: usize) -> TilesView {
        TilesView {
            group_blocks: GROUP,
            matrices: None,
            inputs: Shared::new(&mut self.inputs),
            outputs: Shared::new(&mut self.outputs),
            input_entry: self.input_entry,
            output_entry: self.output_entry,
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
    input_entry: usize,
    output_entry: usize,
    capacity: usize,
}

/// Makes the tiles `first_tile + from .. first_tile + to` of some blocks of inputs and of outputs into entries in places
/// `from .. to`.
///
/// # Safety
/// Instructions of `L`; maps and view are of the form; no other task writes these places.
#[inline(always)]
unsafe fn to_entries<L: Lanes>(
    form: impl GradientForm,
    maps: Pair,
    view: TilesView,
    first_tile: usize,
    places: Range<usize>,
    [inputs, outputs]: [Range<usize>; 2],
) {
    let grid = form.grid();
    let [in_blocks, out_blocks] = all_blocks(grid.shape).map(|blocks| blocks.len());
    for at in places {
        let place = grid.place(first_tile + at);
        let to = |block: usize| (block * view.capacity + at) * BLOCK;
        // SAFETY: the caller's promise.
        unsafe {
            for block in inputs.clone() {
                let plane = place.picture * in_blocks + block;
                form.read_tile::<L>(maps.x, plane, place, view.inputs.at(to(block)), view.input_entry);
            }
            for block in outputs.clone() {
                let (plane, to) = (place.picture * out_blocks + block, view.outputs.at(to(block)));
                form.read_gradient_tile::<L>(maps.dy, plane, place, to, view.output_entry);
            }
        }
    }
}

/// Adds the products at one point of some tiles' entries, in their places from the first on, of some blocks of inputs and of
/// outputs, to their sums `[inputs, outputs]`, of which rows are `columns` apart.
///
/// # Safety
/// Instructions of `L`; the view holds the blocks of these tiles; nobody else writes the sums.
#[inline(always)]
unsafe fn add_point<L: Lanes>(
    form: impl Form,
    view: TilesView,
    tiles: &Range<usize>,
    point: usize,
    [inputs, outputs]: [Range<usize>; 2],
    sums: *mut f32,
    columns: usize,
    accumulate: bool,
) {
    let block = view.capacity * BLOCK;
    let rows: Vec<_> = (0..inputs.len() * BLOCK)
        .map(|input| Row {
            a: input / BLOCK * block + input % BLOCK,
            c: input * columns,
        })
        .collect();
    let entries: Vec<_> = form.meeting(point, tiles).collect();
    for first in outputs.clone().step_by(view.group_blocks) {
        let blocks = view.group_blocks.min(outputs.end - first);
        let strides = Strides {
            a_inner: BLOCK,
            b_inner: BLOCK,
            b_block: block,
            c_block: BLOCK,
            matrices: view.matrices,
            b_next: None,
        };
        let (a, b) = (
            view.inputs.at(inputs.start * block),
            view.outputs.at(first * block),
        );
        let c = sums.wrapping_add((first - outputs.start) * BLOCK);
        let mut accumulate = accumulate;
        // Entries that as many tiles have are one product.
        for entries in entries.chunk_by(|(_, one), (_, next)| one.len() == next.len()) {
            let offsets: Vec<_> = entries
                .iter()
                .map(|(entry, having)| {
                    let place = having.start * BLOCK;
                    (
                        entry * view.input_entry + place,
                        entry * view.output_entry + place,
                    )
                })
                .collect();
            let runs = Runs {
                offsets: &offsets,
                length: entries[0].1.len(),
            };
            // SAFETY: the caller's promise.
            unsafe { multiply::<L>(&rows, blocks, runs, strides, a, b, c, accumulate) };
            accumulate = true;
        }
    }
}

/// A part of the tiles and some blocks of outputs, summed into sums of its own.
struct GradientPart<'a, F> {
    form: F,
    maps: Pair<'a>,
    sums: Shared,
    start: usize,
    tiles: Range<usize>,
    outputs: Range<usize>,
}

/// Entries that fit the second-level cache beside the sums of a part.
const PART_CHUNK_ENTRIES: usize = 32 * POINTS;

impl<F: GradientForm> Kernel for GradientPart<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            maps,
            sums,
            start,
            tiles,
            outputs,
        } = self;
        let shape = form.grid().shape;
        let (sums_point, capacity) = (sums_point(shape), PART_CHUNK_ENTRIES / form.entries());
        let mut scratch = GradientTiles::new(form, capacity);
        // On the registers: with few channels packing would cost more than the matrix unit saves.
        let view = scratch.view(capacity);
        let columns = shape.o.next_multiple_of(BLOCK);
        let blocks = [0..shape.i.div_ceil(BLOCK), outputs];
        let sums = sums.at(start + blocks[1].start * BLOCK);
        // SAFETY: the caller promises the instructions; the scratch is this task's, and so are the sums of its part and outputs.
        unsafe {
            for first in tiles.clone().step_by(capacity) {
                let chunk = first..tiles.end.min(first + capacity);
                to_entries::<L>(form, maps, view, first, 0..chunk.len(), blocks.clone());
                for point in 0..POINTS {
                    add_point::<L>(
                        form,
                        view,
                        &chunk,
                        point,
                        blocks.clone(),
                        sums.wrapping_add(point * sums_point),
                        columns,
                        first > tiles.start,
                    );
                }
            }
        }
    }
}

/// Pairs of an input and an output channel for which the matrix unit multiplies: with fewer, packing costs about what it
/// saves.
const MIN_UNIT_PAIRS: usize = 128 * 256;
/// Entries made before the points are summed, when all tiles share the sums.
const SHARED_CHUNK_ENTRIES: usize = 256 * POINTS;

/// All tiles summed into one copy of the sums, points divided between tasks.
fn sum_by_points<F: GradientForm>(isa: Isa, form: F, maps: Pair, sums: &mut [f32]) {
    let (shape, all_tiles) = (form.grid().shape, form.grid().tiles());
    let capacity = (SHARED_CHUNK_ENTRIES / form.entries()).min(all_tiles);
    let mut tiles = GradientTiles::new(form, capacity);
    let view = TilesView {
        group_blocks: isa.group_blocks(),
        matrices: isa.matrices().filter(|_| shape.i * shape.o >= MIN_UNIT_PAIRS),
        ..tiles.view(capacity)
    };
    let sums = Shared::new(sums);
    for first_tile in (0..all_tiles).step_by(capacity) {
        let chunk = first_tile..all_tiles.min(first_tile + capacity);
        all_to_entries(isa, form, maps, view, &chunk);
        parallel(POINTS, |point| {
            isa.run(AddPoint {
                form,
                view,
                tiles: &chunk,
                point,
                sums,
                accumulate: first_tile > 0,
            });
        });
    }
}

/// Makes tiles into entries, on all threads.
fn all_to_entries<F: GradientForm>(isa: Isa, form: F, maps: Pair, view: TilesView, tiles: &Range<usize>) {
    const TASK_TILES: usize = 8;
    parallel(tiles.len().div_ceil(TASK_TILES), |task| {
        isa.run(ToEntries {
            form,
            maps,
            view,
            first_tile: tiles.start,
            places: task * TASK_TILES..tiles.len().min((task + 1) * TASK_TILES),
        });
    });
}

struct ToEntries<'a, F> {
    form: F,
    maps: Pair<'a>,
    view: TilesView,
    first_tile: usize,
    places: Range<usize>,
}

impl<F: GradientForm> Kernel for ToEntries<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            maps,
            view,
            first_tile,
            places,
        } = self;
        // SAFETY: the caller promises the instructions; tasks have disjoint places.
        unsafe {
            to_entries::<L>(
                form,
                maps,
                view,
                first_tile,
                places,
                all_blocks(form.grid().shape),
            )
        }
    }
}

struct AddPoint<'a, F> {
    form: F,
    view: TilesView,
    tiles: &'a Range<usize>,
    point: usize,
    sums: Shared,
    accumulate: bool,
}

impl<F: Form> Kernel for AddPoint<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            view,
            tiles,
            point,
            sums,
            accumulate,
        } = self;
        let shape = form.grid().shape;
        // SAFETY: the caller promises the instructions; each task has a point of its own.
        unsafe {
            let sums = sums.at(point * sums_point(shape));
            let columns = shape.o.next_multiple_of(BLOCK);
            add_point::<L>(
                form,
                view,
                tiles,
                point,
                all_blocks(shape),
                sums,
                columns,
                accumulate,
            );
        }
    }
}

/// Blocks of outputs whose taps are made at a time, and of inputs of a square of sums.
const GROUP: usize = 4;

/// Adds up the parts of sixteen inputs and a group of outputs, in order, and transforms them to taps.
struct GradientBlock<'a, G> {
    taps: PhantomData<G>,
    shape: Shape,
    /// All parts.
    sums: &'a [f32],
    dw: Shared,
    group: usize,
    in_block: usize,
}

impl<G: KernelMatrix> Kernel for GradientBlock<'_, G> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            sums,
            dw,
            group,
            in_block,
            ..
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
                points.taps::<L, G>(first, &mut tile);
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
    unsafe fn taps<L: Lanes, G: KernelMatrix>(self, first: *const f32, tile: &mut WeightTile) {
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
                    half.write_column(column, G::points_to_taps(s));
                }
                for row in 0..3 {
                    let values = G::points_to_taps(half.row::<L, EDGE>(row));
                    for (column, value) in values.into_iter().enumerate() {
                        value.store(tile.outputs(lane, row * 3 + column).as_mut_ptr());
                    }
                }
            }
        }
    }
}

/// The taps of all channels, a square of them after another.
fn sum_by_squares<F: GradientForm>(isa: Isa, form: F, maps: Pair, dw: &mut [f32]) {
    let tiles = form.grid().tiles();
    let mut entries = GradientTiles::new(form, tiles);
    let view = entries.view(tiles);
    all_to_entries(isa, form, maps, view, &(0..tiles));
    let dw = Shared::new(dw);
    let [in_groups, out_groups] = groups(form.grid().shape);
    parallel(in_groups * out_groups, |task| {
        let groups = [task % in_groups, task / in_groups];
        isa.run(GradientSquare {
            form,
            view,
            dw,
            groups,
        });
    });
}

/// The taps of a group of inputs and a group of outputs: their sums stay in a second-level cache.
struct GradientSquare<F> {
    form: F,
    view: TilesView,
    dw: Shared,
    /// Which of the inputs and of the outputs.
    groups: [usize; 2],
}

impl<F: Form> Kernel for GradientSquare<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            form,
            view,
            dw,
            groups: [in_group, out_group],
        } = self;
        let grid = form.grid();
        let [all_inputs, all_outputs] = all_blocks(grid.shape);
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
        let mut tile = WeightTile::new(grid.shape.weight());
        // SAFETY: the caller promises the instructions; the scratch is this task's, which alone writes its tiles of `dw`.
        unsafe {
            for at in 0..POINTS {
                let sums = sums.as_mut_ptr().wrapping_add(at * point);
                let blocks = [inputs.clone(), outputs.clone()];
                add_point::<L>(form, view, &(0..grid.tiles()), at, blocks, sums, columns, false);
            }
            for in_block in inputs.clone() {
                for block in outputs.clone() {
                    let (row, column) = ((in_block - inputs.start) * BLOCK, (block - outputs.start) * BLOCK);
                    let first = sums.as_ptr().wrapping_add(row * columns + column);
                    points.taps::<L, F::Taps>(first, &mut tile);
                    tile.write::<L>(dw, block, in_block);
                }
            }
        }
    }
}
