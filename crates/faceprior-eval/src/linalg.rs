//! Dense linear algebra of the size statistics need: products and symmetric eigenproblems, in `f64`.

use rayon::prelude::*;

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Vec<f64>,
}

impl Matrix {
    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![0.0; rows * cols],
        }
    }

    pub(crate) fn identity(n: usize) -> Self {
        let mut matrix = Self::zeros(n, n);
        for i in 0..n {
            matrix.data[i * n + i] = 1.0;
        }
        matrix
    }

    pub(crate) fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f64] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// The first `rows` rows.
    pub(crate) fn truncate_rows(mut self, rows: usize) -> Self {
        self.data.truncate(rows * self.cols);
        Self { rows, ..self }
    }

    /// Mean of each column.
    pub(crate) fn column_means(&self) -> Vec<f64> {
        let mut mean = vec![0.0; self.cols];
        for row in self.data.chunks_exact(self.cols) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
        }
        mean.iter_mut().for_each(|m| *m /= self.rows as f64);
        mean
    }

    pub(crate) fn subtract_row(&mut self, row: &[f64]) {
        for own in self.data.chunks_exact_mut(self.cols) {
            own.iter_mut().zip(row).for_each(|(x, m)| *x -= m);
        }
    }

    pub(crate) fn scale(&mut self, factor: f64) {
        self.data.iter_mut().for_each(|x| *x *= factor);
    }

    pub(crate) fn trace(&self) -> f64 {
        (0..self.rows).map(|i| self.data[i * self.cols + i]).sum()
    }

    fn view(&self) -> View<'_> {
        View {
            data: &self.data,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.cols,
            col_stride: 1,
        }
    }

    fn view_transposed(&self) -> View<'_> {
        View {
            data: &self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: 1,
            col_stride: self.cols,
        }
    }

    /// `A·B`
    pub(crate) fn times(&self, other: &Matrix) -> Matrix {
        product(self.view(), other.view())
    }

    /// `A·Bᵀ`
    pub(crate) fn times_transposed(&self, other: &Matrix) -> Matrix {
        product(self.view(), other.view_transposed())
    }

    /// `Aᵀ·B`
    pub(crate) fn transposed_times(&self, other: &Matrix) -> Matrix {
        product(self.view_transposed(), other.view())
    }
}

struct View<'a> {
    data: &'a [f64],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// Rows of the product that one task computes. Fixed, so that the result does not depend on the threads.
const ROWS_PER_TASK: usize = 64;

fn product(a: View<'_>, b: View<'_>) -> Matrix {
    assert_eq!(a.cols, b.rows, "inner dimensions of a product");
    let mut c = Matrix::zeros(a.rows, b.cols);
    if c.data.is_empty() || a.cols == 0 {
        return c;
    }
    c.data
        .par_chunks_mut(ROWS_PER_TASK * b.cols)
        .enumerate()
        .for_each(|(task, out)| {
            let rows = out.len() / b.cols;
            let a_part = &a.data[task * ROWS_PER_TASK * a.row_stride..];
            // The last element that each operand is read at, to check the bounds that dgemm cannot.
            let last_a = (rows - 1) * a.row_stride + (a.cols - 1) * a.col_stride;
            let last_b = (b.rows - 1) * b.row_stride + (b.cols - 1) * b.col_stride;
            assert!(
                last_a < a_part.len() && last_b < b.data.len(),
                "a view inside its matrix"
            );
            // SAFETY: with the strides given, dgemm reads `a_part` and `b.data` up to the indices asserted above and
            // writes `out` as a contiguous [rows, b.cols] matrix, which is exactly its length.
            unsafe {
                matrixmultiply::dgemm(
                    rows,
                    a.cols,
                    b.cols,
                    1.0,
                    a_part.as_ptr(),
                    a.row_stride as isize,
                    a.col_stride as isize,
                    b.data.as_ptr(),
                    b.row_stride as isize,
                    b.col_stride as isize,
                    0.0,
                    out.as_mut_ptr(),
                    b.cols as isize,
                    1,
                );
            }
        });
    c
}

/// Eigenvalues in descending order and the unit eigenvectors as rows in the same order.
pub(crate) struct Eigen {
    pub(crate) values: Vec<f64>,
    pub(crate) vectors: Matrix,
}

/// Eigen-decomposition of a symmetric matrix: Householder reduction to a tridiagonal one, then the implicit QL
/// iteration (EISPACK's `tred2` and `tql2`), with the rotations kept and applied in batches to panels that fit
/// the cache. Only the upper triangle needs to be right.
pub(crate) fn symmetric_eigen(a: Matrix) -> Eigen {
    assert_eq!(a.rows, a.cols, "a symmetric matrix is square");
    let n = a.rows;
    let (mut diagonal, mut off, q_transposed) = tridiagonalize(a);
    let mut panels = Panels::split(&q_transposed);
    implicit_ql(&mut diagonal, &mut off, |rotations| panels.rotate(rotations));
    let unsorted = panels.join();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]));
    let mut vectors = Matrix::zeros(n, n);
    for (to, &from) in order.iter().enumerate() {
        vectors.row_mut(to).copy_from_slice(unsorted.row(from));
    }
    Eigen {
        values: order.iter().map(|&i| diagonal[i]).collect(),
        vectors,
    }
}

/// Eigenvalues alone, in descending order.
pub(crate) fn symmetric_eigenvalues(a: Matrix) -> Vec<f64> {
    let mut reduction = Reduction::of(a);
    implicit_ql(&mut reduction.diagonal, &mut reduction.off, |_| ());
    reduction.diagonal.sort_by(|x, y| y.total_cmp(x));
    reduction.diagonal
}

/// `A = Q·T·Qᵀ` with T tridiagonal: its diagonal, its off-diagonal (padded by a 0) and the reflectors of Q.
struct Reduction {
    diagonal: Vec<f64>,
    off: Vec<f64>,
    /// Row k holds, from column k+1 on, the unit vector of reflector k (zeros for the identity).
    reflectors: Matrix,
}

/// Work per row from which a step is worth sharing between threads.
const PARALLEL_FROM: usize = 256;

impl Reduction {
    fn of(mut a: Matrix) -> Self {
        let n = a.rows;
        let mut diagonal = vec![0.0; n];
        let mut off = vec![0.0; n];
        for k in 0..n {
            diagonal[k] = a.data[k * n + k];
            if k + 1 == n {
                break;
            }
            let (top, below) = a.data.split_at_mut((k + 1) * n);
            let v = &mut top[k * n + k + 1..];
            let tail: f64 = v[1..].iter().map(|x| x * x).sum();
            if tail == 0.0 {
                off[k] = v[0];
                v.fill(0.0);
                continue;
            }
            let norm = (v[0] * v[0] + tail).sqrt();
            let alpha = if v[0] > 0.0 { -norm } else { norm };
            off[k] = alpha;
            v[0] -= alpha;
            let length = (v[0] * v[0] + tail).sqrt();
            v.iter_mut().for_each(|x| *x /= length);
            // A ← H·A·H with H = I − 2vvᵀ, as a rank-two update of what is left.
            let v = &*v;
            let threshold = if v.len() >= PARALLEL_FROM { 32 } else { usize::MAX };
            let p: Vec<f64> = below
                .par_chunks(n)
                .with_min_len(threshold)
                .map(|row| 2.0 * dot(&row[k + 1..], v))
                .collect();
            let half = dot(&p, v);
            let w: Vec<f64> = p.iter().zip(v).map(|(p, v)| p - half * v).collect();
            below
                .par_chunks_mut(n)
                .with_min_len(threshold)
                .enumerate()
                .for_each(|(i, row)| {
                    let (vi, wi) = (v[i], w[i]);
                    for ((x, v), w) in row[k + 1..].iter_mut().zip(v).zip(&w) {
                        *x -= vi * w + wi * v;
                    }
                });
        }
        Self {
            diagonal,
            off,
            reflectors: a,
        }
    }
}

fn tridiagonalize(a: Matrix) -> (Vec<f64>, Vec<f64>, Matrix) {
    let Reduction {
        diagonal,
        off,
        reflectors,
    } = Reduction::of(a);
    let n = reflectors.rows;
    let mut q_transposed = Matrix::identity(n);
    for k in (0..n.saturating_sub(1)).rev() {
        let v = &reflectors.row(k)[k + 1..];
        let threshold = if v.len() >= PARALLEL_FROM { 32 } else { usize::MAX };
        q_transposed.data[(k + 1) * n..]
            .par_chunks_mut(n)
            .with_min_len(threshold)
            .for_each(|row| {
                let row = &mut row[k + 1..];
                let twice = 2.0 * dot(row, v);
                row.iter_mut().zip(v).for_each(|(x, v)| *x -= twice * v);
            });
    }
    (diagonal, off, q_transposed)
}

/// A rotation of rows `row` and `row + 1`.
struct Rotation {
    row: usize,
    cos: f64,
    sin: f64,
}

/// Rotations kept before they are applied.
const BATCH: usize = 1 << 14;

fn implicit_ql(d: &mut [f64], e: &mut [f64], mut apply: impl FnMut(&[Rotation])) {
    let n = d.len();
    let mut batch = Vec::with_capacity(BATCH + n);
    let mut shift = 0.0;
    let mut scale: f64 = 0.0;
    for l in 0..n {
        scale = scale.max(d[l].abs() + e[l].abs());
        let small = |x: f64, scale: f64| x.abs() <= f64::EPSILON * scale;
        let m = (l..n).find(|&m| small(e[m], scale)).unwrap_or(n - 1);
        while m > l && !small(e[l], scale) {
            let g = d[l];
            let mut p = (d[l + 1] - g) / (2.0 * e[l]);
            let r = if p < 0.0 { -p.hypot(1.0) } else { p.hypot(1.0) };
            d[l] = e[l] / (p + r);
            d[l + 1] = e[l] * (p + r);
            let next_d = d[l + 1];
            let h = g - d[l];
            d[l + 2..].iter_mut().for_each(|d| *d -= h);
            shift += h;
            p = d[m];
            let (mut c, mut c2, mut c3, mut s, mut s2) = (1.0, 1.0, 1.0, 0.0, 0.0);
            let next_e = e[l + 1];
            for i in (l..m).rev() {
                c3 = c2;
                c2 = c;
                s2 = s;
                let g = c * e[i];
                let h = c * p;
                let r = p.hypot(e[i]);
                e[i + 1] = s * r;
                s = e[i] / r;
                c = p / r;
                p = c * d[i] - s * g;
                d[i + 1] = h + s * (c * g + s * d[i]);
                batch.push(Rotation {
                    row: i,
                    cos: c,
                    sin: s,
                });
            }
            p = -s * s2 * c3 * next_e * e[l] / next_d;
            e[l] = s * p;
            d[l] = c * p;
            if batch.len() >= BATCH {
                apply(&batch);
                batch.clear();
            }
        }
        d[l] += shift;
        e[l] = 0.0;
    }
    apply(&batch);
}

/// A square matrix cut into panels of columns, so that many rotations of rows work on one panel in the cache.
struct Panels {
    n: usize,
    panels: Vec<Vec<f64>>,
}

const PANEL: usize = 32;

impl Panels {
    fn split(matrix: &Matrix) -> Self {
        let n = matrix.rows;
        let panels = (0..n)
            .step_by(PANEL)
            .map(|from| {
                let mut panel = vec![0.0; n * PANEL];
                for (row, out) in panel.chunks_exact_mut(PANEL).enumerate() {
                    let part = &matrix.row(row)[from..(from + PANEL).min(n)];
                    out[..part.len()].copy_from_slice(part);
                }
                panel
            })
            .collect();
        Self { n, panels }
    }

    fn rotate(&mut self, rotations: &[Rotation]) {
        self.panels.par_iter_mut().for_each(|panel| {
            for &Rotation { row, cos, sin } in rotations {
                let (upper, lower) = panel[row * PANEL..(row + 2) * PANEL].split_at_mut(PANEL);
                for (x, y) in upper.iter_mut().zip(lower) {
                    let old = *y;
                    *y = sin * *x + cos * old;
                    *x = cos * *x - sin * old;
                }
            }
        });
    }

    fn join(self) -> Matrix {
        let n = self.n;
        let mut matrix = Matrix::zeros(n, n);
        for (index, panel) in self.panels.iter().enumerate() {
            let from = index * PANEL;
            for (row, part) in panel.chunks_exact(PANEL).enumerate() {
                let out = &mut matrix.row_mut(row)[from..(from + PANEL).min(n)];
                out.copy_from_slice(&part[..out.len()]);
            }
        }
        matrix
    }
}

/// Dot product with eight independent sums, in a fixed order.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Makes the rows orthonormal (modified Gram-Schmidt, twice for rounding). A row that depends on those before
/// it becomes zero.
pub(crate) fn orthonormalize_rows(matrix: &mut Matrix) {
    let cols = matrix.cols;
    for row in 0..matrix.rows {
        let (before, rest) = matrix.data.split_at_mut(row * cols);
        let own = &mut rest[..cols];
        let original = dot(own, own).sqrt();
        for _ in 0..2 {
            for other in before.chunks_exact(cols) {
                let along = dot(own, other);
                own.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
        }
        let norm = dot(own, own).sqrt();
        let factor = if norm > 1e-12 * original { 1.0 / norm } else { 0.0 };
        own.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    pub(crate) fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix {
            rows,
            cols,
            data: (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect(),
        }
    }

    fn assert_close(a: &Matrix, b: &Matrix, tolerance: f64) {
        assert_eq!((a.rows, a.cols), (b.rows, b.cols));
        let worst = a
            .data
            .iter()
            .zip(&b.data)
            .map(|(x, y)| (x - y).abs())
            .fold(0.0, f64::max);
        assert!(worst <= tolerance, "differs by {worst:e}");
    }

    #[test]
    fn products_agree_with_the_definition() {
        let (a, b) = (random(131, 17, 1), random(17, 9, 2));
        let mut expected = Matrix::zeros(131, 9);
        for i in 0..131 {
            for j in 0..9 {
                expected.data[i * 9 + j] = (0..17).map(|k| a.row(i)[k] * b.row(k)[j]).sum();
            }
        }
        assert_close(&a.times(&b), &expected, 1e-13);
        let mut b_transposed = Matrix::zeros(9, 17);
        for i in 0..9 {
            for j in 0..17 {
                b_transposed.data[i * 17 + j] = b.data[j * 9 + i];
            }
        }
        assert_close(&a.times_transposed(&b_transposed), &expected, 1e-13);
        let gram = a.transposed_times(&a);
        for i in 0..17 {
            for j in 0..17 {
                let expected: f64 = (0..131).map(|k| a.row(k)[i] * a.row(k)[j]).sum();
                assert!((gram.row(i)[j] - expected).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        // 300 crosses both the threshold of parallel steps and the width of a panel.
        for n in [1, 2, 3, 31, 64, 300] {
            let half = random(n, n, n as u64);
            let mut a = half.clone();
            for i in 0..n {
                for j in 0..n {
                    a.data[i * n + j] += half.data[j * n + i];
                }
            }
            let Eigen { values, vectors } = symmetric_eigen(a.clone());
            assert!(values.windows(2).all(|w| w[0] >= w[1]));
            assert_close(
                &vectors.times_transposed(&vectors),
                &Matrix::identity(n),
                1e-12 * n as f64,
            );
            let mut scaled = vectors.clone();
            for (row, value) in values.iter().enumerate() {
                scaled.row_mut(row).iter_mut().for_each(|x| *x *= value);
            }
            assert_close(&vectors.transposed_times(&scaled), &a, 1e-12 * n as f64);
            let alone = symmetric_eigenvalues(a);
            assert!(
                values
                    .iter()
                    .zip(&alone)
                    .all(|(x, y)| (x - y).abs() < 1e-11 * n as f64)
            );
        }
    }

    #[test]
    fn degenerate_matrices_have_eigenvectors_too() {
        for a in [
            Matrix::zeros(5, 5),
            Matrix::identity(5),
            Matrix {
                rows: 5,
                cols: 5,
                data: vec![2.0; 25],
            },
        ] {
            let Eigen { values, vectors } = symmetric_eigen(a.clone());
            assert!((values.iter().sum::<f64>() - a.trace()).abs() < 1e-12);
            assert_close(&vectors.times_transposed(&vectors), &Matrix::identity(5), 1e-12);
        }
    }

    #[test]
    fn orthonormal_rows_span_the_same_and_dependent_ones_vanish() {
        let mut a = random(4, 10, 3);
        let copy: Vec<f64> = a.row(0).iter().map(|x| 2.0 * x).collect();
        a.row_mut(2).copy_from_slice(&copy);
        orthonormalize_rows(&mut a);
        let gram = a.times_transposed(&a);
        for i in 0..4 {
            for j in 0..4 {
                let expected = if i == j && i != 2 { 1.0 } else { 0.0 };
                assert!((gram.row(i)[j] - expected).abs() < 1e-12);
            }
        }
    }
}
