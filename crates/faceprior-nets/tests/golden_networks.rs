//! Recognisers and encoder against the reference's numbers in single precision.
//!
//! Outputs agree to 1e-4 and gradient norms to 1e-3, except that two of these nets need 3e-3: of their millions of
//! PReLU inputs some lie within rounding of zero, where the slope jumps, and the smallest gradients (the SE gates of
//! the first units) feel it. `golden_double.rs` shows that nothing but rounding is behind it.

mod golden;

use burn::tensor::Device;
use faceprior_nets::irse::Depth;
use golden::networks::{self, Tolerance};

const TOLERANCE: Tolerance = Tolerance {
    output: 1e-4,
    gradient: 1e-3,
    floor: 1e-9,
};
const ROUNDING: Tolerance = Tolerance {
    gradient: 3e-3,
    ..TOLERANCE
};
/// Biases just before a normalisation by the batch have no gradient but rounding.
const TRAINING: Tolerance = Tolerance {
    floor: 1e-4,
    ..ROUNDING
};

#[test]
fn recognizer_34_from_encoder() {
    networks::recognizer_from_encoder("restyle34", Depth::D34, &Device::flex(), ROUNDING);
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

#[cfg(feature = "vulkan")]
mod vulkan {
    use burn::tensor::DeviceKind;

    use super::*;

    #[test]
    #[ignore = "needs a Vulkan device; run by cargo xtask check --full"]
    fn recognizers_and_encoder() {
        let device = Device::vulkan(DeviceKind::DefaultDevice);
        networks::recognizer_from_encoder("restyle34", Depth::D34, &device, ROUNDING);
        networks::recognizer_34_in_training(&device, TRAINING);
        networks::backbone_encoder_34(&device, ROUNDING);
    }
}
