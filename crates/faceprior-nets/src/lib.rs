//! Face networks, margin heads, losses, and the files their weights live in.
//!
//! Every network is a config and a module: `XConfig { … }.init(&mut Init)` makes it with fresh weights,
//! `x.forward(…)` runs it. The bodies are written on [`faceprior_ops::FeatureMap`], so that the memory layout and
//! the kernels underneath can change without touching a network. Field names are PyTorch's state-dict names: a
//! module visitor's path is the key under which [`weights::Weights`] writes and reads a tensor.
//!
//! Images are RGB in [-1, 1], `[N, 3, H, W]`. Networks do no input or output; only [`weights`] touches files.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use faceprior_nets::init::Init;
//! use faceprior_nets::irse::{Depth, RecognizerConfig};
//! use faceprior_nets::layers::Mode;
//!
//! let device = Device::flex();
//! let mut config = RecognizerConfig::face_evolve(Depth::D18, true);
//! config.backbone.width = 16;
//! let recognizer = config.init(&mut Init::new(1, &device));
//! let images = Tensor::<4>::zeros([2, 3, 112, 112], &device);
//! assert_eq!(recognizer.forward(images, Mode::Eval).dims(), [2, 512]);
//! ```

pub mod encoder;
#[doc(hidden)]
pub mod fill;
pub mod heads;
pub mod init;
pub mod irse;
pub mod layers;
pub mod losses;
pub mod mobilefacenet;
pub mod mtcnn;
pub mod perceptual;
pub mod stylegan2;
pub mod weights;
