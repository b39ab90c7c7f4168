//! What CI runs, and the long checks: `cargo xtask check [--full]`, `cargo xtask instructions [--record]`.
//!
//! `check` is the README's test command: formatting, lints, documentation and every test that needs neither
//! network nor GPU nor real pictures. `--full` adds the checks on real data (`../shared`), the GPU features'
//! builds, the network goldens on a GPU (on Linux Mesa's lavapipe serves where there is none) and the instructions
//! of the convolution kernels, which times would not tell on a shared machine.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

mod instructions;

const USAGE: &str = "\
usage: cargo xtask check [--full] | instructions [--record]

  check         formatting, lints, documentation, tests (what CI runs)
  check --full  also real data in ../shared, GPU features, goldens on a GPU, supply chain, instructions
  instructions  the convolution kernels' instructions, counted by valgrind, against those on record";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["check"] => check(false),
        ["check", "--full"] => check(true),
        ["instructions"] => instructions::check(),
        ["instructions", "--record"] => instructions::record(),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(full: bool) -> Result<()> {
    step("formatting", "cargo fmt --all --check")?;
    step(
        "lints",
        "cargo clippy --workspace --all-targets --quiet -- -D warnings",
    )?;
    supply_chain(full)?;
    step("tests", "cargo test --workspace --quiet")?;
    if full {
        full_checks()?;
    }
    println!("\nall checks passed");
    Ok(())
}

/// Bans, licences and sources of every dependency. The tool is not required of a newcomer: where it is missing
/// that is said aloud, and a full check fails.
fn supply_chain(required: bool) -> Result<()> {
    if succeeds("cargo deny --version") {
        return step(
            "supply chain",
            "cargo deny --log-level error check bans licenses sources",
        );
    }
    let cure = "cargo install --locked cargo-deny";
    if required {
        bail!("cargo-deny is missing\nhint: {cure}");
    }
    println!("== supply chain: SKIPPED, cargo-deny is not installed ({cure})");
    Ok(())
}

fn full_checks() -> Result<()> {
    // CubeCL compiles for CUDA with an LLVM that its build script downloads. Types can be checked without it:
    // with DOCS_RS set, as on docs.rs, the script leaves it out.
    step(
        "GPU features compile",
        "env DOCS_RS=1 cargo check --package faceprior --features cuda,vulkan,wgpu",
    )?;
    if Path::new("../shared").is_dir() {
        step("real data", "cargo test --workspace --quiet -- --ignored")?;
    } else {
        println!("== real data: SKIPPED, there is no ../shared beside the checkout");
    }
    step(
        "goldens on a GPU",
        "cargo test --package faceprior-nets --features wgpu --quiet -- --ignored gpu",
    )?;
    println!("== instructions of the convolution kernels");
    instructions::check()
}

/// Runs one command, shows what it is and how long it took, and fails with its name.
fn step(name: &str, command: &str) -> Result<()> {
    println!("== {name}: {command}");
    let start = Instant::now();
    let status = split(command)
        .status()
        .with_context(|| format!("cannot start `{command}`"))?;
    if !status.success() {
        bail!("{name} failed: `{command}` ended with {status}");
    }
    println!("== {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn succeeds(command: &str) -> bool {
    split(command)
        .output()
        .is_ok_and(|output| output.status.success())
}

fn split(command: &str) -> Command {
    let mut words = command.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}
