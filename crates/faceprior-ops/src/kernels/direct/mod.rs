//! Convolution of any kernel and stride as an implicit matrix product.
//!
//! Rows of the product are neighbouring pixels, columns are output channels, and the inner dimension runs over the
//! kernel's taps and the input channels: nothing is unrolled in memory, the register tile finds each tap's pixels by
//! an offset. A task copies the pixels it needs into the cache, in a border of zeros, so that no inner loop asks where it
//! is; what the input goes through on its way is done in the same copy.

mod gradient;
mod planes;
mod product;

pub(crate) use gradient::weight_gradient;
pub(super) use planes::CopyPlane;
pub(super) use product::Outputs;

use super::cells::{self, Grid};
use super::lanes::{Isa, Parts};
use super::load::Load;
use super::weights::{Columns, WeightShape};
use super::{BLOCK, Shared};
use crate::pool::Buffer;
use product::{Phase, Product, pack, panel};

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
    let taps: Vec<_> = (0..geometry.taps()).collect();
    if let Some(parts) = on_matrix_unit(isa, geometry) {
        return cells::pack(isa, parts, weight, geometry.weight(), Columns::Outputs, &taps);
    }
    pack(isa, weight, geometry.weight(), Columns::Outputs, &[taps])
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
    let taps: Vec<_> = (0..g.taps())
        .map(|tap| (tap / g.kernel[1], tap % g.kernel[1]))
        .collect();
    if let Some(parts) = on_matrix_unit(isa, g) {
        let border = [g.padding; 2];
        let grid = Grid::new(parts, [g.n, g.in_blocks()], [g.h, g.w], border, border, g.stride);
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
        // One phase reads a pixel once: its tasks may as well split what they need.
        let split = (s > 1).then(|| grid.split(isa, dy));
        (parts, grid, split)
    });
    let dx = Shared::new(dx);
    let (mut phases, mut phase_taps) = (Vec::new(), Vec::new());
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
            if let (Some((parts, grid, split)), false) = (&cells, taps.is_empty()) {
                let maps = cells::Maps { x: dy, load: None };
                let source = split.as_deref().map(cells::Source::Cells);
                let product = cells::Product {
                    grid: *grid,
                    source: source.unwrap_or(cells::Source::Maps(maps)),
                    taps: &places,
                    weight: &cells::pack(isa, *parts, weight, g.weight(), Columns::Inputs, &taps),
                    blocks: g.in_blocks(),
                    outputs,
                };
                product.run(isa);
                continue;
            }
            phases.push(Phase {
                taps: places,
                outputs,
            });
            phase_taps.push(taps);
        }
    }
    // Phases that are left beside the matrix unit have no taps.
    let packed = if cells.is_some() {
        Buffer::take(0)
    } else {
        pack(isa, weight, g.weight(), Columns::Inputs, &phase_taps)
    };
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
