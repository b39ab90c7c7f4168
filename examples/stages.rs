//! The three stages and the from-scratch twin on rendered faces, by the library:
//! `cargo run --release --example stages -- DIR`.
//!
//! The recipe is the demo's, cut down to a minute; nothing much is learnt.

use std::path::Path;

use faceprior::pipeline::Pipeline;
use faceprior::train::recipe::Recipe;
use faceprior::train::run::Start;
use faceprior::train::signals::Stop;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).ok_or("usage: stages DIR")?;
    let shorter = [
        "prior.budget.images=640",
        "encoder.budget.images=640",
        "recognizer.budget.images=1280",
        "eval.bootstrap_draws=200",
    ];
    let recipe = Recipe::load("demo", &shorter.map(str::to_owned))?;
    let device = faceprior::device::open("auto")?;
    let stop = Stop::on_signals()?;
    let pipeline = Pipeline {
        recipe: &recipe,
        dir: Path::new(&dir),
        device: &device,
        stop: &stop,
    };
    pipeline.train(Start::ResumeOrBegin, &mut ())?;
    let scores = pipeline.score(&mut |_, _| ())?;
    let difference = scores.difference.accuracy.as_points();
    std::fs::write(Path::new(&dir).join("difference.txt"), difference)?;
    Ok(())
}
