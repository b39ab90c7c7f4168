//! 3×3 convolution, stride 2, padding 1, and its data gradient, with 81 products for a 4×4 tile instead of 144.
//!
//! Along an axis an output is the sum of an even pixel times the middle tap and of two odd ones times the outer taps:
//! `y[m] = g1·x[2m] + (g0·x[2m−1] + g2·x[2m+1])`. The second part is a convolution of stride 1 with two taps, F(4, 2) in
//! five products; with the four of the even pixels there are nine entries to a tile along an axis, of six classes: the even
//! ones all meet the same weight. The gradient of the input takes the same products the other way: from four of `dy` and
//! the next come four even pixels, times the middle tap, and four odd ones.
//!
//! Points and smaller last tiles are those of the other form: see [`matrices`](super::matrices).

use std::ops::Range;

use super::super::direct::Geometry;
use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::load::{Load, Read, with_read};
use super::super::panel::Panel;
use super::super::tile::{Row, multiply_panel};
use super::super::weights::Columns;
use super::super::{Shared, parallel};
use super::convolve::{Taps, panel, transform_weight};
use super::grid::{Grid, Place};
use super::matrices::{FourOfTwo, Half, Matrices, MiddleAndOuterTaps, ThreeOfTwo, TwoOfTwo};
use super::{BLOCK, EDGE, POINTS, Shape, TILE};
use crate::pool::Buffer;

/// Entries of a tile along an axis: up to four even ones, from [`TILE`] on up to five odd ones.
const ENTRIES: usize = 2 * TILE + 1;

/// Tiles of a chunk, whose entries should stay in the second-level cache or near it.
const CHUNK_TILES: usize = 24;
/// Fewer tiles do not pay for the transformed weight, more weight does not stay in the caches between chunks.
const MIN_TILES: usize = 2 * CHUNK_TILES;
const MAX_PAIRS: usize = 256 * 256;

/// Whether a convolution should be computed here.
pub(crate) fn suits(isa: Isa, g: Geometry) -> bool {
    let form = g.kernel == [3, 3] && g.stride == 2 && g.padding == 1;
    let channels = g.i.min(g.o) >= BLOCK && g.i * g.o <= MAX_PAIRS;
    // The matrix unit takes the direct form.
    form && channels && isa.matrices().is_none() && Grid::new(small(g)).tiles() >= MIN_TILES
}

/// The shape of the output.
fn small(g: Geometry) -> Shape {
    let [h, w] = g.outputs();
    let Geometry { n, i, o, .. } = g;
    Shape { n, i, o, h, w }
}

/// The convolution of `x` `[N, ⌈I/16⌉, H, W, 16]` with a weight `[O, I, 3, 3]` into `y`.
pub(crate) fn forward(isa: Isa, g: Geometry, x: &[f32], load: Option<Load>, weight: &[f32], y: &mut [f32]) {
    let taps = Taps {
        weight,
        shape: small(g).weight(),
        columns: Columns::Outputs,
    };
    let maps = Maps {
        pass: Pass::Forward,
        x,
        load,
        from: [g.h, g.w],
        to: g.outputs(),
    };
    convolve(isa, small(g), taps, maps, y);
}

/// The gradient of the input, `dx`, from the gradient of the output, `dy`.
pub(crate) fn data_gradient(isa: Isa, g: Geometry, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
    let shape = small(g);
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Inputs,
    };
    let maps = Maps {
        pass: Pass::DataGradient,
        x: dy,
        load: None,
        from: g.outputs(),
        to: [g.h, g.w],
    };
    let flipped = Shape {
        i: shape.o,
        o: shape.i,
        ..shape
    };
    convolve(isa, flipped, taps, maps, dx);
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    DataGradient,
}

/// What is read, and the sizes of the planes that are read and written.
#[derive(Clone, Copy)]
struct Maps<'a> {
    pass: Pass,
    x: &'a [f32],
    load: Option<Load<'a>>,
    from: [usize; 2],
    to: [usize; 2],
}

impl Maps<'_> {
    /// Pixels between those of neighbouring odd entries, of which the even entries' are the last.
    fn step(&self) -> usize {
        match self.pass {
            Pass::Forward => 2,
            Pass::DataGradient => 1,
        }
    }

    /// The first row and column that a tile reads, before the map's first as a huge number.
    fn window(&self, place: Place) -> [usize; 2] {
        match self.pass {
            Pass::Forward => place.first.map(|first| (2 * first).wrapping_sub(1)),
            Pass::DataGradient => place.first,
        }
    }
}

/// `shape` is that of the smaller map, which the tiles divide.
fn convolve(isa: Isa, shape: Shape, taps: Taps, maps: Maps, y: &mut [f32]) {
    let (grid, panel) = (Grid::new(shape), panel(shape.i, shape.o));
    let (in_blocks, [from, to]) = (
        panel.length / BLOCK,
        [maps.from, maps.to].map(|[h, w]| h * w * BLOCK),
    );
    assert_eq!(maps.x.len(), shape.n * in_blocks * from);
    assert_eq!(y.len(), shape.n * panel.blocks * to);
    assert_eq!(taps.weight.len(), shape.i * shape.o * 9);
    // A class stands where a point does in the other form.
    let weight = transform_weight::<MiddleAndOuterTaps>(isa, taps, EDGE);
    let class = panel.size() + BLOCK;
    let (threads, tiles, weight) = (rayon::current_num_threads(), grid.tiles(), &*weight);
    let chunk_tiles = tiles.div_ceil(tiles.div_ceil(CHUNK_TILES).next_multiple_of(threads));
    let y = Shared::new(y);
    parallel(tiles.div_ceil(chunk_tiles), |chunk| {
        isa.run(Chunk {
            grid,
            maps,
            panel,
            class,
            weight,
            y,
            tiles: chunk * chunk_tiles..tiles.min((chunk + 1) * chunk_tiles),
        });
    });
}

/// Entries of a class along an axis of a tile with so many outputs.
fn entries(class: usize, outputs: usize) -> Range<usize> {
    match class {
        0 => 0..outputs,
        odd => TILE + odd - 1..TILE + odd,
    }
}

/// Some tiles of a convolution: to entries, a matrix product for each, and back.
struct Chunk<'a> {
    grid: Grid,
    maps: Maps<'a>,
    panel: Panel,
    class: usize,
    weight: &'a [f32],
    y: Shared,
    tiles: Range<usize>,
}

impl Kernel for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            grid,
            maps,
            panel,
            class,
            weight,
            y,
            tiles,
        } = self;
        let (inputs, out_blocks) = (panel.length, panel.blocks);
        let in_blocks = inputs / BLOCK;
        // A cache line more per entry, lest the streams of a transform meet in one cache set.
        let v_entry = tiles.len() * inputs + BLOCK;
        let width = L::TILE_BLOCKS.min(out_blocks) * BLOCK;
        let m_entry = tiles.len() * width + BLOCK;
        let mut v = Buffer::take(ENTRIES * ENTRIES * v_entry);
        let mut m = Buffer::take(ENTRIES * ENTRIES * m_entry);
        let (v, m) = (v.as_mut_ptr(), m.as_mut_ptr());
        let runs = panel.runs([0]);
        let places: Vec<_> = tiles.clone().map(|tile| grid.place(tile)).collect();
        let rows_of = |class: usize| {
            let mut rows = Vec::new();
            for tile in grid.having(class, &tiles) {
                let [height, wide] = places[tile].outputs;
                for row in entries(class / EDGE, height) {
                    for column in entries(class % EDGE, wide) {
                        let entry = row * ENTRIES + column;
                        rows.push(Row {
                            a: entry * v_entry + tile * inputs,
                            c: entry * m_entry + tile * width,
                        });
                    }
                }
            }
            rows
        };
        let rows: Vec<_> = (0..POINTS).map(rows_of).collect();
        // SAFETY: the caller promises the instructions. Scratch is sized above; the maps are sized as `convolve` checked.
        // This task alone writes the outputs of its tiles.
        unsafe {
            for (at, place) in places.iter().enumerate() {
                for block in 0..in_blocks {
                    L::call(ToEntries {
                        maps,
                        plane: place.picture * in_blocks + block,
                        place: *place,
                        to: v.wrapping_add(at * inputs + block * BLOCK),
                        entry: v_entry,
                    });
                }
            }
            for first in (0..out_blocks).step_by(L::TILE_BLOCKS) {
                let blocks = L::TILE_BLOCKS.min(out_blocks - first);
                for (at, rows) in rows.iter().enumerate() {
                    let weight = weight.as_ptr().wrapping_add(at * class);
                    multiply_panel::<L>(
                        rows, &runs, v, panel, weight, first, blocks, m, BLOCK, true, false,
                    );
                }
                for (at, place) in places.iter().enumerate() {
                    for block in 0..blocks {
                        L::call(FromEntries {
                            maps,
                            from: m.wrapping_add(at * width + block * BLOCK),
                            entry: m_entry,
                            y,
                            plane: place.picture * out_blocks + first + block,
                            place: *place,
                        });
                    }
                }
            }
            y.written::<L>();
        }
    }
}

/// Calls a function that is generic over the [`Matrices`] of two taps for so many outputs along an axis.
macro_rules! with_matrices {
    ($outputs:expr, $function:ident::<$lanes:ident>($($argument:expr),* $(,)?)) => {
        match $outputs {
            4 => $function::<$lanes, FourOfTwo, 4, 5>($($argument),*),
            3 => $function::<$lanes, ThreeOfTwo, 3, 4>($($argument),*),
            _ => $function::<$lanes, TwoOfTwo, 2, 3>($($argument),*),
        }
    };
}

/// The entries of a tile of a plane.
struct ToEntries<'a> {
    maps: Maps<'a>,
    plane: usize,
    place: Place,
    /// Room for the entries at distances of `entry`.
    to: *mut f32,
    entry: usize,
}

impl Kernel for ToEntries<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [rows, columns] = self.place.outputs;
        let mut half = Half::new();
        // SAFETY: the caller promises the instructions and a plane and a place of the map.
        unsafe {
            with_read!(self.maps.load, self.plane, |values: L| {
                with_matrices!(rows, columns_to_entries::<L>(&self, values, &mut half))
            });
            with_matrices!(columns, rows_to_entries::<L>(&self, &mut half));
        }
    }
}

/// # Safety
/// As for [`ToEntries`], whose rows the matrices are for.
#[inline(always)]
unsafe fn columns_to_entries<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &ToEntries,
    values: impl Read<L>,
    half: &mut Half<ENTRIES>,
) {
    let ([h, w], step, columns) = (task.maps.from, task.maps.step(), task.place.outputs[1]);
    let [top, left] = task.maps.window(task.place);
    let plane = task.maps.x.as_ptr().wrapping_add(task.plane * h * w * BLOCK);
    // Odd entries start at the window's first row, even ones at the last before the second odd one.
    let (height, width, even_row) = (step * T + 1, step * columns + 1, step - 1);
    let inside = top < h && left < w && top + height <= h && left + width <= w;
    // SAFETY: the caller's promise; addresses outside the picture are replaced.
    unsafe {
        for column in 0..width {
            let (mut odd, mut even) = ([L::zero(); E], [L::zero(); T]);
            if inside {
                let first = plane.wrapping_add((top * w + left + column) * BLOCK);
                let (distance, next) = (step * w * BLOCK, step * columns * BLOCK);
                for (at, odd) in odd.iter_mut().enumerate() {
                    let from = first.wrapping_add(at * distance);
                    *odd = values.read(from);
                    // What the next tile of the row reads and this one does not.
                    if column > 0 {
                        L::prefetch(from.wrapping_add(next));
                    }
                }
                let first = first.wrapping_add(even_row * w * BLOCK);
                for (at, even) in even.iter_mut().enumerate() {
                    let from = first.wrapping_add(at * distance);
                    *even = values.read(from);
                    if column > 0 {
                        L::prefetch(from.wrapping_add(next));
                    }
                }
            } else {
                let x = left.wrapping_add(column);
                for (at, odd) in odd.iter_mut().enumerate() {
                    let y = top.wrapping_add(step * at);
                    if y < h && x < w {
                        *odd = values.read(plane.wrapping_add((y * w + x) * BLOCK));
                    }
                }
                for (at, even) in even.iter_mut().enumerate() {
                    let y = top.wrapping_add(step * at + even_row);
                    if y < h && x < w {
                        *even = values.read(plane.wrapping_add((y * w + x) * BLOCK));
                    }
                }
            }
            for (row, value) in even.into_iter().enumerate() {
                value.store(half.at(row, column));
            }
            for (row, value) in M::input_to_points(odd).into_iter().enumerate() {
                value.store(half.at(TILE + row, column));
            }
        }
    }
}

/// # Safety
/// As for [`ToEntries`], whose columns the matrices are for.
#[inline(always)]
unsafe fn rows_to_entries<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &ToEntries,
    half: &mut Half<ENTRIES>,
) {
    let (to, entry, step) = (task.to, task.entry, task.maps.step());
    let rows = task.place.outputs[0];
    for row in (0..rows).chain(TILE..TILE + rows + 1) {
        let to = to.wrapping_add(row * ENTRIES * entry);
        // SAFETY: the caller's promise.
        unsafe {
            for column in 0..T {
                let even = L::load(half.at(row, step * column + step - 1));
                even.store(to.wrapping_add(column * entry));
            }
            let mut odd = [L::zero(); E];
            for (column, odd) in odd.iter_mut().enumerate() {
                *odd = L::load(half.at(row, step * column));
            }
            for (column, value) in M::input_to_points(odd).into_iter().enumerate() {
                value.store(to.wrapping_add((TILE + column) * entry));
            }
        }
    }
}

/// A tile of a plane from its entries, written where it lies inside the picture. The task ends with [`Shared::written`].
struct FromEntries<'a> {
    maps: Maps<'a>,
    /// The entries, at distances of `entry`.
    from: *const f32,
    entry: usize,
    y: Shared,
    plane: usize,
    place: Place,
}

impl Kernel for FromEntries<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [rows, columns] = self.place.outputs;
        let mut half = Half::new();
        // SAFETY: the caller promises the instructions, a plane and a place of the map, and that it is the task's own.
        unsafe {
            with_matrices!(rows, columns_from_entries::<L>(&self, &mut half));
            with_matrices!(columns, rows_from_entries::<L>(&self, &mut half));
        }
    }
}

/// # Safety
/// As for [`FromEntries`], whose rows the matrices are for.
#[inline(always)]
unsafe fn columns_from_entries<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &FromEntries,
    half: &mut Half<ENTRIES>,
) {
    let (from, entry, columns) = (task.from, task.entry, task.place.outputs[1]);
    for column in (0..columns).chain(TILE..TILE + columns + 1) {
        let at = |row: usize| from.wrapping_add((row * ENTRIES + column) * entry);
        // SAFETY: the caller's promise.
        unsafe {
            let mut odd = [L::zero(); E];
            for (row, odd) in odd.iter_mut().enumerate() {
                *odd = L::load(at(TILE + row));
            }
            for (row, odd) in M::points_to_output(odd).into_iter().enumerate() {
                let even = L::load(at(row));
                match task.maps.pass {
                    Pass::Forward => even.add(odd).store(half.at(row, column)),
                    Pass::DataGradient => {
                        even.store(half.at(2 * row, column));
                        odd.store(half.at(2 * row + 1, column));
                    }
                }
            }
        }
    }
}

/// # Safety
/// As for [`FromEntries`], whose columns the matrices are for.
#[inline(always)]
unsafe fn rows_from_entries<L: Lanes, M: Matrices<T, E>, const T: usize, const E: usize>(
    task: &FromEntries,
    half: &mut Half<ENTRIES>,
) {
    let ([h, w], y) = (task.maps.to, task.y);
    // Pixels of the larger map for each of the smaller.
    let scale = match task.maps.pass {
        Pass::Forward => 1,
        Pass::DataGradient => 2,
    };
    let [top, left] = task.place.first.map(|first| scale * first);
    for row in 0..(scale * task.place.outputs[0]).min(h - top) {
        let first = (task.plane * h + top + row) * w + left;
        // SAFETY: the caller's promise; only pixels inside the picture are written.
        unsafe {
            let mut odd = [L::zero(); E];
            for (column, odd) in odd.iter_mut().enumerate() {
                *odd = L::load(half.at(row, TILE + column));
            }
            for (column, odd) in M::points_to_output(odd).into_iter().enumerate() {
                let even = L::load(half.at(row, column));
                match task.maps.pass {
                    Pass::Forward => {
                        if left + column < w {
                            y.write((first + column) * BLOCK, even.add(odd));
                        }
                    }
                    Pass::DataGradient => {
                        if left + 2 * column < w {
                            y.write((first + 2 * column) * BLOCK, even);
                        }
                        if left + 2 * column + 1 < w {
                            y.write((first + 2 * column + 1) * BLOCK, odd);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{block, naive_forward, naive_gradients, normal, relative_rms, unblock};

    fn geometry([n, i, o, h, w]: [usize; 5]) -> Geometry {
        Geometry {
            n,
            i,
            o,
            h,
            w,
            kernel: [3, 3],
            stride: 2,
            padding: 1,
        }
    }

    #[test]
    fn agrees_with_float64_on_every_instruction_set() {
        for isa in Isa::available() {
            for sizes in [
                [1, 1, 1, 1, 1],
                [1, 16, 16, 8, 8],
                [2, 3, 5, 7, 6],
                [1, 20, 90, 9, 5],
                [3, 32, 48, 16, 27],
                [2, 64, 64, 28, 28],
                [3, 33, 130, 14, 14],
                [1, 96, 80, 12, 10],
            ] {
                let g = geometry(sizes);
                let Geometry { n, i, o, h, w, .. } = g;
                let [oh, ow] = g.outputs();
                let (x, weight, dy) = (
                    normal(n * i * h * w, 1),
                    normal(o * i * 9, 2),
                    normal(n * o * oh * ow, 3),
                );
                let (blocked_x, blocked_dy) = (block(&x, n, i, h * w), block(&dy, n, o, oh * ow));
                let mut y = vec![f32::NAN; n * o.next_multiple_of(BLOCK) * oh * ow];
                forward(isa, g, &blocked_x, None, &weight, &mut y);
                let error = relative_rms(&unblock(&y, n, o, oh * ow), &naive_forward(g, &x, &weight));
                assert!(error < 2e-6, "{isa:?} {g:?}: forward is off by {error:.1e}");

                let (exact, _) = naive_gradients(g, &x, &weight, &dy);
                let mut dx = vec![f32::NAN; n * i.next_multiple_of(BLOCK) * h * w];
                data_gradient(isa, g, &blocked_dy, &weight, &mut dx);
                let error = relative_rms(&unblock(&dx, n, i, h * w), &exact);
                assert!(error < 2e-6, "{isa:?} {g:?}: data gradient is off by {error:.1e}");
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let g = geometry([5, 32, 80, 30, 27]);
        let [oh, ow] = g.outputs();
        let (x, weight) = (normal(g.n * g.i * g.h * g.w, 1), normal(g.o * g.i * 9, 2));
        let dy = normal(g.n * g.o * oh * ow, 3);
        let mut results = [1, 2, 3].into_iter().map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a thread pool");
            pool.install(|| {
                let (mut y, mut dx) = (dy.clone(), x.clone());
                forward(Isa::best(), g, &x, None, &weight, &mut y);
                data_gradient(Isa::best(), g, &dy, &weight, &mut dx);
                (y, dx)
            })
        });
        let one = results.next().expect("one thread");
        assert!(results.all(|more| more == one));
    }

    #[test]
    fn large_maps_of_middling_channels_are_computed_here() {
        let g = geometry([16, 64, 64, 112, 112]);
        let few = Geometry {
            n: 1,
            h: 28,
            w: 28,
            ..g
        };
        let wide = Geometry {
            i: 512,
            o: 512,
            h: 14,
            w: 14,
            ..g
        };
        let other = Geometry { padding: 0, ..g };
        assert!(suits(Isa::Portable, g));
        assert!([few, wide, other].iter().all(|g| !suits(Isa::Portable, *g)));
    }
}
