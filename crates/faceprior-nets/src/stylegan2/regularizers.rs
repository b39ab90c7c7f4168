//! R1 and path-length regularisation by forward-mode tangents.
//!
//! Both penalties contain a gradient, so their own gradient is of second order, which Burn's autodiff does not give.
//! It is not needed: with the inner gradient g held constant, the derivative of the network *along g* is an ordinary
//! tensor (a tangent that rides through the forward pass), and its ordinary gradient is the penalty's.
//!
//! | penalty | inner gradient | surrogate |
//! |---|---|---|
//! | R1 (Mescheder et al. 2018): ½·mean‖∂D/∂x‖² | g = ∂ΣD/∂x | (1/N)·Σ JVPₓ D(x; g) |
//! | path length (Karras et al. 2020, equation 4): mean (ℓ − a)² | u = ∂⟨G(w), n⟩/∂w, ℓ = √(mean over codes of Σ u²) | Σᵢ kᵢ·⟨nᵢ, JVP_w G(wᵢ; uᵢ)⟩ |
//!
//! with kᵢ = cᵢ/(ℓᵢ·K), cᵢ = (2/N)·[(ℓᵢ − a) − 0.01·mean(ℓ − a)]: the running mean a has already taken 1% of this
//! batch's mean length, and the gradient flows through that as well.
//!
//! A surrogate's *value* means nothing; weigh and differentiate it, and report `penalty`.

use burn::module::Module;
use burn::tensor::Tensor;
use faceprior_ops::dual::Dual;

use super::{Discriminator, Noise, Synthesis};

/// How much of the mean length of a batch goes into the running mean.
const PATH_LENGTH_DECAY: f64 = 0.01;

/// The R1 penalty of one batch.
#[derive(Debug)]
pub struct R1 {
    /// ½·mean over pictures of ‖∂D/∂x‖².
    pub penalty: f32,
    /// `[1]`; its gradient is that of `penalty`.
    pub surrogate: Tensor<1>,
}

/// R1 on real pictures `[N, 3, R, R]`.
///
/// # Panics
/// If the discriminator's parameters do not track gradients.
pub fn r1_penalty(discriminator: &Discriminator, images: Tensor<4>) -> R1 {
    let n = images.dims()[0];
    let images = images.without_autodiff();
    let gradient = gradient_of(images.clone(), |images| {
        discriminator.valid().forward(images).sum()
    });
    let penalty = scalar(gradient.clone().square().sum()) / (2 * n) as f32;
    let tangent = discriminator
        .forward_dual(Dual {
            value: images,
            tangent: gradient,
        })
        .tangent; // [N, 1]
    R1 {
        penalty,
        surrogate: tangent.sum().div_scalar(n as f32),
    }
}

/// The path-length penalty of one batch.
#[derive(Debug)]
pub struct PathLength {
    /// mean (ℓ − a)², with a after its update; NaN if a length is.
    pub penalty: f32,
    /// The running mean a after its update: what the next call takes, unless `penalty` is NaN.
    pub running_mean: f32,
    /// ℓ of each picture.
    pub lengths: Vec<f32>,
    /// `[1]`; its gradient is that of `penalty`.
    pub surrogate: Tensor<1>,
}

/// Path length of generated pictures.
///
/// # Shapes
/// `codes`: `[N, K, L]`, tracked back into the mapping network, which learns too; `directions`: `[N, 3, R, R]`,
/// independent normal numbers divided by √(H·W) = R.
///
/// # Panics
/// If the generator's parameters do not track gradients.
pub fn path_length_penalty(
    synthesis: &Synthesis,
    codes: Tensor<3>,
    directions: Tensor<4>,
    noise: Noise,
    running_mean: f32,
) -> PathLength {
    let num_ws = codes.dims()[1];
    let frozen = synthesis.valid();
    let gradient = gradient_of(codes.clone().without_autodiff(), |codes| {
        frozen.forward(codes, noise.clone()).mul(directions.clone()).sum()
    }); // [N, K, L]
    let lengths = gradient
        .clone()
        .square()
        .sum_dim(2)
        .mean_dim(1)
        .sqrt()
        .reshape([-1]); // [N]
    let device = lengths.device();
    let lengths = host(lengths);
    let (penalty, running_mean, factors) = penalty_of(&lengths, num_ws, running_mean);

    let tangent = synthesis
        .forward_dual(
            Dual {
                value: codes,
                tangent: gradient,
            },
            noise,
        )
        .tangent;
    let along = tangent.mul(directions).sum_dims_squeeze::<1, usize>(&[1, 2, 3]); // [N]
    let factors = Tensor::from_floats(factors.as_slice(), &device);
    PathLength {
        penalty,
        running_mean,
        lengths,
        surrogate: along.mul(factors).sum(),
    }
}

/// (penalty, running mean after its update, k of each picture).
fn penalty_of(lengths: &[f32], num_ws: usize, running_mean: f32) -> (f32, f32, Vec<f32>) {
    let n = lengths.len() as f64;
    let lengths = || lengths.iter().map(|&length| f64::from(length));
    let mean = lengths().sum::<f64>() / n;
    let a = f64::from(running_mean) + PATH_LENGTH_DECAY * (mean - f64::from(running_mean));
    let penalty = lengths().map(|length| (length - a).powi(2)).sum::<f64>() / n;
    let factor = |length: f64| {
        let c = 2.0 / n * ((length - a) - PATH_LENGTH_DECAY * (mean - a));
        // A length of 0 has no direction: its square root has no derivative there, and u is 0.
        if length == 0.0 {
            0.0
        } else {
            (c / (length * num_ws as f64)) as f32
        }
    };
    (penalty as f32, a as f32, lengths().map(factor).collect())
}

/// ∂f/∂x, cut off from every graph; `f` must not track anything but its argument.
fn gradient_of<const D: usize>(x: Tensor<D>, f: impl FnOnce(Tensor<D>) -> Tensor<1>) -> Tensor<D> {
    let x = x.autodiff().require_grad();
    let mut gradients = f(x.clone()).backward();
    x.grad_remove(&mut gradients)
        .unwrap_or_else(|| x.clone().without_autodiff().zeros_like())
}

fn host(x: Tensor<1>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

fn scalar(x: Tensor<1>) -> f32 {
    x.into_scalar()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::init::Init;
    use crate::stylegan2::{DiscriminatorConfig, GeneratorConfig};

    #[test]
    fn the_factors_are_the_derivative_of_the_penalty_by_the_lengths() {
        // d penalty / dℓᵢ = kᵢ·ℓᵢ·K, the running mean's share included.
        let lengths = [0.5f32, 1.0, 2.5];
        let (_, _, factors) = penalty_of(&lengths, 6, 0.7);
        for i in 0..3 {
            let at = |step: f32| {
                let mut moved = lengths;
                moved[i] += step;
                f64::from(penalty_of(&moved, 6, 0.7).0)
            };
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            let got = f64::from(factors[i] * lengths[i] * 6.0);
            assert!((got - slope).abs() < 1e-3, "{i}: {got} {slope}");
        }
        assert_eq!(penalty_of(&[0.0, 0.0], 6, 0.7).2, [0.0, 0.0]);
        assert!(penalty_of(&[1.0, f32::NAN], 6, 0.7).0.is_nan());
    }

    #[test]
    fn surrogates_reach_every_parameter_that_the_penalty_depends_on() {
        let device = Device::flex().autodiff();
        let mut init = Init::new(1, &device);
        let d = DiscriminatorConfig {
            resolution: 8,
            channel_base: 64,
            channel_max: 8,
        }
        .init(&mut init);
        let images: Tensor<4> = init.normal_tensor([3, 3, 8, 8]);
        let r1 = r1_penalty(&d, images);
        let gradients = r1.surrogate.backward();
        assert!(r1.penalty > 0.0);
        let first = d
            .net
            .from_rgb
            .weight
            .val()
            .grad(&gradients)
            .expect("the first weight is tracked");
        assert!(scalar(first.abs().sum()) > 0.0);

        let config = GeneratorConfig {
            resolution: 8,
            latent_dim: 6,
            mapping_layers: 2,
            channel_base: 64,
            channel_max: 8,
        };
        let g = config.init(&mut init);
        let codes = g.codes(g.mapping.forward(init.normal_tensor([2, 6])));
        let directions = init.normal_tensor([2, 3, 8, 8]) / 8.0;
        let path = path_length_penalty(&g.synthesis, codes, directions, Noise::Constant, 0.0);
        let gradients = path.surrogate.backward();
        assert!((path.running_mean - path.lengths.iter().sum::<f32>() / 200.0).abs() < 1e-6);
        let mapping = g.mapping.layers[0]
            .weight
            .val()
            .grad(&gradients)
            .expect("the mapping is tracked");
        assert!(scalar(mapping.abs().sum()) > 0.0);
    }
}
