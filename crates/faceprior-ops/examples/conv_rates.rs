//! Rates of the convolution kernels, in GFLOP/s counted as the direct form does it.
//!
//! `cargo run --release -p faceprior-ops --example conv_rates [FILTER]`, where the filter is part of a row's name.

#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use faceprior_ops::bench::Convolution;

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    println!(
        "{:<24} {:>9} {:>9} {:>9} {:>9}",
        "shape", "forward", "data", "weight", "direct"
    );
    for (n, channels, size, kernel, stride) in [
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
        (16, [64, 128], 56, 1, 2),
        (16, [256, 512], 14, 1, 1),
        (1, [64, 64], 56, 3, 1),
        (1, [128, 128], 28, 3, 1),
        (1, [256, 256], 14, 3, 1),
        (1, [512, 512], 7, 3, 1),
    ] {
        let [i, o] = channels;
        let name = format!("{n}x{i}-{o}@{size} {kernel}x{kernel}/{stride}");
        if !name.contains(&filter) {
            continue;
        }
        let mut convolution = Convolution::new(n, channels, size, kernel, stride);
        let operations = convolution.operations();
        let mut rate = |pass: fn(&mut Convolution)| operations / best_time(|| pass(&mut convolution)) / 1e9;
        println!(
            "{name:<24} {:>9.0} {:>9.0} {:>9.0} {:>9.0}",
            rate(Convolution::forward),
            rate(Convolution::data_gradient),
            rate(Convolution::weight_gradient),
            rate(Convolution::forward_direct),
        );
    }
}

/// The shortest of several runs, in seconds.
fn best_time(mut pass: impl FnMut()) -> f64 {
    pass();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < Duration::from_millis(120) {
        let run = Instant::now();
        pass();
        best = best.min(run.elapsed().as_secs_f64());
    }
    best
}
