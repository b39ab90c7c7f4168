//! Faces in pictures: detection, alignment, and whole folders of crops.
//!
//! ```text
//! picture → Detector (MTCNN: boxes, five landmarks) → similarity to a template → warp → crop
//! ```
//!
//! [`Detector`] finds faces, [`similarity`] and [`warp`] bring one upright, [`align`](align()) does it for a folder or a list,
//! on many threads, resumable. Boxes and landmarks are in pixels, x to the right and y down, the centre of the first
//! pixel at (0, 0). Left and right are those of the image.
//!
//! The weights of MTCNN ship with the crate; they are facenet-pytorch's (MIT, `weights/LICENSE-facenet-pytorch`).

mod align;
mod cascade;
mod detect;
mod error;
mod journal;
pub mod names;
mod networks;
mod similarity;
mod warp;
mod weights;

pub use align::{AlignOptions, AlignSettings, CropFormat, Crops, Progress, Shard, Summary, Which, align};
pub use detect::{Detector, DetectorConfig, Face};
pub use error::FacesError;
pub use journal::{Counts, FaceRecord, PictureRecord, read_records};
pub use similarity::{Affine, Landmarks, five_points, similarity, template};
pub use warp::warp;
