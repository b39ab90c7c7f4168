//! Encoders: pictures to the codes from which a StyleGAN generator would draw them.
//!
//! [`BackboneEncoder`] (ReStyle-pSp, Alaluf et al. 2021) sees the picture beside what the generator draws at present
//! (first the average image) and predicts the step from the present codes:
//! `codes ← codes + encoder([x ‖ y])`, starting from `latent_avg`.
//!
//! ```text
//! [x ‖ y]      [N, 6, S, S]
//!   backbone   IR-SE                                     [N, 8w, h, h]    h = S/16
//!   styles.j   one head per code: ⌈log2 h⌉ × (conv 3×3 s2, leaky ReLU 0.01), equalised linear   [N, d]
//! codes        [N, num_ws, d]
//! ```
//!
//! Axes: `N` pictures, `S` image size, `w` width, `h` size after the body, `d` latent dimensions.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use faceprior_ops::{Conv2dOptions, FeatureMap, linear};
use serde::{Deserialize, Serialize};

use crate::init::{Init, Scheme};
use crate::irse::{AVERAGE_IMAGE, Backbone, BackboneConfig, Depth, InputLayer, Unit, features};
use crate::layers::{Conv2d, Layer, LeakyRelu, Mode, resize_bilinear};
use crate::weights::{Weights, WeightsError};

/// Name of the tensor `[d]` that holds the mean code in the files of generators and encoders.
pub const LATENT_AVG: &str = "latent_avg";

/// See [`BackboneEncoder`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneEncoderConfig {
    /// Input layer and body; published: IR-SE 34, 50 or 100 on six channels.
    pub backbone: BackboneConfig,
    /// Height and width of the pictures; others are resized to it. Published: 112.
    pub image_size: usize,
    /// Codes per picture: the generator's `num_ws`. 14 for 128².
    pub num_ws: usize,
    /// Length of a code. Published: 512.
    pub latent_dim: usize,
}

impl BackboneEncoderConfig {
    /// The published encoder for a generator of `num_ws` codes.
    pub fn published(depth: Depth, num_ws: usize) -> Self {
        Self {
            backbone: BackboneConfig::with_average(depth),
            image_size: 112,
            num_ws,
            latent_dim: 512,
        }
    }

    /// Fresh weights: PyTorch's defaults, N(0, 1) for the equalised linear layers.
    pub fn init(&self, init: &mut Init) -> BackboneEncoder {
        let init = &mut init.with_scheme(Scheme::Torch);
        let Backbone { input_layer, body } = self.backbone.init(init);
        let size = self.backbone.out_size(self.image_size);
        let head = |_| StyleHead::new(init, self.backbone.out_channels(), size, self.latent_dim);
        let styles = (0..self.num_ws).map(head).collect();
        BackboneEncoder {
            input_layer,
            body,
            styles,
            config: self.clone(),
        }
    }
}

/// See the [module](self).
#[derive(Module, Debug)]
pub struct BackboneEncoder {
    /// Conv 3×3, BN, PReLU.
    pub input_layer: InputLayer,
    /// All units of all stages.
    pub body: Vec<Unit>,
    /// One head per code.
    pub styles: Vec<StyleHead>,
    #[module(skip)]
    config: BackboneEncoderConfig,
}

impl BackboneEncoder {
    /// What [`BackboneEncoder::to_weights`] calls its file.
    pub const KIND: &'static str = "encoder";

    const KEY_PREFIX: &'static str = "encoder.";

    /// The step from the present codes, to which the caller adds it.
    ///
    /// # Shapes
    /// `[N, 6, H, W]` → `[N, num_ws, d]`. Pictures of another size than the network's are resized bilinearly.
    pub fn forward(&self, images: Tensor<4>, mode: Mode) -> Tensor<3> {
        let images = resize_bilinear(images, [self.config.image_size; 2]); // [N, 6, S, S]
        let x = features(&self.input_layer, &self.body, images, mode); // [N, 8w, h, h]
        let codes = self.styles.iter().map(|style| style.forward(x.clone(), mode)); // num_ws × [N, d]
        Tensor::stack(codes.collect(), 1) // [N, num_ws, d]
    }

    /// What the network was made of.
    pub fn config(&self) -> &BackboneEncoderConfig {
        &self.config
    }

    /// Everything that is needed to build the network again and to go on from it: the mean code `latent_avg` `[d]`,
    /// from which its steps start, and the `average_image` `[3, H, W]` that the generator draws from it.
    pub fn to_weights(&self, latent_avg: Tensor<1>, average_image: Tensor<3>) -> Weights {
        let mut weights = Weights::from_module(self, Self::KEY_PREFIX);
        weights.describe(Self::KIND, &self.config);
        weights.insert_tensor(LATENT_AVG, latent_avg);
        weights.insert_tensor(AVERAGE_IMAGE, average_image);
        weights
    }

    /// The network that a file of [`BackboneEncoder::to_weights`] holds.
    ///
    /// # Errors
    /// [`WeightsError::Description`] for another kind of file, [`WeightsError::Mismatch`] if its tensors are not
    /// those that its description asks for.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        let config: BackboneEncoderConfig = weights.config(Self::KIND)?;
        weights.load_into(config.init(&mut Init::new(0, device)), Self::KEY_PREFIX)
    }
}

/// Convolutions down to one pixel, then an equalised linear layer.
#[derive(Module, Debug)]
pub struct StyleHead {
    /// Conv 3×3 with stride 2 and bias, leaky ReLU 0.01, as often as it takes to reach one pixel.
    pub convs: Vec<Layer>,
    /// `[N, d]` → `[N, d]`.
    pub linear: EqualLinear,
}

impl StyleHead {
    fn new(init: &mut Init, inputs: usize, size: usize, outputs: usize) -> Self {
        let halvings = size.next_power_of_two().ilog2();
        let mut convs = Vec::new();
        let mut channels = inputs;
        for _ in 0..halvings {
            let options = Conv2dOptions {
                stride: 2,
                padding: 1,
                groups: 1,
            };
            let conv = Conv2d::new(init, channels, outputs, [3, 3], options).with_bias(init);
            convs.extend([Layer::Conv2d(conv), Layer::LeakyRelu(LeakyRelu { slope: 0.01 })]);
            channels = outputs;
        }
        Self {
            convs,
            linear: EqualLinear::new(init, channels, outputs),
        }
    }

    /// `[N, 8w, h, h]` → `[N, d]`.
    fn forward(&self, x: FeatureMap, mode: Mode) -> Tensor<2> {
        let x = Layer::forward_all(&self.convs, x, mode); // [N, d, 1, 1]
        self.linear.forward(x.flatten()) // [N, d]
    }
}

/// y = W·x/√I + b, with W ~ N(0, 1): the equalised learning rate of Karras et al. 2018.
#[derive(Module, Debug)]
pub struct EqualLinear {
    /// `[O, I]`.
    pub weight: Param<Tensor<2>>,
    /// `[O]`.
    pub bias: Param<Tensor<1>>,
}

impl EqualLinear {
    fn new(init: &mut Init, inputs: usize, outputs: usize) -> Self {
        Self {
            weight: init.normal([outputs, inputs], 1.0),
            bias: init.constant([outputs], 0.0),
        }
    }

    /// `[N, I]` → `[N, O]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let scale = (x.dims()[1] as f32).sqrt().recip();
        linear(x, self.weight.val()).mul_scalar(scale) + self.bias.val().unsqueeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fill;

    fn small() -> BackboneEncoderConfig {
        let backbone = BackboneConfig {
            width: 8,
            ..BackboneConfig::with_average(Depth::D18)
        };
        BackboneEncoderConfig {
            backbone,
            image_size: 48,
            num_ws: 4,
            latent_dim: 16,
        }
    }

    #[test]
    fn heads_halve_to_one_pixel() {
        let device = Device::flex();
        // Body ends at 1, 2, 3, 4 and 5 pixels.
        for (image_size, halvings) in [(16, 0), (32, 1), (48, 2), (64, 2), (80, 3)] {
            let encoder = BackboneEncoderConfig {
                image_size,
                ..small()
            }
            .init(&mut Init::new(1, &device));
            assert_eq!(encoder.styles[0].convs.len(), 2 * halvings);
            let images = Tensor::zeros([1, 6, image_size, image_size], &device);
            assert_eq!(encoder.forward(images, Mode::Eval).dims(), [1, 4, 16]);
        }
    }

    #[test]
    fn a_file_alone_builds_the_network_again() {
        let device = Device::flex();
        let encoder = fill::fill(small().init(&mut Init::new(1, &device)), "t.");
        let (latent_avg, average) = (Tensor::ones([16], &device), Tensor::ones([3, 48, 48], &device));
        let weights = encoder.to_weights(latent_avg, average);
        assert_eq!(weights.get(LATENT_AVG).unwrap().shape().as_slice(), [16]);
        let again = BackboneEncoder::from_weights(&weights, &device).unwrap();
        let images: Tensor<4> = fill::input("images", [2, 6, 48, 48], 1.0, &device);
        let codes = |encoder: &BackboneEncoder| encoder.forward(images.clone(), Mode::Eval).into_data();
        assert_eq!(codes(&encoder), codes(&again));

        let error = crate::irse::Recognizer::from_weights(&weights, &device)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "cannot use weights: it holds encoder, expected recognizer");
    }
}
