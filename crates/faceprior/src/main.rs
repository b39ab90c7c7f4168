//! The `faceprior` program.
//!
//! Data goes to standard output, everything else to standard error; the exit code is 0, 1 for a failure and 2
//! for wrong usage.
#![allow(clippy::print_stdout, clippy::print_stderr)]
// The modules of a program are seen by nobody else.
#![allow(unreachable_pub)]

use std::process::ExitCode;

use clap::Parser;

mod args;
mod commands;
mod progress;

fn main() -> ExitCode {
    let arguments = args::Arguments::parse();
    let level = match (arguments.quiet, arguments.verbose) {
        (true, _) => "warn",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("FACEPRIOR_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(format!("warn,faceprior={level}"))),
        )
        .with_writer(progress::log_writer)
        .with_target(false)
        .without_time()
        .init();
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, without those that an error has already put into its own words.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::message;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow!("no space left")
            .context("cannot write a.png: no space left")
            .context("cannot align");
        assert_eq!(message(&error), "cannot align: cannot write a.png: no space left");
    }
}
