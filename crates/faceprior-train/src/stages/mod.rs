//! The three stages, each a state and a step.
//!
//! # How to write a stage
//!
//! A stage is a struct that holds its modules, its optimisers and whatever else changes while it trains, and
//! implements [`Stage`]. The [driver](crate::driver) does the rest: batches, clock, log, samples, checkpoints, signals,
//! divergence, progress, export. Rules that make a resumed run equal the uninterrupted one, bit by bit:
//!
//! 1. *Everything that changes is in [`Stage::state`]* and comes back in [`Stage::load_state`]: modules with their
//!    buffers ([`Weights::from_module`] under a prefix of its own, `g.`, `d.`, `ema.`, …), optimisers
//!    ([`Optimizer::state`](crate::optim::Optimizer::state)), running means and other scalars (a tensor `[1]`, or an
//!    `i64`). What is derived from the recipe or from input files is not.
//! 2. *No random state.* Draw from [`Clock::rng`] with a stream name for each purpose (`"z1"`, `"mixing"`), or
//!    [`Clock::fixed_rng`] for what should be the same at each evaluation. The driver seeds the device's own
//!    generator before each step and evaluation, so noise drawn by Burn is repeatable too.
//! 3. *[`Stage::evaluate`] takes `&self`*: it must leave the training as it was. Use `module.valid()` copies, which
//!    are off the gradient graph and whose buffers are their own.
//! 4. *No files, no printing.* Losses and numbers go into the [`Report`], pictures into the [`Evaluation`], results
//!    into [`Stage::export`]; the driver writes them, and adds recipe hash and provenance to exports. Describe each
//!    exported file (the networks' `to_weights` do) and put in what the next stage needs
//!    ([`LATENT_AVG`](faceprior_nets::encoder::LATENT_AVG), [`AVERAGE_IMAGE`](faceprior_nets::irse::AVERAGE_IMAGE)).
//! 5. *One loss decides.* [`Report::loss`] must become non-finite when the stage diverges; penalties that may be
//!    skipped when they are NaN must not be added to it.
//!
//! The constructor takes the [`Recipe`], the weights of the stage before it, the pictures
//! (`Arc<dyn Dataset>`, see [`sources`](crate::sources)), and a device, which it turns into `device.autodiff()`. Fresh weights come from
//! [`schedule::seed`]`(recipe.seed, "prior, generator")`. [`loader_config`] and
//! [`images`] are the two helpers that every stage uses.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use faceprior_data::{Batch, Dataset, Image, LoaderConfig, Transform};
use faceprior_nets::irse::{BackboneConfig, Depth};
use faceprior_nets::weights::Weights;

use faceprior_ops::Activations;

use crate::TrainError;
use crate::recipe::{Budget, DataRecipe, Recipe, StageName};
use crate::schedule::{self, Clock};

pub mod encoder;
mod evaluation;
pub mod prior;
pub mod recognizer;

/// One stage of training; see the [module](self) for how to write one.
pub trait Stage {
    /// Which stage.
    fn name(&self) -> StageName;

    /// Seed of the run.
    fn seed(&self) -> u64;

    /// The device that the stage computes on.
    fn device(&self) -> &Device;

    /// How activations wait for the backward pass: as they are, unless the recipe says otherwise.
    fn activations(&self) -> Activations {
        Activations::default()
    }

    /// How long to train and what to do on the way.
    fn budget(&self) -> &Budget;

    /// The pictures to train on and how they become batches.
    ///
    /// # Errors
    /// A set that cannot be used.
    fn feed(&self) -> Result<Feed, TrainError>;

    /// One step on one batch. `clock` stands before the step.
    ///
    /// # Errors
    /// What makes it pointless to go on. A loss that is not finite is not an error here: report it.
    fn step(&mut self, batch: Batch, clock: &Clock) -> Result<Report, TrainError>;

    /// Scores and shows the present state, without changing it. `clock` stands after the last step.
    ///
    /// # Errors
    /// Pictures that cannot be read, and the like.
    fn evaluate(&self, clock: &Clock) -> Result<Evaluation, TrainError>;

    /// Every number that changes in training, by name.
    fn state(&self) -> Weights;

    /// Puts back what [`state`](Self::state) gave.
    ///
    /// # Errors
    /// A tensor that is missing, has no place, or has another shape.
    fn load_state(&mut self, state: &Weights) -> Result<(), TrainError>;

    /// The results: file names in `export/` and their content.
    ///
    /// # Errors
    /// What the computation of a result may give.
    fn export(&self) -> Result<Vec<(String, Weights)>, TrainError>;
}

/// Pictures and how they become batches.
pub struct Feed {
    /// The pictures.
    pub dataset: Arc<dyn Dataset>,
    /// What is done to each.
    pub transform: Transform,
    /// Batch size, order, threads.
    pub config: LoaderConfig,
}

/// What one step reports. The log gets the mean of each number over the steps that reported it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The number that must stay finite.
    pub loss: f64,
    /// Other numbers; a number need not be there at each step.
    pub values: Vec<(&'static str, f64)>,
    /// What the user should see.
    pub warnings: Vec<String>,
}

/// What an evaluation found.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// Decides which checkpoint is the best; higher is better. None: the last one is exported.
    pub score: Option<f64>,
    /// Numbers for the log.
    pub values: Vec<(String, f64)>,
    /// Pictures for `samples/`, each with a short name.
    pub pictures: Vec<(String, Image)>,
}

/// The body that encoder and recogniser share: IR-SE on six channels, by the recipe's `[backbone]`.
///
/// # Panics
/// If the depth is none of those that a recipe may have when it is read.
pub fn backbone_config(recipe: &Recipe) -> BackboneConfig {
    let depth =
        Depth::try_from(recipe.backbone.depth as u32).expect("the recipe was checked when it was read");
    BackboneConfig {
        width: recipe.backbone.width,
        ..BackboneConfig::with_average(depth)
    }
}

/// The loader's settings for a stage: shuffled, full batches, as many workers as the recipe says.
pub fn loader_config(data: &DataRecipe, budget: &Budget, seed: u64, stage: StageName) -> LoaderConfig {
    LoaderConfig {
        batch_size: budget.batch_size,
        seed: schedule::seed(seed, stage.as_str()),
        workers: data.workers,
        queue: data.queue,
        shuffle: true,
        drop_last: true,
        max_unreadable: data.max_unreadable,
    }
}

/// The pictures of a batch as a tensor `[N, 3, H, W]` in [-1, 1].
pub fn images(batch: &mut Batch, device: &Device) -> Tensor<4> {
    Tensor::from_data(
        TensorData::new(std::mem::take(&mut batch.images), batch.shape),
        device,
    )
}
