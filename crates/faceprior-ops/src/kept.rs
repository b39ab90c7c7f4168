//! What a backward pass needs of a map's values, and how they wait for it.
//!
//! In training nearly all memory is activations that wait for their gradient. A [`Kept`] is the one place where a map's
//! values wait, however many functions of the tape will ask for them: as they are, rounded to bfloat16, or not at all,
//! to be computed again.

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn_flex::FlexTensor;

use crate::backend::{dims, tensor, values};
use crate::kernels::{Isa, half};
use crate::pool::Buffer;

/// How activations wait for the backward pass on the CPU. Values, gradients, weights and statistics are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activations {
    /// Rounds them to bfloat16, which halves their memory: gradients then belong to rounded activations. The forward
    /// pass does not change but on the matrix unit, which then takes 17 of a float's 24 bits: outputs and gradients are
    /// off by 5·10⁻⁶ there (root mean square, relative), in Winograd's form by 2·10⁻⁵.
    pub bf16: bool,
    /// Keeps the outputs of most convolutions not at all: the backward pass computes them again. Without
    /// [`bf16`](Self::bf16) no bit of a result changes.
    pub recompute: bool,
}

thread_local! {
    static ACTIVATIONS: Cell<Activations> = const { Cell::new(Activations { bf16: false, recompute: false }) };
}

impl Activations {
    /// Runs a forward pass on this thread whose activations wait like that; the backward pass may come within or after.
    pub fn scope<R>(self, forward: impl FnOnce() -> R) -> R {
        struct Restore(Activations);
        impl Drop for Restore {
            fn drop(&mut self) {
                ACTIVATIONS.set(self.0);
            }
        }
        let _before = Restore(ACTIVATIONS.replace(self));
        forward()
    }

    pub(crate) fn current() -> Self {
        ACTIVATIONS.get()
    }
}

/// Where the values of one map wait; clones are the same place.
#[derive(Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Place>>);

/// A [`Kept`] that keeps nothing alive.
#[derive(Clone)]
pub(crate) struct WeakKept(Weak<Mutex<Place>>);

#[derive(Default)]
struct Place {
    form: Form,
    /// The values, from when they were first asked for again until nobody is left who could.
    restored: Option<FlexTensor>,
}

#[derive(Default)]
enum Form {
    /// No function that needs them later has seen them yet.
    #[default]
    Unknown,
    AsTheyAre(FlexTensor),
    /// Two to a float of the buffer.
    Rounded(Buffer, [usize; 5]),
    Again {
        compute: Box<dyn Fn() -> FlexTensor + Send>,
        /// Convolutions to run from values that do wait.
        depth: usize,
    },
}

/// Convolutions at most that stand between values to compute again and values that wait: both of a residual unit.
const MAX_DEPTH: usize = 2;

impl Kept {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn downgrade(&self) -> WeakKept {
        WeakKept(Arc::downgrade(&self.0))
    }

    /// Sees to it that [`values`](Self::values) can be had later.
    pub(crate) fn keep(&self, x: &FlexTensor) {
        let mut place = self.place();
        if matches!(place.form, Form::Unknown) {
            place.form = if Activations::current().bf16 {
                let floats = values(x);
                let mut rounded = Buffer::take(floats.len().div_ceil(2));
                let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut rounded);
                half::round(Isa::best(), floats, &mut halves[..floats.len()]);
                Form::Rounded(rounded, dims(x))
            } else {
                Form::AsTheyAre(x.clone())
            };
        }
    }

    /// The values that were kept.
    pub(crate) fn values(&self) -> FlexTensor {
        let mut place = self.place();
        if let Some(values) = &place.restored {
            return values.clone();
        }
        let restored = match &place.form {
            Form::Unknown => unreachable!("a function asks for the values of a map that it has seen"),
            Form::AsTheyAre(values) => return values.clone(),
            Form::Rounded(rounded, dims) => {
                let mut values = Buffer::take(dims.iter().product());
                let halves: &[u16] = bytemuck::cast_slice(rounded);
                half::widen(Isa::best(), &halves[..values.len()], &mut values);
                tensor(values, *dims)
            }
            Form::Again { compute, .. } => compute(),
        };
        place.restored = Some(restored.clone());
        restored
    }

    fn depth(&self) -> usize {
        match self.place().form {
            Form::Again { depth, .. } => depth,
            _ => 0,
        }
    }
}

impl WeakKept {
    /// Leaves word how to compute the values again, from others that wait in `from`, where that is wanted.
    pub(crate) fn compute_again<F>(&self, from: &Kept, how: impl FnOnce() -> F)
    where
        F: Fn() -> FlexTensor + Send + 'static,
    {
        let depth = from.depth() + 1;
        if !Activations::current().recompute || depth > MAX_DEPTH {
            return;
        }
        if let Some(place) = self.0.upgrade() {
            let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
            place.form = Form::Again {
                compute: Box::new(how()),
                depth,
            };
        }
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = match self.place().form {
            Form::Unknown => "unknown",
            Form::AsTheyAre(_) => "as they are",
            Form::Rounded(..) => "rounded",
            Form::Again { .. } => "to compute again",
        };
        f.debug_tuple("Kept").field(&form).finish()
    }
}

impl fmt::Debug for WeakKept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakKept")
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Gradients, Tensor};

    use super::*;
    use crate::testing::{random, values as numbers};
    use crate::{
        BiasActivation, Conv2dOptions, FeatureMap, batch_norm_train, bias_activation, conv2d, dual, prelu,
        scale_channels,
    };

    const C: usize = 20;
    const MAP: [usize; 4] = [2, C, 13, 9];

    /// A residual unit and what follows in StyleGAN2, a value and a tangent: every function that keeps a map.
    fn everything(parameters: &[Tensor<4>; 5]) -> Tensor<1> {
        let [x, weight, other, vector, style] = parameters.clone();
        let (vector, style) = (vector.reshape([C]), style.reshape([2, C]));
        let convolve = |x, weight: &Tensor<4>| conv2d(x, weight.clone(), Conv2dOptions::same3x3());
        let x = FeatureMap::from_nchw(x);
        let y = batch_norm_train(x.clone(), vector.clone(), vector.clone(), 1e-5).0;
        let y = prelu(convolve(y, &weight), vector.clone());
        let y = batch_norm_train(convolve(y, &other), vector.clone(), vector.clone(), 1e-5).0;
        let y = scale_channels(y, style.clone()).add(x);
        let options = BiasActivation {
            negative_slope: 0.2,
            gain: 1.4,
            clamp: Some(3.0),
        };
        let y = bias_activation(convolve(y, &weight), Some(vector.clone()), options);
        let pair = dual::Dual {
            value: y.clone(),
            tangent: y.mul_scalar(0.3),
        };
        let style = dual::Dual {
            value: style.clone(),
            tangent: style.mul_scalar(0.1),
        };
        let y = dual::modulated_conv2d(pair, other, style, true);
        let y = dual::bias_activation(y, Some(vector), options);
        let (value, tangent) = (y.value.into_nchw(), y.tangent.into_nchw());
        value.clone().mul(tangent).sum() + value.sum()
    }

    fn parameters() -> [Tensor<4>; 5] {
        let shapes = [MAP, [C, C, 3, 3], [C, C, 3, 3], [1, C, 1, 1], [2, C, 1, 1]];
        let mut seed = 0;
        shapes.map(|shape| {
            seed += 1;
            random(shape, seed).mul_scalar(0.3).require_grad()
        })
    }

    /// The value and all gradients.
    fn run(activations: Activations) -> Vec<Vec<f32>> {
        let parameters = parameters();
        let loss = activations.scope(|| everything(&parameters));
        let gradients: Gradients = loss.backward();
        let of = |x: &Tensor<4>| numbers(x.grad(&gradients).expect("a gradient for every parameter"));
        std::iter::once(numbers(loss))
            .chain(parameters.iter().map(of))
            .collect()
    }

    #[test]
    fn computing_again_changes_no_bit() {
        let again = Activations {
            recompute: true,
            ..Activations::default()
        };
        assert_eq!(run(again), run(Activations::default()));
    }

    #[test]
    fn rounding_moves_gradients_a_little_and_the_value_at_most_on_the_matrix_unit() {
        let plain = run(Activations::default());
        for recompute in [false, true] {
            let rounded = run(Activations {
                bf16: true,
                recompute,
            });
            let moved = (rounded[0][0] - plain[0][0]).abs();
            let most = if Isa::best().matrices().is_some() {
                1e-5 * plain[0][0].abs()
            } else {
                0.0
            };
            assert!(moved <= most, "the value moved by {moved}");
            for (got, expected) in rounded.iter().zip(&plain).skip(1) {
                let norm = |values: &mut dyn Iterator<Item = f32>| {
                    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
                };
                let off = norm(&mut got.iter().zip(expected).map(|(a, b)| a - b));
                let size = norm(&mut expected.iter().copied());
                assert!(off > 0.0 && off < 0.02 * size, "off by {off} of {size}");
            }
        }
    }

    #[test]
    fn a_gradient_belongs_to_the_rounded_activation() {
        let (x, weight, dy) = (random(MAP, 1), random([C, C, 3, 3], 2), random(MAP, 3));
        let gradient = |x: Tensor<4>, activations: Activations| {
            let weight = weight.clone().require_grad();
            let y = activations.scope(|| {
                conv2d(FeatureMap::from_nchw(x), weight.clone(), Conv2dOptions::same3x3()).into_nchw()
            });
            numbers(
                weight
                    .grad(&y.mul(dy.clone()).sum().backward())
                    .expect("weight is tracked"),
            )
        };
        let rounded: Vec<f32> = numbers(x.clone())
            .iter()
            .map(|value| {
                let (mut halves, mut back) = ([0], [0.0]);
                half::round(Isa::best(), &[*value], &mut halves);
                half::widen(Isa::best(), &halves, &mut back);
                back[0]
            })
            .collect();
        let rounded = Tensor::<1>::from_floats(rounded.as_slice(), &x.device()).reshape(MAP);
        let bf16 = Activations {
            bf16: true,
            recompute: false,
        };
        assert_eq!(gradient(x, bf16), gradient(rounded, Activations::default()));
    }

    #[test]
    fn what_is_computed_again_does_not_wait() {
        let again = Activations {
            recompute: true,
            ..Activations::default()
        };
        let forms = |activations: Activations| {
            let weight = random([C, C, 3, 3], 2).require_grad();
            let mut x = FeatureMap::from_nchw(random(MAP, 1));
            let mut places = Vec::new();
            activations.scope(|| {
                for _ in 0..4 {
                    x = conv2d(x.clone(), weight.clone(), Conv2dOptions::same3x3());
                    places.push(x.clone().settled().kept);
                }
                x.clone().into_nchw();
            });
            places.iter().map(Kept::depth).collect::<Vec<_>>()
        };
        assert_eq!(forms(again), [1, 2, 0, 1]);
        assert_eq!(forms(Activations::default()), [0; 4]);
    }
}
