//! MobileFaceNet against the reference's numbers.
//!
//! face.evoLVe's network computes the same as the public layout under other names, so its golden serves: each of our
//! parameters is filled as the one that it corresponds to.

mod golden;

use std::path::Path;

use burn::tensor::{Device, TensorData};
use faceprior_nets::fill::{input, unit};
use faceprior_nets::init::Init;
use faceprior_nets::layers::Mode;
use faceprior_nets::mobilefacenet::MobileFaceNetConfig;
use faceprior_nets::weights::Weights;
use golden::{assert_close, read};

/// face.evoLVe's name of a parameter of the public layout.
fn face_evolve_name(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        ["blocks", block, "conv", layer, field] => {
            let block = match block.parse().unwrap() {
                0 => "conv_23".to_owned(),
                n @ 1..=4 => format!("conv_3.model.{}", n - 1),
                5 => "conv_34".to_owned(),
                n @ 6..=11 => format!("conv_4.model.{}", n - 6),
                12 => "conv_45".to_owned(),
                n => format!("conv_5.model.{}", n - 13),
            };
            let layer = [
                "conv.conv",
                "conv.bn",
                "conv.prelu",
                "conv_dw.conv",
                "conv_dw.bn",
                "conv_dw.prelu",
                "project.conv",
                "project.bn",
            ][layer.parse::<usize>().unwrap()];
            format!("{block}.{layer}.{field}")
        }
        ["dw_conv1", ..] => name.replace("dw_conv1", "conv2_dw"),
        ["conv2", ..] => name.replace("conv2", "conv_6_sep"),
        ["linear7", ..] => name.replace("linear7", "conv_6_dw"),
        ["linear1", "conv", field] => format!("linear.{field}"),
        ["linear1", ..] => name.replace("linear1.", ""),
        _ => name.to_owned(),
    }
}

/// The goldens' table, by name alone.
fn scale_and_shift(name: &str, shape: &[usize]) -> (f64, f64) {
    match name.rsplit('.').take(2).collect::<Vec<_>>()[..] {
        ["weight", "bn"] => (0.1, 1.0),
        ["running_var", _] => (0.25, 1.0),
        ["bias" | "running_mean", _] => (0.1, 0.0),
        ["weight", "prelu"] => (0.05, 0.25),
        _ => ((3.0 / shape[1..].iter().product::<usize>() as f64).sqrt(), 0.0),
    }
}

#[test]
fn mobile_face_net() {
    let device = Device::flex();
    let config = MobileFaceNetConfig {
        image_size: [112, 112],
        embedding_dim: 512,
        ..Default::default()
    };
    let network = config.init(&mut Init::new(0, &device));
    let shapes = Weights::from_module(&network, "");
    let mut filled = Weights::new();
    for name in shapes
        .names()
        .filter(|name| !name.ends_with("num_batches_tracked"))
    {
        let shape = shapes.get(name).unwrap().shape();
        let theirs = face_evolve_name(name);
        let (scale, shift) = scale_and_shift(&theirs, shape);
        let numbers = unit(&format!("g.MobileFaceNet.{theirs}"), shape.num_elements());
        let numbers: Vec<f32> = numbers.iter().map(|u| (u * scale + shift) as f32).collect();
        filled.insert(name, TensorData::new(numbers, shape.clone()));
    }
    let network = filled.load_into(network, "").unwrap();
    let embedding = network.forward(input("g.input.image", [2, 3, 112, 112], 1.0, &device), Mode::Eval);
    assert_close(
        "MobileFaceNet",
        embedding,
        &read("irse.safetensors"),
        "MobileFaceNet.embedding",
        1e-4,
    );
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn the_public_checkpoint_loads_strictly() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/models/mobilefacenet_casia_068.safetensors");
    let network = MobileFaceNetConfig::default().init(&mut Init::new(0, &Device::flex()));
    let weights = Weights::read(&path).unwrap();
    let network = weights.load_into(network, "").unwrap();
    let ours = Weights::from_module(&network, "");
    assert!(
        weights.names().eq(ours.names()),
        "the same keys, PyTorch's counters included"
    );
}
