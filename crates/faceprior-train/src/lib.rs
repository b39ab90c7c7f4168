//! Recipes, runs, checkpoints, one driver loop and the three training stages.
//!
//! | module | what it is |
//! |---|---|
//! | [`recipe`] | typed TOML that describes the whole path, from pictures to report |
//! | [`sources`] | the recipe's pictures as data sets and pairs |
//! | [`run`], [`checkpoint`] | the run directory: lock, log, checkpoints that are whole or not there |
//! | [`driver`] | the one loop: clock, records, evaluations, checkpoints, signals |
//! | [`schedule`] | the clock, and learning rates, margins and random draws as functions of it |
//! | [`optim`] | SGD, Adam and Ranger with PyTorch's semantics; averaged modules |
//! | [`stages`] | what each stage does in a step |
//! | [`embed`] | pictures → embeddings, and the score of a recogniser on pairs |
//!
//! ```text
//! Recipe ─ sources ─ Dataset ─┐
//!                    Stage ───┼─ driver::train ─ run directory ─ export/*.safetensors ─ next stage
//!                    Run, Stop┘
//! ```

pub mod checkpoint;
pub mod driver;
pub mod embed;
mod error;
mod files;
pub mod optim;
pub mod recipe;
pub mod run;
pub mod schedule;
pub mod signals;
pub mod sources;
pub mod stages;

pub use error::TrainError;
