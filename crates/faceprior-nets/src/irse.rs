//! IR and IR-SE networks: the "improved residual" body of ArcFace (Deng et al. 2019), with or without squeeze and
//! excitation, and the recogniser made of it.
//!
//! ```text
//! images [N, 3 or 6, S, S]
//!   input_layer   conv 3×3, BN, PReLU                        [N, w, S, S]
//!   body          four stages of units, widths w·(1, 2, 4, 8), each stage halves the picture
//!                                                            [N, 8w, S/16, S/16]
//!   output_layer  BN, dropout, flatten, linear, BN           [N, D]
//!
//! unit:  y = residual(x) + shortcut(x)
//!   res_layer       BN, conv 3×3, PReLU, conv 3×3 (stride), BN, [SE]
//!   shortcut_layer  conv 1×1 (stride), BN; where the widths agree: every stride-th pixel
//! ```
//!
//! Two published forms differ in what they see and in the prefix of their keys. face.evoLVe's `IR_50` … `IR_SE_152`
//! see the picture (no prefix). The recogniser made from a StyleGAN encoder sees the picture beside the average image
//! of the generator, six channels, and its keys start with `encoder.`.
//!
//! Axes: `N` pictures, `I`, `O` channels in and out of a unit, `H`, `W` space, `w` width, `S` image size, `s` stride,
//! `D` embedding dimensions.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use faceprior_ops::{self as ops, Conv2dOptions, FeatureMap};
use serde::{Deserialize, Serialize};

use crate::init::{Init, Scheme};
use crate::layers::{
    BatchNorm, Conv2d, Dropout, Flatten, Layer, Linear, Mode, PRelu, SqueezeExcitation, resize_bilinear,
};
use crate::weights::{Weights, WeightsError};

/// How deep the body is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Depth {
    /// Units per stage 2, 2, 2, 2.
    D18,
    /// Units per stage 3, 4, 6, 3.
    D34,
    /// Units per stage 3, 4, 14, 3.
    D50,
    /// Units per stage 3, 13, 30, 3; also called 101.
    D100,
    /// Units per stage 3, 8, 36, 3.
    D152,
}

impl Depth {
    /// Units of each stage.
    pub fn units(self) -> [usize; 4] {
        match self {
            Depth::D18 => [2, 2, 2, 2],
            Depth::D34 => [3, 4, 6, 3],
            Depth::D50 => [3, 4, 14, 3],
            Depth::D100 => [3, 13, 30, 3],
            Depth::D152 => [3, 8, 36, 3],
        }
    }
}

impl TryFrom<u32> for Depth {
    type Error = String;

    fn try_from(depth: u32) -> Result<Self, String> {
        match depth {
            18 => Ok(Depth::D18),
            34 => Ok(Depth::D34),
            50 => Ok(Depth::D50),
            100 | 101 => Ok(Depth::D100),
            152 => Ok(Depth::D152),
            other => Err(format!("depth is {other}, expected 18, 34, 50, 100 or 152")),
        }
    }
}

impl From<Depth> for u32 {
    fn from(depth: Depth) -> u32 {
        match depth {
            Depth::D18 => 18,
            Depth::D34 => 34,
            Depth::D50 => 50,
            Depth::D100 => 100,
            Depth::D152 => 152,
        }
    }
}

/// The part that recogniser and encoder share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// Number of layers, as the networks are named.
    pub depth: Depth,
    /// 3: the picture; 6: the picture and an average image or a reconstruction beside it.
    pub in_channels: usize,
    /// Channels of the first stage; the others have 2, 4 and 8 times as many. Published: 64.
    pub width: usize,
    /// Whether units end with squeeze and excitation (reduction 16).
    pub squeeze_excitation: bool,
    /// Probability of the dropout after each convolution in the units. At 0 there are no such layers, which moves the
    /// numbers in the keys.
    pub dropout: f64,
}

impl BackboneConfig {
    /// The published IR-SE body on six channels, for encoders and the recognisers made from them.
    pub fn with_average(depth: Depth) -> Self {
        Self {
            depth,
            in_channels: 6,
            width: 64,
            squeeze_excitation: true,
            dropout: 0.0,
        }
    }

    /// Fresh weights, by the scheme of `init`.
    pub fn init(&self, init: &mut Init) -> Backbone {
        let input_layer = (
            Conv2d::new(
                init,
                self.in_channels,
                self.width,
                [3, 3],
                Conv2dOptions::same3x3(),
            ),
            BatchNorm::new(init, self.width),
            PRelu::new(init, self.width),
        );
        let mut body = Vec::new();
        let mut inputs = self.width;
        for (stage, units) in self.depth.units().into_iter().enumerate() {
            let outputs = self.width << stage;
            for unit in 0..units {
                let stride = if unit == 0 { 2 } else { 1 };
                body.push(Unit::new(init, inputs, outputs, stride, self));
                inputs = outputs;
            }
        }
        Backbone { input_layer, body }
    }

    /// Channels that come out of the body.
    pub fn out_channels(&self) -> usize {
        self.width * 8
    }

    /// Height or width of what comes out of the body for images of `image_size`: four strides of two.
    pub fn out_size(&self, image_size: usize) -> usize {
        image_size.div_ceil(16)
    }
}

/// Convolution, BN, PReLU at full size.
pub type InputLayer = (Conv2d, BatchNorm, PRelu);

/// Input layer and body, without a head.
#[derive(Module, Debug)]
pub struct Backbone {
    /// Conv 3×3, BN, PReLU.
    pub input_layer: InputLayer,
    /// All units of all stages.
    pub body: Vec<Unit>,
}

impl Backbone {
    /// `[N, I, S, S]` → `[N, 8w, S/16, S/16]`.
    pub fn forward(&self, images: Tensor<4>, mode: Mode) -> FeatureMap {
        features(&self.input_layer, &self.body, images, mode)
    }
}

/// Input layer and body; networks hold the two side by side because their keys have no common prefix.
pub(crate) fn features(input_layer: &InputLayer, body: &[Unit], images: Tensor<4>, mode: Mode) -> FeatureMap {
    let (conv, norm, prelu) = input_layer;
    let x = FeatureMap::from_nchw(images);
    let x = prelu.forward(norm.forward(conv.forward(x), mode)); // [N, w, S, S]
    body.iter().fold(x, |x, unit| unit.forward(x, mode)) // [N, 8w, S/16, S/16]
}

/// One residual unit.
#[derive(Module, Debug)]
pub struct Unit {
    /// BN, conv 3×3, [dropout], PReLU, conv 3×3 with stride, [dropout], BN, [SE].
    pub res_layer: Vec<Layer>,
    /// Conv 1×1 with stride, [dropout], BN; none where the widths agree.
    pub shortcut_layer: Option<Vec<Layer>>,
    stride: usize,
}

impl Unit {
    fn new(init: &mut Init, inputs: usize, outputs: usize, stride: usize, config: &BackboneConfig) -> Self {
        let strided = |padding| Conv2dOptions {
            stride,
            padding,
            groups: 1,
        };
        let dropout = || (config.dropout > 0.0).then_some(Layer::Dropout(Dropout { p: config.dropout }));

        let mut res_layer = vec![
            Layer::BatchNorm(BatchNorm::new(init, inputs)),
            Layer::Conv2d(Conv2d::new(
                init,
                inputs,
                outputs,
                [3, 3],
                Conv2dOptions::same3x3(),
            )),
        ];
        res_layer.extend(dropout());
        res_layer.push(Layer::PRelu(PRelu::new(init, outputs)));
        res_layer.push(Layer::Conv2d(Conv2d::new(
            init,
            outputs,
            outputs,
            [3, 3],
            strided(1),
        )));
        res_layer.extend(dropout());
        res_layer.push(Layer::BatchNorm(BatchNorm::new(init, outputs)));
        if config.squeeze_excitation {
            res_layer.push(Layer::SqueezeExcitation(SqueezeExcitation::new(
                init, outputs, 16,
            )));
        }

        let shortcut_layer = (inputs != outputs).then(|| {
            let mut layers = vec![Layer::Conv2d(Conv2d::new(
                init,
                inputs,
                outputs,
                [1, 1],
                strided(0),
            ))];
            layers.extend(dropout());
            layers.push(Layer::BatchNorm(BatchNorm::new(init, outputs)));
            layers
        });
        Self {
            res_layer,
            shortcut_layer,
            stride,
        }
    }

    /// `[N, I, H, W]` → `[N, O, H/s, W/s]`.
    pub fn forward(&self, x: FeatureMap, mode: Mode) -> FeatureMap {
        let residual = Layer::forward_all(&self.res_layer, x.clone(), mode); // [N, O, H/s, W/s]
        let shortcut = match &self.shortcut_layer {
            Some(projection) => Layer::forward_all(projection, x, mode),
            None => ops::subsample(x, self.stride),
        }; // [N, O, H/s, W/s]
        residual.add(shortcut)
    }
}

/// A recogniser: pictures to embeddings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecognizerConfig {
    /// Input layer and body.
    pub backbone: BackboneConfig,
    /// Height and width of the pictures; others are resized to it. Published: 112.
    pub image_size: usize,
    /// Length of an embedding. Published: 512.
    pub embedding_dim: usize,
    /// Probability of the dropout before the last linear layer. Published: 0.5.
    pub output_dropout: f64,
}

impl RecognizerConfig {
    /// The recogniser made from a StyleGAN encoder (`IR_{34,50,100}_ReStyle`): IR-SE, six channels.
    pub fn from_encoder(depth: Depth) -> Self {
        Self {
            backbone: BackboneConfig::with_average(depth),
            image_size: 112,
            embedding_dim: 512,
            output_dropout: 0.5,
        }
    }

    /// face.evoLVe's `IR_50` … `IR_SE_152`: three channels.
    pub fn face_evolve(depth: Depth, squeeze_excitation: bool) -> Self {
        let mut config = Self::from_encoder(depth);
        config.backbone.in_channels = 3;
        config.backbone.squeeze_excitation = squeeze_excitation;
        config
    }

    /// Whether the network sees an average image beside the picture.
    pub fn sees_average(&self) -> bool {
        self.backbone.in_channels == 6
    }

    /// What the published checkpoints of this form put before each key.
    pub fn key_prefix(&self) -> &'static str {
        if self.sees_average() { "encoder." } else { "" }
    }

    /// Fresh weights: kaiming-normal by fan-out for the form made from an encoder, xavier-uniform for face.evoLVe's.
    pub fn init(&self, init: &mut Init) -> Recognizer {
        let scheme = if self.sees_average() {
            Scheme::KaimingNormalFanOut
        } else {
            Scheme::XavierUniform
        };
        let init = &mut init.with_scheme(scheme);
        let Backbone { input_layer, body } = self.backbone.init(init);
        let channels = self.backbone.out_channels();
        let pixels = self.backbone.out_size(self.image_size).pow(2);
        let output_layer = (
            BatchNorm::new(init, channels),
            Dropout {
                p: self.output_dropout,
            },
            Flatten {},
            Linear::new(init, channels * pixels, self.embedding_dim),
            BatchNorm::new(init, self.embedding_dim),
        );
        Recognizer {
            input_layer,
            body,
            output_layer,
            config: self.clone(),
        }
    }
}

/// See the [module](self).
#[derive(Module, Debug)]
pub struct Recognizer {
    /// Conv 3×3, BN, PReLU.
    pub input_layer: InputLayer,
    /// All units of all stages.
    pub body: Vec<Unit>,
    /// BN, dropout, flatten, linear, BN.
    pub output_layer: (BatchNorm, Dropout, Flatten, Linear, BatchNorm),
    #[module(skip)]
    config: RecognizerConfig,
}

impl Recognizer {
    /// What [`Recognizer::to_weights`] calls its file.
    pub const KIND: &'static str = "recognizer";

    /// Pictures to embeddings, which are not normalised.
    ///
    /// # Shapes
    /// `[N, 3, H, W]` or, with an average image ([`beside_average`]), `[N, 6, H, W]` → `[N, D]`. Pictures of another
    /// size than the network's are resized bilinearly.
    pub fn forward(&self, images: Tensor<4>, mode: Mode) -> Tensor<2> {
        let (norm, dropout, flatten, linear, embedding_norm) = &self.output_layer;
        let images = resize_bilinear(images, [self.config.image_size; 2]); // [N, I, S, S]
        let x = features(&self.input_layer, &self.body, images, mode); // [N, 8w, S/16, S/16]
        let x = dropout.forward(norm.forward(x, mode), mode);
        let x = linear.forward(flatten.forward(x)); // [N, D]
        embedding_norm.forward_vectors(x, mode)
    }

    /// What the network was made of.
    pub fn config(&self) -> &RecognizerConfig {
        &self.config
    }

    /// Takes input layer and body from a StyleGAN encoder's export, strictly. The output layer stays as it is.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] if either differs in depth, width or channels.
    pub fn load_encoder(self, encoder: &Weights) -> Result<Self, WeightsError> {
        let shared = encoder
            .subset(|name| name.starts_with("encoder.input_layer.") || name.starts_with("encoder.body."));
        let backbone = Backbone {
            input_layer: self.input_layer,
            body: self.body,
        };
        let Backbone { input_layer, body } = shared.load_into(backbone, "encoder.")?;
        Ok(Self {
            input_layer,
            body,
            ..self
        })
    }

    /// Everything that is needed to build the network again, and the average image that it sees, `[3, H, W]`, as the
    /// tensor `average_image`.
    pub fn to_weights(&self, average_image: Option<Tensor<3>>) -> Weights {
        let mut weights = Weights::from_module(self, self.config.key_prefix());
        weights.describe(Self::KIND, &self.config);
        if let Some(average) = average_image {
            weights.insert_tensor(AVERAGE_IMAGE, average);
        }
        weights
    }

    /// The network that a file of [`Recognizer::to_weights`] holds.
    ///
    /// # Errors
    /// [`WeightsError::Description`] for another kind of file, [`WeightsError::Mismatch`] if its tensors are not
    /// those that its description asks for.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        let config: RecognizerConfig = weights.config(Self::KIND)?;
        let tensors = weights.subset(|name| name != AVERAGE_IMAGE);
        tensors.load_into(config.init(&mut Init::new(0, device)), config.key_prefix())
    }
}

/// Name of the tensor `[3, H, W]` that holds the average image in the files of encoders and recognisers.
pub const AVERAGE_IMAGE: &str = "average_image";

/// Puts the average image beside each picture: what networks with six channels see.
///
/// # Shapes
/// `images` `[N, 3, H, W]`, `average` `[3, h, w]`, resized bilinearly where it differs → `[N, 6, H, W]`.
pub fn beside_average(images: Tensor<4>, average: Tensor<3>) -> Tensor<4> {
    let [n, c, height, width] = images.dims();
    let average = resize_bilinear(average.unsqueeze::<4>(), [height, width]); // [1, 3, H, W]
    Tensor::cat(vec![images, average.expand([n, c, height, width])], 1) // [N, 6, H, W]
}

#[cfg(test)]
mod tests {
    use burn::module::{ModuleVisitor, Param};
    use burn::tensor::Gradients;

    use super::*;
    use crate::encoder::BackboneEncoderConfig;
    use crate::fill;

    fn small(in_channels: usize) -> RecognizerConfig {
        let backbone = BackboneConfig {
            depth: Depth::D18,
            in_channels,
            width: 8,
            squeeze_excitation: true,
            dropout: 0.0,
        };
        RecognizerConfig {
            backbone,
            image_size: 32,
            embedding_dim: 12,
            output_dropout: 0.5,
        }
    }

    fn filled(config: &RecognizerConfig, device: &Device) -> Recognizer {
        fill::fill(config.init(&mut Init::new(1, device)), "t.")
    }

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn depths_have_their_layers() {
        let units = |depth: u32| Depth::try_from(depth).unwrap().units().iter().sum::<usize>();
        assert_eq!([18, 34, 50, 100, 152].map(units), [8, 16, 24, 49, 50]);
        assert_eq!(Depth::try_from(101).unwrap(), Depth::D100);
        let error = serde_json::from_str::<Depth>("40").unwrap_err().to_string();
        assert!(
            error.contains("depth is 40, expected 18, 34, 50, 100 or 152"),
            "{error}"
        );
        assert_eq!(serde_json::to_string(&Depth::D50).unwrap(), "50");
    }

    #[test]
    fn dropout_in_the_units_moves_the_numbers() {
        let mut config = small(3);
        config.backbone.dropout = 0.15;
        let network = config.init(&mut Init::new(1, &Device::flex()));
        let weights = Weights::from_module(&network, "");
        for key in [
            "body.2.res_layer.0.weight",
            "body.2.res_layer.1.weight",
            "body.2.res_layer.3.weight",
            "body.2.res_layer.4.weight",
            "body.2.res_layer.6.running_mean",
            "body.2.res_layer.7.fc1.weight",
            "body.2.shortcut_layer.0.weight",
            "body.2.shortcut_layer.2.running_var",
            "output_layer.0.weight",
            "output_layer.3.bias",
            "output_layer.4.num_batches_tracked",
        ] {
            assert!(weights.get(key).is_some(), "{key} is not there");
        }
        let plain = Weights::from_module(&small(3).init(&mut Init::new(1, &Device::flex())), "");
        assert!(plain.get("body.2.shortcut_layer.1.running_var").is_some());
        assert_eq!(plain.names().count(), weights.names().count());
    }

    #[test]
    fn sizes_follow_the_strides() {
        let config = BackboneConfig::with_average(Depth::D50);
        let ends = [(112, 7), (128, 8), (200, 13), (224, 14), (256, 16), (400, 25)];
        assert_eq!(
            ends.map(|(size, _)| config.out_size(size)),
            ends.map(|(_, end)| end)
        );

        let device = Device::flex();
        let backbone = small(3).backbone.init(&mut Init::new(1, &device));
        for size in [16usize, 40, 50] {
            let x = backbone.forward(Tensor::zeros([1, 3, size, size], &device), Mode::Eval);
            assert_eq!(x.dims(), [1, 64, size.div_ceil(16), size.div_ceil(16)]);
        }
    }

    #[test]
    fn pictures_of_another_size_are_resized() {
        let device = Device::flex();
        let network = filled(&small(3), &device);
        let images = fill::input("images", [2, 3, 48, 40], 1.0, &device);
        let resized = resize_bilinear(images.clone(), [32, 32]);
        assert_eq!(
            numbers(network.forward(images, Mode::Eval)),
            numbers(network.forward(resized, Mode::Eval))
        );
    }

    #[test]
    fn the_average_stands_beside_every_picture() {
        let device = Device::flex();
        let images = fill::input("images", [2, 3, 4, 4], 1.0, &device);
        let average = fill::input::<3>("average", [3, 4, 4], 1.0, &device);
        let both = beside_average(images.clone(), average.clone());
        assert_eq!(numbers(both.clone().narrow(1, 0, 3)), numbers(images));
        assert_eq!(numbers(both.slice([1..2, 3..6])), numbers(average));
    }

    #[test]
    fn a_file_alone_builds_the_network_again() {
        let device = Device::flex();
        for in_channels in [3, 6] {
            let network = filled(&small(in_channels), &device);
            let average = (in_channels == 6).then(|| fill::input("average", [3, 32, 32], 1.0, &device));
            let weights = network.to_weights(average);
            assert_eq!(
                weights.get("encoder.body.0.res_layer.0.weight").is_some(),
                in_channels == 6
            );
            assert_eq!(weights.get(AVERAGE_IMAGE).is_some(), in_channels == 6);
            let again = Recognizer::from_weights(&weights, &device).unwrap();
            assert_eq!(again.config(), network.config());
            let images = fill::input::<4>("images", [2, in_channels, 32, 32], 1.0, &device);
            assert_eq!(
                numbers(network.forward(images.clone(), Mode::Eval)),
                numbers(again.forward(images, Mode::Eval))
            );
        }
    }

    #[test]
    fn body_and_input_layer_come_from_the_encoder_and_the_rest_stays() {
        let device = Device::flex();
        let backbone = small(6).backbone;
        let encoder = BackboneEncoderConfig {
            backbone,
            image_size: 32,
            num_ws: 4,
            latent_dim: 16,
        };
        let encoder = fill::fill(encoder.init(&mut Init::new(2, &device)), "e.");
        let export = encoder.to_weights(Tensor::zeros([16], &device), Tensor::zeros([3, 32, 32], &device));

        let fresh = small(6).init(&mut Init::new(1, &device));
        let before = fresh.to_weights(None);
        let after = fresh.load_encoder(&export).unwrap().to_weights(None);
        for name in after.names() {
            let source = if name.contains("output_layer") {
                &before
            } else {
                &export
            };
            assert_eq!(after.get(name), source.get(name), "{name}");
        }

        let narrow = small(3)
            .init(&mut Init::new(1, &device))
            .load_encoder(&export)
            .unwrap_err()
            .to_string();
        assert!(
            narrow.contains("encoder.input_layer.0.weight is [8, 6, 3, 3], expected [8, 3, 3, 3]\nhint: "),
            "{narrow}"
        );
        let mut deep = small(6);
        deep.backbone.depth = Depth::D34;
        let deep = deep
            .init(&mut Init::new(1, &device))
            .load_encoder(&export)
            .unwrap_err()
            .to_string();
        assert!(
            deep.contains("encoder.body.2.") && deep.contains("expected"),
            "{deep}"
        );
    }

    #[test]
    fn every_parameter_learns() {
        struct Check<'a>(&'a Gradients, usize);
        impl ModuleVisitor for Check<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let tensor = param.val();
                assert_eq!(tensor.grad(self.0).is_some(), tensor.is_require_grad());
                self.1 += usize::from(tensor.is_require_grad());
            }
        }
        let device = Device::flex().autodiff();
        let network = small(6).init(&mut Init::new(1, &device));
        let images = fill::input("images", [4, 6, 32, 32], 1.0, &device);
        let gradients = network.forward(images, Mode::Train).square().mean().backward();
        let mut check = Check(&gradients, 0);
        network.visit(&mut check);
        // 4 in the input layer; 8 units of 9, three of them with 3 in the shortcut; 6 in the output layer.
        assert_eq!(check.1, 4 + 8 * 9 + 3 * 3 + 6);
    }
}
