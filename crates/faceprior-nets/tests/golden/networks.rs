//! The networks of the recogniser's path, filled by the goldens' rule, against the reference: values and gradients.

use burn::tensor::{Device, Tensor};
use faceprior_nets::encoder::BackboneEncoderConfig;
use faceprior_nets::fill::{fill, input};
use faceprior_nets::init::Init;
use faceprior_nets::irse::{Depth, RecognizerConfig, beside_average};
use faceprior_nets::layers::Mode;

use super::{
    assert_close, assert_gradient_norms, compare, compare_gradient_norms, names, on_the_goldens_side, read,
};

/// Relative errors that are allowed.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) output: f32,
    pub(crate) gradient: f64,
    /// For the weights of squeeze-and-excitation gates.
    pub(crate) gates: f64,
    /// For single pixels of the input's gradient, relative to the largest.
    pub(crate) pixels: f32,
    /// Norms are compared relative to themselves, or to this part of the largest where that is more.
    pub(crate) floor: f64,
}

/// Evaluation: embedding, every parameter's gradient norm, the input's gradient. `net` as in the goldens.
pub(crate) fn recognizer_from_encoder(net: &str, depth: Depth, device: &Device, tolerance: Tolerance) {
    let golden = read("irse.safetensors");
    let device = &device.clone().autodiff();
    let config = RecognizerConfig::from_encoder(depth);
    let recognizer = fill(config.init(&mut Init::new(0, device)), "g.encoder.");

    let image = input("g.input.image", [2, 3, 112, 112], 1.0, device);
    let average = input("g.input.avg", [3, 112, 112], 1.0, device);
    let images = beside_average(image, average).detach().require_grad();
    let embedding = recognizer.forward(images.clone(), Mode::Eval);
    assert_close(
        net,
        embedding.clone(),
        &golden,
        &format!("{net}.embedding"),
        tolerance.output,
    );

    let cotangent = input("g.cotangent", [2, 512], 1.0, device);
    let gradients = (embedding * cotangent).sum().backward();
    let expected = (&golden, format!("{net}.grad_norm"));
    let names = names(&format!("{net}.param_names"));
    assert_gradient_norms(net, &recognizer, &gradients, expected, &names, tolerance);

    let gradient = images.grad(&gradients).unwrap();
    let norm = gradient.clone().square().sum().sqrt();
    let close = tolerance.gradient as f32;
    assert_close(
        "input gradient norm",
        norm,
        &golden,
        &format!("{net}.grad_input_norm"),
        close,
    );
    let corner = gradient.slice([0..2, 0..6, 0..8, 0..8]);
    assert_close(
        "input gradient",
        corner,
        &golden,
        &format!("{net}.grad_input_corner"),
        tolerance.pixels,
    );
}

/// Training mode without dropout: embedding, running statistics, every parameter's gradient norm.
pub(crate) fn recognizer_34_in_training(device: &Device, tolerance: Tolerance) {
    let golden = read("irse.safetensors");
    let device = &device.clone().autodiff();
    let config = RecognizerConfig {
        output_dropout: 0.0,
        ..RecognizerConfig::from_encoder(Depth::D34)
    };
    on_the_goldens_side(1e-6, device, |moved| {
        let recognizer = fill(config.init(&mut Init::new(0, device)), "g.encoder.");
        let images = moved(input("g.input.train", [4, 6, 112, 112], 1.0, device));
        let embedding = recognizer.forward(images, Mode::Train);
        let norm = &recognizer.input_layer.1;
        let close = |what: &str, got, key: &str| {
            let key = format!("restyle34.train_{key}");
            assert_close::<1>(what, got, &golden, &key, tolerance.output);
        };
        close("running mean", norm.running_mean.get(), "running_mean_0");
        close("running variance", norm.running_var.get(), "running_var_0");
        let (what, key) = ("training", "restyle34.train_embedding");
        compare(what, embedding.clone(), &golden, key, tolerance.output)?;
        let cotangent: Tensor<2> = input("g.cotangent4", [4, 512], 1.0, device);
        let gradients = (embedding * cotangent).sum().backward();
        let expected = (&golden, "restyle34.train_grad_norm".to_owned());
        let names = names("restyle34.param_names");
        compare_gradient_norms(what, &recognizer, &gradients, expected, &names, tolerance)
    });
}

/// Evaluation of face.evoLVe's form. `net` as in the goldens.
pub(crate) fn face_evolve_50(net: &str, squeeze_excitation: bool, device: &Device, tolerance: Tolerance) {
    let config = RecognizerConfig::face_evolve(Depth::D50, squeeze_excitation);
    let recognizer = fill(config.init(&mut Init::new(0, device)), &format!("g.{net}."));
    let image = input("g.input.image", [2, 3, 112, 112], 1.0, device);
    let embedding = recognizer.forward(image, Mode::Eval);
    let key = format!("{net}.embedding");
    assert_close(net, embedding, &read("irse.safetensors"), &key, tolerance.output);
}

/// Evaluation: codes and every parameter's gradient norm.
pub(crate) fn backbone_encoder_34(device: &Device, tolerance: Tolerance) {
    let golden = read("encoders.safetensors");
    let device = &device.clone().autodiff();
    let config = BackboneEncoderConfig::published(Depth::D34, 14);
    on_the_goldens_side(1e-6, device, |moved| {
        let encoder = fill(config.init(&mut Init::new(0, device)), "g.");
        let images = moved(input("g.input.six", [2, 6, 112, 112], 1.0, device));
        let codes = encoder.forward(images, Mode::Eval);
        assert_close("psp34", codes.clone(), &golden, "psp34.codes", tolerance.output);

        let cotangent = input("g.cotangent.codes", [2, 14, 512], 1.0, device);
        let gradients = (codes * cotangent).sum().backward();
        let expected = (&golden, "psp34.grad_norm".to_owned());
        let names = names("psp34.param_names");
        compare_gradient_norms("psp34", &encoder, &gradients, expected, &names, tolerance)
    });
}
