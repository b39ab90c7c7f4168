//! Training is the same to the last bit from run to run and on any number of threads.

use burn::tensor::{Device, Tensor, TensorData};
use faceprior_ops::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random<const D: usize>(shape: [usize; D], rng: &mut ChaCha8Rng) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| rng.random::<f32>() - 0.5)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff()).require_grad()
}

/// Value and all gradients of a network that passes through every operation of the crate.
fn bits() -> Vec<u32> {
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    let images = random([5, 3, 40, 36], rng);
    let first = random([32, 3, 3, 3], rng);
    let second = random([48, 32, 3, 3], rng);
    let halving = random([64, 48, 3, 3], rng);
    let depthwise = random([64, 1, 3, 3], rng);
    let modulated = random([32, 64, 3, 3], rng);
    let pointwise = random([3, 32, 1, 1], rng);
    let (style, scale) = (random([5, 64], rng), random([5, 32], rng));
    let noise = random([5, 1, 20, 18], rng).detach();
    let strength = random([1], rng);
    let [weight, bias, slope] = [(); 3].map(|()| random([48], rng));

    let same = Conv2dOptions::same3x3();
    let activation = BiasActivation {
        negative_slope: 0.2,
        gain: 1.4,
        clamp: Some(1.0),
    };
    let x = conv2d(FeatureMap::from_nchw(images.clone()), first.clone(), same);
    let x = upsample_smooth(downsample_smooth(scale_channels(x, scale.clone())));
    let x = conv2d(x, second.clone(), same);
    let (x, statistics) = batch_norm_train(x, weight.clone(), bias.clone(), 1e-5);
    let x = prelu(x, slope.clone());
    let x = batch_norm(
        x,
        bias.clone(),
        slope.clone(),
        statistics.mean,
        statistics.var,
        1e-5,
    );
    let x = conv2d(x, halving.clone(), Conv2dOptions { stride: 2, ..same });
    let x = conv2d(x.clone(), depthwise.clone(), Conv2dOptions { groups: 64, ..same }).add(x.mul_scalar(0.5));
    let x = add_noise(x, noise, strength.clone());
    let x = modulated_conv2d(x, modulated.clone(), style.clone(), true);
    let x = bias_activation(x, None, activation);
    let pooled = global_average_pool(x.clone()).square().sum();
    let x = max_pool2d(conv2d(x, pointwise.clone(), Conv2dOptions::default()), 2, 2, true);
    let loss = x.flatten().square().mean().add(pooled);

    let gradients = loss.backward();
    let mut bits = Vec::new();
    let mut keep = |data: TensorData| {
        bits.extend(
            data.try_to_vec::<f32>()
                .expect("an f32 tensor")
                .into_iter()
                .map(f32::to_bits),
        );
    };
    keep(loss.into_data());
    for parameter in [
        &images, &first, &second, &halving, &depthwise, &modulated, &pointwise,
    ] {
        keep(parameter.grad(&gradients).expect("a gradient").into_data());
    }
    for parameter in [&style, &scale] {
        keep(parameter.grad(&gradients).expect("a gradient").into_data());
    }
    for parameter in [&strength, &weight, &bias, &slope] {
        keep(parameter.grad(&gradients).expect("a gradient").into_data());
    }
    bits
}

fn on_threads(threads: usize, work: impl FnOnce() -> Vec<u32> + Send) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a thread pool");
    pool.install(work)
}

#[test]
fn training_does_not_depend_on_the_number_of_threads() {
    let once = on_threads(1, bits);
    assert!(once.iter().all(|bits| f32::from_bits(*bits).is_finite()));
    for threads in [1, 2, 3] {
        assert!(
            on_threads(threads, bits) == once,
            "{threads} threads give other bits"
        );
        let led = on_threads(threads, || lead(bits));
        assert!(
            led == once,
            "{threads} threads that are kept awake give other bits"
        );
    }
}
