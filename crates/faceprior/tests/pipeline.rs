//! The whole path on a handful of rendered faces: every piece meets the next one.

use std::path::Path;
use std::process::Command;

/// The demo's recipe cut down to seconds; nothing is learnt.
const TINY: [&str; 27] = [
    "data.prior.identities=24",
    "data.prior.pictures=1",
    "data.labels.identities=4",
    "data.labels.pictures=8",
    "data.test.identities=40",
    "data.test.pictures=3",
    "data.test.pairs=80",
    "prior.channel_base=128",
    "prior.channel_max=16",
    "prior.latent_dim=16",
    "prior.latent_avg_samples=64",
    "prior.samples=4",
    "prior.budget.images=16",
    "prior.budget.batch_size=8",
    "prior.budget.evaluate_every=8",
    "prior.budget.checkpoint_every=8",
    "encoder.validation_images=8",
    "encoder.samples=4",
    "encoder.budget.images=16",
    "encoder.budget.batch_size=8",
    "encoder.budget.evaluate_every=8",
    "encoder.budget.checkpoint_every=8",
    "recognizer.embedding_dim=16",
    "recognizer.budget.images=32",
    "recognizer.budget.batch_size=16",
    "recognizer.budget.checkpoint_every=16",
    "eval.bootstrap_draws=50",
];

fn pipeline(out: &Path) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_faceprior"));
    command
        .args([
            "pipeline", "--recipe", "demo", "--json", "--quiet", "--device", "cpu", "--out",
        ])
        .arg(out);
    for change in TINY {
        command.args(["--set", change]);
    }
    command.output().expect("the program starts")
}

#[test]
fn every_stage_feeds_the_next_and_a_second_run_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("a run");
    let first = pipeline(&out);
    assert!(
        first.status.success(),
        "{}",
        String::from_utf8_lossy(&first.stderr)
    );
    let summary: serde_json::Value = serde_json::from_slice(&first.stdout).expect("JSON");
    assert_eq!(summary["pretrained"]["pairs"], 80);
    let page = std::fs::read_to_string(out.join("report.html")).expect("a report");
    assert!(page.contains("from scratch") && page.contains("data:image/png"));

    let exports = [
        "prior/export/generator",
        "encoder/export/encoder",
        "recognizer/export/recognizer",
    ];
    let bytes =
        || exports.map(|name| std::fs::read(out.join(format!("{name}.safetensors"))).expect("an export"));
    let before = bytes();
    let second = pipeline(&out);
    assert!(
        second.status.success(),
        "{}",
        String::from_utf8_lossy(&second.stderr)
    );
    assert!(before == bytes(), "exports changed");
    let again: serde_json::Value = serde_json::from_slice(&second.stdout).expect("JSON");
    assert_eq!(summary["pretrained"], again["pretrained"]);
}
