//! What the detection procedure asks of MTCNN's three networks, and the answer by [`faceprior_nets::mtcnn`] on any
//! device.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use faceprior_data::Image;
use faceprior_nets::init::Init;
use faceprior_nets::mtcnn::{Mtcnn, ONet, PNet, RNet};
use faceprior_nets::weights::Weights;

use crate::weights::Tensors;

/// A cell of P-Net's map above the threshold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Proposal {
    pub(crate) row: usize,
    pub(crate) column: usize,
    pub(crate) probability: f32,
    pub(crate) offsets: [f32; 4],
}

/// R-Net's answer for a crop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refinement {
    pub(crate) probability: f32,
    pub(crate) offsets: [f32; 4],
}

/// O-Net's answer for a crop; the landmarks are x × 5, y × 5.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) probability: f32,
    pub(crate) offsets: [f32; 4],
    pub(crate) landmarks: [f32; 10],
}

/// The three networks as the detection procedure sees them.
pub(crate) trait Networks: Send + Sync {
    /// P-Net on a level of the pyramid, both sides at least 12: the cells above `threshold`, row by row.
    fn propose(&self, level: &Image, threshold: f32) -> Vec<Proposal>;
    /// R-Net on 24×24 crops.
    fn refine(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Refinement>;
    /// O-Net on 48×48 crops.
    fn output(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Output>;
}

/// Crops in one batch: bounds the memory of a picture full of candidates.
const BATCH: usize = 32;

/// What `answer` says of a batch of crops, for all of them.
pub(crate) fn in_batches<T>(
    crops: &mut dyn Iterator<Item = Image>,
    mut answer: impl FnMut(&[Image]) -> Vec<T>,
) -> Vec<T> {
    let mut answers = Vec::new();
    loop {
        let batch: Vec<Image> = (&mut *crops).take(BATCH).collect();
        if batch.is_empty() {
            return answers;
        }
        answers.extend(answer(&batch));
    }
}

/// The networks as they are defined, on any device.
pub(crate) struct OnDevice {
    mtcnn: Mtcnn,
    device: Device,
}

impl OnDevice {
    /// The networks with the weights that ship with the crate.
    pub(crate) fn new(device: &Device) -> Self {
        let mut init = Init::new(0, device);
        let mtcnn = Mtcnn {
            pnet: load(PNet::new(&mut init), &Tensors::pnet()),
            rnet: load(RNet::new(&mut init), &Tensors::rnet()),
            onet: load(ONet::new(&mut init), &Tensors::onet()),
        };
        Self {
            mtcnn,
            device: device.clone(),
        }
    }

    fn tensor(&self, images: &[Image]) -> Tensor<4> {
        let (width, height) = (images[0].width(), images[0].height());
        let mut values = Vec::with_capacity(images.len() * 3 * height * width);
        for image in images {
            for channel in 0..3 {
                let pixels = image.pixels().chunks_exact(3);
                values.extend(pixels.map(|pixel| (f32::from(pixel[channel]) - 127.5) * 0.0078125));
            }
        }
        Tensor::from_data(
            TensorData::new(values, [images.len(), 3, height, width]),
            &self.device,
        )
    }
}

fn load<M: Module>(network: M, tensors: &Tensors) -> M {
    let mut weights = Weights::new();
    for (name, parameter) in tensors.iter() {
        weights.insert(
            name,
            TensorData::new(parameter.values.clone(), parameter.shape.clone()),
        );
    }
    weights
        .load_into(network, "")
        .expect("the embedded weights fit the networks")
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn rows<const N: usize>(values: &[f32]) -> impl Iterator<Item = [f32; N]> {
    let (rows, _) = values.as_chunks::<N>();
    rows.iter().copied()
}

impl Networks for OnDevice {
    fn propose(&self, level: &Image, threshold: f32) -> Vec<Proposal> {
        let proposals = self.mtcnn.pnet.forward(self.tensor(std::slice::from_ref(level)));
        let [_, rows, columns] = proposals.probability.dims();
        let (probability, offsets) = (numbers(proposals.probability), numbers(proposals.offsets));
        let above = probability
            .iter()
            .enumerate()
            .filter(|&(_, &probability)| probability > threshold);
        above
            .map(|(cell, &probability)| Proposal {
                row: cell / columns,
                column: cell % columns,
                probability,
                offsets: std::array::from_fn(|i| offsets[i * rows * columns + cell]),
            })
            .collect()
    }

    fn refine(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Refinement> {
        in_batches(crops, |crops| {
            let answer = self.mtcnn.rnet.forward(self.tensor(crops));
            let (probability, offsets) = (numbers(answer.probability), numbers(answer.offsets));
            let both = probability.into_iter().zip(rows(&offsets));
            both.map(|(probability, offsets)| Refinement { probability, offsets })
                .collect()
        })
    }

    fn output(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Output> {
        in_batches(crops, |crops| {
            let answer = self.mtcnn.onet.forward(self.tensor(crops));
            let (probability, offsets) = (numbers(answer.probability), numbers(answer.offsets));
            let landmarks = numbers(answer.landmarks);
            let all = probability.into_iter().zip(rows(&offsets)).zip(rows(&landmarks));
            all.map(|((probability, offsets), landmarks)| Output {
                probability,
                offsets,
                landmarks,
            })
            .collect()
        })
    }
}
