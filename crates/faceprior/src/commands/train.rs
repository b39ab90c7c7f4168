//! `faceprior train gan|encoder|recognizer`: one stage in a run directory.

use std::path::PathBuf;

use anyhow::{Result, bail};
use faceprior::pipeline::{Inputs, train_stage};
use faceprior::train::driver::Outcome;
use faceprior::train::recipe::{Recipe, StageName};
use faceprior::train::run::Start;
use faceprior::train::signals::Stop;
use serde::Serialize;

use super::Context;
use crate::args::{self, TrainRun, TrainStage};
use crate::progress::TrainingProgress;

#[derive(Serialize)]
struct Finished {
    exports: Vec<PathBuf>,
    step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
}

pub fn run(context: &Context, arguments: args::Train) -> Result<()> {
    let (run, name, inputs) = match arguments.stage {
        TrainStage::Gan(run) => (run, StageName::Prior, Inputs::default()),
        TrainStage::Encoder { run, prior } => (
            run,
            StageName::Encoder,
            Inputs {
                prior,
                ..Inputs::default()
            },
        ),
        TrainStage::Recognizer {
            run,
            encoder: Some(encoder),
            ..
        } => (
            run,
            StageName::Recognizer,
            Inputs {
                encoder,
                ..Inputs::default()
            },
        ),
        TrainStage::Recognizer {
            run, encoder: None, ..
        } => (run, StageName::Scratch, Inputs::default()),
    };
    let recipe = Recipe::load(&run.recipe, &run.changes())?;
    let device = context.open_device()?;
    let stop = Stop::on_signals()?;
    let mut progress = TrainingProgress::new(context.quiet);
    let outcome = train_stage(
        name,
        &recipe,
        &inputs,
        &run.out,
        &device,
        start(&run),
        &stop,
        &mut progress,
    )?;
    drop(progress);
    let (exports, step, score) = finished(outcome)?;
    if context.json {
        return super::print_json(&Finished { exports, step, score });
    }
    for path in exports {
        println!("{}", path.display());
    }
    Ok(())
}

/// What to do with what is in the run directory.
pub fn start(run: &TrainRun) -> Start {
    if run.resume {
        Start::Resume
    } else {
        Start::ResumeOrBegin
    }
}

/// The results of a run that went to its end; one that was stopped is a failure that says how to go on.
pub fn finished(outcome: Outcome) -> Result<(Vec<PathBuf>, u64, Option<f64>)> {
    match outcome {
        Outcome::Finished { exports, step, score } => Ok((exports, step, score)),
        Outcome::Stopped {
            checkpoint,
            images,
            total_images,
        } => bail!(
            "stopped after {images} of {total_images} images, at checkpoint {}\n\
             hint: run the same command again to go on",
            checkpoint.display()
        ),
    }
}
