//! 3×3 convolution, stride 2, padding 1, with 81 products for a 4×4 tile instead of 144, and its gradients.
//!
//! Along an axis an output is the sum of an even pixel times the middle tap and of two odd ones times the outer taps:
//! `y[m] = g1·x[2m] + (g0·x[2m−1] + g2·x[2m+1])`. The second part is a convolution of stride 1 with two taps, F(4, 2) in
//! five products; with the four of the even pixels there are nine entries to a tile along an axis, of six classes: the even
//! ones all meet the same weight. The gradient of the input takes the same products the other way: from four of `dy` and
//! the next come four even pixels, times the middle tap, and four odd ones. The gradient of the weight is the transposed
//! algorithm, as with stride 1.
//!
//! Points and smaller last tiles are those of the other form: see [`matrices`](super::matrices).

use std::ops::Range;

use super::super::Shared;
use super::super::direct::Geometry;
use super::super::lanes::{Isa, Kernel, Lanes};
use super::super::load::{Load, Read, with_read};
use super::super::weights::Columns;
use super::convolve::{Taps, convolve_taps};
use super::form::{Form, GradientForm, Maps};
use super::gradient::{self, Pair};
use super::grid::{Grid, Place};
use super::matrices::{
    FourOfTwo, GradientMatrices, Half, Matrices, MiddleAndOuterTaps, ThreeOfTwo, TwoOfTwo,
};
use super::tiles::gradient_column;
use super::{BLOCK, Shape, TILE};

/// Entries of a tile along an axis: up to four even ones, from [`TILE`] on up to five odd ones.
const ENTRIES: usize = 2 * TILE + 1;

/// Fewer tiles do not pay for the transformed weight.
const MIN_TILES: usize = 16;

/// Whether a convolution and its data gradient should be computed here: the matrix unit takes their direct form.
pub(crate) fn suits(isa: Isa, g: Geometry) -> bool {
    isa.matrices().is_none() && suits_weight_gradient(g)
}

/// Whether a weight gradient should be.
pub(crate) fn suits_weight_gradient(g: Geometry) -> bool {
    let form = g.kernel == [3, 3] && g.stride == 2 && g.padding == 1;
    form && g.i.min(g.o) >= BLOCK && Grid::new(small(g)).tiles() >= MIN_TILES
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
    convolve_taps(isa, StrideTwo::forward(g), taps, Maps { x, load }, y);
}

/// The gradient of the input, `dx`, from the gradient of the output, `dy`.
pub(crate) fn data_gradient(isa: Isa, g: Geometry, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
    let shape = small(g);
    let taps = Taps {
        weight,
        shape: shape.weight(),
        columns: Columns::Inputs,
    };
    let flipped = Shape {
        i: shape.o,
        o: shape.i,
        ..shape
    };
    let form = StrideTwo {
        pass: Pass::DataGradient,
        grid: Grid::new(flipped),
        from: g.outputs(),
        to: [g.h, g.w],
    };
    convolve_taps(isa, form, taps, Maps { x: dy, load: None }, dx);
}

/// The gradient of the weight, `dw` `[O, I, 3, 3]`, from the input and the gradient of the output.
pub(crate) fn weight_gradient(
    isa: Isa,
    g: Geometry,
    x: &[f32],
    load: Option<Load>,
    dy: &[f32],
    dw: &mut [f32],
) {
    let x = Maps { x, load };
    gradient::sum(isa, StrideTwo::forward(g), Pair { x, dy }, dw);
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    DataGradient,
}

/// The form of this module. Tiles divide the smaller map.
#[derive(Clone, Copy)]
struct StrideTwo {
    pass: Pass,
    grid: Grid,
    /// Height and width of the maps that are read and written.
    from: [usize; 2],
    to: [usize; 2],
}

impl StrideTwo {
    fn forward(g: Geometry) -> Self {
        Self {
            pass: Pass::Forward,
            grid: Grid::new(small(g)),
            from: [g.h, g.w],
            to: g.outputs(),
        }
    }

    /// Pixels between those of neighbouring odd entries, of which the even entries' are the last.
    fn step(self) -> usize {
        match self.pass {
            Pass::Forward => 2,
            Pass::DataGradient => 1,
        }
    }

    /// The first row and column that a tile reads, before the map's first as a huge number.
    fn window(self, place: Place) -> [usize; 2] {
        match self.pass {
            Pass::Forward => place.first.map(|first| (2 * first).wrapping_sub(1)),
            Pass::DataGradient => place.first,
        }
    }
}

impl Form for StrideTwo {
    type Taps = MiddleAndOuterTaps;

    fn grid(self) -> Grid {
        self.grid
    }

    fn planes(self) -> [usize; 2] {
        [self.from, self.to].map(|[h, w]| h * w * BLOCK)
    }

    fn side(self) -> usize {
        ENTRIES
    }

    /// The middle tap stands where a point does in the other form.
    fn along_axis(self, point: usize) -> Range<usize> {
        match point {
            0 => 0..TILE,
            odd => TILE + odd - 1..TILE + odd,
        }
    }

    /// A tile of T outputs has T even entries, T + 1 odd ones, and T + 2 points in a grid.
    fn shared_with(self, entry: usize) -> usize {
        if entry < TILE { entry + 2 } else { entry - TILE + 1 }
    }

    #[inline(always)]
    unsafe fn read_tile<L: Lanes>(self, maps: Maps, plane: usize, place: Place, to: *mut f32, entry: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            L::call(ToEntries {
                form: self,
                maps,
                plane,
                place,
                to,
                entry,
            });
        }
    }

    #[inline(always)]
    unsafe fn write_tile<L: Lanes>(
        self,
        from: *const f32,
        entry: usize,
        y: Shared,
        plane: usize,
        place: Place,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            L::call(FromEntries {
                form: self,
                from,
                entry,
                y,
                plane,
                place,
            });
        }
    }
}

impl GradientForm for StrideTwo {
    #[inline(always)]
    unsafe fn read_gradient_tile<L: Lanes>(
        self,
        dy: &[f32],
        plane: usize,
        place: Place,
        to: *mut f32,
        entry: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            L::call(GradientToEntries {
                dy,
                size: self.to,
                plane,
                place,
                to,
                entry,
            });
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
    form: StrideTwo,
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
    let ([h, w], step, columns) = (task.form.from, task.form.step(), task.place.outputs[1]);
    let [top, left] = task.form.window(task.place);
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
    let (to, entry, step) = (task.to, task.entry, task.form.step());
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
struct FromEntries {
    form: StrideTwo,
    /// The entries, at distances of `entry`.
    from: *const f32,
    entry: usize,
    y: Shared,
    plane: usize,
    place: Place,
}

impl Kernel for FromEntries {
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
                match task.form.pass {
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
    let ([h, w], y) = (task.form.to, task.y);
    // Pixels of the larger map for each of the smaller.
    let scale = match task.form.pass {
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
                match task.form.pass {
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

/// The entries of a tile of a plane of output gradients, zero outside the picture: an output meets an even entry of its own
/// and, with its neighbours, the odd ones.
struct GradientToEntries<'a> {
    dy: &'a [f32],
    size: [usize; 2],
    plane: usize,
    place: Place,
    /// Room for the entries at distances of `entry`.
    to: *mut f32,
    entry: usize,
}

impl Kernel for GradientToEntries<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [rows, columns] = self.place.outputs;
        let mut half = Half::new();
        // SAFETY: the caller promises the instructions and a plane and a place of the map.
        unsafe {
            with_matrices!(rows, gradient_columns_to_entries::<L>(&self, &mut half));
            with_matrices!(columns, gradient_rows_to_entries::<L>(&self, &half));
        }
    }
}

/// # Safety
/// As for [`GradientToEntries`], whose rows the matrices are for.
#[inline(always)]
unsafe fn gradient_columns_to_entries<L: Lanes, M: GradientMatrices<T, E>, const T: usize, const E: usize>(
    task: &GradientToEntries,
    half: &mut Half<ENTRIES>,
) {
    for column in 0..task.place.outputs[1] {
        // SAFETY: the caller's promise.
        unsafe {
            let dy = gradient_column::<L, T>(task.dy, task.size, task.plane, task.place, column);
            for (row, value) in dy.into_iter().enumerate() {
                value.store(half.at(row, column));
            }
            for (row, value) in M::output_to_points(dy).into_iter().enumerate() {
                value.store(half.at(TILE + row, column));
            }
        }
    }
}

/// # Safety
/// As for [`GradientToEntries`], whose columns the matrices are for.
#[inline(always)]
unsafe fn gradient_rows_to_entries<L: Lanes, M: GradientMatrices<T, E>, const T: usize, const E: usize>(
    task: &GradientToEntries,
    half: &Half<ENTRIES>,
) {
    let rows = task.place.outputs[0];
    for row in (0..rows).chain(TILE..TILE + rows + 1) {
        let to = task.to.wrapping_add(row * ENTRIES * task.entry);
        // SAFETY: the caller's promise.
        unsafe {
            let dy = half.row::<L, T>(row);
            for (column, value) in dy.into_iter().enumerate() {
                value.store(to.wrapping_add(column * task.entry));
            }
            for (column, value) in M::output_to_points(dy).into_iter().enumerate() {
                value.store(to.wrapping_add((TILE + column) * task.entry));
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
                [2, 260, 256, 12, 11],
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

                let (exact, exact_dw) = naive_gradients(g, &x, &weight, &dy);
                let mut dx = vec![f32::NAN; n * i.next_multiple_of(BLOCK) * h * w];
                data_gradient(isa, g, &blocked_dy, &weight, &mut dx);
                let error = relative_rms(&unblock(&dx, n, i, h * w), &exact);
                assert!(error < 2e-6, "{isa:?} {g:?}: data gradient is off by {error:.1e}");

                let mut dw = vec![f32::NAN; weight.len()];
                weight_gradient(isa, g, &blocked_x, None, &blocked_dy, &mut dw);
                let error = relative_rms(&dw, &exact_dw);
                assert!(
                    error < 2e-6,
                    "{isa:?} {g:?}: weight gradient is off by {error:.1e}"
                );
            }
        }
    }

    /// Both ways to sum weight gradients over many tiles: several parts, and all tiles by points in several rounds.
    #[test]
    fn passes_over_many_tiles_agree_with_the_direct_form() {
        use crate::kernels::direct;

        for sizes in [[2, 16, 32, 81, 86], [5, 80, 96, 59, 57]] {
            let (isa, g) = (Isa::best(), geometry(sizes));
            let Geometry { n, i, o, h, w, .. } = g;
            let [oh, ow] = g.outputs();
            let (x, dy) = (normal(n * i * h * w, 1), normal(n * o * oh * ow, 2));
            let weight = normal(o * i * 9, 3);
            let nothing = || [dy.len(), x.len(), weight.len()].map(|length| vec![f32::NAN; length]);
            let [mut y, mut dx, mut dw] = nothing();
            direct::forward(isa, g, &x, None, &direct::prepare(isa, g, &weight), &mut y);
            direct::data_gradient(isa, g, &dy, &weight, &mut dx);
            direct::weight_gradient(isa, g, &x, None, &dy, &mut dw);
            let exact = [y, dx, dw].map(|values| values.into_iter().map(f64::from).collect::<Vec<_>>());
            let [mut y, mut dx, mut dw] = nothing();
            forward(isa, g, &x, None, &weight, &mut y);
            data_gradient(isa, g, &dy, &weight, &mut dx);
            weight_gradient(isa, g, &x, None, &dy, &mut dw);
            for (pass, (got, exact)) in [y, dx, dw].iter().zip(&exact).enumerate() {
                let error = relative_rms(got, exact);
                assert!(error < 3e-6, "{g:?}: pass {pass} differs by {error:.1e}");
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        for sizes in [[5, 32, 80, 30, 27], [2, 260, 256, 12, 11], [4, 70, 96, 59, 60]] {
            let g = geometry(sizes);
            let [oh, ow] = g.outputs();
            let x = normal(g.n * g.i.next_multiple_of(BLOCK) * g.h * g.w, 1);
            let dy = normal(g.n * g.o * oh * ow, 2);
            let weight = normal(g.o * g.i * 9, 3);
            let mut results = [1, 2, 3].into_iter().map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .expect("a thread pool");
                pool.install(|| {
                    let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), weight.clone());
                    forward(Isa::best(), g, &x, None, &weight, &mut y);
                    data_gradient(Isa::best(), g, &dy, &weight, &mut dx);
                    weight_gradient(Isa::best(), g, &x, None, &dy, &mut dw);
                    (y, dx, dw)
                })
            });
            let one = results.next().expect("one thread");
            assert!(results.all(|more| more == one), "{g:?}");
        }
    }

    #[test]
    fn maps_of_many_tiles_are_computed_here() {
        let g = geometry([16, 64, 64, 112, 112]);
        let wide = geometry([16, 512, 512, 14, 14]);
        let few = geometry([1, 64, 64, 14, 14]);
        let other = Geometry { padding: 0, ..g };
        assert!([g, wide].iter().all(|g| suits(Isa::Portable, *g)));
        assert!([few, other].iter().all(|g| !suits(Isa::Portable, *g)));
    }
}
