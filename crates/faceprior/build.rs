//! Tells the program which commit it was built from, for reports and the files it writes.

use std::path::Path;
use std::process::Command;

fn main() {
    let head = Path::new("../../.git/HEAD");
    if head.is_file() {
        println!("cargo::rerun-if-changed={}", head.display());
        println!("cargo::rerun-if-changed=../../.git/refs/heads");
    }
    let output = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output();
    let commit = output
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=FACEPRIOR_COMMIT={}", commit.trim());
}
