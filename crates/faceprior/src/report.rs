//! The pipeline's page: both recognisers on the same pairs, how they learnt, what the prior draws, what the encoder
//! finds again, and where all of it comes from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use faceprior_eval::plot::{Axis, LineChart, Series, roc_chart, score_histogram};
use faceprior_eval::report::{Block, KeyFigure, Picture, Report, Section, comparison_table};
use faceprior_eval::verification::Scored;
use faceprior_train::TrainError;
use faceprior_train::recipe::StageName;
use faceprior_train::run::read_log;
use serde::Serialize;
use serde_json::Value;

use crate::device;
use crate::pipeline::{Pipeline, STAGES, Scores};

/// Names of the models in tables and charts.
const PRETRAINED: &str = "from the prior";
const SCRATCH: &str = "from scratch";
const PIXELS: &str = "pixel PCA";

/// Where a result comes from.
#[derive(Clone, Debug, Serialize)]
pub struct Provenance {
    /// The program's version.
    pub version: String,
    /// The commit that it was built from.
    pub commit: String,
    /// When, in UTC.
    pub date: String,
    /// What it computed on.
    pub device: String,
    /// The processor.
    pub processor: String,
    /// CPU threads.
    pub threads: usize,
    /// The command line.
    pub command: String,
}

impl Provenance {
    /// Of this process, now.
    pub fn now(device: &Device) -> Self {
        let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
        let words: Vec<String> = words
            .skip(1)
            .map(|word| {
                if word.contains(' ') {
                    format!("'{word}'")
                } else {
                    word
                }
            })
            .collect();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: env!("FACEPRIOR_COMMIT").to_owned(),
            date: utc_now(),
            device: device::describe(device),
            processor: device::processor(),
            threads: rayon::current_num_threads(),
            command: format!("faceprior {}", words.join(" ")),
        }
    }
}

/// The time as `2026-11-24 12:00 UTC`.
fn utc_now() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let (days, second) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Civil date from days since 1970: years of 365.2425 days that begin in March, in eras of 400.
    let shifted = days + 719_468;
    let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let (month, date) = (
        if from_march < 10 {
            from_march + 3
        } else {
            from_march - 9
        },
        day_of_year - (153 * from_march + 2) / 5 + 1,
    );
    let year = year + 400 * era + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{date:02} {:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60
    )
}

/// Composes the page of a pipeline whose stages are all trained.
///
/// # Errors
/// Logs or sample pictures that cannot be read.
pub fn compose(
    pipeline: &Pipeline<'_>,
    scores: &Scores,
    provenance: &Provenance,
) -> Result<Report, TrainError> {
    let logs = logs_by_name(pipeline)?;
    let difference = &scores.difference.accuracy;
    let verdict = match (difference.is_clear(), difference.value > 0.0) {
        (true, true) => "The recogniser that started from the prior is better than its twin from scratch",
        (true, false) => "The recogniser that started from the prior is worse than its twin from scratch",
        (false, _) => "This run does not tell which start is better",
    };
    let accuracy = |scored: &Scored| scored.result().accuracy;
    Ok(Report {
        title: "From faces to a recogniser".to_owned(),
        kicker: format!(
            "faceprior {} · {} · {}",
            provenance.version, pipeline.recipe.about, provenance.date
        ),
        summary: vec![
            format!("{verdict}: {} in accuracy.", difference.as_points()),
            format!(
                "On {} pairs: {} from the prior, {} from scratch, {} with plain pixels.",
                scores.pretrained.result().pairs,
                accuracy(&scores.pretrained).as_percent(),
                accuracy(&scores.scratch).as_percent(),
                accuracy(&scores.pixels).as_percent(),
            ),
        ],
        figures: vec![
            KeyFigure::estimate(PRETRAINED, &accuracy(&scores.pretrained)),
            KeyFigure::estimate(SCRATCH, &accuracy(&scores.scratch)),
            KeyFigure::estimate(PIXELS, &accuracy(&scores.pixels)),
        ],
        sections: vec![
            verification(scores)?,
            learning(&logs),
            stage_section(
                "The prior",
                "What stage 1 draws, and how it got there.",
                pipeline,
                StageName::Prior,
                &logs,
            )?,
            stage_section(
                "The encoder",
                "Pictures that stage 2 never saw in training, and what it finds of them in the prior.",
                pipeline,
                StageName::Encoder,
                &logs,
            )?,
            limits(),
            origin(pipeline, provenance),
        ],
    })
}

fn verification(scores: &Scores) -> Result<Section, TrainError> {
    let models = [
        (PRETRAINED, &scores.pretrained),
        (SCRATCH, &scores.scratch),
        (PIXELS, &scores.pixels),
    ];
    let curves = models.map(|(name, scored)| (name, scored.roc()));
    let mut blocks = vec![
        Block::Table(comparison_table(&models)?),
        Block::Chart {
            svg: roc_chart("ROC on the test pairs", &curves),
            caption: "Share of genuine pairs accepted against share of impostor pairs accepted.".to_owned(),
        },
    ];
    for (name, scored) in &models[..2] {
        blocks.push(Block::Chart {
            svg: score_histogram(&format!("Scores, {name}"), scored),
            caption: String::new(),
        });
    }
    Ok(Section {
        title: "Verification".to_owned(),
        blocks,
    })
}

/// The numbers of a run by name, each against the images seen.
#[derive(Default)]
struct Log {
    steps: BTreeMap<String, Vec<[f64; 2]>>,
    evaluations: BTreeMap<String, Vec<[f64; 2]>>,
}

impl Log {
    fn read(run_dir: &Path) -> Result<Self, TrainError> {
        let mut log = Self::default();
        for record in read_log(run_dir)? {
            let numbers = match record["event"].as_str() {
                Some("step") => &mut log.steps,
                Some("evaluation") => &mut log.evaluations,
                _ => continue,
            };
            let (Some(images), Some(fields)) = (record["images"].as_f64(), record.as_object()) else {
                continue;
            };
            for (name, value) in fields
                .iter()
                .filter(|(name, _)| !["step", "images", "epoch"].contains(&name.as_str()))
            {
                if let Some(value) = Value::as_f64(value) {
                    numbers.entry(name.clone()).or_default().push([images, value]);
                }
            }
        }
        Ok(log)
    }
}

fn logs_by_name(pipeline: &Pipeline<'_>) -> Result<BTreeMap<&'static str, Log>, TrainError> {
    STAGES
        .into_iter()
        .map(|stage| Ok((stage.as_str(), Log::read(&pipeline.stage_dir(stage))?)))
        .collect()
}

/// Loss and accuracy on the training pictures, of the recogniser and its twin.
fn learning(logs: &BTreeMap<&'static str, Log>) -> Section {
    let curves = |name: &str| -> Vec<Series> {
        [(StageName::Recognizer, PRETRAINED), (StageName::Scratch, SCRATCH)]
            .into_iter()
            .filter_map(|(stage, label)| {
                Some(Series::new(
                    label,
                    logs.get(stage.as_str())?.steps.get(name)?.clone(),
                ))
            })
            .collect()
    };
    let chart = |title: &str, name: &str, y: Axis| Block::Chart {
        svg: LineChart {
            title: title.to_owned(),
            x: Axis::linear("images seen"),
            y,
            series: curves(name),
        }
        .svg(),
        caption: String::new(),
    };
    Section {
        title: "How the recognisers learnt".to_owned(),
        blocks: vec![
            chart("Training loss", "loss", Axis::linear("loss")),
            chart(
                "Training pictures whose identity is ranked first",
                "top1",
                Axis::linear("share").percent(),
            ),
        ],
    }
}

/// Charts of a stage's losses and evaluations, and its last pictures beside its first.
fn stage_section(
    title: &str,
    about: &str,
    pipeline: &Pipeline<'_>,
    stage: StageName,
    logs: &BTreeMap<&'static str, Log>,
) -> Result<Section, TrainError> {
    let mut blocks = vec![Block::Text(about.to_owned())];
    let pictures = samples(&pipeline.stage_dir(stage).join("samples"))?;
    if !pictures.is_empty() {
        blocks.push(Block::Pictures(pictures));
    }
    if let Some(log) = logs.get(stage.as_str()) {
        let losses: Vec<Series> = log
            .steps
            .iter()
            .filter(|(name, _)| name.contains("loss"))
            .map(|(name, points)| Series::new(spaced(name), points.clone()))
            .collect();
        if !losses.is_empty() {
            blocks.push(chart("Losses in training", losses));
        }
        blocks.extend(evaluation_charts(&log.evaluations));
    }
    Ok(Section {
        title: title.to_owned(),
        blocks,
    })
}

/// A chart for each number of the evaluations. `x_of_y` is what y gets of x, a line to hold x against.
fn evaluation_charts(evaluations: &BTreeMap<String, Vec<[f64; 2]>>) -> Vec<Block> {
    let drawn = |(name, points): &(&String, &Vec<[f64; 2]>)| {
        points.len() > 1 && *name != "score" && !name.contains("_of_")
    };
    let charts = evaluations.iter().filter(drawn).map(|(name, points)| {
        let prefix = format!("{name}_of_");
        let references = evaluations
            .iter()
            .filter(|(other, _)| other.starts_with(&prefix))
            .map(|(other, points)| Series::new(spaced(other), points.clone()).reference());
        let series = std::iter::once(Series::new(spaced(name), points.clone())).chain(references);
        chart(&format!("In evaluation: {}", spaced(name)), series.collect())
    });
    charts.collect()
}

fn chart(title: &str, series: Vec<Series>) -> Block {
    let (x, y) = (Axis::linear("images seen"), Axis::linear(""));
    Block::Chart {
        svg: LineChart {
            title: title.to_owned(),
            x,
            y,
            series,
        }
        .svg(),
        caption: String::new(),
    }
}

fn spaced(name: &str) -> String {
    name.replace('_', " ")
}

/// The first and the last picture of each kind in a run's samples, `step-000000480-<kind>.png`.
fn samples(dir: &Path) -> Result<Vec<Picture>, TrainError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| TrainError::Io { action, path, source }
    };
    let mut kinds: BTreeMap<String, Vec<(u64, PathBuf)>> = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(failed("list", dir))? {
        let path = entry.map_err(failed("list", dir))?.path();
        let name = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .and_then(|stem| stem.strip_prefix("step-"));
        if let Some((step, kind)) = name.and_then(|name| name.split_once('-'))
            && let Ok(step) = step.parse()
        {
            kinds
                .entry(kind.to_owned())
                .or_default()
                .push((step, path.clone()));
        }
    }
    let mut pictures = Vec::new();
    for (kind, mut of_kind) in kinds {
        of_kind.sort();
        let last = of_kind.pop();
        let first = (!of_kind.is_empty()).then(|| of_kind.swap_remove(0));
        for (step, path) in first.into_iter().chain(last) {
            let png = std::fs::read(&path).map_err(failed("read", &path))?;
            let caption = format!("{} after {step} steps", spaced(&kind));
            pictures.push(Picture::new(png, caption.clone(), caption)?);
        }
    }
    Ok(pictures)
}

fn limits() -> Section {
    let text = "One seed. The interval says how far the result depends on who is in the test pairs; how far it depends on \
                the random start of the training, only several seeds can say. Nothing that was trained on identity labels \
                entered the prior or the encoder; both recognisers saw the same pictures in the same order.";
    Section {
        title: "What this does not say".to_owned(),
        blocks: vec![Block::Note(text.to_owned())],
    }
}

fn origin(pipeline: &Pipeline<'_>, provenance: &Provenance) -> Section {
    let fact = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let facts = vec![
        fact("command", &provenance.command),
        fact("date", &provenance.date),
        fact("version", &provenance.version),
        fact("commit", &provenance.commit),
        fact("device", &provenance.device),
        fact("processor", &provenance.processor),
        fact("threads", &provenance.threads.to_string()),
        fact("seed", &pipeline.recipe.seed.to_string()),
        fact("recipe hash", &pipeline.recipe.hash()),
    ];
    let recipe = Block::Code {
        caption: "recipe.toml, as resolved".to_owned(),
        text: pipeline.recipe.resolved(),
    };
    Section {
        title: "Where it comes from".to_owned(),
        blocks: vec![Block::Facts(facts), recipe],
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_time_has_a_form() {
        let now = super::utc_now();
        assert_eq!(now.len(), "2026-11-24 12:00 UTC".len());
        assert!(now.ends_with(" UTC") && now.as_str() > "2026");
    }
}
