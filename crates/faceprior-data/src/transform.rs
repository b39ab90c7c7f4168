//! From a picture of any size to the numbers that a network eats.

use rand::Rng;

use crate::Image;
use crate::random;
use crate::resize::{self, Window};

/// How a picture becomes `[3, size, size]` in `[-1, 1]`. Resizing goes to a square whatever the picture's shape, bit
/// for bit as Pillow's antialiased bilinear filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Transform {
    /// The whole picture (generator and encoder training, embedding without a centre crop).
    Resize {
        /// Side of the result in pixels.
        size: usize,
    },
    /// Resize, cut a square at a random place, mirror every other picture (recogniser training).
    ResizeCropFlip {
        /// Side after resizing.
        resize: usize,
        /// Side of the result, at most `resize`.
        crop: usize,
        /// Whether to mirror with probability ½.
        flip: bool,
    },
    /// Resize and cut the centre (evaluation).
    ResizeCenterCrop {
        /// Side after resizing.
        resize: usize,
        /// Side of the result, at most `resize`.
        crop: usize,
    },
}

impl Transform {
    /// The recogniser's augmentation for pictures of `size`: 128 → 112 at the published size.
    pub fn augment(size: usize) -> Transform {
        Transform::ResizeCropFlip {
            resize: size * 128 / 112,
            crop: size,
            flip: true,
        }
    }

    /// The centre crop of evaluation for pictures of `size`: 128 → 112 at the published size.
    pub fn center_crop(size: usize) -> Transform {
        Transform::ResizeCenterCrop {
            resize: size * 128 / 112,
            crop: size,
        }
    }

    /// Side of the result in pixels.
    pub fn size(&self) -> usize {
        match *self {
            Transform::Resize { size } => size,
            Transform::ResizeCropFlip { crop, .. } | Transform::ResizeCenterCrop { crop, .. } => crop,
        }
    }

    /// Side of the resized picture, before anything is cut.
    pub(crate) fn resized(&self) -> usize {
        match *self {
            Transform::Resize { size } => size,
            Transform::ResizeCropFlip { resize, .. } | Transform::ResizeCenterCrop { resize, .. } => resize,
        }
    }

    /// Writes the transformed picture as `[3, size, size]` in `[-1, 1]`. What is random comes from `rng` alone.
    ///
    /// # Panics
    /// If `out` does not hold `3 * size * size` numbers, or a crop is larger than the resized picture.
    pub fn apply(&self, image: &Image, rng: &mut impl Rng, out: &mut [f32]) {
        let (window, mirror) = self.window(rng);
        match self.cut(image, window) {
            Some(cut) => cut.write_chw(out, mirror),
            None => image.write_chw(out, mirror),
        }
    }

    /// [`apply`](Self::apply) up to the pixels: the cut picture, and whether it is to be mirrored.
    pub(crate) fn pixels(&self, image: Image, rng: &mut impl Rng) -> (Image, bool) {
        let (window, mirror) = self.window(rng);
        (self.cut(&image, window).unwrap_or(image), mirror)
    }

    /// What is cut out of the resized picture, and whether it is mirrored.
    fn window(&self, rng: &mut impl Rng) -> (Window, bool) {
        let (resized, size) = (self.resized(), self.size());
        assert!(size > 0 && size <= resized, "{self:?} cuts more than there is");
        let room = resized - size;
        let (x, y, mirror) = match *self {
            Transform::Resize { .. } => (0, 0, false),
            Transform::ResizeCropFlip { flip, .. } => {
                let (y, x) = (random::below(rng, room + 1), random::below(rng, room + 1));
                (x, y, flip && random::below(rng, 2) == 1)
            }
            Transform::ResizeCenterCrop { .. } => (centred(room), centred(room), false),
        };
        let window = Window {
            x,
            y,
            width: size,
            height: size,
        };
        (window, mirror)
    }

    /// The window of the resized picture; none where that is the picture itself.
    fn cut(&self, image: &Image, window: Window) -> Option<Image> {
        let resized = self.resized();
        let whole = (image.width(), image.height(), self.size()) == (resized, resized, resized);
        (!whole).then(|| resize::bilinear(image, resized, resized, window))
    }
}

/// Where torchvision's CenterCrop begins: Python rounds a half to the even neighbour.
fn centred(room: usize) -> usize {
    (room as f64 / 2.0).round_ties_even() as usize
}

/// The reference's centre crop for embedding, which goes through an 8-bit picture: `x * 0.5 + 0.5`, times 255,
/// *truncated*, resized to `resize`², cut to `crop`², and back to `[-1, 1]`.
///
/// # Shapes
/// `values` and `out` are `[3, height, width]` and `[3, crop, crop]`. Source: face.evoLVe's `ccrop_batch`.
///
/// # Panics
/// If a slice has another length.
pub fn center_crop_through_8bit(
    values: &[f32],
    width: usize,
    height: usize,
    resize: usize,
    crop: usize,
    out: &mut [f32],
) {
    let start = centred(resize - crop);
    let window = Window {
        x: start,
        y: start,
        width: crop,
        height: crop,
    };
    let image = Image::from_planes(values, width, height, truncated_level);
    resize::bilinear(&image, resize, resize, window).to_chw_f32(out);
}

/// The reference's mirrored copy for test-time flipping, which passes the truncation of
/// [`center_crop_through_8bit`] (again): 63 of the 256 levels drop by one.
///
/// # Shapes
/// `values` and `out` are `[3, height, width]`. Source: face.evoLVe's `hflip_batch`.
///
/// # Panics
/// If a slice has another length.
pub fn mirror_through_8bit(values: &[f32], width: usize, height: usize, out: &mut [f32]) {
    Image::from_planes(values, width, height, truncated_level).write_chw(out, true);
}

/// torchvision's ToPILImage after the inverse normalisation: the level is cut off, not rounded.
fn truncated_level(value: f32) -> f32 {
    ((value * 0.5 + 0.5) * 255.0).trunc()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn apply(transform: Transform, image: &Image, seed: u64) -> Vec<f32> {
        let mut out = vec![0.0; 3 * transform.size() * transform.size()];
        transform.apply(image, &mut random::stream(seed, b"test    ", [0, 0]), &mut out);
        out
    }

    fn chw(image: &Image) -> Vec<f32> {
        let mut out = vec![0.0; image.pixels().len()];
        image.to_chw_f32(&mut out);
        out
    }

    #[test]
    fn the_centre_crop_through_8_bits_equals_the_reference() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/mtcnn/resize.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let data = golden.tensor(name).unwrap().data().to_vec();
            data.chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()
        };
        let (input, expected) = (values("ccrop_input"), values("ccrop_output"));
        let mut output = vec![0.0; 3 * 112 * 112];
        center_crop_through_8bit(&input, 112, 112, 128, 112, &mut output);
        let worst = output
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= 1e-7, "differs by {worst}");
    }

    #[test]
    fn the_mirrored_copy_lowers_63_levels_by_one() {
        let levels: Vec<u8> = (0..=255u8).flat_map(|level| [level; 3]).collect();
        let image = Image::new(256, 1, levels);
        let mut mirrored = vec![0.0; 3 * 256];
        mirror_through_8bit(&chw(&image), 256, 1, &mut mirrored);
        let mirrored = Image::from_chw_f32(&mirrored, 256, 1).flip_horizontal();
        let drops: Vec<_> = image
            .pixels()
            .iter()
            .zip(mirrored.pixels())
            .map(|(a, b)| a - b)
            .collect();
        assert!(drops.iter().all(|&drop| drop <= 1));
        assert_eq!(drops.iter().filter(|&&drop| drop == 1).count(), 63 * 3);
    }

    #[test]
    fn resize_takes_the_whole_picture_to_a_square() {
        let image = Image::noise(60, 45, 1);
        assert_eq!(
            apply(Transform::Resize { size: 32 }, &image, 0),
            chw(&image.resize_bilinear(32, 32))
        );
        let square = Image::noise(32, 32, 2);
        assert_eq!(apply(Transform::Resize { size: 32 }, &square, 0), chw(&square));
    }

    #[test]
    fn the_centre_is_cut_as_torchvision_cuts_it() {
        let image = Image::noise(100, 90, 3);
        let expected = image.resize_bilinear(128, 128).crop(8, 8, 112, 112);
        assert_eq!(apply(Transform::center_crop(112), &image, 0), chw(&expected));
        // Rooms of 1 and 3 pixels: Python's round gives 0 and 2.
        assert_eq!([0, 1, 2, 3, 5, 7].map(centred), [0, 0, 1, 2, 2, 4]);
    }

    #[test]
    fn augmentation_reaches_every_place_and_both_sides_and_repeats_with_its_seed() {
        let image = Image::noise(10, 10, 4);
        let transform = Transform::ResizeCropFlip {
            resize: 10,
            crop: 8,
            flip: true,
        };
        let candidates: Vec<Vec<f32>> = (0..18)
            .map(|i| {
                let cut = image.crop(i % 3, i / 3 % 3, 8, 8);
                chw(&if i < 9 { cut } else { cut.flip_horizontal() })
            })
            .collect();
        let mut seen = [0; 18];
        for seed in 0..600 {
            let out = apply(transform, &image, seed);
            assert_eq!(out, apply(transform, &image, seed));
            seen[candidates
                .iter()
                .position(|candidate| *candidate == out)
                .expect("a cut of the picture")] += 1;
        }
        // Binomial(600, 1/18): mean 33, standard deviation 5.6.
        assert!(seen.iter().all(|&count| (10..60).contains(&count)), "{seen:?}");
        let still = Transform::ResizeCropFlip {
            resize: 10,
            crop: 8,
            flip: false,
        };
        assert!((0..50).all(|seed| candidates[..9].contains(&apply(still, &image, seed))));
    }

    #[test]
    fn sizes_follow_the_published_ratio() {
        assert_eq!(
            Transform::augment(112),
            Transform::ResizeCropFlip {
                resize: 128,
                crop: 112,
                flip: true
            }
        );
        assert_eq!(
            Transform::center_crop(64),
            Transform::ResizeCenterCrop { resize: 73, crop: 64 }
        );
    }
}
