//! One file a command; each takes its arguments and the context that all share.

use anyhow::{Context as _, Result};
use burn::tensor::Device;
use serde::Serialize;

use clap::CommandFactory;

use crate::args::{Arguments, Command};

mod align;
mod bench;
mod demo;
mod doctor;
mod embed;
mod eval;
mod model;
mod pipeline;
mod recipe;
mod train;

/// What every command shares.
pub struct Context {
    /// Where to compute.
    pub device: String,
    /// Results as JSON on standard output.
    pub json: bool,
    /// No progress bars.
    pub quiet: bool,
    /// CPU threads; `None` for one a core.
    pub threads: Option<usize>,
}

impl Context {
    /// Opens the device that `--device` names.
    pub fn open_device(&self) -> Result<Device> {
        Ok(faceprior::device::open(&self.device)?)
    }
}

pub fn run(arguments: Arguments) -> Result<()> {
    faceprior::ops::instruction_set().map_err(anyhow::Error::msg)?;
    let threads = arguments.threads.map(usize::from);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .stack_size(STACK_BYTES)
        .build_global()
        .context("cannot set the number of threads")?;
    let context = Context {
        device: arguments.device,
        json: arguments.json,
        quiet: arguments.quiet,
        threads,
    };
    // On one of the pool's own threads: a kernel called from outside would have to wake the pool and be woken by it.
    faceprior::ops::lead(|| execute(&context, arguments.command))
}

/// Stack of a thread: what the system gives a program's first one.
const STACK_BYTES: usize = 8 << 20;

fn execute(context: &Context, command: Command) -> Result<()> {
    match command {
        Command::Demo(arguments) => demo::run(context, arguments),
        Command::Align(arguments) => align::run(context, arguments),
        Command::Train(arguments) => train::run(context, arguments),
        Command::Pipeline(arguments) => pipeline::run(context, arguments),
        Command::Eval(arguments) => eval::run(context, arguments),
        Command::Embed(arguments) => embed::run(context, arguments),
        Command::Recipe(arguments) => recipe::run(context, arguments),
        Command::Model(arguments) => model::run(context, arguments),
        Command::Bench(arguments) => bench::run(context, arguments),
        Command::Doctor => doctor::run(context),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Arguments::command(),
                "faceprior",
                &mut std::io::stdout(),
            );
            Ok(())
        }
    }
}

/// Prints a result as one line of JSON on standard output.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    println!(
        "{}",
        serde_json::to_string(value).context("cannot write the result as JSON")?
    );
    Ok(())
}
