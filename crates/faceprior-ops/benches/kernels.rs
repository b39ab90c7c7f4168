//! Rates of the convolution kernels and of the optimiser's pass.
//!
//! `cargo bench --package faceprior-ops [FILTER]`. Convolutions count the operations of the direct form, so that the
//! forms can be compared: criterion's "Gelem/s" are GFLOP/s.

use std::time::Duration;

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use faceprior_ops::bench::Convolution;
use faceprior_ops::{AdamStep, adam_step};

/// Pictures, channels in and out, size, kernel, stride: the layers of IR-50, single pictures, style heads.
const SHAPES: [(usize, [usize; 2], usize, usize, usize); 21] = [
    (16, [3, 64], 112, 3, 1),
    (16, [64, 64], 112, 3, 1),
    (16, [64, 64], 112, 3, 2),
    (16, [64, 64], 56, 3, 1),
    (16, [64, 128], 56, 3, 1),
    (16, [128, 128], 56, 3, 1),
    (16, [128, 128], 56, 3, 2),
    (16, [128, 128], 28, 3, 1),
    (16, [256, 256], 28, 3, 1),
    (16, [256, 256], 14, 3, 1),
    (16, [512, 512], 14, 3, 1),
    (16, [512, 512], 14, 3, 2),
    (16, [512, 512], 7, 3, 1),
    (16, [512, 512], 7, 3, 2),
    (16, [512, 512], 2, 3, 2),
    (16, [64, 128], 56, 1, 2),
    (16, [256, 512], 14, 1, 1),
    (1, [64, 64], 56, 3, 1),
    (1, [128, 128], 28, 3, 1),
    (1, [256, 256], 14, 3, 1),
    (1, [512, 512], 7, 3, 1),
];

fn convolutions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("convolution");
    group
        .measurement_time(Duration::from_secs(1))
        .warm_up_time(Duration::from_millis(200))
        .sample_size(10);
    for (n, channels @ [i, o], size, kernel, stride) in SHAPES {
        let shape = format!("{n}x{i}-{o}@{size} {kernel}x{kernel}/{stride}");
        let mut convolution = Convolution::new(n, channels, size, kernel, stride);
        group.throughput(Throughput::Elements(convolution.operations() as u64));
        type Pass = fn(&mut Convolution);
        let passes: [(&str, Pass); 4] = [
            ("forward", Convolution::forward),
            ("data gradient", Convolution::data_gradient),
            ("weight gradient", Convolution::weight_gradient),
            ("forward, direct form", Convolution::forward_direct),
        ];
        for (name, pass) in passes {
            group.bench_function(format!("{shape}, {name}"), |b| b.iter(|| pass(&mut convolution)));
        }
    }
    group.finish();
}

fn adam(criterion: &mut Criterion) {
    const LENGTH: usize = 1 << 20;
    let operand = || Tensor::<1>::random([LENGTH], Distribution::Uniform(0.0, 1.0), &Device::flex());
    let step = AdamStep {
        betas: [0.9, 0.999],
        eps: 1e-8,
        step_size: 1e-3,
        correction: 0.5,
    };
    let mut group = criterion.benchmark_group("adam");
    group.throughput(Throughput::Elements(LENGTH as u64));
    group.bench_function("a million values", |b| {
        b.iter_batched(
            || [operand(), operand(), operand(), operand()],
            |[p, g, m, v]| adam_step(p, g, [m, v], step),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, convolutions, adam);
criterion_main!(benches);
