//! Numbers that anyone can regenerate, for tests: the fill rule of the goldens.
//!
//! `unit(name, n)`: n numbers in [-1, 1) from the FNV-1a hash of a name and splitmix64. A tensor is
//! `unit(name, len)·scale + shift`, rounded to f32, row-major; a parameter's name is a prefix and its state-dict key.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};

use crate::weights::ModulePath;

/// `n` numbers in [-1, 1) that belong to `name`.
pub fn unit(name: &str, n: usize) -> Vec<f64> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (1..=n as u64)
        .map(|i| {
            let mut z = hash.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            (z >> 40) as f64 / f64::from(1 << 23) - 1.0
        })
        .collect()
}

fn data(name: &str, shape: &[usize], scale: f64, shift: f64) -> TensorData {
    let values = unit(name, shape.iter().product());
    TensorData::new(
        values
            .iter()
            .map(|u| (u * scale + shift) as f32)
            .collect::<Vec<f32>>(),
        shape.to_vec(),
    )
}

/// An input or cotangent: `unit(name)·scale`.
pub fn input<const D: usize>(name: &str, shape: [usize; D], scale: f64, device: &Device) -> Tensor<D> {
    Tensor::from_data(data(name, &shape, scale, 0.0), device)
}

/// Fills every parameter and buffer of a module by the goldens' table, under `prefix` + its key.
pub fn fill<M: Module>(module: M, prefix: &str) -> M {
    fill_by(module, prefix, scale_and_shift)
}

/// Fills a module by a rule of its own: (key, struct that holds the parameter, shape) → (scale, shift).
pub fn fill_by<M: Module>(module: M, prefix: &str, rule: fn(&str, &str, &[usize]) -> (f64, f64)) -> M {
    module.map(&mut Fill {
        path: ModulePath::new(prefix),
        rule,
    })
}

/// The goldens' table. `container` is the layer's type: plain layers are told by it from those of StyleGAN.
fn scale_and_shift(key: &str, container: &str, shape: &[usize]) -> (f64, f64) {
    let name = key.rsplit('.').next().unwrap_or_default();
    match (container, name) {
        ("BatchNorm", "weight") => (0.1, 1.0),
        ("BatchNorm", "running_var") => (0.25, 1.0),
        ("BatchNorm", _) => (0.1, 0.0),
        ("PRelu", "weight") => (0.05, 0.25),
        ("Conv2d" | "Linear", "weight") => ((3.0 / shape[1..].iter().product::<usize>() as f64).sqrt(), 0.0),
        (_, "bias") => (0.1, 0.0),
        (_, "weight") if key.contains("mapping.layers.") => (100.0 * 3.0_f64.sqrt(), 0.0),
        _ => (3.0_f64.sqrt(), 0.0),
    }
}

struct Fill {
    path: ModulePath,
    rule: fn(&str, &str, &[usize]) -> (f64, f64),
}

impl ModuleMapper for Fill {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (key, shape) = (self.path.key(), param.lazy_shape());
        let (scale, shift) = (self.rule)(&key, self.path.field().1, &shape);
        let tensor = Tensor::from_data(data(&key, &shape, scale, shift), &param.lazy_device());
        let id = param.id;
        param.transform_for_load(tensor, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_goldens() {
        // From fill.json of the goldens.
        let expected = [-0.5695267915725708, 0.09529411792755127, 0.9987534284591675];
        assert_eq!(unit("g.input.image", 3), expected);
    }
}
