//! The one loop that trains every stage.
//!
//! The driver owns the clock (images seen), records, evaluations, checkpoints, signals, the guard against numbers
//! that left the reals, and progress. A [`Stage`] is its state and its step. Nothing here knows which stage runs.
//!
//! Per step: batch → seed of the device → [`Stage::step`] → guard → record, if due → evaluation, if due →
//! checkpoint, if due or best so far. Everything that is due is due by images seen, so that it does not depend on
//! when a run was interrupted; a checkpoint that a signal asked for changes nothing of what follows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use faceprior_data::{Batch, Loader, Position};
use faceprior_nets::weights::{self, Weights};
use faceprior_ops::{Activations, is_cpu};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::{Checkpoint, Mark};
use crate::recipe::{Budget, StageName};
use crate::run::Run;
use crate::schedule::Clock;
use crate::signals::Stop;
use crate::stages::{Evaluation, Report, Stage};

/// How a run ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The budget is used up and the results are in `export/`.
    Finished {
        /// The files written.
        exports: Vec<PathBuf>,
        /// The step whose state was exported.
        step: u64,
        /// Its score, if the stage scores itself; higher is better.
        score: Option<f64>,
    },
    /// It was asked to leave and can be resumed.
    Stopped {
        /// The checkpoint to resume from.
        checkpoint: PathBuf,
        /// Images seen.
        images: u64,
        /// Images of the whole budget.
        total_images: u64,
    },
}

/// What happens, as it happens. Printing it is the program's business.
#[derive(Debug)]
pub enum Event<'a> {
    /// The first step is about to be taken.
    Started {
        /// The stage.
        stage: StageName,
        /// Images already seen.
        images: u64,
        /// Images of the whole budget.
        total_images: u64,
        /// The checkpoint that the run goes on from.
        resumed_from: Option<&'a Path>,
    },
    /// A step was taken.
    Step {
        /// The clock after it.
        clock: &'a Clock,
        /// Losses and other numbers of this step.
        report: &'a Report,
        /// Recent speed, evaluations and checkpoints left out.
        images_per_second: f64,
        /// Time to the end of the budget at that speed.
        remaining: Duration,
    },
    /// An evaluation begins; it may take a while.
    Evaluating {
        /// The clock.
        clock: &'a Clock,
    },
    /// An evaluation ended and has something to say.
    Evaluated {
        /// The clock.
        clock: &'a Clock,
        /// Its numbers and pictures.
        evaluation: &'a Evaluation,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Its folder.
        path: &'a Path,
    },
    /// Something that the user should see; the run goes on.
    Warning {
        /// What.
        message: &'a str,
    },
}

/// Receives [`Event`]s.
pub trait Reporter {
    /// Called from the training thread; it should return soon.
    fn report(&mut self, event: Event<'_>);
}

/// Reports nothing.
impl Reporter for () {
    fn report(&mut self, _event: Event<'_>) {}
}

/// Trains a stage in a run directory to the end of its budget, from the newest checkpoint there if there is one.
///
/// # Errors
/// Whatever the pictures, the stage or the disk give; [`TrainError::Diverged`] when the loss or a parameter is no
/// longer finite; [`TrainError::CheckpointMismatch`] and [`TrainError::OtherStage`] for a checkpoint that does not
/// fit. The last checkpoint is good in every case.
pub fn train(
    stage: &mut dyn Stage,
    run: &mut Run,
    stop: &Stop,
    reporter: &mut dyn Reporter,
) -> Result<Outcome, TrainError> {
    check_activations(stage.activations(), stage.device())?;
    let mut driver = Driver {
        budget: stage.budget().clone(),
        progress: Progress::start(stage.seed()),
        saved_at: None,
        speed: Speed::default(),
        stage,
        run,
        reporter,
    };
    let resumed_from = driver.restore()?;
    driver.reporter.report(Event::Started {
        stage: driver.stage.name(),
        images: driver.progress.images,
        total_images: driver.budget.images,
        resumed_from: resumed_from.as_deref(),
    });
    if driver.progress.images < driver.budget.images {
        let feed = driver.stage.feed()?;
        let mut loader = Loader::new(
            feed.dataset,
            feed.transform,
            feed.config,
            driver.progress.position,
        )?;
        while driver.progress.images < driver.budget.images {
            if stop.requested() {
                return driver.leave();
            }
            let batch = loader.next()?;
            driver.step(batch, loader.position(), loader.unreadable().len())?;
        }
    }
    driver.finish()
}

/// Whether activations can wait like that on a device.
///
/// # Errors
/// [`TrainError::Invalid`] for a device that would not heed it.
pub fn check_activations(activations: Activations, device: &Device) -> Result<(), TrainError> {
    if activations == Activations::default() || is_cpu(device) {
        return Ok(());
    }
    Err(TrainError::Invalid(format!(
        "{activations:?} are for the CPU, and the device is another\n\
         hint: give --device cpu, or leave precision and recompute as they are"
    )))
}

/// What the driver itself must remember over an interruption.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Progress {
    seed: u64,
    step: u64,
    images: u64,
    position: Position,
    /// Sums and counts of the numbers since the last record. The sums are bits, since JSON may lose the last one.
    window: BTreeMap<String, (u64, u64)>,
}

impl Progress {
    fn start(seed: u64) -> Self {
        Self {
            seed,
            step: 0,
            images: 0,
            position: Position::default(),
            window: BTreeMap::new(),
        }
    }

    fn add(&mut self, name: &str, value: f64) {
        let (sum, count) = self.window.entry(name.to_owned()).or_default();
        *sum = (f64::from_bits(*sum) + value).to_bits();
        *count += 1;
    }

    fn means(&mut self) -> Vec<(String, f64)> {
        let window = std::mem::take(&mut self.window);
        window
            .into_iter()
            .map(|(name, (sum, count))| (name, f64::from_bits(sum) / count as f64))
            .collect()
    }
}

/// Images per second over the last dozen of steps or so.
#[derive(Debug, Default)]
struct Speed {
    seconds_per_image: Option<f64>,
}

impl Speed {
    fn add(&mut self, images: u64, elapsed: Duration) {
        let now = elapsed.as_secs_f64() / images.max(1) as f64;
        self.seconds_per_image = Some(
            self.seconds_per_image
                .map_or(now, |before| 0.9 * before + 0.1 * now),
        );
    }

    fn images_per_second(&self) -> f64 {
        self.seconds_per_image
            .map_or(0.0, |seconds| 1.0 / seconds.max(1e-9))
    }

    fn time_for(&self, images: u64) -> Duration {
        Duration::try_from_secs_f64(images as f64 * self.seconds_per_image.unwrap_or(0.0))
            .unwrap_or(Duration::MAX)
    }
}

const PROGRESS: &str = "faceprior.progress";

struct Driver<'a> {
    stage: &'a mut dyn Stage,
    run: &'a mut Run,
    reporter: &'a mut dyn Reporter,
    budget: Budget,
    progress: Progress,
    saved_at: Option<u64>,
    speed: Speed,
}

impl Driver<'_> {
    fn clock(&self) -> Clock {
        let Progress {
            seed,
            step,
            images,
            ref position,
            ..
        } = self.progress;
        Clock {
            seed,
            step,
            images,
            total_images: self.budget.images,
            epoch: position.epoch,
        }
    }

    /// Takes up the newest checkpoint, if there is one, and drops the records after it.
    fn restore(&mut self) -> Result<Option<PathBuf>, TrainError> {
        let (newest, problems) = self.run.checkpoints().newest()?;
        let path = match newest {
            Some(checkpoint) => {
                self.progress = load(self.stage, &checkpoint)?;
                self.saved_at = Some(self.progress.step);
                Some(checkpoint.path)
            }
            None => None,
        };
        self.run.rewind_log(self.progress.step)?;
        for problem in problems {
            self.warn(&format!("{problem}; going on from the one before it"))?;
        }
        Ok(path)
    }

    fn step(&mut self, batch: Batch, next: Position, unreadable: usize) -> Result<(), TrainError> {
        let seen = batch.len() as u64;
        let started = Instant::now();
        let wait = batch.wait;
        let before = Clock {
            epoch: batch.position.epoch,
            ..self.clock()
        };
        // Dropout and other draws inside the networks come from the device's generator.
        self.stage.device().seed(before.rng("device").next_u64());
        let activations = self.stage.activations();
        let report = activations.scope(|| self.stage.step(batch, &before))?;
        self.progress.step += 1;
        self.progress.images += seen;
        self.progress.position = next;
        if !report.loss.is_finite() {
            return Err(self.diverged(format!("the loss is {}", report.loss))?);
        }
        self.progress.add("loss", report.loss);
        for (name, value) in &report.values {
            self.progress.add(name, *value);
        }
        self.speed.add(seen, started.elapsed() + wait);
        let clock = self.clock();
        self.reporter.report(Event::Step {
            clock: &clock,
            report: &report,
            images_per_second: self.speed.images_per_second(),
            remaining: self
                .speed
                .time_for(clock.total_images.saturating_sub(clock.images)),
        });
        for warning in &report.warnings {
            self.warn(warning)?;
        }
        if self.due(seen, self.budget.record_every) {
            self.record(unreadable)?;
        }
        let mut save = self.due(seen, self.budget.checkpoint_every);
        let mut score = None;
        if self.due(seen, self.budget.evaluate_every) {
            score = self.evaluate()?;
            let best = self.run.checkpoints().best()?.map(|(_, best, _)| best);
            save |= score.is_some_and(|score| best.is_none_or(|best| score > best));
        }
        if save {
            self.save(score)?;
        }
        Ok(())
    }

    /// Whether the last `seen` images crossed a multiple of `interval`, or the end.
    fn due(&self, seen: u64, interval: u64) -> bool {
        let now = self.progress.images;
        now / interval > (now - seen) / interval || now >= self.budget.images
    }

    fn record(&mut self, unreadable: usize) -> Result<(), TrainError> {
        let clock = self.clock();
        let mut fields = BTreeMap::from([
            ("epoch".to_owned(), Value::from(clock.epoch)),
            (
                "images_per_second".to_owned(),
                self.speed.images_per_second().into(),
            ),
        ]);
        if unreadable > 0 {
            fields.insert("unreadable_pictures".to_owned(), unreadable.into());
        }
        fields.extend(
            self.progress
                .means()
                .into_iter()
                .map(|(name, mean)| (name, mean.into())),
        );
        self.run.record("step", clock.step, clock.images, fields)
    }

    fn evaluate(&mut self) -> Result<Option<f64>, TrainError> {
        let clock = self.clock();
        self.reporter.report(Event::Evaluating { clock: &clock });
        self.stage
            .device()
            .seed(clock.rng("device, evaluation").next_u64());
        let evaluation = self.stage.evaluate(&clock)?;
        for (name, picture) in &evaluation.pictures {
            let name = format!("step-{:09}-{name}.png", clock.step);
            picture.write(self.run.samples_dir().join(name))?;
        }
        let mut fields: Vec<(String, Value)> = evaluation
            .values
            .iter()
            .map(|(name, value)| (name.clone(), (*value).into()))
            .collect();
        fields.extend(evaluation.score.map(|score| ("score".to_owned(), score.into())));
        if !fields.is_empty() {
            self.run.record("evaluation", clock.step, clock.images, fields)?;
            self.reporter.report(Event::Evaluated {
                clock: &clock,
                evaluation: &evaluation,
            });
        }
        Ok(evaluation.score)
    }

    fn save(&mut self, score: Option<f64>) -> Result<PathBuf, TrainError> {
        let mut state = self.stage.state();
        if let Some(name) = not_finite(&state) {
            return Err(self.diverged(format!("{name} has values that are not finite"))?);
        }
        state.set_metadata(
            PROGRESS,
            serde_json::to_string(&self.progress).expect("plain data has a JSON form"),
        );
        self.run.sync_log()?;
        let mark = Mark {
            stage: self.stage.name(),
            step: self.progress.step,
            images: self.progress.images,
            score,
            recipe_hash: self.run.recipe_hash(),
        };
        let path = self.run.checkpoints().write(&state, mark, self.budget.keep)?;
        self.saved_at = Some(self.progress.step);
        self.reporter.report(Event::Checkpoint { path: &path });
        Ok(path)
    }

    fn leave(&mut self) -> Result<Outcome, TrainError> {
        let checkpoint = match self.run.checkpoints().newest_path()? {
            Some(path) if self.saved_at == Some(self.progress.step) => path,
            _ => self.save(None)?,
        };
        Ok(Outcome::Stopped {
            checkpoint,
            images: self.progress.images,
            total_images: self.budget.images,
        })
    }

    /// Exports the best state, or the last if the stage does not score itself.
    fn finish(&mut self) -> Result<Outcome, TrainError> {
        let (mut step, mut score) = (self.progress.step, None);
        if let Some((best, best_score, path)) = self.run.checkpoints().best()? {
            score = Some(best_score);
            if best != step {
                load(self.stage, &self.run.checkpoints().read(&path)?)?;
                step = best;
            }
        }
        let dir = self.run.export_dir();
        let mut exports = Vec::new();
        for (name, mut file) in self.stage.export()? {
            file.set_metadata(weights::RECIPE_HASH, self.run.recipe_hash());
            file.set_metadata(
                weights::PROVENANCE,
                format!(
                    "faceprior {}, stage {}, seed {}, step {step}",
                    env!("CARGO_PKG_VERSION"),
                    self.stage.name(),
                    self.progress.seed
                ),
            );
            let path = dir.join(name);
            file.write(&path)?;
            exports.push(path);
        }
        Ok(Outcome::Finished { exports, step, score })
    }

    fn warn(&mut self, message: &str) -> Result<(), TrainError> {
        let (step, images) = (self.progress.step, self.progress.images);
        self.run
            .record("warning", step, images, [("message".to_owned(), message.into())])?;
        self.reporter.report(Event::Warning { message });
        Ok(())
    }

    fn diverged(&self, what: String) -> Result<TrainError, TrainError> {
        let last_good = self.run.checkpoints().newest_path()?;
        let Progress { step, images, .. } = self.progress;
        Ok(TrainError::Diverged {
            step,
            images,
            what,
            last_good,
        })
    }
}

/// Puts a checkpoint into a stage; the result is where the driver goes on.
fn load(stage: &mut dyn Stage, checkpoint: &Checkpoint) -> Result<Progress, TrainError> {
    let path = || checkpoint.path.clone();
    let mismatch = |source| TrainError::CheckpointMismatch {
        path: path(),
        source: Box::new(source),
    };
    let (found, expected) = (checkpoint.manifest.stage, stage.name());
    if found != expected {
        return Err(TrainError::OtherStage {
            path: path(),
            found,
            expected,
        });
    }
    let progress = checkpoint.state.metadata(PROGRESS).unwrap_or_default();
    let progress = serde_json::from_str(progress).map_err(|error| {
        mismatch(TrainError::Invalid(format!(
            "its {PROGRESS} does not parse: {error}"
        )))
    })?;
    stage.load_state(&checkpoint.state).map_err(mismatch)?;
    Ok(progress)
}

/// The first tensor that holds a NaN or an infinity.
fn not_finite(state: &Weights) -> Option<&str> {
    state.names().find(|name| {
        let floats = state.get(name).and_then(|data| data.as_slice::<f32>().ok());
        floats.is_some_and(|floats| floats.iter().any(|x| !x.is_finite()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use burn::tensor::{Device, TensorData};
    use faceprior_data::{Image, LoaderConfig, SyntheticFaces, Transform};

    use crate::recipe::Recipe;
    use crate::run::{Start, read_log};
    use crate::stages::Feed;

    /// A stage of one number, which moves by the pictures and a random draw of each step.
    struct Toy {
        device: Device,
        budget: Budget,
        value: f32,
        loss: fn(u64) -> f64,
        score: fn(u64) -> Option<f64>,
    }

    impl Toy {
        fn new(images: u64) -> Self {
            let budget = Budget {
                images,
                batch_size: 4,
                record_every: 8,
                evaluate_every: 20,
                checkpoint_every: 12,
                keep: 2,
            };
            Self {
                device: Device::flex(),
                budget,
                value: 0.0,
                loss: |_| 1.0,
                score: |_| None,
            }
        }
    }

    impl Stage for Toy {
        fn name(&self) -> StageName {
            StageName::Prior
        }

        fn seed(&self) -> u64 {
            7
        }

        fn device(&self) -> &Device {
            &self.device
        }

        fn budget(&self) -> &Budget {
            &self.budget
        }

        fn feed(&self) -> Result<Feed, TrainError> {
            Ok(Feed {
                dataset: Arc::new(SyntheticFaces::new(3, 3, 4, 16)),
                transform: Transform::ResizeCropFlip {
                    resize: 16,
                    crop: 12,
                    flip: true,
                },
                config: LoaderConfig {
                    batch_size: 4,
                    seed: 5,
                    ..LoaderConfig::default()
                },
            })
        }

        fn step(&mut self, batch: Batch, clock: &Clock) -> Result<Report, TrainError> {
            self.value = 0.9 * self.value + batch.images.iter().sum::<f32>() / 1e3;
            self.value += (clock.rng("toy").next_u64() % 1000) as f32 / 1e3;
            let values = vec![
                ("value", f64::from(self.value)),
                ("epoch_seen", clock.epoch as f64),
            ];
            Ok(Report {
                loss: (self.loss)(clock.step + 1),
                values,
                warnings: Vec::new(),
            })
        }

        fn evaluate(&self, clock: &Clock) -> Result<Evaluation, TrainError> {
            let picture = Image::filled(4, 4, [9, 9, 9]);
            Ok(Evaluation {
                score: (self.score)(clock.step),
                values: vec![("value".to_owned(), f64::from(self.value))],
                pictures: vec![("grid".to_owned(), picture)],
            })
        }

        fn state(&self) -> Weights {
            let mut state = Weights::new();
            state.insert("value", TensorData::new(vec![self.value], [1]));
            state
        }

        fn load_state(&mut self, state: &Weights) -> Result<(), TrainError> {
            self.value = state.tensor::<1>("value", &self.device)?.into_scalar();
            Ok(())
        }

        fn export(&self) -> Result<Vec<(String, Weights)>, TrainError> {
            Ok(vec![("toy.safetensors".to_owned(), self.state())])
        }
    }

    fn open(dir: &Path) -> Run {
        Run::open(
            dir,
            StageName::Prior,
            &Recipe::load("demo", &[]).unwrap(),
            Start::ResumeOrBegin,
        )
        .unwrap()
    }

    /// Requests a stop after a step.
    struct StopAfter(u64, Stop);

    impl Reporter for StopAfter {
        fn report(&mut self, event: Event<'_>) {
            if let Event::Step { clock, .. } = event
                && clock.step == self.0
            {
                self.1.request();
            }
        }
    }

    fn run_whole(mut stage: Toy, dir: &Path) -> Result<Outcome, TrainError> {
        train(&mut stage, &mut open(dir), &Stop::new(), &mut ())
    }

    fn exported(dir: &Path) -> f32 {
        let weights = Weights::read(&dir.join("export/toy.safetensors")).unwrap();
        weights
            .tensor::<1>("value", &Device::flex())
            .unwrap()
            .into_scalar()
    }

    /// The log without what depends on the machine's speed.
    fn log(dir: &Path) -> Vec<Value> {
        let mut records = read_log(dir).unwrap();
        for record in &mut records {
            record.as_object_mut().unwrap().remove("images_per_second");
        }
        records
    }

    #[test]
    fn what_is_due_is_done_when_it_is_due() {
        let dir = tempfile::tempdir().unwrap();
        let outcome = run_whole(Toy::new(50), dir.path()).unwrap();
        let Outcome::Finished { step, score, exports } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(
            (step, score, exports.len()),
            (13, None, 1),
            "50 images are 13 batches of 4"
        );
        let at = |event: &str| -> Vec<u64> {
            let of_kind = log(dir.path())
                .into_iter()
                .filter(|record| record["event"] == event);
            of_kind.map(|record| record["images"].as_u64().unwrap()).collect()
        };
        assert_eq!(at("step"), [8, 16, 24, 32, 40, 48, 52]);
        assert_eq!(at("evaluation"), [20, 40, 52]);
        assert!(dir.path().join("samples/step-000000013-grid.png").is_file());
        let weights = Weights::read(&dir.path().join("export/toy.safetensors")).unwrap();
        assert_eq!(
            weights.metadata(weights::PROVENANCE).unwrap().split(", ").last(),
            Some("step 13")
        );
        assert!(
            weights
                .metadata(weights::RECIPE_HASH)
                .is_some_and(|hash| hash.len() == 64)
        );
    }

    #[test]
    fn a_stopped_run_goes_on_as_if_nothing_had_happened() {
        let whole = tempfile::tempdir().unwrap();
        run_whole(Toy::new(60), whole.path()).unwrap();
        for stop_after in [1, 3, 7, 14] {
            let dir = tempfile::tempdir().unwrap();
            let stop = Stop::new();
            let mut reporter = StopAfter(stop_after, stop.clone());
            let outcome = train(&mut Toy::new(60), &mut open(dir.path()), &stop, &mut reporter).unwrap();
            let Outcome::Stopped {
                checkpoint,
                images,
                total_images,
            } = outcome
            else {
                panic!("{outcome:?}")
            };
            assert_eq!((images, total_images), (4 * stop_after, 60));
            assert!(checkpoint.ends_with(format!("step-{stop_after:09}")));
            run_whole(Toy::new(60), dir.path()).unwrap();
            assert_eq!(exported(dir.path()).to_bits(), exported(whole.path()).to_bits());
            assert_eq!(log(dir.path()), log(whole.path()), "stopped after {stop_after}");
        }
    }

    #[test]
    fn a_finished_run_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        run_whole(Toy::new(20), dir.path()).unwrap();
        let before = (exported(dir.path()), log(dir.path()));
        run_whole(Toy::new(20), dir.path()).unwrap();
        assert_eq!(before, (exported(dir.path()), log(dir.path())));
    }

    #[test]
    fn the_best_state_is_exported() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Toy::new(80);
        // Evaluations come after steps 5, 10, 15 and 20.
        stage.score = |step| Some(if step == 10 { 0.9 } else { 0.5 });
        let outcome = run_whole(stage, dir.path()).unwrap();
        let Outcome::Finished { step, score, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!((step, score), (10, Some(0.9)));
        let at_10 = log(dir.path())
            .into_iter()
            .find(|record| record["event"] == "evaluation" && record["step"] == 10);
        assert_eq!(
            f64::from(exported(dir.path())),
            at_10.unwrap()["value"].as_f64().unwrap()
        );
    }

    #[test]
    fn a_loss_that_is_not_a_number_stops_the_run_and_names_the_last_good_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Toy::new(80);
        stage.loss = |step| if step == 8 { f64::NAN } else { 1.0 };
        let error = run_whole(stage, dir.path()).unwrap_err().to_string();
        assert!(
            error.starts_with("training diverged at step 8 (32 images): the loss is NaN"),
            "{error}"
        );
        assert!(
            error.contains("the last good checkpoint is") && error.contains("step-000000006"),
            "{error}"
        );
        run_whole(Toy::new(80), dir.path()).unwrap();
    }

    #[test]
    fn a_state_that_is_not_finite_is_never_saved() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Toy::new(80);
        stage.value = f32::INFINITY;
        let error = run_whole(stage, dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("at step 3") && error.contains("value has values that are not finite"),
            "{error}"
        );
        assert!(open(dir.path()).checkpoints().newest_path().unwrap().is_none());
    }

    #[test]
    fn a_checkpoint_of_another_stage_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let run = open(dir.path());
        let mark = Mark {
            stage: StageName::Encoder,
            step: 1,
            images: 4,
            score: None,
            recipe_hash: "",
        };
        run.checkpoints().write(&Toy::new(4).state(), mark, 1).unwrap();
        drop(run);
        let error = run_whole(Toy::new(20), dir.path()).unwrap_err().to_string();
        assert!(error.contains("is of stage encoder, expected prior"), "{error}");
    }
}
