//! Recognisers and encoder against the reference's numbers in single precision.
//!
//! Outputs agree to 1e-4 and gradient norms to 1e-3, with two exceptions. Of the millions of PReLU inputs some lie
//! so near to zero that rounding decides on which side, and the slope jumps there. Two kinds of numbers are few or
//! local enough to show single jumps: the gradients of the first squeeze-and-excitation gates, and those of single
//! pixels. Measured in double precision, where the networks agree with every golden to 6e-8: moving the input by 6e-6
//! of itself, which moves the embedding by 3e-6 (what single precision leaves), moves the gates' gradients by 3e-3 and
//! single pixels' by 6e-4; 1e-5 moves them by up to 2e-2 and 4e-3.

mod golden;

use burn::tensor::Device;
use faceprior_nets::irse::Depth;
use golden::networks::{self, Tolerance};

const TOLERANCE: Tolerance = Tolerance {
    output: 1e-4,
    gradient: 1e-3,
    gates: 1e-2,
    pixels: 5e-3,
    floor: 1e-9,
};
/// Biases just before a normalisation by the batch have no gradient but rounding.
const TRAINING: Tolerance = Tolerance {
    floor: 1e-4,
    ..TOLERANCE
};

#[test]
fn recognizer_34_from_encoder() {
    networks::recognizer_from_encoder("restyle34", Depth::D34, &Device::flex(), TOLERANCE);
}

#[test]
fn recognizer_50_from_encoder() {
    networks::recognizer_from_encoder("restyle50", Depth::D50, &Device::flex(), TOLERANCE);
}

#[test]
fn recognizer_34_in_training() {
    networks::recognizer_34_in_training(&Device::flex(), TRAINING);
}

#[test]
fn ir_50() {
    networks::face_evolve_50("IR_50", false, &Device::flex(), TOLERANCE);
}

#[test]
fn ir_se_50() {
    networks::face_evolve_50("IR_SE_50", true, &Device::flex(), TOLERANCE);
}

#[test]
fn backbone_encoder_34() {
    networks::backbone_encoder_34(&Device::flex(), TOLERANCE);
}

#[cfg(any(feature = "vulkan", feature = "wgpu"))]
mod gpu {
    use super::*;

    #[test]
    #[ignore = "needs a GPU or its software stand-in; run by cargo xtask check --full"]
    fn recognizers_and_encoder() {
        let device = golden::gpu();
        networks::recognizer_from_encoder("restyle34", Depth::D34, &device, TOLERANCE);
        networks::recognizer_34_in_training(&device, TRAINING);
        networks::backbone_encoder_34(&device, TOLERANCE);
    }
}
