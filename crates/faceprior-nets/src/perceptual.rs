//! Perceptual distances.
