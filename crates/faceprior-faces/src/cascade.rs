//! MTCNN's three networks on the CPU, on the kernels of [`faceprior_ops::small`].
//!
//! The maps are tiny (a few hundred pixels, 3 to 128 channels), so that tensors would cost more than the arithmetic on
//! them. Dense layers are convolutions over whole maps. The definition of the networks is [`faceprior_nets::mtcnn`];
//! tests hold the two equal.

use faceprior_data::Image;
use faceprior_ops::small::{Convolution, Maps};

use crate::networks::{Networks, Output, Proposal, Refinement, in_batches};
use crate::weights::Tensors;

/// The layer `name` with the PReLU after it.
fn convolution(tensors: &Tensors, name: &str, prelu: &str) -> Convolution {
    let (weight, bias) = (
        tensors.get(&format!("{name}.weight")),
        tensors.get(&format!("{name}.bias")),
    );
    let slope = tensors.get(&format!("{prelu}.weight"));
    let shape = [weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3]];
    Convolution::new(&weight.values, shape, &bias.values, Some(&slope.values))
}

/// A dense layer over maps `[side, side, channels]`, whose weight in the file counts its inputs as (W, H, C).
fn first_dense(tensors: &Tensors, name: &str, prelu: &str, side: usize, channels: usize) -> Convolution {
    let (weight, bias) = (
        tensors.get(&format!("{name}.weight")),
        tensors.get(&format!("{name}.bias")),
    );
    let slope = tensors.get(&format!("{prelu}.weight"));
    let mut values = Vec::with_capacity(weight.values.len());
    for row in weight.values.chunks_exact(side * side * channels) {
        for at in 0..row.len() {
            let (channel, y, x) = (at / (side * side), at / side % side, at % side);
            values.push(row[(x * side + y) * channels + channel]);
        }
    }
    let shape = [weight.shape[0], channels, side, side];
    Convolution::new(&values, shape, &bias.values, Some(&slope.values))
}

/// Several layers on the same `inputs` channels of a pixel as one, their outputs one after another.
fn heads(tensors: &Tensors, names: &[&str], inputs: usize) -> Convolution {
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    for name in names {
        weight.extend_from_slice(&tensors.get(&format!("{name}.weight")).values);
        bias.extend_from_slice(&tensors.get(&format!("{name}.bias")).values);
    }
    Convolution::new(&weight, [bias.len(), inputs, 1, 1], &bias, None)
}

/// Scores of "no face" and "face" to the probability of a face.
fn probability(scores: [f32; 2]) -> f32 {
    let [none, face] = scores;
    let largest = none.max(face);
    let (none, face) = ((none - largest).exp(), (face - largest).exp());
    face / (none + face)
}

/// Pixels as the networks want them: (x − 127.5)/128.
fn normalise(pixels: &[u8], values: &mut [f32]) {
    for (value, &pixel) in values.iter_mut().zip(pixels) {
        *value = (f32::from(pixel) - 127.5) * 0.0078125;
    }
}

/// Crops of one size as `[N, H, W, 3]`.
fn maps(crops: &[Image]) -> Maps {
    let dims = [crops.len(), crops[0].height(), crops[0].width(), 3];
    Maps::new(dims, |crop, values| normalise(crops[crop].pixels(), values))
}

/// What the heads say of each pixel, as numbers of a known count.
fn answers<const N: usize>(heads: &Maps) -> impl Iterator<Item = [f32; N]> {
    heads.pixels().map(|values| std::array::from_fn(|i| values[i]))
}

/// The three networks, packed for the kernels.
pub(crate) struct Cascade {
    pnet: [Convolution; 4],
    rnet: [Convolution; 5],
    onet: [Convolution; 6],
}

impl Cascade {
    /// The networks with the weights that ship with the crate.
    pub(crate) fn new() -> Self {
        let (p, r, o) = (Tensors::pnet(), Tensors::rnet(), Tensors::onet());
        Self {
            pnet: [
                convolution(&p, "conv1", "prelu1"),
                convolution(&p, "conv2", "prelu2"),
                convolution(&p, "conv3", "prelu3"),
                heads(&p, &["conv4_1", "conv4_2"], 32),
            ],
            rnet: [
                convolution(&r, "conv1", "prelu1"),
                convolution(&r, "conv2", "prelu2"),
                convolution(&r, "conv3", "prelu3"),
                first_dense(&r, "dense4", "prelu4", 3, 64),
                heads(&r, &["dense5_1", "dense5_2"], 128),
            ],
            onet: [
                convolution(&o, "conv1", "prelu1"),
                convolution(&o, "conv2", "prelu2"),
                convolution(&o, "conv3", "prelu3"),
                convolution(&o, "conv4", "prelu4"),
                first_dense(&o, "dense5", "prelu5", 3, 128),
                heads(&o, &["dense6_1", "dense6_2", "dense6_3"], 256),
            ],
        }
    }
}

/// Bytes of P-Net's largest map that fit the second-level cache.
const STRIP_BYTES: usize = 512 * 1024;

impl Networks for Cascade {
    fn propose(&self, level: &Image, threshold: f32) -> Vec<Proposal> {
        let [conv1, conv2, conv3, heads] = &self.pnet;
        let (height, width) = (level.height(), level.width());
        let (rows, columns) = ((height - 2).div_ceil(2) - 4, (width - 2).div_ceil(2) - 4);
        // Strips of rows bound the memory of a large level; a strip shares four pooled rows with the next.
        let strip = (STRIP_BYTES / (2 * 64 * width)).max(16);
        let mut proposals = Vec::new();
        for top in (0..rows).step_by(strip) {
            let strip = strip.min(rows - top);
            let input = 2 * top..(2 * (top + strip + 4) + 2).min(height);
            let pixels = &level.pixels()[input.start * width * 3..input.end * width * 3];
            let x = Maps::new([1, input.len(), width, 3], |_, values| normalise(pixels, values));
            let x = conv1.forward_pooled(&x, 2); // [1, strip + 4, columns + 4, 10]
            let x = conv2.forward(&x); // [1, strip + 2, columns + 2, 16]
            let x = conv3.forward(&x); // [1, strip, columns, 32]
            let x = heads.forward(&x);
            for (cell, [none, face, offsets @ ..]) in answers::<6>(&x).enumerate() {
                let probability = probability([none, face]);
                if probability > threshold {
                    proposals.push(Proposal {
                        row: top + cell / columns,
                        column: cell % columns,
                        probability,
                        offsets,
                    });
                }
            }
        }
        proposals
    }

    fn refine(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Refinement> {
        let [conv1, conv2, conv3, dense, heads] = &self.rnet;
        in_batches(crops, |crops| {
            let x = conv1.forward_pooled(&maps(crops), 3); // [N, 11, 11, 28]
            let x = conv2.forward_pooled(&x, 3); // [N, 4, 4, 48]
            let x = conv3.forward(&x); // [N, 3, 3, 64]
            let x = dense.forward(&x); // [N, 1, 1, 128]
            let x = heads.forward(&x);
            let refinement = |[none, face, offsets @ ..]: [f32; 6]| Refinement {
                probability: probability([none, face]),
                offsets,
            };
            answers(&x).map(refinement).collect()
        })
    }

    fn output(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Output> {
        let [conv1, conv2, conv3, conv4, dense, heads] = &self.onet;
        in_batches(crops, |crops| {
            let x = conv1.forward_pooled(&maps(crops), 3); // [N, 23, 23, 32]
            let x = conv2.forward_pooled(&x, 3); // [N, 10, 10, 64]
            let x = conv3.forward_pooled(&x, 2); // [N, 4, 4, 64]
            let x = conv4.forward(&x); // [N, 3, 3, 128]
            let x = dense.forward(&x); // [N, 1, 1, 256]
            let x = heads.forward(&x);
            let output = |[none, face, x1, y1, x2, y2, landmarks @ ..]: [f32; 16]| Output {
                probability: probability([none, face]),
                offsets: [x1, y1, x2, y2],
                landmarks,
            };
            answers(&x).map(output).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::OnDevice;
    use burn::tensor::Device;

    /// Numbers in [-1, 1) without a pattern.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Smooth enough that the networks find something to say about it.
    fn picture(width: usize, height: usize, seed: u32) -> Image {
        let pixels = numbers((width / 4 + 1) * (height / 4 + 1) * 3, seed);
        let coarse = pixels.iter().map(|x| ((x + 1.0) * 127.0) as u8).collect();
        Image::new(width / 4 + 1, height / 4 + 1, coarse).resize_bilinear(width, height)
    }

    fn close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len()
            && a.iter()
                .zip(b)
                .all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0))
    }

    #[test]
    fn equal_the_networks_as_they_are_defined() {
        let reference = OnDevice::new(&Device::flex());
        let cascade = Cascade::new();
        // Heights that need several strips, odd and even sizes, the smallest.
        for (width, height) in [(12, 12), (13, 14), (60, 41), (37, 120)] {
            let level = picture(width, height, 1);
            let (fast, slow) = (cascade.propose(&level, 1e-6), reference.propose(&level, 1e-6));
            let cell = |proposal: &Proposal| (proposal.row, proposal.column);
            assert_eq!(
                fast.iter().map(cell).collect::<Vec<_>>(),
                slow.iter().map(cell).collect::<Vec<_>>(),
                "{width}x{height}"
            );
            for (a, b) in fast.iter().zip(&slow) {
                assert!(
                    close(&[a.probability], &[b.probability]) && close(&a.offsets, &b.offsets),
                    "{a:?} {b:?}"
                );
            }
        }
        // More crops than one batch.
        let crops = |side| (0..70).map(move |seed| picture(side, side, seed));
        let (fast, slow) = (cascade.refine(&mut crops(24)), reference.refine(&mut crops(24)));
        assert_eq!((fast.len(), slow.len()), (70, 70));
        for (a, b) in fast.iter().zip(&slow) {
            assert!(
                close(&[a.probability], &[b.probability]) && close(&a.offsets, &b.offsets),
                "{a:?} {b:?}"
            );
        }
        let (fast, slow) = (cascade.output(&mut crops(48)), reference.output(&mut crops(48)));
        assert_eq!((fast.len(), slow.len()), (70, 70));
        for (a, b) in fast.iter().zip(&slow) {
            assert!(
                close(&[a.probability], &[b.probability]) && close(&a.offsets, &b.offsets),
                "{a:?} {b:?}"
            );
            assert!(close(&a.landmarks, &b.landmarks), "{a:?} {b:?}");
        }
    }

    #[test]
    fn strips_do_not_show() {
        // Wide enough for strips of 16 rows: the map is the same as that of the whole.
        let (cascade, level) = (Cascade::new(), picture(700, 90, 3));
        let whole = cascade.propose(&level, 1e-6);
        assert!(whole.len() > 1000);
        let top = level.crop(0, 0, 700, 60);
        let part = cascade.propose(&top, 1e-6);
        let rows = 60 / 2 - 5 - 1;
        let bits = |proposals: &[Proposal]| -> Vec<(usize, usize, u32)> {
            let inside = proposals.iter().filter(|proposal| proposal.row < rows);
            inside
                .map(|p| (p.row, p.column, p.probability.to_bits()))
                .collect()
        };
        assert_eq!(bits(&part), bits(&whole));
    }
}
