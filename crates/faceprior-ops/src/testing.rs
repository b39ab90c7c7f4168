//! Random tensors and comparisons for the tests of this crate.

use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// A standard-normal tensor on the CPU with autodiff, the same for the same seed.
pub(crate) fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| StandardNormal.sample(&mut rng))
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
}

/// The values of a tensor in row-major order.
pub(crate) fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("an f32 tensor")
}

/// Asserts that two tensors have one shape and differ by at most `tolerance` times the expected root mean square.
pub(crate) fn assert_close<const D: usize>(got: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
    assert_eq!(got.dims(), expected.dims());
    let (got, expected) = (values(got), values(expected));
    let square: f64 = expected.iter().map(|v| f64::from(*v).powi(2)).sum();
    let rms = (square / expected.len() as f64).sqrt() as f32;
    for (index, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!(
            (g - e).abs() <= tolerance * rms,
            "value {index}: got {g}, expected {e}, rms {rms}"
        );
    }
}

/// Asserts that two forms of an operation on tensors of rank `D` agree in value and in the gradients of all inputs.
pub(crate) fn assert_twins<const N: usize, const D: usize, const R: usize>(
    fast: impl Fn([Tensor<D>; N]) -> Tensor<R>,
    reference: impl Fn([Tensor<D>; N]) -> Tensor<R>,
    shapes: [[usize; D]; N],
    tolerance: f32,
) {
    let run = |form: &dyn Fn([Tensor<D>; N]) -> Tensor<R>| {
        let mut seed = 100;
        let inputs = shapes.map(|shape| {
            seed += 1;
            random(shape, seed).require_grad()
        });
        let y = form(inputs.clone());
        let gradients = y.clone().mul(random(y.dims(), 99)).sum().backward();
        (
            y,
            inputs.map(|input| input.grad(&gradients).expect("a gradient for every input")),
        )
    };
    let ((fast, fast_gradients), (plain, plain_gradients)) = (run(&fast), run(&reference));
    assert_close(fast, plain, tolerance);
    for (fast, plain) in fast_gradients.into_iter().zip(plain_gradients) {
        assert_close(fast, plain, tolerance);
    }
}
