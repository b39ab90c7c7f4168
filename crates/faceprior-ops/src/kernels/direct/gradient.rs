//! The gradient of the weight: sums over pixels.

use super::super::lanes::{Isa, Kernel, Lanes, Parts};
use super::super::load::Load;
use super::super::tile::{INNER, Row, Runs, Strides, UNROLLED, multiply};
use super::super::weights::WeightTile;
use super::super::{BLOCK, Shared, parallel};
use super::{CopyPlane, Geometry};
use crate::pool::Buffer;

/// Planes of blocked pixels as a kernel reads them: within a border of zeros, [`Load`] applied.
struct Source<'a> {
    x: &'a [f32],
    copy: Option<Buffer>,
    h: usize,
    w: usize,
}

impl Source<'_> {
    fn values(&self) -> &[f32] {
        self.copy.as_deref().unwrap_or(self.x)
    }

    fn plane(&self) -> usize {
        self.h * self.w * BLOCK
    }
}

/// Reads planes of `h`×`w` pixels once and wraps `before` and `after` rows and columns of zeros around each; where
/// there is nothing to do, the planes stay where they are.
fn source<'a>(
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
            b_next: None,
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
