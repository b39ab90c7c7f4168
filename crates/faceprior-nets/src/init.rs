//! Fresh parameters: where they live and the random numbers they start from.
//!
//! [`Init`] draws one seed per parameter from a ChaCha8 stream, in the order in which a network asks for them, and
//! the values only when the parameter is first read. So a network that is about to be loaded from a file never
//! draws its random weights, and the values do not depend on which parameter is read first.

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand::{Rng, RngExt};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// How the weights of plain convolutions and linear layers start.
///
/// `fan_in` is the product of all dimensions of a weight but the first, `fan_out` the product of all but the second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    /// PyTorch's default: weights and biases uniform in ±1/√fan_in.
    Torch,
    /// Normal with variance 2/fan_out, biases 0 (He et al. 2015, the ReLU gain).
    KaimingNormalFanOut,
    /// Uniform in ±√(6/(fan_in + fan_out)), biases 0 (Glorot and Bengio 2010).
    XavierUniform,
}

/// Source of fresh parameters on one device; see the [module](self).
#[derive(Debug)]
pub struct Init {
    device: Device,
    rng: ChaCha8Rng,
    scheme: Scheme,
}

impl Init {
    /// Parameters on `device`, their values given by `seed`. Plain layers start by [`Scheme::Torch`].
    pub fn new(seed: u64, device: &Device) -> Self {
        Self {
            device: device.clone(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            scheme: Scheme::Torch,
        }
    }

    /// A source that follows `scheme`, its stream split off this one.
    pub fn with_scheme(&mut self, scheme: Scheme) -> Self {
        Self {
            device: self.device.clone(),
            rng: ChaCha8Rng::seed_from_u64(self.rng.next_u64()),
            scheme,
        }
    }

    /// The device that the parameters live on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every element is `value`.
    pub fn constant<const D: usize>(&mut self, shape: [usize; D], value: f32) -> Param<Tensor<D>> {
        parameter(&self.device, shape, move |n| vec![value; n])
    }

    /// Independent normal numbers with mean 0 and the standard deviation `std`.
    pub fn normal<const D: usize>(&mut self, shape: [usize; D], std: f32) -> Param<Tensor<D>> {
        let seed = self.rng.next_u64();
        parameter(&self.device, shape, move |n| normal_numbers(seed, n, std))
    }

    /// Independent uniform numbers in [-bound, bound).
    pub fn uniform<const D: usize>(&mut self, shape: [usize; D], bound: f32) -> Param<Tensor<D>> {
        let seed = self.rng.next_u64();
        parameter(&self.device, shape, move |n| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            (0..n)
                .map(|_| (2.0 * rng.random::<f32>() - 1.0) * bound)
                .collect()
        })
    }

    /// Normal with variance 2/fan_out.
    pub fn kaiming_normal_fan_out<const D: usize>(&mut self, shape: [usize; D]) -> Param<Tensor<D>> {
        let (_, fan_out) = fans(&shape);
        self.normal(shape, (2.0 / fan_out as f32).sqrt())
    }

    /// Uniform in ±√(6/(fan_in + fan_out)).
    pub fn xavier_uniform<const D: usize>(&mut self, shape: [usize; D]) -> Param<Tensor<D>> {
        let (fan_in, fan_out) = fans(&shape);
        self.uniform(shape, (6.0 / (fan_in + fan_out) as f32).sqrt())
    }

    /// The weight of a plain convolution `[O, I/groups, kh, kw]` or linear layer `[O, I]`, by this source's scheme.
    pub fn weight<const D: usize>(&mut self, shape: [usize; D]) -> Param<Tensor<D>> {
        match self.scheme {
            Scheme::Torch => self.uniform(shape, (fans(&shape).0 as f32).sqrt().recip()),
            Scheme::KaimingNormalFanOut => self.kaiming_normal_fan_out(shape),
            Scheme::XavierUniform => self.xavier_uniform(shape),
        }
    }

    /// The bias `[O]` that goes with a weight of the given fan-in, by this source's scheme.
    pub fn bias(&mut self, len: usize, fan_in: usize) -> Param<Tensor<1>> {
        match self.scheme {
            Scheme::Torch => self.uniform([len], (fan_in as f32).sqrt().recip()),
            Scheme::KaimingNormalFanOut | Scheme::XavierUniform => self.constant([len], 0.0),
        }
    }

    /// Standard normal numbers as a plain tensor on this device: for buffers, which are not learnt.
    pub fn normal_tensor<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let numbers = normal_numbers(self.rng.next_u64(), shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(numbers, shape), &self.device)
    }
}

fn normal_numbers(seed: u64, n: usize, std: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|_| {
            let x: f32 = StandardNormal.sample(&mut rng);
            x * std
        })
        .collect()
}

/// (fan_in, fan_out) of a weight, as PyTorch counts them.
fn fans(shape: &[usize]) -> (usize, usize) {
    let receptive_field: usize = shape.iter().skip(2).product();
    let inputs = shape.get(1).copied().unwrap_or(1);
    (inputs * receptive_field, shape[0] * receptive_field)
}

fn parameter<const D: usize>(
    device: &Device,
    shape: [usize; D],
    values: impl FnOnce(usize) -> Vec<f32> + Send + Sync + 'static,
) -> Param<Tensor<D>> {
    let fill = move |device: &Device, require_grad: bool| {
        let values = values(shape.iter().product());
        Tensor::from_data(TensorData::new(values, shape), device).set_require_grad(require_grad)
    };
    Param::uninitialized(ParamId::new(), fill, device.clone(), true, shape.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values<const D: usize>(param: &Param<Tensor<D>>) -> Vec<f32> {
        param.val().into_data().try_to_vec().unwrap()
    }

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (
            mean,
            (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt(),
        )
    }

    #[test]
    fn values_follow_the_seed_and_not_the_order_of_reading() {
        let device = Device::flex();
        let draw = |seed| {
            let mut init = Init::new(seed, &device);
            (init.normal([4, 5], 1.0), init.uniform([7], 1.0))
        };
        let (a, b) = draw(3);
        let (c, d) = draw(3);
        let late = values(&b);
        assert_eq!(values(&a), values(&c));
        assert_eq!(late, values(&d));
        assert_ne!(values(&draw(4).0), values(&a));
        assert_ne!(values(&a)[..5], values(&a)[5..10]);
    }

    #[test]
    fn schemes_have_their_spread() {
        let mut init = Init::new(1, &Device::flex());
        let shape = [128, 32, 3, 3]; // fan_in 288, fan_out 1152
        for (scheme, std) in [
            (Scheme::Torch, (1.0 / 288.0f64 / 3.0).sqrt()),
            (Scheme::KaimingNormalFanOut, (2.0f64 / 1152.0).sqrt()),
            (Scheme::XavierUniform, (2.0f64 / (288.0 + 1152.0)).sqrt()),
        ] {
            let (mean, measured) = moments(&values(&init.with_scheme(scheme).weight(shape)));
            assert!(
                (measured / std - 1.0).abs() < 0.02,
                "{scheme:?}: {measured} is not {std}"
            );
            assert!(mean.abs() < 0.02 * std, "{scheme:?}: mean {mean}");
        }
        assert_eq!(
            values(&init.with_scheme(Scheme::XavierUniform).bias(4, 9)),
            [0.0; 4]
        );
    }

    #[test]
    fn parameters_require_gradients_where_the_device_differentiates() {
        let param = Init::new(1, &Device::flex().autodiff()).constant([2], 1.0);
        assert!(param.val().is_require_grad());
        let plain = Init::new(1, &Device::flex()).constant([2], 1.0);
        assert!(!plain.val().is_require_grad());
    }
}
