//! Stage 2: the encoder, which inverts the prior (ReStyle-pSp, Alaluf et al. 2021).
//!
//! ```text
//! y₀ = average image, w₀ = latent_avg
//! wₖ = wₖ₋₁ + encoder([x ‖ yₖ₋₁])        yₖ = G(wₖ)        k = 1 … iterations_per_batch
//! loss = Σₖ mse·‖yₖ − x‖² + perceptual·d(yₖ, x) + w_norm·‖wₖ − latent_avg‖
//! ```
//! The generator is frozen. What an iteration starts from is cut off the gradient graph, so the gradient of the sum is
//! the sum of the iterations' gradients; there is one optimiser step per batch. d is the distance in the features of
//! the frozen stage-1 discriminator: no label enters.
//!
//! Axes: `N` pictures, `S` side of the encoder's pictures, `R` of the generator's, `K` codes, `L` length of a code.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use faceprior_data::{Batch, Dataset, Image, Subset, Transform, random};
use faceprior_nets::encoder::{BackboneEncoder, BackboneEncoderConfig};
use faceprior_nets::init::Init;
use faceprior_nets::irse::beside_average;
use faceprior_nets::layers::{Mode, resize_bilinear};
use faceprior_nets::perceptual::DiscriminatorFeatures;
use faceprior_nets::stylegan2::{Discriminator, Generator, Noise, Prior};
use faceprior_nets::weights::Weights;
use faceprior_ops::Activations;
use rand_chacha::ChaCha8Rng;

use crate::TrainError;
use crate::optim::Optimizer;
use crate::recipe::{Budget, DataRecipe, EncoderOptimizer, EncoderRecipe, Recipe, StageName};
use crate::schedule::{self, Clock};
use crate::stages::evaluation::{chunks, fork, pictures_of, read_images, value};
use crate::stages::{Evaluation, Feed, Report, Stage, backbone_config, images, loader_config};

/// Name of the exported file.
pub const EXPORT: &str = "encoder.safetensors";

/// The state of stage 2; see the [module](self).
pub struct EncoderStage {
    seed: u64,
    activations: Activations,
    device: Device,
    recipe: EncoderRecipe,
    data: DataRecipe,
    train: Arc<dyn Dataset>,
    validation: Subset,
    encoder: BackboneEncoder,
    optimizer: Optimizer,
    /// Off the gradient graph.
    generator: Generator,
    perceptual: DiscriminatorFeatures,
    /// `[L]`
    latent_avg: Tensor<1>,
    /// `[3, S, S]`
    average_image: Tensor<3>,
}

/// One refinement.
struct Iteration {
    /// The generator's picture at the encoder's size, `[N, 3, S, S]`.
    picture: Tensor<4>,
    losses: Losses,
}

/// The terms of the loss, each `[1]`, and their weighted sum.
#[derive(Clone)]
struct Losses {
    total: Tensor<1>,
    mse: Tensor<1>,
    perceptual: Tensor<1>,
    w_norm: Tensor<1>,
}

impl EncoderStage {
    /// Stage 2 from the two exports of stage 1, on its pictures.
    ///
    /// # Errors
    /// Exports of something else; a set too small for the pictures to be held out; a crop beyond the average image.
    pub fn new(
        recipe: &Recipe,
        prior: &Weights,
        discriminator: &Weights,
        dataset: Arc<dyn Dataset>,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let frozen = device.clone().without_autodiff();
        let device = device.clone().autodiff();
        let settings = recipe.encoder.clone();
        let Prior {
            generator,
            latent_avg,
            average_image,
        } = Prior::from_weights(prior, &frozen)?;
        let discriminator = Discriminator::from_weights(discriminator, &frozen)?;
        let size = recipe.backbone.image_size;
        let average_image = cropped(average_image, settings.average_image_crop)?;
        let average_image = resize_bilinear(average_image.unsqueeze::<4>(), [size; 2]).squeeze_dim::<3>(0);
        let config = BackboneEncoderConfig {
            backbone: backbone_config(recipe),
            image_size: size,
            num_ws: generator.config().num_ws(),
            latent_dim: generator.config().latent_dim,
        };
        let (train, validation) = hold_out(&dataset, settings.validation_images, recipe.seed)?;
        Ok(Self {
            seed: recipe.seed,
            activations: recipe.activations.into(),
            data: recipe.data.clone(),
            train,
            validation,
            encoder: config.init(&mut Init::new(
                schedule::seed(recipe.seed, "encoder, network"),
                &device,
            )),
            optimizer: match settings.optimizer {
                EncoderOptimizer::Adam => Optimizer::adam([0.9, 0.999]),
                EncoderOptimizer::Ranger => Optimizer::ranger(0.0),
            },
            generator,
            perceptual: DiscriminatorFeatures::new(&discriminator),
            latent_avg,
            average_image,
            recipe: settings,
            device,
        })
    }

    /// The refinements of pictures `[N, 3, S, S]`, one after another.
    fn iterations(
        &self,
        encoder: &BackboneEncoder,
        x: Tensor<4>,
        mode: Mode,
        rng: &mut ChaCha8Rng,
    ) -> Vec<Iteration> {
        let n = x.dims()[0];
        let start = self.latent_avg.clone().unsqueeze::<3>(); // [1, 1, L]
        let mut codes = start
            .clone()
            .expand([n, self.generator.config().num_ws(), start.dims()[2]]); // [N, K, L]
        let mut beside = beside_average(x.clone(), self.average_image.clone()); // [N, 6, S, S]
        let mut iterations = Vec::with_capacity(self.recipe.iterations_per_batch);
        for _ in 0..self.recipe.iterations_per_batch {
            codes = codes + encoder.forward(beside, mode); // [N, K, L]
            let decoded = self
                .generator
                .synthesis
                .forward(codes.clone(), Noise::Random(fork(rng))); // [N, 3, R, R]
            let picture = resize_bilinear(decoded.clone(), [x.dims()[2], x.dims()[3]]); // [N, 3, S, S]
            let losses = self.losses(&x, decoded, picture.clone(), codes.clone());
            iterations.push(Iteration {
                picture: picture.clone(),
                losses,
            });
            codes = codes.detach();
            beside = Tensor::cat(vec![x.clone(), picture.detach()], 1); // [N, 6, S, S]
        }
        iterations
    }

    /// `decoded` is the generator's picture at its own size: the discriminator's features are at home there.
    fn losses(&self, x: &Tensor<4>, decoded: Tensor<4>, picture: Tensor<4>, codes: Tensor<3>) -> Losses {
        let target = resize_bilinear(x.clone(), [decoded.dims()[2], decoded.dims()[3]]); // [N, 3, R, R]
        let mse = picture.sub(x.clone()).square().mean();
        let perceptual = self.perceptual.distance(decoded, target);
        let offset = codes.sub(self.latent_avg.clone().unsqueeze::<3>());
        let w_norm = offset.square().sum_dims(&[1, 2]).sqrt().mean(); // mean Frobenius norm
        let weighted = |loss: &Tensor<1>, weight: f64| loss.clone().mul_scalar(weight);
        let mut total =
            weighted(&mse, self.recipe.mse_weight).add(weighted(&perceptual, self.recipe.perceptual_weight));
        // Left out when its weight is 0: at a fresh start the norm may be 0, where it has no derivative.
        if self.recipe.w_norm_weight != 0.0 {
            total = total.add(weighted(&w_norm, self.recipe.w_norm_weight));
        }
        Losses {
            total,
            mse,
            perceptual,
            w_norm,
        }
    }
}

impl Stage for EncoderStage {
    fn name(&self) -> StageName {
        StageName::Encoder
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
            dataset: Arc::clone(&self.train),
            transform: Transform::Resize {
                size: self.encoder.config().image_size,
            },
            config: loader_config(&self.data, &self.recipe.budget, self.seed, StageName::Encoder),
        })
    }

    fn step(&mut self, mut batch: Batch, clock: &Clock) -> Result<Report, TrainError> {
        let x = images(&mut batch, &self.device).without_autodiff(); // [N, 3, S, S]
        let iterations = self.iterations(&self.encoder, x, Mode::Train, &mut clock.rng("encoder, noise"));
        let losses: Vec<Losses> = iterations.into_iter().map(|iteration| iteration.losses).collect();
        let total = losses
            .iter()
            .map(|losses| losses.total.clone())
            .reduce(Tensor::add);
        let total = total.expect("a recipe has at least one iteration");
        let mut gradients = total.backward();
        let encoder = self.encoder.clone();
        self.encoder = self
            .optimizer
            .step(encoder, &mut gradients, self.recipe.learning_rate);

        let last = losses.last().expect("a recipe has at least one iteration");
        Ok(Report {
            loss: value(total),
            values: vec![
                ("mse", value(last.mse.clone())),
                ("perceptual", value(last.perceptual.clone())),
                ("w_norm", value(last.w_norm.clone())),
            ],
            warnings: Vec::new(),
        })
    }

    fn evaluate(&self, clock: &Clock) -> Result<Evaluation, TrainError> {
        let (encoder, device) = (self.encoder.valid(), self.device.clone().without_autodiff());
        let transform = Transform::Resize {
            size: encoder.config().image_size,
        };
        let mut rng = clock.fixed_rng("encoder, validation noise");
        let mut scores = Scores::new(self.recipe.iterations_per_batch);
        let mut mean = MeanPicture::default();
        // A row is a picture and what each iteration makes of it.
        let (mut sheet, columns) = (Vec::new(), 1 + self.recipe.iterations_per_batch);
        for indices in chunks(self.validation.len(), self.recipe.budget.batch_size) {
            let Some(x) = read_images(&self.validation, indices, transform, &device)? else {
                continue;
            };
            mean.add(&x);
            let iterations = self.iterations(&encoder, x.clone(), Mode::Eval, &mut rng);
            scores.add(x.dims()[0], &iterations);
            let shown = self
                .recipe
                .samples
                .saturating_sub(sheet.len() / columns)
                .min(x.dims()[0]);
            let pictures =
                std::iter::once(x).chain(iterations.into_iter().map(|iteration| iteration.picture));
            let pictures: Vec<Vec<Image>> = if shown > 0 {
                pictures.map(pictures_of).collect()
            } else {
                Vec::new()
            };
            sheet.extend((0..shown).flat_map(|row| pictures.iter().map(move |column| column[row].clone())));
        }
        if scores.pictures == 0 {
            return Ok(Evaluation::default());
        }
        let mut values = scores.means();
        let loss = values
            .iter()
            .find(|(name, _)| name == "loss")
            .map(|(_, loss)| *loss);
        values.push(("mse_of_mean_picture".to_owned(), mean.mean_squared_error()));
        // Several rows side by side: a sheet of one would be a strip.
        let sheet = Image::grid(&sheet, columns * (self.recipe.samples / columns).isqrt().max(1));
        Ok(Evaluation {
            score: loss.map(|loss| -loss),
            values,
            pictures: vec![("reconstructions".to_owned(), sheet)],
        })
    }

    fn state(&self) -> Weights {
        let mut state = Weights::from_module(&self.encoder, ENCODER);
        state.extend(self.optimizer.state(OPTIMIZER));
        // Does not change, but tells the prior that all the rest belongs to.
        state.insert_tensor(LATENT_AVG, self.latent_avg.clone());
        state
    }

    fn load_state(&mut self, state: &Weights) -> Result<(), TrainError> {
        let trained_on = state.tensor::<1>(LATENT_AVG, &self.latent_avg.device())?;
        if trained_on.dims() != self.latent_avg.dims()
            || value(trained_on.sub(self.latent_avg.clone()).abs().max()) != 0.0
        {
            return Err(TrainError::Invalid(
                "it inverts another prior than the one given (their latent_avg differ)\n\
                 hint: give the prior that the run was started with, or choose another run directory"
                    .to_owned(),
            ));
        }
        self.encoder = state.load_into(self.encoder.clone(), ENCODER)?;
        self.optimizer.load_state(state, OPTIMIZER, &self.device)?;
        Ok(())
    }

    fn export(&self) -> Result<Vec<(String, Weights)>, TrainError> {
        let weights = self
            .encoder
            .to_weights(self.latent_avg.clone(), self.average_image.clone());
        Ok(vec![(EXPORT.to_owned(), weights)])
    }
}

const ENCODER: &str = "encoder.";
const OPTIMIZER: &str = "optimizer.";
const LATENT_AVG: &str = "latent_avg";

/// Pictures for training, and those held out.
fn hold_out(
    dataset: &Arc<dyn Dataset>,
    held_out: usize,
    seed: u64,
) -> Result<(Arc<dyn Dataset>, Subset), TrainError> {
    let len = dataset.len();
    if held_out >= len {
        return Err(TrainError::Invalid(format!(
            "the set has {len} pictures, expected more than the {held_out} to be held out\n\
             hint: lower encoder.validation_images"
        )));
    }
    let mut rng = random::stream(
        schedule::seed(seed, "encoder, validation pictures"),
        b"held out",
        [0, 0],
    );
    let order = random::permutation(&mut rng, len);
    let (validation, train) = order.split_at(held_out);
    let subset = |indices: &[u32]| {
        let mut indices: Vec<usize> = indices.iter().map(|&index| index as usize).collect();
        indices.sort_unstable();
        Subset::new(Arc::clone(dataset), indices)
    };
    Ok((Arc::new(subset(train)), subset(validation)))
}

/// Rows and columns `[top, bottom, left, right]` of a picture `[3, R, R]`.
fn cropped(picture: Tensor<3>, crop: Option<[usize; 4]>) -> Result<Tensor<3>, TrainError> {
    let Some([top, bottom, left, right]) = crop else {
        return Ok(picture);
    };
    let [_, height, width] = picture.dims();
    if top >= bottom || left >= right || bottom > height || right > width {
        return Err(TrainError::Invalid(format!(
            "encoder.average_image_crop is {:?}, expected [top, bottom, left, right] inside {height}x{width}",
            [top, bottom, left, right]
        )));
    }
    Ok(picture.narrow(1, top, bottom - top).narrow(2, left, right - left))
}

/// Sums over pictures of each iteration's losses.
struct Scores {
    pictures: usize,
    /// For each iteration: total, mean squared error, perceptual.
    sums: Vec<[f64; 3]>,
}

impl Scores {
    fn new(iterations: usize) -> Self {
        Self {
            pictures: 0,
            sums: vec![[0.0; 3]; iterations],
        }
    }

    fn add(&mut self, n: usize, iterations: &[Iteration]) {
        self.pictures += n;
        for (sums, Iteration { losses, .. }) in self.sums.iter_mut().zip(iterations) {
            for (sum, loss) in sums
                .iter_mut()
                .zip([&losses.total, &losses.mse, &losses.perceptual])
            {
                *sum += n as f64 * value(loss.clone());
            }
        }
    }

    /// The last iteration's numbers under their plain names, those before it with their number.
    fn means(&self) -> Vec<(String, f64)> {
        let n = self.pictures as f64;
        let mut values = Vec::new();
        for (index, sums) in self.sums.iter().enumerate() {
            let suffix = if index + 1 == self.sums.len() {
                String::new()
            } else {
                format!("_{}", index + 1)
            };
            for (name, sum) in ["loss", "mse", "perceptual"].iter().zip(sums) {
                values.push((format!("{name}{suffix}"), sum / n));
            }
        }
        values
    }
}

/// What the best picture that does not look at its target would get: the variance around the mean of the very
/// pictures to be reconstructed.
#[derive(Default)]
struct MeanPicture {
    pictures: usize,
    sums: Vec<[f64; 2]>,
}

impl MeanPicture {
    fn add(&mut self, x: &Tensor<4>) {
        let [n, c, h, w] = x.dims();
        self.pictures += n;
        self.sums.resize(c * h * w, [0.0; 2]);
        for (index, x) in x.to_data().iter::<f32>().enumerate() {
            let x = f64::from(x);
            let [sum, squares] = &mut self.sums[index % (c * h * w)];
            *sum += x;
            *squares += x * x;
        }
    }

    fn mean_squared_error(&self) -> f64 {
        let n = self.pictures as f64;
        let variance = |[sum, squares]: &[f64; 2]| squares / n - (sum / n).powi(2);
        self.sums.iter().map(variance).sum::<f64>() / self.sums.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faceprior_data::SyntheticFaces;

    #[test]
    fn pictures_held_out_do_not_train() {
        let faces: Arc<dyn Dataset> = Arc::new(SyntheticFaces::new(1, 20, 1, 32));
        let (train, validation) = hold_out(&faces, 6, 1).unwrap();
        assert_eq!((train.len(), validation.len()), (14, 6));
        let held_out: Vec<_> = (0..6).map(|index| validation.name(index)).collect();
        assert!((0..14).all(|index| !held_out.contains(&train.name(index))));
        let error = hold_out(&faces, 20, 1).err().unwrap().to_string();
        assert!(
            error.contains("has 20 pictures") && error.contains("encoder.validation_images"),
            "{error}"
        );
    }

    #[test]
    fn the_error_of_the_mean_picture_is_the_variance() {
        let mut mean = MeanPicture::default();
        for x in [0.0, 1.0, 2.0, 3.0] {
            mean.add(&Tensor::full([1, 3, 2, 2], x, &Device::flex()));
        }
        assert!((mean.mean_squared_error() - 1.25).abs() < 1e-9);
    }

    #[test]
    fn a_crop_beyond_the_picture_is_an_error() {
        let picture = || Tensor::<3>::zeros([3, 8, 8], &Device::flex());
        assert_eq!(cropped(picture(), Some([1, 7, 0, 8])).unwrap().dims(), [3, 6, 8]);
        let error = cropped(picture(), Some([1, 9, 0, 8])).unwrap_err().to_string();
        assert!(error.contains("[1, 9, 0, 8]") && error.contains("8x8"), "{error}");
    }
}
