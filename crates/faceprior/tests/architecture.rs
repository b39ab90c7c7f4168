//! The invariants of ARCHITECTURE.md that a compiler does not hold.

use std::path::{Path, PathBuf};

/// Which crates of the workspace each crate may depend on.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("faceprior-ops", &[]),
    ("faceprior-nets", &["faceprior-ops"]),
    ("faceprior-data", &[]),
    ("faceprior-eval", &[]),
    (
        "faceprior-faces",
        &["faceprior-data", "faceprior-nets", "faceprior-ops"],
    ),
    (
        "faceprior-train",
        &[
            "faceprior-data",
            "faceprior-eval",
            "faceprior-nets",
            "faceprior-ops",
        ],
    ),
    (
        "faceprior",
        &[
            "faceprior-data",
            "faceprior-eval",
            "faceprior-faces",
            "faceprior-nets",
            "faceprior-ops",
            "faceprior-train",
        ],
    ),
];

/// Crates that compute on pictures and numbers alone.
const WITHOUT_TENSORS: [&str; 2] = ["faceprior-data", "faceprior-eval"];

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("crates/")
        .to_owned()
}

fn manifest(name: &str) -> toml::Table {
    let path = crates().join(name).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse()
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn dependencies(name: &str) -> Vec<String> {
    let manifest = manifest(name);
    manifest
        .get("dependencies")
        .and_then(toml::Value::as_table)
        .into_iter()
        .flatten()
        .map(|(n, _)| n.clone())
        .collect()
}

fn sources(name: &str) -> Vec<(PathBuf, String)> {
    let mut folders = vec![crates().join(name).join("src")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a source folder") {
            let path = entry.expect("a folder entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("UTF-8 source");
                files.push((path, text));
            }
        }
    }
    files
}

/// The part of a file before its tests.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text)
}

#[test]
fn every_crate_is_listed() {
    let mut found: Vec<String> = std::fs::read_dir(crates())
        .expect("crates/")
        .map(|entry| {
            entry
                .expect("a folder entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let mut listed: Vec<String> = ALLOWED.iter().map(|(name, _)| (*name).to_owned()).collect();
    found.sort();
    listed.sort();
    assert_eq!(found, listed);
}

#[test]
fn dependencies_point_one_way() {
    for (name, allowed) in ALLOWED {
        for dependency in dependencies(name)
            .iter()
            .filter(|dependency| dependency.starts_with("faceprior"))
        {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} may not depend on {dependency}"
            );
        }
    }
}

#[test]
fn data_and_eval_know_no_tensors() {
    for name in WITHOUT_TENSORS {
        for dependency in dependencies(name) {
            let tensors = dependency.starts_with("burn") || dependency.starts_with("cubecl");
            assert!(!tensors, "{name} may not depend on {dependency}");
        }
    }
}

#[test]
fn networks_do_no_io() {
    for (path, text) in sources("faceprior-nets") {
        if path
            .components()
            .any(|part| part.as_os_str().to_string_lossy().starts_with("weights"))
        {
            continue;
        }
        for word in ["std::fs", "std::io", "File::open", "File::create"] {
            assert!(
                !without_tests(&text).contains(word),
                "{} uses {word}",
                path.display()
            );
        }
    }
}

#[test]
fn only_the_program_prints_parses_or_exits() {
    for (name, _) in ALLOWED.iter().filter(|(name, _)| *name != "faceprior") {
        for (path, text) in sources(name) {
            for word in ["println!", "print!(", "process::exit", "env::args", "use clap"] {
                assert!(
                    !without_tests(&text).contains(word),
                    "{} uses {word}",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn lints_are_the_workspace_s() {
    for (name, _) in ALLOWED {
        let inherits = manifest(name)
            .get("lints")
            .and_then(|lints| lints.get("workspace"))
            .and_then(toml::Value::as_bool);
        assert_eq!(inherits, Some(true), "{name} does not take the workspace's lints");
    }
}
