//! Recognisers and encoder against the reference's numbers in double precision: what single precision leaves open.

mod golden;

use std::sync::Once;

use burn::tensor::{Device, FloatDType};
use faceprior_nets::irse::Depth;
use golden::networks::{self, Tolerance};

/// The goldens are read as single precision, which is all that remains of the difference.
const TOLERANCE: Tolerance = Tolerance {
    output: 1e-6,
    gradient: 1e-6,
    floor: 1e-9,
};

/// The number type is a setting of the process, hence a test program of its own.
fn device() -> Device {
    static CONFIGURED: Once = Once::new();
    let mut device = Device::flex().autodiff();
    CONFIGURED.call_once(|| device.configure(FloatDType::F64).unwrap());
    device
}

#[test]
fn recognizer_34_from_encoder() {
    networks::recognizer_from_encoder("restyle34", Depth::D34, &device(), TOLERANCE);
}

#[test]
fn recognizer_34_in_training() {
    networks::recognizer_34_in_training(&device(), TOLERANCE);
}

#[test]
fn backbone_encoder_34() {
    networks::backbone_encoder_34(&device(), TOLERANCE);
}
