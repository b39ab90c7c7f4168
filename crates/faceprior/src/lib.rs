//! Learn a prior of faces from unlabelled pictures and turn it into a better face recogniser.
//!
//! This is the front door: each part of the system under its own name, and what composes them.

pub use faceprior_data as data;
pub use faceprior_eval as eval;
pub use faceprior_faces as faces;
pub use faceprior_nets as nets;
pub use faceprior_ops as ops;
pub use faceprior_train as train;

pub mod device;
pub mod findings;
pub mod pipeline;
pub mod report;
