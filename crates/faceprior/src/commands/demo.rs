//! `faceprior demo`: the whole path on rendered faces, and what it must show to count as having worked.

use anyhow::{Result, bail};
use faceprior::findings::Findings;
use faceprior::train::recipe::Recipe;
use faceprior::train::run::Start;

use super::{Context, pipeline};
use crate::args;

pub fn run(context: &Context, arguments: args::Demo) -> Result<()> {
    let recipe = Recipe::load("demo", &arguments.set)?;
    let scores = pipeline::train_and_report(context, &recipe, &arguments.out, Start::ResumeOrBegin)?;
    let findings = Findings::of(&arguments.out, &scores)?;
    if !context.json {
        for line in findings.lines() {
            println!("{line}");
        }
    }
    let failures = findings.failures();
    if !failures.is_empty() {
        bail!(
            "the demo did not show what it should:\n  {}",
            failures.join("\n  ")
        );
    }
    Ok(())
}
