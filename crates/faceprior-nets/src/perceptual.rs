//! Perceptual distance in the features of a frozen discriminator.
//!
//! LPIPS (Zhang et al. 2018, equation 1) compares pictures in the features of a network trained on labelled
//! photographs. A discriminator trained on unlabelled faces has features too, and no label has touched them: that
//! keeps a comparison of "pretrained" with "from scratch" honest.
//!
//! ```text
//! d(x, y) = mean over blocks l and pixels of Σ_c (x̂ˡ_c − ŷˡ_c)²,   x̂ˡ = xˡ/√(Σ_c (xˡ_c)² + 1e-10)
//! ```
//! Here xˡ is the output of block l. There are no learnt weights per channel.

use burn::module::Module;
use burn::tensor::Tensor;
use faceprior_ops::FeatureMap;

use crate::stylegan2::Discriminator;

const EPS: f32 = 1e-10;

/// A frozen discriminator's blocks as a distance between pictures; see the [module](self).
#[derive(Clone, Debug)]
pub struct DiscriminatorFeatures {
    discriminator: Discriminator,
}

impl DiscriminatorFeatures {
    /// Takes a discriminator's parameters as they are; they receive no gradient.
    pub fn new(discriminator: &Discriminator) -> Self {
        Self {
            discriminator: discriminator.valid(),
        }
    }

    /// The mean distance of a batch, `[1]`: from 0 for equal pictures to 4. Differentiable in `images`; `targets` are
    /// constants.
    ///
    /// # Shapes
    /// Both `[N, 3, H, W]`, in [-1, 1], of any size.
    pub fn distance(&self, images: Tensor<4>, targets: Tensor<4>) -> Tensor<1> {
        let targets = self.discriminator.features(targets.without_autodiff());
        let images = self.discriminator.features(images);
        let num_blocks = images.len() as f32;
        images
            .into_iter()
            .zip(targets)
            .map(|(image, target)| block_distance(image, target))
            .reduce(Tensor::add)
            .expect("a discriminator has blocks")
            .div_scalar(num_blocks)
    }
}

/// `[1]`: the mean over pictures and pixels of the squared distance between unit vectors.
fn block_distance(image: FeatureMap, target: FeatureMap) -> Tensor<1> {
    let difference = normalise(image).sub(normalise(target)); // [N, C, H, W]
    let [_, channels, _, _] = difference.dims();
    difference.square().mean().mul_scalar(channels as f32)
}

fn normalise(x: FeatureMap) -> Tensor<4> {
    let x = x.into_nchw();
    let norm = x.clone().square().sum_dim(1).add_scalar(EPS).sqrt(); // [N, 1, H, W]
    x.div(norm)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::init::Init;
    use crate::stylegan2::DiscriminatorConfig;

    fn setup() -> (Discriminator, Tensor<4>, Tensor<4>) {
        let mut init = Init::new(1, &Device::flex().autodiff());
        let config = DiscriminatorConfig {
            resolution: 16,
            channel_base: 128,
            channel_max: 16,
        };
        let discriminator = config.init(&mut init);
        (
            discriminator,
            init.normal_tensor([2, 3, 16, 16]),
            init.normal_tensor([2, 3, 16, 16]),
        )
    }

    fn scalar(x: Tensor<1>) -> f32 {
        x.into_scalar()
    }

    #[test]
    fn equal_pictures_have_distance_zero_and_the_distance_is_symmetric() {
        let (discriminator, x, y) = setup();
        let features = DiscriminatorFeatures::new(&discriminator);
        assert_eq!(scalar(features.distance(x.clone(), x.clone())), 0.0);
        let there = scalar(features.distance(x.clone(), y.clone()));
        let back = scalar(features.distance(y.clone(), x.clone()));
        assert!(
            (there - back).abs() < 1e-6 && there > 0.0 && there < 4.0,
            "{there} {back}"
        );
        let near = scalar(features.distance(x.clone(), x.clone() + (y - x) * 0.1));
        assert!(near < 0.5 * there, "{near} is not much less than {there}");
    }

    #[test]
    fn only_the_picture_receives_a_gradient() {
        let (discriminator, x, y) = setup();
        let (x, y) = (x.require_grad(), y.require_grad());
        let distance = DiscriminatorFeatures::new(&discriminator).distance(x.clone(), y.clone());
        let gradients = distance.backward();
        let by_x = x.grad(&gradients).expect("the picture is tracked");
        assert!(scalar(by_x.abs().sum()) > 0.0);
        assert!(y.grad(&gradients).is_none());
        assert!(discriminator.net.from_rgb.weight.val().grad(&gradients).is_none());
    }

    #[test]
    fn a_step_against_the_gradient_comes_nearer() {
        let (discriminator, x, y) = setup();
        let features = DiscriminatorFeatures::new(&discriminator);
        let tracked = x.clone().require_grad();
        let before = features.distance(tracked.clone(), y.clone());
        let gradient = tracked.grad(&before.backward()).expect("the picture is tracked");
        let norm = scalar(gradient.clone().square().sum().sqrt());
        let moved = x.without_autodiff() - gradient / norm;
        assert!(scalar(features.distance(moved, y)) < scalar(before));
    }

    #[test]
    fn a_flat_black_picture_gives_a_finite_gradient() {
        let (discriminator, x, y) = setup();
        let zero = x.zeros_like().require_grad();
        let distance = DiscriminatorFeatures::new(&discriminator).distance(zero.clone(), y);
        let gradient = zero.grad(&distance.backward()).expect("the picture is tracked");
        assert!(scalar(gradient.abs().sum()).is_finite());
    }
}
