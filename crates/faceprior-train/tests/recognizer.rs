//! Stage 3 learns, refuses what does not fit, and says why.

mod common;

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use common::{pictures, scratch_stage, tiny};
use faceprior_data::{Loader, Position, SyntheticFaces};
use faceprior_nets::encoder::BackboneEncoderConfig;
use faceprior_nets::init::Init;
use faceprior_nets::irse::{BackboneConfig, Depth};
use faceprior_nets::weights::Weights;
use faceprior_train::TrainError;
use faceprior_train::driver::train;
use faceprior_train::embed::{EmbedOptions, Embedder, FaceRecognizer};
use faceprior_train::recipe::{Recipe, StageName};
use faceprior_train::run::{Run, Start};
use faceprior_train::schedule::Clock;
use faceprior_train::signals::Stop;
use faceprior_train::sources::Labelled;
use faceprior_train::stages::Stage;
use faceprior_train::stages::recognizer::RecognizerStage;

fn clock(stage: &dyn Stage, step: u64) -> Clock {
    let total_images = stage.budget().images;
    Clock {
        seed: stage.seed(),
        step,
        images: step * 4,
        total_images,
        epoch: step / 4,
    }
}

fn encoder(depth: Depth, width: usize) -> Weights {
    let device = Device::flex();
    let config = BackboneEncoderConfig {
        backbone: BackboneConfig {
            width,
            ..BackboneConfig::with_average(depth)
        },
        image_size: 32,
        num_ws: 2,
        latent_dim: 8,
    };
    let average = Tensor::full([3, 32, 32], 0.25, &device);
    config
        .init(&mut Init::new(5, &device))
        .to_weights(Tensor::zeros([8], &device), average)
}

fn from_encoder(recipe: &Recipe, encoder: &Weights) -> Result<RecognizerStage, TrainError> {
    RecognizerStage::from_encoder(recipe, encoder, pictures(), &Device::flex())
}

/// Steps on the same batch; the loss of each.
fn losses_on_one_batch(stage: &mut RecognizerStage, steps: u64) -> Vec<f64> {
    let feed = stage.feed().unwrap();
    let mut loader = Loader::new(feed.dataset, feed.transform, feed.config, Position::default()).unwrap();
    let batch = loader.next().unwrap();
    (0..steps)
        .map(|step| stage.step(batch.clone(), &clock(stage, step)).unwrap().loss)
        .collect()
}

#[test]
fn one_batch_is_learnt_by_heart() {
    for head in [
        "recognizer.head={ kind = \"arcface\", scale = 16, margin = 0.2 }",
        "recognizer.head={ kind = \"cosface\", scale = 16, margin = 0.1 }",
        "recognizer.head={ kind = \"softmax\" }",
    ] {
        let recipe = tiny(&[
            head,
            "recognizer.budget.images=10000",
            "recognizer.output_dropout=0",
            "recognizer.schedule={ kind = \"constant\" }",
            "scratch={ learning_rate = 0.05 }",
        ]);
        let losses = losses_on_one_batch(&mut scratch_stage(&recipe), 40);
        assert!(losses[39] < 0.05 * losses[0].max(0.5), "{head}: {losses:?}");
    }
}

#[test]
fn a_resting_body_keeps_its_parameters_and_its_statistics_as_asked() {
    for (update, statistics_move) in [("true", true), ("false", false)] {
        let recipe = tiny(&[
            "recognizer.freeze_epochs=1",
            "recognizer.warmup_images=0",
            // Slow and without the focal factor: on one batch learnt by heart there is no gradient left to see.
            "recognizer.learning_rate=0.001",
            "recognizer.loss=cross_entropy",
            &format!("recognizer.frozen_statistics_update={update}"),
        ]);
        let mut stage = from_encoder(&recipe, &encoder(Depth::D18, 16)).unwrap();
        let before = stage.state();
        losses_on_one_batch(&mut stage, 3);
        let frozen = stage.state();
        losses_on_one_batch(&mut stage, 6);
        let free = stage.state();
        let moved = |from: &Weights, to: &Weights, name: &str| {
            let name = format!("network.{name}");
            assert!(from.get(&name).is_some(), "{name}");
            from.get(&name) != to.get(&name)
        };
        for name in [
            "body.0.res_layer.1.weight",
            "body.7.res_layer.0.weight",
            "body.2.shortcut_layer.0.weight",
        ] {
            assert!(!moved(&before, &frozen, name), "{name} moved while it rested");
            assert!(moved(&frozen, &free, name), "{name} did not wake");
        }
        assert_eq!(
            moved(&before, &frozen, "body.3.res_layer.0.running_mean"),
            statistics_move
        );
        for name in [
            "input_layer.0.weight",
            "output_layer.3.weight",
            "input_layer.1.running_mean",
        ] {
            assert!(
                moved(&before, &frozen, name),
                "{name} should learn from the start"
            );
        }
    }
}

#[test]
fn the_encoder_gives_input_layer_body_and_average_image() {
    let encoder = encoder(Depth::D18, 16);
    for changes in [&[][..], &["recognizer.dropout=0.1"]] {
        let stage = from_encoder(&tiny(changes), &encoder).unwrap();
        let state = stage.state();
        let with_dropout = !changes.is_empty();
        for (ours, theirs) in [
            ("input_layer.0.weight", "input_layer.0.weight"),
            (
                if with_dropout {
                    "body.2.res_layer.4.weight"
                } else {
                    "body.2.res_layer.3.weight"
                },
                "body.2.res_layer.3.weight",
            ),
            (
                if with_dropout {
                    "body.2.shortcut_layer.2.running_var"
                } else {
                    "body.2.shortcut_layer.1.running_var"
                },
                "body.2.shortcut_layer.1.running_var",
            ),
        ] {
            let ours = state.get(&format!("network.{ours}")).unwrap();
            assert_eq!(Some(ours), encoder.get(&format!("encoder.{theirs}")), "{theirs}");
        }
        assert_eq!(state.get("average_image"), encoder.get("average_image"));
    }
}

#[test]
fn an_encoder_of_another_architecture_is_refused() {
    for (other, expected) in [
        (
            encoder(Depth::D34, 16),
            "it has depth 34, width 16, 6 channels, pictures of 32",
        ),
        (encoder(Depth::D18, 32), "it has depth 18, width 32"),
    ] {
        let error = from_encoder(&tiny(&[]), &other).err().unwrap().to_string();
        assert!(
            error.contains(expected) && error.contains("hint: train both with one recipe"),
            "{error}"
        );
    }
    let stage = scratch_stage(&tiny(&[]));
    let recognizer = &stage.export().unwrap()[0].1;
    let error = from_encoder(&tiny(&[]), recognizer).err().unwrap().to_string();
    assert!(error.contains("it holds recognizer, expected encoder"), "{error}");
}

#[test]
fn a_checkpoint_of_another_architecture_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let budget = "recognizer.budget={ images = 4, batch_size = 4, record_every = 4, evaluate_every = 9, checkpoint_every = 4, keep = 1 }";
    let small = tiny(&[budget]);
    let run = || Run::open(dir.path(), StageName::Scratch, &small, Start::ResumeOrBegin).unwrap();
    train(&mut scratch_stage(&small), &mut run(), &Stop::new(), &mut ()).unwrap();
    let mut wide = scratch_stage(&tiny(&[budget, "backbone.width=32"]));
    let error = train(&mut wide, &mut run(), &Stop::new(), &mut ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cannot resume from checkpoint") && error.contains("step-000000001"),
        "{error}"
    );
    assert!(error.contains("hint:") && error.contains("expected ["), "{error}");
    train(&mut scratch_stage(&small), &mut run(), &Stop::new(), &mut ()).unwrap();
}

#[test]
fn a_diverging_run_names_step_and_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = tiny(&["scratch={ learning_rate = 1e30 }"]);
    let mut run = Run::open(dir.path(), StageName::Scratch, &recipe, Start::ResumeOrBegin).unwrap();
    let error = train(&mut scratch_stage(&recipe), &mut run, &Stop::new(), &mut ()).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
    assert!(error.to_string().contains("training diverged at step"), "{error}");
}

#[test]
fn one_identity_is_not_enough() {
    let alone = Labelled {
        train: Arc::new(SyntheticFaces::new(1, 1, 4, 36)),
        validation: None,
    };
    let error = RecognizerStage::from_scratch(&tiny(&[]), alone, &Device::flex())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("has 1 identities, a recogniser needs at least two"),
        "{error}"
    );
}

#[test]
fn an_export_embeds_like_the_network_that_made_it() {
    let recipe = tiny(&[]);
    let mut stage = scratch_stage(&recipe);
    losses_on_one_batch(&mut stage, 3);
    let dir = tempfile::tempdir().unwrap();
    let (name, weights) = stage.export().unwrap().remove(0);
    let path = dir.path().join(name);
    weights.write(&path).unwrap();
    assert!(
        weights.get("encoder.body.0.res_layer.1.weight").is_some(),
        "the published form's names"
    );
    let read = FaceRecognizer::from_weights(&Weights::read(&path).unwrap(), &Device::flex()).unwrap();
    let pairs = pictures().validation.unwrap();
    let options = EmbedOptions::from(&recipe.eval);
    let embed = |network: &dyn Embedder| pairs.embed(network, options, &mut |_| ()).unwrap();
    assert_eq!(embed(&read), embed(&stage.recognizer()));
}
