//! Pictures a second that `align` gets through: reading, detecting, warping and writing.
//!
//! `cargo run --release -p faceprior-faces --example align_rate -- FOLDER [PICTURES] [THREADS] [MIN_FACE]`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use faceprior_data::files::{list_images, write_list};
use faceprior_faces::{AlignOptions, AlignSettings, DetectorConfig, align};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = std::fs::canonicalize(arguments.first().ok_or("which folder of pictures?")?)?;
    let number = |i: usize, default: usize| arguments.get(i).map_or(Ok(default), |text| text.parse());
    let (pictures, threads, min_face) = (number(1, 200)?, number(2, 1)?, number(3, 40)?);

    let all = list_images(&folder)?;
    let step = (all.len() / pictures).max(1);
    let chosen: Vec<PathBuf> = all
        .iter()
        .step_by(step)
        .take(pictures)
        .map(|path| folder.join(path))
        .collect();
    let out = tempfile::tempdir()?;
    let list = out.path().join("list.txt");
    write_list(&list, &chosen)?;
    let options = AlignOptions {
        settings: AlignSettings {
            detector: DetectorConfig {
                min_face: min_face as f64,
                ..DetectorConfig::default()
            },
            ..AlignSettings::default()
        },
        threads: Some(threads),
        ..AlignOptions::default()
    };
    let summary = align(
        &list,
        &out.path().join("crops"),
        &options,
        &|_| {},
        &AtomicBool::new(false),
    )?;
    println!(
        "{} pictures, {} faces, {threads} threads, min face {min_face}: {:.1} s, {:.1} pictures/s",
        summary.counts.pictures,
        summary.counts.faces,
        summary.seconds,
        summary.counts.pictures as f64 / summary.seconds
    );
    Ok(())
}
