//! Convolutions of small maps on the CPU, for networks that only answer.
//!
//! A face detector runs networks of three colours to 128 channels on maps of a few hundred pixels, thousands of times a
//! second. Making and dispatching tensors then costs more than the arithmetic, so this is the one door to the kernels
//! that leads past Burn: channel-last maps in plain memory, a convolution with its bias, PReLU and max pool in one call,
//! on the calling thread. There are no gradients and no other devices; networks are defined on
//! [`FeatureMap`](crate::FeatureMap), and a test of whoever runs them here holds the two equal.
//!
//! ```
//! use faceprior_ops::small::{Convolution, Maps};
//!
//! let mean = Convolution::new(&[1.0 / 12.0; 12], [1, 3, 2, 2], &[-3.0], Some(&[0.5]));
//! let pictures = Maps::new([2, 4, 6, 3], |picture, values| values.fill(picture as f32 * 4.0));
//! let means = mean.forward_pooled(&pictures, 2);
//! assert_eq!(means.dims(), [2, 2, 3, 1]);
//! let values: Vec<f32> = means.pixels().map(|channels| channels[0].round()).collect();
//! assert_eq!(values, [-2.0, -2.0, -2.0, -2.0, -2.0, -2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
//! ```

use crate::kernels::small::{Packed, count};
use crate::kernels::{BLOCK, Isa};
use crate::pool::Buffer;

/// Maps `[N, H, W, C]` of one size, channels side by side.
#[derive(Debug)]
pub struct Maps {
    values: Buffer,
    dims: [usize; 4],
    /// Floats from one pixel to the next: C, or C rounded up to whole blocks.
    pixel: usize,
}

impl Maps {
    /// Maps of `dims` `[N, H, W, C]`. `fill` is called for each picture with its number and its values `[H, W, C]`, all
    /// of which it has to set.
    ///
    /// # Panics
    /// If a dimension is 0, or memory cannot hold their product.
    pub fn new(dims: [usize; 4], mut fill: impl FnMut(usize, &mut [f32])) -> Self {
        assert!(dims.iter().all(|&size| size > 0), "maps of {dims:?}");
        let [_, h, w, pixel] = dims;
        let mut values = Buffer::take(count(dims));
        for (picture, values) in values.chunks_exact_mut(h * w * pixel).enumerate() {
            fill(picture, values);
        }
        Self { values, dims, pixel }
    }

    /// `[N, H, W, C]`.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The C channels of each pixel, in the order N, H, W.
    pub fn pixels(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        let pixels = self.values.chunks_exact(self.pixel);
        pixels.map(|channels| &channels[..self.dims[3]])
    }
}

/// A convolution with padding 0 and stride 1, its bias and its PReLU.
///
/// A dense layer over a whole map is one whose kernel is as large as the map; over vectors, one with a kernel of 1×1.
#[derive(Debug)]
pub struct Convolution {
    packed: Packed,
}

impl Convolution {
    /// Packs a weight of `shape` `[O, I, kh, kw]` for the instruction set at hand, with its bias `[O]` and, if it has a
    /// PReLU, its slopes below zero `[O]`.
    ///
    /// # Panics
    /// If lengths do not match the shape, the shape has a 0, or [`instruction_set`](crate::instruction_set) is an
    /// error.
    pub fn new(weight: &[f32], shape: [usize; 4], bias: &[f32], slope: Option<&[f32]>) -> Self {
        Self {
            packed: Packed::new(Isa::best(), weight, shape, bias, slope),
        }
    }

    /// `[N, H, W, I]` → `[N, H − kh + 1, W − kw + 1, O]`.
    ///
    /// Each output is one chain of (fused, where the processor can) multiply-adds in the order of bias, kernel rows,
    /// kernel columns, channels, so it does not depend on how many maps there are or how large they are.
    ///
    /// # Panics
    /// If the maps have other channels than I or are smaller than the kernel.
    pub fn forward(&self, x: &Maps) -> Maps {
        self.answer(x, |n, size| self.packed.forward(&x.values, n, size, x.pixel))
    }

    /// [`forward`](Self::forward), then the largest of each window of `side`×`side` pixels at stride 2. Sizes are
    /// rounded up: a window at the far edge may be smaller.
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and if `side` is neither 2 nor 3.
    pub fn forward_pooled(&self, x: &Maps, side: usize) -> Maps {
        self.answer(x, |n, size| {
            self.packed.forward_pooled(&x.values, n, size, x.pixel, side)
        })
    }

    fn answer(&self, x: &Maps, run: impl FnOnce(usize, [usize; 2]) -> (Buffer, [usize; 2])) -> Maps {
        let [n, h, w, channels] = x.dims;
        let (inputs, outputs) = (self.packed.inputs, self.packed.outputs);
        assert_eq!(channels, inputs, "maps of {channels} channels, expected {inputs}");
        let (values, [h, w]) = run(n, [h, w]);
        Maps {
            values,
            dims: [n, h, w, outputs],
            pixel: outputs.next_multiple_of(BLOCK),
        }
    }
}
