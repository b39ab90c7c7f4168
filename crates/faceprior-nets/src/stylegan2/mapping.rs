//! The mapping network: latent z to code w (Karras et al. 2019, section 2; 2020).
//!
//! ```text
//! x₀ = z / √(mean z² + 1e-8)        xₗ₊₁ = √2·lrelu(Wₗ·xₗ + bₗ)        w = x_L
//! ```
//! Axes: `N` pictures, `L` latent dimensions, `K` codes that the synthesis network takes.

use burn::module::Module;
use burn::tensor::Tensor;

use super::layers::{Activation, FullyConnected};
use crate::init::Init;
use crate::layers::Buffer;

const LR_MULTIPLIER: f32 = 0.01;
const W_AVG_DECAY: f32 = 0.995;

/// z → w, and the running mean of w.
#[derive(Module, Debug)]
pub struct Mapping {
    /// `L` → `L`, learning-rate multiplier 0.01.
    pub layers: Vec<FullyConnected>,
    /// Running mean of w, `[L]`, starts at 0; moved by [`track`](Self::track) only.
    pub w_avg: Buffer<1>,
}

impl Mapping {
    pub(super) fn new(init: &mut Init, latent_dim: usize, num_layers: usize) -> Self {
        let layer = |_| {
            FullyConnected::with(
                init,
                latent_dim,
                latent_dim,
                Activation::LeakyRelu,
                LR_MULTIPLIER,
                0.0,
            )
        };
        Self {
            layers: (0..num_layers).map(layer).collect(),
            w_avg: Buffer::full([latent_dim], 0.0, init.device()),
        }
    }

    /// Latents to codes: `[N, L]` → `[N, L]`.
    pub fn forward(&self, z: Tensor<2>) -> Tensor<2> {
        let norm = z.clone().square().mean_dim(1).add_scalar(1e-8).sqrt(); // [N, 1]
        self.layers.iter().fold(z.div(norm), |x, layer| layer.forward(x))
    }

    /// Moves the running mean by a batch of codes `[N, L]`: w_avg ← 0.995·w_avg + 0.005·mean w. Training calls it
    /// for the first of two mixed codes.
    pub fn track(&self, w: Tensor<2>) {
        let mean = w.without_autodiff().mean_dim(0).squeeze_dim::<1>(0); // [L]
        let moved = self
            .w_avg
            .get()
            .without_autodiff()
            .sub(mean.clone())
            .mul_scalar(W_AVG_DECAY);
        self.w_avg.set(mean.add(moved));
    }

    /// Pulls codes towards the running mean: w_avg + ψ·(w − w_avg) (the truncation trick, Karras et al. 2019,
    /// appendix B). ψ 1 changes nothing, ψ 0 gives the mean.
    ///
    /// # Shapes
    /// `codes`: `[N, K, L]`; with a `cutoff` only the first so many of the K codes are pulled.
    pub fn truncate(&self, codes: Tensor<3>, psi: f32, cutoff: Option<usize>) -> Tensor<3> {
        let num_ws = codes.dims()[1];
        let cutoff = cutoff.unwrap_or(num_ws).min(num_ws);
        if psi == 1.0 || cutoff == 0 {
            return codes;
        }
        let mean = self.w_avg.get().unsqueeze::<3>(); // [1, 1, L]
        let pulled = codes
            .clone()
            .narrow(1, 0, cutoff)
            .sub(mean.clone())
            .mul_scalar(psi)
            .add(mean);
        if cutoff == num_ws {
            return pulled;
        }
        Tensor::cat(vec![pulled, codes.narrow(1, cutoff, num_ws - cutoff)], 1)
    }
}
