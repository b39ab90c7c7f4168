//! Finds the faces of one picture, turns the most certain one upright and writes it:
//! `cargo run --release --example align -- PICTURE CROP.png`.

use faceprior::data::Image;
use faceprior::faces::{Detector, DetectorConfig, similarity, template, warp};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(picture), Some(crop)) = (arguments.next(), arguments.next()) else {
        return Err("usage: align PICTURE CROP.png".into());
    };
    let image = Image::read(picture)?;
    let detector = Detector::new(DetectorConfig {
        min_face: 40.0,
        ..DetectorConfig::default()
    })?;
    let faces = detector.detect(&image);
    let best = faces.first().ok_or("no face found")?;
    let upright = similarity(&best.landmarks, &template(112, 112)).ok_or("the landmarks fall together")?;
    warp(&image, &upright, 112, 112).write(crop)?;
    Ok(())
}
