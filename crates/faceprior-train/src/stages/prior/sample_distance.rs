//! How far generated pictures are from real ones, without a network that was trained on labels.
//!
//! FID compares sets in the features of a network trained on labelled photographs. Here the features are fixed and
//! learnt from nothing, so the number is *not* FID and is comparable only between runs of one data set and size:
//!
//! - the picture averaged over a grid of 4×4 cells, 48 numbers: colour and layout;
//! - at three scales (the picture, halved, quartered), the mean magnitude of the answers to 16 random 5×5 filters
//!   without mean, 48 numbers: edges and texture.
//!
//! Each number is divided by its standard deviation over the real pictures. The distance is Fréchet's between the two
//! sets of 96 numbers. Two halves of the real set are at a distance of their own, which is what perfection would get.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use faceprior_data::{Dataset, Subset, Transform};
use faceprior_eval::Embeddings;
use faceprior_eval::frechet::frechet_distance;
use faceprior_ops::{self as ops, Conv2dOptions, FeatureMap};
use rand_distr::{Distribution, StandardNormal};

use crate::TrainError;
use crate::schedule;
use crate::stages::evaluation::{chunks, read_images};

const CELLS: usize = 4;
const SCALES: usize = 3;
const FILTERS: usize = 16;
const FILTER_SIZE: usize = 5;
const DIM: usize = 3 * CELLS * CELLS + SCALES * FILTERS;
/// Pictures whose features are computed at once.
const BATCH: usize = 32;

/// The features of real pictures.
pub(super) struct Reals {
    features: Embeddings,
    /// One over the standard deviation of each number.
    scales: Vec<f32>,
    /// Distance to as many other pictures of the real set.
    pub(super) own_distance: f64,
}

impl Reals {
    /// The features of `count` pictures, or half of the set if it is smaller than two times that.
    pub(super) fn of(
        dataset: &Arc<dyn Dataset>,
        size: usize,
        count: usize,
        seed: u64,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let count = count.min(dataset.len() / 2);
        if count < 2 {
            return Err(TrainError::Invalid(format!(
                "the real set has {} pictures, expected at least 4 to compare samples with",
                dataset.len()
            )));
        }
        let sample = Subset::sample(Arc::clone(dataset), 2 * count, seed);
        let mut features = Vec::with_capacity(2 * count * DIM);
        for indices in chunks(sample.len(), BATCH) {
            if let Some(images) = read_images(&sample, indices, Transform::Resize { size }, device)? {
                features.extend(features_of(images));
            }
        }
        // The order of a sample is that of the set, so its halves would be of different folders: deal out in turn.
        let rows = features.len() / DIM;
        let all = Embeddings::new(DIM, features)?;
        let scales = inverse_deviations(&all);
        let all = scaled(all, &scales)?;
        let dealt = |first: usize| all.select(&(first..rows).step_by(2).collect::<Vec<_>>());
        let (features, others) = (dealt(0), dealt(1));
        let own_distance = frechet_distance(&features, &others)?;
        Ok(Self {
            features,
            scales,
            own_distance,
        })
    }

    /// How many real pictures there are to compare with.
    pub(super) fn len(&self) -> usize {
        self.features.len()
    }

    /// The distance of pictures with these features, one row after another.
    pub(super) fn distance_to(&self, features: Vec<f32>) -> Result<f64, TrainError> {
        let features = scaled(Embeddings::new(DIM, features)?, &self.scales)?;
        Ok(frechet_distance(&self.features, &features)?)
    }
}

/// The features of pictures `[N, 3, R, R]`, clipped to [-1, 1], one row after another.
pub(super) fn features_of(images: Tensor<4>) -> Vec<f32> {
    let images = images.clamp(-1.0, 1.0);
    let [n, _, size, _] = images.dims();
    let cell = size / CELLS;
    let cells = images
        .clone()
        .reshape([n * 3 * CELLS, cell, CELLS, cell])
        .mean_dims(&[1, 3]) // [N·3·CELLS, 1, CELLS, 1]
        .reshape([n, 3 * CELLS * CELLS]);
    let mut parts = vec![cells];
    let filters = filters(&images.device());
    let mut map = FeatureMap::from_nchw(images);
    for scale in 0..SCALES {
        if scale > 0 {
            map = ops::downsample_smooth(map);
        }
        let answers = ops::conv2d(map.clone(), filters.clone(), Conv2dOptions::default()).into_nchw();
        parts.push(answers.abs().mean_dims(&[2, 3]).reshape([n, FILTERS]));
    }
    Tensor::cat(parts, 1).into_data().iter::<f32>().collect()
}

/// Random filters `[FILTERS, 3, 5, 5]` without mean and of length 1, always the same.
fn filters(device: &Device) -> Tensor<4> {
    let mut rng = schedule::rng(0, "filters of the sample distance", 0);
    let len = 3 * FILTER_SIZE * FILTER_SIZE;
    let mut values: Vec<f32> = (0..FILTERS * len)
        .map(|_| StandardNormal.sample(&mut rng))
        .collect();
    for filter in values.chunks_exact_mut(len) {
        let mean = filter.iter().sum::<f32>() / len as f32;
        filter.iter_mut().for_each(|x| *x -= mean);
        let norm = filter.iter().map(|x| x * x).sum::<f32>().sqrt();
        filter.iter_mut().for_each(|x| *x /= norm);
    }
    Tensor::from_data(
        TensorData::new(values, [FILTERS, 3, FILTER_SIZE, FILTER_SIZE]),
        device,
    )
}

fn inverse_deviations(rows: &Embeddings) -> Vec<f32> {
    let n = rows.len() as f64;
    let moment = |column: usize, power: i32| {
        (0..rows.len())
            .map(|row| f64::from(rows.row(row)[column]).powi(power))
            .sum::<f64>()
            / n
    };
    (0..rows.dim())
        .map(|column| {
            let variance = moment(column, 2) - moment(column, 1).powi(2);
            // A number that never varies in the real set is left as it is.
            if variance > 1e-12 {
                variance.sqrt().recip() as f32
            } else {
                1.0
            }
        })
        .collect()
}

fn scaled(rows: Embeddings, scales: &[f32]) -> Result<Embeddings, TrainError> {
    let data = rows
        .data()
        .iter()
        .zip(scales.iter().cycle())
        .map(|(x, scale)| x * scale)
        .collect();
    Ok(Embeddings::new(rows.dim(), data)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use faceprior_data::SyntheticFaces;

    fn faces() -> Arc<dyn Dataset> {
        Arc::new(SyntheticFaces::new(1, 120, 1, 32))
    }

    fn features_after(change: impl Fn(Tensor<4>) -> Tensor<4>) -> f64 {
        let device = Device::flex();
        let reals = Reals::of(&faces(), 32, 60, 1, &device).unwrap();
        let other = SyntheticFaces::new(2, 60, 1, 32);
        let images = read_images(&other, 0..60, Transform::Resize { size: 32 }, &device)
            .unwrap()
            .unwrap();
        reals.distance_to(features_of(change(images))).unwrap()
    }

    #[test]
    fn a_change_of_colour_layout_or_texture_shows() {
        let same = features_after(|images| images);
        for (name, changed) in [
            ("darker", features_after(|images| images - 0.3)),
            ("upside down", features_after(|images| images.flip([2]))),
            (
                "blurred",
                features_after(|images| {
                    let small = ops::downsample_smooth(FeatureMap::from_nchw(images));
                    ops::upsample_smooth(small).into_nchw()
                }),
            ),
            (
                "noisy",
                features_after(|images| {
                    let mut rng = schedule::rng(1, "noise", 0);
                    let noise = faceprior_nets::stylegan2::normal(&mut rng, images.dims(), &Device::flex());
                    images + noise * 0.2
                }),
            ),
        ] {
            assert!(changed > 1.5 * same, "{name}: {changed} against {same}");
        }
    }

    #[test]
    fn real_pictures_are_near_each_other() {
        let reals = Reals::of(&faces(), 32, 60, 1, &Device::flex()).unwrap();
        let grey = reals.distance_to(vec![0.0; 60 * DIM]).unwrap();
        assert!(
            reals.own_distance > 0.0 && reals.own_distance < 0.5 * grey,
            "{} {grey}",
            reals.own_distance
        );
    }

    #[test]
    fn too_few_pictures_are_an_error() {
        let few: Arc<dyn Dataset> = Arc::new(SyntheticFaces::new(1, 3, 1, 32));
        let error = Reals::of(&few, 32, 60, 1, &Device::flex())
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("has 3 pictures, expected at least 4"), "{error}");
    }
}
