//! Stage 1: the prior, a StyleGAN2 of unlabelled faces.
//!
//! One step, in this order (Karras et al. 2020; the augmentation pipe of StyleGAN2-ADA is off):
//!
//! 1. G: mean softplus(−D(G(z))), one step of Adam.
//! 2. every `path_length.every`-th step: path length on fresh fakes, its own step of Adam; skipped if it is NaN.
//! 3. D: mean softplus(D(G(z))) + mean softplus(−D(x)) on fresh fakes of the new G, one step of Adam.
//! 4. every `r1.every`-th step: R1 on the pictures x, its own step of Adam.
//! 5. EMA of G: decay min(`ema_decay`, (1 + n)/(10 + n)) at the n-th step.
//!
//! Fakes mix the codes of two latents with probability `style_mixing`, at one crossover per batch, and have random
//! noise. The running mean of w follows the first latents of all fakes.
//!
//! Nothing here sees a label. The score of an evaluation is minus the [distance](sample_distance) of EMA samples to
//! the real set.

pub mod sample_distance;

use std::sync::{Arc, OnceLock};

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use faceprior_data::{Batch, Dataset, Image, Transform};
use faceprior_nets::init::Init;
use faceprior_nets::stylegan2::regularizers::{path_length_penalty, r1_penalty};
use faceprior_nets::stylegan2::{
    Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, Noise, Prior, discriminator_loss,
    generator_loss, normal,
};
use faceprior_nets::weights::Weights;
use faceprior_ops::Activations;
use rand::{Rng, RngExt};
use rand_chacha::ChaCha8Rng;

use self::sample_distance::{Reals, features_of};
use crate::TrainError;
use crate::optim::{Optimizer, ema_decay, update_average};
use crate::recipe::{Budget, DataRecipe, LazyPenalty, PriorRecipe, Recipe, StageName};
use crate::schedule::{self, Clock};
use crate::stages::evaluation::{fork, pictures_of, value};
use crate::stages::{Evaluation, Feed, Report, Stage, images, loader_config};

/// Name of the exported file that holds the averaged generator, `latent_avg` and `average_image`.
pub const EXPORT: &str = "generator.safetensors";
/// Name of the exported file that holds the discriminator.
pub const DISCRIMINATOR_EXPORT: &str = "discriminator.safetensors";

/// Generated pictures that are compared with as many real ones, if there are so many.
const COMPARED: usize = 1000;
/// Pictures generated at once in an evaluation.
const EVALUATION_BATCH: usize = 32;

/// The state of stage 1; see the [module](self).
pub struct PriorStage {
    seed: u64,
    activations: Activations,
    device: Device,
    recipe: PriorRecipe,
    data: DataRecipe,
    dataset: Arc<dyn Dataset>,
    generator: Generator,
    discriminator: Discriminator,
    /// Off the gradient graph.
    average: Generator,
    generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
    path_length_mean: f32,
    /// What samples are compared with; made at the first evaluation, from the data alone.
    reals: OnceLock<Reals>,
}

impl PriorStage {
    /// Stage 1 on unlabelled pictures.
    ///
    /// # Errors
    /// Sizes in `[prior]` that no network can have.
    pub fn new(recipe: &Recipe, dataset: Arc<dyn Dataset>, device: &Device) -> Result<Self, TrainError> {
        let device = device.clone().autodiff();
        let settings = recipe.prior.clone();
        let PriorRecipe {
            resolution,
            latent_dim,
            mapping_layers,
            channel_base,
            channel_max,
            ..
        } = settings;
        let generator = GeneratorConfig {
            resolution,
            latent_dim,
            mapping_layers,
            channel_base,
            channel_max,
        };
        let discriminator = DiscriminatorConfig {
            resolution,
            channel_base,
            channel_max,
        };
        let invalid = |problem| TrainError::Invalid(format!("prior.{problem}"));
        generator
            .check()
            .and_then(|()| discriminator.check())
            .map_err(invalid)?;
        let init = |part| Init::new(schedule::seed(recipe.seed, part), &device);
        let generator = generator.init(&mut init("prior, generator"));
        let discriminator = discriminator.init(&mut init("prior, discriminator"));
        Ok(Self {
            seed: recipe.seed,
            activations: recipe.activations.into(),
            data: recipe.data.clone(),
            dataset,
            average: generator.valid(),
            generator,
            discriminator,
            generator_optimizer: Optimizer::adam(settings.betas),
            discriminator_optimizer: Optimizer::adam(settings.betas),
            path_length_mean: 0.0,
            reals: OnceLock::new(),
            recipe: settings,
            device,
        })
    }

    /// Codes `[N, K, L]` of fresh latents and the noise that goes with them; moves the running mean of w.
    fn draw(&self, generator: &Generator, n: usize, mut rng: ChaCha8Rng) -> (Tensor<3>, Noise) {
        let mixes = rng.random::<f64>() < self.recipe.style_mixing;
        let num_ws = generator.config().num_ws();
        let crossover = (rng.random::<f64>() * num_ws as f64) as usize;
        let first = generator.mapping.forward(self.latents(&mut rng, n)); // [N, L]
        self.generator.mapping.track(first.clone());
        let codes = if mixes {
            let second = generator.mapping.forward(self.latents(&mut rng, n)); // [N, L]
            generator.mixed_codes(first, second, crossover)
        } else {
            generator.codes(first)
        };
        (codes, Noise::Random(rng))
    }

    fn latents(&self, rng: &mut impl Rng, n: usize) -> Tensor<2> {
        normal(
            rng,
            [n, self.recipe.latent_dim],
            &self.device.clone().without_autodiff(),
        )
    }

    fn generator_step(&mut self, n: usize, clock: &Clock) -> f64 {
        let (codes, noise) = self.draw(&self.generator, n, clock.rng("prior, fakes for G"));
        let fakes = self.generator.synthesis.forward(codes, noise); // [N, 3, R, R]
        let loss = generator_loss(self.discriminator.valid().forward(fakes));
        self.step_generator(&loss);
        value(loss)
    }

    /// The penalty and the running mean of lengths, unless a length is not finite.
    fn path_length_step(&mut self, n: usize, clock: &Clock) -> Option<(f64, f64)> {
        let (codes, noise) = self.draw(&self.generator, n, clock.rng("prior, fakes for path length"));
        let size = self.recipe.resolution;
        let directions = normal::<4>(
            &mut clock.rng("prior, directions"),
            [n, 3, size, size],
            &codes.device(),
        );
        let path = path_length_penalty(
            &self.generator.synthesis,
            codes,
            directions.without_autodiff().div_scalar(size as f32),
            noise,
            self.path_length_mean,
        );
        if !path.penalty.is_finite() {
            return None;
        }
        self.path_length_mean = path.running_mean;
        self.step_generator(&path.surrogate.mul_scalar(self.recipe.path_length.weight));
        Some((f64::from(path.penalty), f64::from(path.running_mean)))
    }

    /// The loss, and the mean sign of D on real pictures.
    fn discriminator_step(&mut self, reals: Tensor<4>, clock: &Clock) -> (f64, f64) {
        let frozen = self.generator.valid();
        let (codes, noise) = self.draw(&frozen, reals.dims()[0], clock.rng("prior, fakes for D"));
        let fakes = frozen.synthesis.forward(codes, noise); // [N, 3, R, R]
        let on_fakes = self.discriminator.forward(fakes.autodiff()); // [N, 1]
        let on_reals = self.discriminator.forward(reals); // [N, 1]
        let sign = on_reals.clone().without_autodiff().sign().mean();
        let loss = discriminator_loss(on_fakes, on_reals);
        self.step_discriminator(&loss);
        (value(loss), value(sign))
    }

    fn r1_step(&mut self, reals: Tensor<4>) -> f64 {
        let r1 = r1_penalty(&self.discriminator, reals);
        self.step_discriminator(&r1.surrogate.mul_scalar(self.recipe.r1.weight));
        f64::from(r1.penalty)
    }

    fn step_generator(&mut self, loss: &Tensor<1>) {
        let (generator, mut gradients) = (self.generator.clone(), loss.backward());
        self.generator =
            self.generator_optimizer
                .step(generator, &mut gradients, self.recipe.learning_rate_g);
    }

    fn step_discriminator(&mut self, loss: &Tensor<1>) {
        let (discriminator, mut gradients) = (self.discriminator.clone(), loss.backward());
        self.discriminator =
            self.discriminator_optimizer
                .step(discriminator, &mut gradients, self.recipe.learning_rate_d);
    }

    /// Pictures `[n, 3, R, R]` of fixed latents, in parts, each with the noise that `noise` gives.
    fn samples(
        &self,
        generator: &Generator,
        mut rng: ChaCha8Rng,
        n: usize,
        noise: impl Fn(&mut ChaCha8Rng) -> Noise,
        mut take: impl FnMut(Tensor<4>),
    ) {
        let mut left = n;
        while left > 0 {
            let n = left.min(EVALUATION_BATCH);
            let w = generator.mapping.forward(self.latents(&mut rng, n));
            let noise = noise(&mut rng);
            take(generator.synthesis.forward(generator.codes(w), noise));
            left -= n;
        }
    }

    fn grid(&self, generator: &Generator, clock: &Clock) -> Image {
        let mut pictures = Vec::new();
        let rng = clock.fixed_rng("prior, sample grid");
        self.samples(
            generator,
            rng,
            self.recipe.samples,
            |_| Noise::Constant,
            |images| {
                pictures.extend(pictures_of(images));
            },
        );
        Image::grid(&pictures, columns(pictures.len()))
    }

    fn reals(&self) -> Result<&Reals, TrainError> {
        if let Some(reals) = self.reals.get() {
            return Ok(reals);
        }
        let device = self.device.clone().without_autodiff();
        let seed = schedule::seed(self.seed, "prior, compared pictures");
        let reals = Reals::of(&self.dataset, self.recipe.resolution, COMPARED, seed, &device)?;
        Ok(self.reals.get_or_init(|| reals))
    }
}

impl Stage for PriorStage {
    fn name(&self) -> StageName {
        StageName::Prior
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn activations(&self) -> Activations {
        self.activations
    }

    fn budget(&self) -> &Budget {
        &self.recipe.budget
    }

    fn feed(&self) -> Result<Feed, TrainError> {
        Ok(Feed {
            dataset: Arc::clone(&self.dataset),
            transform: Transform::Resize {
                size: self.recipe.resolution,
            },
            config: loader_config(&self.data, &self.recipe.budget, self.seed, StageName::Prior),
        })
    }

    fn step(&mut self, mut batch: Batch, clock: &Clock) -> Result<Report, TrainError> {
        let n = batch.len();
        let reals = images(&mut batch, &self.device); // [N, 3, R, R]
        let mut report = Report::default();

        let g_loss = self.generator_step(n, clock);
        if is_due(&self.recipe.path_length, clock) {
            match self.path_length_step(n, clock) {
                Some((penalty, mean)) => {
                    report
                        .values
                        .extend([("path_length_penalty", penalty), ("path_length", mean)]);
                }
                None => report
                    .warnings
                    .push("the path length is not finite: its step is skipped".to_owned()),
            }
        }
        let (d_loss, sign) = self.discriminator_step(reals.clone(), clock);
        if is_due(&self.recipe.r1, clock) {
            report.values.push(("r1", self.r1_step(reals)));
        }
        let decay = ema_decay(self.recipe.ema_decay, clock.step + 1);
        self.average = update_average(self.average.clone(), &self.generator, decay);

        report.loss = g_loss + d_loss;
        report.values.extend([
            ("g_loss", g_loss),
            ("d_loss", d_loss),
            ("sign_of_real_logits", sign),
        ]);
        Ok(report)
    }

    fn evaluate(&self, clock: &Clock) -> Result<Evaluation, TrainError> {
        let generator = self.generator.valid();
        let reals = self.reals()?;
        let mut fakes = Vec::new();
        let rng = clock.fixed_rng("prior, compared samples");
        let random = |rng: &mut ChaCha8Rng| Noise::Random(fork(rng));
        self.samples(&self.average, rng, reals.len(), random, |images| {
            fakes.extend(features_of(images))
        });
        let distance = reals.distance_to(fakes)?;
        Ok(Evaluation {
            score: Some(-distance),
            values: vec![
                ("sample_distance".to_owned(), distance),
                ("sample_distance_of_reals".to_owned(), reals.own_distance),
            ],
            pictures: vec![
                ("samples".to_owned(), self.grid(&self.average, clock)),
                ("samples-without-average".to_owned(), self.grid(&generator, clock)),
            ],
        })
    }

    fn state(&self) -> Weights {
        let mut state = Weights::from_module(&self.generator, GENERATOR);
        state.extend(Weights::from_module(&self.discriminator, DISCRIMINATOR));
        state.extend(Weights::from_module(&self.average, AVERAGE));
        state.extend(self.generator_optimizer.state(GENERATOR_OPTIMIZER));
        state.extend(self.discriminator_optimizer.state(DISCRIMINATOR_OPTIMIZER));
        state.insert_tensor(
            PATH_LENGTH_MEAN,
            Tensor::<1>::from_floats([self.path_length_mean], &Device::flex()),
        );
        state
    }

    fn load_state(&mut self, state: &Weights) -> Result<(), TrainError> {
        self.generator = state.load_into(self.generator.clone(), GENERATOR)?;
        self.discriminator = state.load_into(self.discriminator.clone(), DISCRIMINATOR)?;
        self.average = state.load_into(self.average.clone(), AVERAGE)?;
        self.generator_optimizer
            .load_state(state, GENERATOR_OPTIMIZER, &self.device)?;
        self.discriminator_optimizer
            .load_state(state, DISCRIMINATOR_OPTIMIZER, &self.device)?;
        self.path_length_mean = state
            .tensor::<1>(PATH_LENGTH_MEAN, &Device::flex())?
            .into_scalar();
        Ok(())
    }

    fn export(&self) -> Result<Vec<(String, Weights)>, TrainError> {
        let mut rng = schedule::rng(self.seed, "prior, latent_avg", 0);
        let latent_avg = self
            .average
            .latent_avg(self.recipe.latent_avg_samples, &mut rng, &self.device);
        let prior = Prior {
            average_image: self.average.picture_of(latent_avg.clone()),
            latent_avg,
            generator: self.average.clone(),
        };
        Ok(vec![
            (EXPORT.to_owned(), prior.to_weights()),
            (DISCRIMINATOR_EXPORT.to_owned(), self.discriminator.to_weights()),
        ])
    }
}

const GENERATOR: &str = "g.";
const DISCRIMINATOR: &str = "d.";
const AVERAGE: &str = "ema.";
const GENERATOR_OPTIMIZER: &str = "optimizer.g.";
const DISCRIMINATOR_OPTIMIZER: &str = "optimizer.d.";
const PATH_LENGTH_MEAN: &str = "path_length_mean";

/// Whether the step to be taken is a multiple of the interval, steps counted from 1.
fn is_due(penalty: &LazyPenalty, clock: &Clock) -> bool {
    penalty.every > 0 && (clock.step + 1).is_multiple_of(penalty.every)
}

/// Columns of a sheet that is about square.
fn columns(pictures: usize) -> usize {
    pictures.isqrt().max(1)
}
