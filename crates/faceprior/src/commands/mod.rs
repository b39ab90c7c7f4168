//! One file a command; each takes its arguments and the context that all share.

use anyhow::{Context as _, Result};
use burn::tensor::Device;
use serde::Serialize;

use crate::args::{Arguments, Command};

mod doctor;

/// What every command shares.
pub struct Context {
    /// Where to compute.
    pub device: String,
    /// Results as JSON on standard output.
    pub json: bool,
    /// No progress bars.
    pub quiet: bool,
}

impl Context {
    /// Opens the device that `--device` names.
    pub fn open_device(&self) -> Result<Device> {
        Ok(faceprior::device::open(&self.device)?)
    }
}

pub fn run(arguments: Arguments) -> Result<()> {
    if let Some(threads) = arguments.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.into())
            .build_global()
            .context("cannot set the number of threads")?;
    }
    let context = Context { device: arguments.device, json: arguments.json, quiet: arguments.quiet };
    match arguments.command {
        Command::Doctor => doctor::run(&context),
        _ => anyhow::bail!("not yet"),
    }
}

/// Prints a result as one line of JSON on standard output.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value).context("cannot write the result as JSON")?);
    Ok(())
}
