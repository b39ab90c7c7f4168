//! The convolution kernels one pass at a time, for measuring their rates. Not part of the interface.

use crate::kernels::direct::{self, Geometry};
use crate::kernels::winograd::{self, Shape, strided};
use crate::kernels::{BLOCK, Isa};
use crate::pool::Buffer;

/// A convolution with its operands, `x` and `weight` and their gradients.
pub struct Convolution {
    geometry: Geometry,
    x: Buffer,
    y: Buffer,
    weight: Buffer,
}

impl Convolution {
    /// Makes up operands, in memory as the program's own tensors have it, for `n` pictures of `size`² pixels.
    pub fn new(n: usize, [i, o]: [usize; 2], size: usize, kernel: usize, stride: usize) -> Self {
        let padding = kernel / 2;
        let geometry = Geometry {
            n,
            i,
            o,
            h: size,
            w: size,
            kernel: [kernel; 2],
            stride,
            padding,
        };
        let [oh, ow] = geometry.outputs();
        let values = |count: usize| {
            let mut buffer = Buffer::take(count);
            for (index, value) in buffer.iter_mut().enumerate() {
                *value = (index % 97) as f32 / 97.0 - 0.5;
            }
            buffer
        };
        Self {
            geometry,
            x: values(n * i.next_multiple_of(BLOCK) * size * size),
            y: values(n * o.next_multiple_of(BLOCK) * oh * ow),
            weight: values(o * i * kernel * kernel),
        }
    }

    /// Multiplications and additions of the direct form in one pass.
    pub fn operations(&self) -> f64 {
        let Geometry {
            n,
            i,
            o,
            kernel: [kh, kw],
            ..
        } = self.geometry;
        let [oh, ow] = self.geometry.outputs();
        2.0 * [n, i, o, kh, kw, oh, ow]
            .map(|size| size as f64)
            .iter()
            .product::<f64>()
    }

    fn winograd(&self) -> Option<Shape> {
        let Geometry {
            n,
            i,
            o,
            h,
            w,
            kernel,
            stride,
            ..
        } = self.geometry;
        (kernel == [3, 3] && stride == 1 && i >= BLOCK).then_some(Shape { n, i, o, h, w })
    }

    /// The output.
    pub fn forward(&mut self) {
        match self.winograd() {
            Some(shape) => {
                winograd::forward_once(Isa::best(), shape, &self.x, None, &self.weight, &mut self.y);
            }
            None if strided::suits(Isa::best(), self.geometry) => {
                strided::forward(
                    Isa::best(),
                    self.geometry,
                    &self.x,
                    None,
                    &self.weight,
                    &mut self.y,
                );
            }
            None => self.forward_direct(),
        }
    }

    /// The output, by the direct form.
    pub fn forward_direct(&mut self) {
        let prepared = direct::prepare(Isa::best(), self.geometry, &self.weight);
        direct::forward(Isa::best(), self.geometry, &self.x, None, &prepared, &mut self.y);
    }

    /// The gradient of the input.
    pub fn data_gradient(&mut self) {
        match self.winograd() {
            Some(shape) => winograd::data_gradient(Isa::best(), shape, &self.y, &self.weight, &mut self.x),
            None if strided::suits(Isa::best(), self.geometry) => {
                strided::data_gradient(Isa::best(), self.geometry, &self.y, &self.weight, &mut self.x);
            }
            None => direct::data_gradient(Isa::best(), self.geometry, &self.y, &self.weight, &mut self.x),
        }
    }

    /// The gradient of the weight.
    pub fn weight_gradient(&mut self) {
        match self.winograd() {
            Some(shape) => {
                winograd::weight_gradient(Isa::best(), shape, &self.x, None, &self.y, &mut self.weight);
            }
            None if strided::suits_weight_gradient(self.geometry) => {
                strided::weight_gradient(
                    Isa::best(),
                    self.geometry,
                    &self.x,
                    None,
                    &self.y,
                    &mut self.weight,
                );
            }
            None => {
                direct::weight_gradient(
                    Isa::best(),
                    self.geometry,
                    &self.x,
                    None,
                    &self.y,
                    &mut self.weight,
                );
            }
        }
    }
}
