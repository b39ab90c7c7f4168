//! 3×3 convolution, stride 1, padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016).
//!
//! A 4×4 tile of outputs needs 36 products per pair of channels instead of 144:
//! `y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A` for a 6×6 tile `d` of inputs and a kernel `g`. Summed over input channels, the 36
//! elementwise products become 36 matrix products over tiles. The weight gradient is the transposed algorithm,
//! `ġ = Gᵀ[Σ (Bᵀ d B) ⊙ (A ẏ Aᵀ)]G`, summed over tiles; the data gradient is a convolution with the flipped kernel.
//!
//! The matrices are those of Toom-Cook at the points 0, ±p, ±q, ∞. With p = 5/8 and q = 3/2 rounding errors are half
//! those of the usual 1 and 2 (measured in this module's tests against float64).

#![allow(
    clippy::needless_range_loop,
    reason = "columns of matrices are filled one by one"
)]

use super::lanes::{Isa, Kernel, Lanes};
use super::tile::{Runs, Strides, multiply};
use super::weights::{Columns, WeightShape, WeightTile};
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// Outputs of a tile along one axis.
const TILE: usize = 4;
/// Inputs of a tile along one axis, and products.
const EDGE: usize = 6;
/// Products of a tile.
const POINTS: usize = EDGE * EDGE;

const P: f32 = 0.625;
const Q: f32 = 1.5;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;
/// Derivatives of x(x² − p²)(x² − q²) at 0, ±p and ±q: what Lagrange's polynomials are divided by.
const AT_0: f32 = P2 * Q2;
const AT_P: f32 = 2.0 * P2 * (P2 - Q2);
const AT_Q: f32 = 2.0 * Q2 * (Q2 - P2);

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
    fn tiles_high(self) -> usize {
        self.h.div_ceil(TILE)
    }

    fn tiles_wide(self) -> usize {
        self.w.div_ceil(TILE)
    }

    /// Tiles of the whole batch.
    pub(crate) fn tiles(self) -> usize {
        self.n * self.tiles_high() * self.tiles_wide()
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

    /// Picture, top row and left column of a tile's outputs.
    fn tile(self, index: usize) -> (usize, usize, usize) {
        let (high, wide) = (self.tiles_high(), self.tiles_wide());
        (
            index / (high * wide),
            index / wide % high * TILE,
            index % wide * TILE,
        )
    }
}

/// The convolution of `x` `[N, ⌈I/16⌉, H, W, 16]` with `weight` `[O, I, 3, 3]` into `y` `[N, ⌈O/16⌉, H, W, 16]`.
pub(crate) fn forward(isa: Isa, shape: Shape, x: &[f32], weight: &[f32], y: &mut [f32]) {
    convolve(
        isa,
        shape,
        Taps {
            weight,
            shape: shape.weight(),
            columns: Columns::Outputs,
        },
        x,
        y,
    );
}

/// The gradient of the input, `dx`, from the gradient of the output, `dy`: a convolution with the flipped kernel.
pub(crate) fn data_gradient(isa: Isa, shape: Shape, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Inputs,
    };
    convolve(
        isa,
        Shape {
            i: shape.o,
            o: shape.i,
            ..shape
        },
        taps,
        dy,
        dx,
    );
}

/// A weight, and the side of it that is the convolution's output.
#[derive(Clone, Copy)]
struct Taps<'a> {
    weight: &'a [f32],
    shape: WeightShape,
    columns: Columns,
}

fn convolve(isa: Isa, shape: Shape, taps: Taps, x: &[f32], y: &mut [f32]) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(x.len(), shape.n * in_blocks * shape.plane());
    assert_eq!(y.len(), shape.n * out_blocks * shape.plane());
    assert_eq!(taps.weight.len(), shape.i * shape.o * 9);
    let transformed = transform_weight(isa, taps);
    let groups = out_blocks.div_ceil(isa.tile_blocks());

    // A chunk's transformed inputs should stay in the second-level cache, but the transformed weights, which stream
    // past once per chunk, must be worth their way.
    let inputs = in_blocks * BLOCK;
    let wanted = (CHUNK_FLOATS / (POINTS * inputs)).clamp(MIN_CHUNK_TILES, MAX_CHUNK_TILES);
    let threads = rayon::current_num_threads();
    let chunks = shape
        .tiles()
        .div_ceil(wanted)
        .next_multiple_of(threads)
        .min(shape.tiles());
    let chunk_tiles = shape.tiles().div_ceil(chunks);
    let chunks = shape.tiles().div_ceil(chunk_tiles);
    // Too few chunks for all threads: tasks share a chunk, each for some of the output channels.
    let splits = (threads / chunks).clamp(1, groups);
    let split_groups = groups.div_ceil(splits);

    let y = Shared::new(y);
    parallel(chunks * splits, |task| {
        let first_tile = task / splits * chunk_tiles;
        let first_group = task % splits * split_groups;
        isa.run(Chunk {
            shape,
            x,
            weight: &transformed,
            y,
            first_tile,
            tiles: chunk_tiles.min(shape.tiles() - first_tile),
            first_group,
            last_group: (first_group + split_groups).min(groups),
        });
    });
}

const CHUNK_FLOATS: usize = 128 << 10;
const MIN_CHUNK_TILES: usize = 30;
const MAX_CHUNK_TILES: usize = 60;

/// `G g Gᵀ` for all pairs of channels, as `[group of output blocks][36][I][blocks·16]`.
fn transform_weight(isa: Isa, taps: Taps) -> Buffer {
    let (outputs, inputs) = taps.columns.sides(taps.shape);
    let (in_blocks, out_blocks) = (inputs.div_ceil(BLOCK), outputs.div_ceil(BLOCK));
    let mut transformed = Buffer::take(POINTS * in_blocks * out_blocks * BLOCK * BLOCK);
    let to = Shared::new(&mut transformed);
    let groups = out_blocks.div_ceil(isa.tile_blocks());
    parallel(groups * in_blocks, |task| {
        isa.run(WeightBlock {
            taps,
            to,
            group: task / in_blocks,
            in_block: task % in_blocks,
        })
    });
    transformed
}

/// The transformed taps of a group of output blocks and one input block.
struct WeightBlock<'a> {
    taps: Taps<'a>,
    to: Shared,
    group: usize,
    in_block: usize,
}

impl Kernel for WeightBlock<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            taps: Taps {
                weight,
                shape,
                columns,
            },
            to,
            group,
            in_block,
        } = self;
        let (outputs, inputs) = columns.sides(shape);
        let (out_blocks, inputs) = (outputs.div_ceil(BLOCK), inputs.next_multiple_of(BLOCK));
        let first_block = group * L::TILE_BLOCKS;
        let blocks = L::TILE_BLOCKS.min(out_blocks - first_block);
        let width = blocks * BLOCK;
        let start = POINTS * inputs * first_block * BLOCK + in_block * BLOCK * width;
        let mut tile = WeightTile::new(shape);
        for block in 0..blocks {
            // SAFETY: the caller promises the instructions.
            unsafe { columns.read::<L>(&mut tile, weight, first_block + block, in_block) };
            for lane in 0..BLOCK {
                let to = to.at(start + lane * width + block * BLOCK);
                // SAFETY: the caller promises the instructions. This task alone writes the columns of its group in
                // the rows of its input block, which lie inside the buffer by its size.
                unsafe {
                    let mut half = [[L::zero(); 3]; EDGE];
                    for column in 0..3 {
                        let mut g = [L::zero(); 3];
                        for (row, g) in g.iter_mut().enumerate() {
                            let tap = row * 3 + column;
                            let tap = if columns == Columns::Inputs { 8 - tap } else { tap };
                            *g = L::load(columns.row(&mut tile, lane, tap).as_ptr());
                        }
                        for (row, value) in kernel_to_points(g).into_iter().enumerate() {
                            half[row][column] = value;
                        }
                    }
                    for (row, half) in half.into_iter().enumerate() {
                        for (column, value) in kernel_to_points(half).into_iter().enumerate() {
                            value.store(to.wrapping_add((row * EDGE + column) * inputs * width));
                        }
                    }
                }
            }
        }
    }
}

/// Some tiles and output channels of a convolution: transform, 36 matrix products, transform back.
struct Chunk<'a> {
    shape: Shape,
    x: &'a [f32],
    weight: &'a [f32],
    y: Shared,
    first_tile: usize,
    tiles: usize,
    first_group: usize,
    last_group: usize,
}

impl Kernel for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            shape,
            x,
            weight,
            y,
            first_tile,
            tiles,
            first_group,
            last_group,
        } = self;
        let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
        let inputs = in_blocks * BLOCK;
        let widest = L::TILE_BLOCKS.min(out_blocks) * BLOCK;
        // One cache line more than a point needs, lest the 36 streams of a transform meet in one cache set.
        let v_point = tiles * inputs + BLOCK;
        let m_point = tiles * widest + BLOCK;
        let mut v = Buffer::take(POINTS * v_point);
        let mut m = Buffer::take(POINTS * m_point);
        let (v, m) = (v.as_mut_ptr(), m.as_mut_ptr());
        // SAFETY: the caller promises the instructions. Scratch is sized above; `x` and `y` are sized by the caller
        // as the shape says. This task alone writes the outputs of its tiles and groups.
        unsafe {
            for tile in 0..tiles {
                let (n, top, left) = shape.tile(first_tile + tile);
                for block in 0..in_blocks {
                    let plane = x.as_ptr().wrapping_add((n * in_blocks + block) * shape.plane());
                    let to = v.wrapping_add(tile * inputs + block * BLOCK);
                    transform_input::<L>(plane, shape, top, left, to, v_point);
                }
            }
            for group in first_group..last_group {
                let blocks = L::TILE_BLOCKS.min(out_blocks - group * L::TILE_BLOCKS);
                let width = blocks * BLOCK;
                let weight = weight
                    .as_ptr()
                    .wrapping_add(group * L::TILE_BLOCKS * BLOCK * POINTS * inputs);
                let strides = Strides {
                    a_row: inputs,
                    a_inner: 1,
                    b_inner: width,
                    b_block: BLOCK,
                    c_row: width,
                    c_block: BLOCK,
                };
                let runs = Runs {
                    offsets: &[(0, 0)],
                    length: inputs,
                };
                for point in 0..POINTS {
                    let (a, b) = (
                        v.wrapping_add(point * v_point),
                        weight.wrapping_add(point * inputs * width),
                    );
                    multiply::<L>(
                        tiles,
                        blocks,
                        runs,
                        strides,
                        a,
                        b,
                        m.wrapping_add(point * m_point),
                        false,
                    );
                }
                for tile in 0..tiles {
                    let (n, top, left) = shape.tile(first_tile + tile);
                    for block in 0..blocks {
                        let out_block = group * L::TILE_BLOCKS + block;
                        let plane = y.at((n * out_blocks + out_block) * shape.plane());
                        transform_output::<L>(
                            m.wrapping_add(tile * width + block * BLOCK),
                            m_point,
                            plane,
                            shape,
                            top,
                            left,
                        );
                    }
                }
            }
        }
    }
}

/// `Bᵀ d B` of the tile whose outputs start at (`top`, `left`), one value per point at distances of `point`.
///
/// # Safety
/// Instructions of `L`; `plane` is a plane of the shape; `to` has room for the points.
#[inline(always)]
unsafe fn transform_input<L: Lanes>(
    plane: *const f32,
    shape: Shape,
    top: usize,
    left: usize,
    to: *mut f32,
    point: usize,
) {
    let Shape { h, w, .. } = shape;
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        let mut half = [[L::zero(); EDGE]; EDGE];
        let inside = top > 0 && left > 0 && top + TILE < h && left + TILE < w;
        for column in 0..EDGE {
            let mut d = [L::zero(); EDGE];
            if inside {
                let first = plane.wrapping_add(((top - 1) * w + left - 1 + column) * BLOCK);
                for (row, d) in d.iter_mut().enumerate() {
                    *d = L::load(first.wrapping_add(row * w * BLOCK));
                }
            } else {
                for (row, d) in d.iter_mut().enumerate() {
                    // One too far above or left wraps around to a huge number, which is outside too.
                    let (y, x) = ((top + row).wrapping_sub(1), (left + column).wrapping_sub(1));
                    if y < h && x < w {
                        *d = L::load(plane.wrapping_add((y * w + x) * BLOCK));
                    }
                }
            }
            for (row, value) in input_to_points(d).into_iter().enumerate() {
                half[row][column] = value;
            }
        }
        for (row, half) in half.into_iter().enumerate() {
            for (column, value) in input_to_points(half).into_iter().enumerate() {
                value.store(to.wrapping_add((row * EDGE + column) * point));
            }
        }
    }
}

/// `Aᵀ m A` of one tile, written where it lies inside the picture.
///
/// # Safety
/// Instructions of `L`; `from` holds the points at distances of `point`; `plane` is a plane of the shape.
#[inline(always)]
unsafe fn transform_output<L: Lanes>(
    from: *const f32,
    point: usize,
    plane: *mut f32,
    shape: Shape,
    top: usize,
    left: usize,
) {
    // SAFETY: the caller's promise; only pixels inside the picture are written.
    unsafe {
        let mut half = [[L::zero(); EDGE]; TILE];
        for column in 0..EDGE {
            let mut m = [L::zero(); EDGE];
            for (row, m) in m.iter_mut().enumerate() {
                *m = L::load(from.wrapping_add((row * EDGE + column) * point));
            }
            for (row, value) in points_to_output(m).into_iter().enumerate() {
                half[row][column] = value;
            }
        }
        let columns = TILE.min(shape.w - left);
        for (row, half) in half.into_iter().enumerate().take(shape.h - top) {
            let first = plane.wrapping_add(((top + row) * shape.w + left) * BLOCK);
            for (column, value) in points_to_output(half).into_iter().enumerate().take(columns) {
                value.store(first.wrapping_add(column * BLOCK));
            }
        }
    }
}

/// `A ẏ Aᵀ` of one tile of output gradients, zero outside the picture.
///
/// # Safety
/// As for [`transform_input`].
#[inline(always)]
unsafe fn transform_output_gradient<L: Lanes>(
    plane: *const f32,
    shape: Shape,
    top: usize,
    left: usize,
    to: *mut f32,
    point: usize,
) {
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        let mut half = [[L::zero(); TILE]; EDGE];
        for column in 0..TILE {
            let mut dy = [L::zero(); TILE];
            for (row, dy) in dy.iter_mut().enumerate() {
                let (y, x) = (top + row, left + column);
                if y < shape.h && x < shape.w {
                    *dy = L::load(plane.wrapping_add((y * shape.w + x) * BLOCK));
                }
            }
            for (row, value) in output_to_points(dy).into_iter().enumerate() {
                half[row][column] = value;
            }
        }
        for (row, half) in half.into_iter().enumerate() {
            for (column, value) in output_to_points(half).into_iter().enumerate() {
                value.store(to.wrapping_add((row * EDGE + column) * point));
            }
        }
    }
}

/// Bᵀ: coefficients of the polynomials that vanish at all points but one.
#[inline(always)]
unsafe fn input_to_points<L: Lanes>(d: [L; EDGE]) -> [L; EDGE] {
    // SAFETY: the caller promises the instructions of `L`.
    unsafe {
        let [d0, d1, d2, d3, d4, d5] = d;
        let (p2, q2, sum) = (L::splat(-P2), L::splat(-Q2), L::splat(-(P2 + Q2)));
        let (p, q, product) = (L::splat(P), L::splat(Q), L::splat(P2 * Q2));
        let (even_p, odd_p) = (q2.mul_add(d2, d4), p.mul(q2.mul_add(d1, d3)));
        let (even_q, odd_q) = (p2.mul_add(d2, d4), q.mul(p2.mul_add(d1, d3)));
        [
            product.mul_add(d0, sum.mul_add(d2, d4)),
            even_p.add(odd_p),
            even_p.sub(odd_p),
            even_q.add(odd_q),
            even_q.sub(odd_q),
            product.mul_add(d1, sum.mul_add(d3, d5)),
        ]
    }
}

/// G: the kernel's polynomial at the points, divided by what [`input_to_points`] leaves out.
#[inline(always)]
unsafe fn kernel_to_points<L: Lanes>(g: [L; 3]) -> [L; EDGE] {
    // SAFETY: the caller promises the instructions of `L`.
    unsafe {
        let [g0, g1, g2] = g;
        let even_p = L::splat(1.0 / AT_P).mul(L::splat(P2).mul_add(g2, g0));
        let even_q = L::splat(1.0 / AT_Q).mul(L::splat(Q2).mul_add(g2, g0));
        let (odd_p, odd_q) = (L::splat(P / AT_P).mul(g1), L::splat(Q / AT_Q).mul(g1));
        [
            L::splat(1.0 / AT_0).mul(g0),
            even_p.add(odd_p),
            even_p.sub(odd_p),
            even_q.add(odd_q),
            even_q.sub(odd_q),
            g2,
        ]
    }
}

/// Gᵀ.
#[inline(always)]
unsafe fn points_to_kernel<L: Lanes>(s: [L; EDGE]) -> [L; 3] {
    // SAFETY: the caller promises the instructions of `L`.
    unsafe {
        let [s0, s1, s2, s3, s4, s5] = s;
        let (even_p, odd_p) = (s1.add(s2), s1.sub(s2));
        let (even_q, odd_q) = (s3.add(s4), s3.sub(s4));
        let scaled_p = L::splat(1.0 / AT_P).mul(even_p);
        [
            L::splat(1.0 / AT_0).mul_add(s0, L::splat(1.0 / AT_Q).mul_add(even_q, scaled_p)),
            L::splat(P / AT_P).mul_add(odd_p, L::splat(Q / AT_Q).mul(odd_q)),
            L::splat(P2 / AT_P).mul_add(even_p, L::splat(Q2 / AT_Q).mul_add(even_q, s5)),
        ]
    }
}

/// Aᵀ: powers of the points.
#[inline(always)]
unsafe fn points_to_output<L: Lanes>(m: [L; EDGE]) -> [L; TILE] {
    // SAFETY: the caller promises the instructions of `L`.
    unsafe {
        let [m0, m1, m2, m3, m4, m5] = m;
        let (even_p, odd_p) = (m1.add(m2), m1.sub(m2));
        let (even_q, odd_q) = (m3.add(m4), m3.sub(m4));
        [
            m0.add(even_p).add(even_q),
            L::splat(P).mul_add(odd_p, L::splat(Q).mul(odd_q)),
            L::splat(P2).mul_add(even_p, L::splat(Q2).mul(even_q)),
            L::splat(P2 * P).mul_add(odd_p, L::splat(Q2 * Q).mul_add(odd_q, m5)),
        ]
    }
}

/// A.
#[inline(always)]
unsafe fn output_to_points<L: Lanes>(y: [L; TILE]) -> [L; EDGE] {
    // SAFETY: the caller promises the instructions of `L`.
    unsafe {
        let [y0, y1, y2, y3] = y;
        let (even_p, odd_p) = (
            L::splat(P2).mul_add(y2, y0),
            L::splat(P2 * P).mul_add(y3, L::splat(P).mul(y1)),
        );
        let (even_q, odd_q) = (
            L::splat(Q2).mul_add(y2, y0),
            L::splat(Q2 * Q).mul_add(y3, L::splat(Q).mul(y1)),
        );
        [
            y0,
            even_p.add(odd_p),
            even_p.sub(odd_p),
            even_q.add(odd_q),
            even_q.sub(odd_q),
            y3,
        ]
    }
}

/// The gradient of the weight, `dw` `[O, I, 3, 3]`, from the input and the gradient of the output.
pub(crate) fn weight_gradient(isa: Isa, shape: Shape, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    assert_eq!(x.len(), shape.n * in_blocks * shape.plane());
    assert_eq!(dy.len(), shape.n * out_blocks * shape.plane());
    assert_eq!(dw.len(), shape.i * shape.o * 9);

    // With few channels a part of the tiles has sums of its own, which stay in the cache while its tiles stream past.
    // With many, the sums are the large thing: all tiles add to one copy, and tasks divide the points.
    let size = POINTS * in_blocks * out_blocks * BLOCK * BLOCK;
    let parts = if size <= PRIVATE_FLOATS {
        shape.tiles().div_ceil(PART_TILES).min(MAX_PARTS)
    } else {
        1
    };
    let mut sums = Buffer::take(parts * size);
    if parts == 1 {
        sum_by_points(isa, shape, x, dy, &mut sums);
    } else {
        let part_tiles = shape.tiles().div_ceil(parts);
        let all = Shared::new(&mut sums);
        parallel(parts, |part| {
            let first_tile = (part * part_tiles).min(shape.tiles());
            let last_tile = (first_tile + part_tiles).min(shape.tiles());
            isa.run(GradientPart {
                shape,
                x,
                dy,
                sums: all,
                start: part * size,
                first_tile,
                last_tile,
            });
        });
    }

    let dw = Shared::new(dw);
    let sums = &sums;
    let groups = out_blocks.div_ceil(isa.tile_blocks());
    parallel(groups * in_blocks, |task| {
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

const PRIVATE_FLOATS: usize = POINTS * 128 * 128;
const PART_TILES: usize = 128;
const MAX_PARTS: usize = 16;

/// Transformed inputs and output gradients of some tiles, for a sum over tiles.
///
/// Inputs are `[36][⌈I/16⌉][tiles][16]`, output gradients `[36][group][tiles][blocks·16]`: each matrix product walks
/// through both in order.
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
    inputs: Shared,
    outputs: Shared,
    input_point: usize,
    output_point: usize,
    capacity: usize,
}

/// Transforms the tiles `first_tile + from .. first_tile + to` into places `from .. to`.
///
/// # Safety
/// Instructions of `L`; `x`, `dy` and the view are of the shape; no other task writes these places.
#[inline(always)]
unsafe fn transform_gradient_tiles<L: Lanes>(
    shape: Shape,
    x: &[f32],
    dy: &[f32],
    view: TilesView,
    first_tile: usize,
    places: std::ops::Range<usize>,
) {
    let (in_blocks, out_blocks) = (shape.i.div_ceil(BLOCK), shape.o.div_ceil(BLOCK));
    for place in places {
        let (n, top, left) = shape.tile(first_tile + place);
        // SAFETY: the caller's promise.
        unsafe {
            for block in 0..in_blocks {
                let plane = x.as_ptr().wrapping_add((n * in_blocks + block) * shape.plane());
                let to = view.inputs.at((block * view.capacity + place) * BLOCK);
                transform_input::<L>(plane, shape, top, left, to, view.input_point);
            }
            for block in 0..out_blocks {
                let plane = dy.as_ptr().wrapping_add((n * out_blocks + block) * shape.plane());
                let group = block / L::TILE_BLOCKS;
                let width = L::TILE_BLOCKS.min(out_blocks - group * L::TILE_BLOCKS) * BLOCK;
                let start = group * L::TILE_BLOCKS * BLOCK * view.capacity;
                let to = view
                    .outputs
                    .at(start + place * width + block % L::TILE_BLOCKS * BLOCK);
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
    for group in 0..out_blocks.div_ceil(L::TILE_BLOCKS) {
        let blocks = L::TILE_BLOCKS.min(out_blocks - group * L::TILE_BLOCKS);
        let strides = Strides {
            a_row: 1,
            a_inner: BLOCK,
            b_inner: blocks * BLOCK,
            b_block: BLOCK,
            c_row: columns,
            c_block: BLOCK,
        };
        let runs = Runs {
            offsets: &[(0, 0)],
            length: tiles,
        };
        let first_column = group * L::TILE_BLOCKS * BLOCK;
        // SAFETY: the caller's promise.
        unsafe {
            let b = view
                .outputs
                .at(point * view.output_point + first_column * view.capacity);
            for block in 0..in_blocks {
                let a = view
                    .inputs
                    .at(point * view.input_point + block * BLOCK * view.capacity);
                let c = sums.wrapping_add(block * BLOCK * columns + first_column);
                multiply::<L>(BLOCK, blocks, runs, strides, a, b, c, accumulate);
            }
        }
    }
}

/// A part of the tiles, summed into sums of its own.
struct GradientPart<'a> {
    shape: Shape,
    x: &'a [f32],
    dy: &'a [f32],
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
            x,
            dy,
            sums,
            start,
            first_tile,
            last_tile,
        } = self;
        let pairs = shape.i.div_ceil(BLOCK) * shape.o.div_ceil(BLOCK) * BLOCK * BLOCK;
        let mut tiles = GradientTiles::new(shape, PART_CHUNK_TILES);
        let view = TilesView {
            inputs: Shared::new(&mut tiles.inputs),
            outputs: Shared::new(&mut tiles.outputs),
            input_point: tiles.input_point,
            output_point: tiles.output_point,
            capacity: PART_CHUNK_TILES,
        };
        // SAFETY: the caller promises the instructions; the scratch is this task's, and so are the sums of its part.
        unsafe {
            if first_tile == last_tile {
                for offset in 0..POINTS * pairs {
                    *sums.at(start + offset) = 0.0;
                }
            }
            for first in (first_tile..last_tile).step_by(PART_CHUNK_TILES) {
                let count = PART_CHUNK_TILES.min(last_tile - first);
                transform_gradient_tiles::<L>(shape, x, dy, view, first, 0..count);
                for point in 0..POINTS {
                    let sums = sums.at(start + point * pairs);
                    add_point::<L>(shape, view, count, point, sums, first > first_tile);
                }
            }
        }
    }
}

/// Tiles transformed before the points are summed, when all tiles share the sums.
const SHARED_CHUNK_TILES: usize = 256;

/// All tiles summed into one copy of the sums, points divided between tasks.
fn sum_by_points(isa: Isa, shape: Shape, x: &[f32], dy: &[f32], sums: &mut [f32]) {
    let pairs = sums.len() / POINTS;
    let capacity = SHARED_CHUNK_TILES.min(shape.tiles());
    let mut tiles = GradientTiles::new(shape, capacity);
    let view = TilesView {
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
                x,
                dy,
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
                pairs,
                accumulate: first_tile > 0,
            });
        });
    }
}

struct TransformTiles<'a> {
    shape: Shape,
    x: &'a [f32],
    dy: &'a [f32],
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
            x,
            dy,
            view,
            first_tile,
            places,
        } = self;
        // SAFETY: the caller promises the instructions; tasks have disjoint places.
        unsafe { transform_gradient_tiles::<L>(shape, x, dy, view, first_tile, places) }
    }
}

struct AddPoint {
    shape: Shape,
    view: TilesView,
    tiles: usize,
    point: usize,
    sums: Shared,
    pairs: usize,
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
            pairs,
            accumulate,
        } = self;
        // SAFETY: the caller promises the instructions; each task has a point of its own.
        unsafe { add_point::<L>(shape, view, tiles, point, sums.at(point * pairs), accumulate) }
    }
}

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
        let (columns, pairs) = (out_blocks * BLOCK, size / POINTS);
        let mut tile = WeightTile::new(shape.weight());
        for block in group * L::TILE_BLOCKS..out_blocks.min((group + 1) * L::TILE_BLOCKS) {
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
                            let at = first.wrapping_add((row * EDGE + column) * pairs);
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

#[cfg(test)]
mod tests {
    use super::*;
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

        let mut y = vec![f32::NAN; n * o.next_multiple_of(BLOCK) * h * w];
        forward(isa, shape, &blocked_x, &weight, &mut y);
        let error = relative_rms(&unblock(&y, n, o, h * w), &naive_forward(geometry, &x, &weight));
        assert!(error < bound, "{isa:?} {shape:?}: forward is off by {error:.1e}");

        let (exact_dx, exact_dw) = naive_gradients(geometry, &x, &weight, &dy);
        let mut dx = vec![f32::NAN; n * i.next_multiple_of(BLOCK) * h * w];
        data_gradient(isa, shape, &blocked_dy, &weight, &mut dx);
        let error = relative_rms(&unblock(&dx, n, i, h * w), &exact_dx);
        assert!(
            error < bound,
            "{isa:?} {shape:?}: data gradient is off by {error:.1e}"
        );

        let mut dw = vec![f32::NAN; o * i * 9];
        weight_gradient(isa, shape, &blocked_x, &blocked_dy, &mut dw);
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
        for (n, i, o, h, w) in [(2, 16, 32, 41, 43), (5, 160, 144, 29, 30)] {
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
            weight_gradient(Isa::best(), Shape { n, i, o, h, w }, &x, &dy, &mut dw);
            crate::kernels::direct::weight_gradient(Isa::best(), geometry, &x, &dy, &mut direct);
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
                i: 144,
                o: 144,
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
                    forward(Isa::best(), shape, &x, &weight, &mut y);
                    data_gradient(Isa::best(), shape, &dy, &weight, &mut dx);
                    weight_gradient(Isa::best(), shape, &x, &dy, &mut dw);
                    (y, dx, dw)
                })
            });
            let one = results.next().expect("one thread");
            assert!(results.all(|more| more == one), "{shape:?}");
        }
    }
}
