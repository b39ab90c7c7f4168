//! Face networks, margin heads, losses, and the files their weights live in.
//!
//! Every network is a config and a module: `XConfig { … }.init(&mut Init)` makes it with fresh weights,
//! `x.forward(…)` runs it. The bodies are written on [`faceprior_ops::FeatureMap`], so that the memory layout and
//! the kernels underneath can change without touching a network. Field names are PyTorch's state-dict names: a
//! module visitor's path is the key under which [`weights::Weights`] writes and reads a tensor.
//!
//! Images are RGB in [-1, 1], `[N, 3, H, W]`. Networks do no input or output; only [`weights`] touches files.

#[doc(hidden)]
pub mod fill;
pub mod init;
pub mod layers;
pub mod mtcnn;
pub mod perceptual;
pub mod stylegan2;
pub mod weights;
