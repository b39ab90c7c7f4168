//! 3×3 convolution, stride 1, padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016), where few tiles
//! would not pay for its weights' 36 points by F(2×2, 3×3).
//!
//! A 4×4 tile of outputs needs 36 products per pair of channels instead of 144:
//! `y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A` for a 6×6 tile `d` of inputs and a kernel `g`. Summed over input channels, the 36
//! elementwise products become 36 matrix products over tiles. The weight gradient is the transposed algorithm,
//! `ġ = Gᵀ[Σ (Bᵀ d B) ⊙ (A ẏ Aᵀ)]G`, summed over tiles; the data gradient is a convolution with the flipped kernel.
//!
//! The matrices are those of Toom-Cook at the points 0, ±p, ±q, ∞. With p = 5/8 and q = 3/2 rounding errors are half
//! those of the usual 1 and 2; the tests bound them against float64.

mod convolve;
mod gradient;
mod matrices;
mod tiles;

pub(crate) use convolve::{data_gradient, forward, prepare};
pub(crate) use gradient::weight_gradient;

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
    /// Tiles of the whole batch.
    pub(crate) fn tiles(self) -> usize {
        self.tiles_of(TILE)
    }

    /// Tiles of the whole batch with `side`×`side` outputs.
    pub(crate) fn tiles_of(self, side: usize) -> usize {
        self.n * self.h.div_ceil(side) * self.w.div_ceil(side)
    }

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

    /// Picture, top row and left column of the outputs of a tile of `side`×`side`.
    fn tile_of(self, side: usize, index: usize) -> (usize, usize, usize) {
        let (high, wide) = (self.h.div_ceil(side), self.w.div_ceil(side));
        (
            index / (high * wide),
            index / wide % high * side,
            index % wide * side,
        )
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
            ] {
                check(isa, Shape { n, i, o, h, w }, 2e-6);
            }
        }
    }

    /// Both ways to sum weight gradients over many tiles: several parts, and all tiles by points in several rounds.
    #[test]
    fn weight_gradients_of_many_tiles_agree_with_the_direct_form() {
        for (n, i, o, h, w) in [(2, 16, 32, 41, 43), (5, 160, 144, 29, 30), (5, 160, 224, 29, 30)] {
            let (x, dy) = (normal(n * i * h * w, 1), normal(n * o * h * w, 2));
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
            let (mut dw, mut direct) = (vec![f32::NAN; o * i * 9], vec![f32::NAN; o * i * 9]);
            weight_gradient(Isa::best(), Shape { n, i, o, h, w }, &x, None, &dy, &mut dw);
            crate::kernels::direct::weight_gradient(Isa::best(), geometry, &x, None, &dy, &mut direct);
            let exact: Vec<_> = direct.iter().map(|value| f64::from(*value)).collect();
            let error = relative_rms(&dw, &exact);
            assert!(error < 3e-6, "differs by {error:.1e}");
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        for shape in [
            Shape {
                n: 3,
                i: 32,
                o: 80,
                h: 30,
                w: 22,
            },
            Shape {
                n: 2,
                i: 192,
                o: 192,
                h: 7,
                w: 9,
            },
        ] {
            let Shape { n, i, o, h, w } = shape;
            let x = normal(n * i.next_multiple_of(BLOCK) * h * w, 1);
            let dy = normal(n * o.next_multiple_of(BLOCK) * h * w, 2);
            let weight = normal(o * i * 9, 3);
            let mut results = [1, 2, 3].into_iter().map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .expect("a thread pool");
                pool.install(|| {
                    let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), weight.clone());
                    let mut two = y.clone();
                    for (tile, y) in [(Tile::Two, &mut two), (Tile::Four, &mut y)] {
                        let prepared = prepare(Isa::best(), shape, tile, &weight);
                        forward(Isa::best(), shape, tile, &x, None, &prepared, y);
                    }
                    data_gradient(Isa::best(), shape, &dy, &weight, &mut dx);
                    weight_gradient(Isa::best(), shape, &x, None, &dy, &mut dw);
                    (two, y, dx, dw)
                })
            });
            let one = results.next().expect("one thread");
            assert!(results.all(|more| more == one), "{shape:?}");
        }
    }
}
