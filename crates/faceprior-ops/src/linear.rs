//! The linear layer's product.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::backend::{Function, apply2, dims, tensor, values};
use crate::feature_map::is_cpu;
use crate::kernels::{Isa, dense};
use crate::pool::Buffer;

/// `x · Wᵀ`.
///
/// # Shapes
/// `x`: `[N, I]`; `weight`: `[O, I]`; output `[N, O]`.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    assert_eq!(
        x.dims()[1],
        weight.dims()[1],
        "one weight per input of a linear layer"
    );
    if is_cpu(&x.device()) {
        apply2(Linear, x, weight)
    } else {
        x.matmul(weight.transpose())
    }
}

#[derive(Clone, Debug)]
struct Linear;

impl Function<2> for Linear {
    type Saved = [FlexTensor; 2];

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        let ([n, i], [o, _]) = (dims(&x), dims(&weight));
        let mut y = Buffer::take(n * o);
        dense::rows_by_rows(Isa::best(), i, values(&x), values(&weight), &mut y);
        (tensor(y, [n, o]), [x, weight])
    }

    fn backward(
        &self,
        [x, weight]: Self::Saved,
        dy: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let ([n, i], [o, _], isa) = (dims(&x), dims(&weight), Isa::best());
        let dx = wanted[0].then(|| {
            let mut dx = Buffer::take(n * i);
            let dy = dense::Matrix {
                values: values(&dy),
                rows: n,
                inner: o,
                transposed: false,
            };
            dense::by_columns(isa, dy, values(&weight), i, &mut dx);
            tensor(dx, [n, i])
        });
        let dw = wanted[1].then(|| {
            let mut dw = Buffer::take(o * i);
            let dy = dense::Matrix {
                values: values(&dy),
                rows: o,
                inner: n,
                transposed: true,
            };
            dense::by_columns(isa, dy, values(&x), i, &mut dw);
            tensor(dw, [o, i])
        });
        [dx, dw]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_twins;

    #[test]
    fn agrees_with_a_matrix_product() {
        for [n, i, o] in [[1, 1, 1], [3, 70, 5], [7, 200, 33], [16, 64, 130]] {
            assert_twins(
                |[x, weight]| linear(x, weight),
                |[x, weight]| x.matmul(weight.transpose()),
                [[n, i], [o, i]],
                1e-5,
            );
        }
    }
}
