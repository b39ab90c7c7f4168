//! MTCNN's three networks (Zhang et al. 2016, "Joint Face Detection and Alignment using Multi-task Cascaded
//! Convolutional Networks"), under the names and in the layouts of facenet-pytorch's weights.
//!
//! Images are RGB, normalised as (x − 127.5)/128. Every convolution has padding 0, every pool rounds its size up.
//! The detection procedure around them is in the crate `faceprior-faces`, which also ships their weights and runs
//! them by [`faceprior_ops::small`] on the CPU; this is their definition, for every device.
//!
//! Axes: `N` pictures, `H`, `W` space. Offsets are (x1, y1, x2, y2) in units of the box's sides; landmarks are
//! (x × 5, y × 5) from the box's left top corner in the same units: left eye, right eye, nose, left and right
//! corner of the mouth, left and right as they lie in the image.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Tensor, s};
use faceprior_ops::{self as ops, Conv2dOptions, FeatureMap};

use crate::init::Init;
use crate::layers::{Conv2d, Linear, PRelu};

/// Proposal network: one candidate for every 12×12 window at stride 2.
#[derive(Module, Debug)]
pub struct PNet {
    /// 3×3, 3 → 10.
    pub conv1: Conv2d,
    /// After `conv1`.
    pub prelu1: PRelu,
    /// 3×3, 10 → 16.
    pub conv2: Conv2d,
    /// After `conv2`.
    pub prelu2: PRelu,
    /// 3×3, 16 → 32.
    pub conv3: Conv2d,
    /// After `conv3`.
    pub prelu3: PRelu,
    /// 1×1, 32 → 2: scores of "no face" and "face".
    pub conv4_1: Conv2d,
    /// 1×1, 32 → 4: offsets.
    pub conv4_2: Conv2d,
}

/// What [`PNet`] says of every cell; cell (r, c) is the window at (2c + 1, 2r + 1) of the image.
#[derive(Clone, Debug)]
pub struct Proposals {
    /// Probability of a face, `[N, R, C]` with R = ⌈(H − 2)/2⌉ − 4 and C likewise.
    pub probability: Tensor<3>,
    /// `[N, 4, R, C]`.
    pub offsets: Tensor<4>,
}

impl PNet {
    /// A network with fresh weights.
    pub fn new(init: &mut Init) -> Self {
        Self {
            conv1: conv(init, 3, 10, 3),
            prelu1: PRelu::new(init, 10),
            conv2: conv(init, 10, 16, 3),
            prelu2: PRelu::new(init, 16),
            conv3: conv(init, 16, 32, 3),
            prelu3: PRelu::new(init, 32),
            conv4_1: conv(init, 32, 2, 1),
            conv4_2: conv(init, 32, 4, 1),
        }
    }

    /// Images `[N, 3, H, W]`, H and W at least 12, to proposals.
    pub fn forward(&self, images: Tensor<4>) -> Proposals {
        let x = FeatureMap::from_nchw(images);
        let x = self.prelu1.forward(self.conv1.forward(x)); // [N, 10, H − 2, W − 2]
        let x = ops::max_pool2d(x, 2, 2, true);
        let x = self.prelu2.forward(self.conv2.forward(x));
        let x = self.prelu3.forward(self.conv3.forward(x)); // [N, 32, R, C]
        let scores = softmax(self.conv4_1.forward(x.clone()).into_nchw(), 1);
        let probability = scores.slice(s![.., 1..2, .., ..]).squeeze_dim::<3>(1); // [N, R, C]
        Proposals {
            probability,
            offsets: self.conv4_2.forward(x).into_nchw(),
        }
    }
}

/// Refinement network on 24×24 crops.
#[derive(Module, Debug)]
pub struct RNet {
    /// 3×3, 3 → 28.
    pub conv1: Conv2d,
    /// After `conv1`.
    pub prelu1: PRelu,
    /// 3×3, 28 → 48.
    pub conv2: Conv2d,
    /// After `conv2`.
    pub prelu2: PRelu,
    /// 2×2, 48 → 64.
    pub conv3: Conv2d,
    /// After `conv3`.
    pub prelu3: PRelu,
    /// 576 → 128, its input in the order (W, H, C).
    pub dense4: Linear,
    /// After `dense4`.
    pub prelu4: PRelu,
    /// 128 → 2: scores of "no face" and "face".
    pub dense5_1: Linear,
    /// 128 → 4: offsets.
    pub dense5_2: Linear,
}

/// What [`RNet`] says of every crop.
#[derive(Clone, Debug)]
pub struct Refinements {
    /// Probability of a face, `[N]`.
    pub probability: Tensor<1>,
    /// `[N, 4]`.
    pub offsets: Tensor<2>,
}

impl RNet {
    /// A network with fresh weights.
    pub fn new(init: &mut Init) -> Self {
        Self {
            conv1: conv(init, 3, 28, 3),
            prelu1: PRelu::new(init, 28),
            conv2: conv(init, 28, 48, 3),
            prelu2: PRelu::new(init, 48),
            conv3: conv(init, 48, 64, 2),
            prelu3: PRelu::new(init, 64),
            dense4: Linear::new(init, 576, 128),
            prelu4: PRelu::new(init, 128),
            dense5_1: Linear::new(init, 128, 2),
            dense5_2: Linear::new(init, 128, 4),
        }
    }

    /// Crops `[N, 3, 24, 24]` to refinements.
    pub fn forward(&self, crops: Tensor<4>) -> Refinements {
        let x = FeatureMap::from_nchw(crops);
        let x = self.prelu1.forward(self.conv1.forward(x)); // [N, 28, 22, 22]
        let x = ops::max_pool2d(x, 3, 2, true); // [N, 28, 11, 11]
        let x = self.prelu2.forward(self.conv2.forward(x)); // [N, 48, 9, 9]
        let x = ops::max_pool2d(x, 3, 2, true); // [N, 48, 4, 4]
        let x = self.prelu3.forward(self.conv3.forward(x)); // [N, 64, 3, 3]
        let x = prelu_vectors(&self.prelu4, self.dense4.forward(flatten_whc(x))); // [N, 128]
        Refinements {
            probability: face_probability(self.dense5_1.forward(x.clone())),
            offsets: self.dense5_2.forward(x),
        }
    }
}

/// Output network on 48×48 crops.
#[derive(Module, Debug)]
pub struct ONet {
    /// 3×3, 3 → 32.
    pub conv1: Conv2d,
    /// After `conv1`.
    pub prelu1: PRelu,
    /// 3×3, 32 → 64.
    pub conv2: Conv2d,
    /// After `conv2`.
    pub prelu2: PRelu,
    /// 3×3, 64 → 64.
    pub conv3: Conv2d,
    /// After `conv3`.
    pub prelu3: PRelu,
    /// 2×2, 64 → 128.
    pub conv4: Conv2d,
    /// After `conv4`.
    pub prelu4: PRelu,
    /// 1152 → 256, its input in the order (W, H, C).
    pub dense5: Linear,
    /// After `dense5`.
    pub prelu5: PRelu,
    /// 256 → 2: scores of "no face" and "face".
    pub dense6_1: Linear,
    /// 256 → 4: offsets.
    pub dense6_2: Linear,
    /// 256 → 10: landmarks.
    pub dense6_3: Linear,
}

/// What [`ONet`] says of every crop.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// Probability of a face, `[N]`.
    pub probability: Tensor<1>,
    /// `[N, 4]`.
    pub offsets: Tensor<2>,
    /// `[N, 10]`.
    pub landmarks: Tensor<2>,
}

impl ONet {
    /// A network with fresh weights.
    pub fn new(init: &mut Init) -> Self {
        Self {
            conv1: conv(init, 3, 32, 3),
            prelu1: PRelu::new(init, 32),
            conv2: conv(init, 32, 64, 3),
            prelu2: PRelu::new(init, 64),
            conv3: conv(init, 64, 64, 3),
            prelu3: PRelu::new(init, 64),
            conv4: conv(init, 64, 128, 2),
            prelu4: PRelu::new(init, 128),
            dense5: Linear::new(init, 1152, 256),
            prelu5: PRelu::new(init, 256),
            dense6_1: Linear::new(init, 256, 2),
            dense6_2: Linear::new(init, 256, 4),
            dense6_3: Linear::new(init, 256, 10),
        }
    }

    /// Crops `[N, 3, 48, 48]` to outputs.
    pub fn forward(&self, crops: Tensor<4>) -> Outputs {
        let x = FeatureMap::from_nchw(crops);
        let x = self.prelu1.forward(self.conv1.forward(x)); // [N, 32, 46, 46]
        let x = ops::max_pool2d(x, 3, 2, true); // [N, 32, 23, 23]
        let x = self.prelu2.forward(self.conv2.forward(x)); // [N, 64, 21, 21]
        let x = ops::max_pool2d(x, 3, 2, true); // [N, 64, 10, 10]
        let x = self.prelu3.forward(self.conv3.forward(x)); // [N, 64, 8, 8]
        let x = ops::max_pool2d(x, 2, 2, true); // [N, 64, 4, 4]
        let x = self.prelu4.forward(self.conv4.forward(x)); // [N, 128, 3, 3]
        let x = prelu_vectors(&self.prelu5, self.dense5.forward(flatten_whc(x))); // [N, 256]
        Outputs {
            probability: face_probability(self.dense6_1.forward(x.clone())),
            offsets: self.dense6_2.forward(x.clone()),
            landmarks: self.dense6_3.forward(x),
        }
    }
}

/// The three networks of the cascade, in the order in which they run.
#[derive(Module, Debug)]
pub struct Mtcnn {
    /// Proposes windows on every level of the image pyramid.
    pub pnet: PNet,
    /// Refines them.
    pub rnet: RNet,
    /// Decides, and finds the landmarks.
    pub onet: ONet,
}

impl Mtcnn {
    /// Three networks with fresh weights.
    pub fn new(init: &mut Init) -> Self {
        Self {
            pnet: PNet::new(init),
            rnet: RNet::new(init),
            onet: ONet::new(init),
        }
    }
}

fn conv(init: &mut Init, inputs: usize, outputs: usize, kernel: usize) -> Conv2d {
    Conv2d::new(init, inputs, outputs, [kernel, kernel], Conv2dOptions::default()).with_bias(init)
}

/// `[N, C, H, W]` → `[N, W·H·C]`: the order in which the dense layers' weights were trained.
fn flatten_whc(x: FeatureMap) -> Tensor<2> {
    x.into_nchw().permute([0, 3, 2, 1]).flatten(1, 3)
}

fn prelu_vectors(prelu: &PRelu, x: Tensor<2>) -> Tensor<2> {
    let [n, c] = x.dims();
    prelu
        .forward(FeatureMap::from_nchw(x.reshape([n, c, 1, 1])))
        .flatten()
}

/// Scores `[N, 2]` → probability of the second `[N]`.
fn face_probability(scores: Tensor<2>) -> Tensor<1> {
    softmax(scores, 1).slice(s![.., 1..2]).squeeze_dim(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn images(n: usize, h: usize, w: usize, device: &Device) -> Tensor<4> {
        let values = (0..n * 3 * h * w)
            .map(|i| ((i * 7919) % 256) as f32 / 128.0 - 1.0)
            .collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(values, [n, 3, h, w]), device)
    }

    #[test]
    fn shapes_follow_the_ceiling_pools() {
        let device = Device::flex();
        let mtcnn = Mtcnn::new(&mut Init::new(1, &device));
        for (h, w) in [(12, 12), (13, 20), (37, 26)] {
            let proposals = mtcnn.pnet.forward(images(1, h, w, &device));
            let (r, c) = ((h - 2usize).div_ceil(2) - 4, (w - 2usize).div_ceil(2) - 4);
            assert_eq!(proposals.probability.dims(), [1, r, c]);
            assert_eq!(proposals.offsets.dims(), [1, 4, r, c]);
        }
        let refined = mtcnn.rnet.forward(images(3, 24, 24, &device));
        assert_eq!(
            (refined.probability.dims(), refined.offsets.dims()),
            ([3], [3, 4])
        );
        let outputs = mtcnn.onet.forward(images(2, 48, 48, &device));
        assert_eq!(
            (outputs.offsets.dims(), outputs.landmarks.dims()),
            ([2, 4], [2, 10])
        );
        let probability: Vec<f32> = outputs.probability.into_data().iter::<f32>().collect();
        assert!(probability.iter().all(|p| (0.0..=1.0).contains(p)));
    }

    #[test]
    fn dense_layers_read_columns_first() {
        let device = Device::flex();
        // [1, 2, 2, 3]: element (c, y, x) is 100c + 10y + x.
        let values = [0., 1., 2., 10., 11., 12., 100., 101., 102., 110., 111., 112f32];
        let x = Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, 2, 2, 3]), &device);
        let flat: Vec<f32> = flatten_whc(FeatureMap::from_nchw(x))
            .into_data()
            .iter::<f32>()
            .collect();
        assert_eq!(
            flat,
            [0., 100., 10., 110., 1., 101., 11., 111., 2., 102., 12., 112.]
        );
    }
}
