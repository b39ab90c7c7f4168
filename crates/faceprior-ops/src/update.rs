//! Updates of parameters in one pass: optimiser steps and moving averages.
//!
//! Written as tensor expressions, a step of Adam reads and writes the parameter's size a dozen times; here it is once
//! for each operand. No operand is tracked by autodiff.

use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use crate::backend::{small_tensor, tensor, values};
use crate::feature_map::is_cpu;
use crate::kernels::Isa;
use crate::kernels::lanes::Lanes;
use crate::kernels::update::{Rule, update};
use crate::pool::Buffer;

/// Stochastic gradient descent with momentum as in PyTorch, dampening 0.
#[derive(Clone, Copy, Debug)]
pub struct SgdStep {
    /// η
    pub learning_rate: f64,
    /// μ
    pub momentum: f64,
    /// λ
    pub weight_decay: f64,
}

/// g ← g + λp; b ← μb + g; p ← p − ηb. Returns the parameter and the momentum buffer, which begins as zeros.
///
/// # Shapes
/// All `[N]`.
pub fn sgd_step(p: Tensor<1>, g: Tensor<1>, b: Tensor<1>, step: SgdStep) -> (Tensor<1>, Tensor<1>) {
    if has_kernel(&p) {
        let (p, [b]) = on_cpu(step, p, g, [b]);
        return (p, b);
    }
    plain_sgd(p, g, b, step)
}

fn plain_sgd(p: Tensor<1>, g: Tensor<1>, b: Tensor<1>, step: SgdStep) -> (Tensor<1>, Tensor<1>) {
    let g = g.add(p.clone().mul_scalar(step.weight_decay));
    let b = b.mul_scalar(step.momentum).add(g);
    (p.sub(b.clone().mul_scalar(step.learning_rate)), b)
}

impl Rule<1> for SgdStep {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, p: L, g: L, [b]: &mut [L; 1]) -> L {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let g = g.add(p.mul(splat(self.weight_decay)));
            *b = b.mul(splat(self.momentum)).add(g);
            p.sub(b.mul(splat(self.learning_rate)))
        }
    }
}

/// The step of Adam (Kingma and Ba 2015, algorithm 1) after which t gradients have been seen.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// β₁ and β₂
    pub betas: [f64; 2],
    /// ε
    pub eps: f64,
    /// η/(1 − β₁ᵗ)
    pub step_size: f64,
    /// √(1 − β₂ᵗ)
    pub correction: f64,
}

/// m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; p ← p − step_size · m/(√v/correction + ε). Returns the parameter and both
/// moments, which begin as zeros.
///
/// # Shapes
/// All `[N]`.
pub fn adam_step(
    p: Tensor<1>,
    g: Tensor<1>,
    [m, v]: [Tensor<1>; 2],
    step: AdamStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    if has_kernel(&p) {
        return on_cpu(step, p, g, [m, v]);
    }
    plain_adam(p, g, [m, v], step)
}

fn plain_adam(
    p: Tensor<1>,
    g: Tensor<1>,
    [m, v]: [Tensor<1>; 2],
    step: AdamStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [beta1, beta2] = step.betas;
    let m = m.mul_scalar(beta1).add(g.clone().mul_scalar(1.0 - beta1));
    let v = v.mul_scalar(beta2).add(g.square().mul_scalar(1.0 - beta2));
    let denominator = v.clone().sqrt().div_scalar(step.correction).add_scalar(step.eps);
    let p = p.sub(m.clone().div(denominator).mul_scalar(step.step_size));
    (p, [m, v])
}

impl Rule<2> for AdamStep {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, p: L, g: L, [m, v]: &mut [L; 2]) -> L {
        let [beta1, beta2] = self.betas;
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            *m = m.mul(splat(beta1)).add(g.mul(splat(1.0 - beta1)));
            *v = v.mul(splat(beta2)).add(g.mul(g).mul(splat(1.0 - beta2)));
            let denominator = v.sqrt().div(splat(self.correction)).add(splat(self.eps));
            p.sub(m.div(denominator).mul(splat(self.step_size)))
        }
    }
}

/// A step of Ranger: gradient centralisation (Yong et al. 2020), RAdam (Liu et al. 2020, algorithm 2), Lookahead (Zhang et al.
/// 2019).
#[derive(Clone, Copy, Debug)]
pub struct RangerStep {
    /// Neighbouring gradients, all of an output's, whose mean is taken from them; `None` leaves them as they are.
    pub centred: Option<usize>,
    /// β₁ and β₂
    pub betas: [f64; 2],
    /// ε where the step is rectified; `None` before the second moment can be trusted, when steps go by the first alone.
    pub eps: Option<f64>,
    /// 1 − ηλ
    pub decay: f64,
    /// η·r/(1 − β₁ᵗ), with r = 1 where nothing is rectified.
    pub step_size: f64,
    /// α, in steps in which the slow weights move.
    pub lookahead: Option<f64>,
}

/// g ← g − mean(g); m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; p ← decay·p − step_size · m/(√v + ε), or step_size · m; where
/// Lookahead moves, s ← s + α(p − s) and p ← s. Returns the parameter, both moments, which begin as zeros, and the slow
/// weights, which begin as the parameter.
///
/// # Shapes
/// All `[N]`.
pub fn ranger_step(
    p: Tensor<1>,
    g: Tensor<1>,
    [m, v, slow]: [Tensor<1>; 3],
    step: RangerStep,
) -> (Tensor<1>, [Tensor<1>; 3]) {
    if has_kernel(&p) {
        return on_cpu(step, p, g, [m, v, slow]);
    }
    plain_ranger(p, g, [m, v, slow], step)
}

fn plain_ranger(
    p: Tensor<1>,
    g: Tensor<1>,
    [m, v, slow]: [Tensor<1>; 3],
    step: RangerStep,
) -> (Tensor<1>, [Tensor<1>; 3]) {
    let [beta1, beta2] = step.betas;
    let g = match step.centred {
        Some(row) => {
            let length = g.dims()[0];
            let rows = g.reshape([length / row, row]);
            (rows.clone() - rows.mean_dim(1)).reshape([length])
        }
        None => g,
    };
    let m = m.mul_scalar(beta1).add(g.clone().mul_scalar(1.0 - beta1));
    let v = v.mul_scalar(beta2).add(g.square().mul_scalar(1.0 - beta2));
    let direction = match step.eps {
        Some(eps) => m.clone().div(v.clone().sqrt().add_scalar(eps)),
        None => m.clone(),
    };
    let p = p.mul_scalar(step.decay).sub(direction.mul_scalar(step.step_size));
    match step.lookahead {
        Some(alpha) => {
            let slow = slow.clone().add(p.sub(slow).mul_scalar(alpha));
            (slow.clone(), [m, v, slow])
        }
        None => (p, [m, v, slow]),
    }
}

impl Rule<3> for RangerStep {
    fn centred(self) -> Option<usize> {
        self.centred
    }

    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, p: L, g: L, [m, v, slow]: &mut [L; 3]) -> L {
        let [beta1, beta2] = self.betas;
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            *m = m.mul(splat(beta1)).add(g.mul(splat(1.0 - beta1)));
            *v = v.mul(splat(beta2)).add(g.mul(g).mul(splat(1.0 - beta2)));
            let direction = match self.eps {
                Some(eps) => m.div(v.sqrt().add(splat(eps))),
                None => *m,
            };
            let p = p.mul(splat(self.decay)).sub(direction.mul(splat(self.step_size)));
            match self.lookahead {
                Some(alpha) => {
                    *slow = slow.add(p.sub(*slow).mul(splat(alpha)));
                    *slow
                }
                None => p,
            }
        }
    }
}

/// `decay·average + (1 − decay)·source`.
///
/// # Shapes
/// Both `[N]`.
pub fn moving_average(average: Tensor<1>, source: Tensor<1>, decay: f64) -> Tensor<1> {
    if has_kernel(&average) {
        return on_cpu(Decay(decay), average, source, []).0;
    }
    plain_average(average, source, decay)
}

fn plain_average(average: Tensor<1>, source: Tensor<1>, decay: f64) -> Tensor<1> {
    average.mul_scalar(decay).add(source.mul_scalar(1.0 - decay))
}

#[derive(Clone, Copy)]
struct Decay(f64);

impl Rule<0> for Decay {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, average: L, source: L, []: &mut [L; 0]) -> L {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe { average.mul(splat(self.0)).add(source.mul(splat(1.0 - self.0))) }
    }
}

/// # Safety
/// The processor must have the instructions of `L`.
#[inline(always)]
unsafe fn splat<L: Lanes>(value: f64) -> L {
    // SAFETY: the caller's promise.
    unsafe { L::splat(value as f32) }
}

fn on_cpu<const STATE: usize>(
    rule: impl Rule<STATE>,
    values_before: Tensor<1>,
    others: Tensor<1>,
    state: [Tensor<1>; STATE],
) -> (Tensor<1>, [Tensor<1>; STATE]) {
    let (values_before, others) = (primitive(values_before), primitive(others));
    let mut state = state.map(|state| owned(primitive(state)));
    let mut to = Buffer::take(values(&values_before).len());
    let in_place = state
        .each_mut()
        .map(|state| state.try_storage_mut::<f32>().expect("a tensor with one owner"));
    let [from, others] = [values(&values_before), values(&others)];
    update(Isa::best(), rule, from, others, in_place, &mut to);
    let count = to.len();
    (wrapped(tensor(to, [count])), state.map(wrapped))
}

fn has_kernel(x: &Tensor<1>) -> bool {
    is_cpu(&x.device()) && x.dtype() == DType::F32
}

/// The tensor behind one of the CPU that is not tracked, contiguous.
fn primitive(x: Tensor<1>) -> FlexTensor {
    match x.without_autodiff().into_dispatch().kind {
        DispatchTensorKind::Flex(BackendTensor::Float(x)) if x.is_contiguous() => x,
        DispatchTensorKind::Flex(BackendTensor::Float(x)) => x.to_contiguous(),
        _ => unreachable!("the device is the CPU"),
    }
}

/// The tensor itself if nobody else holds it and it is all of its storage, else a copy.
fn owned(mut x: FlexTensor) -> FlexTensor {
    let length = values(&x).len();
    match x.try_storage_mut::<f32>() {
        Some(storage) if storage.len() == length => x,
        _ => small_tensor(values(&x), [length]),
    }
}

fn wrapped(x: FlexTensor) -> Tensor<1> {
    Tensor::from_dispatch(DispatchTensor {
        kind: DispatchTensorKind::Flex(BackendTensor::Float(x)),
        autodiff: DispatchAutodiffContext::Disabled,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};

    /// More than one task, and some floats over.
    const LENGTH: usize = (64 << 10) + 5;

    fn operand(seed: u64) -> Tensor<1> {
        random([LENGTH], seed).without_autodiff()
    }

    /// The bits of tensor expressions that round as often.
    #[test]
    fn updates_equal_their_plain_forms() {
        let (p, g, m) = (operand(1), operand(2), operand(3));
        let v = operand(4).square();

        let step = SgdStep {
            learning_rate: 0.1,
            momentum: 0.9,
            weight_decay: 0.01,
        };
        let (new, b) = sgd_step(p.clone(), g.clone(), m.clone(), step);
        let (plain, plain_b) = plain_sgd(p.clone(), g.clone(), m.clone(), step);
        assert_eq!((values(new), values(b)), (values(plain), values(plain_b)));

        let step = AdamStep {
            betas: [0.9, 0.99],
            eps: 1e-8,
            step_size: 0.02,
            correction: 0.3,
        };
        let (new, state) = adam_step(p.clone(), g.clone(), [m.clone(), v.clone()], step);
        let (plain, plain_state) = plain_adam(p.clone(), g.clone(), [m, v], step);
        assert_eq!(values(new), values(plain));
        assert_eq!(state.map(values), plain_state.map(values));

        let average = moving_average(p.clone(), g.clone(), 0.995);
        assert_eq!(values(average), values(plain_average(p, g, 0.995)));
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let step = AdamStep {
            betas: [0.9, 0.99],
            eps: 1e-8,
            step_size: 0.02,
            correction: 0.3,
        };
        let [p, g, m, v] = [operand(1), operand(2), operand(3), operand(4).square()].map(values);
        let mut results = Isa::available().into_iter().map(|isa| {
            let (mut to, mut m, mut v) = (vec![f32::NAN; LENGTH], m.clone(), v.clone());
            let (mut slow, mut ranger) = (p.clone(), vec![f32::NAN; LENGTH]);
            update(isa, step, &p, &g, [&mut m, &mut v], &mut to);
            let state = [&mut m, &mut v, &mut slow].map(|state| &mut state[..]);
            update(isa, RANGER, &p, &g, state, &mut ranger);
            [to, m, v, ranger, slow]
        });
        let best = results.next().expect("an instruction set");
        assert!(best.iter().flatten().all(|value| value.is_finite()));
        assert!(results.all(|other| other == best));
    }

    const RANGER: RangerStep = RangerStep {
        centred: Some(LENGTH / 7),
        betas: [0.95, 0.999],
        eps: Some(1e-5),
        decay: 0.99,
        step_size: 0.02,
        lookahead: Some(0.5),
    };

    /// But for the order in which a mean is summed.
    #[test]
    fn ranger_equals_its_plain_form() {
        let (p, g, m) = (operand(1), operand(2).add_scalar(0.7), operand(3));
        let (v, slow) = (operand(4).square().add_scalar(0.1), operand(5));
        for step in [
            RANGER,
            RangerStep { eps: None, ..RANGER },
            RangerStep {
                lookahead: None,
                ..RANGER
            },
            RangerStep {
                centred: None,
                ..RANGER
            },
            RangerStep {
                centred: Some(1),
                ..RANGER
            },
            RangerStep {
                centred: Some(21),
                ..RANGER
            },
        ] {
            let state = [m.clone(), v.clone(), slow.clone()];
            let (new, moved) = ranger_step(p.clone(), g.clone(), state.clone(), step);
            let (plain, plain_moved) = plain_ranger(p.clone(), g.clone(), state, step);
            let got = std::iter::once(new).chain(moved).flat_map(values);
            let plain = std::iter::once(plain).chain(plain_moved).flat_map(values);
            for (got, plain) in got.zip(plain) {
                assert!(
                    (got - plain).abs() <= 1e-6 * plain.abs().max(0.1),
                    "{got} {plain} {step:?}"
                );
            }
        }
        let step = RangerStep {
            centred: None,
            ..RANGER
        };
        let state = [m, v, slow];
        let (new, moved) = ranger_step(p.clone(), g.clone(), state.clone(), step);
        let (plain, plain_moved) = plain_ranger(p, g, state, step);
        assert_eq!(values(new), values(plain));
        assert_eq!(moved.map(values), plain_moved.map(values));
    }

    /// State moves in place only where nobody else sees it.
    #[test]
    fn operands_that_others_hold_keep_their_values() {
        let (p, g, m, v) = (operand(1), operand(2), operand(3), operand(4).square());
        let held = [p.clone(), m.clone(), v.clone()];
        let before = held.clone().map(values);
        let step = AdamStep {
            betas: [0.9, 0.99],
            eps: 1e-8,
            step_size: 0.02,
            correction: 0.3,
        };
        adam_step(p, g, [m, v], step);
        assert_eq!(held.map(values), before);
    }
}
