//! Distances between two sets of features: Fréchet and kernel.
//!
//! On the features of the FID Inception network these are FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018);
//! on a recogniser's embeddings they are the same distances in that space, to be reported under another name.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::linalg::{Matrix, dot, symmetric_eigen, symmetric_eigenvalues};
use crate::{Embeddings, EvalError};

/// Fréchet distance of the Gaussians with the means and covariances (divisor n − 1) of two sets of rows:
/// ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2(C₁C₂)^½).
///
/// The square root's trace is the sum of the roots of the eigenvalues of C₁^½·C₂·C₁^½, which is symmetric: no
/// complex residue to discard, and covariances of fewer rows than dimensions are no special case.
///
/// # Errors
/// When the rows differ in length, or either set has fewer than two.
pub fn frechet_distance(x: &Embeddings, y: &Embeddings) -> Result<f64, EvalError> {
    check("a Fréchet distance", x, y)?;
    let ((mean_x, cov_x), (mean_y, cov_y)) = (mean_and_covariance(x), mean_and_covariance(y));
    let between: f64 = mean_x.iter().zip(&mean_y).map(|(a, b)| (a - b).powi(2)).sum();
    let traces = cov_x.trace() + cov_y.trace();
    // With C₁ = VᵀΛV, the matrix C₁^½·C₂·C₁^½ has the eigenvalues of (Λ^½V)·C₂·(Λ^½V)ᵀ.
    let mut eigen = symmetric_eigen(cov_x);
    for (row, value) in eigen.values.iter().enumerate() {
        let root = value.max(0.0).sqrt();
        eigen.vectors.row_mut(row).iter_mut().for_each(|x| *x *= root);
    }
    let inner = eigen.vectors.times(&cov_y).times_transposed(&eigen.vectors);
    let root_trace: f64 = symmetric_eigenvalues(inner)
        .iter()
        .map(|value| value.max(0.0).sqrt())
        .sum();
    Ok(between + traces - 2.0 * root_trace)
}

fn mean_and_covariance(rows: &Embeddings) -> (Vec<f64>, Matrix) {
    let mut rows = rows.to_matrix();
    let mean = rows.column_means();
    rows.subtract_row(&mean);
    let mut covariance = rows.transposed_times(&rows);
    covariance.scale(1.0 / (rows.rows - 1) as f64);
    (mean, covariance)
}

/// Unbiased squared maximum mean discrepancy with the cubic kernel (x·y/d + 1)³ on all rows. May be slightly
/// negative when the sets are alike.
///
/// # Errors
/// When the rows differ in length, or either set has fewer than two.
pub fn polynomial_mmd(x: &Embeddings, y: &Embeddings) -> Result<f64, EvalError> {
    check("a polynomial MMD", x, y)?;
    Ok(unbiased_mmd(&x.to_matrix(), &y.to_matrix()))
}

fn unbiased_mmd(x: &Matrix, y: &Matrix) -> f64 {
    let kernel = |product: f64| (product / x.cols as f64 + 1.0).powi(3);
    let within = |a: &Matrix| {
        let all: f64 = a.times_transposed(a).data.iter().map(|&p| kernel(p)).sum();
        let diagonal: f64 = (0..a.rows).map(|i| kernel(dot(a.row(i), a.row(i)))).sum();
        (all - diagonal) / (a.rows * (a.rows - 1)) as f64
    };
    let across: f64 = x.times_transposed(y).data.iter().map(|&p| kernel(p)).sum();
    within(x) + within(y) - 2.0 * across / (x.rows * y.rows) as f64
}

/// How KID draws its subsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KidConfig {
    /// Rows of each set in a subset, at most; fewer when a set is smaller.
    pub subset_size: usize,
    /// Number of subsets.
    pub subsets: usize,
    /// Seed; subset i depends on (seed, i) alone.
    pub seed: u64,
}

impl Default for KidConfig {
    fn default() -> Self {
        Self {
            subset_size: 1000,
            subsets: 100,
            seed: 0,
        }
    }
}

/// Kernel distance over subsets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kid {
    /// Mean of the subsets' unbiased MMD².
    pub mean: f64,
    /// Standard deviation over the subsets (divisor n).
    pub std: f64,
    /// Rows in each subset.
    pub subset_size: usize,
}

/// Kernel distance: the mean of [`polynomial_mmd`] over random subsets, drawn without replacement.
///
/// # Errors
/// When the rows differ in length, either set has fewer than two, or there are no subsets.
pub fn kid(x: &Embeddings, y: &Embeddings, config: KidConfig) -> Result<Kid, EvalError> {
    check("KID", x, y)?;
    let size = config.subset_size.min(x.len()).min(y.len());
    if size < 2 || config.subsets == 0 {
        let (name, value) = if size < 2 {
            ("kid.subset_size", config.subset_size)
        } else {
            ("kid.subsets", config.subsets)
        };
        let expected = "at least 1 subset of at least 2 rows";
        return Err(EvalError::BadSetting {
            name,
            value: value as f64,
            expected,
        });
    }
    let values: Vec<f64> = (0..config.subsets as u64)
        .into_par_iter()
        .map(|subset| {
            let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
            rng.set_stream(subset);
            let mut draw = |rows: &Embeddings| {
                let mut indices: Vec<usize> = (0..rows.len()).collect();
                let (chosen, _) = indices.partial_shuffle(&mut rng, size);
                rows.select(chosen).to_matrix()
            };
            let (x, y) = (draw(x), draw(y));
            unbiased_mmd(&x, &y)
        })
        .collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
    Ok(Kid {
        mean,
        std: variance.sqrt(),
        subset_size: size,
    })
}

fn check(what: &'static str, x: &Embeddings, y: &Embeddings) -> Result<(), EvalError> {
    if x.dim() != y.dim() {
        return Err(EvalError::ShapeMismatch {
            what: "features of the second set",
            got_rows: y.len(),
            got_dim: y.dim(),
            expected_rows: y.len(),
            expected_dim: x.dim(),
        });
    }
    let rows = x.len().min(y.len());
    if rows < 2 {
        Err(EvalError::TooFewRows { what, least: 2, rows })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::tests::random;

    fn rows(n: usize, dim: usize, seed: u64) -> Embeddings {
        Embeddings::new(dim, random(n, dim, seed).data.iter().map(|&x| x as f32).collect()).unwrap()
    }

    #[test]
    fn a_set_is_at_no_distance_from_itself_even_with_fewer_rows_than_dimensions() {
        for x in [rows(50, 6, 1), rows(5, 20, 2)] {
            assert!(frechet_distance(&x, &x).unwrap().abs() < 1e-6);
        }
    }

    #[test]
    fn frechet_distance_of_one_dimension_is_that_of_means_and_deviations() {
        let x = Embeddings::new(1, vec![0.0, 2.0]).unwrap();
        let y = Embeddings::new(1, vec![3.0, 11.0]).unwrap();
        let deviations = 2.0f64.sqrt() - 32.0f64.sqrt();
        assert!((frechet_distance(&x, &y).unwrap() - (36.0 + deviations.powi(2))).abs() < 1e-12);
    }

    #[test]
    fn kid_of_whole_sets_is_the_mmd_and_of_subsets_near_it() {
        let (x, y) = (
            rows(80, 4, 1),
            rows(60, 4, 2).select(&(0..60).collect::<Vec<_>>()),
        );
        let y = Embeddings::new(4, y.data().iter().map(|x| x + 0.5).collect()).unwrap();
        let all = polynomial_mmd(&x, &y).unwrap();
        let subsets = kid(
            &x,
            &y,
            KidConfig {
                subset_size: 30,
                subsets: 200,
                seed: 1,
            },
        )
        .unwrap();
        assert!((subsets.mean - all).abs() < 3.0 * subsets.std / 200f64.sqrt() + 0.02 * all);
        let same_size = x.select(&(0..60).collect::<Vec<_>>());
        let whole = kid(&same_size, &y, KidConfig::default()).unwrap();
        assert_eq!(whole.subset_size, 60);
        assert!((whole.mean - polynomial_mmd(&same_size, &y).unwrap()).abs() < 1e-10 && whole.std < 1e-10);
    }

    #[test]
    fn sets_that_cannot_be_compared_are_errors() {
        assert!(frechet_distance(&rows(5, 3, 1), &rows(5, 4, 1)).is_err());
        let error = frechet_distance(&rows(1, 3, 1), &rows(5, 3, 1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a Fréchet distance needs at least 2 rows, got 1"
        );
        assert!(
            kid(
                &rows(5, 3, 1),
                &rows(5, 3, 2),
                KidConfig {
                    subsets: 0,
                    ..KidConfig::default()
                }
            )
            .is_err()
        );
    }
}
