//! Rows of numbers, one per picture, and the distances between them.

use serde::{Deserialize, Serialize};

use crate::EvalError;
use crate::linalg::Matrix;

/// One vector per picture, row-major: a recogniser's embeddings, an Inception network's features or plain pixels.
///
/// Every value is finite: a diverged network is an error here rather than a strange number later.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    dim: usize,
    data: Vec<f32>,
}

/// How the embeddings of a picture and of its mirror image become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flip {
    /// f(x) alone.
    None,
    /// f(x) + f(mirrored x), as face.evoLVe does.
    #[default]
    Sum,
    /// \[f(x), f(mirrored x)\], twice as long, as MobileFaceNet's authors do.
    Concat,
}

impl Embeddings {
    /// Rows of `dim` values each, one after the other.
    ///
    /// # Errors
    /// When the values do not fill whole rows, or one is not finite.
    pub fn new(dim: usize, data: Vec<f32>) -> Result<Self, EvalError> {
        if dim == 0 || !data.len().is_multiple_of(dim) {
            return Err(EvalError::RaggedRows {
                values: data.len(),
                dim,
            });
        }
        match data.iter().position(|x| !x.is_finite()) {
            Some(at) => Err(EvalError::NotFinite {
                row: at / dim,
                value: data[at],
            }),
            None => Ok(Self { dim, data }),
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.data.len() / self.dim
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Values per row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// All values, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values, row-major.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// One row. Panics when there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.dim..(row + 1) * self.dim]
    }

    /// The rows named, in that order. Panics when one does not exist.
    pub fn select(&self, rows: &[usize]) -> Self {
        Self {
            dim: self.dim,
            data: rows.iter().flat_map(|&row| self.row(row)).copied().collect(),
        }
    }

    /// Each row divided by its Euclidean length; a row of zeros stays.
    pub fn normalized(mut self) -> Self {
        for row in self.data.chunks_exact_mut(self.dim) {
            let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            if norm > 0.0 {
                row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
            }
        }
        self
    }

    /// The embeddings that verification compares: `plain` and `mirrored` (of the mirror images, in the same order;
    /// not looked at with [`Flip::None`]) made one by `flip`, then L2-normalised.
    ///
    /// # Errors
    /// When the two differ in shape.
    pub fn combined(plain: Self, mirrored: &Self, flip: Flip) -> Result<Self, EvalError> {
        if flip != Flip::None && (plain.len(), plain.dim) != (mirrored.len(), mirrored.dim) {
            return Err(EvalError::ShapeMismatch {
                what: "embeddings of the mirrored pictures",
                got_rows: mirrored.len(),
                got_dim: mirrored.dim,
                expected_rows: plain.len(),
                expected_dim: plain.dim,
            });
        }
        let joined = match flip {
            Flip::None => plain,
            Flip::Sum => {
                let sums = plain
                    .data
                    .iter()
                    .zip(&mirrored.data)
                    .map(|(x, y)| x + y)
                    .collect();
                Self::new(plain.dim, sums)?
            }
            Flip::Concat => {
                let mut data = Vec::with_capacity(2 * plain.data.len());
                for row in 0..plain.len() {
                    data.extend_from_slice(plain.row(row));
                    data.extend_from_slice(mirrored.row(row));
                }
                Self {
                    dim: 2 * plain.dim,
                    data,
                }
            }
        };
        Ok(joined.normalized())
    }

    /// Squared Euclidean distance of two rows: 0 to 4 for normalised ones. Panics when a row does not exist.
    pub fn squared_distance(&self, left: usize, right: usize) -> f64 {
        let pairs = self.row(left).iter().zip(self.row(right));
        pairs.map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
    }

    /// Cosine of the angle between two rows, −1 to 1; 0 when one is zero. Panics when a row does not exist.
    pub fn cosine(&self, left: usize, right: usize) -> f64 {
        let (mut product, mut left_square, mut right_square) = (0.0, 0.0, 0.0);
        for (&x, &y) in self.row(left).iter().zip(self.row(right)) {
            let (x, y) = (f64::from(x), f64::from(y));
            product += x * y;
            left_square += x * x;
            right_square += y * y;
        }
        let lengths = (left_square * right_square).sqrt();
        if lengths > 0.0 { product / lengths } else { 0.0 }
    }

    pub(crate) fn to_matrix(&self) -> Matrix {
        Matrix {
            rows: self.len(),
            cols: self.dim,
            data: self.data.iter().map(|&x| f64::from(x)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_must_be_whole_and_finite() {
        assert!(matches!(
            Embeddings::new(2, vec![1.0; 3]),
            Err(EvalError::RaggedRows { values: 3, dim: 2 })
        ));
        assert!(matches!(
            Embeddings::new(0, vec![]),
            Err(EvalError::RaggedRows { .. })
        ));
        let error = Embeddings::new(2, vec![1.0, 0.0, 0.0, f32::NAN]).unwrap_err();
        assert!(
            error.to_string().starts_with("embedding 1 has the value NaN"),
            "{error}"
        );
    }

    #[test]
    fn normalised_rows_have_length_one_and_zero_rows_stay() {
        let e = Embeddings::new(2, vec![3.0, 4.0, 0.0, 0.0]).unwrap().normalized();
        assert_eq!(e.data(), [0.6, 0.8, 0.0, 0.0]);
    }

    #[test]
    fn distance_and_cosine_of_normalised_rows_agree() {
        let e = Embeddings::new(3, vec![1.0, 2.0, 2.0, -2.0, 1.0, 0.5])
            .unwrap()
            .normalized();
        assert!((e.squared_distance(0, 1) - (2.0 - 2.0 * e.cosine(0, 1))).abs() < 1e-6);
        assert!((e.cosine(0, 0) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn flips_combine_as_named() {
        let plain = Embeddings::new(2, vec![3.0, 0.0]).unwrap();
        let mirrored = Embeddings::new(2, vec![0.0, 4.0]).unwrap();
        let of = |flip| Embeddings::combined(plain.clone(), &mirrored, flip).unwrap();
        assert_eq!(of(Flip::None).data(), [1.0, 0.0]);
        assert_eq!(of(Flip::Sum).data(), [0.6, 0.8]);
        assert_eq!(
            (of(Flip::Concat).dim(), of(Flip::Concat).data()),
            (4, &[0.6, 0.0, 0.0, 0.8][..])
        );
        let short = Embeddings::new(2, vec![]).unwrap();
        assert!(Embeddings::combined(plain.clone(), &short, Flip::Sum).is_err());
        assert!(Embeddings::combined(plain, &short, Flip::None).is_ok());
    }
}
