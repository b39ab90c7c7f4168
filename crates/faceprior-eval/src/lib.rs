//! Scoring protocols, statistics, plots and reports: embeddings in, numbers and pages out.
//!
//! | module | what it answers |
//! |---|---|
//! | [`embeddings`] | rows of numbers, one per picture; flip combination; distances |
//! | [`verification`] | are two pictures of one person? the k-fold procedure of LFW and its kin, exactly |
//! | [`roc`] | AUC, EER, TAR at FAR, ROC points, from scores alone |
//! | [`bootstrap`] | intervals by resampling people, and paired differences on the same draws |
//! | [`pca`], [`baseline`] | principal components, and the whitened pixel-PCA floor every model must clear |
//! | [`frechet`] | Fréchet distance and KID between two sets of features |
//! | [`mistakes`] | the pairs a model is most wrong about |
//! | [`plot`], [`report`] | SVG charts, and one self-contained HTML page |
//!
//! The crate knows no tensors and no networks, reads and writes no files, and prints nothing. Statistics run in
//! `f64` on `f32` embeddings. Every random choice comes from a seed, and every result is the same on any number
//! of threads.

pub mod baseline;
pub mod bootstrap;
pub mod embeddings;
mod error;
pub mod frechet;
mod linalg;
pub mod mistakes;
pub mod pca;
pub mod plot;
pub mod report;
pub mod roc;
pub mod verification;

pub use embeddings::{Embeddings, Flip};
pub use error::EvalError;
