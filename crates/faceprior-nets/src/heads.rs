//! Margin heads: embeddings and labels to logits over the identities of the training set.
//!
//! With cos θ_j the cosine between an embedding and the direction of class j, scale s and margin m, the logits are
//! s·cos θ_j, except for the target y:
//!
//! | head | target | source |
//! |---|---|---|
//! | [`Softmax`] | W·x + b for every class, no cosine | |
//! | [`ArcFace`] | s·cos(θ_y + m) | Deng et al. 2019 |
//! | [`CosFace`] | s·(cos θ_y − m) | Wang et al. 2018 |
//!
//! Axes: `N` pictures, `D` embedding dimensions, `C` classes.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use faceprior_ops::{self as ops, TargetMargin};
use serde::{Deserialize, Serialize};

use crate::init::Init;
use crate::layers::transparent_module;
use crate::losses;

/// Which head.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadKind {
    /// See [`ArcFace`].
    ArcFace,
    /// See [`CosFace`].
    CosFace,
    /// See [`Softmax`].
    Softmax,
}

/// A head for a number of identities.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadConfig {
    /// Which head.
    pub kind: HeadKind,
    /// Identities in the training set.
    pub num_classes: usize,
    /// Length of an embedding.
    pub embedding_dim: usize,
}

impl HeadConfig {
    /// Fresh weights, xavier-uniform.
    pub fn init(&self, init: &mut Init) -> Head {
        let weight = init.xavier_uniform([self.num_classes, self.embedding_dim]);
        match self.kind {
            HeadKind::ArcFace => Head::ArcFace(ArcFace {
                weight,
                easy_margin: false,
            }),
            HeadKind::CosFace => Head::CosFace(CosFace { weight }),
            HeadKind::Softmax => Head::Softmax(Softmax {
                weight,
                bias: init.constant([self.num_classes], 0.0),
            }),
        }
    }
}

/// Scale and margin, given at each call because recipes ramp them.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Margin {
    /// s: length of the logits' vector on the sphere. Published: 64.
    pub scale: f32,
    /// m: radians for ArcFace, a difference of cosines for CosFace. Published: 0.5.
    pub margin: f32,
}

impl Default for Margin {
    fn default() -> Self {
        Self {
            scale: 64.0,
            margin: 0.5,
        }
    }
}

/// Any of the heads.
#[derive(Clone, Debug)]
pub enum Head {
    /// See [`ArcFace`].
    ArcFace(ArcFace),
    /// See [`CosFace`].
    CosFace(CosFace),
    /// See [`Softmax`].
    Softmax(Softmax),
}

impl Head {
    /// Logits for training. [`Softmax`] has no margin and ignores it.
    ///
    /// # Shapes
    /// `embeddings` `[N, D]`, `labels` `[N]` in 0..C → `[N, C]`.
    pub fn logits(&self, embeddings: Tensor<2>, labels: Tensor<1, Int>, margin: Margin) -> Tensor<2> {
        match self.directions(margin) {
            Ok((weight, target)) => ops::margin_logits(embeddings, weight, labels, margin.scale, target),
            Err(head) => head.logits(embeddings),
        }
    }

    /// The mean cross-entropy of the [`logits`](Self::logits), `[1]`, and for each picture how many classes have a
    /// higher one than its own, the margin included. Margin heads keep no logits.
    ///
    /// # Panics
    /// If a label is not in 0..C.
    pub fn cross_entropy(
        &self,
        embeddings: Tensor<2>,
        labels: Tensor<1, Int>,
        margin: Margin,
    ) -> (Tensor<1>, Vec<u32>) {
        match self.directions(margin) {
            Ok((weight, target)) => {
                ops::margin_cross_entropy(embeddings, weight, labels, margin.scale, target)
            }
            Err(head) => {
                let logits = head.logits(embeddings);
                let above = classes_above(logits.clone(), labels.clone());
                (losses::cross_entropy(logits, labels), above)
            }
        }
    }

    /// The class directions of a margin head and what it makes of a target; the head without a margin otherwise.
    fn directions(&self, margin: Margin) -> Result<(Tensor<2>, TargetMargin), &Softmax> {
        match self {
            Head::ArcFace(head) => Ok((head.weight.val(), head.target(margin))),
            Head::CosFace(head) => Ok((
                head.weight.val(),
                TargetMargin::Cosine {
                    margin: margin.margin,
                },
            )),
            Head::Softmax(head) => Err(head),
        }
    }
}

/// For each row of `logits` `[N, C]` the number of classes above the label's.
fn classes_above(logits: Tensor<2>, labels: Tensor<1, Int>) -> Vec<u32> {
    let target = logits.clone().gather(1, labels.unsqueeze_dim(1)); // [N, 1]
    let above = logits.greater(target).float().sum_dim(1); // [N, 1]
    above
        .into_data()
        .iter::<f32>()
        .map(|count| count as u32)
        .collect()
}

transparent_module!(Head {
    ArcFace,
    CosFace,
    Softmax
});

/// Additive angular margin: target cos(θ + m).
///
/// Beyond θ = π − m, where cos(θ + m) would rise again, the target is cos θ − m·sin(π − m).
#[derive(Module, Debug)]
pub struct ArcFace {
    /// Class directions `[C, D]`.
    pub weight: Param<Tensor<2>>,
    /// Whether targets with cos θ ≤ 0 get no margin at all, instead of the straight continuation.
    pub easy_margin: bool,
}

impl ArcFace {
    fn target(&self, margin: Margin) -> TargetMargin {
        TargetMargin::Angle {
            margin: margin.margin,
            easy: self.easy_margin,
        }
    }
}

/// Additive cosine margin: target cos θ − m.
#[derive(Module, Debug)]
pub struct CosFace {
    /// Class directions `[C, D]`.
    pub weight: Param<Tensor<2>>,
}

/// A linear layer: W·x + b.
#[derive(Module, Debug)]
pub struct Softmax {
    /// `[C, D]`.
    pub weight: Param<Tensor<2>>,
    /// `[C]`.
    pub bias: Param<Tensor<1>>,
}

impl Softmax {
    /// `[N, D]` → `[N, C]`.
    pub fn logits(&self, embeddings: Tensor<2>) -> Tensor<2> {
        ops::linear(embeddings, self.weight.val()) + self.bias.val().unsqueeze()
    }
}

/// Rows of length 1; rows shorter than 1e-12 are divided by that.
pub fn normalize(vectors: Tensor<2>) -> Tensor<2> {
    let length = vectors.clone().square().sum_dim(1).clamp_min(1e-24).sqrt(); // [N, 1]
    vectors / length
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    /// A head of two classes on the axes of the plane, and an embedding at the angle θ from the first.
    fn target_of_arc_face(theta: f32, margin: f32) -> f32 {
        let device = Device::flex();
        let mut head = ArcFace {
            weight: Init::new(1, &device).constant([2, 2], 0.0),
            easy_margin: false,
        };
        head.weight = Param::from_data(TensorData::new(vec![3.0f32, 0.0, 0.0, 2.0], [2, 2]), &device);
        let embedding = Tensor::<2>::from_floats([[5.0 * theta.cos(), 5.0 * theta.sin()]], &device);
        let labels = Tensor::<1, Int>::from_ints([0], &device);
        let logits = Head::ArcFace(head).logits(embedding, labels, Margin { scale: 2.0, margin });
        let logits: Vec<f32> = logits.into_data().try_to_vec().unwrap();
        assert!(
            (logits[1] - 2.0 * theta.sin()).abs() < 1e-5,
            "the other class keeps its cosine"
        );
        logits[0] / 2.0
    }

    #[test]
    fn the_angle_grows_by_the_margin() {
        for theta in [0.3f32, 1.0, 2.0, 2.6] {
            assert!((target_of_arc_face(theta, 0.5) - (theta + 0.5).cos()).abs() < 1e-5);
        }
    }

    #[test]
    fn beyond_pi_the_target_goes_on_falling() {
        let target = target_of_arc_face(2.9, 0.5);
        assert!((target - (2.9f32.cos() - 0.5 * 0.5f32.sin())).abs() < 1e-5);
        assert!(target < target_of_arc_face(2.6, 0.5));
    }

    #[test]
    fn no_margin_gives_cosines() {
        assert!((target_of_arc_face(1.1, 0.0) - 1.1f32.cos()).abs() < 1e-5);
    }

    #[test]
    fn a_zero_embedding_gives_finite_gradients() {
        let device = Device::flex().autodiff();
        let config = HeadConfig {
            kind: HeadKind::ArcFace,
            num_classes: 3,
            embedding_dim: 4,
        };
        let head = config.init(&mut Init::new(1, &device));
        let embeddings = Tensor::<2>::zeros([1, 4], &device).require_grad();
        let labels = Tensor::<1, Int>::from_ints([2], &device);
        let logits = head.logits(embeddings.clone(), labels, Margin::default());
        let gradients = logits.sum().backward();
        let gradient: Vec<f32> = embeddings
            .grad(&gradients)
            .unwrap()
            .into_data()
            .try_to_vec()
            .unwrap();
        assert!(gradient.iter().all(|g| g.is_finite()), "{gradient:?}");
    }
}
