//! Operations that change height and width.

use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, dims, tensor, values};
use crate::kernels::{BLOCK, Isa, resample as kernels};
use crate::{FeatureMap, reference};

/// Maximum over windows of `kernel`² pixels, no padding.
///
/// With `ceil_mode` a last window that hangs over the border counts, as in PyTorch.
pub fn max_pool2d(x: FeatureMap, kernel: usize, stride: usize, ceil_mode: bool) -> FeatureMap {
    let channels = x.channels();
    if x.is_blocked() {
        x.map(|x| {
            apply1(
                MaxPool {
                    kernel,
                    stride,
                    ceil_mode,
                },
                x,
            )
        })
    } else {
        x.map(|x| reference::max_pool2d(x, channels, kernel, stride, ceil_mode))
    }
}

/// Keeps every `stride`-th pixel of every `stride`-th row, from the first.
pub fn subsample(x: FeatureMap, stride: usize) -> FeatureMap {
    match stride {
        1 => x,
        _ if x.is_blocked() => x.filter(|x| apply1(Subsample { stride }, x)),
        _ => x.map(|x| reference::subsample(x, stride)),
    }
}

/// Doubles height and width: nearest neighbour, then the FIR filter [1, 3, 3, 1]⊗[1, 3, 3, 1]/64, borders replicated.
pub fn upsample_smooth(x: FeatureMap) -> FeatureMap {
    if x.is_blocked() {
        x.filter(|x| apply1(Smooth::Up, x))
    } else {
        x.map(reference::upsample_smooth)
    }
}

/// Halves height and width (rounded up): the FIR filter [1, 3, 3, 1]⊗[1, 3, 3, 1]/64, borders replicated, then
/// every second pixel.
pub fn downsample_smooth(x: FeatureMap) -> FeatureMap {
    if x.is_blocked() {
        x.filter(|x| apply1(Smooth::Down, x))
    } else {
        x.map(reference::downsample_smooth)
    }
}

/// Smooth resampling on blocks.
#[derive(Clone, Copy, Debug)]
enum Smooth {
    Up,
    Down,
}

impl Smooth {
    fn taps(self, length: usize) -> Vec<kernels::Taps> {
        match self {
            Self::Up => kernels::upsample_taps(length),
            Self::Down => kernels::downsample_taps(length),
        }
    }
}

impl Function<1> for Smooth {
    type Saved = [usize; 5];

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Self::Saved) {
        let shape @ [n, blocks, h, w, _] = dims(&x);
        let (rows, columns) = (self.taps(h), self.taps(w));
        let y = kernels::resample(Isa::best(), values(&x), h, w, &rows, &columns);
        (tensor(y, [n, blocks, rows.len(), columns.len(), BLOCK]), shape)
    }

    fn backward(&self, shape: Self::Saved, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [_, _, h, w, _] = shape;
        let (rows, columns) = (self.taps(h), self.taps(w));
        let dx = kernels::resample_transposed(Isa::best(), values(&dy), h, w, &rows, &columns);
        [Some(tensor(dx, shape))]
    }
}

/// Every `stride`-th pixel.
#[derive(Clone, Debug)]
struct Subsample {
    stride: usize,
}

impl Function<1> for Subsample {
    type Saved = [usize; 5];

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Self::Saved) {
        let shape @ [n, blocks, h, w, _] = dims(&x);
        let y = kernels::subsample(values(&x), h, w, self.stride);
        (
            tensor(
                y,
                [n, blocks, h.div_ceil(self.stride), w.div_ceil(self.stride), BLOCK],
            ),
            shape,
        )
    }

    fn backward(&self, shape: Self::Saved, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [_, _, h, w, _] = shape;
        [Some(tensor(
            kernels::subsample_transposed(values(&dy), h, w, self.stride),
            shape,
        ))]
    }
}

/// Maximum over windows.
#[derive(Clone, Debug)]
struct MaxPool {
    kernel: usize,
    stride: usize,
    ceil_mode: bool,
}

impl MaxPool {
    fn windows(&self, h: usize, w: usize) -> kernels::Windows {
        let Self {
            kernel,
            stride,
            ceil_mode,
        } = *self;
        let count = |size: usize| match ceil_mode {
            // A last window that would start outside the map does not count.
            true => {
                size.saturating_sub(kernel)
                    .div_ceil(stride)
                    .min((size - 1) / stride)
                    + 1
            }
            false => {
                assert!(
                    size >= kernel,
                    "a map of {h}×{w} pixels is smaller than the {kernel}×{kernel} window"
                );
                (size - kernel) / stride + 1
            }
        };
        kernels::Windows {
            h,
            w,
            rows: count(h),
            columns: count(w),
            kernel,
            stride,
        }
    }
}

impl Function<1> for MaxPool {
    type Saved = FlexTensor;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let [n, blocks, h, w, _] = dims(&x);
        let windows = self.windows(h, w);
        let y = kernels::max_pool(Isa::best(), values(&x), windows);
        (tensor(y, [n, blocks, windows.rows, windows.columns, BLOCK]), x)
    }

    fn backward(&self, x: FlexTensor, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [_, _, h, w, _] = dims(&x);
        let dx = kernels::max_pool_gradient(values(&x), values(&dy), self.windows(h, w));
        [Some(tensor(dx, dims::<5>(&x)))]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, module, ops::ConvOptions, ops::PadMode};

    use super::*;
    use crate::testing::{assert_close, assert_twins, random, values};

    #[test]
    fn kernels_agree_with_their_references() {
        for (h, w) in [(1, 1), (2, 3), (5, 4), (8, 8)] {
            let shapes = [[2, 2, h, w, BLOCK]];
            let map = |[x]: [Tensor<5>; 1]| FeatureMap::from_blocks(x, 32);
            let up = |x| upsample_smooth(map(x)).into_blocks();
            assert_twins(up, |[x]| reference::upsample_smooth(x), shapes, 1e-6);
            let down = |x| downsample_smooth(map(x)).into_blocks();
            assert_twins(down, |[x]| reference::downsample_smooth(x), shapes, 1e-6);
            let every_second = |x| subsample(map(x), 2).into_blocks();
            assert_twins(every_second, |[x]| reference::subsample(x, 2), shapes, 0.0);
        }
    }

    /// Replication pad (left 2, right 1, top 2, bottom 1), then the 4×4 filter, as the definition has it.
    fn filter(x: Tensor<4>) -> Tensor<4> {
        let taps = Tensor::<1>::from_floats([1.0, 3.0, 3.0, 1.0], &x.device());
        let kernel = taps
            .clone()
            .reshape([4, 1])
            .matmul(taps.reshape([1, 4]))
            .div_scalar(64.0);
        let channels = x.dims()[1];
        let kernel = kernel.reshape([1, 1, 4, 4]).repeat_dim(0, channels);
        let x = x.pad([(2, 1), (2, 1)], PadMode::Edge);
        module::conv2d(
            x,
            kernel,
            None,
            ConvOptions::new([1; 2], [0; 2], [1; 2], channels),
        )
    }

    #[test]
    fn smooth_resampling_equals_its_definition() {
        for [h, w] in [[1, 1], [2, 3], [5, 4], [8, 8]] {
            let x = random([2, 3, h, w], (h * 10 + w) as u64);
            let nearest = x
                .clone()
                .reshape([2, 3, h, 1, w, 1])
                .expand([2, 3, h, 2, w, 2])
                .reshape([2, 3, 2 * h, 2 * w]);
            let got = upsample_smooth(FeatureMap::from_nchw(x.clone())).into_nchw();
            assert_close(got, filter(nearest), 1e-6);

            let rows: Vec<_> = (0..h)
                .step_by(2)
                .map(|row| filter(x.clone()).narrow(2, row, 1))
                .collect();
            let kept = Tensor::cat(rows, 2);
            let columns: Vec<_> = (0..w)
                .step_by(2)
                .map(|column| kept.clone().narrow(3, column, 1))
                .collect();
            let got = downsample_smooth(FeatureMap::from_nchw(x)).into_nchw();
            assert_close(got, Tensor::cat(columns, 3), 1e-6);
        }
    }

    #[test]
    fn subsample_keeps_pixels_and_passes_gradients_to_them_only() {
        let x = random([1, 3, 5, 4], 1).require_grad();
        let y = subsample(FeatureMap::from_nchw(x.clone()), 2).into_nchw();
        assert_eq!(y.dims(), [1, 3, 3, 2]);
        let gradient = values(x.grad(&y.clone().sum().backward()).expect("x is tracked"));
        let (x, y) = (values(x), values(y));
        for (index, (value, gradient)) in x.iter().zip(&gradient).enumerate() {
            let (column, row, channel) = (index % 4, index / 4 % 5, index / 20);
            let kept = row % 2 == 0 && column % 2 == 0;
            assert_eq!(*gradient, if kept { 1.0 } else { 0.0 });
            if kept {
                assert_eq!(*value, y[channel * 6 + row / 2 * 2 + column / 2]);
            }
        }
    }

    #[test]
    fn max_pool_agrees_with_its_reference() {
        for (kernel, stride, ceil_mode, h, w) in [
            (2, 2, true, 5, 7),
            (2, 2, false, 5, 7),
            (3, 2, true, 8, 8),
            (3, 2, false, 11, 10),
            (2, 3, true, 6, 3),
        ] {
            assert_twins(
                |[x]| max_pool2d(FeatureMap::from_blocks(x, 32), kernel, stride, ceil_mode).into_blocks(),
                |[x]| reference::max_pool2d(x, 32, kernel, stride, ceil_mode),
                [[2, 2, h, w, BLOCK]],
                0.0,
            );
        }
    }

    #[test]
    fn max_pool_in_ceil_mode_counts_windows_that_hang_over() {
        let x = random([1, 3, 5, 5], 1);
        let y = max_pool2d(FeatureMap::from_nchw(x.clone()), 2, 2, true).into_nchw();
        assert_eq!(y.dims(), [1, 3, 3, 3]);
        assert_eq!(values(y)[8], values(x)[24]);
    }
}
