//! MobileFaceNet (Chen et al. 2018) in its public layout: a small recogniser for phones and quick runs on a CPU.
//!
//! ```text
//! images [N, 3, H, W]
//!   conv1     conv 3×3 s2                       [N, w, H/2, W/2]
//!   dw_conv1  depthwise 3×3
//!   blocks    inverted residuals, see BLOCKS    [N, 2w, H/16, W/16]
//!   conv2     conv 1×1                          [N, 8w, H/16, W/16]
//!   linear7   depthwise over all that is left   [N, 8w, 1, 1]
//!   linear1   conv 1×1                          [N, D, 1, 1]
//!
//! block:  1×1 expand, BN, PReLU, depthwise 3×3 stride s, BN, PReLU, 1×1 project, BN; plus x where the shape agrees
//! ```
//!
//! Every convolution is followed by BN, and by PReLU except in linear7, linear1 and the projections.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use faceprior_ops::{Conv2dOptions, FeatureMap};
use serde::{Deserialize, Serialize};

use crate::init::{Init, Scheme};
use crate::layers::{BatchNorm, Conv2d, Mode, PRelu, resize_bilinear};
use crate::weights::{Weights, WeightsError};

/// (expansion, channels in widths, repeats, stride of the first).
const BLOCKS: [(usize, usize, usize, usize); 5] = [
    (2, 1, 5, 2),
    (4, 2, 1, 2),
    (2, 2, 6, 1),
    (4, 2, 1, 2),
    (2, 2, 2, 1),
];

/// See the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MobileFaceNetConfig {
    /// Height and width of the pictures; others are resized to it. Published: 112 × 96.
    pub image_size: [usize; 2],
    /// Channels of the first layer. Published: 64.
    pub width: usize,
    /// Length of an embedding. Published: 128.
    pub embedding_dim: usize,
}

impl Default for MobileFaceNetConfig {
    fn default() -> Self {
        Self {
            image_size: [112, 96],
            width: 64,
            embedding_dim: 128,
        }
    }
}

impl MobileFaceNetConfig {
    /// Fresh weights, PyTorch's defaults.
    pub fn init(&self, init: &mut Init) -> MobileFaceNet {
        let init = &mut init.with_scheme(Scheme::Torch);
        let w = self.width;
        let rest = self.image_size.map(|size| size.div_ceil(16));
        let depthwise = |groups| Conv2dOptions {
            stride: 1,
            padding: 1,
            groups,
        };

        let conv1 = Conv2dOptions {
            stride: 2,
            padding: 1,
            groups: 1,
        };
        let conv1 = ConvBlock::new(init, 3, w, [3, 3], conv1).with_prelu(init);
        let dw_conv1 = ConvBlock::new(init, w, w, [3, 3], depthwise(w)).with_prelu(init);
        let mut blocks = Vec::new();
        let mut inputs = w;
        for (expansion, widths, repeats, first_stride) in BLOCKS {
            for repeat in 0..repeats {
                let stride = if repeat == 0 { first_stride } else { 1 };
                blocks.push(InvertedResidual::new(init, inputs, widths * w, stride, expansion));
                inputs = widths * w;
            }
        }
        let all_that_is_left = Conv2dOptions {
            stride: 1,
            padding: 0,
            groups: 8 * w,
        };
        MobileFaceNet {
            conv1,
            dw_conv1,
            blocks,
            conv2: ConvBlock::new(init, inputs, 8 * w, [1, 1], Conv2dOptions::default()).with_prelu(init),
            linear7: ConvBlock::new(init, 8 * w, 8 * w, rest, all_that_is_left),
            linear1: ConvBlock::new(init, 8 * w, self.embedding_dim, [1, 1], Conv2dOptions::default()),
            config: self.clone(),
        }
    }
}

/// See the [module](self).
#[derive(Module, Debug)]
pub struct MobileFaceNet {
    /// 3×3, stride 2.
    pub conv1: ConvBlock,
    /// Depthwise 3×3.
    pub dw_conv1: ConvBlock,
    /// Fifteen inverted residuals.
    pub blocks: Vec<InvertedResidual>,
    /// 1×1.
    pub conv2: ConvBlock,
    /// Depthwise over all pixels that are left: a learnt mean.
    pub linear7: ConvBlock,
    /// 1×1 to the embedding.
    pub linear1: ConvBlock,
    #[module(skip)]
    config: MobileFaceNetConfig,
}

impl MobileFaceNet {
    /// What [`MobileFaceNet::to_weights`] calls its file.
    pub const KIND: &'static str = "mobilefacenet";

    /// Pictures to embeddings, which are not normalised.
    ///
    /// # Shapes
    /// `[N, 3, H, W]` → `[N, D]`. Pictures of another size than the network's are resized bilinearly.
    pub fn forward(&self, images: Tensor<4>, mode: Mode) -> Tensor<2> {
        let images = resize_bilinear(images, self.config.image_size); // [N, 3, H, W]
        let x = self.conv1.forward(FeatureMap::from_nchw(images), mode); // [N, w, H/2, W/2]
        let x = self.dw_conv1.forward(x, mode);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, mode)); // [N, 2w, H/16, W/16]
        let x = self.conv2.forward(x, mode); // [N, 8w, H/16, W/16]
        let x = self.linear7.forward(x, mode); // [N, 8w, 1, 1]
        self.linear1.forward(x, mode).flatten() // [N, D]
    }

    /// What the network was made of.
    pub fn config(&self) -> &MobileFaceNetConfig {
        &self.config
    }

    /// Everything that is needed to build the network again.
    pub fn to_weights(&self) -> Weights {
        let mut weights = Weights::from_module(self, "");
        weights.describe(Self::KIND, &self.config);
        weights
    }

    /// The network that a file of [`MobileFaceNet::to_weights`] holds.
    ///
    /// # Errors
    /// [`WeightsError::Description`] for another kind of file, [`WeightsError::Mismatch`] if its tensors are not
    /// those that its description asks for.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        let config: MobileFaceNetConfig = weights.config(Self::KIND)?;
        weights.load_into(config.init(&mut Init::new(0, device)), "")
    }
}

/// Convolution, BN, and PReLU unless it is linear.
#[derive(Module, Debug)]
pub struct ConvBlock {
    /// Without bias.
    pub conv: Conv2d,
    /// After the convolution.
    pub bn: BatchNorm,
    /// None in linear blocks.
    pub prelu: Option<PRelu>,
}

impl ConvBlock {
    fn new(
        init: &mut Init,
        inputs: usize,
        outputs: usize,
        kernel: [usize; 2],
        options: Conv2dOptions,
    ) -> Self {
        Self {
            conv: Conv2d::new(init, inputs, outputs, kernel, options),
            bn: BatchNorm::new(init, outputs),
            prelu: None,
        }
    }

    fn with_prelu(mut self, init: &mut Init) -> Self {
        self.prelu = Some(PRelu::new(init, self.bn.weight.lazy_shape().num_elements()));
        self
    }

    /// `[N, I, H, W]` → `[N, O, H', W']`.
    fn forward(&self, x: FeatureMap, mode: Mode) -> FeatureMap {
        let x = self.bn.forward(self.conv.forward(x), mode);
        match &self.prelu {
            Some(prelu) => prelu.forward(x),
            None => x,
        }
    }
}

/// Expand, filter each channel, project (Sandler et al. 2018).
#[derive(Module, Debug)]
pub struct InvertedResidual {
    /// Conv 1×1, BN, PReLU, depthwise 3×3, BN, PReLU, conv 1×1, BN.
    pub conv: (
        Conv2d,
        BatchNorm,
        PRelu,
        Conv2d,
        BatchNorm,
        PRelu,
        Conv2d,
        BatchNorm,
    ),
    residual: bool,
}

impl InvertedResidual {
    fn new(init: &mut Init, inputs: usize, outputs: usize, stride: usize, expansion: usize) -> Self {
        let hidden = inputs * expansion;
        let pointwise = Conv2dOptions::default();
        let depthwise = Conv2dOptions {
            stride,
            padding: 1,
            groups: hidden,
        };
        let conv = (
            Conv2d::new(init, inputs, hidden, [1, 1], pointwise),
            BatchNorm::new(init, hidden),
            PRelu::new(init, hidden),
            Conv2d::new(init, hidden, hidden, [3, 3], depthwise),
            BatchNorm::new(init, hidden),
            PRelu::new(init, hidden),
            Conv2d::new(init, hidden, outputs, [1, 1], pointwise),
            BatchNorm::new(init, outputs),
        );
        Self {
            conv,
            residual: stride == 1 && inputs == outputs,
        }
    }

    /// `[N, I, H, W]` → `[N, O, H/s, W/s]`.
    fn forward(&self, x: FeatureMap, mode: Mode) -> FeatureMap {
        let (expand, norm1, prelu1, filter, norm2, prelu2, project, norm3) = &self.conv;
        let y = prelu1.forward(norm1.forward(expand.forward(x.clone()), mode)); // [N, t·I, H, W]
        let y = prelu2.forward(norm2.forward(filter.forward(y), mode)); // [N, t·I, H/s, W/s]
        let y = norm3.forward(project.forward(y), mode); // [N, O, H/s, W/s]
        if self.residual { y.add(x) } else { y }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_alone_builds_the_network_again() {
        let device = Device::flex();
        let config = MobileFaceNetConfig {
            image_size: [48, 32],
            width: 4,
            embedding_dim: 6,
        };
        let network = config.init(&mut Init::new(1, &device));
        let images = crate::fill::input::<4>("images", [2, 3, 48, 32], 1.0, &device);
        let again = MobileFaceNet::from_weights(&network.to_weights(), &device).unwrap();
        let embedding = again.forward(images.clone(), Mode::Eval);
        assert_eq!(embedding.dims(), [2, 6]);
        assert_eq!(
            embedding.into_data(),
            network.forward(images, Mode::Eval).into_data()
        );
    }

    #[test]
    fn the_published_network_has_a_million_parameters() {
        let network = MobileFaceNetConfig::default().init(&mut Init::new(1, &Device::flex()));
        let weights = Weights::from_module(&network, "");
        let learnt = weights
            .names()
            .filter(|name| !name.contains("running_") && !name.contains("tracked"));
        let count: usize = learnt.map(|name| weights.get(name).unwrap().num_elements()).sum();
        assert_eq!(count, 999_552); // as many as the public checkpoint holds
    }
}
