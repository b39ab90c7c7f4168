//! Batch normalisation (Ioffe & Szegedy 2015).

use burn::tensor::Tensor;

use crate::{FeatureMap, reference};

/// What one training batch says about each channel; not part of the graph of derivatives.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// Mean over pictures and pixels, `[C]`.
    pub mean: Tensor<1>,
    /// Biased variance over pictures and pixels, `[C]`. The unbiased one is `var · count / (count − 1)`.
    pub var: Tensor<1>,
    /// Values per channel: N·H·W.
    pub count: usize,
}

/// Batch normalisation by given statistics, as in evaluation: `(x − mean) / √(var + eps) · weight + bias`.
///
/// # Shapes
/// `weight`, `bias`, `mean`, `var`: `[C]`.
pub fn batch_norm(
    x: FeatureMap,
    weight: Tensor<1>,
    bias: Tensor<1>,
    mean: Tensor<1>,
    var: Tensor<1>,
    eps: f64,
) -> FeatureMap {
    for parameter in [&weight, &bias, &mean, &var] {
        assert_eq!(
            parameter.dims(),
            [x.channels()],
            "one value per channel in batch normalisation"
        );
    }
    let scale = weight.mul(var.add_scalar(eps).sqrt().recip());
    let shift = bias.sub(mean.mul(scale.clone()));
    x.map(|x| reference::scale_shift(x, scale, shift))
}

/// Batch normalisation by the batch's own statistics, as in training; gradients pass through the statistics.
///
/// # Shapes
/// `weight`, `bias`: `[C]`.
pub fn batch_norm_train(
    x: FeatureMap,
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
) -> (FeatureMap, BatchStatistics) {
    let [n, c, h, w] = x.dims();
    for parameter in [&weight, &bias] {
        assert_eq!(
            parameter.dims(),
            [c],
            "one value per channel in batch normalisation"
        );
    }
    let (y, mean, var) = reference::batch_norm_train(x.into_blocks(), weight, bias, eps);
    (
        FeatureMap::from_blocks(y, c),
        BatchStatistics {
            mean,
            var,
            count: n * h * w,
        },
    )
}
