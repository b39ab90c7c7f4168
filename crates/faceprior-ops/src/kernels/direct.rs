//! Convolution of any kernel and stride as an implicit matrix product.
//!
//! Rows of the product are neighbouring pixels, columns are output channels, and the inner dimension runs over the
//! kernel's taps and the input channels: nothing is unrolled in memory, the register tile finds each tap's pixels by
//! an offset. Borders are copied once around the input, so that no inner loop asks where it is; what the input goes
//! through on its way is done in the same copy.

use super::cells::{self, Grid};
use super::lanes::{Isa, Kernel, Lanes, Parts};
use super::load::{AsIs, Load, Read};
use super::panel::Panel;
use super::tile::{INNER, Row, Runs, Strides, UNROLLED, multiply, multiply_panel};
use super::weights::{Columns, WeightShape, WeightTile};
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// A convolution: `n` pictures of `h`×`w` pixels, `i` input and `o` output channels, square stride and padding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Geometry {
    pub(crate) n: usize,
    pub(crate) i: usize,
    pub(crate) o: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl Geometry {
    /// Height and width of the output.
    pub(crate) fn outputs(self) -> [usize; 2] {
        let [kh, kw] = self.kernel;
        let along = |size: usize, kernel: usize| (size + 2 * self.padding - kernel) / self.stride + 1;
        [along(self.h, kh), along(self.w, kw)]
    }

    pub(super) fn in_blocks(self) -> usize {
        self.i.div_ceil(BLOCK)
    }

    fn out_blocks(self) -> usize {
        self.o.div_ceil(BLOCK)
    }

    pub(super) fn taps(self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    fn weight(self) -> WeightShape {
        WeightShape {
            outputs: self.o,
            inputs: self.i,
            taps: self.taps(),
        }
    }

    /// A 1×1 convolution of stride 1 does not care which pixels are neighbours: one row of all.
    fn flattened(self) -> Self {
        if self.kernel == [1, 1] && self.stride == 1 && self.padding == 0 {
            Self {
                h: 1,
                w: self.h * self.w,
                ..self
            }
        } else {
            self
        }
    }
}

/// Planes of blocked pixels as a kernel reads them: within a border of zeros, [`Load`] applied.
pub(super) struct Source<'a> {
    x: &'a [f32],
    copy: Option<Buffer>,
    pub(super) h: usize,
    pub(super) w: usize,
}

impl Source<'_> {
    pub(super) fn values(&self) -> &[f32] {
        self.copy.as_deref().unwrap_or(self.x)
    }

    pub(super) fn plane(&self) -> usize {
        self.h * self.w * BLOCK
    }
}

/// Reads planes of `h`×`w` pixels once and wraps `before` and `after` rows and columns of zeros around each; where
/// there is nothing to do, the planes stay where they are.
pub(super) fn source<'a>(
    isa: Isa,
    x: &'a [f32],
    load: Option<Load>,
    [h, w]: [usize; 2],
    before: [usize; 2],
    after: [usize; 2],
) -> Source<'a> {
    let (padded_h, padded_w) = (before[0] + h + after[0], before[1] + w + after[1]);
    if load.is_none() && (padded_h, padded_w) == (h, w) {
        return Source { x, copy: None, h, w };
    }
    let gathered = [padded_h, padded_w];
    let copy = copy_planes(isa, x, load, [h, w], before, 1, [1; 2], gathered);
    Source {
        x,
        copy: Some(copy),
        h: padded_h,
        w: padded_w,
    }
}

/// All planes of a map by [`CopyPlane`].
fn copy_planes(
    isa: Isa,
    x: &[f32],
    load: Option<Load>,
    size: [usize; 2],
    before: [usize; 2],
    stride: usize,
    phases: [usize; 2],
    gathered: [usize; 2],
) -> Buffer {
    let planes = x.len() / (size[0] * size[1] * BLOCK);
    let length = phases[0] * phases[1] * gathered[0] * gathered[1] * BLOCK;
    let mut copy = Buffer::take(planes * length);
    let to = Shared::new(&mut copy);
    parallel(planes, |plane| {
        isa.run(CopyPlane {
            x,
            load,
            plane,
            size,
            before,
            stride,
            phases,
            first: [0; 2],
            gathered,
            to: to.at(plane * length),
        });
    });
    copy
}

/// One plane of a map within a border of zeros, [`Load`] applied, phase by phase: a phase has the pixels whose row and
/// column, counted from the border's first, are its own modulo the stride. With stride 1 there is one.
pub(super) struct CopyPlane<'a> {
    pub(super) x: &'a [f32],
    pub(super) load: Option<Load<'a>>,
    pub(super) plane: usize,
    pub(super) size: [usize; 2],
    pub(super) before: [usize; 2],
    pub(super) stride: usize,
    /// How many phases of rows and of columns are copied.
    pub(super) phases: [usize; 2],
    /// The first row and pixel of a phase that are copied, and how many of each.
    pub(super) first: [usize; 2],
    pub(super) gathered: [usize; 2],
    /// Room for the phases, which nobody else writes.
    pub(super) to: *mut f32,
}

impl CopyPlane<'_> {
    /// The copied rows (axis 0) or pixels (axis 1) of a phase that lie in the map.
    #[inline(always)]
    fn inside(&self, axis: usize, phase: usize) -> [usize; 2] {
        let (first, count) = (self.first[axis], self.gathered[axis]);
        let place = |at: usize| at.saturating_sub(phase).div_ceil(self.stride);
        [self.before[axis], self.before[axis] + self.size[axis]]
            .map(|at| place(at).saturating_sub(first).min(count))
    }

    /// # Safety
    /// The processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn copy<L: Lanes>(&self, values: impl Read<L>) {
        let ([h, w], [top, left], [rows, pixels]) = (self.size, self.before, self.gathered);
        let from = self.x.as_ptr().wrapping_add(self.plane * h * w * BLOCK);
        let mut to = self.to;
        for phase_y in 0..self.phases[0] {
            let [first_row, end_row] = self.inside(0, phase_y);
            for phase_x in 0..self.phases[1] {
                let [first, end] = self.inside(1, phase_x);
                // SAFETY: the caller's promise; what lies inside is a pixel of the map, and it and the zeros between
                // fill the phase.
                unsafe {
                    let mut filled = 0;
                    for row in first_row..end_row {
                        for zero in filled..row * pixels + first {
                            L::zero().store(to.wrapping_add(zero * BLOCK));
                        }
                        let y = (self.first[0] + row) * self.stride + phase_y - top;
                        for pixel in first..end {
                            let x = (self.first[1] + pixel) * self.stride + phase_x - left;
                            let value = values.read(from.wrapping_add((y * w + x) * BLOCK));
                            value.store(to.wrapping_add((row * pixels + pixel) * BLOCK));
                        }
                        filled = row * pixels + end;
                    }
                    for zero in filled..rows * pixels {
                        L::zero().store(to.wrapping_add(zero * BLOCK));
                    }
                }
                to = to.wrapping_add(rows * pixels * BLOCK);
            }
        }
    }
}

impl Kernel for CopyPlane<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller promises the instructions.
        unsafe {
            match self.load {
                Some(load) => self.copy::<L>(load.plane::<L>(self.plane)),
                None => self.copy::<L>(AsIs),
            }
        }
    }
}

/// The pixels that the taps of a convolution read, gathered by the phases of [`CopyPlane`]: planes
/// `[plane][phase][rows][pixels][16]`, where each tap reads neighbours.
struct Phases<'a> {
    source: Source<'a>,
    /// Phases of rows and of columns: where the kernel is smaller than the stride, some are never read.
    counts: [usize; 2],
    stride: usize,
}

impl<'a> Phases<'a> {
    fn new(isa: Isa, g: Geometry, x: &'a [f32], load: Option<Load>) -> Self {
        let s = g.stride;
        if s == 1 {
            return Self {
                source: source(isa, x, load, [g.h, g.w], [g.padding; 2], [g.padding; 2]),
                counts: [1, 1],
                stride: 1,
            };
        }
        let ([oh, ow], [kh, kw]) = (g.outputs(), g.kernel);
        let (h, w) = (oh + (kh - 1) / s, ow + (kw - 1) / s);
        let counts = [kh.min(s), kw.min(s)];
        let copy = copy_planes(isa, x, load, [g.h, g.w], [g.padding; 2], s, counts, [h, w]);
        Self {
            source: Source {
                x,
                copy: Some(copy),
                h,
                w,
            },
            counts,
            stride: s,
        }
    }

    fn plane(&self) -> usize {
        self.counts[0] * self.counts[1] * self.source.plane()
    }

    /// Where in a plane a tap reads for the first output.
    fn tap(&self, [ky, kx]: [usize; 2]) -> usize {
        let s = self.stride;
        let phase = ky % s * self.counts[1] + kx % s;
        phase * self.source.plane() + (ky / s * self.source.w + kx / s) * BLOCK
    }
}

/// Channels of one run of the inner dimension. With a single block on the inner side only its real channels are kept,
/// so that three colours cost three terms and not sixteen.
fn run_length(inner: usize) -> usize {
    inner.min(BLOCK)
}

/// The columns of a product with a weight: for each block of the inner side and each tap one run.
///
/// A convolution's columns are output channels, its data gradient's are input channels.
fn panel(shape: WeightShape, side: Columns) -> Panel {
    let (columns, inner) = side.sides(shape);
    Panel {
        runs: inner.div_ceil(BLOCK) * shape.taps,
        length: run_length(inner),
        blocks: columns.div_ceil(BLOCK),
    }
}

/// Packs a weight.
fn pack(isa: Isa, weight: &[f32], shape: WeightShape, side: Columns) -> Buffer {
    let (columns, inner) = side.sides(shape);
    assert_eq!(weight.len(), columns * inner * shape.taps);
    let panel = panel(shape, side);
    let mut values = Buffer::take(panel.size());
    let to = Shared::new(&mut values);
    let inner_blocks = inner.div_ceil(BLOCK);
    parallel(panel.blocks * inner_blocks, |task| {
        isa.run(PackBlock {
            weight,
            shape,
            side,
            panel,
            to,
            block: task / inner_blocks,
            inner_block: task % inner_blocks,
        });
    });
    values
}

/// Sixteen columns of sixteen channels.
struct PackBlock<'a> {
    weight: &'a [f32],
    shape: WeightShape,
    side: Columns,
    panel: Panel,
    to: Shared,
    block: usize,
    inner_block: usize,
}

impl Kernel for PackBlock<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            weight,
            shape,
            side,
            panel,
            to,
            block,
            inner_block,
        } = self;
        let start = panel.start(block) + inner_block * shape.taps * panel.length * BLOCK;
        let mut tile = WeightTile::new(shape);
        // SAFETY: the caller promises the instructions; each task writes the rows and columns of its blocks, inside
        // the buffer by its size.
        unsafe {
            side.read::<L>(&mut tile, weight, block, inner_block);
            for tap in 0..shape.taps {
                for row in 0..panel.length {
                    let lanes = L::load(side.row(&mut tile, row, tap));
                    lanes.store(to.at(start + (tap * panel.length + row) * BLOCK));
                }
            }
        }
    }
}

/// Rows of output pixels that one task computes, so that all threads have several.
fn rows_per_task(rows: usize, other_tasks: usize) -> usize {
    let wanted = (2 * rayon::current_num_threads()).div_ceil(other_tasks);
    rows.div_ceil(wanted.min(rows))
}

/// The length of nearly equal parts that are no longer than `most`.
fn even(length: usize, most: usize) -> usize {
    length.div_ceil(length.div_ceil(most))
}

/// The parts of floats where [`forward`] is computed by [`cells`], where rows share their borders: no output lies in them
/// alone.
fn on_matrix_unit(isa: Isa, geometry: Geometry) -> Option<Parts> {
    let Geometry {
        i,
        o,
        kernel,
        stride,
        padding,
        ..
    } = geometry;
    cells::parts(isa, [i, o], geometry.taps(), stride).filter(|_| padding < kernel[1])
}

/// The weight of a convolution, `[O, I, kh, kw]`, as [`forward`] reads it.
pub(crate) fn prepare(isa: Isa, geometry: Geometry, weight: &[f32]) -> Buffer {
    if let Some(parts) = on_matrix_unit(isa, geometry) {
        let taps: Vec<_> = (0..geometry.taps()).collect();
        return cells::pack(isa, parts, weight, geometry.weight(), Columns::Outputs, &taps);
    }
    pack(isa, weight, geometry.weight(), Columns::Outputs)
}

/// The convolution of `x` `[N, ⌈I/16⌉, H, W, 16]` with a prepared weight.
pub(crate) fn forward(
    isa: Isa,
    geometry: Geometry,
    x: &[f32],
    load: Option<Load>,
    weight: &[f32],
    y: &mut [f32],
) {
    let g = geometry.flattened();
    let [oh, ow] = g.outputs();
    assert_eq!(x.len(), g.n * g.in_blocks() * g.h * g.w * BLOCK);
    assert_eq!(y.len(), g.n * g.out_blocks() * oh * ow * BLOCK);
    let outputs = Outputs {
        y: Shared::new(y),
        plane: oh * ow * BLOCK,
        first: 0,
        row: ow * BLOCK,
        pixel: BLOCK,
        rows: oh,
        pixels: ow,
    };
    if let Some(parts) = on_matrix_unit(isa, g) {
        let border = [g.padding; 2];
        let grid = Grid::new(parts, [g.n, g.in_blocks()], [g.h, g.w], border, border, g.stride);
        let taps: Vec<_> = (0..g.taps())
            .map(|tap| (tap / g.kernel[1], tap % g.kernel[1]))
            .collect();
        let product = cells::Product {
            grid,
            source: cells::Source::Maps(cells::Maps { x, load }),
            taps: &taps,
            weight,
            blocks: g.out_blocks(),
            outputs,
        };
        product.run(isa);
        return;
    }
    let panel = panel(g.weight(), Columns::Outputs);
    assert_eq!(weight.len(), panel.size());
    let taps = (0..g.taps())
        .map(|tap| (tap, [tap / g.kernel[1], tap % g.kernel[1]]))
        .collect();
    // A single tap reads no pixels between those that outputs start at.
    let (step, stride) = if g.taps() == 1 {
        (g.stride, 1)
    } else {
        (1, g.stride)
    };
    let product = Product {
        x,
        load,
        size: [g.h, g.w],
        before: [g.padding; 2],
        step,
        stride,
        source_blocks: g.in_blocks(),
        panel,
        weight,
        phases: &[Phase { taps, outputs }],
    };
    product.run(isa, g.n);
}

/// The gradient of the input from the gradient of the output.
///
/// Input pixels of one phase (row and column modulo the stride) meet the same taps, so that each phase is a
/// convolution of stride 1 over the output's gradient.
pub(crate) fn data_gradient(isa: Isa, geometry: Geometry, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
    let g = geometry.flattened();
    let [oh, ow] = g.outputs();
    assert_eq!(dy.len(), g.n * g.out_blocks() * oh * ow * BLOCK);
    assert_eq!(dx.len(), g.n * g.in_blocks() * g.h * g.w * BLOCK);
    let [kh, kw] = g.kernel;
    let s = g.stride;
    // Input row s·m + phase takes output row m + distance through a tap, where the division is exact.
    let distances = |kernel: usize, phase: usize| {
        let exact = move |tap: usize| (phase + g.padding) as isize - tap as isize;
        (0..kernel)
            .filter(move |tap| exact(*tap) % s as isize == 0)
            .map(move |tap| (tap, exact(tap) / s as isize))
    };
    // How far outside the output's gradient the phases look.
    let borders = |kernel: usize, size: usize, outputs: usize| {
        let (mut before, mut after) = (0, 0);
        for phase in 0..s.min(size) {
            let last = ((size - phase).div_ceil(s) - 1) as isize;
            for (_, distance) in distances(kernel, phase) {
                before = before.max(-distance);
                after = after.max(last + distance - (outputs as isize - 1));
            }
        }
        (before as usize, after as usize)
    };
    let ((top, bottom), (left, right)) = (borders(kh, g.h, oh), borders(kw, g.w, ow));
    let cells = cells::parts(isa, [g.o, g.i], g.taps(), 1).map(|parts| {
        let grid = Grid::new(
            parts,
            [g.n, g.out_blocks()],
            [oh, ow],
            [top, left],
            [bottom, right],
            1,
        );
        (parts, grid, grid.split(isa, dy))
    });
    let packed = if cells.is_some() {
        // Only phases without taps are left, if any, which read nothing.
        Buffer::take(0)
    } else {
        pack(isa, weight, g.weight(), Columns::Inputs)
    };
    let dx = Shared::new(dx);
    let mut phases = Vec::new();
    for phase_y in 0..s.min(g.h) {
        for phase_x in 0..s.min(g.w) {
            let (taps, places): (Vec<_>, Vec<_>) = distances(kh, phase_y)
                .flat_map(|y| distances(kw, phase_x).map(move |x| (y, x)))
                .map(|((ky, dy), (kx, dx))| {
                    let (row, column) = ((top as isize + dy) as usize, (left as isize + dx) as usize);
                    (ky * kw + kx, (row, column))
                })
                .unzip();
            let outputs = Outputs {
                y: dx,
                plane: g.h * g.w * BLOCK,
                first: (phase_y * g.w + phase_x) * BLOCK,
                row: s * g.w * BLOCK,
                pixel: s * BLOCK,
                rows: (g.h - phase_y).div_ceil(s),
                pixels: (g.w - phase_x).div_ceil(s),
            };
            if let (Some((parts, grid, cells)), false) = (&cells, taps.is_empty()) {
                let product = cells::Product {
                    grid: *grid,
                    source: cells::Source::Cells(cells),
                    taps: &places,
                    weight: &cells::pack(isa, *parts, weight, g.weight(), Columns::Inputs, &taps),
                    blocks: g.in_blocks(),
                    outputs,
                };
                product.run(isa);
                continue;
            }
            let places = places.into_iter().map(|(row, column)| [row, column]);
            let taps = taps.into_iter().zip(places).collect();
            phases.push(Phase { taps, outputs });
        }
    }
    let product = Product {
        x: dy,
        load: None,
        size: [oh, ow],
        before: [top, left],
        step: 1,
        stride: 1,
        source_blocks: g.out_blocks(),
        panel: panel(g.weight(), Columns::Inputs),
        weight: &packed,
        phases: &phases,
    };
    product.run(isa, g.n);
}

/// The output pixels of a product: all of a map, or those of a phase.
#[derive(Clone, Copy)]
pub(super) struct Outputs {
    /// The map.
    pub(super) y: Shared,
    pub(super) plane: usize,
    /// Offset of the first pixel in a plane, and distances between rows and pixels.
    pub(super) first: usize,
    pub(super) row: usize,
    pub(super) pixel: usize,
    pub(super) rows: usize,
    pub(super) pixels: usize,
}

/// An implicit product over maps in an endless border of zeros: for each output pixel, the sum over taps and source
/// channels.
#[derive(Clone, Copy)]
struct Product<'a> {
    /// Maps `[N, blocks, H, W, 16]`, and how they are read.
    x: &'a [f32],
    load: Option<Load<'a>>,
    source_blocks: usize,
    size: [usize; 2],
    /// Rows and columns of the border before the map, at which the taps of the first output start.
    before: [usize; 2],
    /// Of rows and columns only every so many-th is read.
    step: usize,
    /// Rows and columns, of those that are read, between outputs.
    stride: usize,
    panel: Panel,
    weight: &'a [f32],
    phases: &'a [Phase],
}

/// Output pixels that meet the same taps.
struct Phase {
    /// Each tap that takes part, and the row and column that it reads for the first output.
    taps: Vec<(usize, [usize; 2])>,
    outputs: Outputs,
}

/// Floats that a task copies of its maps, at most, so that they stay in the second-level cache: 512 KiB.
const WINDOW: usize = 128 << 10;

/// Pixels of a task, whose sums go back to memory between parts of the inner dimension: 64 channels of them take 64 KiB.
const TASK_PIXELS: usize = 252;

impl Product<'_> {
    fn run(self, isa: Isa, n: usize) {
        // The largest; others are a row or a pixel smaller. A task has the same part of each.
        let sizes = self.phases.iter().map(|phase| phase.outputs);
        let Some(rows) = sizes.clone().map(|outputs| outputs.rows).max() else {
            return;
        };
        let pixels = sizes.map(|outputs| outputs.pixels).max().unwrap_or(0);
        let [reach_y, reach_x] = self.reach();
        // As many outputs along one axis as a window so wide along the other has room for.
        let fitting = |outputs: usize, width: usize, reach: usize| {
            let room = WINDOW / (self.source_blocks * BLOCK * width);
            outputs.min((room.saturating_sub(reach) / self.stride).max(1))
        };
        let most_pixels = fitting(pixels, reach_y + 1, reach_x).min(TASK_PIXELS);
        let most_rows = fitting(rows, (most_pixels - 1) * self.stride + reach_x + 1, reach_y)
            .min((TASK_PIXELS / most_pixels).max(1));
        // A window serves all columns, unless there are too few of them for all threads.
        let group_blocks = isa.group_blocks();
        let groups = self.panel.blocks.div_ceil(group_blocks);
        let windows = n * rows.div_ceil(most_rows) * pixels.div_ceil(most_pixels);
        let wanted = (2 * rayon::current_num_threads()).div_ceil(windows);
        let task_blocks = even(groups, groups.div_ceil(wanted)) * group_blocks;
        let group_tasks = self.panel.blocks.div_ceil(task_blocks);
        let task_rows = even(rows, most_rows.min(rows_per_task(rows, n * group_tasks)));
        let row_tasks = rows.div_ceil(task_rows);
        // A long row, as of a flattened 1×1 convolution, is divided too.
        let most_pixels = if rows == 1 {
            most_pixels.min(rows_per_task(pixels, n * group_tasks).max(24))
        } else {
            most_pixels
        };
        let task_pixels = even(pixels, most_pixels);
        let pixel_tasks = pixels.div_ceil(task_pixels);
        parallel(n * row_tasks * pixel_tasks * group_tasks, |task| {
            let (task, group) = (task / group_tasks, task % group_tasks);
            let (task, pixel_task) = (task / pixel_tasks, task % pixel_tasks);
            let (picture, row_task) = (task / row_tasks, task % row_tasks);
            let part = |size: usize, task: usize, length: usize| task * length..size.min((task + 1) * length);
            isa.run(ProductTask {
                product: self,
                picture,
                blocks: part(self.panel.blocks, group, task_blocks),
                rows: part(rows, row_task, task_rows),
                pixels: part(pixels, pixel_task, task_pixels),
            });
        });
    }

    /// How far behind an output's first row and column its last taps read.
    fn reach(&self) -> [usize; 2] {
        let places = self
            .phases
            .iter()
            .flat_map(|phase| &phase.taps)
            .map(|(_, place)| place);
        [0, 1].map(|axis| places.clone().map(|place| place[axis]).max().unwrap_or(0))
    }
}

/// Some output pixels of some columns.
struct ProductTask<'a> {
    product: Product<'a>,
    picture: usize,
    blocks: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
    pixels: std::ops::Range<usize>,
}

impl Kernel for ProductTask<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            product: p,
            picture,
            blocks,
            rows,
            pixels,
        } = self;
        let reach = p.reach();
        let [first_row, first_pixel] = [rows.start, pixels.start].map(|output| output * p.stride);
        let window @ [height, width] = [(rows.len(), reach[0]), (pixels.len(), reach[1])]
            .map(|(outputs, reach)| (outputs - 1) * p.stride + reach + 1);
        let first_plane = picture * p.source_blocks;
        let in_place = p.load.is_none()
            && p.before == [0; 2]
            && p.step == 1
            && first_row + height <= p.size[0]
            && first_pixel + width <= p.size[1];
        let mut copy;
        // Where the window starts, and floats of a row and a plane of what it is part of.
        let (a, row_floats, plane_floats) = if in_place {
            let [h, w] = p.size;
            let first = (first_plane * h + first_row) * w + first_pixel;
            (p.x.as_ptr().wrapping_add(first * BLOCK), w * BLOCK, h * w * BLOCK)
        } else {
            copy = Buffer::take(p.source_blocks * height * width * BLOCK);
            for block in 0..p.source_blocks {
                // SAFETY: the caller promises the instructions; the buffer has room for each block.
                unsafe {
                    L::call(CopyPlane {
                        x: p.x,
                        load: p.load,
                        plane: first_plane + block,
                        size: p.size,
                        before: p.before,
                        stride: p.step,
                        phases: [1; 2],
                        first: [first_row, first_pixel],
                        gathered: window,
                        to: copy.as_mut_ptr().wrapping_add(block * height * width * BLOCK),
                    });
                }
            }
            (copy.as_ptr(), width * BLOCK, height * width * BLOCK)
        };
        let num_taps = p.panel.runs / p.source_blocks;
        for Phase { taps, outputs } in p.phases {
            let mut runs = Vec::with_capacity(p.source_blocks * taps.len());
            for block in 0..p.source_blocks {
                for (tap, [row, column]) in taps {
                    let run = (block * num_taps + tap) * p.panel.length * BLOCK;
                    runs.push((block * plane_floats + row * row_floats + column * BLOCK, run));
                }
            }
            let follows = taps.len() == num_taps;
            let mut places = Vec::with_capacity(rows.len() * pixels.len());
            for row in rows.start..rows.end.min(outputs.rows) {
                for pixel in pixels.start..pixels.end.min(outputs.pixels) {
                    places.push(Row {
                        a: (row - rows.start) * p.stride * row_floats
                            + (pixel - pixels.start) * p.stride * BLOCK,
                        c: row * outputs.row + pixel * outputs.pixel,
                    });
                }
            }
            let first_plane = picture * p.panel.blocks + blocks.start;
            let c = outputs.y.at(first_plane * outputs.plane + outputs.first);
            // SAFETY: the caller promises the instructions. The window has every tap of every output; tasks write disjoint
            // pixels and channels of `y`.
            unsafe {
                multiply_panel::<L>(
                    &places,
                    &runs,
                    a,
                    p.panel,
                    p.weight.as_ptr(),
                    blocks.start,
                    blocks.len(),
                    c,
                    outputs.plane,
                    follows,
                    false,
                );
            }
        }
    }
}

/// Pictures are summed in at most this many parts.
const MAX_PARTS: usize = 16;
/// Pixels that a part has at least: writing its sums and adding them up must not cost more than making them.
const MIN_PART_PIXELS: usize = 512;
/// Floats that the sums of all parts may take.
const MAX_SUM_FLOATS: usize = 16 << 20;
/// Pairs of an input and an output channel for which the matrix unit makes weight gradients: with fewer, packing costs
/// more than it saves.
const MIN_UNIT_PAIRS: usize = 256 * 256;
/// Sums of each output channel that pay for joining the rows of its gradient.
const MIN_JOINED_SUMS: usize = 64;
/// Pixels of the inner dimension for each time a sum is loaded and stored.
const CHUNK_PIXELS: usize = INNER;
/// The same on the matrix unit.
const UNIT_CHUNK_PIXELS: usize = 512;

/// The gradient of the weight, `dw` `[O, I, kh, kw]`, from the input and the gradient of the output.
pub(crate) fn weight_gradient(
    isa: Isa,
    geometry: Geometry,
    x: &[f32],
    load: Option<Load>,
    dy: &[f32],
    dw: &mut [f32],
) {
    let g = geometry.flattened();
    let [oh, ow] = g.outputs();
    assert_eq!(x.len(), g.n * g.in_blocks() * g.h * g.w * BLOCK);
    assert_eq!(dy.len(), g.n * g.out_blocks() * oh * ow * BLOCK);
    assert_eq!(dw.len(), g.o * g.i * g.taps());
    let phases = Phases::new(isa, g, x, load);
    let inputs = if g.in_blocks() == 1 {
        g.i
    } else {
        g.in_blocks() * BLOCK
    };
    // With zeros to make its rows as long as the input's, all pixels of a picture are one run, whatever the tap; where
    // few sums are made of each pixel, copying it costs more than short runs.
    let padding = if g.taps() * inputs >= MIN_JOINED_SUMS {
        phases.source.w - ow
    } else {
        0
    };
    let dy = source(isa, dy, None, [oh, ow], [0; 2], [0, padding]);

    // Sums are `[part][group of outputs][tap][input][output]`: those of a task lie together. The parts depend on the shape
    // alone, not on the number of threads.
    let columns = g.out_blocks() * BLOCK;
    let size = g.taps() * inputs * columns;
    let worthwhile = (g.n * oh * ow / MIN_PART_PIXELS).min((MAX_SUM_FLOATS / size).min(MAX_PARTS));
    let parts = worthwhile.clamp(1, g.n);
    let part_pictures = g.n.div_ceil(parts);
    let matrices = isa.matrices().filter(|_| g.i * g.o >= MIN_UNIT_PAIRS);
    let group_blocks = isa.group_blocks().min(g.out_blocks());
    // A small map has few parts but wide weights: then every tap is a task. So it is on the matrix unit, where sums that
    // do not stay in the cache would be most of the work.
    let tap_tasks = if oh * ow <= CHUNK_PIXELS || matrices.is_some() {
        g.taps()
    } else {
        1
    };
    let mut sums = Buffer::take(parts * size);
    let shared = Shared::new(&mut sums);
    let groups = g.out_blocks().div_ceil(group_blocks);
    parallel(parts * groups * tap_tasks, |task| {
        let (task, tap_task) = (task / tap_tasks, task % tap_tasks);
        let (part, group) = (task / groups, task % groups);
        let tap_length = g.taps() / tap_tasks;
        isa.run(WeightGradientTask {
            group_blocks,
            matrices,
            geometry: g,
            phases: &phases,
            dy: &dy,
            sums: shared,
            start: part * size,
            inputs,
            group,
            taps: tap_task * tap_length..(tap_task + 1) * tap_length,
            pictures: (part * part_pictures).min(g.n)..((part + 1) * part_pictures).min(g.n),
        });
    });

    let (dw, sums) = (Shared::new(dw), &*sums);
    parallel(g.out_blocks() * g.in_blocks(), |task| {
        let (out_block, in_block) = (task / g.in_blocks(), task % g.in_blocks());
        isa.run(SumParts {
            geometry: g,
            group_blocks,
            sums,
            size,
            inputs,
            dw,
            out_block,
            in_block,
        });
    });
}

/// Adds up the parts of sixteen inputs and outputs, in order.
struct SumParts<'a> {
    geometry: Geometry,
    group_blocks: usize,
    sums: &'a [f32],
    size: usize,
    inputs: usize,
    dw: Shared,
    out_block: usize,
    in_block: usize,
}

impl Kernel for SumParts<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            geometry: g,
            group_blocks,
            sums,
            size,
            inputs,
            dw,
            out_block,
            in_block,
        } = self;
        let mut tile = WeightTile::new(g.weight());
        let first_block = out_block / group_blocks * group_blocks;
        let columns = group_blocks.min(g.out_blocks() - first_block) * BLOCK;
        let start = first_block * BLOCK * g.taps() * inputs + (out_block - first_block) * BLOCK;
        // SAFETY: the caller promises the instructions; sums are `[part][group][tap][input][output]`; each task writes
        // the tile of its blocks.
        unsafe {
            for tap in 0..g.taps() {
                for lane in 0..BLOCK.min(inputs - in_block * BLOCK) {
                    let first = start + (tap * inputs + in_block * BLOCK + lane) * columns;
                    let mut total = L::zero();
                    for part in sums.chunks_exact(size) {
                        total = total.add(L::load(part[first..first + BLOCK].as_ptr()));
                    }
                    total.store(tile.outputs(lane, tap).as_mut_ptr());
                }
            }
            tile.write::<L>(dw, out_block, in_block);
        }
    }
}

struct WeightGradientTask<'a> {
    group_blocks: usize,
    matrices: Option<Parts>,
    geometry: Geometry,
    phases: &'a Phases<'a>,
    dy: &'a Source<'a>,
    sums: Shared,
    start: usize,
    inputs: usize,
    group: usize,
    taps: std::ops::Range<usize>,
    pictures: std::ops::Range<usize>,
}

impl Kernel for WeightGradientTask<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            group_blocks,
            matrices,
            geometry: g,
            phases,
            dy,
            sums,
            start,
            inputs,
            group,
            taps,
            pictures,
        } = self;
        let [oh, ow] = g.outputs();
        let first_block = group * group_blocks;
        let blocks = group_blocks.min(g.out_blocks() - first_block);
        let strides = Strides {
            a_inner: BLOCK,
            b_inner: BLOCK,
            b_block: dy.plane(),
            c_block: BLOCK,
            matrices,
            b_follows: false,
        };
        let rows: Vec<_> = (taps.start * inputs..taps.end * inputs)
            .map(|row| {
                let (tap, input) = (row / inputs, row % inputs);
                let tap = phases.tap([tap / g.kernel[1], tap % g.kernel[1]]);
                Row {
                    a: input / BLOCK * phases.plane() + tap + input % BLOCK,
                    c: row * blocks * BLOCK,
                }
            })
            .collect();
        // SAFETY: the caller promises the instructions. Every tap of every output pixel lies inside the padded
        // source; this task alone writes its columns of its part's sums.
        unsafe {
            let sums = sums.at(start + first_block * BLOCK * g.taps() * inputs);
            for row in &rows {
                for block in 0..blocks {
                    L::zero().store(sums.wrapping_add(row.c + block * BLOCK));
                }
            }
            // Rows of the map that follow each other without a gap in both operands are one run. A chunk is some whole runs
            // or a piece of one.
            let chunk = if matrices.is_some() {
                UNIT_CHUNK_PIXELS
            } else {
                CHUNK_PIXELS
            };
            let (rows_joined, pixels) = if dy.w == phases.source.w {
                (oh, (oh - 1) * dy.w + ow)
            } else {
                (1, ow)
            };
            let chunk_runs = (chunk / pixels).max(1);
            let pieces = pixels.div_ceil(chunk);
            let piece = pixels.div_ceil(pieces).next_multiple_of(UNROLLED);
            let picture_runs = oh / rows_joined;
            let start = |run: usize, planes: usize, source: &Source, plane: usize| {
                let (picture, row) = (run / picture_runs, run % picture_runs * rows_joined);
                picture * planes * plane + row * source.w * BLOCK
            };
            let x = phases.source.values().as_ptr();
            let gradient = dy.values().as_ptr().wrapping_add(first_block * dy.plane());
            let mut offsets = Vec::with_capacity(chunk_runs);
            let end = pictures.end * picture_runs;
            for first in (pictures.start * picture_runs..end).step_by(chunk_runs) {
                for pixel in (0..pixels).step_by(piece) {
                    offsets.clear();
                    for run in first..end.min(first + chunk_runs) {
                        offsets.push((
                            start(run, g.in_blocks(), &phases.source, phases.plane()) + pixel * BLOCK,
                            start(run, g.out_blocks(), dy, dy.plane()) + pixel * BLOCK,
                        ));
                    }
                    let runs = Runs {
                        offsets: &offsets,
                        length: piece.min(pixels - pixel),
                    };
                    multiply::<L>(&rows, blocks, runs, strides, x, gradient, sums, true);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{
        block, instruction_sets, naive_forward, naive_gradients, normal, relative_rms, unblock,
    };

    /// With two parts for a float, products are within 2⁻¹⁵ at most.
    fn bound(isa: Isa) -> f64 {
        if isa.matrices() == Some(Parts::Two) {
            5e-6
        } else {
            1e-6
        }
    }

    #[test]
    fn agrees_with_float64_on_every_instruction_set() {
        for isa in instruction_sets() {
            let bound = bound(isa);
            for (n, i, o, h, w, kernel, stride, padding) in [
                (2, 3, 64, 12, 9, [3, 3], 1, 1),
                (1, 6, 16, 5, 7, [3, 3], 1, 1),
                (3, 32, 40, 9, 8, [3, 3], 2, 1),
                (2, 17, 96, 7, 7, [3, 3], 2, 1),
                (2, 32, 64, 6, 5, [1, 1], 1, 0),
                (2, 16, 33, 7, 6, [1, 1], 2, 0),
                (1, 10, 16, 9, 11, [3, 3], 1, 0),
                (2, 3, 20, 15, 14, [7, 7], 2, 3),
                (1, 48, 64, 3, 3, [2, 2], 1, 0),
                (2, 20, 3, 4, 4, [1, 1], 1, 0),
                (1, 16, 16, 2, 2, [1, 1], 3, 0),
                (1, 1, 1, 1, 1, [3, 3], 2, 1),
                (2, 40, 72, 41, 37, [3, 3], 2, 1),
                (5, 33, 64, 11, 10, [3, 3], 1, 1),
                (1, 48, 300, 9, 9, [5, 3], 3, 2),
                (2, 32, 40, 6, 7, [5, 1], 1, 2),
                (2, 24, 40, 6, 7, [1, 5], 1, 2),
                (1, 256, 272, 5, 6, [3, 3], 2, 1),
                (1, 20, 16, 3, 301, [3, 3], 1, 1),
                (1, 256, 24, 5, 199, [3, 3], 2, 1),
                (2, 24, 20, 9, 150, [1, 1], 2, 0),
            ] {
                let g = Geometry {
                    n,
                    i,
                    o,
                    h,
                    w,
                    kernel,
                    stride,
                    padding,
                };
                let [oh, ow] = g.outputs();
                let (x, weight) = (normal(n * i * h * w, 1), normal(o * i * g.taps(), 2));
                let dy = normal(n * o * oh * ow, 3);
                let (blocked_x, blocked_dy) = (block(&x, n, i, h * w), block(&dy, n, o, oh * ow));

                let mut y = vec![f32::NAN; n * o.next_multiple_of(BLOCK) * oh * ow];
                forward(isa, g, &blocked_x, None, &prepare(isa, g, &weight), &mut y);
                let error = relative_rms(&unblock(&y, n, o, oh * ow), &naive_forward(g, &x, &weight));
                assert!(error < bound, "{isa:?} {g:?}: forward is off by {error:.1e}");

                let (exact_dx, exact_dw) = naive_gradients(g, &x, &weight, &dy);
                let mut dx = vec![f32::NAN; n * i.next_multiple_of(BLOCK) * h * w];
                data_gradient(isa, g, &blocked_dy, &weight, &mut dx);
                let error = relative_rms(&unblock(&dx, n, i, h * w), &exact_dx);
                assert!(
                    error < bound,
                    "{isa:?} {g:?}: data gradient is off by {error:.1e}"
                );

                let mut dw = vec![f32::NAN; weight.len()];
                weight_gradient(isa, g, &blocked_x, None, &blocked_dy, &mut dw);
                let error = relative_rms(&dw, &exact_dw);
                assert!(
                    error < bound,
                    "{isa:?} {g:?}: weight gradient is off by {error:.1e}"
                );
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let g = Geometry {
            n: 5,
            i: 32,
            o: 80,
            h: 13,
            w: 12,
            kernel: [3, 3],
            stride: 2,
            padding: 1,
        };
        let [oh, ow] = g.outputs();
        let x = normal(g.n * g.i * g.h * g.w, 1);
        let dy = normal(g.n * g.o * oh * ow, 2);
        let weight = normal(g.o * g.i * 9, 3);
        let mut results = [1, 2, 3].into_iter().map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a thread pool");
            pool.install(|| {
                let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), weight.clone());
                forward(
                    Isa::best(),
                    g,
                    &x,
                    None,
                    &prepare(Isa::best(), g, &weight),
                    &mut y,
                );
                data_gradient(Isa::best(), g, &dy, &weight, &mut dx);
                weight_gradient(Isa::best(), g, &x, None, &dy, &mut dw);
                (y, dx, dw)
            })
        });
        let one = results.next().expect("one thread");
        assert!(results.all(|more| more == one));
    }
}
