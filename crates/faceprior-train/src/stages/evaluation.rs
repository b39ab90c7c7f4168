//! Pictures in and out of an evaluation.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use faceprior_data::{Dataset, Image, Transform};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::TrainError;
use crate::schedule;

/// The pictures `indices` of a set as a tensor `[n, 3, size, size]`; unreadable ones are left out with a warning.
/// None if none is left.
///
/// # Errors
/// That of the first picture, if the whole set seems to be gone: nothing of a range of several can be read.
pub(super) fn read_images(
    dataset: &dyn Dataset,
    indices: Range<usize>,
    transform: Transform,
    device: &Device,
) -> Result<Option<Tensor<4>>, TrainError> {
    let size = transform.size();
    let wanted = indices.len();
    let read = |index: usize| {
        let mut values = vec![0.0f32; 3 * size * size];
        // The transforms of an evaluation draw nothing.
        transform.apply(
            &dataset.read(index)?,
            &mut schedule::rng(0, "unused", 0),
            &mut values,
        );
        Ok(values)
    };
    let pictures: Vec<Result<Vec<f32>, TrainError>> = indices.into_par_iter().map(read).collect();
    let (mut values, mut problems) = (Vec::with_capacity(wanted * 3 * size * size), Vec::new());
    for picture in pictures {
        match picture {
            Ok(picture) => values.extend(picture),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.len() == wanted && wanted > 1 {
        return Err(problems.swap_remove(0));
    }
    for problem in &problems {
        tracing::warn!("left out of the evaluation: {problem}");
    }
    let n = wanted - problems.len();
    Ok((n > 0).then(|| Tensor::from_data(TensorData::new(values, [n, 3, size, size]), device)))
}

/// The pictures of a tensor `[N, 3, H, W]` in [-1, 1].
pub(super) fn pictures_of(images: Tensor<4>) -> Vec<Image> {
    let [n, c, height, width] = images.dims();
    if n == 0 {
        return Vec::new();
    }
    let values: Vec<f32> = images.into_data().iter::<f32>().collect();
    values
        .chunks_exact(c * height * width)
        .map(|values| Image::from_chw_f32(values, width, height))
        .collect()
}

/// 0..len in parts of at most `size`.
pub(super) fn chunks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(size.max(1))
        .map(move |start| start..(start + size.max(1)).min(len))
}

/// The number in a tensor `[1]`.
pub(super) fn value(x: Tensor<1>) -> f64 {
    f64::from(x.into_scalar::<f32>())
}

/// An independent generator, its seed taken from this one.
pub(super) fn fork(rng: &mut ChaCha8Rng) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(rng.next_u64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use faceprior_data::SyntheticFaces;

    #[test]
    fn parts_cover_a_set_once() {
        assert_eq!(chunks(7, 3).collect::<Vec<_>>(), [0..3, 3..6, 6..7]);
        assert_eq!(chunks(0, 3).count(), 0);
    }

    #[test]
    fn pictures_survive_the_way_through_a_tensor() {
        let faces = SyntheticFaces::new(1, 3, 1, 32);
        let images = read_images(&faces, 1..3, Transform::Resize { size: 32 }, &Device::flex())
            .unwrap()
            .unwrap();
        assert_eq!(images.dims(), [2, 3, 32, 32]);
        let pictures = pictures_of(images);
        assert!((0..2).all(|index| pictures[index].pixels() == faces.read(index + 1).unwrap().pixels()));
    }
}
