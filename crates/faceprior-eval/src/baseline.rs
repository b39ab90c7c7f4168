//! The floor every trained model must clear: whitened principal components of plain pixels.

use crate::pca::Pca;
use crate::{Embeddings, EvalError};

/// A recogniser without a network: pixels projected on the principal components of unlabelled training pictures,
/// whitened, L2-normalised.
///
/// Eigenfaces (Turk and Pentland 1991) with whitening: about three quarters of aligned LFW's pairs are answered
/// rightly by it, without a label. A row is one picture's pixels as `f32` in any fixed order and range; downscaling
/// is the caller's (28² grey is a good choice: finer detail than that tells pixels nothing).
#[derive(Clone, Debug)]
pub struct PixelPca {
    pca: Pca,
}

impl PixelPca {
    /// Fits on training pictures, `components` of the leading directions (100 to 200 do well).
    ///
    /// # Errors
    /// When there are more components than pictures or pixels, or none.
    pub fn fit(pixels: &Embeddings, components: usize) -> Result<Self, EvalError> {
        Ok(Self {
            pca: Pca::fit(pixels, components)?,
        })
    }

    /// Embeddings of pictures: \[n, components\], rows of length 1.
    ///
    /// # Errors
    /// When the pictures have another number of pixels than those of the fit.
    pub fn embed(&self, pixels: &Embeddings) -> Result<Embeddings, EvalError> {
        Ok(self.pca.whiten(pixels)?.normalized())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::tests::random;

    #[test]
    fn whitening_sees_through_a_dominant_nuisance() {
        // Value 0 is strong light that says nothing of the person; the others are weak and do.
        let (people, dim) = (60, 8);
        let identity = random(people, dim, 1);
        let nuisance = random(2 * people, dim, 2);
        let mut pixels = Vec::new();
        for picture in 0..2 * people {
            for j in 0..dim {
                let own = if j == 0 { 0.0 } else { identity.row(picture / 2)[j] };
                let noise = nuisance.row(picture)[j] * if j == 0 { 50.0 } else { 0.2 };
                pixels.push((own + noise) as f32);
            }
        }
        let pixels = Embeddings::new(dim, pixels).unwrap();
        let embedded = PixelPca::fit(&pixels, dim).unwrap().embed(&pixels).unwrap();
        let closer = |e: &Embeddings| {
            let own = (0..people).map(|p| e.cosine(2 * p, 2 * p + 1)).sum::<f64>();
            let other = (0..people)
                .map(|p| e.cosine(2 * p, (2 * p + 3) % (2 * people)))
                .sum::<f64>();
            (own - other) / people as f64
        };
        assert!(closer(&embedded) > 0.6, "{}", closer(&embedded));
        assert!(closer(&pixels.normalized()) < 0.3);
        assert!((embedded.row(0).iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
