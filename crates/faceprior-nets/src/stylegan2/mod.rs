//! StyleGAN2-ADA in the variant of its PyTorch-Lightning port (Karras et al. 2020: "Analyzing and improving the image
//! quality of StyleGAN", "Training generative adversarial networks with limited data").
//!
//! A [`Generator`] maps a latent z to a code w ([`Mapping`]) and K copies of w, or codes of several latents, to a
//! picture ([`Synthesis`]). A [`Discriminator`] scores pictures. [`regularizers`] holds R1 and path length.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use faceprior_nets::init::Init;
//! use faceprior_nets::stylegan2::{GeneratorConfig, Noise};
//!
//! let config =
//!     GeneratorConfig { resolution: 16, latent_dim: 32, mapping_layers: 2, channel_base: 128, channel_max: 16 };
//! let mut init = Init::new(1, &Device::flex());
//! let generator = config.init(&mut init);
//! let z: Tensor<2> = init.normal_tensor([2, 32]);
//! let codes = generator.codes(generator.mapping.forward(z));
//! assert_eq!(generator.synthesis.forward(codes, Noise::Constant).dims(), [2, 3, 16, 16]);
//! ```

mod discriminator;
mod layers;
mod mapping;
pub mod regularizers;
mod synthesis;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData, activation};
use rand::Rng;
use serde::{Deserialize, Serialize};

pub use discriminator::{Discriminator, DiscriminatorBlock, DiscriminatorConfig, Epilogue, Net};
pub use layers::{Activation, EqualizedConv, FullyConnected};
pub use mapping::Mapping;
pub use synthesis::{FirstBlock, Noise, Synthesis, SynthesisBlock, SynthesisLayer, ToRgb, normal};

use crate::encoder::LATENT_AVG;
use crate::init::Init;
use crate::irse::AVERAGE_IMAGE;
use crate::weights::{Weights, WeightsError};

/// What a generator is built from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorConfig {
    /// Height and width of the pictures: a power of two, at least 8.
    pub resolution: usize,
    /// Dimensions of z and w; 512 in the published networks.
    pub latent_dim: usize,
    /// Layers of the mapping network; 8 in the published networks, 2 for quick runs.
    pub mapping_layers: usize,
    /// Channels at resolution r are `channel_base`/r, at most `channel_max`; 16384 in the published networks.
    pub channel_base: usize,
    /// See `channel_base`; 512 in the published networks.
    pub channel_max: usize,
}

impl GeneratorConfig {
    /// A fresh generator.
    ///
    /// # Panics
    /// If [`check`](Self::check) refuses the config.
    pub fn init(&self, init: &mut Init) -> Generator {
        if let Err(problem) = self.check() {
            panic!("{problem}");
        }
        Generator {
            mapping: Mapping::new(init, self.latent_dim, self.mapping_layers),
            synthesis: Synthesis::new(init, self),
            config: self.clone(),
        }
    }

    /// Whether a network can be built from these numbers.
    ///
    /// # Errors
    /// The first number that is out of range.
    pub fn check(&self) -> Result<(), String> {
        check_size(self.resolution, self.channel_base, self.channel_max)?;
        check_range("latent_dim", self.latent_dim, 1, 8192)?;
        check_range("mapping_layers", self.mapping_layers, 0, 64)
    }

    /// How many codes K a picture takes: two for each resolution and two more, which are not used but kept for
    /// compatibility with the port.
    pub fn num_ws(&self) -> usize {
        2 * (self.resolutions().count() + 1)
    }

    fn channels(&self, resolution: usize) -> usize {
        channels(self.channel_base, self.channel_max, resolution)
    }

    fn resolutions(&self) -> impl Iterator<Item = usize> + use<> {
        resolutions(self.resolution)
    }
}

fn channels(base: usize, max: usize, resolution: usize) -> usize {
    (base / resolution).min(max)
}

/// 4, 8, … up to `largest`.
fn resolutions(largest: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(4), |res| Some(res * 2)).take_while(move |res| *res <= largest)
}

fn check_size(resolution: usize, channel_base: usize, channel_max: usize) -> Result<(), String> {
    if !resolution.is_power_of_two() || !(8..=4096).contains(&resolution) {
        return Err(format!(
            "resolution is {resolution}, expected a power of two from 8 to 4096"
        ));
    }
    check_range("channel_base", channel_base, resolution, 1 << 20)?;
    check_range("channel_max", channel_max, 1, 8192)
}

fn check_range(name: &str, value: usize, least: usize, most: usize) -> Result<(), String> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!("{name} is {value}, expected {least} to {most}"))
    }
}

/// Latents to pictures.
#[derive(Module, Debug)]
pub struct Generator {
    /// z → w.
    pub mapping: Mapping,
    /// Codes → picture.
    pub synthesis: Synthesis,
    #[module(skip)]
    config: GeneratorConfig,
}

impl Generator {
    /// The kind under which its weights are written, alone or as a [`Prior`].
    pub const KIND: &str = "generator";

    /// One code for every layer: `[N, L]` → `[N, K, L]`.
    pub fn codes(&self, w: Tensor<2>) -> Tensor<3> {
        w.unsqueeze_dim::<3>(1).repeat_dim(1, self.config.num_ws())
    }

    /// Style mixing: the codes before `crossover` from `first`, from it on from `second` (Karras et al. 2019,
    /// section 3.1). Both `[N, L]` → `[N, K, L]`.
    pub fn mixed_codes(&self, first: Tensor<2>, second: Tensor<2>, crossover: usize) -> Tensor<3> {
        let num_ws = self.config.num_ws();
        match crossover {
            0 => self.codes(second),
            at if at >= num_ws => self.codes(first),
            at => {
                let first = first.unsqueeze_dim::<3>(1).repeat_dim(1, at);
                let second = second.unsqueeze_dim::<3>(1).repeat_dim(1, num_ws - at);
                Tensor::cat(vec![first, second], 1)
            }
        }
    }

    /// The mean code of `samples` random latents, `[L]`: where an encoder starts from.
    pub fn latent_avg(&self, samples: usize, rng: &mut impl Rng, device: &Device) -> Tensor<1> {
        const BATCH: usize = 1000;
        let device = device.clone().without_autodiff();
        let mapping = self.mapping.valid();
        let mut sum = vec![0.0f64; self.config.latent_dim];
        let mut left = samples.max(1);
        while left > 0 {
            let n = left.min(BATCH);
            let w = mapping.forward(normal(rng, [n, self.config.latent_dim], &device));
            for (sum, w) in sum.iter_mut().zip(w.sum_dim(0).into_data().iter::<f32>()) {
                *sum += f64::from(w);
            }
            left -= n;
        }
        let mean: Vec<f32> = sum
            .iter()
            .map(|sum| (sum / samples.max(1) as f64) as f32)
            .collect();
        Tensor::from_floats(mean.as_slice(), &device)
    }

    /// The picture of one code `[L]` in every layer with constant noise, `[3, R, R]`.
    pub fn picture_of(&self, w: Tensor<1>) -> Tensor<3> {
        let codes = self.codes(w.unsqueeze::<2>());
        self.synthesis
            .valid()
            .forward(codes.without_autodiff(), Noise::Constant)
            .squeeze_dim::<3>(0)
    }

    /// What this network was built from.
    pub fn config(&self) -> &GeneratorConfig {
        &self.config
    }

    /// Builds the generator that the file describes. What else an exported prior holds, and the port's filter
    /// kernels, are not looked at; the port's noise strengths without a dimension are taken.
    ///
    /// # Errors
    /// [`WeightsError`] if the file holds something else or not all of it.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        let config: GeneratorConfig = weights.config(Self::KIND)?;
        config.check().map_err(|problem| WeightsError::Description {
            origin: weights.origin(),
            problem,
        })?;
        let mut weights =
            weights.subset(|name| !name.ends_with(".kernel") && ![LATENT_AVG, AVERAGE_IMAGE].contains(&name));
        let names: Vec<String> = weights.names().map(str::to_owned).collect();
        for name in names.iter().filter(|name| name.ends_with(".noise_strength")) {
            let scalar = weights.get(name).filter(|data| data.shape().is_empty());
            if let Some(number) = scalar.and_then(|data| data.as_slice::<f32>().ok()?.first().copied()) {
                weights.insert(name, TensorData::new(vec![number], [1]));
            }
        }
        weights.load_into(config.init(&mut Init::new(0, device)), "")
    }
}

/// What stage 1 leaves for stage 2: the generator and the two averages that an encoder starts from.
#[derive(Clone, Debug)]
pub struct Prior {
    /// The generator, averaged over training.
    pub generator: Generator,
    /// Mean code, `[L]`.
    pub latent_avg: Tensor<1>,
    /// The generator's picture of `latent_avg` with constant noise, `[3, R, R]` in [-1, 1].
    pub average_image: Tensor<3>,
}

impl Prior {
    /// The generator under PyTorch's names, `latent_avg`, `average_image`, kind and config.
    pub fn to_weights(&self) -> Weights {
        let mut weights = Weights::from_module(&self.generator, "");
        weights.insert_tensor(LATENT_AVG, self.latent_avg.clone());
        weights.insert_tensor(AVERAGE_IMAGE, self.average_image.clone());
        weights.describe(Generator::KIND, self.generator.config());
        weights
    }

    /// Builds the generator that the file describes.
    ///
    /// # Errors
    /// [`WeightsError`] if the file holds something else or not all of it.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        let generator = Generator::from_weights(weights, device)?;
        let latent_avg = weights.tensor::<1>(LATENT_AVG, device)?;
        let average_image = weights.tensor::<3>(AVERAGE_IMAGE, device)?;
        let GeneratorConfig {
            resolution,
            latent_dim,
            ..
        } = *generator.config();
        let mismatch = |problem| WeightsError::Mismatch {
            origin: weights.origin(),
            problem,
        };
        if latent_avg.dims() != [latent_dim] {
            return Err(mismatch(format!(
                "{LATENT_AVG} is {:?}, expected {:?}",
                latent_avg.dims(),
                [latent_dim]
            )));
        }
        if average_image.dims() != [3, resolution, resolution] {
            return Err(mismatch(format!(
                "{AVERAGE_IMAGE} is {:?}, expected {:?}",
                average_image.dims(),
                [3, resolution, resolution]
            )));
        }
        Ok(Self {
            generator,
            latent_avg,
            average_image,
        })
    }
}

/// The generator's loss: mean softplus(−D(fake)), `[1]`, from logits `[N, 1]` (Goodfellow et al. 2014, non-saturating).
pub fn generator_loss(fake_logits: Tensor<2>) -> Tensor<1> {
    softplus(fake_logits.neg()).mean()
}

/// The discriminator's loss: mean softplus(D(fake)) + mean softplus(−D(real)), `[1]`, from logits `[N, 1]`.
pub fn discriminator_loss(fake_logits: Tensor<2>, real_logits: Tensor<2>) -> Tensor<1> {
    softplus(fake_logits)
        .mean()
        .add(softplus(real_logits.neg()).mean())
}

/// ln(1 + eˣ), without overflow.
fn softplus(x: Tensor<2>) -> Tensor<2> {
    activation::softplus(x, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const CONFIG: GeneratorConfig = GeneratorConfig {
        resolution: 16,
        latent_dim: 8,
        mapping_layers: 2,
        channel_base: 128,
        channel_max: 16,
    };

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().try_to_vec().unwrap()
    }

    fn generator(device: &Device) -> Generator {
        let mut generator = CONFIG.init(&mut Init::new(1, device));
        // A fresh network adds no noise; give it some to tell the noise modes apart.
        for block in &mut generator.synthesis.blocks {
            block.conv1.noise_strength = Init::new(2, device).constant([1], 0.5);
        }
        generator
    }

    #[test]
    fn number_of_codes_and_widths_follow_the_resolution() {
        assert_eq!(CONFIG.num_ws(), 8);
        let large = GeneratorConfig {
            resolution: 128,
            channel_base: 16384,
            channel_max: 512,
            ..CONFIG
        };
        assert_eq!(large.num_ws(), 14);
        let widths: Vec<_> = large.resolutions().map(|res| large.channels(res)).collect();
        assert_eq!(widths, [512, 512, 512, 512, 256, 128]);
    }

    #[test]
    fn configs_out_of_range_are_refused_with_the_number() {
        let bad = |change: fn(&mut GeneratorConfig)| {
            let mut config = CONFIG.clone();
            change(&mut config);
            config.check().unwrap_err()
        };
        assert!(bad(|c| c.resolution = 48).contains("resolution is 48"));
        assert!(bad(|c| c.channel_base = 8).contains("channel_base is 8, expected 16"));
        assert!(bad(|c| c.latent_dim = 0).contains("latent_dim is 0"));
    }

    #[test]
    fn mixing_takes_codes_before_the_crossover_from_the_first() {
        let g = generator(&Device::flex());
        let (a, b) = (
            Tensor::zeros([1, 8], &Device::flex()),
            Tensor::ones([1, 8], &Device::flex()),
        );
        for crossover in 0..=8 {
            let codes = values(g.mixed_codes(a.clone(), b.clone(), crossover));
            for (code, numbers) in codes.chunks(8).enumerate() {
                assert!(
                    numbers
                        .iter()
                        .all(|&x| x == if code < crossover { 0.0 } else { 1.0 })
                );
            }
        }
    }

    #[test]
    fn truncation_pulls_the_first_codes_to_the_mean() {
        let g = generator(&Device::flex());
        g.mapping.w_avg.set(Tensor::full([8], 2.0, &Device::flex()));
        let codes = Tensor::<3>::full([1, 4, 8], 4.0, &Device::flex());
        let pulled = values(g.mapping.truncate(codes.clone(), 0.5, Some(3)));
        assert!(pulled[..24].iter().all(|&x| x == 3.0) && pulled[24..].iter().all(|&x| x == 4.0));
        assert!(
            values(g.mapping.truncate(codes, 0.0, None))
                .iter()
                .all(|&x| x == 2.0)
        );
    }

    #[test]
    fn the_running_mean_takes_half_a_percent_of_each_batch() {
        let g = generator(&Device::flex().autodiff());
        let w = Tensor::<2>::full([3, 8], 2.0, &Device::flex().autodiff());
        g.mapping.track(w.clone());
        g.mapping.track(w);
        let expected = 2.0 * (1.0 - 0.995f32.powi(2));
        assert!(
            values(g.mapping.w_avg.get())
                .iter()
                .all(|&x| (x - expected).abs() < 1e-6)
        );
    }

    #[test]
    fn noise_is_random_constant_or_absent_and_repeatable() {
        let device = Device::flex();
        let g = generator(&device);
        let codes = g
            .codes(Init::new(3, &device).normal_tensor([1, 8]))
            .repeat_dim(0, 2);
        let picture = |noise| values(g.synthesis.forward(codes.clone(), noise));
        let random = |seed| picture(Noise::Random(ChaCha8Rng::seed_from_u64(seed)));
        assert_eq!(random(1), random(1));
        assert_ne!(random(1), random(2));
        let same = |pictures: Vec<f32>| pictures[..768] == pictures[768..];
        assert!(!same(random(1)) && same(picture(Noise::Constant)) && same(picture(Noise::None)));
        assert_ne!(picture(Noise::Constant), picture(Noise::None));
    }

    #[test]
    fn a_prior_survives_its_file() {
        let device = Device::flex();
        let generator = generator(&device);
        let latent_avg = generator.latent_avg(1500, &mut ChaCha8Rng::seed_from_u64(1), &device);
        let average_image = generator.picture_of(latent_avg.clone());
        let prior = Prior {
            generator,
            latent_avg,
            average_image,
        };
        let weights = prior.to_weights();
        for name in [
            "mapping.w_avg",
            "synthesis.first_block.const",
            "synthesis.blocks.1.conv0.noise_const",
        ] {
            assert!(weights.get(name).is_some(), "{name} is missing");
        }
        let again = Prior::from_weights(&weights, &device).unwrap();
        assert_eq!(values(again.average_image.clone()), values(prior.average_image));
        assert_eq!(
            values(again.generator.picture_of(again.latent_avg)),
            values(again.average_image)
        );

        // As the port writes it: strengths without a dimension, filter kernels among the parameters.
        let mut port = weights.clone();
        let strength = "synthesis.blocks.0.conv1.noise_strength";
        port.insert(strength, TensorData::new(vec![0.5f32], Vec::<usize>::new()));
        port.insert(
            "synthesis.blocks.0.resampler.kernel",
            TensorData::new(vec![0.0f32; 16], [4, 4]),
        );
        let again = Generator::from_weights(&port, &device).unwrap();
        assert_eq!(
            values(again.synthesis.blocks[0].conv1.noise_strength.val()),
            [0.5]
        );

        let error = Discriminator::from_weights(&weights, &device)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("holds generator, expected discriminator"),
            "{error}"
        );
    }

    #[test]
    fn losses_are_stable_for_large_logits() {
        let logits = |x: f32| Tensor::<2>::from_data([[x]], &Device::flex());
        assert_eq!(values(generator_loss(logits(-1e4))), [1e4]);
        assert_eq!(values(generator_loss(logits(1e4))), [0.0]);
        let even = values(discriminator_loss(logits(0.0), logits(0.0)))[0];
        assert!((even - 2.0 * 2.0f32.ln()).abs() < 1e-6);
    }
}
