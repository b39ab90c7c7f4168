//! The command line: what each command takes, and its help. One struct a command.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Learn a prior of faces from unlabelled pictures and turn it into a better face recogniser.
#[derive(Debug, Parser)]
#[command(
    name = "faceprior",
    version,
    about,
    max_term_width = 100,
    propagate_version = true
)]
pub struct Arguments {
    /// What to compute on: auto, cpu, cuda[:N], rocm[:N], vulkan[:N], metal or wgpu[:N]
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// CPU threads to use [default: one a core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Print the result as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress bars, only warnings and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more on standard error; twice for everything
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Synthetic faces, three stages, one report: minutes on two CPU cores, no download
    Demo(Demo),
    /// Find faces, turn them upright and crop them
    Align(Align),
    /// Train one of the three stages
    Train(Train),
    /// All stages and the from-scratch twin, then the report
    Pipeline(Pipeline),
    /// Score a recogniser
    #[command(subcommand)]
    Eval(Eval),
    /// Pictures to embeddings in a safetensors file
    Embed(Embed),
    /// List, show and check recipes
    #[command(subcommand)]
    Recipe(Recipe),
    /// Look into a weights file
    #[command(subcommand)]
    Model(Model),
    /// What this build and machine can do, and how to mend what is missing
    Doctor,
    /// Time the program's work on this device
    Bench(Bench),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `faceprior demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Where the run goes
    #[arg(long, default_value = "runs/demo", value_name = "DIR")]
    pub out: PathBuf,
    /// Change a field of the recipe, such as prior.images=20000 (again and again)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `faceprior align`
#[derive(Debug, Args)]
pub struct Align {
    /// A folder of pictures, searched with its subfolders, or a text file with one path a line
    pub input: PathBuf,
    /// Where crops and lists go
    pub out: PathBuf,
    /// One face a picture, written under the picture's own relative path: which one
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "center")]
    pub one: Option<OneFace>,
    /// With --one, cut the centre out of a picture without a face instead of leaving it out
    #[arg(long, requires = "one")]
    pub center_fallback: bool,
    /// Size of the crops, width x height; the template is the 112 x 112 one, or without its margin for 96 x 112
    #[arg(long, default_value = "112x112", value_name = "WxH", value_parser = parse_size)]
    pub size: (usize, usize),
    /// Smallest face to find, in pixels
    #[arg(long, default_value_t = 40, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(12..))]
    pub min_face: u32,
    /// Detect as the published system did: min face 100, thresholds 0.9, pictures padded to squares
    #[arg(long, conflicts_with = "min_face")]
    pub as_published: bool,
    /// Format of the crops
    #[arg(long, value_enum, default_value_t = CropFormat::Jpg)]
    pub format: CropFormat,
    /// Work only on every n-th picture: the i-th of n parts, such as 2/8
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
    pub shard: Option<(usize, usize)>,
    /// Fail when more pictures than this cannot be read
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub max_unreadable: usize,
}

/// Which face of a picture to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OneFace {
    /// The face nearest the picture's centre
    Center,
    /// The largest face
    Largest,
    /// The face with the highest score
    Best,
}

/// File format of crops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CropFormat {
    /// JPEG of quality 95
    Jpg,
    /// PNG, lossless
    Png,
}

/// `faceprior train`
#[derive(Debug, Args)]
pub struct Train {
    /// The stage
    #[command(subcommand)]
    pub stage: TrainStage,
}

/// The three stages.
#[derive(Debug, Subcommand)]
pub enum TrainStage {
    /// Stage 1: a StyleGAN2 prior of faces from unlabelled pictures
    Gan(TrainRun),
    /// Stage 2: an encoder that inverts the prior
    Encoder {
        /// Recipe, run directory and overrides
        #[command(flatten)]
        run: TrainRun,
        /// Folder of stage 1's export, or its run directory
        #[arg(long, value_name = "DIR")]
        prior: PathBuf,
    },
    /// Stage 3: a recogniser, from the encoder or from scratch
    Recognizer {
        /// Recipe, run directory and overrides
        #[command(flatten)]
        run: TrainRun,
        /// Stage 2's export or run directory to start from
        #[arg(long, value_name = "FILE", required_unless_present = "from_scratch")]
        encoder: Option<PathBuf>,
        /// Start from random weights, with the recipe's settings for the twin
        #[arg(long, conflicts_with = "encoder")]
        from_scratch: bool,
    },
}

/// What each stage's training takes.
#[derive(Debug, Args)]
pub struct TrainRun {
    /// A recipe file, or the name of a built-in recipe (see `faceprior recipe list`)
    #[arg(long, value_name = "FILE|NAME")]
    pub recipe: OsString,
    /// The run directory; an interrupted run there is resumed
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Fail unless there is a run to resume
    #[arg(long)]
    pub resume: bool,
    /// Change a field of the recipe, such as data.prior=crops/ (again and again)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Memory of activations
    #[command(flatten)]
    pub activations: Activations,
}

impl TrainRun {
    /// All changes of the recipe.
    pub fn changes(&self) -> Vec<String> {
        let mut changes = self.set.clone();
        match self.activations.precision {
            None => {}
            Some(Precision::F32) => changes.push("activations.precision=f32".to_owned()),
            Some(Precision::Bf16) => changes.push("activations.precision=bf16".to_owned()),
        }
        if self.activations.recompute {
            changes.push("activations.recompute=true".to_owned());
        }
        changes
    }
}

/// How activations wait for the backward pass, on the CPU.
#[derive(Debug, Clone, Copy, Args)]
pub struct Activations {
    /// Store activations in this format, on the CPU; arithmetic, weights, statistics and losses stay f32 (AMX multiplies 17
    /// of its 24 bits then)
    #[arg(long, value_enum)]
    pub precision: Option<Precision>,
    /// Compute most activations again in the backward pass instead of storing them, on the CPU
    #[arg(long)]
    pub recompute: bool,
}

/// Format of stored activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// Four bytes a value
    F32,
    /// Two bytes a value
    Bf16,
}

/// `faceprior pipeline`
#[derive(Debug, Args)]
pub struct Pipeline {
    /// Recipe, run directory and overrides
    #[command(flatten)]
    pub run: TrainRun,
}

/// `faceprior eval`
#[derive(Debug, Subcommand)]
pub enum Eval {
    /// Pair verification: LFW, CALFW, CPLFW, CFP, AgeDB
    Pairs(EvalPairs),
}

/// `faceprior eval pairs`
#[derive(Debug, Args)]
pub struct EvalPairs {
    /// The recogniser's weights
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// A second recogniser, compared on the same pairs with a paired interval
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    /// Folder of aligned pictures, <name>/<name>_0001.jpg
    #[arg(long, value_name = "DIR")]
    pub images: PathBuf,
    /// The pairs, in LFW's format
    #[arg(long, value_name = "FILE")]
    pub pairs: PathBuf,
    /// How a picture and its mirror image become one embedding
    #[arg(long, value_enum, default_value_t = FlipMode::Sum)]
    pub flip: FlipMode,
    /// Feed pictures as they are, instead of resizing them to 128 and cutting 112 from the centre
    #[arg(long)]
    pub no_center_crop: bool,
    /// Pictures to embed at once
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Write a page with curves, histograms and the worst mistakes
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// How a picture and its mirror image become one embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FlipMode {
    /// The sum of the two
    Sum,
    /// The two joined
    Concat,
    /// The picture alone
    None,
}

/// `faceprior embed`
#[derive(Debug, Args)]
pub struct Embed {
    /// The recogniser's weights
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// A folder of aligned pictures, or a text file with one path a line
    pub input: PathBuf,
    /// The safetensors file to write: `embeddings` and the pictures' names
    pub out: PathBuf,
    /// How a picture and its mirror image become one embedding
    #[arg(long, value_enum, default_value_t = FlipMode::Sum)]
    pub flip: FlipMode,
    /// Feed pictures as they are, instead of resizing them to 128 and cutting 112 from the centre
    #[arg(long)]
    pub no_center_crop: bool,
    /// Pictures to embed at once
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
}

/// `faceprior recipe`
#[derive(Debug, Subcommand)]
pub enum Recipe {
    /// The built-in recipes
    List,
    /// Print a recipe
    Show {
        /// A built-in recipe's name or a file
        recipe: OsString,
    },
    /// Check a recipe and print it with every default filled in
    Check {
        /// A built-in recipe's name or a file
        recipe: OsString,
        /// Change a field of the recipe (again and again)
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
}

/// `faceprior model`
#[derive(Debug, Subcommand)]
pub enum Model {
    /// What a weights file holds: kind, architecture, provenance, tensors
    Inspect {
        /// The weights file
        file: PathBuf,
        /// List every tensor
        #[arg(long)]
        tensors: bool,
    },
}

/// `faceprior bench`
#[derive(Debug, Args)]
pub struct Bench {
    /// What to time [default: everything that needs no pictures]
    #[arg(value_enum)]
    pub work: Vec<Work>,
    /// Timed repetitions, after two to warm up
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Folder of pictures, for loader and align
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Memory of activations in training steps
    #[command(flatten)]
    pub activations: Activations,
}

/// What `bench` can time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// IR-SE-50 training step at 112², batch 16
    #[value(name = "ir50-train-16")]
    Ir50Train16,
    /// IR-SE-50 inference at 112², one picture
    #[value(name = "ir50-infer-1")]
    Ir50Infer1,
    /// IR-SE-50 inference at 112², batch 32
    #[value(name = "ir50-infer-32")]
    Ir50Infer32,
    /// MobileFaceNet inference at 112×96, one picture
    #[value(name = "mobilefacenet-infer-1")]
    MobileFaceNetInfer1,
    /// MobileFaceNet inference at 112×96, batch 32
    #[value(name = "mobilefacenet-infer-32")]
    MobileFaceNetInfer32,
    /// Generator step at 64², batch 8
    #[value(name = "gan-g-64")]
    GanG64,
    /// Discriminator step at 64², batch 8
    #[value(name = "gan-d-64")]
    GanD64,
    /// R1 penalty and its gradient at 64², batch 8
    #[value(name = "gan-r1-64")]
    GanR164,
    /// Path-length penalty and its gradient at 64², batch 8
    #[value(name = "gan-pl-64")]
    GanPl64,
    /// Generator step at 128², batch 8
    #[value(name = "gan-g-128")]
    GanG128,
    /// Discriminator step at 128², batch 8
    #[value(name = "gan-d-128")]
    GanD128,
    /// R1 penalty and its gradient at 128², batch 8
    #[value(name = "gan-r1-128")]
    GanR1128,
    /// Path-length penalty and its gradient at 128², batch 8
    #[value(name = "gan-pl-128")]
    GanPl128,
    /// Encoder training step of the recipe paper, batch 8
    #[value(name = "encoder-step-8")]
    EncoderStep8,
    /// IR-50's 3×3 and strided convolutions one by one, each pass, batch 16; CPU kernels
    #[value(name = "conv")]
    Conv,
    /// Decode, resize to 128, random crop 112, flip, normalise; pictures a second on one thread
    #[value(name = "loader")]
    Loader,
    /// Detect, warp and write; pictures a second
    #[value(name = "align")]
    Align,
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let side = |text: &str| {
        text.parse::<usize>()
            .ok()
            .filter(|side| (16..=4096).contains(side))
    };
    let (width, height) = text.split_once('x').unwrap_or((text, text));
    match (side(width), side(height)) {
        (Some(width), Some(height)) => Ok((width, height)),
        _ => Err("expected width x height in pixels, each 16 to 4096, such as 96x112".to_owned()),
    }
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    text.split_once('/')
        .and_then(|(part, parts)| Some((part.parse::<usize>().ok()?, parts.parse::<usize>().ok()?)))
        .filter(|(part, parts)| (1..=*parts).contains(part))
        .ok_or_else(|| "expected part/parts with parts counted from 1, such as 2/8".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_and_shards_are_checked() {
        assert_eq!(parse_size("96x112"), Ok((96, 112)));
        assert_eq!(parse_size("128"), Ok((128, 128)));
        assert!(parse_size("96x").is_err());
        assert!(parse_size("0x112").is_err());
        assert_eq!(parse_shard("2/8"), Ok((2, 8)));
        assert!(parse_shard("0/8").is_err());
        assert!(parse_shard("9/8").is_err());
    }
}
