//! Pictures in: decoding, lists, data sets, augmentation, batch loading and synthetic faces.
//!
//! This crate knows no networks. What it hands out are [`Image`]s (RGB, 8 bits, row-major) and [`Batch`]es of
//! `f32` in `[-1, 1]`, laid out `[N, 3, H, W]`.
//!
//! ```text
//! folder, list, renderer ─ Dataset ─┐
//!                       Transform ──┼─ Loader (worker threads, bounded queue) ─ Batch
//!                  (seed, Position) ┘
//! ```
//!
//! Whatever is random is a function of a seed and a clock ([`random::stream`]), never of the order in which threads
//! happen to run: a [`Loader`] made at any [`Position`] goes on with exactly the batches that the uninterrupted one
//! would have given.
//!
//! ```
//! use std::sync::Arc;
//! use faceprior_data::{Loader, LoaderConfig, Position, SyntheticFaces, Transform};
//!
//! let faces = Arc::new(SyntheticFaces::new(0, 8, 4, 32));
//! let config = LoaderConfig { batch_size: 16, ..LoaderConfig::default() };
//! let mut loader = Loader::new(faces, Transform::augment(32), config, Position::default())?;
//! let batch = loader.next()?;
//! assert_eq!((batch.shape, batch.labels.len()), ([16, 3, 32, 32], 16));
//! assert_eq!(loader.position(), Position { epoch: 0, batch: 1 });
//! # Ok::<(), faceprior_data::DataError>(())
//! ```

mod dataset;
mod error;
pub mod files;
mod image;
mod jpeg;
mod loader;
pub mod pairs;
pub mod random;
mod resize;
pub mod synthetic;
mod transform;

pub use dataset::{Concat, Dataset, ImageFolder, ImageList, Subset, export};
pub use error::DataError;
pub use image::{DecodeLimits, Encoding, Image};
pub use loader::{Batch, Loader, LoaderConfig, Position, Unreadable};
pub use pairs::Pair;
pub use synthetic::SyntheticFaces;
pub use transform::{Transform, center_crop_through_8bit, mirror_through_8bit};
