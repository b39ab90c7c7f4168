//! One value per pixel, shared by all channels.

use super::lanes::{Isa, Kernel, Lanes};
use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// `x + noise · strength`, with `noise` `[N or 1, pixels]` and `x` `[N, blocks, pixels, 16]`.
pub(crate) fn add_noise(
    isa: Isa,
    x: &[f32],
    blocks: usize,
    noise: &[f32],
    pixels: usize,
    strength: f32,
) -> Buffer {
    let planes = x.len() / (pixels * BLOCK);
    let mut y = Buffer::take(x.len());
    let to = Shared::new(&mut y);
    parallel(planes, |plane| {
        let x = &x[plane * pixels * BLOCK..][..pixels * BLOCK];
        let noise = &noise[plane / blocks * pixels % noise.len()..][..pixels];
        isa.run(Add {
            x,
            noise,
            strength,
            y: to,
            start: plane * pixels * BLOCK,
        });
    });
    y
}

struct Add<'a> {
    x: &'a [f32],
    noise: &'a [f32],
    strength: f32,
    y: Shared,
    start: usize,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller promises the instructions; `x` has sixteen values per pixel of `noise`; tasks have planes
        // of their own.
        unsafe {
            let (x, y) = (self.x.as_ptr(), self.y.at(self.start));
            for (pixel, noise) in self.noise.iter().enumerate() {
                let x = L::load(x.wrapping_add(pixel * BLOCK));
                x.add(L::splat(noise * self.strength))
                    .store(y.wrapping_add(pixel * BLOCK));
            }
        }
    }
}

/// `Σ dy · noise`, the gradient of the strength.
pub(crate) fn strength_gradient(isa: Isa, dy: &[f32], blocks: usize, noise: &[f32], pixels: usize) -> f32 {
    let planes = dy.len() / (pixels * BLOCK);
    let mut sums = vec![0.0f32; planes * BLOCK];
    let to = Shared::new(&mut sums);
    parallel(planes, |plane| {
        let dy = &dy[plane * pixels * BLOCK..][..pixels * BLOCK];
        let noise = &noise[plane / blocks * pixels % noise.len()..][..pixels];
        isa.run(Dot {
            dy,
            noise,
            sums: to,
            start: plane * BLOCK,
        });
    });
    sums.iter().map(|sum| f64::from(*sum)).sum::<f64>() as f32
}

struct Dot<'a> {
    dy: &'a [f32],
    noise: &'a [f32],
    sums: Shared,
    start: usize,
}

impl Kernel for Dot<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: as for `Add`; each task writes the sixteen sums of its plane.
        unsafe {
            let dy = self.dy.as_ptr();
            let mut sum = L::zero();
            for (pixel, noise) in self.noise.iter().enumerate() {
                sum = L::load(dy.wrapping_add(pixel * BLOCK)).mul_add(L::splat(*noise), sum);
            }
            sum.store(self.sums.at(self.start));
        }
    }
}
