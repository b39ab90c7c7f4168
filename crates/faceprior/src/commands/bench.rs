//! `faceprior bench`: the program's work, timed on this device.
//!
//! Each figure is seconds of one iteration after two to warm up; `benchmarks/compare.py` runs the same work in PyTorch
//! beside it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use faceprior::data::{Batch, Dataset, ImageList, Loader, LoaderConfig, Position, SyntheticFaces, Transform};
use faceprior::faces::{AlignOptions, AlignSettings, Crops, Which, align};
use faceprior::nets::heads::{HeadConfig, HeadKind, Margin};
use faceprior::nets::init::Init;
use faceprior::nets::irse::{Depth, RecognizerConfig};
use faceprior::nets::layers::Mode;
use faceprior::nets::losses;
use faceprior::nets::mobilefacenet::MobileFaceNetConfig;
use faceprior::nets::stylegan2::regularizers::{path_length_penalty, r1_penalty};
use faceprior::nets::stylegan2::{
    Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, Noise, Prior, discriminator_loss,
    generator_loss, normal,
};
use faceprior::ops::bench::Convolution;
use faceprior::ops::{Activations, is_cpu};
use faceprior::train::driver::check_activations;
use faceprior::train::optim::{Optimizer, all_but_batch_norm, update_average};
use faceprior::train::recipe::Recipe;
use faceprior::train::schedule::Clock;
use faceprior::train::stages::Stage;
use faceprior::train::stages::encoder::EncoderStage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

use super::Context;
use crate::args::{self, Precision, Work};

#[derive(Serialize)]
struct Timing {
    work: String,
    #[serde(flatten)]
    seconds: Seconds,
    items_per_iteration: usize,
    /// Highest resident memory of the process so far, in bytes; `null` where the system does not tell.
    peak_bytes: Option<u64>,
    device: String,
    /// Which instructions the CPU kernels used.
    isa: &'static str,
    version: &'static str,
}

/// Seconds of each iteration.
#[derive(Serialize)]
#[serde(untagged)]
enum Seconds {
    One { runs: Vec<f64> },
    Several { cases: Vec<Case> },
}

/// One of several things that a work times.
#[derive(Serialize)]
struct Case {
    name: String,
    runs: Vec<f64>,
}

impl Timing {
    fn print(&self) {
        match &self.seconds {
            Seconds::One { runs } => self.print_line(&self.work, runs),
            Seconds::Several { cases } => {
                for Case { name, runs } in cases {
                    self.print_line(&format!("{} {name}", self.work), runs);
                }
            }
        }
    }

    fn print_line(&self, name: &str, runs: &[f64]) {
        let mut runs = runs.to_vec();
        runs.sort_by(f64::total_cmp);
        let median = runs[runs.len() / 2];
        let speed = self.items_per_iteration as f64 / median;
        println!("{name:<40} {speed:>9.2} items/s  {median:>9.4} s");
    }
}

/// Pictures of the StyleGAN2 work.
const GAN_BATCH: usize = 8;
/// Adam's rate in it.
const GAN_RATE: f64 = 0.002;
/// Iterations before the first that counts.
const WARM_UP: usize = 2;
/// Identities of the recogniser's head.
const CLASSES: usize = 1000;
/// Pictures of a convolution.
const CONVOLUTION_BATCH: usize = 16;
/// What a run of one convolution takes at least: it is repeated until then.
const CONVOLUTION_SECONDS: f64 = 0.1;

/// IR-50's convolutions but the first: side of the kernel, channels in and out, side of the input, stride.
const CONVOLUTIONS: [(usize, [usize; 2], usize, usize); 15] = [
    (3, [64, 64], 112, 1),
    (3, [64, 64], 56, 1),
    (3, [64, 128], 56, 1),
    (3, [128, 128], 28, 1),
    (3, [128, 256], 28, 1),
    (3, [256, 256], 14, 1),
    (3, [256, 512], 14, 1),
    (3, [512, 512], 7, 1),
    (3, [64, 64], 112, 2),
    (3, [128, 128], 56, 2),
    (3, [256, 256], 28, 2),
    (3, [512, 512], 14, 2),
    (1, [64, 128], 56, 2),
    (1, [128, 256], 28, 2),
    (1, [256, 512], 14, 2),
];

pub fn run(context: &Context, arguments: args::Bench) -> Result<()> {
    let device = context.open_device()?;
    let works = if arguments.work.is_empty() {
        let possible = |work: &Work| match work {
            Work::Loader | Work::Align => arguments.data.is_some(),
            Work::Conv => is_cpu(&device),
            _ => true,
        };
        let all = Work::value_variants().iter().copied();
        all.filter(possible).collect()
    } else {
        arguments.work
    };
    if context.json && works.len() != 1 {
        bail!(
            "--json times one work a process, so that its memory is its own; got {} works",
            works.len()
        );
    }
    let activations = Activations {
        bf16: arguments.activations.precision == Some(Precision::Bf16),
        recompute: arguments.activations.recompute,
    };
    check_activations(activations, &device)?;
    let mut timings = Vec::new();
    for work in works {
        let name = work
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default();
        let data = arguments.data.as_deref();
        let (items, seconds) = activations
            .scope(|| time(work, arguments.runs as usize, data, &device))
            .with_context(|| format!("cannot time {name}"))?;
        let timing = Timing {
            work: name,
            seconds,
            items_per_iteration: items,
            peak_bytes: peak_bytes(),
            device: faceprior::device::describe(&device),
            isa: faceprior::ops::instruction_set().map_err(anyhow::Error::msg)?,
            version: env!("CARGO_PKG_VERSION"),
        };
        if !context.json {
            timing.print();
        }
        timings.push(timing);
    }
    match timings.as_slice() {
        [timing] if context.json => super::print_json(timing),
        _ => Ok(()),
    }
}

/// Items of an iteration, and seconds of each.
fn time(work: Work, runs: usize, data: Option<&Path>, device: &Device) -> Result<(usize, Seconds)> {
    let data = || data.ok_or_else(|| anyhow!("it needs pictures\nhint: give a folder of them with --data"));
    let (items, runs) = match work {
        Work::Ir50Train16 => (16, repeat(runs, device, recognizer_step(16, device))?),
        Work::Ir50Infer1 => (1, repeat(runs, device, recognizer_inference(1, device))?),
        Work::Ir50Infer32 => (32, repeat(runs, device, recognizer_inference(32, device))?),
        Work::MobileFaceNetInfer1 => (1, repeat(runs, device, mobilefacenet_inference(1, device))?),
        Work::MobileFaceNetInfer32 => (32, repeat(runs, device, mobilefacenet_inference(32, device))?),
        Work::GanG64 => (GAN_BATCH, repeat(runs, device, generator_step(64, device))?),
        Work::GanD64 => (GAN_BATCH, repeat(runs, device, discriminator_step(64, device))?),
        Work::GanR164 => (GAN_BATCH, repeat(runs, device, r1_step(64, device))?),
        Work::GanPl64 => (GAN_BATCH, repeat(runs, device, path_length_step(64, device))?),
        Work::GanG128 => (GAN_BATCH, repeat(runs, device, generator_step(128, device))?),
        Work::GanD128 => (GAN_BATCH, repeat(runs, device, discriminator_step(128, device))?),
        Work::GanR1128 => (GAN_BATCH, repeat(runs, device, r1_step(128, device))?),
        Work::GanPl128 => (GAN_BATCH, repeat(runs, device, path_length_step(128, device))?),
        Work::EncoderStep8 => (8, repeat(runs, device, encoder_step(8, device)?)?),
        Work::Conv => {
            if !is_cpu(device) {
                bail!(
                    "the device is {}, expected cpu: it times the CPU's kernels\nhint: give --device cpu",
                    faceprior::device::describe(device)
                );
            }
            let cases = convolutions(runs);
            return Ok((CONVOLUTION_BATCH, Seconds::Several { cases }));
        }
        Work::Loader => loader(runs, data()?)?,
        Work::Align => alignment(runs, data()?)?,
    };
    Ok((items, Seconds::One { runs }))
}

/// Seconds of each of `runs` calls, after those to warm up.
fn repeat(runs: usize, device: &Device, mut iteration: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..WARM_UP + runs {
        let start = Instant::now();
        iteration()?;
        device
            .sync()
            .map_err(|error| anyhow!("the device failed: {error:?}"))?;
        if run >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

fn pictures(shape: [usize; 4], device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values(shape), shape), device)
}

fn values(shape: [usize; 4]) -> Vec<f32> {
    (0..shape.iter().product())
        .map(|at: usize| ((at * 37 % 255) as f32 - 127.0) / 127.5)
        .collect()
}

fn recognizer_inference(batch: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let network = RecognizerConfig::from_encoder(Depth::D50)
        .init(&mut Init::new(1, device))
        .valid();
    let images = pictures([batch, 6, 112, 112], device);
    move || {
        network.forward(images.clone(), Mode::Eval);
        Ok(())
    }
}

fn mobilefacenet_inference(batch: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let config = MobileFaceNetConfig::default();
    let [height, width] = config.image_size;
    let network = config.init(&mut Init::new(1, device)).valid();
    let images = pictures([batch, 3, height, width], device);
    move || {
        network.forward(images.clone(), Mode::Eval);
        Ok(())
    }
}

fn recognizer_step(batch: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let device = device.clone().autodiff();
    let mut network = RecognizerConfig::from_encoder(Depth::D50).init(&mut Init::new(1, &device));
    let head = HeadConfig {
        kind: HeadKind::ArcFace,
        num_classes: CLASSES,
        embedding_dim: 512,
    };
    let mut head = head.init(&mut Init::new(2, &device));
    let optimizer = || Optimizer::sgd(0.9, 2e-3, all_but_batch_norm);
    let (mut network_optimizer, mut head_optimizer) = (optimizer(), optimizer());
    let images = pictures([batch, 6, 112, 112], &device);
    let labels: Vec<i64> = (0..batch as i64).collect();
    let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [batch]), &device);
    let margin = Margin {
        scale: 64.0,
        margin: 0.5,
    };
    move || {
        let embeddings = network.forward(images.clone(), Mode::Train);
        let (cross_entropy, _) = head.cross_entropy(embeddings, labels.clone(), margin);
        let mut gradients = losses::focal(cross_entropy, 2.0).backward();
        network = network_optimizer.step(network.clone(), &mut gradients, 0.03);
        head = head_optimizer.step(head.clone(), &mut gradients, 0.03);
        Ok(())
    }
}

/// Stage 1 at the published widths.
struct Gan {
    size: usize,
    device: Device,
    generator: Generator,
    average: Generator,
    discriminator: Discriminator,
    generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
    rng: ChaCha8Rng,
}

impl Gan {
    /// For pictures of `size`².
    fn new(size: usize, device: &Device) -> Self {
        let device = device.clone().autodiff();
        let generator = GeneratorConfig {
            resolution: size,
            latent_dim: 512,
            mapping_layers: 8,
            channel_base: 16384,
            channel_max: 512,
        };
        let discriminator = DiscriminatorConfig {
            resolution: size,
            channel_base: 16384,
            channel_max: 512,
        };
        let generator = generator.init(&mut Init::new(1, &device));
        let optimizer = || Optimizer::adam([0.0, 0.99]);
        Self {
            average: generator.valid(),
            generator,
            discriminator: discriminator.init(&mut Init::new(2, &device)),
            generator_optimizer: optimizer(),
            discriminator_optimizer: optimizer(),
            rng: ChaCha8Rng::seed_from_u64(3),
            size,
            device,
        }
    }

    fn reals(&self) -> Tensor<4> {
        pictures([GAN_BATCH, 3, self.size, self.size], &self.device)
    }

    fn mapped(&mut self, generator: &Generator) -> Tensor<2> {
        let device = self.device.clone().without_autodiff();
        generator
            .mapping
            .forward(normal(&mut self.rng, [GAN_BATCH, 512], &device))
    }

    /// Pictures of two mixed codes.
    fn fakes(&mut self, generator: &Generator) -> Tensor<4> {
        let (first, second) = (self.mapped(generator), self.mapped(generator));
        let codes = generator.mixed_codes(first, second, 4);
        generator
            .synthesis
            .forward(codes, Noise::Random(self.rng.clone()))
    }

    fn step_generator(&mut self, loss: Tensor<1>) {
        let mut gradients = loss.backward();
        self.generator = self
            .generator_optimizer
            .step(self.generator.clone(), &mut gradients, GAN_RATE);
    }

    fn step_discriminator(&mut self, loss: Tensor<1>) {
        let mut gradients = loss.backward();
        self.discriminator =
            self.discriminator_optimizer
                .step(self.discriminator.clone(), &mut gradients, GAN_RATE);
    }
}

fn generator_step(size: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let mut gan = Gan::new(size, device);
    move || {
        let fakes = gan.fakes(&gan.generator.clone());
        gan.step_generator(generator_loss(gan.discriminator.valid().forward(fakes)));
        gan.average = update_average(gan.average.clone(), &gan.generator, 0.995);
        Ok(())
    }
}

fn discriminator_step(size: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let mut gan = Gan::new(size, device);
    let reals = gan.reals();
    move || {
        let fakes = gan.fakes(&gan.generator.valid());
        let on_fakes = gan.discriminator.forward(fakes.autodiff());
        let on_reals = gan.discriminator.forward(reals.clone());
        gan.step_discriminator(discriminator_loss(on_fakes, on_reals));
        Ok(())
    }
}

fn r1_step(size: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let mut gan = Gan::new(size, device);
    let reals = gan.reals();
    move || {
        let penalty = r1_penalty(&gan.discriminator, reals.clone());
        gan.step_discriminator(penalty.surrogate.mul_scalar(64.0));
        Ok(())
    }
}

fn path_length_step(size: usize, device: &Device) -> impl FnMut() -> Result<()> + use<> {
    let mut gan = Gan::new(size, device);
    move || {
        let shape = [GAN_BATCH, 3, size, size];
        let plain = gan.device.clone().without_autodiff();
        let directions = normal(&mut gan.rng, shape, &plain).div_scalar(size as f32);
        let w = gan.mapped(&gan.generator.clone());
        let noise = Noise::Random(gan.rng.clone());
        let codes = gan.generator.codes(w);
        let penalty = path_length_penalty(&gan.generator.synthesis, codes, directions, noise, 0.7);
        gan.step_generator(penalty.surrogate.mul_scalar(8.0));
        Ok(())
    }
}

/// Stage 2 of the recipe `paper`, on a prior of random weights.
fn encoder_step(batch: usize, device: &Device) -> Result<impl FnMut() -> Result<()> + use<>> {
    let recipe = Recipe::load("paper", &["encoder.validation_images=1".to_owned()])?;
    let prior = &recipe.prior;
    let generator = GeneratorConfig {
        resolution: prior.resolution,
        latent_dim: prior.latent_dim,
        mapping_layers: prior.mapping_layers,
        channel_base: prior.channel_base,
        channel_max: prior.channel_max,
    };
    let discriminator = DiscriminatorConfig {
        resolution: prior.resolution,
        channel_base: prior.channel_base,
        channel_max: prior.channel_max,
    };
    let generator = generator.init(&mut Init::new(1, device));
    let latent_avg = Tensor::zeros([prior.latent_dim], device);
    let mut stage = EncoderStage::new(
        &recipe,
        &Prior {
            average_image: generator.picture_of(latent_avg.clone()),
            latent_avg,
            generator,
        }
        .to_weights(),
        &discriminator.init(&mut Init::new(2, device)).to_weights(),
        Arc::new(SyntheticFaces::new(1, 2, 1, 32)), // not looked at: the batches are made up
        device,
    )?;
    let size = recipe.backbone.image_size;
    let shape = [batch, 3, size, size];
    let images = values(shape);
    let mut clock = Clock {
        seed: recipe.seed,
        step: 0,
        images: 0,
        total_images: recipe.encoder.budget.images,
        epoch: 0,
    };
    Ok(move || {
        let batch = Batch {
            images: images.clone(),
            shape,
            labels: Vec::new(),
            indices: (0..batch).collect(),
            position: Position::default(),
            wait: Duration::ZERO,
        };
        stage.step(batch, &clock)?;
        clock.step += 1;
        Ok(())
    })
}

/// Each pass of each convolution on its own.
fn convolutions(runs: usize) -> Vec<Case> {
    type Pass = fn(&mut Convolution);
    const PASSES: [(&str, Pass); 3] = [
        ("forward", Convolution::forward),
        ("data-gradient", Convolution::data_gradient),
        ("weight-gradient", Convolution::weight_gradient),
    ];
    let mut cases = Vec::new();
    for (kernel, channels @ [inputs, outputs], size, stride) in CONVOLUTIONS {
        for (name, pass) in PASSES {
            let mut convolution = Convolution::new(CONVOLUTION_BATCH, channels, size, kernel, stride);
            cases.push(Case {
                name: format!("{kernel}x{kernel}-{inputs}x{outputs}-{size}-s{stride}-{name}"),
                runs: repeat_short(runs, || pass(&mut convolution)),
            });
        }
    }
    cases
}

/// Seconds of a call in each of `runs` runs, which have as many calls as take [`CONVOLUTION_SECONDS`].
fn repeat_short(runs: usize, mut call: impl FnMut()) -> Vec<f64> {
    let mut seconds_of = |calls: u32| {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        start.elapsed().as_secs_f64() / f64::from(calls)
    };
    let warm_up = (0..WARM_UP).map(|_| seconds_of(1)).last().unwrap_or_default();
    let calls = (CONVOLUTION_SECONDS / warm_up).ceil().clamp(1.0, 1e6) as u32;
    (0..runs).map(|_| seconds_of(calls)).collect()
}

/// The pictures of a folder, each once, through one worker of the loader.
fn loader(runs: usize, data: &Path) -> Result<(usize, Vec<f64>)> {
    let dataset = Arc::new(ImageList::from_folder(data)?);
    let config = LoaderConfig {
        batch_size: 64,
        seed: 1,
        workers: 1,
        queue: 1,
        drop_last: false,
        ..LoaderConfig::default()
    };
    let items = dataset.len();
    let mut loader = Loader::new(dataset, Transform::augment(112), config, Position::default())?;
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..WARM_UP + runs {
        let start = Instant::now();
        for _ in 0..loader.batches_per_epoch() {
            loader.next()?;
        }
        if run >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok((items, seconds))
}

/// The pictures of a folder through detection, warp and writing, into a folder that is removed again.
fn alignment(runs: usize, data: &Path) -> Result<(usize, Vec<f64>)> {
    let items = ImageList::from_folder(data)?.len();
    let crops = Crops::One {
        which: Which::Center,
        center_fallback: false,
    };
    let options = AlignOptions {
        settings: AlignSettings {
            crops,
            ..AlignSettings::default()
        },
        ..AlignOptions::default()
    };
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..WARM_UP + runs {
        let out = std::env::temp_dir().join(format!("faceprior-bench-{}-{run}", std::process::id()));
        let start = Instant::now();
        let outcome = align(data, &out, &options, &|_| (), &AtomicBool::new(false));
        let elapsed = start.elapsed().as_secs_f64();
        std::fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
        outcome?;
        if run >= WARM_UP {
            seconds.push(elapsed);
        }
    }
    Ok((items, seconds))
}

/// Highest resident memory of this process, from Linux's `/proc`.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
