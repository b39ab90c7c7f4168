//! The stage-2 encoder against the reference's numbers.

mod golden;

use burn::tensor::Device;
use faceprior_nets::encoder::BackboneEncoderConfig;
use faceprior_nets::fill::{fill, input};
use faceprior_nets::init::Init;
use faceprior_nets::irse::Depth;
use faceprior_nets::layers::Mode;
use golden::{assert_close, assert_gradient_norms, names, read};

#[test]
fn backbone_encoder_34() {
    let golden = read("encoders.safetensors");
    let device = Device::flex().autodiff();
    let config = BackboneEncoderConfig::published(Depth::D34, 14);
    let encoder = fill(config.init(&mut Init::new(0, &device)), "g.");
    let codes = encoder.forward(input("g.input.six", [2, 6, 112, 112], 1.0, &device), Mode::Eval);
    assert_close("codes", codes.clone(), &golden, "psp34.codes", 1e-4);

    let cotangent = input("g.cotangent.codes", [2, 14, 512], 1.0, &device);
    let gradients = (codes * cotangent).sum().backward();
    let names = names("psp34.param_names");
    assert_gradient_norms(
        "psp34",
        &encoder,
        &gradients,
        (&golden, "psp34.grad_norm"),
        &names,
        (1e-3, 0.0),
    );
}
