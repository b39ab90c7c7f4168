//! Recipes: typed TOML files that say everything about a run, from pictures to report.
//!
//! One file describes the whole path, so that the stages cannot disagree: `[data]` (unlabelled, labelled and test
//! pictures), `[backbone]` (the body that encoder and recogniser share), `[prior]`, `[encoder]`, `[recognizer]`,
//! `[scratch]` (what the from-scratch twin does differently), `[eval]`, and the seed. Every field is written out
//! but the extras that are off by default; an unknown key is an error.
//!
//! ```
//! use faceprior_train::recipe::Recipe;
//!
//! let recipe = Recipe::load("demo", &["seed=7".to_owned()])?;
//! assert_eq!(recipe.seed, 7);
//! # Ok::<(), faceprior_train::recipe::RecipeError>(())
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use faceprior_eval::Flip;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// The recipes that come with the program: name and text.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("demo", include_str!("../../../recipes/demo.toml")),
    ("small", include_str!("../../../recipes/small.toml")),
    ("paper", include_str!("../../../recipes/paper.toml")),
];

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
            Self::Prior => &["seed", "data.prior", "prior"],
            Self::Encoder => &["seed", "data.prior", "backbone", "encoder"],
            Self::Recognizer => &[
                "seed",
                "data.labels",
                "data.validation_",
                "backbone",
                "recognizer",
                "eval",
            ],
            Self::Scratch => &[
                "seed",
                "data.labels",
                "data.validation_",
                "backbone",
                "recognizer",
                "scratch",
                "eval",
            ],
        }
    }
}

impl fmt::Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is wrong with a recipe, where, and how to mend it.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {problem}{}", hint.as_ref().map(|hint| format!("\nhint: {hint}")).unwrap_or_default())]
pub struct RecipeError {
    /// The file, or the built-in recipe's name.
    pub origin: String,
    /// What was found and what was expected.
    pub problem: String,
    /// The cure, where there is one.
    pub hint: Option<String>,
}

impl Recipe {
    /// Reads a recipe file, or a built-in recipe by its name, and applies `key=value` changes in order.
    ///
    /// A value is TOML (`3`, `true`, `[1, 2]`, `{ kind = "constant" }`); what is not TOML is taken as a string.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML, an unknown recipe or key, a value of the wrong kind or out of
    /// range. Each names the file and the key.
    pub fn load(recipe: impl AsRef<Path>, changes: &[String]) -> Result<Self, RecipeError> {
        let path = recipe.as_ref();
        let name = path.to_string_lossy();
        if let Some((name, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::from_toml(text, &format!("built-in recipe {name:?}"), changes);
        }
        let text = std::fs::read_to_string(path).map_err(|error| {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            RecipeError {
                origin: format!("{path:?}"),
                problem: format!("cannot read the recipe: {error}"),
                hint: Some(match nearest(&name, &names) {
                    Some(near) => format!("did you mean the built-in recipe {near:?}?"),
                    None => format!(
                        "give a file, or one of the built-in recipes: {}",
                        names.join(", ")
                    ),
                }),
            }
        })?;
        Self::from_toml(&text, &format!("{path:?}"), changes)
    }

    /// Reads a recipe from text; `origin` names it in errors. See [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load), without the file's.
    pub fn from_toml(text: &str, origin: &str, changes: &[String]) -> Result<Self, RecipeError> {
        let fail = |problem: String, hint: Option<String>| RecipeError {
            origin: origin.to_owned(),
            problem,
            hint,
        };
        let mut table: Table =
            toml::from_str(text).map_err(|error| fail(error.to_string().trim_end().to_owned(), None))?;
        for change in changes {
            set(&mut table, change).map_err(|problem| fail(problem, None))?;
        }
        match table.get("schema").and_then(Value::as_integer) {
            Some(schema) if schema == i64::from(SCHEMA) => {}
            Some(schema) => {
                return Err(fail(
                    format!("schema is {schema}, expected {SCHEMA}"),
                    Some("the recipe was written for another version of the program".to_owned()),
                ));
            }
            None => {
                return Err(fail(
                    "no schema".to_owned(),
                    Some(format!("begin with `schema = {SCHEMA}`")),
                ));
            }
        }
        let recipe = Self::deserialize(table).map_err(|error| {
            let (problem, hint) = explain(&error);
            fail(problem, hint)
        })?;
        recipe.check().map_err(|problem| fail(problem, None))?;
        Ok(recipe)
    }

    /// The recipe with every field written out, as a run directory keeps it. [`from_toml`](Self::from_toml) reads
    /// it back to the same recipe.
    pub fn resolved(&self) -> String {
        toml::to_string(self).expect("a recipe holds only what TOML can say")
    }

    /// BLAKE3 of the resolved text, in hexadecimal: equal for two files that mean the same.
    pub fn hash(&self) -> String {
        blake3::hash(self.resolved().as_bytes()).to_hex().to_string()
    }

    /// What the twin of stage 3 trains by: the recogniser's settings with `[scratch]` in place of its own.
    pub fn scratch_recognizer(&self) -> RecognizerRecipe {
        RecognizerRecipe {
            learning_rate: self.scratch.learning_rate,
            warmup_images: self.scratch.warmup_images,
            margin_ramp_images: self.scratch.margin_ramp_images,
            freeze_epochs: self.scratch.freeze_epochs,
            ..self.recognizer.clone()
        }
    }

    /// Fields in which two recipes differ, as (dotted key, value here, value there).
    pub fn differences(&self, other: &Self) -> Vec<(String, String, String)> {
        let (here, there) = (self.fields(), other.fields());
        let absent = || "absent".to_owned();
        let keys: std::collections::BTreeSet<&String> = here.keys().chain(there.keys()).collect();
        keys.into_iter()
            .filter(|key| here.get(*key) != there.get(*key))
            .map(|key| {
                let value =
                    |fields: &BTreeMap<String, String>| fields.get(key).cloned().unwrap_or_else(absent);
                (key.clone(), value(&here), value(&there))
            })
            .collect()
    }

    /// The [`differences`](Self::differences) that a run of `stage` would feel.
    pub fn differences_for(&self, other: &Self, stage: StageName) -> Vec<(String, String, String)> {
        let felt = |key: &str| {
            stage.keys().iter().any(|prefix| {
                key.strip_prefix(prefix)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || prefix.ends_with('_'))
            })
        };
        self.differences(other)
            .into_iter()
            .filter(|(key, ..)| felt(key))
            .collect()
    }

    fn fields(&self) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        let table = Table::try_from(self).expect("a recipe holds only what TOML can say");
        flatten(&mut fields, String::new(), &Value::Table(table));
        fields
    }

    /// Ranges that the types do not express; each message begins with the key.
    fn check(&self) -> Result<(), String> {
        let depths = [18, 34, 50, 100, 152];
        require(
            depths.contains(&self.backbone.depth),
            "backbone.depth",
            self.backbone.depth,
            "18, 34, 50, 100 or 152",
        )?;
        positive("backbone.width", self.backbone.width)?;
        require(
            self.backbone.width.is_multiple_of(16),
            "backbone.width",
            self.backbone.width,
            "a multiple of 16 (squeeze-and-excitation divides by 16)",
        )?;
        let size = self.backbone.image_size;
        require(
            size >= 32 && size.is_multiple_of(16),
            "backbone.image_size",
            size,
            "a multiple of 16, at least 32",
        )?;
        let resolution = self.prior.resolution;
        require(
            resolution.is_power_of_two() && (32..=256).contains(&resolution),
            "prior.resolution",
            resolution,
            "32, 64, 128 or 256",
        )?;
        for (key, value) in [
            ("prior.latent_dim", self.prior.latent_dim),
            ("prior.mapping_layers", self.prior.mapping_layers),
            ("prior.channel_max", self.prior.channel_max),
            ("prior.latent_avg_samples", self.prior.latent_avg_samples),
            ("encoder.iterations_per_batch", self.encoder.iterations_per_batch),
            ("recognizer.embedding_dim", self.recognizer.embedding_dim),
            ("eval.batch_size", self.eval.batch_size),
            ("eval.bootstrap_draws", self.eval.bootstrap_draws),
            ("data.workers", self.data.workers),
            ("data.queue", self.data.queue),
        ] {
            positive(key, value)?;
        }
        let base = self.prior.channel_base;
        require(
            base >= resolution,
            "prior.channel_base",
            base,
            &format!("at least prior.resolution, {resolution}"),
        )?;
        for (key, value) in [
            ("prior.style_mixing", self.prior.style_mixing),
            ("prior.ema_decay", self.prior.ema_decay),
            ("prior.betas[0]", self.prior.betas[0]),
            ("prior.betas[1]", self.prior.betas[1]),
            ("recognizer.momentum", self.recognizer.momentum),
        ] {
            require((0.0..=1.0).contains(&value), key, value, "a number from 0 to 1")?;
        }
        for (key, value) in [
            ("recognizer.dropout", self.recognizer.dropout),
            ("recognizer.output_dropout", self.recognizer.output_dropout),
        ] {
            require(
                (0.0..1.0).contains(&value),
                key,
                value,
                "a number from 0 up to but not 1",
            )?;
        }
        for (key, value) in [
            ("prior.learning_rate_g", self.prior.learning_rate_g),
            ("prior.learning_rate_d", self.prior.learning_rate_d),
            ("prior.path_length.weight", self.prior.path_length.weight),
            ("prior.r1.weight", self.prior.r1.weight),
            ("encoder.learning_rate", self.encoder.learning_rate),
            ("encoder.mse_weight", self.encoder.mse_weight),
            ("encoder.perceptual_weight", self.encoder.perceptual_weight),
            ("encoder.w_norm_weight", self.encoder.w_norm_weight),
            ("recognizer.learning_rate", self.recognizer.learning_rate),
            ("recognizer.weight_decay", self.recognizer.weight_decay),
            ("scratch.learning_rate", self.scratch.learning_rate),
        ] {
            require(
                value.is_finite() && value >= 0.0,
                key,
                value,
                "a number of at least 0",
            )?;
        }
        if let LabelledData::Identities { fraction, .. } = self.data.labels {
            require(
                fraction > 0.0 && fraction <= 1.0,
                "data.labels.fraction",
                fraction,
                "a number in (0, 1]",
            )?;
        }
        if let Schedule::Step { divide_by, .. } = self.recognizer.schedule {
            require(
                divide_by > 0.0,
                "recognizer.schedule.divide_by",
                divide_by,
                "more than 0",
            )?;
        }
        let validation = self.data.validation_identities;
        require(
            validation != 1,
            "data.validation_identities",
            validation,
            "0, or at least 2 to make pairs of",
        )?;
        for (section, budget) in [
            ("prior", &self.prior.budget),
            ("encoder", &self.encoder.budget),
            ("recognizer", &self.recognizer.budget),
        ] {
            let key = |field: &str| format!("{section}.budget.{field}");
            positive(&key("batch_size"), budget.batch_size)?;
            for (field, value) in [
                ("images", budget.images),
                ("record_every", budget.record_every),
                ("evaluate_every", budget.evaluate_every),
                ("checkpoint_every", budget.checkpoint_every),
                ("keep", budget.keep as u64),
            ] {
                require(value > 0, &key(field), value, "at least 1")?;
            }
        }
        Ok(())
    }
}

fn require(holds: bool, key: &str, got: impl fmt::Display, expected: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("{key} is {got}, expected {expected}"))
    }
}

fn positive(key: &str, value: usize) -> Result<(), String> {
    require(value > 0, key, value, "at least 1")
}

/// Applies one `key=value` to the tree.
fn set(table: &mut Table, change: &str) -> Result<(), String> {
    let malformed =
        || format!("cannot apply {change:?}, expected key=value such as prior.budget.images=20000");
    let (key, text) = change.split_once('=').ok_or_else(malformed)?;
    let mut parts: Vec<&str> = key.split('.').map(str::trim).collect();
    let last = parts
        .pop()
        .filter(|last| !last.is_empty())
        .ok_or_else(malformed)?;
    let mut here = table;
    for part in parts {
        here = here
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| format!("cannot apply {change:?}: {part} is a value, expected a table"))?;
    }
    let value = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    here.insert(last.to_owned(), value);
    Ok(())
}

/// Turns the parser's message about an unknown key into one with the full key and its nearest neighbour.
fn explain(error: &toml::de::Error) -> (String, Option<String>) {
    let text = error.to_string();
    let section = text
        .lines()
        .find_map(|line| line.strip_prefix("in `"))
        .and_then(|rest| rest.strip_suffix('`'));
    let message = error.message();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let full = |key: &str| section.map_or_else(|| key.to_owned(), |section| format!("{section}.{key}"));
    match (
        message.starts_with("unknown field"),
        message.starts_with("missing field"),
        quoted.split_first(),
    ) {
        (true, _, Some((unknown, known))) => {
            let hint = match nearest(unknown, known) {
                Some(near) => format!("did you mean {:?}?", full(near)),
                None => format!("the keys there are {}", known.join(", ")),
            };
            (format!("unknown key {:?}", full(unknown)), Some(hint))
        }
        (_, true, Some((missing, _))) => (format!("missing key {:?}", full(missing)), None),
        _ => (
            section.map_or_else(|| message.to_owned(), |section| format!("{section}: {message}")),
            None,
        ),
    }
}

/// The candidate that is at most a third of its letters away.
fn nearest<'a>(text: &str, candidates: &[&'a str]) -> Option<&'a str> {
    candidates
        .iter()
        .map(|candidate| (edit_distance(text, candidate), *candidate))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, candidate)| *distance <= candidate.chars().count().div_ceil(3))
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions and replacements that turn `a` into `b` (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn flatten(fields: &mut BTreeMap<String, String>, key: String, value: &Value) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() {
                    name.clone()
                } else {
                    format!("{key}.{name}")
                };
                flatten(fields, key, value);
            }
        }
        value => {
            fields.insert(key, value.to_string());
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn demo(changes: &[&str]) -> Result<Recipe, RecipeError> {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        Recipe::load("demo", &changes)
    }

    #[test]
    fn built_in_recipes_are_valid_and_survive_resolution() {
        for (name, _) in BUILT_IN {
            let recipe = Recipe::load(name, &[]).unwrap_or_else(|error| panic!("{error}"));
            let again = Recipe::from_toml(&recipe.resolved(), name, &[]).unwrap();
            assert_eq!(recipe, again, "{name}");
            assert_eq!(recipe.hash(), again.hash(), "{name}");
        }
    }

    #[test]
    fn changes_reach_every_kind_of_value() {
        let recipe = demo(&[
            "prior.budget.images=123",
            "prior.r1.weight=2",
            "eval.flip=none",
            "recognizer.head={ kind = \"cosface\", scale = 32.0, margin = 0.2 }",
            "data.prior={source=\"folders\", paths=\"a dir/b\"}",
            "about=it's \"quoted\" = so",
        ]);
        // `prior.r1.weight=2` is an integer where a float is wanted: TOML's own distinction, forgiven.
        let recipe = recipe.unwrap();
        assert_eq!(recipe.prior.budget.images, 123);
        assert_eq!(recipe.prior.r1.weight, 2.0);
        assert_eq!(recipe.eval.flip, Flip::None);
        assert_eq!(
            recipe.recognizer.head,
            Head::Cosface {
                scale: 32.0,
                margin: 0.2
            }
        );
        assert_eq!(
            recipe.data.prior,
            PriorData::Folders {
                paths: vec!["a dir/b".into()]
            }
        );
        assert_eq!(recipe.about, "it's \"quoted\" = so");
        assert_ne!(recipe.hash(), demo(&[]).unwrap().hash());
    }

    #[test]
    fn an_unknown_key_names_file_key_and_neighbour() {
        let error = demo(&["prior.budget.imagse=1"]).unwrap_err().to_string();
        assert_eq!(
            error,
            "built-in recipe \"demo\": unknown key \"prior.budget.imagse\"\n\
             hint: did you mean \"prior.budget.images\"?"
        );
        let error = demo(&["qqqqqq=1"]).unwrap_err().to_string();
        assert!(
            error.contains("unknown key \"qqqqqq\"") && error.contains("backbone, prior, encoder"),
            "{error}"
        );
        let error = demo(&["recognizer.head.margni=1"]).unwrap_err().to_string();
        assert!(
            error.contains("\"recognizer.head.margni\"") && error.contains("head.margin\"?"),
            "{error}"
        );
    }

    #[test]
    fn values_out_of_range_name_their_key() {
        for (change, expected) in [
            (
                "backbone.image_size=100",
                "backbone.image_size is 100, expected a multiple of 16",
            ),
            (
                "backbone.depth=20",
                "backbone.depth is 20, expected 18, 34, 50, 100 or 152",
            ),
            (
                "prior.resolution=48",
                "prior.resolution is 48, expected 32, 64, 128 or 256",
            ),
            (
                "recognizer.budget.batch_size=0",
                "recognizer.budget.batch_size is 0, expected at least 1",
            ),
            (
                "recognizer.learning_rate=-1.0",
                "recognizer.learning_rate is -1, expected a number of at least 0",
            ),
            ("recognizer.learning_rate=nan", "recognizer.learning_rate is NaN"),
            ("schema=2", "schema is 2, expected 1"),
            (
                "seed.x=2",
                "cannot apply \"seed.x=2\": seed is a value, expected a table",
            ),
            ("seed", "expected key=value"),
            ("eval.flip=both", "eval.flip: unknown variant `both`"),
        ] {
            let error = demo(&[change]).unwrap_err().to_string();
            assert!(error.contains(expected), "{change}: {error}");
        }
    }

    #[test]
    fn a_missing_recipe_suggests_a_name() {
        let error = Recipe::load("smal", &[]).unwrap_err().to_string();
        assert!(
            error.contains("cannot read the recipe")
                && error.contains("did you mean")
                && error.contains("small")
        );
        let error = Recipe::load("nowhere/x.toml", &[]).unwrap_err().to_string();
        assert!(error.contains("demo, small, paper"), "{error}");
    }

    #[test]
    fn a_stage_feels_only_its_own_changes() {
        let (old, new) = (
            demo(&[]).unwrap(),
            demo(&["scratch.learning_rate=0.5", "data.workers=9"]).unwrap(),
        );
        assert_eq!(old.differences(&new).len(), 2);
        assert!(old.differences_for(&new, StageName::Recognizer).is_empty());
        let felt = old.differences_for(&new, StageName::Scratch);
        assert_eq!(felt.len(), 1);
        assert_eq!(
            (felt[0].0.as_str(), felt[0].2.as_str()),
            ("scratch.learning_rate", "0.5")
        );
        let held_out = demo(&["data.validation_pairs=7"]).unwrap();
        assert_eq!(old.differences_for(&held_out, StageName::Recognizer).len(), 1);
        assert!(old.differences_for(&held_out, StageName::Prior).is_empty());
    }

    #[test]
    fn the_twin_differs_only_where_it_says() {
        let recipe = demo(&["scratch.learning_rate=0.07"]).unwrap();
        let twin = recipe.scratch_recognizer();
        assert_eq!(twin.learning_rate, 0.07);
        assert_eq!(twin.budget, recipe.recognizer.budget);
        assert_eq!(twin.head, recipe.recognizer.head);
    }
}
