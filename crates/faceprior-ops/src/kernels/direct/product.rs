//! The implicit product that the output and the gradient of the input are.

use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::load::Load;
use super::super::panel::Panel;
use super::super::tile::{Row, multiply_panel};
use super::super::weights::{Columns, WeightShape, WeightTile};
use super::super::{BLOCK, Shared, parallel};
use super::CopyPlane;
use crate::pool::Buffer;

/// Channels of one run of the inner dimension. With a single block on the inner side only its real channels are kept,
/// so that three colours cost three terms and not sixteen.
fn run_length(inner: usize) -> usize {
    inner.min(BLOCK)
}

/// The columns of a product with a weight: for each block of the inner side and each tap one run.
///
/// A convolution's columns are output channels, its data gradient's are input channels.
pub(super) fn panel(shape: WeightShape, side: Columns) -> Panel {
    let (columns, inner) = side.sides(shape);
    Panel {
        runs: inner.div_ceil(BLOCK) * shape.taps,
        length: run_length(inner),
        blocks: columns.div_ceil(BLOCK),
    }
}

/// Packs a weight, taps of each phase together: a product reads a phase's rows one after another.
pub(super) fn pack(
    isa: Isa,
    weight: &[f32],
    shape: WeightShape,
    side: Columns,
    phases: &[Vec<usize>],
) -> Buffer {
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
            phases,
            panel,
            to,
            block: task / inner_blocks,
            inner_block: [task % inner_blocks, inner_blocks],
        });
    });
    values
}

/// Sixteen columns of sixteen channels.
struct PackBlock<'a> {
    weight: &'a [f32],
    shape: WeightShape,
    side: Columns,
    phases: &'a [Vec<usize>],
    panel: Panel,
    to: Shared,
    block: usize,
    /// Which, and of how many.
    inner_block: [usize; 2],
}

impl Kernel for PackBlock<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            weight,
            shape,
            side,
            phases,
            panel,
            to,
            block,
            inner_block: [inner_block, inner_blocks],
        } = self;
        let mut first_run = 0;
        let mut tile = WeightTile::new(shape);
        // SAFETY: the caller promises the instructions; each task writes the rows and columns of its blocks, inside
        // the buffer by its size.
        unsafe {
            side.read::<L>(&mut tile, weight, block, inner_block);
            for taps in phases {
                for (run, tap) in (first_run + inner_block * taps.len()..).zip(taps) {
                    let start = panel.start(block) + run * panel.length * BLOCK;
                    for row in 0..panel.length {
                        let lanes = L::load(side.row(&mut tile, row, *tap));
                        lanes.store(to.at(start + row * BLOCK));
                    }
                }
                first_run += inner_blocks * taps.len();
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

/// The output pixels of a product: all of a map, or those of a phase.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Outputs {
    /// The map.
    pub(in crate::kernels) y: Shared,
    pub(in crate::kernels) plane: usize,
    /// Offset of the first pixel in a plane, and distances between rows and pixels.
    pub(in crate::kernels) first: usize,
    pub(in crate::kernels) row: usize,
    pub(in crate::kernels) pixel: usize,
    pub(in crate::kernels) rows: usize,
    pub(in crate::kernels) pixels: usize,
}

/// An implicit product over maps in an endless border of zeros: for each output pixel, the sum over taps and source
/// channels.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    /// Maps `[N, blocks, H, W, 16]`, and how they are read.
    pub(super) x: &'a [f32],
    pub(super) load: Option<Load<'a>>,
    pub(super) source_blocks: usize,
    pub(super) size: [usize; 2],
    /// Rows and columns of the border before the map, at which the taps of the first output start.
    pub(super) before: [usize; 2],
    /// Of rows and columns only every so many-th is read.
    pub(super) step: usize,
    /// Rows and columns, of those that are read, between outputs.
    pub(super) stride: usize,
    pub(super) panel: Panel,
    /// Packed for the phases.
    pub(super) weight: &'a [f32],
    pub(super) phases: &'a [Phase],
}

/// Output pixels that meet the same taps.
pub(super) struct Phase {
    /// The row and column that each tap reads for the first output.
    pub(super) taps: Vec<(usize, usize)>,
    pub(super) outputs: Outputs,
}

/// Floats that a task copies of its maps, at most, so that they stay in the second-level cache: 512 KiB.
const WINDOW: usize = 128 << 10;

/// Pixels of a task, whose sums go back to memory between parts of the inner dimension: 64 channels of them take 64 KiB.
const TASK_PIXELS: usize = 252;

impl Product<'_> {
    pub(super) fn run(self, isa: Isa, n: usize) {
        // The largest; others are a row or a pixel smaller. A task has the same part of each.
        let sizes = self.phases.iter().map(|phase| phase.outputs);
        let Some(rows) = sizes.clone().map(|outputs| outputs.rows).max() else {
            return;
        };
        let pixels = sizes.map(|outputs| outputs.pixels).max().unwrap_or(0);
        let reach @ [reach_y, reach_x] = self.reach();
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
        let task_blocks = groups.div_ceil(wanted) * group_blocks;
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
                reach,
                picture,
                blocks: part(self.panel.blocks, group, task_blocks),
                rows: part(rows, row_task, task_rows),
                pixels: part(pixels, pixel_task, task_pixels),
            });
        });
    }

    /// How far behind an output's first row and column its last taps read.
    fn reach(&self) -> [usize; 2] {
        let mut reach = [0; 2];
        for (row, column) in self.phases.iter().flat_map(|phase| &phase.taps) {
            reach = [reach[0].max(*row), reach[1].max(*column)];
        }
        reach
    }
}

/// Some output pixels of some columns.
struct ProductTask<'a> {
    product: Product<'a>,
    reach: [usize; 2],
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
            reach,
            picture,
            blocks,
            rows,
            pixels,
        } = self;
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
        let mut first_run = 0;
        for Phase { taps, outputs } in p.phases {
            let mut runs = Vec::with_capacity(p.source_blocks * taps.len());
            for block in 0..p.source_blocks {
                for (row, column) in taps {
                    let run = (first_run + runs.len()) * p.panel.length * BLOCK;
                    runs.push((block * plane_floats + row * row_floats + column * BLOCK, run));
                }
            }
            first_run += runs.len();
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
                    Some(0),
                    false,
                );
            }
        }
    }
}
