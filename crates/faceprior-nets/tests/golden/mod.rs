//! Reading the goldens, and measuring how far from them we are.

// Each test program uses a part.
#![allow(dead_code)]
// The errors are worth seeing, with --nocapture.
#![allow(clippy::print_stderr)]

pub(crate) mod networks;

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use faceprior_nets::fill::input;
use faceprior_nets::weights::Weights;

use networks::Tolerance;

/// A GPU by the feature this was built with; Mesa's lavapipe serves where there is none.
#[cfg(any(feature = "vulkan", feature = "wgpu"))]
pub(crate) fn gpu() -> burn::tensor::Device {
    use burn::tensor::{Device, DeviceKind};

    #[cfg(feature = "vulkan")]
    return Device::vulkan(DeviceKind::DefaultDevice);
    #[cfg(not(feature = "vulkan"))]
    return Device::wgpu(DeviceKind::DefaultDevice);
}

/// `<workspace>/goldens`.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens")
}

pub(crate) fn read(name: &str) -> Weights {
    Weights::read(&folder().join(name)).unwrap()
}

/// A list of names in `nets.json`.
pub(crate) fn names(key: &str) -> Vec<String> {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder().join("nets.json")).unwrap()).unwrap();
    serde_json::from_value(json[key].clone()).unwrap()
}

pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().unwrap()
}

/// Demands that the largest difference is at most `tolerance` of the largest golden number.
pub(crate) fn assert_close<const D: usize>(
    what: &str,
    got: Tensor<D>,
    golden: &Weights,
    key: &str,
    tolerance: f32,
) {
    compare(what, got, golden, key, tolerance).unwrap_or_else(|reason| panic!("{reason}"));
}

/// Whether the largest difference is at most `tolerance` of the largest golden number.
pub(crate) fn compare<const D: usize>(
    what: &str,
    got: Tensor<D>,
    golden: &Weights,
    key: &str,
    tolerance: f32,
) -> Result<(), String> {
    let expected = golden.get(key).unwrap_or_else(|| panic!("no golden {key}"));
    assert_eq!(&got.shape(), expected.shape(), "{what}");
    let (got, expected) = (numbers(got), expected.try_to_vec::<f32>().unwrap());
    let largest = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
    // NaN must not pass for a small difference.
    let error = got
        .iter()
        .zip(&expected)
        .map(|(g, e)| (g - e).abs())
        .fold(0.0f32, |m, d| if d <= m { m } else { d });
    eprintln!("{what}: relative error {:.1e}", error / largest);
    if error <= tolerance * largest {
        Ok(())
    } else {
        Err(format!("{what}: off by {error:e}, largest {largest:e}"))
    }
}

/// Runs a comparison with an input that differs from the golden's by up to `size` of itself, first not at all, until it
/// succeeds.
///
/// A rectifier whose input lies within single precision's rounding of zero is on one side of it or the other by
/// chance: of ten million such inputs a handful always does. Gradients, and penalties on gradients, jump between the
/// two sides; in training the gradients before a squeeze-and-excitation gate, where almost everything cancels, by up
/// to 1.5e-3 of themselves (PyTorch's, channels last, by 8e-4). Where a batch of four is normalised at the end, the four
/// numbers of a channel may lie so close together that what is divided by their spread is rounding by more than a ten
/// thousandth. Offsets settle both; then everything must be the golden's.
pub(crate) fn on_the_goldens_side<const D: usize>(
    size: f64,
    device: &Device,
    compare: impl Fn(&dyn Fn(Tensor<D>) -> Tensor<D>) -> Result<(), String>,
) {
    let mut reasons = Vec::new();
    for attempt in 0..16 {
        let size = if attempt == 0 { 0.0 } else { size };
        let moved = |x: Tensor<D>| {
            let offset = input(&format!("rounding.{attempt}"), x.dims(), size, device);
            x.clone() + x * offset
        };
        match compare(&moved) {
            Ok(()) => return,
            Err(reason) => reasons.push(reason),
        }
    }
    panic!("no input within {size:e} of the golden's agrees with it: {reasons:#?}");
}

/// Demands that the L2 norm of every parameter's gradient is the golden one.
pub(crate) fn assert_gradient_norms<M: Module>(
    what: &str,
    module: &M,
    gradients: &Gradients,
    expected: (&Weights, String),
    names: &[String],
    tolerance: Tolerance,
) {
    let compared = compare_gradient_norms(what, module, gradients, expected, names, tolerance);
    compared.unwrap_or_else(|reason| panic!("{reason}"));
}

/// Whether the L2 norm of every parameter's gradient is the golden one, and if not, which is not.
pub(crate) fn compare_gradient_norms<M: Module>(
    what: &str,
    module: &M,
    gradients: &Gradients,
    (golden, key): (&Weights, String),
    names: &[String],
    tolerance: Tolerance,
) -> Result<(), String> {
    let expected: Vec<f32> = golden.get(&key).unwrap().try_to_vec().unwrap();
    assert_eq!(names.len(), expected.len());
    let mut norms = Norms {
        path: Vec::new(),
        gradients,
        found: Vec::new(),
    };
    module.visit(&mut norms);
    let largest = expected.iter().fold(0.0f64, |m, &e| m.max(f64::from(e)));
    let mut worst = (0.0, "");
    assert_eq!(
        norms.found.len(),
        names.len(),
        "{what}: parameters with a gradient"
    );
    for (name, &expected) in names.iter().zip(&expected) {
        let norm = norms
            .found
            .iter()
            .find(|(found, _)| name.ends_with(found.as_str()));
        let (_, norm) = norm.unwrap_or_else(|| panic!("{what}: no gradient of {name}"));
        let expected = f64::from(expected);
        let error = (norm - expected).abs() / expected.max(tolerance.floor * largest);
        let is_gate = name.contains(".fc1.") || name.contains(".fc2.");
        let allowed = if is_gate {
            tolerance.gates
        } else {
            tolerance.gradient
        };
        if error.is_nan() || error > allowed {
            return Err(format!(
                "{what}: gradient of {name} has norm {norm:e}, expected {expected:e}"
            ));
        }
        if error > worst.0 {
            worst = (error, name);
        }
    }
    eprintln!(
        "{what}: gradient norms within {:.1e} (worst: {})",
        worst.0, worst.1
    );
    Ok(())
}

struct Norms<'a> {
    path: Vec<String>,
    gradients: &'a Gradients,
    found: Vec<(String, f64)>,
}

impl ModuleVisitor for Norms<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            let norm = numbers(gradient)
                .iter()
                .map(|&g| f64::from(g).powi(2))
                .sum::<f64>()
                .sqrt();
            self.found.push((self.path.join("."), norm));
        }
    }
}
