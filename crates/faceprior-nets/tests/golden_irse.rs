//! IR and IR-SE recognisers against the reference's numbers: values, gradients, running statistics.

mod golden;

use burn::tensor::{Device, Tensor};
use faceprior_nets::fill::{fill, input};
use faceprior_nets::init::Init;
use faceprior_nets::irse::{Depth, Recognizer, RecognizerConfig, beside_average};
use faceprior_nets::layers::Mode;
use golden::{assert_close, assert_gradient_norms, names, read};

fn recognizer(config: RecognizerConfig, prefix: &str, device: &Device) -> Recognizer {
    fill(config.init(&mut Init::new(0, device)), prefix)
}

/// Embedding, every parameter's gradient norm, the input's gradient.
fn from_encoder(net: &str, depth: Depth) {
    let golden = read("irse.safetensors");
    let device = Device::flex().autodiff();
    let recognizer = recognizer(RecognizerConfig::from_encoder(depth), "g.encoder.", &device);

    let image = input("g.input.image", [2, 3, 112, 112], 1.0, &device);
    let average = input("g.input.avg", [3, 112, 112], 1.0, &device);
    let images = beside_average(image, average).detach().require_grad();
    let embedding = recognizer.forward(images.clone(), Mode::Eval);
    assert_close(net, embedding.clone(), &golden, &format!("{net}.embedding"), 1e-4);

    let cotangent = input("g.cotangent", [2, 512], 1.0, &device);
    let gradients = (embedding * cotangent).sum().backward();
    assert_gradient_norms(
        net,
        &recognizer,
        &gradients,
        (&golden, &format!("{net}.grad_norm")),
        &names(&format!("{net}.param_names")),
        (1e-3, 0.0),
    );
    let gradient = images.grad(&gradients).unwrap();
    let norm = gradient.clone().square().sum().sqrt();
    assert_close(
        "input gradient norm",
        norm,
        &golden,
        &format!("{net}.grad_input_norm"),
        1e-3,
    );
    let corner = gradient.slice([0..2, 0..6, 0..8, 0..8]);
    assert_close(
        "input gradient",
        corner,
        &golden,
        &format!("{net}.grad_input_corner"),
        1e-3,
    );
}

#[test]
fn recognizer_34_from_encoder() {
    from_encoder("restyle34", Depth::D34);
}

#[test]
fn recognizer_50_from_encoder() {
    from_encoder("restyle50", Depth::D50);
}

#[test]
fn recognizer_34_in_training_mode() {
    let golden = read("irse.safetensors");
    let device = Device::flex().autodiff();
    let mut config = RecognizerConfig::from_encoder(Depth::D34);
    config.output_dropout = 0.0;
    let recognizer = recognizer(config, "g.encoder.", &device);
    let images = input("g.input.train", [4, 6, 112, 112], 1.0, &device);
    let embedding = recognizer.forward(images, Mode::Train);
    assert_close(
        "embedding",
        embedding.clone(),
        &golden,
        "restyle34.train_embedding",
        1e-4,
    );

    let norm = &recognizer.input_layer.1;
    assert_close(
        "mean",
        norm.running_mean.get(),
        &golden,
        "restyle34.train_running_mean_0",
        1e-4,
    );
    assert_close(
        "variance",
        norm.running_var.get(),
        &golden,
        "restyle34.train_running_var_0",
        1e-4,
    );

    let cotangent: Tensor<2> = input("g.cotangent4", [4, 512], 1.0, &device);
    let gradients = (embedding * cotangent).sum().backward();
    // Parameters just before a normalisation by the batch have no gradient but rounding: hence the floor.
    assert_gradient_norms(
        "training",
        &recognizer,
        &gradients,
        (&golden, "restyle34.train_grad_norm"),
        &names("restyle34.param_names"),
        (1e-3, 1e-4),
    );
}

fn face_evolve(net: &str, squeeze_excitation: bool) {
    let device = Device::flex();
    let config = RecognizerConfig::face_evolve(Depth::D50, squeeze_excitation);
    let recognizer = recognizer(config, &format!("g.{net}."), &device);
    let image = input("g.input.image", [2, 3, 112, 112], 1.0, &device);
    let embedding = recognizer.forward(image, Mode::Eval);
    assert_close(
        net,
        embedding,
        &read("irse.safetensors"),
        &format!("{net}.embedding"),
        1e-4,
    );
}

#[test]
fn ir_50() {
    face_evolve("IR_50", false);
}

#[test]
fn ir_se_50() {
    face_evolve("IR_SE_50", true);
}
