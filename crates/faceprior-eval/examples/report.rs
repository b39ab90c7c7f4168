//! Scores two simulated models on one list of pairs and composes a report page:
//! `cargo run -p faceprior-eval --example report > report.html`.
//!
//! The embeddings are random people with random noise, the learning curves are formulas and the pictures are discs:
//! it shows every part of a page without a single trained network.

use std::error::Error;
use std::io::{Cursor, Write};

use faceprior_eval::Embeddings;
use faceprior_eval::plot::{Axis, Bar, BarChart, LineChart, Series, det_chart, roc_chart, score_histogram};
use faceprior_eval::report::{
    Block, Cell, Column, KeyFigure, Picture, Report, Row, Section, Table, comparison_table,
};
use faceprior_eval::verification::{Pair, Protocol, compare, verify};
use image::{ImageFormat, Rgb, RgbImage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const PEOPLE: usize = 1500;
const DIM: usize = 64;

/// Two pictures of each person, `noise` apart.
fn simulated(noise: f32) -> Result<Embeddings, Box<dyn Error>> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut data = Vec::with_capacity(2 * PEOPLE * DIM);
    for _ in 0..PEOPLE {
        let person: Vec<f32> = (0..DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
        for _ in 0..2 {
            let hard: f32 = rng.random_range(0.3..1.9);
            data.extend(
                person
                    .iter()
                    .map(|x| x + noise * hard * rng.random_range(-1.0f32..1.0)),
            );
        }
    }
    Ok(Embeddings::new(DIM, data)?.normalized())
}

fn pairs() -> Vec<Pair> {
    let genuine = |k: usize| Pair {
        left: 2 * k,
        right: 2 * k + 1,
        same: true,
        people: [k as u32; 2],
    };
    let impostor = |k: usize| {
        let other = (k * 7 + 1) % PEOPLE;
        Pair {
            left: 2 * k,
            right: 2 * other + 1,
            same: false,
            people: [k as u32, other as u32],
        }
    };
    (0..PEOPLE).flat_map(|k| [genuine(k), impostor(k)]).collect()
}

/// Discs with eyes, in a grid.
fn discs(seed: u64, columns: u32, rows: u32, size: u32) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sheet = RgbImage::new(columns * size, rows * size);
    for row in 0..rows {
        for column in 0..columns {
            let skin = Rgb([
                rng.random_range(150..240u8),
                rng.random_range(110..190u8),
                rng.random_range(90..170u8),
            ]);
            let back = Rgb([
                rng.random_range(40..120u8),
                rng.random_range(60..140u8),
                rng.random_range(70..150u8),
            ]);
            for y in 0..size {
                for x in 0..size {
                    let (u, v) = (x as f32 / size as f32 - 0.5, y as f32 / size as f32 - 0.52);
                    let eye = ((u.abs() - 0.14).powi(2) + (v + 0.08).powi(2)) < 0.0016;
                    let mouth = (v - 0.2).abs() < 0.018 && u.abs() < 0.13;
                    let face = u * u / 0.105 + v * v / 0.17 < 1.0;
                    let color = if eye || mouth {
                        Rgb([40, 32, 34])
                    } else if face {
                        skin
                    } else {
                        back
                    };
                    sheet.put_pixel(column * size + x, row * size + y, color);
                }
            }
        }
    }
    let mut png = Cursor::new(Vec::new());
    sheet.write_to(&mut png, ImageFormat::Png)?;
    Ok(png.into_inner())
}

fn curve(start: f64, end: f64, rate: f64, wobble: f64, seed: u64) -> Vec<[f64; 2]> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..400)
        .map(|step| {
            let images = f64::from(step) * 256.0;
            let value = end + (start - end) * (-images / rate).exp();
            [images, value + wobble * rng.random_range(-1.0..1.0) * value]
        })
        .collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let pairs = pairs();
    let protocol = Protocol::default();
    let pretrained = verify(&simulated(1.45)?, &pairs, &protocol)?;
    let scratch = verify(&simulated(1.75)?, &pairs, &protocol)?;
    let pixels = verify(&simulated(2.6)?, &pairs, &protocol)?;
    let models = [
        ("pretrained", &pretrained),
        ("from scratch", &scratch),
        ("pixel PCA", &pixels),
    ];
    let difference = compare(&pretrained, &scratch)?.accuracy;
    let verdict = if difference.is_clear() {
        "Pretraining helps"
    } else {
        "Pretraining shows no clear gain"
    };
    let curves: Vec<(&str, _)> = models
        .iter()
        .map(|(name, scored)| (*name, scored.roc()))
        .collect();

    let loss = LineChart {
        title: "Stage 3: focal loss".into(),
        x: Axis::linear("images seen"),
        y: Axis::log("focal loss"),
        series: vec![
            Series::new("pretrained", curve(18.0, 1.1, 14e3, 0.05, 1)),
            Series::new("from scratch", curve(21.0, 1.9, 22e3, 0.05, 2)),
        ],
    };
    let bars = BarChart {
        title: "Accuracy on the test pairs".into(),
        x: Axis::linear("mean accuracy over folds, with 95% intervals")
            .range(0.45, 1.0)
            .percent(),
        bars: models
            .iter()
            .map(|(name, scored)| {
                let accuracy = scored.result().accuracy;
                Bar {
                    name: (*name).into(),
                    value: accuracy.value,
                    interval: accuracy.interval,
                }
            })
            .collect(),
        start: Some((0.5, "chance".into())),
    };
    let mistakes = pretrained.mistakes(3);
    let row = |kind: &str, mistake: &faceprior_eval::mistakes::Mistake| Row {
        cells: vec![
            Cell::new(format!("pair {}", mistake.pair)),
            Cell::new(kind),
            Cell::new(format!("{:.3}", mistake.distance)),
        ],
        apart: false,
    };
    let worst = Table {
        caption: "Most striking mistakes".into(),
        columns: vec![
            Column::words(""),
            Column::words("Truth"),
            Column::numbers("Squared distance"),
        ],
        rows: (mistakes.impostor.iter().map(|m| row("two people", m)))
            .chain(mistakes.genuine.iter().map(|m| row("one person", m)))
            .collect(),
        note: format!("Mean threshold {:.2}.", pretrained.result().threshold),
    };
    let section = |title: &str, blocks| Section {
        title: title.into(),
        blocks,
    };
    let chart = |svg, caption: &str| Block::Chart {
        svg,
        caption: caption.into(),
    };
    let facts = [
        ("Program", "faceprior 0.1.0, commit 08b57c0"),
        ("Date", "2026-11-24 12:00 UTC"),
        ("Device", "CPU, 2 threads, AVX2"),
        ("Seeds", "recipe 0, bootstrap 0"),
        ("Command", "faceprior demo --out runs/demo"),
    ];
    let report = Report {
        title: "Does a prior of faces make a better recogniser?".into(),
        kicker: "faceprior · sample report · simulated data".into(),
        summary: vec![
            format!("{verdict}: {} over the same network from scratch.", difference.as_points()),
            format!("Held-out people are told apart in {} of pairs.", pretrained.result().accuracy.as_percent()),
            "Both networks are above whitened pixel components measured on the same pairs.".into(),
        ],
        figures: models
            .iter()
            .map(|(name, scored)| {
                KeyFigure::estimate(format!("accuracy, {name}"), &scored.result().accuracy)
            })
            .collect(),
        sections: vec![
            section(
                "Comparison",
                vec![
                    Block::Table(comparison_table(&models)?),
                    chart(bars.svg(), "Bars start at chance level."),
                    chart(roc_chart("ROC on all test pairs", &curves), ""),
                    chart(det_chart("Detection error trade-off", &curves), ""),
                ],
            ),
            section(
                "Scores",
                vec![
                    chart(score_histogram("Pretrained", &pretrained), "Overlap is where mistakes happen."),
                    Block::Table(worst),
                ],
            ),
            section("Learning curves", vec![chart(loss.svg(), "Log scale; lower is better.")]),
            section(
                "Pictures",
                vec![
                    Block::Pictures(vec![Picture::new(
                        discs(1, 10, 4, 64)?,
                        "Samples of the prior after the last step, EMA weights, no truncation.",
                        "A grid of 40 generated faces",
                    )?]),
                    Block::Pictures(vec![
                        Picture::new(discs(2, 4, 2, 32)?, "Input", "Eight test faces")?,
                        Picture::new(discs(3, 4, 2, 32)?, "Reconstruction", "The same faces through the encoder")?,
                    ]),
                ],
            ),
            section(
                "Recipe",
                vec![Block::Code {
                    caption: "recipe.toml, as resolved".into(),
                    text: "schema = 1\nseed = 0\n\n[recognizer]\nbackbone = \"ir_se_18\"\nwidth = 16\nimages = 102400\n"
                        .repeat(3),
                }],
            ),
            section(
                "Limits",
                vec![
                    Block::Note("Simulated embeddings: these numbers say nothing of real faces.".into()),
                    Block::Text(
                        "Intervals resample people, so they hold for other people of the same kind; they say \
                         nothing of other seeds of training."
                            .into(),
                    ),
                ],
            ),
            section(
                "Provenance",
                vec![Block::Facts(facts.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())],
            ),
        ],
    };
    std::io::stdout().write_all(report.html()?.as_bytes())?;
    Ok(())
}
