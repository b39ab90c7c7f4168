//! Optimisers with PyTorch's semantics, and the moving average of a module.
//!
//! | rule | update of a parameter p with gradient g |
//! |---|---|
//! | SGD | g ← g + λp; b ← μb + g (b = g at first); p ← p − ηb |
//! | Adam (Kingma and Ba 2015) | m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; p ← p − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε) |
//! | Ranger | gradient centralisation, RAdam (Liu et al. 2020), Lookahead (Zhang et al. 2019) with k 6, α ½ |
//!
//! State is kept by parameter path (`body.3.res_layer.1.weight`), so it outlives the module object and goes to a
//! checkpoint under readable names. A parameter without a gradient is left alone, and so is its state.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use faceprior_nets::weights::{Weights, WeightsError};
use faceprior_ops::{AdamStep, RangerStep, SgdStep, adam_step, moving_average, ranger_step, sgd_step};

/// A parameter as an optimiser sees it.
#[derive(Clone, Copy, Debug)]
pub struct ParamRef<'a> {
    /// Dotted path in its module, PyTorch's name.
    pub path: &'a str,
    /// Whether it is the scale or shift of a batch normalisation.
    pub batch_norm: bool,
    /// Values of each output, where the parameter has more than one axis.
    pub of_output: Option<usize>,
}

/// Everything decays but the parameters of BatchNorm: the rule of stage 3.
pub fn all_but_batch_norm(param: &ParamRef) -> bool {
    !param.batch_norm
}

#[derive(Clone, Debug)]
enum Rule {
    Sgd {
        momentum: f64,
        weight_decay: f64,
        decays: fn(&ParamRef) -> bool,
    },
    Adam {
        betas: [f64; 2],
        eps: f64,
    },
    Ranger {
        weight_decay: f64,
    },
}

/// What an optimiser remembers of one parameter: updates so far and flat tensors, in the order of the rule's names.
#[derive(Clone, Debug)]
struct Slot {
    updates: u64,
    tensors: Vec<Tensor<1>>,
}

/// An optimiser and its state; see the [module](self).
#[derive(Clone, Debug)]
pub struct Optimizer {
    rule: Rule,
    slots: BTreeMap<String, Slot>,
}

impl Optimizer {
    /// Stochastic gradient descent with momentum (dampening 0) and decay of the parameters for which `decays` holds.
    pub fn sgd(momentum: f64, weight_decay: f64, decays: fn(&ParamRef) -> bool) -> Self {
        Self::new(Rule::Sgd {
            momentum,
            weight_decay,
            decays,
        })
    }

    /// Adam with ε 1e-8.
    pub fn adam(betas: [f64; 2]) -> Self {
        Self::new(Rule::Adam { betas, eps: 1e-8 })
    }

    /// Ranger with betas (0.95, 0.999), ε 1e-5 and decoupled decay.
    pub fn ranger(weight_decay: f64) -> Self {
        Self::new(Rule::Ranger { weight_decay })
    }

    fn new(rule: Rule) -> Self {
        Self {
            rule,
            slots: BTreeMap::new(),
        }
    }

    /// Takes one step: every parameter of `module` that has a gradient moves, and its gradient is taken out of
    /// `gradients`. An updated parameter is a fresh leaf that requires a gradient.
    pub fn step<M: Module>(&mut self, module: M, gradients: &mut Gradients, learning_rate: f64) -> M {
        module.map(&mut Step {
            optimizer: self,
            gradients,
            learning_rate,
            path: Path::default(),
        })
    }

    /// The state, each tensor under `prefix` + parameter + `.` + its name in PyTorch.
    pub fn state(&self, prefix: &str) -> Weights {
        let mut weights = Weights::new();
        for (param, slot) in &self.slots {
            weights.insert(
                &format!("{prefix}{param}.{UPDATES}"),
                TensorData::new(vec![slot.updates as i64], [1]),
            );
            for (name, tensor) in self.rule.names().iter().zip(&slot.tensors) {
                weights.insert_tensor(&format!("{prefix}{param}.{name}"), tensor.clone());
            }
        }
        weights
    }

    /// Puts back what [`state`](Self::state) gave, replacing the present state.
    ///
    /// # Errors
    /// State of another rule, or a tensor that is missing or malformed.
    pub fn load_state(
        &mut self,
        weights: &Weights,
        prefix: &str,
        device: &Device,
    ) -> Result<(), WeightsError> {
        let device = device.clone().without_autodiff();
        let mismatch = |problem| WeightsError::Mismatch {
            origin: weights.origin(),
            problem,
        };
        let names = self.rule.names();
        let mut slots = BTreeMap::new();
        for name in weights.names().filter(|name| name.starts_with(prefix)) {
            let (param, kind) = name[prefix.len()..].rsplit_once('.').unwrap_or((name, ""));
            if kind != UPDATES {
                if !names.contains(&kind) {
                    return Err(mismatch(format!(
                        "{name} is no state of this optimiser, which keeps {}",
                        names.join(" and ")
                    )));
                }
                continue;
            }
            let updates = weights
                .get(name)
                .filter(|data| data.dtype() == DType::I64)
                .and_then(|data| data.as_slice::<i64>().ok()?.first().copied())
                .ok_or_else(|| mismatch(format!("{name} is not a count")))?;
            let tensors = names
                .iter()
                .map(|slot| weights.tensor::<1>(&format!("{prefix}{param}.{slot}"), &device))
                .collect::<Result<Vec<_>, _>>()?;
            slots.insert(
                param.to_owned(),
                Slot {
                    updates: updates as u64,
                    tensors,
                },
            );
        }
        self.slots = slots;
        Ok(())
    }
}

const UPDATES: &str = "step";

const RANGER_BETAS: [f64; 2] = [0.95, 0.999];
const RANGER_EPS: f64 = 1e-5;
const RANGER_N_SMA_THRESHOLD: f64 = 5.0;
const LOOKAHEAD_K: u64 = 6;
const LOOKAHEAD_ALPHA: f64 = 0.5;

impl Rule {
    /// Names of a slot's tensors, as in PyTorch's optimisers.
    fn names(&self) -> &'static [&'static str] {
        match self {
            Rule::Sgd { .. } => &["momentum_buffer"],
            Rule::Adam { .. } => &["exp_avg", "exp_avg_sq"],
            Rule::Ranger { .. } => &["exp_avg", "exp_avg_sq", "slow_buffer"],
        }
    }

    /// One flat parameter and its gradient; none of the tensors are tracked.
    fn update(
        &self,
        slot: Option<Slot>,
        param: &ParamRef,
        p: Tensor<1>,
        g: Tensor<1>,
        rate: f64,
    ) -> (Tensor<1>, Slot) {
        let updates = slot.as_ref().map_or(0, |slot| slot.updates) + 1;
        let t = updates as f64;
        match *self {
            Rule::Sgd {
                momentum,
                weight_decay,
                decays,
            } => {
                let [buffer] = state_of(slot, &p);
                let step = SgdStep {
                    learning_rate: rate,
                    momentum,
                    weight_decay: if decays(param) { weight_decay } else { 0.0 },
                };
                let (p, buffer) = sgd_step(p, g, buffer, step);
                let tensors = vec![buffer];
                (p, Slot { updates, tensors })
            }
            Rule::Adam {
                betas: betas @ [beta1, beta2],
                eps,
            } => {
                let step = AdamStep {
                    betas,
                    eps,
                    step_size: rate / (1.0 - beta1.powf(t)),
                    correction: (1.0 - beta2.powf(t)).sqrt(),
                };
                let moments = state_of(slot, &p);
                let (p, moments) = adam_step(p, g, moments, step);
                let tensors = moments.to_vec();
                (p, Slot { updates, tensors })
            }
            Rule::Ranger { weight_decay } => {
                let [beta1, beta2] = RANGER_BETAS;
                let n_max = 2.0 / (1.0 - beta2) - 1.0;
                let decayed = beta2.powf(t);
                let n = n_max - 2.0 * t * decayed / (1.0 - decayed);
                let unbias = 1.0 / (1.0 - beta1.powf(t));
                let rectified = (n > RANGER_N_SMA_THRESHOLD).then(|| {
                    ((1.0 - decayed) * (n - 4.0) / (n_max - 4.0) * (n - 2.0) / n * n_max / (n_max - 2.0))
                        .sqrt()
                });
                let step = RangerStep {
                    centred: param.of_output,
                    betas: RANGER_BETAS,
                    eps: rectified.map(|_| RANGER_EPS),
                    decay: 1.0 - rate * weight_decay,
                    step_size: rate * rectified.unwrap_or(1.0) * unbias,
                    lookahead: updates.is_multiple_of(LOOKAHEAD_K).then_some(LOOKAHEAD_ALPHA),
                };
                let state = match slot {
                    Some(_) => state_of(slot, &p),
                    None => [p.zeros_like(), p.zeros_like(), p.clone()],
                };
                let (p, state) = ranger_step(p, g, state, step);
                let tensors = state.to_vec();
                (p, Slot { updates, tensors })
            }
        }
    }
}

/// The tensors of a slot, zeros at first.
fn state_of<const N: usize>(slot: Option<Slot>, like: &Tensor<1>) -> [Tensor<1>; N] {
    let mut tensors = slot.map_or_else(Vec::new, |slot| slot.tensors).into_iter();
    std::array::from_fn(|_| tensors.next().unwrap_or_else(|| like.zeros_like()))
}

struct Step<'a> {
    optimizer: &'a mut Optimizer,
    gradients: &'a mut Gradients,
    learning_rate: f64,
    path: Path,
}

impl ModuleMapper for Step<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = param.base().grad_remove(self.gradients) else {
            return param;
        };
        let rule = &self.optimizer.rule;
        let (id, value, mapper) = param.consume();
        let shape = value.dims();
        let size: usize = shape.iter().product();
        let path = self.path.join();
        let slot = self.optimizer.slots.remove(&path);
        let (value, slot) = rule.update(
            slot,
            &ParamRef {
                path: &path,
                batch_norm: self.path.in_batch_norm(),
                of_output: (D > 1).then(|| size / shape[0].max(1)),
            },
            value.without_autodiff().reshape([size]),
            gradient.reshape([size]),
            self.learning_rate,
        );
        self.optimizer.slots.insert(path, slot);
        Param::from_mapped_value(id, value.reshape(shape).autodiff().require_grad(), mapper)
    }
}

/// Where a visitor stands in a module.
#[derive(Default)]
struct Path {
    names: Vec<String>,
    containers: Vec<String>,
}

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        self.names.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    fn join(&self) -> String {
        self.names.join(".")
    }

    fn in_batch_norm(&self) -> bool {
        self.containers
            .last()
            .is_some_and(|container| container == "Struct:BatchNorm")
    }
}

/// Lets all parameters of a module learn, or rest. BatchNorm statistics are none and go on.
pub fn set_trainable<M: Module>(module: M, trainable: bool) -> M {
    module.set_require_grad(trainable)
}

/// How much of the old average the n-th update (from 1) keeps: min(decay, (1 + n)/(10 + n)), so that an average
/// started from random weights forgets them soon.
pub fn ema_decay(decay: f64, n: u64) -> f64 {
    decay.min((1.0 + n as f64) / (10.0 + n as f64))
}

/// Moves an averaged copy towards `source`: learnt parameters by `average ← decay·average + (1 − decay)·source`,
/// buffers by taking the source's. The copy stays off the gradient graph.
pub fn update_average<M: Module>(average: M, source: &M, decay: f64) -> M {
    let mut collect = Collect {
        path: Path::default(),
        tensors: BTreeMap::new(),
    };
    source.visit(&mut collect);
    average.map(&mut Average {
        path: Path::default(),
        source: collect.tensors,
        decay,
    })
}

struct Collect {
    path: Path,
    tensors: BTreeMap<String, (Tensor<1>, bool)>,
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.base();
        let learnt = value.is_require_grad();
        let size = value.dims().iter().product::<usize>();
        self.tensors.insert(
            self.path.join(),
            (value.without_autodiff().reshape([size]), learnt),
        );
    }
}

struct Average {
    path: Path,
    source: BTreeMap<String, (Tensor<1>, bool)>,
    decay: f64,
}

impl ModuleMapper for Average {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((source, learnt)) = self.source.remove(&self.path.join()) else {
            return param;
        };
        let decay = self.decay;
        param.map(|average| {
            let shape = average.dims();
            if learnt {
                let average = average.without_autodiff().flatten(0, D - 1);
                moving_average(average, source, decay).reshape(shape)
            } else {
                source.reshape(shape)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faceprior_nets::fill::unit;
    use faceprior_nets::init::Init;
    use faceprior_nets::layers::{BatchNorm, Mode};

    #[derive(Module, Debug)]
    struct Three {
        conv: Param<Tensor<4>>,
        linear: Param<Tensor<2>>,
        bias: Param<Tensor<1>>,
    }

    fn golden_data(name: &str, shape: &[usize]) -> TensorData {
        let n = shape.iter().product();
        let values: Vec<f32> = unit(name, n).into_iter().map(|x| x as f32).collect();
        TensorData::new(values, shape.to_vec())
    }

    fn golden_module(device: &Device) -> Three {
        let param = |name: &str, shape: &[usize]| golden_data(&format!("g.ranger.{name}"), shape);
        Three {
            conv: Param::from_data(param("conv", &[4, 3, 3, 3]), device),
            linear: Param::from_data(param("linear", &[5, 7]), device),
            bias: Param::from_data(param("bias", &[6]), device),
        }
    }

    /// Gradients that a golden run prescribes, as those of Σ p·g.
    fn golden_gradients(module: &Three, t: usize, device: &Device) -> Gradients {
        let gradient = |name: &str, shape: &[usize]| golden_data(&format!("g.ranger.{name}.grad{t}"), shape);
        let conv = Tensor::<4>::from_data(gradient("conv", &[4, 3, 3, 3]), device);
        let linear = Tensor::<2>::from_data(gradient("linear", &[5, 7]), device);
        let bias = Tensor::<1>::from_data(gradient("bias", &[6]), device);
        let loss = (module.conv.val() * conv).sum()
            + (module.linear.val() * linear).sum()
            + (module.bias.val() * bias).sum();
        loss.backward()
    }

    fn follows_golden(mut optimizer: Optimizer, golden: &str, rate: f64, steps: usize) {
        let device = Device::flex().autodiff();
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../goldens/optimizers.safetensors"
        );
        let goldens = Weights::read(path.as_ref()).unwrap();
        let mut module = golden_module(&device);
        for t in 0..steps {
            let mut gradients = golden_gradients(&module, t, &device);
            module = optimizer.step(module, &mut gradients, rate);
            let here = Weights::from_module(&module, "");
            for name in ["conv", "linear", "bias"] {
                let got: Vec<f32> = here.get(name).unwrap().try_to_vec().unwrap();
                let golden_name = format!("{golden}.{name}.step{}", t + 1);
                let expected: Vec<f32> = goldens.get(&golden_name).unwrap().try_to_vec().unwrap();
                for (got, expected) in got.iter().zip(&expected) {
                    assert!(
                        (got - expected).abs() <= 1e-6 + 1e-5 * expected.abs(),
                        "{golden_name}: {got} {expected}"
                    );
                }
            }
        }
        assert!(
            module.conv.val().is_require_grad(),
            "an updated parameter is a leaf again"
        );
    }

    fn not_the_bias(param: &ParamRef) -> bool {
        param.path != "bias"
    }

    #[test]
    fn sgd_follows_pytorch() {
        follows_golden(Optimizer::sgd(0.9, 2e-3, not_the_bias), "sgd", 0.03, 5);
    }

    #[test]
    fn adam_follows_pytorch() {
        follows_golden(Optimizer::adam([0.0, 0.99]), "adam", 0.002, 5);
    }

    #[test]
    fn ranger_follows_the_reference() {
        follows_golden(Optimizer::ranger(0.0), "wd0.0", 1e-2, 14);
        follows_golden(Optimizer::ranger(0.01), "wd0.01", 1e-2, 14);
    }

    #[derive(Module, Debug)]
    struct WithNorm {
        norm: BatchNorm,
        slope: Param<Tensor<1>>,
    }

    #[test]
    fn decay_leaves_batch_norm_alone_and_frozen_parameters_do_not_move() {
        let device = Device::flex().autodiff();
        let mut init = Init::new(1, &device);
        let module = WithNorm {
            norm: BatchNorm::new(&mut init, 3),
            slope: init.constant([3], 2.0),
        };
        // A loss with zero gradients: what moves, moves by decay.
        let zero = |module: &WithNorm| {
            let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]], &device);
            let y = module.norm.forward_vectors(x, Mode::Train) * module.slope.val().unsqueeze();
            y.mul_scalar(0.0).sum().backward()
        };
        let mut sgd = Optimizer::sgd(0.0, 0.5, all_but_batch_norm);
        let moved = sgd.step(module.clone(), &mut zero(&module), 1.0);
        let first = |tensor: Tensor<1>| tensor.into_data().try_to_vec::<f32>().unwrap()[0];
        assert_eq!(first(moved.norm.weight.val()), 1.0);
        assert_eq!(first(moved.slope.val()), 1.0);

        let mut frozen = moved.clone();
        frozen.slope = frozen.slope.set_require_grad(false);
        let gradients = &mut zero(&frozen);
        let moved = Optimizer::sgd(0.0, 0.5, all_but_batch_norm).step(frozen, gradients, 1.0);
        assert_eq!(first(moved.slope.val()), 1.0);
        assert!(!moved.slope.val().is_require_grad());
    }

    #[test]
    fn state_survives_a_checkpoint_bit_by_bit() {
        let device = Device::flex().autodiff();
        for make in [
            || Optimizer::sgd(0.9, 1e-3, all_but_batch_norm),
            || Optimizer::adam([0.9, 0.99]),
            || Optimizer::ranger(0.0),
        ] {
            let run = |mut module: Three, optimizer: &mut Optimizer, steps: std::ops::Range<usize>| {
                for t in steps {
                    let mut gradients = golden_gradients(&module, t, &device);
                    module = optimizer.step(module, &mut gradients, 0.01);
                }
                module
            };
            let mut whole = make();
            let expected = run(golden_module(&device), &mut whole, 0..9);
            let mut first = make();
            let half = run(golden_module(&device), &mut first, 0..4);
            let mut second = make();
            second.load_state(&first.state("o."), "o.", &device).unwrap();
            let got = run(half, &mut second, 4..9);
            let (expected, got) = (
                Weights::from_module(&expected, ""),
                Weights::from_module(&got, ""),
            );
            for name in expected.names() {
                assert_eq!(expected.get(name), got.get(name), "{name}");
            }
        }
    }

    #[test]
    fn state_of_another_rule_is_refused() {
        let device = Device::flex().autodiff();
        let module = golden_module(&device);
        let mut adam = Optimizer::adam([0.0, 0.99]);
        adam.step(module.clone(), &mut golden_gradients(&module, 0, &device), 0.01);
        let mut sgd = Optimizer::sgd(0.9, 0.0, all_but_batch_norm);
        let error = sgd
            .load_state(&adam.state(""), "", &device)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exp_avg is no state of this optimiser, which keeps momentum_buffer"),
            "{error}"
        );
    }

    #[test]
    fn the_average_follows_parameters_slowly_and_buffers_at_once() {
        let device = Device::flex().autodiff();
        let mut init = Init::new(1, &device);
        let source = WithNorm {
            norm: BatchNorm::new(&mut init, 3),
            slope: init.constant([3], 2.0),
        };
        let mut average = source.valid();
        average.slope = Param::from_data([1.0f32, 1.0, 1.0], &Device::flex()).set_require_grad(false);
        source
            .norm
            .running_mean
            .set(Tensor::full([3], 7.0, &Device::flex()));
        let average = update_average(average, &source, 0.75);
        let values = |tensor: Tensor<1>| tensor.into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(values(average.slope.val()), [1.25; 3]);
        assert_eq!(values(average.norm.running_mean.get()), [7.0; 3]);
        assert!(!average.slope.val().is_autodiff());
        assert!(source.slope.val().is_require_grad());
        assert_eq!(ema_decay(0.995, 1), 2.0 / 11.0);
        assert_eq!(ema_decay(0.995, 1_000_000), 0.995);
    }
}
