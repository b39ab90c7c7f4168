//! Classification losses on logits `[N, C]` and labels `[N]`.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};

/// Mean over the batch of −log softmax(logits)[label].
///
/// # Shapes
/// `logits` `[N, C]`, `labels` `[N]` in 0..C → `[1]`.
pub fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    let log_probabilities = log_softmax(logits, 1); // [N, C]
    log_probabilities.gather(1, labels.unsqueeze_dim(1)).mean().neg() // [1]
}

/// Focal loss (Lin et al. 2017) in face.evoLVe's form: (1 − e^(−ce))^γ·ce of the *mean* cross-entropy. Published: γ 2.
///
/// # Shapes
/// `cross_entropy` `[1]` → `[1]`.
pub fn focal(cross_entropy: Tensor<1>, gamma: f32) -> Tensor<1> {
    let miss = cross_entropy.clone().neg().exp().neg().add_scalar(1.0); // [1], 1 − probability of the target
    miss.powf_scalar(gamma) * cross_entropy
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn huge_logits_do_not_overflow() {
        let device = Device::flex();
        let logits = Tensor::<2>::from_floats([[1000.0, 0.0], [0.0, -1000.0]], &device);
        let labels = Tensor::<1, Int>::from_ints([1, 0], &device);
        let loss: f32 = cross_entropy(logits, labels).into_scalar();
        assert_eq!(loss, 500.0);
    }

    #[test]
    fn focal_with_gamma_zero_is_cross_entropy() {
        let device = Device::flex();
        let logits = Tensor::<2>::from_floats([[0.3, -0.2, 1.0]], &device);
        let labels = Tensor::<1, Int>::from_ints([0], &device);
        let ce = cross_entropy(logits, labels);
        let focal: f32 = focal(ce.clone(), 0.0).into_scalar();
        let ce: f32 = ce.into_scalar();
        assert!((ce - focal).abs() < 1e-6);
    }
}
