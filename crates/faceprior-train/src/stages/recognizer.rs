//! Stage 3: the recogniser, from the stage-2 encoder or from random weights.
//!
//! Equations: embedding e = f([x ‖ x̄]) with the average image x̄ as channels 4 to 6; logits of a margin head
//! (ArcFace, Deng et al. 2019; CosFace, Wang et al. 2018; plain softmax); focal loss (1 − e^(−ce))²·ce on the mean
//! cross-entropy ce of the batch (face.evoLVe's form of Lin et al. 2017); SGD with momentum and decay of all but
//! BatchNorm's parameters.
//!
//! From the encoder, input layer, body and average image are taken over strictly and the output layer is fresh; for
//! the first `freeze_epochs` the body's parameters rest. The twin from scratch is the same network with the mean of
//! its own training pictures as average image: nothing of it comes from stages 1 and 2.
//!
//! | in the log | what it is |
//! |---|---|
//! | `loss` | the focal loss or cross-entropy of the batch |
//! | `top1`, `top5` | shares of the batch whose identity is among the highest logits, the margin included |
//! | `target_cosine` | mean cosine between an embedding and the direction of its identity |
//! | `learning_rate`, `margin` | as they were in the step |
//! | `accuracy`, `auc` | pair verification of people held out from training, if there are any; accuracy is the score |

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use faceprior_data::{Batch, Dataset, Subset, Transform};
use faceprior_eval::bootstrap::Bootstrap;
use faceprior_eval::verification::Protocol;
use faceprior_nets::encoder::{BackboneEncoder, BackboneEncoderConfig};
use faceprior_nets::heads::{self, HeadConfig, HeadKind, Margin};
use faceprior_nets::init::Init;
use faceprior_nets::irse::{AVERAGE_IMAGE, BackboneConfig, Recognizer, RecognizerConfig, beside_average};
use faceprior_nets::layers::Mode;
use faceprior_nets::losses;
use faceprior_nets::weights::Weights;
use faceprior_ops::Activations;

use crate::TrainError;
use crate::embed::{EmbedOptions, FaceRecognizer, PairSet};
use crate::optim::{Optimizer, all_but_batch_norm, set_trainable};
use crate::recipe::{Budget, ClassificationLoss, DataRecipe, Head, Recipe, RecognizerRecipe, StageName};
use crate::schedule::{self, Clock, ramp};
use crate::sources::Labelled;
use crate::stages::{Evaluation, Feed, Report, Stage, backbone_config, images, loader_config};

/// Name of the exported file.
pub const EXPORT: &str = "recognizer.safetensors";

/// Pictures that the twin's average image is the mean of.
const AVERAGED_PICTURES: usize = 512;
/// γ of the focal loss.
const FOCAL_GAMMA: f32 = 2.0;

/// The state of stage 3; see the [module](self).
pub struct RecognizerStage {
    name: StageName,
    seed: u64,
    activations: Activations,
    device: Device,
    recipe: RecognizerRecipe,
    data: DataRecipe,
    embed_options: EmbedOptions,
    dataset: Arc<dyn Dataset>,
    validation: Option<PairSet>,
    image_size: usize,
    /// `[3, S, S]`
    average_image: Tensor<3>,
    network: Recognizer,
    head: heads::Head,
    network_optimizer: Optimizer,
    head_optimizer: Optimizer,
    body_rests: bool,
    stuck: StuckDetector,
}

impl RecognizerStage {
    /// Stage 3 from a stage-2 export.
    ///
    /// # Errors
    /// An export of something else, or of an encoder with another body or image size than the recipe's.
    pub fn from_encoder(
        recipe: &Recipe,
        encoder: &Weights,
        pictures: Labelled,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let config: BackboneEncoderConfig = encoder.config(BackboneEncoder::KIND)?;
        let (expected, found) = (backbone_config(recipe), &config.backbone);
        if (found, config.image_size) != (&expected, recipe.backbone.image_size) {
            let describe = |backbone: &BackboneConfig, size| {
                let BackboneConfig {
                    depth,
                    in_channels,
                    width,
                    ..
                } = backbone;
                format!(
                    "depth {}, width {width}, {in_channels} channels, pictures of {size}",
                    u32::from(*depth)
                )
            };
            return Err(TrainError::Invalid(format!(
                "cannot start from encoder {}: it has {}, the recipe's [backbone] has {}\n\
                 hint: train both with one recipe",
                encoder.origin(),
                describe(found, config.image_size),
                describe(&expected, recipe.backbone.image_size),
            )));
        }
        let average_image = encoder.tensor::<3>(AVERAGE_IMAGE, device)?;
        let mut stage = Self::new(
            StageName::Recognizer,
            recipe,
            recipe.recognizer.clone(),
            pictures,
            average_image,
            device,
        )?;
        stage.network = if recipe.recognizer.dropout > 0.0 {
            stage.network.load_encoder(&renumbered_for_dropout(encoder))?
        } else {
            stage.network.load_encoder(encoder)?
        };
        Ok(stage)
    }

    /// The twin: the same network from random weights, by the recipe's `[scratch]`.
    ///
    /// # Errors
    /// Pictures that cannot be read.
    pub fn from_scratch(recipe: &Recipe, pictures: Labelled, device: &Device) -> Result<Self, TrainError> {
        let seed = schedule::seed(recipe.seed, "average image");
        let average = mean_picture(&pictures.train, recipe.backbone.image_size, seed)?;
        let size = recipe.backbone.image_size;
        let average = Tensor::from_data(TensorData::new(average, [3, size, size]), device);
        Self::new(
            StageName::Scratch,
            recipe,
            recipe.scratch_recognizer(),
            pictures,
            average,
            device,
        )
    }

    fn new(
        name: StageName,
        recipe: &Recipe,
        settings: RecognizerRecipe,
        pictures: Labelled,
        average_image: Tensor<3>,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let device = device.clone().autodiff();
        let config = RecognizerConfig {
            backbone: BackboneConfig {
                dropout: settings.dropout,
                ..backbone_config(recipe)
            },
            image_size: recipe.backbone.image_size,
            embedding_dim: settings.embedding_dim,
            output_dropout: settings.output_dropout,
        };
        let num_classes = pictures.train.num_classes();
        if num_classes < 2 {
            return Err(TrainError::Invalid(format!(
                "the training set has {num_classes} identities, a recogniser needs at least two"
            )));
        }
        let kind = match settings.head {
            Head::Arcface { .. } => HeadKind::ArcFace,
            Head::Cosface { .. } => HeadKind::CosFace,
            Head::Softmax {} => HeadKind::Softmax,
        };
        let head = HeadConfig {
            kind,
            num_classes,
            embedding_dim: settings.embedding_dim,
        };
        let init = |part: &str| Init::new(schedule::seed(recipe.seed, part), &device);
        let optimizer = || Optimizer::sgd(settings.momentum, settings.weight_decay, all_but_batch_norm);
        Ok(Self {
            name,
            seed: recipe.seed,
            activations: recipe.activations.into(),
            data: recipe.data.clone(),
            embed_options: EmbedOptions::from(&recipe.eval),
            dataset: pictures.train,
            validation: pictures.validation,
            image_size: config.image_size,
            average_image: average_image.without_autodiff(),
            network: config.init(&mut init("recognizer, network")),
            head: head.init(&mut init("recognizer, head")),
            network_optimizer: optimizer(),
            head_optimizer: optimizer(),
            body_rests: false,
            stuck: StuckDetector::new(settings.stuck_after_steps, num_classes),
            recipe: settings,
            device,
        })
    }

    /// The present network, for embedding.
    pub fn recognizer(&self) -> FaceRecognizer {
        FaceRecognizer::new(&self.network, Some(self.average_image.clone()))
    }

    /// Scale and margin before a step.
    fn margin(&self, clock: &Clock) -> Margin {
        let ramp = ramp(clock, self.recipe.margin_ramp_images);
        match self.recipe.head {
            Head::Arcface { scale, margin } | Head::Cosface { scale, margin } => Margin {
                scale: scale as f32,
                margin: (margin * ramp) as f32,
            },
            Head::Softmax {} => Margin {
                scale: 1.0,
                margin: 0.0,
            },
        }
    }

    fn learning_rate(&self, clock: &Clock) -> f64 {
        let RecognizerRecipe {
            learning_rate,
            schedule,
            warmup_images,
            ..
        } = &self.recipe;
        learning_rate * schedule.factor(clock) * ramp(clock, *warmup_images)
    }
}

impl Stage for RecognizerStage {
    fn name(&self) -> StageName {
        self.name
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
            transform: Transform::augment(self.image_size),
            // The twin sees the same pictures in the same order.
            config: loader_config(&self.data, &self.recipe.budget, self.seed, StageName::Recognizer),
        })
    }

    fn step(&mut self, mut batch: Batch, clock: &Clock) -> Result<Report, TrainError> {
        let rests = clock.epoch < self.recipe.freeze_epochs;
        if rests != self.body_rests {
            self.network.body = set_trainable(std::mem::take(&mut self.network.body), !rests);
            self.body_rests = rests;
        }
        // A resting body changes in its statistics only, so the old one is the one without the batch's.
        let body_before = (rests && !self.recipe.frozen_statistics_update).then(|| self.network.body.clone());

        let labels: Vec<i64> = batch.labels.iter().map(|&label| i64::from(label)).collect();
        let n = labels.len();
        let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [n]), &self.device); // [N]
        let x = images(&mut batch, &self.device); // [N, 3, S, S]
        let x = beside_average(x, self.average_image.clone()); // [N, 6, S, S]
        let embeddings = self.network.forward(x, Mode::Train); // [N, D]
        let margin = self.margin(clock);
        let (cross_entropy, above) = self
            .head
            .cross_entropy(embeddings.clone(), labels.clone(), margin); // [1]
        let loss = match self.recipe.loss {
            ClassificationLoss::Focal => losses::focal(cross_entropy, FOCAL_GAMMA),
            ClassificationLoss::CrossEntropy => cross_entropy,
        }; // [1]
        let mut gradients = loss.backward();

        let rate = self.learning_rate(clock);
        self.network = self
            .network_optimizer
            .step(self.network.clone(), &mut gradients, rate);
        self.head = self.head_optimizer.step(self.head.clone(), &mut gradients, rate);
        if let Some(body) = body_before {
            self.network.body = body;
        }

        let (top1, top5) = (top_share(&above, 1), top_share(&above, 5));
        let cosine = self.target_cosine(embeddings.without_autodiff(), labels);
        let loss = f64::from(loss.into_scalar::<f32>());
        let warnings = self.stuck.add(loss, cosine).into_iter().collect();
        let values = vec![
            ("top1", top1),
            ("top5", top5),
            ("target_cosine", cosine),
            ("learning_rate", rate),
            ("margin", f64::from(margin.margin)),
        ];
        Ok(Report {
            loss,
            values,
            warnings,
        })
    }

    fn evaluate(&self, _clock: &Clock) -> Result<Evaluation, TrainError> {
        let Some(pairs) = &self.validation else {
            return Ok(Evaluation::default());
        };
        // Only the value is wanted here, not its interval.
        let protocol = Protocol {
            bootstrap: Bootstrap {
                draws: 1,
                ..Bootstrap::default()
            },
            ..Protocol::default()
        };
        let scored = pairs.score(&self.recognizer(), self.embed_options, &protocol)?;
        let accuracy = scored.result().accuracy.value;
        let values = vec![
            ("accuracy".to_owned(), accuracy),
            ("auc".to_owned(), scored.result().auc.value),
        ];
        Ok(Evaluation {
            score: Some(accuracy),
            values,
            pictures: Vec::new(),
        })
    }

    fn state(&self) -> Weights {
        let mut state = Weights::from_module(&self.network, NETWORK);
        state.extend(Weights::from_module(&self.head, HEAD));
        state.extend(self.network_optimizer.state(NETWORK_OPTIMIZER));
        state.extend(self.head_optimizer.state(HEAD_OPTIMIZER));
        state.insert_tensor(AVERAGE_IMAGE, self.average_image.clone());
        let stuck = &self.stuck.recent;
        let recent: Vec<f32> = stuck.iter().flatten().copied().collect();
        state.insert(STUCK, TensorData::new(recent, [stuck.len(), 2]));
        state
    }

    fn load_state(&mut self, state: &Weights) -> Result<(), TrainError> {
        self.network = state.load_into(self.network.clone(), NETWORK)?;
        self.head = state.load_into(self.head.clone(), HEAD)?;
        self.network_optimizer
            .load_state(state, NETWORK_OPTIMIZER, &self.device)?;
        self.head_optimizer
            .load_state(state, HEAD_OPTIMIZER, &self.device)?;
        self.average_image = state.tensor::<3>(AVERAGE_IMAGE, &self.device)?.without_autodiff();
        let recent = state
            .get(STUCK)
            .and_then(|data| data.as_slice::<f32>().ok())
            .unwrap_or_default();
        self.stuck.recent = recent.as_chunks::<2>().0.to_vec();
        Ok(())
    }

    fn export(&self) -> Result<Vec<(String, Weights)>, TrainError> {
        Ok(vec![(
            EXPORT.to_owned(),
            self.network.to_weights(Some(self.average_image.clone())),
        )])
    }
}

const NETWORK: &str = "network.";
const HEAD: &str = "head.";
const NETWORK_OPTIMIZER: &str = "optimizer.network.";
const HEAD_OPTIMIZER: &str = "optimizer.head.";
const STUCK: &str = "stuck";

impl RecognizerStage {
    /// Mean cosine between embeddings and the directions of their classes.
    fn target_cosine(&self, embeddings: Tensor<2>, labels: Tensor<1, Int>) -> f64 {
        let directions = match &self.head {
            heads::Head::ArcFace(head) => &head.weight,
            heads::Head::CosFace(head) => &head.weight,
            heads::Head::Softmax(head) => &head.weight,
        };
        let directions = directions.val().without_autodiff().select(0, labels); // [N, D]
        let cosines = (heads::normalize(embeddings) * heads::normalize(directions)).sum_dim(1); // [N, 1]
        f64::from(cosines.mean().into_scalar::<f32>())
    }
}

/// The share of the pictures whose target is among the `k` highest logits, from the number of logits `above` it.
fn top_share(above: &[u32], k: u32) -> f64 {
    above.iter().filter(|&&above| above < k).count() as f64 / above.len().max(1) as f64
}

/// The mean of some pictures of a set, as `[3, size, size]` in [-1, 1]; unreadable ones are left out.
fn mean_picture(dataset: &Arc<dyn Dataset>, size: usize, seed: u64) -> Result<Vec<f32>, TrainError> {
    let sample = Subset::sample(Arc::clone(dataset), AVERAGED_PICTURES, seed);
    let (mut sum, mut one) = (vec![0.0f64; 3 * size * size], vec![0.0; 3 * size * size]);
    let (mut count, mut last_error) = (0, None);
    for index in 0..sample.len() {
        match sample.read(index) {
            Ok(picture) => {
                Transform::center_crop(size).apply(&picture, &mut schedule::rng(0, "unused", 0), &mut one);
                sum.iter_mut()
                    .zip(&one)
                    .for_each(|(sum, x)| *sum += f64::from(*x));
                count += 1;
            }
            Err(error) => last_error = Some(error),
        }
    }
    match (count, last_error) {
        (0, Some(error)) => Err(error.into()),
        _ => Ok(sum
            .into_iter()
            .map(|sum| (sum / f64::from(count.max(1))) as f32)
            .collect()),
    }
}

/// Dropout layers stand in the numbering of a unit's layers: the names that a network with dropout gives to the
/// layers of one without.
fn renumbered_for_dropout(encoder: &Weights) -> Weights {
    let mut renumbered = Weights::new();
    for name in encoder.names() {
        let mut parts: Vec<String> = name.split('.').map(str::to_owned).collect();
        for at in 1..parts.len() {
            let shifted = match (parts[at - 1].as_str(), parts[at].as_str()) {
                ("res_layer", "2") => "3",
                ("res_layer", "3") => "4",
                ("res_layer", "4") => "6",
                ("res_layer", "5") => "7",
                ("shortcut_layer", "1") => "2",
                _ => continue,
            };
            parts[at] = shifted.to_owned();
        }
        if let Some(data) = encoder.get(name) {
            renumbered.insert(&parts.join("."), data.clone());
        }
    }
    renumbered
}

/// Notices a run that does not learn: over a window of steps the loss is flat, no better than guessing, and the
/// embeddings do not turn to their classes. From scratch under a full margin this happens (the reference sticks at a
/// loss of about 20).
#[derive(Clone, Debug)]
struct StuckDetector {
    window: usize,
    chance: f64,
    /// Loss and target cosine of the last steps.
    recent: Vec<[f32; 2]>,
}

impl StuckDetector {
    fn new(window: usize, num_classes: usize) -> Self {
        Self {
            window,
            chance: (num_classes as f64).ln(),
            recent: Vec::new(),
        }
    }

    /// The warning, once in each window.
    fn add(&mut self, loss: f64, cosine: f64) -> Option<String> {
        if self.window == 0 {
            return None;
        }
        self.recent.push([loss as f32, cosine as f32]);
        if self.recent.len() < self.window {
            return None;
        }
        let recent = std::mem::take(&mut self.recent);
        let mean = |steps: &[[f32; 2]], at: usize| {
            steps.iter().map(|step| f64::from(step[at])).sum::<f64>() / steps.len().max(1) as f64
        };
        let (first, second) = recent.split_at(recent.len() / 2);
        let (before, after) = (mean(first, 0), mean(second, 0));
        let cosine = mean(&recent, 1);
        let is_stuck = after > 0.9 * self.chance && (before - after).abs() < 0.02 * before && cosine < 0.1;
        is_stuck.then(|| {
            format!(
                "the run seems stuck: over {} steps the loss stayed at {after:.2} and the embeddings' cosine to their \
                 classes at {cosine:.3}\n\
                 hint: start again with warmup_images and margin_ramp_images, or with a lower learning_rate",
                self.window
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_high_loss_is_reported_once_a_window() {
        let mut detector = StuckDetector::new(10, 100);
        let warnings: Vec<bool> = (0..25).map(|_| detector.add(20.0, 0.01).is_some()).collect();
        assert_eq!(warnings.iter().filter(|&&warned| warned).count(), 2);
        assert!(warnings[9] && warnings[19]);
        for (name, loss, cosine) in [
            (
                "falling",
                (|step: usize| 20.0 - 0.5 * step as f64) as fn(usize) -> f64,
                0.01,
            ),
            ("turned", |_| 20.0, 0.4),
            ("better than guessing", |_| 1.0, 0.01),
        ] {
            let mut detector = StuckDetector::new(10, 100);
            assert!(
                (0..30).all(|step| detector.add(loss(step), cosine).is_none()),
                "{name}"
            );
        }
        let mut off = StuckDetector::new(0, 100);
        assert!((0..99).all(|_| off.add(20.0, 0.0).is_none()));
    }

    #[test]
    fn shares_count_the_classes_above_the_target() {
        let above = [0, 5, 1];
        assert!((top_share(&above, 1) - 1.0 / 3.0).abs() < 1e-9);
        assert!((top_share(&above, 5) - 2.0 / 3.0).abs() < 1e-9);
    }
}
