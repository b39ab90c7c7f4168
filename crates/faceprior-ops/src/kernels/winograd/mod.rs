//! 3×3 convolution, stride 1 (2: see [`strided`]), padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016), where few tiles
//! would not pay for its weights' 36 points by F(2×2, 3×3).
//!
//! A 4×4 tile of outputs needs 36 products per pair of channels instead of 144:
//! `y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A` for a 6×6 tile `d` of inputs and a kernel `g`. Summed over input channels, the 36
//! elementwise products become 36 matrix products over tiles. The weight gradient is the transposed algorithm,
//! `ġ = Gᵀ[Σ (Bᵀ d B) ⊙ (A ẏ Aᵀ)]G`, summed over tiles; the data gradient is a convolution with the flipped kernel.
//!
//! The matrices are those of Toom-Cook at the points 0, ±p, ±q, ∞. With p = 5/8 and q = 3/2 rounding errors are half
//! those of the usual 1 and 2; the tests bound them against float64.
//!
//! Of rows and columns that are no multiple of four the last tile has three or two outputs, and takes five or four of the
//! same points: the weight at a point serves tiles of all sizes. A map of 14×14 pixels needs 22² products instead of 24²,
//! one of 7×7 11² instead of 12².

mod convolve;
mod form;
mod gradient;
mod grid;
mod matrices;
mod pieces;
pub(crate) mod strided;
mod tiles;
mod unit;

pub(crate) use convolve::{data_gradient, forward, forward_once, prepare};
pub(crate) use gradient::weight_gradient;
use grid::Grid;

use super::BLOCK;
use super::weights::WeightShape;

/// Outputs of a tile along one axis.
const TILE: usize = 4;
/// Inputs of a tile along one axis, and products.
const EDGE: usize = 6;
/// Products of a tile.
const POINTS: usize = EDGE * EDGE;

/// Outputs of a tile of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Tile {
    /// 2×2: 16 products of 36, and weights of 16 points.
    Two,
    /// 4×4: 36 products of 144, and weights of 36 points.
    Four,
}

impl Tile {
    fn grid(self, shape: Shape) -> Grid {
        match self {
            Self::Two => Grid::of_equal(shape, 2),
            Self::Four => Grid::new(shape),
        }
    }
}

/// Shape of a convolution: `n` pictures of `h`×`w` pixels, `i` input and `o` output channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) n: usize,
    pub(crate) i: usize,
    pub(crate) o: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
}

impl Shape {
    /// Tiles of the whole batch with `side`×`side` outputs.
    pub(crate) fn tiles_of(self, side: usize) -> usize {
        self.n * self.h.div_ceil(side) * self.w.div_ceil(side)
    }

    /// Floats of a plane.
    fn plane(self) -> usize {
        self.h * self.w * BLOCK
    }

    fn weight(self) -> WeightShape {
        WeightShape {
            outputs: self.o,
            inputs: self.i,
            taps: 9,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use crate::kernels::direct::Geometry;
    use crate::kernels::testing::{block, naive_forward, naive_gradients, normal, relative_rms, unblock};

    fn check(isa: Isa, shape: Shape, bound: f64) {
        let Shape { n, i, o, h, w } = shape;
        let geometry = Geometry {
            n,
            i,
            o,
            h,
            w,
            kernel: [3, 3],
            stride: 1,
            padding: 1,
        };
        let (x, weight, dy) = (
            normal(n * i * h * w, 1),
            normal(o * i * 9, 2),
            normal(n * o * h * w, 3),
        );
        let (blocked_x, blocked_dy) = (block(&x, n, i, h * w), block(&dy, n, o, h * w));

        let exact_y = naive_forward(geometry, &x, &weight);
        for tile in [Tile::Two, Tile::Four] {
            let mut y = vec![f32::NAN; n * o.next_multiple_of(BLOCK) * h * w];
            let prepared = prepare(isa, shape, tile, &weight);
            forward(isa, shape, tile, &blocked_x, None, &prepared, &mut y);
            let error = relative_rms(&unblock(&y, n, o, h * w), &exact_y);
            assert!(
                error < bound,
                "{isa:?} {shape:?} {tile:?}: forward is off by {error:.1e}"
            );
            if tile == Tile::Four {
                let mut once = vec![f32::NAN; y.len()];
                forward_once(isa, shape, &blocked_x, None, &weight, &mut once);
                if unit::parts(isa, shape).is_none() {
                    assert_eq!(once, y, "{isa:?} {shape:?}");
                }
                let error = relative_rms(&unblock(&once, n, o, h * w), &exact_y);
                assert!(error < bound, "{isa:?} {shape:?}: forward is off by {error:.1e}");
            }
        }

        let (exact_dx, exact_dw) = naive_gradients(geometry, &x, &weight, &dy);
        let mut dx = vec![f32::NAN; n * i.next_multiple_of(BLOCK) * h * w];
        data_gradient(isa, shape, &blocked_dy, &weight, &mut dx);
        let error = relative_rms(&unblock(&dx, n, i, h * w), &exact_dx);
        assert!(
            error < bound,
            "{isa:?} {shape:?}: data gradient is off by {error:.1e}"
        );

        let mut dw = vec![f32::NAN; o * i * 9];
        weight_gradient(isa, shape, &blocked_x, None, &blocked_dy, &mut dw);
        let error = relative_rms(&dw, &exact_dw);
        assert!(
            error < bound,
            "{isa:?} {shape:?}: weight gradient is off by {error:.1e}"
        );
    }

    #[test]
    fn agrees_with_float64_on_every_instruction_set() {
        for isa in Isa::available() {
            for (n, i, o, h, w) in [
                (1, 1, 1, 1, 1),
                (1, 16, 16, 4, 4),
                (2, 3, 5, 7, 6),
                (1, 20, 90, 9, 5),
                (3, 32, 48, 8, 13),
                (2, 64, 64, 14, 14),
                (5, 33, 130, 7, 7),
                (1, 270, 250, 6, 5),
                (3, 70, 66, 25, 26),
            ] {
                check(isa, Shape { n, i, o, h, w }, 2e-6);
            }
        }
    }

    /// The ways to sum weight gradients over many tiles: several parts, those of shares of the outputs, and all tiles by
    /// points in several rounds. And all passes on the matrix unit in two parts: what these leave out of a float grows with
    /// the transforms, as every rounding does.
    #[test]
    fn passes_over_many_tiles_agree_with_the_direct_form() {
        use crate::kernels::direct;

        for (n, i, o, h, w) in [
            (2, 16, 32, 41, 43),
            (5, 48, 144, 33, 30),
            (5, 160, 144, 29, 30),
            (5, 160, 224, 29, 30),
        ] {
            let (x, dy) = (normal(n * i * h * w, 1), normal(n * o * h * w, 2));
            let weight = normal(o * i * 9, 3);
            let geometry = Geometry {
                n,
                i,
                o,
                h,
                w,
                kernel: [3, 3],
                stride: 1,
                padding: 1,
            };
            let shape = Shape { n, i, o, h, w };
            let nothing = || [dy.len(), x.len(), weight.len()].map(|length| vec![f32::NAN; length]);
            let [mut y, mut dx, mut dw] = nothing();
            let isa = Isa::best();
            let prepared = direct::prepare(isa, geometry, &weight);
            direct::forward(isa, geometry, &x, None, &prepared, &mut y);
            direct::data_gradient(isa, geometry, &dy, &weight, &mut dx);
            direct::weight_gradient(isa, geometry, &x, None, &dy, &mut dw);
            let exact = [y, dx, dw].map(|values| values.into_iter().map(f64::from).collect::<Vec<_>>());
            for (isa, bound) in [(isa, 3e-6), (isa.for_rounded(), 3e-5)] {
                let [mut y, mut dx, mut dw] = nothing();
                forward_once(isa, shape, &x, None, &weight, &mut y);
                data_gradient(isa, shape, &dy, &weight, &mut dx);
                weight_gradient(isa, shape, &x, None, &dy, &mut dw);
                for (pass, (got, exact)) in [y, dx, dw].iter().zip(&exact).enumerate() {
                    let error = relative_rms(got, exact);
                    assert!(error < bound, "{isa:?}: pass {pass} differs by {error:.1e}");
                }
            }
        }
    }

    #[test]
    fn a_prepared_weight_serves_any_number_of_pictures() {
        for isa in Isa::available() {
            let shape = |n| Shape {
                n,
                i: 64,
                o: 80,
                h: 27,
                w: 28,
            };
            let (x, weight) = (normal(4 * 64 * 27 * 28, 1), normal(80 * 64 * 9, 2));
            for tile in [Tile::Two, Tile::Four] {
                let prepared = prepare(isa, shape(1), tile, &weight);
                let [one, four] = [1, 4].map(|n| {
                    let mut y = vec![f32::NAN; n * 80 * 27 * 28];
                    let x = &x[..n * 64 * 27 * 28];
                    forward(isa, shape(n), tile, x, None, &prepared, &mut y);
                    y
                });
                assert_eq!(four[..one.len()], one, "{isa:?} {tile:?}");
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let shapes = [
            (3, 32, 80, 30, 22),
            (2, 192, 192, 7, 9),
            (4, 70, 96, 23, 24),
            (4, 48, 144, 33, 30),
            (2, 260, 272, 7, 6),
        ];
        let sets = [Isa::best(), Isa::best().for_rounded()];
        for ((n, i, o, h, w), isa) in shapes.into_iter().flat_map(|shape| sets.map(|isa| (shape, isa))) {
            let shape = Shape { n, i, o, h, w };
            let x = normal(n * i.next_multiple_of(BLOCK) * h * w, 1);
            let dy = normal(n * o.next_multiple_of(BLOCK) * h * w, 2);
            let weight = normal(o * i * 9, 3);
            // With ten of them, weight gradients of 192 channels are summed in another way.
            let mut results = [1, 2, 3, 10].into_iter().map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .expect("a thread pool");
                pool.install(|| {
                    let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), weight.clone());
                    let (mut two, mut once) = (y.clone(), y.clone());
                    for (tile, y) in [(Tile::Two, &mut two), (Tile::Four, &mut y)] {
                        let prepared = prepare(isa, shape, tile, &weight);
                        forward(isa, shape, tile, &x, None, &prepared, y);
                    }
                    forward_once(isa, shape, &x, None, &weight, &mut once);
                    data_gradient(isa, shape, &dy, &weight, &mut dx);
                    weight_gradient(isa, shape, &x, None, &dy, &mut dw);
                    (two, y, once, dx, dw)
                })
            });
            let one = results.next().expect("one thread");
            assert!(results.all(|more| more == one), "{shape:?}");
        }
    }
}
