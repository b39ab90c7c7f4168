//! How a kernel joins Burn: functions with their own gradients on the CPU backend.
//!
//! A [`Function`] computes on the primitives of Burn's Flex backend and says what its gradients are, like
//! `torch.autograd.Function`. [`apply1`] to [`apply5`] run it on tensors: on an autodiff device the step is recorded on
//! the tape if an input is tracked, otherwise only the value is computed. The extension trait below is
//! what Burn's dispatcher needs in order to find the backend of a tensor at run time; it is the only place that deals
//! with tapes and nodes, so a new kernel is one implementation of [`Function`].

use std::fmt::Debug;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};

use crate::pool::Buffer;

/// A differentiable function of `N` tensors on the CPU.
pub(crate) trait Function<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// What the gradient needs of the forward pass.
    type Saved: Clone + Debug + Send + 'static;

    /// The value, and what to keep for the gradient. Inputs are contiguous.
    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved);

    /// The value alone, where no gradient is asked for.
    fn value(&self, inputs: [FlexTensor; N]) -> FlexTensor {
        self.forward(inputs).0
    }

    /// The gradients of the wanted inputs from that of the value, which is contiguous.
    fn backward(
        &self,
        saved: Self::Saved,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// Runs a function of one tensor that lives on the CPU.
pub(crate) fn apply1<const A: usize, const R: usize>(function: impl Function<1>, a: Tensor<A>) -> Tensor<R> {
    Tensor::from_dispatch(<Dispatch as CpuFunctions>::apply1(a.into_dispatch(), function))
}

/// Runs a function of two tensors that live on the CPU.
pub(crate) fn apply2<const A: usize, const B: usize, const R: usize>(
    function: impl Function<2>,
    a: Tensor<A>,
    b: Tensor<B>,
) -> Tensor<R> {
    Tensor::from_dispatch(<Dispatch as CpuFunctions>::apply2(
        a.into_dispatch(),
        b.into_dispatch(),
        function,
    ))
}

/// Runs a function of three tensors that live on the CPU.
pub(crate) fn apply3<const A: usize, const B: usize, const C: usize, const R: usize>(
    function: impl Function<3>,
    a: Tensor<A>,
    b: Tensor<B>,
    c: Tensor<C>,
) -> Tensor<R> {
    let (a, b, c) = (a.into_dispatch(), b.into_dispatch(), c.into_dispatch());
    Tensor::from_dispatch(<Dispatch as CpuFunctions>::apply3(a, b, c, function))
}

/// Runs a function of four tensors that live on the CPU.
pub(crate) fn apply4<const A: usize, const B: usize, const C: usize, const D: usize, const R: usize>(
    function: impl Function<4>,
    a: Tensor<A>,
    b: Tensor<B>,
    c: Tensor<C>,
    d: Tensor<D>,
) -> Tensor<R> {
    let (a, b, c, d) = (
        a.into_dispatch(),
        b.into_dispatch(),
        c.into_dispatch(),
        d.into_dispatch(),
    );
    Tensor::from_dispatch(<Dispatch as CpuFunctions>::apply4(a, b, c, d, function))
}

/// Runs a function of five tensors that live on the CPU.
pub(crate) fn apply5<
    const A: usize,
    const B: usize,
    const C: usize,
    const D: usize,
    const E: usize,
    const R: usize,
>(
    function: impl Function<5>,
    a: Tensor<A>,
    b: Tensor<B>,
    c: Tensor<C>,
    d: Tensor<D>,
    e: Tensor<E>,
) -> Tensor<R> {
    let (a, b, c) = (a.into_dispatch(), b.into_dispatch(), c.into_dispatch());
    let (d, e) = (d.into_dispatch(), e.into_dispatch());
    Tensor::from_dispatch(<Dispatch as CpuFunctions>::apply5(a, b, c, d, e, function))
}

/// Values of a contiguous tensor.
pub(crate) fn values(x: &FlexTensor) -> &[f32] {
    x.as_slice::<f32>().expect("a contiguous f32 tensor")
}

/// Shape of a tensor of known rank.
pub(crate) fn dims<const D: usize>(x: &FlexTensor) -> [usize; D] {
    std::array::from_fn(|axis| x.layout().shape()[axis])
}

/// A tensor that owns a buffer.
pub(crate) fn tensor<const D: usize>(values: Buffer, dims: [usize; D]) -> FlexTensor {
    debug_assert_eq!(values.len(), dims.iter().product::<usize>());
    FlexTensor::new(
        values.into_bytes(),
        Layout::contiguous(Shape::from(dims)),
        DType::F32,
    )
}

/// A small tensor, such as a parameter's gradient.
pub(crate) fn small_tensor<const D: usize>(values: &[f32], dims: [usize; D]) -> FlexTensor {
    let mut buffer = Buffer::take(values.len());
    buffer.copy_from_slice(values);
    tensor(buffer, dims)
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait CpuFunctions: Backend {
    fn apply1<F: Function<1>>(a: FloatTensor<Self>, function: F) -> FloatTensor<Self>;
    fn apply2<F: Function<2>>(a: FloatTensor<Self>, b: FloatTensor<Self>, function: F) -> FloatTensor<Self>;
    fn apply3<F: Function<3>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        function: F,
    ) -> FloatTensor<Self>;
    fn apply4<F: Function<4>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        function: F,
    ) -> FloatTensor<Self>;
    fn apply5<F: Function<5>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        function: F,
    ) -> FloatTensor<Self>;
}

impl CpuFunctions for Flex {
    fn apply1<F: Function<1>>(a: FlexTensor, function: F) -> FlexTensor {
        function.value([a].map(contiguous))
    }

    fn apply2<F: Function<2>>(a: FlexTensor, b: FlexTensor, function: F) -> FlexTensor {
        function.value([a, b].map(contiguous))
    }

    fn apply3<F: Function<3>>(a: FlexTensor, b: FlexTensor, c: FlexTensor, function: F) -> FlexTensor {
        function.value([a, b, c].map(contiguous))
    }

    fn apply4<F: Function<4>>(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        function: F,
    ) -> FlexTensor {
        function.value([a, b, c, d].map(contiguous))
    }

    fn apply5<F: Function<5>>(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        e: FlexTensor,
        function: F,
    ) -> FlexTensor {
        function.value([a, b, c, d, e].map(contiguous))
    }
}

/// A tensor with its node on the tape.
type Tracked = FloatTensor<Autodiff<Flex>>;

impl<S: CheckpointStrategy> CpuFunctions for Autodiff<Flex, S> {
    fn apply1<F: Function<1>>(a: Tracked, function: F) -> Tracked {
        record::<F, S, 1>(function, [a])
    }

    fn apply2<F: Function<2>>(a: Tracked, b: Tracked, function: F) -> Tracked {
        record::<F, S, 2>(function, [a, b])
    }

    fn apply3<F: Function<3>>(a: Tracked, b: Tracked, c: Tracked, function: F) -> Tracked {
        record::<F, S, 3>(function, [a, b, c])
    }

    fn apply4<F: Function<4>>(a: Tracked, b: Tracked, c: Tracked, d: Tracked, function: F) -> Tracked {
        record::<F, S, 4>(function, [a, b, c, d])
    }

    fn apply5<F: Function<5>>(
        a: Tracked,
        b: Tracked,
        c: Tracked,
        d: Tracked,
        e: Tracked,
        function: F,
    ) -> Tracked {
        record::<F, S, 5>(function, [a, b, c, d, e])
    }
}

/// The step on the tape: a function and what it saved.
#[derive(Debug)]
struct Step<F>(std::marker::PhantomData<F>);

impl<F: Function<N>, const N: usize> Backward<Flex, N> for Step<F> {
    type State = (F, F::Saved);

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradient = contiguous(gradients.consume::<Flex>(&ops.node));
        let (function, saved) = ops.state;
        let results = function.backward(saved, gradient, wanted);
        for (parent, result) in ops.parents.into_iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                gradients.register::<Flex>(parent.id, result);
            }
        }
    }
}

fn record<F: Function<N>, S: CheckpointStrategy, const N: usize>(
    function: F,
    inputs: [Tracked; N],
) -> Tracked {
    let nodes = inputs.each_ref().map(|input| input.node());
    let inputs = inputs.map(|input| contiguous(input.into_primitive()));
    match Step::<F>(std::marker::PhantomData)
        .prepare::<S>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(step) => {
            let (value, saved) = function.forward(inputs);
            step.finish((function, saved), value)
        }
        OpsKind::UnTracked(step) => step.finish(function.value(inputs)),
    }
}

fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}
