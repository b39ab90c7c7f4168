//! Stages 1 and 2 learn, resume bit by bit, hand on what the next stage needs, and say what does not fit.

mod common;

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use common::{bytes, pictures, tiny};
use faceprior_data::{Dataset, Loader, Position, SyntheticFaces};
use faceprior_nets::weights::Weights;
use faceprior_train::driver::{Event, Outcome, Reporter, train};
use faceprior_train::recipe::{Recipe, StageName};
use faceprior_train::run::{Run, Start, read_log};
use faceprior_train::schedule::Clock;
use faceprior_train::signals::Stop;
use faceprior_train::stages::Stage;
use faceprior_train::stages::encoder::EncoderStage;
use faceprior_train::stages::prior::PriorStage;
use faceprior_train::stages::recognizer::RecognizerStage;

/// Both stages at their smallest: 12 steps of 4 pictures, every penalty and evaluation on the way.
fn recipe(changes: &[&str]) -> Recipe {
    let budget = "{ images = 48, batch_size = 4, record_every = 8, evaluate_every = 20, checkpoint_every = 12, keep = 9 }";
    let (prior, encoder) = (
        format!("prior.budget={budget}"),
        format!("encoder.budget={budget}"),
    );
    let smallest = [
        "prior.latent_dim=16",
        "prior.channel_base=256",
        "prior.channel_max=16",
        "prior.latent_avg_samples=200",
        "prior.samples=4",
        "prior.path_length={ weight = 8.0, every = 2 }",
        "prior.r1={ weight = 12.0, every = 3 }",
        "encoder.iterations_per_batch=2",
        "encoder.w_norm_weight=0.001",
        "encoder.validation_images=6",
        "encoder.samples=2",
        &prior,
        &encoder,
    ];
    tiny(&smallest.iter().chain(changes).copied().collect::<Vec<_>>())
}

fn faces() -> Arc<dyn Dataset> {
    Arc::new(SyntheticFaces::new(3, 30, 1, 36))
}

fn prior_stage(recipe: &Recipe) -> PriorStage {
    PriorStage::new(recipe, faces(), &Device::flex()).unwrap()
}

/// The exports of a prior that has taken no step.
fn fresh_prior(recipe: &Recipe) -> (Weights, Weights) {
    let mut exports = prior_stage(recipe)
        .export()
        .unwrap()
        .into_iter()
        .map(|(_, weights)| weights);
    (exports.next().unwrap(), exports.next().unwrap())
}

fn encoder_stage(recipe: &Recipe) -> EncoderStage {
    let (generator, discriminator) = fresh_prior(recipe);
    EncoderStage::new(recipe, &generator, &discriminator, faces(), &Device::flex()).unwrap()
}

/// Steps on the same batch; the loss of each.
fn losses_on_one_batch(stage: &mut dyn Stage, steps: u64) -> Vec<f64> {
    let feed = stage.feed().unwrap();
    let mut loader = Loader::new(feed.dataset, feed.transform, feed.config, Position::default()).unwrap();
    let batch = loader.next().unwrap();
    (0..steps)
        .map(|step| stage.step(batch.clone(), &clock(stage, step)).unwrap().loss)
        .collect()
}

fn clock(stage: &dyn Stage, step: u64) -> Clock {
    Clock {
        seed: stage.seed(),
        step,
        images: step * 4,
        total_images: stage.budget().images,
        epoch: 0,
    }
}

fn evaluated(stage: &dyn Stage, name: &str) -> f64 {
    let evaluation = stage.evaluate(&clock(stage, 0)).unwrap();
    evaluation
        .values
        .iter()
        .find(|(found, _)| found == name)
        .unwrap()
        .1
}

#[test]
fn the_prior_comes_nearer_to_its_pictures() {
    let recipe = recipe(&[
        "prior.samples=9",
        "prior.budget.batch_size=8",
        "prior.ema_decay=0.9",
    ]);
    let mut stage = prior_stage(&recipe);
    let before = evaluated(&stage, "sample_distance");
    let losses = losses_on_one_batch(&mut stage, 60);
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    let after = evaluated(&stage, "sample_distance");
    let floor = evaluated(&stage, "sample_distance_of_reals");
    assert!(
        after < 0.5 * before && after > floor,
        "{before} → {after}, reals {floor}"
    );
}

#[test]
fn the_encoder_learns_one_batch_by_heart() {
    let recipe = recipe(&["encoder.iterations_per_batch=1", "encoder.learning_rate=0.002"]);
    let losses = losses_on_one_batch(&mut encoder_stage(&recipe), 60);
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn the_path_from_the_prior_to_the_recogniser_is_whole() {
    let recipe = recipe(&[]);
    let mut prior = prior_stage(&recipe);
    losses_on_one_batch(&mut prior, 3);
    let exports = prior.export().unwrap();
    let names: Vec<&str> = exports.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["generator.safetensors", "discriminator.safetensors"]);
    let (generator, discriminator) = (&exports[0].1, &exports[1].1);
    assert!(generator.get("latent_avg").is_some() && generator.get("average_image").is_some());

    let mut encoder = EncoderStage::new(&recipe, generator, discriminator, faces(), &Device::flex()).unwrap();
    losses_on_one_batch(&mut encoder, 2);
    let encoder = encoder.export().unwrap();
    assert_eq!(encoder[0].0, "encoder.safetensors");
    assert_eq!(encoder[0].1.get("latent_avg"), generator.get("latent_avg"));
    assert_eq!(encoder[0].1.get("average_image"), generator.get("average_image"));
    RecognizerStage::from_encoder(&recipe, &encoder[0].1, pictures(), &Device::flex()).unwrap();
}

#[test]
fn a_fresh_prior_follows_from_its_recipe() {
    let recipe = recipe(&[]);
    let (one, other) = (fresh_prior(&recipe), fresh_prior(&recipe));
    for name in [
        "synthesis.first_block.const",
        "mapping.layers.1.weight",
        "latent_avg",
        "average_image",
    ] {
        assert_eq!(one.0.get(name), other.0.get(name), "{name}");
    }
    assert_eq!(one.1.get("net.0.weight"), other.1.get("net.0.weight"));
}

#[test]
fn exports_of_something_else_are_refused() {
    let recipe = recipe(&[]);
    let (generator, discriminator) = fresh_prior(&recipe);
    let error = |prior: &Weights, discriminator: &Weights| {
        EncoderStage::new(&recipe, prior, discriminator, faces(), &Device::flex())
            .err()
            .unwrap()
            .to_string()
    };
    assert!(error(&discriminator, &discriminator).contains("it holds discriminator, expected generator"));
    assert!(error(&generator, &generator).contains("it holds generator, expected discriminator"));
    let huge = PriorStage::new(
        &self::recipe(&["prior.latent_dim=100000"]),
        faces(),
        &Device::flex(),
    );
    assert!(
        huge.err()
            .unwrap()
            .to_string()
            .contains("prior.latent_dim is 100000, expected 1 to 8192")
    );
}

#[test]
fn a_checkpoint_of_another_prior_is_refused() {
    let state = encoder_stage(&recipe(&[])).state();
    let mut other = encoder_stage(&recipe(&["seed=2"]));
    let error = other.load_state(&state).unwrap_err().to_string();
    assert!(
        error.contains("another prior") && error.contains("hint"),
        "{error}"
    );
    encoder_stage(&recipe(&[])).load_state(&state).unwrap();
}

#[test]
fn evaluations_show_pictures_and_change_nothing() {
    let recipe = recipe(&[]);
    let (prior, encoder) = (prior_stage(&recipe), encoder_stage(&recipe));
    for (stage, sheets) in [
        (&prior as &dyn Stage, &["samples", "samples-without-average"][..]),
        (&encoder as &dyn Stage, &["reconstructions"][..]),
    ] {
        let before = stage.state();
        let (first, second) = (
            stage.evaluate(&clock(stage, 5)).unwrap(),
            stage.evaluate(&clock(stage, 5)).unwrap(),
        );
        assert_eq!(first.values, second.values);
        assert_eq!(first.score, second.score);
        let names: Vec<&str> = first.pictures.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, sheets);
        assert!(first.pictures.iter().all(|(_, picture)| picture.width() >= 66));
        let after = stage.state();
        assert!(
            before.names().eq(after.names())
                && before.names().all(|name| before.get(name) == after.get(name))
        );
    }
    // Two iterations: the first one's numbers carry its number.
    let evaluation = encoder.evaluate(&clock(&encoder, 5)).unwrap();
    let names: Vec<&str> = evaluation.values.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "loss_1",
            "mse_1",
            "perceptual_1",
            "loss",
            "mse",
            "perceptual",
            "mse_of_mean_picture"
        ]
    );
}

/// Asks to stop after a step.
struct Watch {
    stop_after: u64,
    stop: Stop,
}

impl Reporter for Watch {
    fn report(&mut self, event: Event<'_>) {
        if let Event::Step { clock, .. } = event
            && clock.step == self.stop_after
        {
            self.stop.request();
        }
    }
}

fn go(stage: &mut dyn Stage, recipe: &Recipe, dir: &Path, stop_after: u64) -> Outcome {
    let mut run = Run::open(dir, stage.name(), recipe, Start::ResumeOrBegin).unwrap();
    let stop = Stop::new();
    train(
        stage,
        &mut run,
        &stop,
        &mut Watch {
            stop_after,
            stop: stop.clone(),
        },
    )
    .unwrap()
}

fn interrupted_runs_end_like_uninterrupted_ones(
    make: &dyn Fn(&Recipe) -> Box<dyn Stage>,
    name: StageName,
    exports: &[&str],
) {
    let recipe = recipe(&[]);
    let root = tempfile::tempdir().unwrap();
    let whole = root.path().join("whole");
    assert!(matches!(
        go(&mut *make(&recipe), &recipe, &whole, 0),
        Outcome::Finished { .. }
    ));
    // Right before and right after steps with penalties, an evaluation and a checkpoint.
    for step in [1, 5, 8] {
        let stopped = root.path().join(format!("stopped after {step}"));
        assert!(matches!(
            go(&mut *make(&recipe), &recipe, &stopped, step),
            Outcome::Stopped { .. }
        ));
        assert!(matches!(
            go(&mut *make(&recipe), &recipe, &stopped, 0),
            Outcome::Finished { .. }
        ));
        let checkpoint = "checkpoints/step-000000012/state.safetensors";
        for file in exports.iter().copied().chain([checkpoint]) {
            assert!(
                bytes(whole.join(file)) == bytes(stopped.join(file)),
                "{name}: {file} of {stopped:?}"
            );
        }
        let log = |dir: &Path| {
            let mut records = read_log(dir).unwrap();
            for record in &mut records {
                record.as_object_mut().unwrap().remove("images_per_second");
            }
            records
        };
        assert_eq!(log(&whole), log(&stopped));
    }
}

#[test]
fn an_interrupted_prior_ends_like_an_uninterrupted_one() {
    interrupted_runs_end_like_uninterrupted_ones(
        &|recipe| Box::new(prior_stage(recipe)),
        StageName::Prior,
        &["export/generator.safetensors", "export/discriminator.safetensors"],
    );
}

#[test]
fn an_interrupted_encoder_ends_like_an_uninterrupted_one() {
    interrupted_runs_end_like_uninterrupted_ones(
        &|recipe| Box::new(encoder_stage(recipe)),
        StageName::Encoder,
        &["export/encoder.safetensors"],
    );
}
