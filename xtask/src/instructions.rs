//! Instructions of the convolution kernels: the same on a busy machine as on an idle one.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step;

/// What was counted last, `case instructions` a line.
const RECORD: &str = "benchmarks/instructions.txt";
/// The program that runs a case.
const PROGRAM: &str = "target/release/examples/instructions";
/// How far a count may be off: compilers differ a little from release to release.
const TOLERANCE: f64 = 0.03;

/// Counts and compares with the record.
pub(crate) fn check() -> Result<()> {
    let text = std::fs::read_to_string(RECORD).with_context(|| {
        format!("cannot read {RECORD}\nhint: run it from the repository's root, or write it with --record")
    })?;
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty());
    let known: BTreeMap<&str, f64> = lines
        .map(|line| {
            let (case, count) = line
                .split_once(' ')
                .with_context(|| format!("{RECORD}: expected `case instructions`, got {line:?}"))?;
            let count = count
                .parse()
                .with_context(|| format!("{RECORD}: {count:?} is no number"))?;
            Ok((case, count))
        })
        .collect::<Result<_>>()?;
    let counted = count()?;
    let mut worse = Vec::new();
    for (case, count) in &counted {
        match known.get(case.as_str()) {
            Some(known) if *count > known * (1.0 + TOLERANCE) => {
                worse.push(format!("{case}: {count:.0}, on record {known:.0}"));
            }
            Some(known) if *count < known * (1.0 - TOLERANCE) => {
                println!("{case}: {count:.0}, on record {known:.0}: fewer; record it");
            }
            Some(_) => (),
            None => worse.push(format!("{case}: not on record")),
        }
    }
    if !worse.is_empty() {
        bail!("more instructions than on record:\n{}", worse.join("\n"));
    }
    println!(
        "{} kernels: none above {RECORD} by more than {:.0}%",
        counted.len(),
        100.0 * TOLERANCE
    );
    Ok(())
}

/// Counts and writes the record.
pub(crate) fn record() -> Result<()> {
    let compiler = Command::new("rustc").arg("--version").output()?;
    let mut text = format!(
        "# Instructions of one pass for two pictures, AVX2 form, one thread; {}\n",
        String::from_utf8_lossy(&compiler.stdout).trim()
    );
    for (case, count) in count()? {
        text += &format!("{case} {count:.0}\n");
    }
    std::fs::write(RECORD, text).with_context(|| format!("cannot write {RECORD}"))
}

/// Each case and its instructions.
fn count() -> Result<Vec<(String, f64)>> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        bail!("valgrind is missing\nhint: apt-get install valgrind");
    }
    step(
        "the kernels' program",
        "cargo build --release --workspace --example instructions --quiet",
    )?;
    let list = Command::new(PROGRAM)
        .output()
        .with_context(|| format!("cannot start {PROGRAM}"))?;
    let mut counted = Vec::new();
    for line in String::from_utf8_lossy(&list.stdout).lines() {
        let (case, operations) = line
            .split_once(' ')
            .with_context(|| format!("{PROGRAM}: unexpected {line:?}"))?;
        let operations: f64 = operations.parse()?;
        // What comes before and after the work is the same for any number of repeats.
        let instructions = (run(case, 3)? - run(case, 1)?) / 2.0;
        println!(
            "{case:<38} {instructions:>12.0} instructions, {:.2} operations of the direct form each",
            operations / instructions
        );
        counted.push((case.to_owned(), instructions));
    }
    Ok(counted)
}

/// Instructions of the whole program.
fn run(case: &str, repeats: usize) -> Result<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(PROGRAM)
        .args([case, &repeats.to_string()])
        .env("RAYON_NUM_THREADS", "1")
        // Valgrind knows no AVX-512.
        .env("FACEPRIOR_ISA", "avx2")
        .output()
        .context("cannot start valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    let count = text
        .lines()
        .find_map(|line| line.split_once("Collected : "))
        .and_then(|(_, count)| count.trim().parse().ok());
    match count {
        Some(count) if output.status.success() => Ok(count),
        _ => bail!("valgrind failed on {case}:\n{text}"),
    }
}
