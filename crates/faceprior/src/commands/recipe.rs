//! `faceprior recipe`: list, show and check recipes.

use anyhow::{Context as _, Result};
use faceprior::train::recipe::{BUILT_IN, Recipe};
use serde::Serialize;

use super::Context;
use crate::args;

#[derive(Serialize)]
struct Listed {
    name: &'static str,
    about: String,
}

pub fn run(context: &Context, arguments: args::Recipe) -> Result<()> {
    match arguments {
        args::Recipe::List => list(context),
        args::Recipe::Show { recipe } => {
            let built_in = BUILT_IN.iter().find(|(name, _)| *name == recipe);
            match built_in {
                Some((_, text)) => print!("{text}"),
                None => {
                    // Whatever is shown is a recipe: a file that is none is an error, not its own content.
                    Recipe::load(&recipe, &[])?;
                    print!(
                        "{}",
                        std::fs::read_to_string(&recipe)
                            .with_context(|| format!("cannot read {recipe:?}"))?
                    );
                }
            }
            Ok(())
        }
        args::Recipe::Check { recipe, set } => {
            let recipe = Recipe::load(&recipe, &set)?;
            if context.json {
                return super::print_json(&recipe);
            }
            print!("{}", recipe.resolved());
            Ok(())
        }
    }
}

fn list(context: &Context) -> Result<()> {
    let recipes = BUILT_IN
        .iter()
        .map(|(name, _)| {
            Ok(Listed {
                name,
                about: Recipe::load(name, &[])?.about,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    if context.json {
        return super::print_json(&recipes);
    }
    for Listed { name, about } in recipes {
        println!("{name:<8} {about}");
    }
    Ok(())
}
