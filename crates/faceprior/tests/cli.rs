//! The program as a user meets it: what it prints where, and what it says when something is wrong.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use faceprior::data::{SyntheticFaces, export};
use faceprior::train::recipe::{Recipe, StageName};
use faceprior::train::run::{Run, Start};

fn faceprior(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_faceprior"))
        .args(arguments)
        .args(["--quiet", "--device", "cpu"])
        .output()
        .expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a failing command says; it must leave standard output alone and end with `code`.
fn failure(arguments: &[&str], code: i32) -> String {
    let output = faceprior(arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
    assert_eq!(stdout(&output), "", "{arguments:?} wrote to standard output");
    error
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_is_right() {
    let error = failure(&["align"], 2);
    assert!(error.contains("<INPUT>") && error.contains("Usage"), "{error}");
    let error = failure(&["align", "in", "out", "--size", "huge"], 2);
    assert!(error.contains("such as 96x112"), "{error}");
    let error = failure(&["train", "recognizer", "--recipe", "demo", "--out", "x"], 2);
    assert!(
        error.contains("--encoder") || error.contains("--from-scratch"),
        "{error}"
    );
}

#[test]
fn missing_and_empty_folders_are_named_with_a_cure() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("no such folder");
    let out = folder.path().join("out");
    let error = failure(&["align", text(&missing), text(&out)], 1);
    assert!(
        error.contains("no such folder") && error.contains("hint"),
        "{error}"
    );
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    let error = failure(&["align", text(&empty), text(&out)], 1);
    assert!(error.contains("empty"), "{error}");
}

#[test]
fn recipes_are_listed_shown_and_checked() {
    let output = faceprior(&["recipe", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let names: Vec<_> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|recipe| recipe["name"].clone())
        .collect();
    assert_eq!(names, ["demo", "small", "paper"]);

    let shown = stdout(&faceprior(&["recipe", "show", "demo"]));
    let checked = stdout(&faceprior(&["recipe", "check", "demo", "--set", "seed=7"]));
    assert!(shown.contains("seed = 1") && checked.contains("seed = 7"));

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mine.toml");
    fs::write(&path, shown.replace("style_mixing", "style_mixin")).expect("a file");
    let error = failure(&["recipe", "check", text(&path)], 1);
    assert!(
        error.contains("mine.toml") && error.contains("style_mixin") && error.contains("style_mixing"),
        "{error}"
    );
    let error = failure(&["recipe", "check", "dmeo"], 1);
    assert!(error.contains("demo"), "{error}");
}

#[test]
fn a_file_that_is_no_model_is_a_clear_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("broken.safetensors");
    fs::write(&path, b"\xff\xff\xff\xff\xff\xff\xff\x7fnothing").expect("a file");
    let error = failure(&["model", "inspect", text(&path)], 1);
    assert!(error.contains("broken.safetensors"), "{error}");
    let error = failure(
        &[
            "embed",
            "--model",
            text(&path),
            text(folder.path()),
            "out.safetensors",
        ],
        1,
    );
    assert!(error.contains("broken.safetensors"), "{error}");
}

#[test]
fn an_unknown_device_and_a_missing_feature_are_told_apart() {
    let run = |device: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_faceprior"))
            .args(["bench", "ir50-infer-1", "--device", device])
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(run("gpu").contains("unknown device"));
    #[cfg(not(feature = "cuda"))]
    assert!(run("cuda:0").contains("--features cuda"));
}

#[test]
fn an_instruction_set_is_used_or_refused() {
    let run = |isa: &str| {
        Command::new(env!("CARGO_BIN_EXE_faceprior"))
            .args(["doctor", "--json"])
            .env("FACEPRIOR_ISA", isa)
            .output()
            .expect("the program starts")
    };
    assert!(stdout(&run("portable")).contains("\"kernels\":\"portable\""));
    let refused = run("avx1024");
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(stdout(&refused), "");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        error.contains("avx1024") && error.contains("portable") && error.contains("hint:"),
        "{error}"
    );
}

#[test]
fn a_second_process_on_a_run_directory_is_turned_away() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = Recipe::load("demo", &[]).expect("a recipe");
    let _held = Run::open(folder.path(), StageName::Prior, &recipe, Start::ResumeOrBegin).expect("a run");
    let error = failure(
        &["train", "gan", "--recipe", "demo", "--out", text(folder.path())],
        1,
    );
    assert!(
        error.contains("in use") && error.contains(&std::process::id().to_string()),
        "{error}"
    );
}

#[test]
fn broken_pictures_are_counted_and_kept_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let pictures = folder.path().join("pictures with spaces");
    export(&SyntheticFaces::new(1, 1, 2, 160), &pictures).expect("pictures");
    fs::write(pictures.join("cut short.jpg"), b"\xff\xd8\xff\xe0\x00\x10JFIF").expect("a file");
    let out = folder.path().join("out");
    let output = faceprior(&["align", text(&pictures), text(&out), "--one", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&summary["listed"], &summary["unreadable"]),
        (&3.into(), &1.into())
    );
    let unreadable = fs::read_to_string(out.join("unreadable.txt")).expect("a list");
    assert!(unreadable.contains("cut short.jpg"), "{unreadable}");
    let error = failure(
        &[
            "align",
            text(&pictures),
            text(&folder.path().join("other")),
            "--max-unreadable",
            "0",
        ],
        1,
    );
    assert!(
        error.contains("cut short.jpg") && error.contains("hint"),
        "{error}"
    );
}

#[test]
fn a_pipeline_looks_for_all_its_pictures_before_it_trains() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("run");
    let missing = "data.test={ source = 'pairs', path = 'no such crops', pairs = 'no such pairs.txt' }";
    let error = failure(
        &[
            "pipeline",
            "--recipe",
            "demo",
            "--out",
            text(&out),
            "--set",
            missing,
        ],
        1,
    );
    assert!(error.contains("no such crops"), "{error}");
    assert!(!out.exists(), "a run was begun");
}

#[test]
fn completions_are_printed() {
    let output = faceprior(&["completions", "bash"]);
    assert!(output.status.success() && stdout(&output).contains("faceprior"));
}
