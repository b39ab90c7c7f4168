//! StyleGAN2-ADA against numbers of the reference, computed in float64: values, losses and every parameter's gradient.
//!
//! Parameters, inputs and the names `gan32`, `gan128` are those of the goldens' fill rule (`faceprior_nets::fill`).

mod golden;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use faceprior_nets::fill::{fill, input};
use faceprior_nets::init::Init;
use faceprior_nets::stylegan2::regularizers::{path_length_penalty, r1_penalty};
use faceprior_nets::stylegan2::{
    Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, Noise, discriminator_loss, generator_loss,
};
use faceprior_nets::weights::Weights;
use golden::{numbers, on_the_goldens_side};

const OUTPUT: f64 = 1e-4;
const NORM: f64 = 1e-3;

/// The networks of one golden, filled, with their inputs.
struct Golden {
    net: &'static str,
    numbers: Weights,
    device: Device,
    resolution: usize,
    mapping_layers: usize,
}

impl Golden {
    fn new(net: &'static str, device: Device) -> Self {
        let numbers = golden::read("stylegan2.safetensors");
        let (resolution, mapping_layers) = if net == "gan32" { (32, 2) } else { (128, 8) };
        Self {
            net,
            numbers,
            device,
            resolution,
            mapping_layers,
        }
    }

    fn generator(&self) -> Generator {
        let config = GeneratorConfig {
            resolution: self.resolution,
            latent_dim: 512,
            mapping_layers: self.mapping_layers,
            channel_base: 16384,
            channel_max: 512,
        };
        fill(config.init(&mut Init::new(0, &self.device)), "g.G.")
    }

    fn discriminator(&self) -> Discriminator {
        let config = DiscriminatorConfig {
            resolution: self.resolution,
            channel_base: 16384,
            channel_max: 512,
        };
        fill(config.init(&mut Init::new(0, &self.device)), "g.D.")
    }

    fn z(&self, name: &str) -> Tensor<2> {
        input(name, [4, 512], 3.0f64.sqrt(), &self.device)
    }

    fn real(&self) -> Tensor<4> {
        let size = self.resolution;
        input(&format!("g.real{size}"), [4, 3, size, size], 1.0, &self.device)
    }

    fn expected(&self, name: &str) -> Vec<f32> {
        let name = format!("{}.{name}", self.net);
        let data = self
            .numbers
            .get(&name)
            .unwrap_or_else(|| panic!("no golden {name}"));
        data.as_slice::<f32>().unwrap().to_vec()
    }

    /// Compares with the golden's first values, one after another.
    fn check(&self, name: &str, got: &[f32], tolerance: f64) {
        let expected = self.expected(name);
        assert!(
            got.len() <= expected.len(),
            "{name}: {} values, golden {}",
            got.len(),
            expected.len()
        );
        let expected = &expected[..got.len()];
        let largest = expected
            .iter()
            .fold(0.0f64, |largest, &x| largest.max(f64::from(x).abs()));
        for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
            let difference = (f64::from(got) - f64::from(expected)).abs();
            assert!(
                difference <= tolerance * largest,
                "{}.{name}[{index}]: got {got}, expected {expected}, largest {largest}",
                self.net
            );
        }
    }

    /// Compares the norm of every parameter's gradient. Names are sorted out by nets.json; filter kernels, which are
    /// no parameters here, have norm 0 there.
    ///
    /// A noise strength is one number, and rounding moves its gradient by much the same whatever its size: on the CPU,
    /// codes that differ by 1e-7 of themselves move the seven strengths' by up to 3e-5, which is 2e-3 of the smallest,
    /// and 1e-6 by up to 1.7e-4. A GPU rounds differently and is off by up to 5e-5, 1.9e-3 of the smallest: there the
    /// strengths are compared as the parts of one vector, against the largest.
    fn compare_norms<M: Module>(
        &self,
        name: &str,
        names: &str,
        module: &M,
        gradients: &Gradients,
    ) -> Result<(), String> {
        let mut got = Norms {
            path: Vec::new(),
            gradients,
            norms: BTreeMap::new(),
        };
        module.visit(&mut got);
        let names = golden::names(&format!("{}.{names}", self.net));
        let expected = self.expected(name);
        assert_eq!(names.len(), expected.len());
        let largest = expected
            .iter()
            .fold(0.0f64, |largest, &x| largest.max(f64::from(x)));
        let is_strength = |key: &str| key.ends_with("noise_strength");
        let strengths = names.iter().zip(&expected).filter(|(key, _)| is_strength(key));
        let strength = strengths.fold(0.0f64, |largest, (_, &x)| largest.max(f64::from(x)));
        let on_gpu = self.device != Device::flex();
        for (key, expected) in names.iter().zip(expected) {
            let got = got.norms.remove(key).unwrap_or_else(|| {
                assert!(key.ends_with(".kernel"), "the network has no parameter {key}");
                0.0
            });
            let difference = (got - f64::from(expected)).abs();
            let scale = if on_gpu && is_strength(key) {
                strength
            } else {
                f64::from(expected)
            };
            if difference.is_nan() || difference > NORM * scale.max(1e-6 * largest) {
                return Err(format!("{name} of {key}: got {got}, expected {expected}"));
            }
        }
        let left: Vec<_> = got.norms.keys().collect();
        assert!(left.is_empty(), "the golden has no {left:?}");
        Ok(())
    }

    /// Whether a penalty is the golden's.
    fn compare_penalty(&self, name: &str, got: f32) -> Result<(), String> {
        let expected = self.expected(name)[0];
        let close = f64::from((got - expected).abs()) <= OUTPUT * f64::from(expected);
        close
            .then_some(())
            .ok_or(format!("{name}: got {got}, expected {expected}"))
    }
}

/// The norms of the gradients of all parameters, buffers left out.
struct Norms<'a> {
    path: Vec<String>,
    gradients: &'a Gradients,
    norms: BTreeMap<String, f64>,
}

impl ModuleVisitor for Norms<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.val().is_require_grad() {
            return;
        }
        let square =
            |gradient: Tensor<D>| -> f64 { numbers(gradient).iter().map(|&x| f64::from(x).powi(2)).sum() };
        let norm = param.val().grad(self.gradients).map_or(0.0, square).sqrt();
        self.norms.insert(self.path.join("."), norm);
    }
}

fn values_32(device: Device) {
    let golden = Golden::new("gan32", device);
    let generator = golden.generator();
    let (w, w2) = (
        generator.mapping.forward(golden.z("g.z")),
        generator.mapping.forward(golden.z("g.z2")),
    );
    golden.check("w", &numbers(w.clone()), OUTPUT);
    let truncated = generator.mapping.truncate(generator.codes(w.clone()), 0.7, None);
    golden.check("w_truncated", &numbers(truncated.narrow(1, 0, 1)), OUTPUT);
    let image = generator
        .synthesis
        .forward(generator.codes(w.clone()), Noise::Constant);
    golden.check("image", &numbers(image), OUTPUT);
    let mixed = generator
        .synthesis
        .forward(generator.mixed_codes(w, w2, 3), Noise::Constant);
    golden.check("image_mixed", &numbers(mixed), OUTPUT);
    golden.check(
        "logits",
        &numbers(golden.discriminator().forward(golden.real())),
        OUTPUT,
    );
}

/// The published size: depth 8, up to 512 channels. Of the four pictures the first is enough.
fn values_128(device: Device) {
    let golden = Golden::new("gan128", device);
    let generator = golden.generator();
    let (w, w2) = (
        generator.mapping.forward(golden.z("g.z")),
        generator.mapping.forward(golden.z("g.z2")),
    );
    golden.check("w", &numbers(w.clone()), OUTPUT);
    let truncated = generator.mapping.truncate(generator.codes(w.clone()), 0.7, None);
    golden.check("w_truncated", &numbers(truncated.narrow(1, 0, 1)), OUTPUT);
    let (w, w2) = (w.narrow(0, 0, 1), w2.narrow(0, 0, 1));
    let codes = Tensor::cat(
        vec![generator.codes(w.clone()), generator.mixed_codes(w, w2, 3)],
        0,
    );
    let images = numbers(generator.synthesis.forward(codes, Noise::Constant));
    let (image, mixed) = images.split_at(3 * 128 * 128);
    golden.check("image", image, OUTPUT);
    golden.check("image_mixed", mixed, OUTPUT);
    golden.check(
        "logits",
        &numbers(golden.discriminator().forward(golden.real())),
        OUTPUT,
    );
}

fn generator_loss_32(device: Device) {
    let golden = Golden::new("gan32", device.autodiff());
    let generator = golden.generator();
    on_the_goldens_side(1e-6, &golden.device, |moved| {
        let codes = generator.codes(generator.mapping.forward(moved(golden.z("g.z"))));
        let fake = generator.synthesis.forward(codes, Noise::Constant);
        let loss = generator_loss(golden.discriminator().valid().forward(fake));
        golden.check("g_loss", &numbers(loss.clone()), OUTPUT);
        golden.compare_norms("g_grad_norm", "G_names", &generator, &loss.backward())
    });
}

fn discriminator_loss_32(device: Device) {
    let golden = Golden::new("gan32", device.autodiff());
    let generator = golden.generator().valid();
    let discriminator = golden.discriminator();
    on_the_goldens_side(1e-6, &golden.device, |moved| {
        let w = generator
            .mapping
            .forward(moved(golden.z("g.z")).without_autodiff());
        let fake = generator.synthesis.forward(generator.codes(w), Noise::Constant);
        let loss = discriminator_loss(discriminator.forward(fake), discriminator.forward(golden.real()));
        golden.check("d_loss", &numbers(loss.clone()), OUTPUT);
        golden.compare_norms("d_grad_norm", "D_names", &discriminator, &loss.backward())
    });
}

/// R1 is the golden's or, with some units on the other side, 6.5e-4 more.
fn r1_32(device: Device) {
    let golden = Golden::new("gan32", device.autodiff());
    let discriminator = golden.discriminator();
    on_the_goldens_side(1e-5, &golden.device, |moved| {
        let r1 = r1_penalty(&discriminator, moved(golden.real()));
        golden.compare_penalty("r1", r1.penalty)?;
        let gradients = r1.surrogate.backward();
        golden.compare_norms("r1_grad_norm", "D_names", &discriminator, &gradients)?;
        let first = discriminator.net.from_rgb.weight.val().grad(&gradients).unwrap();
        golden.check("r1_grad_first", &numbers(first), NORM);
        let last = &discriminator.net.epilogue.out.weight;
        golden.check("r1_grad_fc", &numbers(last.val().grad(&gradients).unwrap()), NORM);
        Ok(())
    });
}

/// The path length penalty is the golden's or, with some units on the other side, 1.5e-4 more.
fn path_length_32(device: Device) {
    let golden = Golden::new("gan32", device.autodiff());
    let generator = golden.generator();
    let directions = input("g.plnoise32", [4, 3, 32, 32], 3.0f64.sqrt(), &golden.device).div_scalar(32.0);
    on_the_goldens_side(1e-6, &golden.device, |moved| {
        let codes = generator.codes(generator.mapping.forward(moved(golden.z("g.z"))));
        let path = path_length_penalty(
            &generator.synthesis,
            codes,
            directions.clone(),
            Noise::Constant,
            0.7,
        );
        golden.compare_penalty("pl", path.penalty)?;
        golden.check("pl_mean", &[path.running_mean], OUTPUT);
        let gradients = path.surrogate.backward();
        golden.compare_norms("pl_grad_norm", "G_names", &generator, &gradients)?;
        let mapping = &generator.mapping.layers[0].weight;
        let mapping = mapping.val().grad(&gradients).unwrap().narrow(0, 0, 8);
        golden.check("pl_grad_mapping0", &numbers(mapping), NORM);
        let constant = &generator.synthesis.first_block.constant;
        let constant = constant.val().grad(&gradients).unwrap().narrow(0, 0, 8);
        golden.check("pl_grad_const", &numbers(constant), NORM);
        Ok(())
    });
}

#[test]
fn gan32_values() {
    values_32(Device::flex());
}

#[test]
fn gan128_values() {
    values_128(Device::flex());
}

#[test]
fn gan32_generator_loss() {
    generator_loss_32(Device::flex());
}

#[test]
fn gan32_discriminator_loss() {
    discriminator_loss_32(Device::flex());
}

#[test]
fn gan32_r1() {
    r1_32(Device::flex());
}

#[test]
fn gan32_path_length() {
    path_length_32(Device::flex());
}

#[cfg(any(feature = "vulkan", feature = "wgpu"))]
mod gpu {
    use super::*;

    #[test]
    #[ignore = "needs a GPU or its software stand-in; run by cargo xtask check --full"]
    fn gan32() {
        values_32(golden::gpu());
        generator_loss_32(golden::gpu());
        discriminator_loss_32(golden::gpu());
        r1_32(golden::gpu());
        path_length_32(golden::gpu());
    }
}
