//! Principal components.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::linalg::{Matrix, orthonormalize_rows, symmetric_eigen};
use crate::{Embeddings, EvalError};

/// The directions of largest variance of a set of rows, by falling variance.
///
/// Up to 1024 values per row they come from the full eigen-decomposition of the covariance. Above that, where it
/// would cost the cube of the row length, they come from a randomised subspace iteration (Halko, Martinsson and
/// Tropp 2011) with a fixed seed: the leading components agree to rounding, the last few of those asked for to
/// about the gap between their variances.
#[derive(Clone, Debug)]
pub struct Pca {
    mean: Vec<f64>,
    components: Matrix,
    variances: Vec<f64>,
}

/// Largest row length for which the whole covariance is decomposed.
const EXACT_UP_TO: usize = 1024;
const OVERSAMPLING: usize = 16;
const ITERATIONS: usize = 8;

impl Pca {
    /// Fits `components` directions to rows.
    ///
    /// # Errors
    /// When there are more components than rows or values per row, or none.
    pub fn fit(rows: &Embeddings, components: usize) -> Result<Self, EvalError> {
        Self::fit_matrix(rows.to_matrix(), components)
    }

    pub(crate) fn fit_matrix(mut rows: Matrix, components: usize) -> Result<Self, EvalError> {
        let most = rows.rows.min(rows.cols);
        if components == 0 || components > most || rows.rows < 2 {
            let (rows, dim) = (rows.rows, rows.cols);
            return Err(EvalError::BadComponents {
                components,
                rows,
                dim,
                most,
            });
        }
        let mean = rows.column_means();
        rows.subtract_row(&mean);
        let degrees = (rows.rows - 1) as f64;
        let (values, vectors) = if rows.cols <= EXACT_UP_TO {
            let mut covariance = rows.transposed_times(&rows);
            covariance.scale(1.0 / degrees);
            let eigen = symmetric_eigen(covariance);
            (eigen.values, eigen.vectors)
        } else {
            let (mut values, vectors) = leading_subspace(&rows, (components + OVERSAMPLING).min(most));
            values.iter_mut().for_each(|value| *value /= degrees);
            (values, vectors)
        };
        let variances = values[..components].iter().map(|value| value.max(0.0)).collect();
        Ok(Self {
            mean,
            components: vectors.truncate_rows(components),
            variances,
        })
    }

    /// Number of components.
    pub fn len(&self) -> usize {
        self.variances.len()
    }

    /// Never: a fit has at least one component.
    pub fn is_empty(&self) -> bool {
        self.variances.is_empty()
    }

    /// Variance along each component (divisor n − 1), falling.
    pub fn variances(&self) -> &[f64] {
        &self.variances
    }

    /// Coordinates of rows along the components, about the mean of the fit: \[n, components\].
    ///
    /// # Errors
    /// When the rows have another length than those of the fit.
    pub fn project(&self, rows: &Embeddings) -> Result<Embeddings, EvalError> {
        self.scaled_projection(rows, &vec![1.0; self.len()])
    }

    /// Like [`project`](Self::project), each coordinate divided by its standard deviation in the fit, so that all
    /// count the same. Directions without variance give 0.
    ///
    /// # Errors
    /// When the rows have another length than those of the fit.
    pub fn whiten(&self, rows: &Embeddings) -> Result<Embeddings, EvalError> {
        let floor = 1e-12 * self.variances[0];
        let scale = |&v: &f64| if v > floor { 1.0 / v.sqrt() } else { 0.0 };
        self.scaled_projection(rows, &self.variances.iter().map(scale).collect::<Vec<_>>())
    }

    fn scaled_projection(&self, rows: &Embeddings, scales: &[f64]) -> Result<Embeddings, EvalError> {
        if rows.dim() != self.mean.len() {
            return Err(EvalError::ShapeMismatch {
                what: "rows to project",
                got_rows: rows.len(),
                got_dim: rows.dim(),
                expected_rows: rows.len(),
                expected_dim: self.mean.len(),
            });
        }
        let projected = self.project_matrix(rows.to_matrix());
        let scaled = projected
            .data
            .iter()
            .zip(scales.iter().cycle())
            .map(|(x, s)| (x * s) as f32)
            .collect();
        Embeddings::new(self.len(), scaled)
    }

    pub(crate) fn project_matrix(&self, mut rows: Matrix) -> Matrix {
        rows.subtract_row(&self.mean);
        rows.times_transposed(&self.components)
    }
}

/// The `count` largest eigenvalues of XᵀX, approximately, and their vectors as rows.
fn leading_subspace(x: &Matrix, count: usize) -> (Vec<f64>, Matrix) {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let random = (0..count * x.cols).map(|_| rng.random_range(-1.0..1.0)).collect();
    let mut basis = Matrix {
        rows: count,
        cols: x.cols,
        data: random,
    };
    for _ in 0..ITERATIONS {
        orthonormalize_rows(&mut basis);
        basis = x.times_transposed(&basis).transposed_times(x);
    }
    orthonormalize_rows(&mut basis);
    let projected = x.times_transposed(&basis);
    let eigen = symmetric_eigen(projected.transposed_times(&projected));
    (eigen.values, eigen.vectors.times(&basis))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::tests::random;

    /// Rows whose standard deviation falls by a fifth from column to column, then mixed.
    fn sloped(rows: usize, cols: usize) -> Matrix {
        let mut data = random(rows, cols, 5);
        for row in 0..rows {
            data.row_mut(row)
                .iter_mut()
                .enumerate()
                .for_each(|(j, x)| *x = *x * 0.8f64.powi(j as i32) + 3.0);
        }
        let mut mixing = random(cols, cols, 6);
        orthonormalize_rows(&mut mixing);
        data.times(&mixing)
    }

    #[test]
    fn projections_are_centred_uncorrelated_and_of_the_stated_variance() {
        let rows = sloped(200, 12);
        let pca = Pca::fit_matrix(rows.clone(), 5).unwrap();
        let projected = pca.project_matrix(rows);
        assert!(projected.column_means().iter().all(|m| m.abs() < 1e-12));
        let mut covariance = projected.transposed_times(&projected);
        covariance.scale(1.0 / 199.0);
        for i in 0..5 {
            for j in 0..5 {
                let expected = if i == j { pca.variances()[i] } else { 0.0 };
                assert!((covariance.row(i)[j] - expected).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn the_randomised_fit_finds_the_same_subspace() {
        let mut rows = sloped(150, 80);
        let exact = Pca::fit_matrix(rows.clone(), 10).unwrap();
        let mean = rows.column_means();
        rows.subtract_row(&mean);
        let (values, vectors) = leading_subspace(&rows, 26);
        for (k, value) in values.iter().enumerate().take(10) {
            let relative = value / 149.0 / exact.variances[k] - 1.0;
            assert!(relative.abs() < 1e-9, "component {k}: {relative:e}");
            let alignment = crate::linalg::dot(vectors.row(k), exact.components.row(k)).abs();
            assert!((alignment - 1.0).abs() < 1e-6, "component {k}: {alignment}");
        }
    }

    #[test]
    fn impossible_numbers_of_components_are_errors() {
        let rows = Embeddings::new(3, vec![0.5; 12]).unwrap();
        assert!(Pca::fit(&rows, 0).is_err());
        let error = Pca::fit(&rows, 4).unwrap_err();
        let expected = "4 principal components asked for, but 4 rows of 3 values allow 1 to 3";
        assert_eq!(error.to_string(), expected);
        assert!(
            Pca::fit(&rows, 3)
                .unwrap()
                .project(&Embeddings::new(2, vec![0.0; 4]).unwrap())
                .is_err()
        );
    }
}
