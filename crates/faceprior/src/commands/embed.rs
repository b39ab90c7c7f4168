//! `faceprior embed`: pictures to embeddings in a safetensors file.

use anyhow::{Result, bail};
use faceprior::data::{Dataset, ImageList};
use faceprior::eval::Flip;
use faceprior::nets::weights::{KIND, Weights};
use faceprior::train::embed::{EmbedOptions, Embedded, embed, read_embedder};
use serde::Serialize;

use super::Context;
use crate::args::{self, FlipMode};
use crate::progress::{Progress, say};

/// Metadata key of the pictures' names: a JSON list, in the order of the rows.
const NAMES: &str = "names";

#[derive(Serialize)]
struct Summary {
    embedded: usize,
    dim: usize,
    unreadable: usize,
    file: String,
}

pub fn run(context: &Context, arguments: args::Embed) -> Result<()> {
    let network = read_embedder(&arguments.model, &context.open_device()?)?;
    let pictures = ImageList::open(&arguments.input)?;
    let options = options(arguments.flip, arguments.no_center_crop, arguments.batch);
    let indices: Vec<usize> = (0..pictures.len()).collect();
    let progress = Progress::new("embed", "pictures", indices.len() as u64, 0, context.quiet);
    let Embedded {
        embeddings,
        indices,
        unreadable,
    } = embed(&*network, &pictures, &indices, options, &mut |done| {
        progress.at(done as u64, "")
    })?;
    drop(progress);
    for (_, error) in &unreadable {
        say(format_args!("warning: {error}"));
    }
    if indices.is_empty() {
        bail!(
            "none of the {} pictures in {:?} could be read",
            unreadable.len(),
            arguments.input
        );
    }

    let names: Vec<String> = indices.iter().map(|&index| pictures.name(index)).collect();
    let mut file = Weights::new();
    let dim = embeddings.dim();
    file.insert(
        "embeddings",
        burn::tensor::TensorData::new(embeddings.into_data(), [names.len(), dim]),
    );
    file.set_metadata(NAMES, serde_json::to_string(&names)?);
    file.set_metadata(KIND, "embeddings");
    file.set_metadata("model", arguments.model.display().to_string());
    file.write(&arguments.out)?;

    let summary = Summary {
        embedded: names.len(),
        dim,
        unreadable: unreadable.len(),
        file: arguments.out.display().to_string(),
    };
    if context.json {
        return super::print_json(&summary);
    }
    println!(
        "embedded    {} pictures, {} numbers each",
        summary.embedded, summary.dim
    );
    println!("unreadable  {}", summary.unreadable);
    println!("file        {}", summary.file);
    Ok(())
}

/// How pictures become embeddings, as the command line says.
pub fn options(flip: FlipMode, no_center_crop: bool, batch: u32) -> EmbedOptions {
    EmbedOptions {
        flip: match flip {
            FlipMode::Sum => Flip::Sum,
            FlipMode::Concat => Flip::Concat,
            FlipMode::None => Flip::None,
        },
        center_crop: !no_center_crop,
        batch_size: batch as usize,
    }
}
