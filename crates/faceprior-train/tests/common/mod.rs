//! What the tests of the stages share: a tiny recipe and pictures.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use faceprior_data::SyntheticFaces;
use faceprior_train::embed::PairSet;
use faceprior_train::recipe::Recipe;
use faceprior_train::sources::Labelled;
use faceprior_train::stages::recognizer::RecognizerStage;

/// The demo recipe at its smallest: 32² pictures, batches of 4.
pub(crate) fn tiny(changes: &[&str]) -> Recipe {
    let smallest = [
        "recognizer.embedding_dim=16",
        "recognizer.warmup_images=8",
        "recognizer.margin_ramp_images=16",
        "recognizer.freeze_epochs=1",
        "recognizer.budget={ images = 40, batch_size = 4, record_every = 8, evaluate_every = 20, checkpoint_every = 12, keep = 2 }",
    ];
    let changes: Vec<String> = smallest
        .iter()
        .chain(changes)
        .map(|&change| change.to_owned())
        .collect();
    Recipe::load("demo", &changes).unwrap()
}

/// Four people with four pictures each to train on, three others to validate on.
pub(crate) fn pictures() -> Labelled {
    let others = Arc::new(SyntheticFaces::new(3, 3, 4, 36).starting_at(4));
    Labelled {
        train: Arc::new(SyntheticFaces::new(3, 4, 4, 36)),
        validation: Some(PairSet::sample(others, 24, 1).unwrap()),
    }
}

pub(crate) fn scratch_stage(recipe: &Recipe) -> RecognizerStage {
    RecognizerStage::from_scratch(recipe, pictures(), &Device::flex()).unwrap()
}

pub(crate) fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    let path = path.as_ref();
    std::fs::read(path).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}
