//! `faceprior bench`: the program's work, timed on this device.
//!
//! Each figure is seconds of one iteration after two to warm up; `benchmarks/compare.py` runs the same work in PyTorch
//! beside it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use faceprior::data::{Dataset, ImageList, Loader, LoaderConfig, Position, Transform};
use faceprior::faces::{AlignOptions, AlignSettings, Crops, Which, align};
use faceprior::nets::heads::{HeadConfig, HeadKind, Margin};
use faceprior::nets::init::Init;
use faceprior::nets::irse::{Depth, RecognizerConfig};
use faceprior::nets::layers::Mode;
use faceprior::nets::losses;
use faceprior::nets::stylegan2::regularizers::{path_length_penalty, r1_penalty};
use faceprior::nets::stylegan2::{
    Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, Noise, discriminator_loss,
    generator_loss, normal,
};
use faceprior::train::optim::{Optimizer, all_but_batch_norm, update_average};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

use super::Context;
use crate::args::{self, Work};

#[derive(Serialize)]
struct Timing {
    work: String,
    /// Seconds of each iteration.
    runs: Vec<f64>,
    items_per_iteration: usize,
    /// Highest resident memory of the process so far, in bytes; `null` where the system does not tell.
    peak_bytes: Option<u64>,
    device: String,
    version: &'static str,
}

impl Timing {
    fn median(&self) -> f64 {
        let mut runs = self.runs.clone();
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    }
}

/// Pictures of the StyleGAN2 work.
const GAN_BATCH: usize = 8;
/// Side of its pictures.
const GAN_SIZE: usize = 64;
/// Adam's rate in it.
const GAN_RATE: f64 = 0.002;
/// Iterations before the first that counts.
const WARM_UP: usize = 2;
/// Identities of the recogniser's head.
const CLASSES: usize = 1000;

pub fn run(context: &Context, arguments: args::Bench) -> Result<()> {
    let device = context.open_device()?;
    let works = if arguments.work.is_empty() {
        let needs_pictures = |work: &Work| matches!(work, Work::Loader | Work::Align);
        let all = Work::value_variants().iter().copied();
        all.filter(|work| arguments.data.is_some() || !needs_pictures(work))
            .collect()
    } else {
        arguments.work
    };
    if context.json && works.len() != 1 {
        bail!(
            "--json times one work a process, so that its memory is its own; got {} works",
            works.len()
        );
    }
    let mut timings = Vec::new();
    for work in works {
        let name = work
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default();
        let data = arguments.data.as_deref();
        let (items, runs) = time(work, arguments.runs as usize, data, &device)
            .with_context(|| format!("cannot time {name}"))?;
        let timing = Timing {
            work: name,
            runs,
            items_per_iteration: items,
            peak_bytes: peak_bytes(),
            device: faceprior::device::describe(&device),
            version: env!("CARGO_PKG_VERSION"),
        };
        if !context.json {
            let median = timing.median();
            println!(
                "{:<14} {:>9.2} items/s  {:>9.4} s",
                timing.work,
                items as f64 / median,
                median
            );
        }
        timings.push(timing);
    }
    match timings.as_slice() {
        [timing] if context.json => super::print_json(timing),
        _ => Ok(()),
    }
}

/// Items of an iteration, and seconds of each.
fn time(work: Work, runs: usize, data: Option<&Path>, device: &Device) -> Result<(usize, Vec<f64>)> {
    let data = || data.ok_or_else(|| anyhow!("it needs pictures\nhint: give a folder of them with --data"));
    match work {
        Work::Ir50Train16 => Ok((16, repeat(runs, device, recognizer_step(16, device))?)),
        Work::Ir50Infer1 => Ok((1, repeat(runs, device, recognizer_inference(1, device))?)),
        Work::Ir50Infer32 => Ok((32, repeat(runs, device, recognizer_inference(32, device))?)),
        Work::GanStep64 => Ok((GAN_BATCH, repeat(runs, device, gan_step(device))?)),
        Work::GanR164 => Ok((GAN_BATCH, repeat(runs, device, r1_step(device))?)),
        Work::GanPl64 => Ok((GAN_BATCH, repeat(runs, device, path_length_step(device))?)),
        Work::Loader => loader(runs, data()?),
        Work::Align => alignment(runs, data()?),
    }
}

/// Seconds of each of `runs` calls, after those to warm up.
fn repeat(runs: usize, device: &Device, mut iteration: impl FnMut()) -> Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..WARM_UP + runs {
        let start = Instant::now();
        iteration();
        device
            .sync()
            .map_err(|error| anyhow!("the device failed: {error:?}"))?;
        if run >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

fn pictures(n: usize, channels: usize, size: usize, device: &Device) -> Tensor<4> {
    let values = (0..n * channels * size * size).map(|at| ((at * 37 % 255) as f32 - 127.0) / 127.5);
    Tensor::from_data(
        TensorData::new(values.collect(), [n, channels, size, size]),
        device,
    )
}

fn recognizer_inference(batch: usize, device: &Device) -> impl FnMut() + use<> {
    let network = RecognizerConfig::from_encoder(Depth::D50)
        .init(&mut Init::new(1, device))
        .valid();
    let images = pictures(batch, 6, 112, device);
    move || {
        network.forward(images.clone(), Mode::Eval);
    }
}

fn recognizer_step(batch: usize, device: &Device) -> impl FnMut() + use<> {
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
    let images = pictures(batch, 6, 112, &device);
    let labels: Vec<i64> = (0..batch as i64).collect();
    let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [batch]), &device);
    let margin = Margin {
        scale: 64.0,
        margin: 0.5,
    };
    move || {
        let embeddings = network.forward(images.clone(), Mode::Train);
        let logits = head.logits(embeddings, labels.clone(), margin);
        let mut gradients = losses::focal(logits, labels.clone(), 2.0).backward();
        network = network_optimizer.step(network.clone(), &mut gradients, 0.03);
        head = head_optimizer.step(head.clone(), &mut gradients, 0.03);
    }
}

/// Stage 1 at the published widths.
struct Gan {
    device: Device,
    generator: Generator,
    average: Generator,
    discriminator: Discriminator,
    generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
    rng: ChaCha8Rng,
}

impl Gan {
    fn new(device: &Device) -> Self {
        let device = device.clone().autodiff();
        let generator = GeneratorConfig {
            resolution: GAN_SIZE,
            latent_dim: 512,
            mapping_layers: 8,
            channel_base: 16384,
            channel_max: 512,
        };
        let discriminator = DiscriminatorConfig {
            resolution: GAN_SIZE,
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
            device,
        }
    }

    fn mapped(&mut self) -> Tensor<2> {
        self.generator
            .mapping
            .forward(normal(&mut self.rng, [GAN_BATCH, 512], &self.device))
    }

    /// Pictures of two mixed codes.
    fn fakes(&mut self) -> Tensor<4> {
        let (first, second) = (self.mapped(), self.mapped());
        let codes = self.generator.mixed_codes(first, second, 4);
        self.generator
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

fn gan_step(device: &Device) -> impl FnMut() + use<> {
    let mut gan = Gan::new(device);
    let real = pictures(GAN_BATCH, 3, GAN_SIZE, &gan.device);
    move || {
        let fake = gan.fakes();
        gan.step_generator(generator_loss(gan.discriminator.forward(fake)));
        let fake = gan.fakes().detach();
        let logits = gan.discriminator.forward(real.clone());
        gan.step_discriminator(discriminator_loss(gan.discriminator.forward(fake), logits));
        gan.average = update_average(gan.average.clone(), &gan.generator, 0.995);
    }
}

fn r1_step(device: &Device) -> impl FnMut() + use<> {
    let mut gan = Gan::new(device);
    let real = pictures(GAN_BATCH, 3, GAN_SIZE, &gan.device);
    move || {
        let penalty = r1_penalty(&gan.discriminator, real.clone());
        gan.step_discriminator(penalty.surrogate.mul_scalar(64.0));
    }
}

fn path_length_step(device: &Device) -> impl FnMut() + use<> {
    let mut gan = Gan::new(device);
    let shape = [GAN_BATCH, 3, GAN_SIZE, GAN_SIZE];
    let directions = normal(&mut gan.rng, shape, &gan.device).div_scalar(GAN_SIZE as f32);
    move || {
        let w = gan.mapped();
        let codes = gan.generator.codes(w);
        let penalty = path_length_penalty(
            &gan.generator.synthesis,
            codes,
            directions.clone(),
            Noise::Constant,
            0.7,
        );
        gan.step_generator(penalty.surrogate.mul_scalar(8.0));
    }
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
