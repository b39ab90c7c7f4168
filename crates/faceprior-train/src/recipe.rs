//! Recipes: typed TOML files that say everything about a run, from pictures to report.
//!
//! One file describes the whole path, so that the stages cannot disagree: `[data]` (unlabelled, labelled and test
//! pictures), `[backbone]` (the body that encoder and recogniser share), `[prior]`, `[encoder]`, `[recognizer]`,
//! `[scratch]` (what the from-scratch twin does differently), `[eval]`, `[activations]` (their memory), and the seed. Every field is written out
//! but the extras that are off by default; an unknown key is an error.
//!
//! ```
//! use faceprior_train::recipe::Recipe;
//!
//! let recipe = Recipe::load("demo", &["seed=7".to_owned()])?;
//! assert_eq!(recipe.seed, 7);
//! # Ok::<(), faceprior_train::recipe::RecipeError>(())
//! ```

use std::fmt;
use std::path::PathBuf;

use faceprior_eval::Flip;
use faceprior_ops::Activations;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};

mod check;
mod load;

pub use load::{BUILT_IN, RecipeError};

/// The format of recipe files that this version reads.
pub const SCHEMA: u32 = 1;

/// Everything about a run; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Format of the file, [`SCHEMA`].
    pub schema: u32,
    /// One line that says what the recipe is for.
    pub about: String,
    /// Where every random draw starts from.
    pub seed: u64,
    /// The pictures.
    pub data: DataRecipe,
    /// The body that encoder and recogniser share.
    pub backbone: BackboneRecipe,
    /// Stage 1.
    pub prior: PriorRecipe,
    /// Stage 2.
    pub encoder: EncoderRecipe,
    /// Stage 3.
    pub recognizer: RecognizerRecipe,
    /// The twin of stage 3 that starts from random weights.
    pub scratch: ScratchRecipe,
    /// How recognisers are scored.
    pub eval: EvalRecipe,
    /// How activations wait for the backward pass.
    #[serde(default)]
    pub activations: ActivationsRecipe,
}

/// `[activations]`: how activations wait for the backward pass, in all stages; for the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivationsRecipe {
    /// The format in which they are stored. Arithmetic, weights, statistics and losses are f32 in any case.
    pub precision: Precision,
    /// Computes the outputs of most convolutions again instead of storing them.
    pub recompute: bool,
}

/// A format of stored activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Four bytes a value.
    #[default]
    F32,
    /// bfloat16: two bytes a value, eight bits of precision.
    Bf16,
}

impl From<ActivationsRecipe> for Activations {
    fn from(recipe: ActivationsRecipe) -> Self {
        Self {
            bf16: recipe.precision == Precision::Bf16,
            recompute: recipe.recompute,
        }
    }
}

/// `[data]`: the pictures of each stage and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// Threads that decode and augment.
    pub workers: usize,
    /// Batches that wait ready for the step.
    pub queue: usize,
    /// A run fails when more pictures than this cannot be read; up to it they are skipped and counted.
    #[serde(default)]
    pub max_unreadable: usize,
    /// Identities of the labelled set that are kept out of training, to choose the best checkpoint on; 0 = none,
    /// and the last checkpoint is the result.
    #[serde(default)]
    pub validation_identities: usize,
    /// Pairs of pictures of those identities, half of them of the same person.
    #[serde(default)]
    pub validation_pairs: usize,
    /// Unlabelled faces for stages 1 and 2.
    pub prior: PriorData,
    /// Labelled faces for stage 3.
    pub labels: LabelledData,
    /// Pairs for the final score.
    pub test: TestData,
}

/// `[data.prior]`: unlabelled faces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case", deny_unknown_fields)]
pub enum PriorData {
    /// Every picture in these folders and below.
    Folders {
        /// One folder or several.
        #[serde(deserialize_with = "one_or_more")]
        paths: Vec<PathBuf>,
    },
    /// A text file with one path a line.
    List {
        /// The text file.
        path: PathBuf,
    },
    /// Rendered faces.
    Synthetic {
        /// How many people.
        identities: usize,
        /// Pictures of each.
        pictures: usize,
    },
}

/// `[data.labels]`: faces of known people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case", deny_unknown_fields)]
pub enum LabelledData {
    /// A folder that has one folder for each identity.
    Identities {
        /// The folder of folders.
        path: PathBuf,
        /// Share of the identities to use, in (0, 1]; which ones follows from the seed.
        fraction: f64,
    },
    /// Rendered faces of people who are not in the prior's set.
    Synthetic {
        /// How many people.
        identities: usize,
        /// Pictures of each.
        pictures: usize,
    },
}

/// `[data.test]`: pairs of pictures, of the same person or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case", deny_unknown_fields)]
pub enum TestData {
    /// LFW's layout.
    Pairs {
        /// Folder of aligned pictures, `<name>/<name>_0001.jpg`.
        path: PathBuf,
        /// LFW's `pairs.txt`.
        pairs: PathBuf,
    },
    /// Rendered faces of people seen nowhere else.
    Synthetic {
        /// How many people.
        identities: usize,
        /// Pictures of each.
        pictures: usize,
        /// Pairs drawn, half of them of the same person.
        pairs: usize,
    },
}

/// `[backbone]`: the IR-SE body, the same for encoder and recogniser, since the one starts from the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneRecipe {
    /// 18, 34, 50, 100 or 152.
    pub depth: usize,
    /// Channels of the first stage; the others have 2, 4 and 8 times as many. 64 is the published network.
    pub width: usize,
    /// Height and width of the pictures it sees; a multiple of 16.
    pub image_size: usize,
}

/// `budget`: how long a stage runs and what it does on the way. All intervals are in images seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Images that the stage sees, counted with repetition.
    pub images: u64,
    /// Images a step.
    pub batch_size: usize,
    /// Images between two records of `log.jsonl`; each holds the mean over the steps since the last.
    pub record_every: u64,
    /// Images between two evaluations, with samples; there is always one at the end.
    pub evaluate_every: u64,
    /// Images between two checkpoints; there is always one at the end.
    pub checkpoint_every: u64,
    /// Checkpoints to keep, besides the best.
    pub keep: usize,
}

/// A penalty that runs on every `every`-th step only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LazyPenalty {
    /// What the penalty is multiplied with when it runs: its strength times the interval that makes up for the
    /// steps left out. Published: path length 2·4, R1 4·16.
    pub weight: f64,
    /// Steps from one to the next; 0 = never.
    pub every: u64,
}

/// `[prior]`: stage 1, StyleGAN2 (`spec` names: G generator, D discriminator).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorRecipe {
    /// Height and width of the pictures: 32, 64, 128 or 256.
    pub resolution: usize,
    /// Length of z and w.
    pub latent_dim: usize,
    /// Layers of the mapping network.
    pub mapping_layers: usize,
    /// Channels at resolution r are min(channel_base / r, channel_max).
    pub channel_base: usize,
    /// See `channel_base`.
    pub channel_max: usize,
    /// Adam's rate for G.
    pub learning_rate_g: f64,
    /// Adam's rate for D.
    pub learning_rate_d: f64,
    /// Adam's β₁ and β₂, for both.
    pub betas: [f64; 2],
    /// Probability that a batch mixes two codes.
    pub style_mixing: f64,
    /// Share of the old average that each step of the averaged generator keeps.
    pub ema_decay: f64,
    /// Codes that `latent_avg` is the mean of.
    pub latent_avg_samples: usize,
    /// Pictures in a sample grid.
    pub samples: usize,
    /// Path length regularisation of G.
    pub path_length: LazyPenalty,
    /// R1 regularisation of D.
    pub r1: LazyPenalty,
    /// How long.
    pub budget: Budget,
}

/// `[encoder]`: stage 2, the inversion of the prior.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderRecipe {
    /// Which optimiser.
    pub optimizer: EncoderOptimizer,
    /// Its rate.
    pub learning_rate: f64,
    /// Refinements of a batch, each from the last one's codes and picture; 1 in the published runs.
    pub iterations_per_batch: usize,
    /// Weight of the mean squared error.
    pub mse_weight: f64,
    /// Weight of the distance in the frozen discriminator's features.
    pub perceptual_weight: f64,
    /// Weight of the codes' distance from `latent_avg`.
    #[serde(default)]
    pub w_norm_weight: f64,
    /// Rows and columns `[top, bottom, left, right]` that are cut from the average image before it is resized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_image_crop: Option<[usize; 4]>,
    /// Pictures kept out of training, for the loss that chooses the best checkpoint.
    pub validation_images: usize,
    /// Pictures in a sheet of input and reconstructions.
    pub samples: usize,
    /// How long.
    pub budget: Budget,
}

/// Optimiser of stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EncoderOptimizer {
    /// Adam, betas (0.9, 0.999).
    Adam,
    /// RAdam with Lookahead and gradient centralisation, the published choice.
    Ranger,
}

/// `[recognizer]`: stage 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecognizerRecipe {
    /// Length of the embedding.
    pub embedding_dim: usize,
    /// Dropout after every convolution of the body, in [0, 1).
    #[serde(default)]
    pub dropout: f64,
    /// Dropout before the last linear layer, in [0, 1); 0.5 in the published network.
    pub output_dropout: f64,
    /// Classification loss.
    pub loss: ClassificationLoss,
    /// SGD's rate at its highest.
    pub learning_rate: f64,
    /// SGD's momentum.
    pub momentum: f64,
    /// Decay of all parameters but those of BatchNorm.
    pub weight_decay: f64,
    /// Images over which the rate rises from 0.
    #[serde(default)]
    pub warmup_images: u64,
    /// Images over which the head's margin rises from 0.
    #[serde(default)]
    pub margin_ramp_images: u64,
    /// Epochs for which the body stays as it came from the encoder, while input and output layer learn.
    pub freeze_epochs: u64,
    /// Whether the BatchNorm statistics of the frozen body follow the new data, as in the published runs.
    pub frozen_statistics_update: bool,
    /// Steps after which a flat, high loss is reported as stuck; 0 = never.
    #[serde(default)]
    pub stuck_after_steps: usize,
    /// Margin head.
    pub head: Head,
    /// Course of the rate.
    pub schedule: Schedule,
    /// How long.
    pub budget: Budget,
}

/// `[scratch]`: what the twin of stage 3 does differently. Budget, data, augmentation and network are the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScratchRecipe {
    /// Its own best rate.
    pub learning_rate: f64,
    /// Images over which the rate rises from 0.
    #[serde(default)]
    pub warmup_images: u64,
    /// Images over which the head's margin rises from 0.
    #[serde(default)]
    pub margin_ramp_images: u64,
    /// Epochs with the random body frozen: 0, but 4 in the published baseline.
    #[serde(default)]
    pub freeze_epochs: u64,
}

/// Classification loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassificationLoss {
    /// (1 − e^(−ce))²·ce on the batch mean ce of the cross-entropy.
    Focal,
    /// Mean cross-entropy.
    CrossEntropy,
}

/// Margin head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Head {
    /// cos(θ + margin), times scale.
    Arcface {
        /// s
        scale: f64,
        /// m, in radians
        margin: f64,
    },
    /// cos θ − margin, times scale.
    Cosface {
        /// s
        scale: f64,
        /// m
        margin: f64,
    },
    /// W·x + b.
    Softmax {},
}

/// Course of a learning rate; see [`Schedule::factor`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Always the same.
    Constant {},
    /// Divided at an epoch, and at intervals after it.
    Step {
        /// The first epoch (from 0) with a lower rate.
        first_epoch: u64,
        /// Epochs between further steps; 0 = no further one.
        every_epochs: u64,
        /// What the rate is divided by.
        divide_by: f64,
    },
    /// Half a cosine over the budget.
    Cosine {
        /// Where it ends, as a share of the rate.
        floor: f64,
    },
}

/// `[eval]`: how recognisers are scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalRecipe {
    /// How a picture and its mirror image become one embedding.
    pub flip: Flip,
    /// Resize to 128 and cut 112 from the centre (in proportion for other sizes); otherwise take the whole picture.
    pub center_crop: bool,
    /// Pictures embedded at once.
    pub batch_size: usize,
    /// Draws of the bootstrap over identities.
    pub bootstrap_draws: usize,
}

/// The kinds of run that a recipe describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageName {
    /// Stage 1.
    Prior,
    /// Stage 2.
    Encoder,
    /// Stage 3 from the encoder.
    Recognizer,
    /// Stage 3 from random weights.
    Scratch,
}

impl StageName {
    /// As in the recipe's section and the run's folder.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prior => "prior",
            Self::Encoder => "encoder",
            Self::Recognizer => "recognizer",
            Self::Scratch => "scratch",
        }
    }

    /// The parts of a recipe that a run of this stage follows from: a resumed run needs them unchanged.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Prior => &["seed", "data.prior", "prior", "activations"],
            Self::Encoder => &["seed", "data.prior", "backbone", "encoder", "activations"],
            Self::Recognizer => &[
                "seed",
                "data.labels",
                "data.validation_",
                "backbone",
                "recognizer",
                "eval",
                "activations",
            ],
            Self::Scratch => &[
                "seed",
                "data.labels",
                "data.validation_",
                "backbone",
                "recognizer",
                "scratch",
                "eval",
                "activations",
            ],
        }
    }
}

impl fmt::Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    struct OneOrMore;
    impl<'de> de::Visitor<'de> for OneOrMore {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a path or a list of paths")
        }

        fn visit_str<E: de::Error>(self, path: &str) -> Result<Self::Value, E> {
            Ok(vec![path.into()])
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut paths: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(path) = paths.next_element()? {
                all.push(path);
            }
            if all.is_empty() {
                Err(de::Error::invalid_length(0, &"at least one path"))
            } else {
                Ok(all)
            }
        }
    }
    deserializer.deserialize_any(OneOrMore)
}
