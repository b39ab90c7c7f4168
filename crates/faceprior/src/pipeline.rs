//! The whole path: prior → encoder → recogniser and its from-scratch twin → scores → report.
//!
//! Each stage is a run directory of its own below the pipeline's, and a finished one is not trained again: to go on
//! after an interruption is to call [`run`] again.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use faceprior_data::{DataError, Dataset};
use faceprior_eval::Embeddings;
use faceprior_eval::baseline::PixelPca;
use faceprior_eval::bootstrap::Bootstrap;
use faceprior_eval::verification::{self, Comparison, Protocol, Scored};
use faceprior_nets::weights::Weights;
use faceprior_train::TrainError;
use faceprior_train::driver::{self, Outcome, Reporter};
use faceprior_train::embed::{EmbedOptions, PairSet, read_embedder};
use faceprior_train::recipe::{Recipe, StageName};
use faceprior_train::run::{Run, Start};
use faceprior_train::signals::Stop;
use faceprior_train::sources;
use faceprior_train::stages::Stage;
use faceprior_train::stages::encoder::{self, EncoderStage};
use faceprior_train::stages::prior::{self, PriorStage};
use faceprior_train::stages::recognizer::{self, RecognizerStage};
use rayon::prelude::*;

/// Side of the grey pictures that the pixel baseline sees.
const BASELINE_SIDE: usize = 28;
/// Principal components of the pixel baseline, fewer where there are fewer pictures.
const BASELINE_COMPONENTS: usize = 150;

/// The stages in the order in which they run.
pub const STAGES: [StageName; 4] = [
    StageName::Prior,
    StageName::Encoder,
    StageName::Recognizer,
    StageName::Scratch,
];

/// What all stages of a pipeline share.
pub struct Pipeline<'a> {
    /// What to do.
    pub recipe: &'a Recipe,
    /// Where the stages' run directories go.
    pub dir: &'a Path,
    /// What to compute on.
    pub device: &'a Device,
    /// A request to checkpoint and leave.
    pub stop: &'a Stop,
}

/// The recognisers on the test pairs.
pub struct Scores {
    /// The recogniser that started from the encoder.
    pub pretrained: Scored,
    /// Its twin from scratch.
    pub scratch: Scored,
    /// Whitened principal components of pixels, fitted on the labelled training pictures.
    pub pixels: Scored,
    /// Pretrained minus scratch, on the same draws of people.
    pub difference: Comparison,
}

impl Pipeline<'_> {
    /// Trains all stages that are not finished.
    ///
    /// # Errors
    /// Those of each stage.
    pub fn train(&self, start: Start, reporter: &mut dyn Reporter) -> Result<Outcome, TrainError> {
        // A folder that is missing is found out before the first hour is spent.
        sources::prior(self.recipe)?;
        sources::labelled(self.recipe)?;
        sources::test_pairs(self.recipe)?;
        let mut last = None;
        for stage in STAGES {
            let outcome = self.train_stage(stage, start, reporter)?;
            if matches!(outcome, Outcome::Stopped { .. }) {
                return Ok(outcome);
            }
            last = Some(outcome);
        }
        Ok(last.unwrap_or(Outcome::Finished {
            exports: Vec::new(),
            step: 0,
            score: None,
        }))
    }

    /// Trains one stage in its own directory, from the exports of the stage before it.
    ///
    /// # Errors
    /// Those of the stage.
    pub fn train_stage(
        &self,
        stage: StageName,
        start: Start,
        reporter: &mut dyn Reporter,
    ) -> Result<Outcome, TrainError> {
        let inputs = Inputs {
            prior: self.stage_dir(StageName::Prior),
            encoder: self.stage_dir(StageName::Encoder),
        };
        train_stage(
            stage,
            self.recipe,
            &inputs,
            &self.stage_dir(stage),
            self.device,
            start,
            self.stop,
            reporter,
        )
    }

    /// The run directory of a stage.
    pub fn stage_dir(&self, stage: StageName) -> PathBuf {
        self.dir.join(stage.as_str())
    }

    /// The exported recogniser of stage 3 or of its twin.
    pub fn recognizer_file(&self, stage: StageName) -> PathBuf {
        self.stage_dir(stage).join("export").join(recognizer::EXPORT)
    }

    /// Scores both recognisers and the pixel baseline on the recipe's test pairs; `progress` is told how many of
    /// how many pictures are embedded.
    ///
    /// # Errors
    /// Test pictures or weights that cannot be read, and too few pairs.
    pub fn score(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<Scores, TrainError> {
        let pairs = sources::test_pairs(self.recipe)?;
        let options = EmbedOptions::from(&self.recipe.eval);
        let bootstrap = Bootstrap {
            draws: self.recipe.eval.bootstrap_draws,
            ..Bootstrap::default()
        };
        let protocol = Protocol {
            bootstrap,
            ..Protocol::default()
        };
        let total = 2 * pairs.indices().len();
        let mut score = |stage: StageName, before: usize| {
            let network = read_embedder(&self.recognizer_file(stage), self.device)?;
            let embeddings = pairs.embed(&*network, options, &mut |done| progress(before + done, total))?;
            Ok::<_, TrainError>(verification::verify(&embeddings, pairs.pairs(), &protocol)?)
        };
        let pretrained = score(StageName::Recognizer, 0)?;
        let scratch = score(StageName::Scratch, pairs.indices().len())?;
        let pixels = score_pixels(self.recipe, &pairs, &protocol)?;
        let difference = verification::compare(&pretrained, &scratch)?;
        Ok(Scores {
            pretrained,
            scratch,
            pixels,
            difference,
        })
    }
}

/// Run directories or exports of the stages that others start from.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Stage 1's run directory.
    pub prior: PathBuf,
    /// Stage 2's run directory.
    pub encoder: PathBuf,
}

/// Trains one stage in a run directory.
///
/// # Errors
/// Pictures, weights of the stage before, the run directory, or the training itself.
pub fn train_stage(
    name: StageName,
    recipe: &Recipe,
    inputs: &Inputs,
    dir: &Path,
    device: &Device,
    start: Start,
    stop: &Stop,
    reporter: &mut dyn Reporter,
) -> Result<Outcome, TrainError> {
    driver::check_activations(recipe.activations.into(), device)?;
    // Locked before anything is read: a second process learns at once that it is one too many.
    let mut run = Run::open(dir, name, recipe, start)?;
    let mut stage: Box<dyn Stage> = match name {
        StageName::Prior => Box::new(PriorStage::new(recipe, sources::prior(recipe)?, device)?),
        StageName::Encoder => {
            let generator = Weights::read(&exported(&inputs.prior, prior::EXPORT))?;
            let discriminator = Weights::read(&exported(&inputs.prior, prior::DISCRIMINATOR_EXPORT))?;
            Box::new(EncoderStage::new(
                recipe,
                &generator,
                &discriminator,
                sources::prior(recipe)?,
                device,
            )?)
        }
        StageName::Recognizer => {
            let encoder = Weights::read(&exported(&inputs.encoder, encoder::EXPORT))?;
            Box::new(RecognizerStage::from_encoder(
                recipe,
                &encoder,
                sources::labelled(recipe)?,
                device,
            )?)
        }
        StageName::Scratch => Box::new(RecognizerStage::from_scratch(
            recipe,
            sources::labelled(recipe)?,
            device,
        )?),
    };
    driver::train(&mut *stage, &mut run, stop, reporter)
}

/// A file of a run directory's export, where the directory of the export itself may be given too.
fn exported(dir: &Path, file: &str) -> PathBuf {
    let inside = dir.join(file);
    if inside.is_file() {
        inside
    } else {
        dir.join("export").join(file)
    }
}

/// The floor that a recogniser must clear: principal components of grey pixels, of the same training pictures. As in
/// training, pictures that cannot be read are left out there, and are an error in the test pairs.
fn score_pixels(recipe: &Recipe, pairs: &PairSet, protocol: &Protocol) -> Result<Scored, TrainError> {
    let training = sources::labelled(recipe)?.train;
    let all: Vec<usize> = (0..training.len()).collect();
    let fitted_on: Vec<Vec<f32>> = grey_pixels(&*training, &all).into_iter().flatten().collect();
    let components = BASELINE_COMPONENTS.min(fitted_on.len().saturating_sub(1)).max(1);
    let pixels = grey_pixels(&**pairs.dataset(), pairs.indices())
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let rows = |pixels: Vec<Vec<f32>>| Embeddings::new(BASELINE_SIDE * BASELINE_SIDE, pixels.concat());
    let embeddings = PixelPca::fit(&rows(fitted_on)?, components)?.embed(&rows(pixels)?)?;
    Ok(verification::verify(&embeddings, pairs.pairs(), protocol)?)
}

fn grey_pixels(dataset: &dyn Dataset, indices: &[usize]) -> Vec<Result<Vec<f32>, DataError>> {
    const PIXELS: usize = BASELINE_SIDE * BASELINE_SIDE;
    indices
        .par_iter()
        .map(|&index| {
            let image = dataset.read(index)?.resize_bilinear(BASELINE_SIDE, BASELINE_SIDE);
            let mut planes = vec![0.0; 3 * PIXELS];
            image.to_chw_f32(&mut planes);
            let mean = |at: usize| (planes[at] + planes[at + PIXELS] + planes[at + 2 * PIXELS]) / 3.0;
            Ok((0..PIXELS).map(mean).collect())
        })
        .collect()
}
