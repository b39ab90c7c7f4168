//! One pass of one convolution kernel, a number of times on one thread: what `cargo xtask instructions` counts.
//!
//! ```text
//! instructions                  the cases, and the operations of one pass of the direct form
//! instructions CASE REPEATS     does the work
//! ```
#![allow(clippy::print_stdout)]

use faceprior_ops::bench::Convolution;

/// Pictures: few, an instruction is counted slowly.
const BATCH: usize = 2;

/// Name, channels in and out, size, kernel, stride.
const SHAPES: [(&str, [usize; 2], usize, usize, usize); 4] = [
    ("3x3-64x64-56-s1", [64, 64], 56, 3, 1),
    ("3x3-256x256-14-s1", [256, 256], 14, 3, 1),
    ("3x3-128x128-28-s2", [128, 128], 28, 3, 2),
    ("1x1-128x256-14-s1", [128, 256], 14, 1, 1),
];

/// Name, and what it runs.
type Pass = (&'static str, fn(&mut Convolution));

const PASSES: [Pass; 3] = [
    ("forward", Convolution::forward),
    ("data-gradient", Convolution::data_gradient),
    ("weight-gradient", Convolution::weight_gradient),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = arguments.first();
    let repeats: usize = arguments
        .get(1)
        .and_then(|repeats| repeats.parse().ok())
        .unwrap_or(1);
    for (shape, channels, size, kernel, stride) in SHAPES {
        for (pass, run) in PASSES {
            let name = format!("{shape}-{pass}");
            if wanted.is_some_and(|wanted| *wanted != name) {
                continue;
            }
            let mut convolution = Convolution::new(BATCH, channels, size, kernel, stride);
            match wanted {
                // On the pool's own thread, so that no other waits and counts.
                Some(_) => rayon::scope(|_| (0..repeats).for_each(|_| run(&mut convolution))),
                None => println!("{name} {}", convolution.operations()),
            }
        }
    }
}
