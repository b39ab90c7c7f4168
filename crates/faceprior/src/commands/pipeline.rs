//! `faceprior pipeline`: all stages and the from-scratch twin, then the report.

use std::path::Path;

use anyhow::Result;
use faceprior::data::files::{Durability, write_atomically};
use faceprior::eval::verification::{Comparison, Verification};
use faceprior::pipeline::{Pipeline, Scores};
use faceprior::report::{self, Provenance};
use faceprior::train::recipe::Recipe;
use faceprior::train::run::Start;
use faceprior::train::signals::Stop;
use serde::Serialize;

use super::Context;
use super::train::{finished, start};
use crate::args;
use crate::progress::{Progress, TrainingProgress, say};

/// What a pipeline prints with `--json` and leaves in `summary.json`.
#[derive(Serialize)]
struct Summary<'a> {
    recipe: &'a str,
    seed: u64,
    pretrained: &'a Verification,
    scratch: &'a Verification,
    pixels: &'a Verification,
    difference: Comparison,
    provenance: &'a Provenance,
}

pub fn run(context: &Context, arguments: args::Pipeline) -> Result<()> {
    let recipe = Recipe::load(&arguments.run.recipe, &arguments.run.changes())?;
    let scores = train_and_report(context, &recipe, &arguments.run.out, start(&arguments.run))?;
    if !context.json {
        show(&scores);
    }
    Ok(())
}

/// Trains what is not trained yet, scores, and writes `report.html` and `summary.json` into the directory.
pub fn train_and_report(context: &Context, recipe: &Recipe, dir: &Path, start: Start) -> Result<Scores> {
    let device = context.open_device()?;
    let provenance = Provenance::now(&device);
    let stop = Stop::on_signals()?;
    let pipeline = Pipeline {
        recipe,
        dir,
        device: &device,
        stop: &stop,
    };
    let mut progress = TrainingProgress::new(context.quiet);
    finished(pipeline.train(start, &mut progress)?)?;
    drop(progress);

    let mut progress: Option<Progress> = None;
    let scores = pipeline.score(&mut |done, total| {
        progress
            .get_or_insert_with(|| Progress::new("scoring", "pictures", total as u64, 0, context.quiet))
            .at(done as u64, "");
    })?;
    drop(progress);

    let page = report::compose(&pipeline, &scores, &provenance)?.html()?;
    let path = dir.join("report.html");
    write_atomically(&path, page.as_bytes(), Durability::Synced)?;
    let summary = Summary {
        recipe: &recipe.about,
        seed: recipe.seed,
        pretrained: scores.pretrained.result(),
        scratch: scores.scratch.result(),
        pixels: scores.pixels.result(),
        difference: scores.difference,
        provenance: &provenance,
    };
    let text = serde_json::to_string_pretty(&summary)? + "\n";
    write_atomically(&dir.join("summary.json"), text.as_bytes(), Durability::Synced)?;
    if context.json {
        super::print_json(&summary)?;
    }
    say(format_args!("report: {}", path.display()));
    Ok(scores)
}

fn show(scores: &Scores) {
    for (name, scored) in [
        ("pretrained", &scores.pretrained),
        ("from scratch", &scores.scratch),
        ("pixel PCA", &scores.pixels),
    ] {
        println!("{name:<13} accuracy {}", scored.result().accuracy.as_percent());
    }
    println!(
        "{:<13} {} on the same people",
        "difference",
        scores.difference.accuracy.as_points()
    );
}
