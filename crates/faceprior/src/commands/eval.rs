//! `faceprior eval pairs`: pair verification, alone or against a second recogniser.

use std::path::Path;

use anyhow::{Context as _, Result};
use burn::tensor::Device;
use faceprior::data::Image;
use faceprior::data::files::{Durability, write_atomically};
use faceprior::eval::plot::{roc_chart, score_histogram};
use faceprior::eval::report::{Block, Picture, Report, Section, comparison_table};
use faceprior::eval::verification::{Comparison, Protocol, Scored, Verification, compare, verify};
use faceprior::train::embed::{EmbedOptions, PairSet, read_embedder};
use serde::Serialize;

use super::{Context, embed};
use crate::args;
use crate::progress::Progress;

#[derive(Serialize)]
struct Answer<'a> {
    model: &'a Verification,
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<&'a Verification>,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Comparison>,
}

/// The worst mistakes of each kind that a page shows.
const MISTAKES: usize = 8;

pub fn run(context: &Context, arguments: args::Eval) -> Result<()> {
    let args::Eval::Pairs(arguments) = arguments;
    let device = context.open_device()?;
    let pairs = PairSet::from_lfw(&arguments.images, &arguments.pairs)?;
    let options = embed::options(arguments.flip, arguments.no_center_crop, arguments.batch);
    let model = score(context, &arguments.model, &pairs, options, &device)?;
    let against = arguments
        .against
        .as_ref()
        .map(|path| score(context, path, &pairs, options, &device))
        .transpose()?;
    let difference = against
        .as_ref()
        .map(|against| compare(&model, against))
        .transpose()?;

    if let Some(path) = &arguments.report {
        // The file's name will do, unless both models have the same.
        let short = |path: &Path| {
            path.file_stem()
                .unwrap_or(path.as_os_str())
                .to_string_lossy()
                .into_owned()
        };
        let same = arguments
            .against
            .as_ref()
            .is_some_and(|against| short(against) == short(&arguments.model));
        let name = |path: &Path| {
            if same {
                path.display().to_string()
            } else {
                short(path)
            }
        };
        let mut models = vec![(name(&arguments.model), &model)];
        if let (Some(path), Some(against)) = (&arguments.against, &against) {
            models.push((name(path), against));
        }
        let page = page(&models, &pairs)?.html()?;
        write_atomically(path, page.as_bytes(), Durability::Synced)?;
    }
    let answer = Answer {
        model: model.result(),
        against: against.as_ref().map(Scored::result),
        difference,
    };
    if context.json {
        return super::print_json(&answer);
    }
    show(&answer);
    Ok(())
}

fn score(
    context: &Context,
    path: &Path,
    pairs: &PairSet,
    options: EmbedOptions,
    device: &Device,
) -> Result<Scored> {
    let network = read_embedder(path, device)?;
    let progress = Progress::new(
        "embed",
        "pictures",
        pairs.indices().len() as u64,
        0,
        context.quiet,
    );
    let embeddings = pairs.embed(&*network, options, &mut |done| progress.at(done as u64, ""))?;
    Ok(verify(&embeddings, pairs.pairs(), &Protocol::default())?)
}

fn show(answer: &Answer<'_>) {
    let models = [("model", Some(answer.model)), ("against", answer.against)];
    for (name, result) in models
        .into_iter()
        .filter_map(|(name, result)| Some((name, result?)))
    {
        println!("{name}");
        println!(
            "  accuracy        {} (± {:.2} over folds)",
            result.accuracy.as_percent(),
            100.0 * result.accuracy_std
        );
        println!("  exact threshold {}", result.exact_accuracy.as_percent());
        println!("  AUC             {}", result.auc.as_percent());
        println!("  EER             {}", result.eer.as_percent());
        for at in &result.tar_at_far {
            println!("  TAR at FAR {:<5} {}", at.far, at.tar.as_percent());
        }
        println!(
            "  {} pairs, {} genuine and {} impostor",
            result.pairs, result.genuine, result.impostor
        );
    }
    if let Some(difference) = &answer.difference {
        println!("difference, on the same draws of people");
        println!("  accuracy        {}", difference.accuracy.as_points());
        println!("  AUC             {}", difference.auc.as_points());
    }
}

fn page(models: &[(String, &Scored)], pairs: &PairSet) -> Result<Report> {
    let named: Vec<(&str, &Scored)> = models
        .iter()
        .map(|(name, scored)| (name.as_str(), *scored))
        .collect();
    let curves: Vec<_> = named.iter().map(|(name, scored)| (*name, scored.roc())).collect();
    let mut blocks = vec![
        Block::Table(comparison_table(&named)?),
        Block::Chart {
            svg: roc_chart("ROC of all pairs", &curves),
            caption: String::new(),
        },
    ];
    for (name, scored) in &named {
        let svg = score_histogram(&format!("Scores of {name}"), scored);
        blocks.push(Block::Chart {
            svg,
            caption: String::new(),
        });
    }
    let mut sections = vec![Section {
        title: "Verification".to_owned(),
        blocks,
    }];
    for (name, scored) in &named {
        let mistakes = scored.mistakes(MISTAKES);
        let mut blocks = Vec::new();
        for (title, wrong) in [
            ("taken for one person, though they are two", &mistakes.impostor),
            ("taken for two people, though they are one", &mistakes.genuine),
        ] {
            let pictures = wrong
                .iter()
                .map(|mistake| side_by_side(pairs, mistake.pair, mistake.distance))
                .collect::<Result<Vec<_>>>()?;
            if !pictures.is_empty() {
                blocks.push(Block::Text(title.to_owned()));
                blocks.push(Block::Pictures(pictures));
            }
        }
        sections.push(Section {
            title: format!("Worst mistakes of {name}"),
            blocks,
        });
    }
    Ok(Report {
        title: "Pair verification".to_owned(),
        kicker: format!("faceprior {}", env!("CARGO_PKG_VERSION")),
        summary: named
            .iter()
            .map(|(name, scored)| format!("{name}: accuracy {}.", scored.result().accuracy.as_percent()))
            .collect(),
        sections,
        ..Report::default()
    })
}

fn side_by_side(pairs: &PairSet, pair: usize, distance: f64) -> Result<Picture> {
    let pair = pairs.pairs()[pair];
    let [left, right] = [pair.left, pair.right].map(|row| pairs.indices()[row]);
    let images = [pairs.dataset().read(left)?, pairs.dataset().read(right)?];
    let names = [left, right]
        .map(|index| pairs.dataset().name(index))
        .join(" and ");
    let png = Image::grid(&images, 2)
        .encode(faceprior::data::Encoding::Png)
        .with_context(|| format!("cannot draw {names}"))?;
    Ok(Picture::new(
        png,
        format!("{names}: squared distance {distance:.2}"),
        names.clone(),
    )?)
}
