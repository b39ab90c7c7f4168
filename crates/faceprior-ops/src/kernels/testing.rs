//! Plain float64 convolutions and layouts for the tests of kernels.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::direct::Geometry;
use super::{BLOCK, Isa};

/// Every instruction set of this processor, and the matrix unit in two parts.
pub(crate) fn instruction_sets() -> Vec<Isa> {
    let mut sets = Isa::available();
    let rounded = sets[0].for_rounded();
    if rounded != sets[0] {
        sets.push(rounded);
    }
    sets
}

/// Standard-normal values, the same for the same seed.
pub(crate) fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// `[N, C, pixels]` to `[N, ⌈C/16⌉, pixels, 16]`.
pub(crate) fn block(x: &[f32], n: usize, c: usize, pixels: usize) -> Vec<f32> {
    let padded = c.next_multiple_of(BLOCK);
    let mut blocked = vec![0.0; n * padded * pixels];
    for (index, value) in x.iter().enumerate() {
        let (picture, channel, pixel) = (index / (c * pixels), index / pixels % c, index % pixels);
        blocked[picture * padded * pixels + (channel / BLOCK * pixels + pixel) * BLOCK + channel % BLOCK] =
            *value;
    }
    blocked
}

/// `[N, ⌈C/16⌉, pixels, 16]` to `[N, C, pixels]`.
pub(crate) fn unblock(x: &[f32], n: usize, c: usize, pixels: usize) -> Vec<f32> {
    let padded = c.next_multiple_of(BLOCK);
    let at = |picture: usize, channel: usize, pixel: usize| {
        x[picture * padded * pixels + (channel / BLOCK * pixels + pixel) * BLOCK + channel % BLOCK]
    };
    (0..n * c * pixels)
        .map(|index| at(index / (c * pixels), index / pixels % c, index % pixels))
        .collect()
}

/// Calls `f(y index, x index, weight index)` for every product of a convolution in NCHW.
fn products(g: Geometry, mut f: impl FnMut(usize, usize, usize)) {
    let Geometry {
        n,
        i,
        o,
        h,
        w,
        kernel: [kh, kw],
        stride,
        padding,
    } = g;
    let [oh, ow] = g.outputs();
    for (picture, out) in (0..n).flat_map(|picture| (0..o).map(move |out| (picture, out))) {
        for (oy, ox) in (0..oh).flat_map(|oy| (0..ow).map(move |ox| (oy, ox))) {
            for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
                let (y, x) = (
                    (oy * stride + ky).wrapping_sub(padding),
                    (ox * stride + kx).wrapping_sub(padding),
                );
                if y < h && x < w {
                    for input in 0..i {
                        f(
                            ((picture * o + out) * oh + oy) * ow + ox,
                            ((picture * i + input) * h + y) * w + x,
                            ((out * i + input) * kh + ky) * kw + kx,
                        );
                    }
                }
            }
        }
    }
}

/// A convolution in float64, NCHW.
pub(crate) fn naive_forward(g: Geometry, x: &[f32], weight: &[f32]) -> Vec<f64> {
    let [oh, ow] = g.outputs();
    let mut y = vec![0.0; g.n * g.o * oh * ow];
    products(g, |to, from, tap| {
        y[to] += f64::from(x[from]) * f64::from(weight[tap])
    });
    y
}

/// Its gradients with respect to input and weight.
pub(crate) fn naive_gradients(g: Geometry, x: &[f32], weight: &[f32], dy: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
    products(g, |to, from, tap| {
        dx[from] += f64::from(dy[to]) * f64::from(weight[tap]);
        dw[tap] += f64::from(dy[to]) * f64::from(x[from]);
    });
    (dx, dw)
}

/// Root mean square of the difference over that of the exact values.
pub(crate) fn relative_rms(got: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let difference: f64 = got
        .iter()
        .zip(exact)
        .map(|(g, e)| (f64::from(*g) - e).powi(2))
        .sum();
    let size: f64 = exact.iter().map(|e| e.powi(2)).sum();
    (difference / size).sqrt()
}
