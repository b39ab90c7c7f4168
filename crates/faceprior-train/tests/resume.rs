//! A run that was interrupted in any way ends as the uninterrupted one, bit by bit.
//!
//! One test, alone in its program: dropout draws from the CPU device's generator, which all tests of a program share.

mod common;

use std::fs;
use std::path::Path;

use common::{bytes, scratch_stage, tiny};
use faceprior_train::TrainError;
use faceprior_train::driver::{Event, Outcome, Reporter, train};
use faceprior_train::recipe::StageName;
use faceprior_train::run::{Run, Start, read_log};
use faceprior_train::signals::Stop;

/// Asks to stop after a step, and keeps the warnings.
#[derive(Default)]
struct Watch {
    stop_after: Option<u64>,
    stop: Stop,
    warnings: Vec<String>,
    resumed: bool,
}

impl Reporter for Watch {
    fn report(&mut self, event: Event<'_>) {
        match event {
            Event::Step { clock, .. } if self.stop_after == Some(clock.step) => self.stop.request(),
            Event::Warning { message } => self.warnings.push(message.to_owned()),
            Event::Started { resumed_from, .. } => self.resumed = resumed_from.is_some(),
            _ => {}
        }
    }
}

fn go(dir: &Path, stop_after: Option<u64>) -> (Result<Outcome, TrainError>, Watch) {
    go_with(dir, stop_after, &[])
}

fn go_with(dir: &Path, stop_after: Option<u64>, more: &[&str]) -> (Result<Outcome, TrainError>, Watch) {
    // Dropout in units and output layer, warm-up, margin ramp, a frozen first epoch, selection by validation.
    let changes = [
        "recognizer.dropout=0.1",
        "recognizer.output_dropout=0.3",
        "scratch.freeze_epochs=1",
    ];
    let recipe = tiny(&[&changes, more].concat());
    let mut run = Run::open(dir, StageName::Scratch, &recipe, Start::ResumeOrBegin).unwrap();
    let mut watch = Watch {
        stop_after,
        ..Watch::default()
    };
    let stop = watch.stop.clone();
    (
        train(&mut scratch_stage(&recipe), &mut run, &stop, &mut watch),
        watch,
    )
}

fn assert_same_end(whole: &Path, other: &Path) {
    for file in [
        "export/recognizer.safetensors",
        "checkpoints/step-000000010/state.safetensors",
    ] {
        assert!(
            bytes(whole.join(file)) == bytes(other.join(file)),
            "{file} of {other:?} differs"
        );
    }
    let log = |dir: &Path| {
        let mut records = read_log(dir).unwrap();
        records.retain(|record| record["event"] != "warning");
        for record in &mut records {
            record.as_object_mut().unwrap().remove("images_per_second");
        }
        records
    };
    assert_eq!(log(whole), log(other));
}

#[test]
fn interrupted_runs_end_like_uninterrupted_ones() {
    let root = tempfile::tempdir().unwrap();
    let dir = |name: &str| root.path().join(name);

    let whole = dir("whole");
    assert!(matches!(go(&whole, None).0.unwrap(), Outcome::Finished { .. }));

    // Asked to leave, in the frozen epoch and after it, and resumed.
    for step in [2, 7] {
        let stopped = dir(&format!("stopped after {step}"));
        assert!(matches!(
            go(&stopped, Some(step)).0.unwrap(),
            Outcome::Stopped { .. }
        ));
        let (outcome, watch) = go(&stopped, None);
        assert!(watch.resumed && matches!(outcome.unwrap(), Outcome::Finished { .. }));
        assert_same_end(&whole, &stopped);
    }

    // Killed while it wrote the checkpoint of step 9: what is there is the one of step 6 (and the best, of step 5),
    // a log that has gone further and ends in the middle of a line, and half of a checkpoint.
    let killed = dir("killed");
    go(&killed, Some(8)).0.unwrap();
    fs::remove_dir_all(killed.join("checkpoints/step-000000008")).unwrap();
    let partial = killed.join("checkpoints/.step-000000009");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("state.safetensors.partial"), [7; 1000]).unwrap();
    let mut log = bytes(killed.join("log.jsonl"));
    log.extend(br#"{"event":"step","images":36,"ste"#);
    fs::write(killed.join("log.jsonl"), log).unwrap();
    let (outcome, watch) = go(&killed, None);
    assert!(watch.resumed && watch.warnings.is_empty());
    outcome.unwrap();
    assert_same_end(&whole, &killed);

    // The newest checkpoint is damaged: said aloud, and the one before it is used.
    let damaged = dir("damaged");
    go(&damaged, Some(8)).0.unwrap();
    let state = damaged.join("checkpoints/step-000000008/state.safetensors");
    let mut damage = bytes(&state);
    let middle = damage.len() / 2;
    damage[middle] ^= 0x10;
    fs::write(&state, damage).unwrap();
    let (outcome, watch) = go(&damaged, None);
    assert_eq!(watch.warnings.len(), 1);
    assert!(watch.warnings[0].contains("step-000000008") && watch.warnings[0].contains("checksum"));
    outcome.unwrap();
    assert_same_end(&whole, &damaged);

    // Activations that are computed again lead to the same state; rounded ones to another, again and again the same.
    const STATE: &str = "checkpoints/step-000000010/state.safetensors";
    let state = |name: &str, stops: &[u64], changes: &[&str]| {
        for stop in stops {
            go_with(&dir(name), Some(*stop), changes).0.unwrap();
        }
        go_with(&dir(name), None, changes).0.unwrap();
        bytes(dir(name).join(STATE))
    };
    assert!(state("computed again", &[], &["activations.recompute=true"]) == bytes(whole.join(STATE)));
    let bf16 = ["activations.precision=bf16", "activations.recompute=true"];
    let rounded = state("rounded", &[], &bf16);
    assert!(rounded != bytes(whole.join(STATE)));
    assert!(state("rounded and stopped", &[4], &bf16) == rounded);
}
