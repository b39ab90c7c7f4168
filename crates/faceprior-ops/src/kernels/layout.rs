//! Between plain and blocked layout.

use super::{BLOCK, Shared, parallel};
use crate::pool::Buffer;

/// Pixels transposed at a time: sixteen cache lines in, sixteen out.
const STEP: usize = 16;

/// `[N, C, pixels]` to `[N, ⌈C/16⌉, pixels, 16]`; lanes above `C` become zero.
pub(crate) fn block(x: &[f32], channels: usize, pixels: usize) -> Buffer {
    let blocks = channels.div_ceil(BLOCK);
    let planes = x.len() / (channels * pixels) * blocks;
    let mut y = Buffer::take(planes * pixels * BLOCK);
    let to = Shared::new(&mut y);
    parallel(planes, |plane| {
        // SAFETY: each task writes the plane of its index.
        let y = unsafe { std::slice::from_raw_parts_mut(to.at(plane * pixels * BLOCK), pixels * BLOCK) };
        let (picture, first) = (plane / blocks, plane % blocks * BLOCK);
        let lanes = BLOCK.min(channels - first);
        let x = &x[(picture * channels + first) * pixels..][..lanes * pixels];
        for start in (0..pixels).step_by(STEP) {
            let end = pixels.min(start + STEP);
            let y = &mut y[start * BLOCK..end * BLOCK];
            if lanes < BLOCK {
                y.fill(0.0);
            }
            for (lane, x) in x.chunks_exact(pixels).enumerate() {
                for (y, x) in y.chunks_exact_mut(BLOCK).zip(&x[start..end]) {
                    y[lane] = *x;
                }
            }
        }
    });
    y
}

/// `[N, ⌈C/16⌉, pixels, 16]` to `[N, C, pixels]`.
pub(crate) fn unblock(x: &[f32], channels: usize, pixels: usize) -> Buffer {
    let blocks = channels.div_ceil(BLOCK);
    let planes = x.len() / (pixels * BLOCK);
    let mut y = Buffer::take(planes / blocks * channels * pixels);
    let to = Shared::new(&mut y);
    parallel(planes, |plane| {
        let (picture, first) = (plane / blocks, plane % blocks * BLOCK);
        let lanes = BLOCK.min(channels - first);
        // SAFETY: each task writes the channels of its block.
        let y = unsafe {
            std::slice::from_raw_parts_mut(to.at((picture * channels + first) * pixels), lanes * pixels)
        };
        let x = &x[plane * pixels * BLOCK..][..pixels * BLOCK];
        for start in (0..pixels).step_by(STEP) {
            let end = pixels.min(start + STEP);
            let x = &x[start * BLOCK..end * BLOCK];
            for (lane, y) in y.chunks_exact_mut(pixels).enumerate() {
                for (y, x) in y[start..end].iter_mut().zip(x.chunks_exact(BLOCK)) {
                    *y = x[lane];
                }
            }
        }
    });
    y
}
