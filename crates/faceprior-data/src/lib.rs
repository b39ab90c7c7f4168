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

mod dataset;
mod error;
pub mod files;
mod image;
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
