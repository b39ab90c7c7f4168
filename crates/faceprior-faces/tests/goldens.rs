//! Detections and crops against those of the reference system.
//!
//! `goldens/mtcnn` holds the one photograph that may be shipped; the other ten are found only where the shared data
//! are, and are compared by the ignored tests.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use faceprior_data::Image;
use faceprior_faces::{Affine, Detector, DetectorConfig, Face, Landmarks, similarity, template, warp};
use serde_json::Value;

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/mtcnn")
}

fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

fn settings() -> [(&'static str, bool, DetectorConfig); 3] {
    let default = DetectorConfig::default();
    [
        ("default", false, default.clone()),
        ("seed", true, DetectorConfig::seed()),
        (
            "min40",
            true,
            DetectorConfig {
                min_face: 40.0,
                ..default
            },
        ),
    ]
}

#[derive(Default, Debug)]
struct Tally {
    faces: usize,
    /// Faces at the same place of the order, box within 1 pixel, landmarks within 0.5.
    matched: usize,
    boxes: f64,
    landmarks: f64,
    scores: f64,
}

impl Tally {
    fn compare(&mut self, what: &str, found: &[Face], golden: &Value) {
        let (boxes, landmarks) = (
            golden["boxes"].as_array().unwrap(),
            golden["landmarks"].as_array().unwrap(),
        );
        self.faces += boxes.len().max(found.len());
        if found.len() != boxes.len() {
            println!("{what}: {} faces, expected {}", found.len(), boxes.len());
        }
        for (i, (face, (expected_box, expected_points))) in
            found.iter().zip(boxes.iter().zip(landmarks)).enumerate()
        {
            let (expected_box, expected_points) = (numbers(expected_box), numbers(expected_points));
            let farthest = |pairs: &mut dyn Iterator<Item = (f32, f64)>| {
                pairs.map(|(a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
            };
            let of_box = farthest(&mut face.bounds.into_iter().zip(expected_box.iter().copied()));
            let of_points =
                farthest(&mut (0..10).map(|k| (face.landmarks[k % 5][k / 5], expected_points[k])));
            if of_box <= 1.0 && of_points <= 0.5 {
                self.matched += 1;
                self.boxes = self.boxes.max(of_box);
                self.landmarks = self.landmarks.max(of_points);
                self.scores = self.scores.max((f64::from(face.score) - expected_box[4]).abs());
            } else {
                println!(
                    "{what}: face {i} of {}: box off by {of_box:.3}, landmarks by {of_points:.3}",
                    boxes.len()
                );
            }
        }
    }
}

fn detect_all(folder: &Path, golden: &Value, detector: impl Fn(DetectorConfig) -> Detector) -> Tally {
    let mut tally = Tally::default();
    for (name, golden) in golden.as_object().unwrap() {
        let image = Image::read(folder.join(name)).unwrap();
        for (setting, padded, config) in settings() {
            let image = if padded {
                image.pad_to_square()
            } else {
                image.clone()
            };
            let found = detector(config).detect(&image);
            tally.compare(&format!("{name} {setting}"), &found, &golden[setting]);
        }
    }
    tally
}

#[test]
fn detects_as_the_reference() {
    let golden = read_json(&shipped().join("detections.json"));
    let tally = detect_all(&shipped(), &golden, |config| Detector::new(config).unwrap());
    println!("{tally:?}");
    assert_eq!((tally.faces, tally.matched), (3, 3));
    assert!(
        tally.boxes < 2e-3 && tally.landmarks < 2e-3 && tally.scores < 1e-5,
        "{tally:?}"
    );
}

#[test]
fn the_networks_on_a_device_find_the_same_faces() {
    let golden = read_json(&shipped().join("detections.json"));
    let image = Image::read(shipped().join("astronaut.png")).unwrap();
    let detector = Detector::on_device(DetectorConfig::seed(), &Device::flex()).unwrap();
    let mut tally = Tally::default();
    tally.compare(
        "astronaut.png seed",
        &detector.detect(&image),
        &golden["astronaut.png"]["seed"],
    );
    assert_eq!((tally.faces, tally.matched), (1, 1));
    assert!(
        tally.boxes < 2e-3 && tally.landmarks < 2e-3 && tally.scores < 1e-5,
        "{tally:?}"
    );
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn detects_as_the_reference_on_all_photographs() {
    let folder = shared().join("golden/mtcnn");
    let golden = read_json(&folder.join("detections.json"));
    let tally = detect_all(&folder.join("images"), &golden, |config| {
        Detector::new(config).unwrap()
    });
    println!("{tally:?}");
    assert_eq!((tally.faces, tally.matched), (233, 233));
    assert!(
        tally.boxes < 2e-3 && tally.landmarks < 2e-3 && tally.scores < 1e-5,
        "{tally:?}"
    );
}

/// Warps by the golden matrices and by our own; answers pixels compared, how many differ with the golden matrix, and
/// the largest difference with the golden matrix and with our own.
fn compare_crops(images: &Path, crops: &Path, golden: &Value) -> (usize, usize, u8, u8) {
    let (mut pixels, mut differ, mut largest, mut largest_own) = (0, 0, 0, 0);
    for (name, golden) in golden.as_object().unwrap() {
        let image = Image::read(images.join(name)).unwrap().pad_to_square();
        for golden in golden["aligned"].as_array().unwrap() {
            let size = golden["size"].as_u64().unwrap() as usize;
            let points = golden["landmarks"].as_array().unwrap();
            let landmarks: Landmarks = std::array::from_fn(|i| {
                let point = numbers(&points[i]);
                [point[0] as f32, point[1] as f32]
            });
            let own = similarity(&landmarks, &template(size, size)).unwrap();
            let rows = golden["matrix"].as_array().unwrap();
            let expected = Affine([0, 1].map(|i| numbers(&rows[i]).try_into().unwrap()));
            // The reference computes its matrices in single precision.
            for (own, expected) in own.0.iter().zip(&expected.0) {
                let off = |i: usize| (own[i] - expected[i]).abs();
                assert!(
                    off(0) < 2e-6 && off(1) < 2e-6 && off(2) < 1e-3,
                    "{own:?} {expected:?}"
                );
            }
            let crop = Image::read(crops.join(golden["file"].as_str().unwrap())).unwrap();
            assert_eq!((crop.width(), crop.height()), (size, size));
            let (by_golden, by_own) = (
                warp(&image, &expected, size, size),
                warp(&image, &own, size, size),
            );
            for ((expected, a), b) in crop.pixels().iter().zip(by_golden.pixels()).zip(by_own.pixels()) {
                pixels += 1;
                differ += usize::from(a != expected);
                largest = largest.max(a.abs_diff(*expected));
                largest_own = largest_own.max(b.abs_diff(*expected));
            }
        }
    }
    (pixels, differ, largest, largest_own)
}

#[test]
fn aligns_as_the_reference() {
    let golden = read_json(&shipped().join("detections.json"));
    let (pixels, differ, largest, largest_own) = compare_crops(&shipped(), &shipped(), &golden);
    assert_eq!(pixels, (112 * 112 + 256 * 256) * 3);
    assert_eq!((differ, largest), (0, 0));
    assert!(largest_own <= 1);
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn aligns_as_the_reference_on_all_photographs() {
    let folder = shared().join("golden/mtcnn");
    let golden = read_json(&folder.join("detections.json"));
    let (pixels, differ, largest, largest_own) =
        compare_crops(&folder.join("images"), &folder.join("aligned"), &golden);
    println!(
        "{differ} of {pixels} pixels differ, by {largest} at the most, {largest_own} with our own matrices"
    );
    assert!(pixels > 4_000_000);
    assert_eq!((differ, largest), (0, 0));
    assert!(largest_own <= 1);
}
