//! Pictures → embeddings, and the score of a network on pairs of pictures.
//!
//! The procedure is the published one: the picture in [-1, 1]; with the centre crop, resized to 128² and cut to 112²
//! (in proportion for other sizes) through an 8-bit picture as the reference does it; the embedding of the picture
//! and that of its mirror image are added, joined, or the first is taken alone; then the length is made 1. BatchNorm
//! runs on its stored statistics, so the batch size changes nothing but the speed.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use faceprior_data::{
    DataError, Dataset, Image, ImageList, Transform, center_crop_through_8bit, mirror_through_8bit, pairs,
    random,
};
use faceprior_eval::verification::{self, Pair, Protocol, Scored};
use faceprior_eval::{Embeddings, Flip};
use faceprior_nets::init::Init;
use faceprior_nets::irse::{AVERAGE_IMAGE, Recognizer, beside_average};
use faceprior_nets::layers::Mode;
use faceprior_nets::mobilefacenet::{MobileFaceNet, MobileFaceNetConfig};
use faceprior_nets::weights::Weights;
use rayon::prelude::*;

use crate::TrainError;
use crate::recipe::EvalRecipe;

/// A network that makes embeddings, ready to use.
pub trait Embedder {
    /// Height and width of the pictures that it takes.
    fn input_size(&self) -> [usize; 2];

    /// The device that it computes on, without autodiff.
    fn device(&self) -> &Device;

    /// `[N, 3, H, W]` in [-1, 1] → `[N, dim]`, not normalised.
    fn embed(&self, images: Tensor<4>) -> Tensor<2>;
}

/// A recogniser of this project with the average image that it sees.
#[derive(Debug)]
pub struct FaceRecognizer {
    network: Recognizer,
    average_image: Option<Tensor<3>>,
    device: Device,
}

impl FaceRecognizer {
    /// A copy of a network as it is now, off the gradient graph.
    pub fn new(network: &Recognizer, average_image: Option<Tensor<3>>) -> Self {
        let network = network.valid();
        let device = network.output_layer.3.weight.lazy_device().without_autodiff();
        Self {
            network,
            average_image: average_image.map(Tensor::without_autodiff),
            device,
        }
    }

    /// The recogniser in a file of weights.
    ///
    /// # Errors
    /// Weights of something else, or without the average image that the network sees.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, TrainError> {
        let network = Recognizer::from_weights(weights, device)?;
        let average_image = match network.config().sees_average() {
            true => Some(weights.tensor::<3>(AVERAGE_IMAGE, device)?),
            false => None,
        };
        Ok(Self::new(&network, average_image))
    }
}

impl Embedder for FaceRecognizer {
    fn input_size(&self) -> [usize; 2] {
        [self.network.config().image_size; 2]
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn embed(&self, images: Tensor<4>) -> Tensor<2> {
        let images = match &self.average_image {
            Some(average) => beside_average(images, average.clone()), // [N, 6, H, W]
            None => images,
        };
        self.network.forward(images, Mode::Eval)
    }
}

struct MobileFace {
    network: MobileFaceNet,
    device: Device,
}

impl Embedder for MobileFace {
    fn input_size(&self) -> [usize; 2] {
        self.network.config().image_size
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn embed(&self, images: Tensor<4>) -> Tensor<2> {
        self.network.forward(images, Mode::Eval)
    }
}

/// The network in a file, whichever of those that make embeddings it is. The public MobileFaceNet checkpoint, which
/// says nothing of itself, is known by its layers.
///
/// # Errors
/// A file that cannot be read, or that holds something else.
pub fn read_embedder(path: &Path, device: &Device) -> Result<Box<dyn Embedder>, TrainError> {
    let weights = Weights::read(path)?;
    let device = device.clone().without_autodiff();
    let network = match weights.kind() {
        Some(MobileFaceNet::KIND) => MobileFaceNet::from_weights(&weights, &device)?,
        None if weights.get("linear7.conv.weight").is_some() => weights.load_into(
            MobileFaceNetConfig::default().init(&mut Init::new(0, &device)),
            "",
        )?,
        _ => return Ok(Box::new(FaceRecognizer::from_weights(&weights, &device)?)),
    };
    Ok(Box::new(MobileFace { network, device }))
}

/// How pictures become embeddings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EmbedOptions {
    /// How a picture and its mirror image become one embedding.
    pub flip: Flip,
    /// Resize and cut the centre, through an 8-bit picture; needs a network with square input. Otherwise the whole
    /// picture is resized to the network's size.
    pub center_crop: bool,
    /// Pictures at once.
    pub batch_size: usize,
}

impl From<&EvalRecipe> for EmbedOptions {
    fn from(recipe: &EvalRecipe) -> Self {
        Self {
            flip: recipe.flip,
            center_crop: recipe.center_crop,
            batch_size: recipe.batch_size,
        }
    }
}

/// What [`embed`] gives.
#[derive(Debug)]
pub struct Embedded {
    /// One row for each readable picture, of length 1, in the order asked for.
    pub embeddings: Embeddings,
    /// Which picture each row is of.
    pub indices: Vec<usize>,
    /// The pictures that could not be read.
    pub unreadable: Vec<(usize, DataError)>,
}

/// Embeds the pictures `indices` of a set; `progress` is told how many are done after each batch.
///
/// # Errors
/// A centre crop for a network whose input is no square; embeddings that are not finite.
pub fn embed(
    network: &dyn Embedder,
    dataset: &dyn Dataset,
    indices: &[usize],
    options: EmbedOptions,
    progress: &mut dyn FnMut(usize),
) -> Result<Embedded, TrainError> {
    let [height, width] = network.input_size();
    if options.center_crop && height != width {
        return Err(TrainError::Invalid(format!(
            "the centre crop is square, but the network takes pictures {width} wide and {height} high\n\
             hint: switch the centre crop off for this network"
        )));
    }
    let (mut plain, mut mirrored, mut dim) = (Vec::new(), Vec::new(), 1);
    let (mut embedded, mut unreadable) = (Vec::with_capacity(indices.len()), Vec::new());
    let mut done = 0;
    for chunk in indices.chunks(options.batch_size.max(1)) {
        let read = |&index: &usize| {
            (
                index,
                dataset
                    .read(index)
                    .map(|image| prepare(&image, [height, width], options)),
            )
        };
        let pictures: Vec<_> = chunk.par_iter().map(read).collect();
        let (mut images, mut mirrors) = (Vec::new(), Vec::new());
        for (index, picture) in pictures {
            match picture {
                Ok((image, mirror)) => {
                    embedded.push(index);
                    images.extend(image);
                    mirrors.extend(mirror);
                }
                Err(error) => unreadable.push((index, error)),
            }
        }
        done += chunk.len();
        if !images.is_empty() {
            dim = forward(network, images, [height, width], &mut plain)?;
            if options.flip != Flip::None {
                forward(network, mirrors, [height, width], &mut mirrored)?;
            }
        }
        progress(done);
    }
    let embeddings = Embeddings::combined(
        Embeddings::new(dim, plain)?,
        &Embeddings::new(dim, mirrored)?,
        options.flip,
    )?;
    Ok(Embedded {
        embeddings,
        indices: embedded,
        unreadable,
    })
}

/// Runs a batch and appends its embeddings; the result is their length.
fn forward(
    network: &dyn Embedder,
    images: Vec<f32>,
    [height, width]: [usize; 2],
    rows: &mut Vec<f32>,
) -> Result<usize, TrainError> {
    let n = images.len() / (3 * height * width);
    let data = TensorData::new(images, [n, 3, height, width]);
    let embeddings = network.embed(Tensor::from_data(data, network.device())); // [N, dim]
    let [_, dim] = embeddings.dims();
    let values = embeddings.into_data().try_to_vec::<f32>();
    rows.extend(
        values.map_err(|error| TrainError::Invalid(format!("cannot read the embeddings back: {error}")))?,
    );
    Ok(dim)
}

/// The picture as `[3, H, W]` and, unless no flip is wanted, its mirror image.
fn prepare(image: &Image, [height, width]: [usize; 2], options: EmbedOptions) -> (Vec<f32>, Vec<f32>) {
    let mut plain = vec![0.0; 3 * height * width];
    let mut mirrored = vec![
        0.0;
        if options.flip == Flip::None {
            0
        } else {
            plain.len()
        }
    ];
    if options.center_crop {
        let Transform::ResizeCenterCrop { resize, crop } = Transform::center_crop(width) else {
            unreachable!("a centre crop is a centre crop");
        };
        let mut whole = vec![0.0; 3 * image.width() * image.height()];
        image.to_chw_f32(&mut whole);
        center_crop_through_8bit(&whole, image.width(), image.height(), resize, crop, &mut plain);
        if !mirrored.is_empty() {
            mirror_through_8bit(&plain, width, height, &mut mirrored);
        }
    } else {
        let resized;
        let fitting = if (image.width(), image.height()) == (width, height) {
            image
        } else {
            resized = image.resize_bilinear(width, height);
            &resized
        };
        fitting.to_chw_f32(&mut plain);
        if !mirrored.is_empty() {
            fitting.flip_horizontal().to_chw_f32(&mut mirrored);
        }
    }
    (plain, mirrored)
}

/// Pictures and the pairs of them that are to be told apart.
#[derive(Clone)]
pub struct PairSet {
    dataset: Arc<dyn Dataset>,
    /// The pictures that occur in pairs.
    indices: Vec<usize>,
    /// `left` and `right` are places in `indices`.
    pairs: Vec<Pair>,
}

impl PairSet {
    /// Pairs by the names of a set's pictures. Who is on a picture is the first folder of its name.
    ///
    /// # Errors
    /// A pair that names a picture that the set does not have.
    pub fn named(dataset: Arc<dyn Dataset>, named: &[faceprior_data::Pair]) -> Result<Self, TrainError> {
        let by_name: HashMap<String, usize> = (0..dataset.len())
            .map(|index| (dataset.name(index), index))
            .collect();
        let mut pictures = Rows::default();
        let mut people: HashMap<&str, u32> = HashMap::new();
        let mut pairs = Vec::with_capacity(named.len());
        for pair in named {
            let mut find = |name| {
                let index = by_name.get(name).ok_or_else(|| {
                    TrainError::Invalid(format!(
                        "a pair names picture {name:?}, which the set does not have"
                    ))
                })?;
                Ok::<_, TrainError>(pictures.row(*index))
            };
            let (left, right) = (find(&pair.left)?, find(&pair.right)?);
            let mut person = |name| {
                let number = people.len() as u32;
                *people.entry(name).or_insert(number)
            };
            fn first_folder(name: &str) -> &str {
                name.split_once('/').map_or(name, |(folder, _)| folder)
            }
            let people = [
                person(first_folder(&pair.left)),
                person(first_folder(&pair.right)),
            ];
            pairs.push(Pair {
                left,
                right,
                same: pair.same,
                people,
            });
        }
        Ok(Self {
            dataset,
            indices: pictures.indices,
            pairs,
        })
    }

    /// The pairs of an LFW-style file, of pictures in a folder.
    ///
    /// # Errors
    /// A folder that is missing or empty, a file that cannot be read, a pair that names an unknown picture.
    pub fn from_lfw(folder: &Path, pairs_file: &Path) -> Result<Self, TrainError> {
        let dataset = ImageList::from_folder(folder)?;
        let named = pairs::read(pairs_file, &pairs::Pictures::of(&dataset))?;
        Self::named(Arc::new(dataset), &named)
    }

    /// `count` random pairs of a labelled set, of one person and of two people in turn; the same for the same seed.
    ///
    /// # Errors
    /// A set without two people, or without anyone who has two pictures.
    pub fn sample(dataset: Arc<dyn Dataset>, count: usize, seed: u64) -> Result<Self, TrainError> {
        let mut by_person: HashMap<u32, Vec<usize>> = HashMap::new();
        for index in 0..dataset.len() {
            by_person
                .entry(dataset.label(index).unwrap_or(0))
                .or_default()
                .push(index);
        }
        let mut people: Vec<(u32, Vec<usize>)> = by_person.into_iter().collect();
        people.sort_unstable();
        let several: Vec<&(u32, Vec<usize>)> =
            people.iter().filter(|(_, pictures)| pictures.len() > 1).collect();
        if people.len() < 2 || several.is_empty() {
            return Err(TrainError::Invalid(format!(
                "cannot make pairs of {} people, {} of them with several pictures\n\
                 hint: pairs need at least two people, and one with two pictures",
                people.len(),
                several.len()
            )));
        }
        let mut rng = random::stream(seed, b"pairs   ", [0, 0]);
        let two_of = |rng: &mut _, n: usize| {
            let first = random::below(rng, n);
            (first, (first + 1 + random::below(rng, n - 1)) % n)
        };
        let mut rows = Rows::default();
        let mut pairs = Vec::with_capacity(count);
        for at in 0..count {
            let same = at % 2 == 0;
            let (left, right) = if same {
                let (person, pictures) = several[random::below(&mut rng, several.len())];
                let (one, other) = two_of(&mut rng, pictures.len());
                ((*person, pictures[one]), (*person, pictures[other]))
            } else {
                let (one, other) = two_of(&mut rng, people.len());
                let mut picture = |(person, pictures): &(u32, Vec<usize>)| {
                    (*person, pictures[random::below(&mut rng, pictures.len())])
                };
                (picture(&people[one]), picture(&people[other]))
            };
            pairs.push(Pair {
                left: rows.row(left.1),
                right: rows.row(right.1),
                same,
                people: [left.0, right.0],
            });
        }
        Ok(Self {
            dataset,
            indices: rows.indices,
            pairs,
        })
    }

    /// The set that holds the pictures.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.dataset
    }

    /// The pictures that occur in pairs, by their number in the set; row k of an embedding of the pairs is of
    /// `indices()[k]`.
    pub fn indices(&self) -> &[usize] {
        &self.indices
    }

    /// The pairs; their pictures are places in [`indices`](Self::indices).
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// Embeds the pictures of the pairs: row k is of `indices()[k]`.
    ///
    /// # Errors
    /// A picture that cannot be read: a score on other pairs would not be comparable.
    pub fn embed(
        &self,
        network: &dyn Embedder,
        options: EmbedOptions,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Embeddings, TrainError> {
        let embedded = embed(network, &*self.dataset, &self.indices, options, progress)?;
        match embedded.unreadable.into_iter().next() {
            Some((_, error)) => Err(error.into()),
            None => Ok(embedded.embeddings),
        }
    }

    /// The score of a network on the pairs.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed), and too few pairs for the protocol.
    pub fn score(
        &self,
        network: &dyn Embedder,
        options: EmbedOptions,
        protocol: &Protocol,
    ) -> Result<Scored, TrainError> {
        let embeddings = self.embed(network, options, &mut |_| ())?;
        Ok(verification::verify(&embeddings, &self.pairs, protocol)?)
    }
}

/// Numbers pictures in the order in which they first occur.
#[derive(Default)]
struct Rows {
    indices: Vec<usize>,
    of: HashMap<usize, usize>,
}

impl Rows {
    fn row(&mut self, index: usize) -> usize {
        *self.of.entry(index).or_insert_with(|| {
            self.indices.push(index);
            self.indices.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two numbers of each picture: the mean of its left and of its right half.
    struct Halves {
        device: Device,
        size: [usize; 2],
    }

    impl Embedder for Halves {
        fn input_size(&self) -> [usize; 2] {
            self.size
        }

        fn device(&self) -> &Device {
            &self.device
        }

        fn embed(&self, images: Tensor<4>) -> Tensor<2> {
            let [n, c, h, w] = images.dims();
            images
                .reshape([n, c * h, 2, w / 2])
                .mean_dim(3)
                .mean_dim(1)
                .reshape([n, 2])
        }
    }

    /// Pictures whose left half is bright, of two people with three pictures each; one picture is broken.
    struct Six {
        broken: Option<usize>,
    }

    impl Dataset for Six {
        fn len(&self) -> usize {
            6
        }

        fn read(&self, index: usize) -> Result<Image, DataError> {
            if self.broken == Some(index) {
                return Err(DataError::Decode {
                    name: self.name(index),
                    reason: "cut short".to_owned(),
                });
            }
            let mut pixels = vec![0; 16 * 16 * 3];
            for (at, value) in pixels.iter_mut().enumerate() {
                *value = if at / 3 % 16 < 8 { 200 + index as u8 } else { 20 };
            }
            Ok(Image::new(16, 16, pixels))
        }

        fn label(&self, index: usize) -> Option<u32> {
            Some(index as u32 / 3)
        }

        fn num_classes(&self) -> usize {
            2
        }

        fn name(&self, index: usize) -> String {
            format!("picture {index}")
        }
    }

    fn network(size: [usize; 2]) -> Halves {
        Halves {
            device: Device::flex(),
            size,
        }
    }

    const WHOLE: EmbedOptions = EmbedOptions {
        flip: Flip::None,
        center_crop: false,
        batch_size: 4,
    };

    fn rows(options: EmbedOptions) -> Embedded {
        embed(
            &network([16, 16]),
            &Six { broken: None },
            &[0, 1, 2, 3, 4, 5],
            options,
            &mut |_| (),
        )
        .unwrap()
    }

    #[test]
    fn the_batch_size_changes_nothing() {
        for flip in [Flip::None, Flip::Sum, Flip::Concat] {
            for center_crop in [false, true] {
                let options = |batch_size| EmbedOptions {
                    flip,
                    center_crop,
                    batch_size,
                };
                assert_eq!(rows(options(1)).embeddings, rows(options(6)).embeddings);
            }
        }
    }

    #[test]
    fn flips_are_of_the_mirror_image() {
        let plain = rows(WHOLE).embeddings;
        assert!(plain.row(0)[0] > 0.0 && plain.row(0)[1] < 0.0);
        let joined = rows(EmbedOptions {
            flip: Flip::Concat,
            ..WHOLE
        })
        .embeddings;
        assert_eq!(joined.dim(), 4);
        assert!(
            (joined.row(0)[0] - joined.row(0)[3]).abs() < 1e-6,
            "left of the picture, right of its mirror image"
        );
        let summed = rows(EmbedOptions {
            flip: Flip::Sum,
            ..WHOLE
        })
        .embeddings;
        assert!((summed.row(0)[0] - summed.row(0)[1]).abs() < 1e-6);
    }

    #[test]
    fn unreadable_pictures_are_set_apart_and_forbid_a_score() {
        let set = Six { broken: Some(2) };
        let mut seen = Vec::new();
        let options = EmbedOptions {
            batch_size: 1,
            ..WHOLE
        };
        let result = embed(&network([16, 16]), &set, &[1, 2, 3], options, &mut |n| {
            seen.push(n)
        })
        .unwrap();
        assert_eq!(result.indices, [1, 3]);
        assert_eq!(result.embeddings.len(), 2);
        assert_eq!(result.unreadable[0].0, 2);
        assert_eq!(seen, [1, 2, 3]);
        let pairs = PairSet::sample(Arc::new(set), 60, 1).unwrap();
        let error = pairs
            .embed(&network([16, 16]), WHOLE, &mut |_| ())
            .unwrap_err()
            .to_string();
        assert!(error.contains("picture 2"), "{error}");
    }

    #[test]
    fn a_centre_crop_needs_a_square() {
        let options = EmbedOptions {
            center_crop: true,
            ..WHOLE
        };
        let error = embed(
            &network([16, 12]),
            &Six { broken: None },
            &[0],
            options,
            &mut |_| (),
        )
        .unwrap_err();
        assert!(error.to_string().contains("12 wide and 16 high"), "{error}");
        let whole = embed(
            &network([16, 12]),
            &Six { broken: None },
            &[0],
            WHOLE,
            &mut |_| (),
        )
        .unwrap();
        assert_eq!(whole.embeddings.len(), 1);
    }

    #[test]
    fn sampled_pairs_are_what_they_say() {
        let set = PairSet::sample(Arc::new(Six { broken: None }), 40, 3).unwrap();
        assert_eq!(set.pairs().iter().filter(|pair| pair.same).count(), 20);
        for pair in set.pairs() {
            let label = |row: usize| set.dataset().label(set.indices()[row]).unwrap();
            assert_ne!(pair.left, pair.right);
            assert_eq!(pair.same, label(pair.left) == label(pair.right));
            assert_eq!(pair.people, [label(pair.left), label(pair.right)]);
        }
        let again = PairSet::sample(Arc::new(Six { broken: None }), 40, 3).unwrap();
        assert_eq!(set.pairs(), again.pairs());
    }
}
