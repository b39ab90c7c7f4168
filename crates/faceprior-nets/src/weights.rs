//! Weights in files: safetensors under PyTorch's state-dict names, each file describing itself.
//!
//! [`Weights`] is what such a file holds: named tensors, and metadata strings. [`Weights::from_module`] takes them
//! out of a network and [`Weights::load_into`] puts them back, strictly: every parameter must be there with its
//! shape, and nothing else under the prefix. What PyTorch's `load_state_dict` expects is written, so each BatchNorm
//! also gets a `num_batches_tracked`; it is ignored on reading.
//!
//! Metadata keys of this project: `faceprior.kind` (which network), `faceprior.config` (its config as JSON, enough
//! to build it again), `faceprior.provenance`, `faceprior.recipe_hash`, `faceprior.license`.
//!
//! Format: <https://huggingface.co/docs/safetensors>.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Metadata key: which network the file holds, such as `recognizer`.
pub const KIND: &str = "faceprior.kind";
/// Metadata key: the network's config as JSON.
pub const CONFIG: &str = "faceprior.config";
/// Metadata key: where the weights come from, in words.
pub const PROVENANCE: &str = "faceprior.provenance";
/// Metadata key: the hash of the recipe that trained them.
pub const RECIPE_HASH: &str = "faceprior.recipe_hash";
/// Metadata key: the licence of the weights.
pub const LICENSE: &str = "faceprior.license";

const NUM_BATCHES_TRACKED: &str = "num_batches_tracked";

/// Why weights could not be read, written or put into a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The operating system's answer.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not a safetensors file, or not all of one.
    #[error("cannot read {path:?} as safetensors: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, perhaps with a hint.
        problem: String,
    },
    /// The weights do not fit the network.
    #[error("cannot load {origin}: {problem}")]
    Mismatch {
        /// The file, or `weights` for those that were never in one.
        origin: String,
        /// The tensor, its shape, the expected one, perhaps with a hint.
        problem: String,
    },
    /// The file does not say, or says in an unknown way, what it holds.
    #[error("cannot use {origin}: {problem}")]
    Description {
        /// The file, or `weights` for those that were never in one.
        origin: String,
        /// What is missing or wrong, perhaps with a hint.
        problem: String,
    },
}

/// Named tensors and metadata strings; see the [module](self).
///
/// Floats are f32: half, bfloat16 and double precision are converted when read. Integers and booleans are i64.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, TensorData>,
    metadata: BTreeMap<String, String>,
    path: Option<PathBuf>,
}

impl Weights {
    /// No tensors, no metadata.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a safetensors file whole.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Format`] for a file that is something else, is truncated, declares more
    /// than it holds (checked before anything is allocated), or has tensors of a type that is not known here.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        let (tensors, metadata) = file::read(path)?;
        Ok(Self {
            tensors,
            metadata,
            path: Some(path.to_owned()),
        })
    }

    /// Writes a safetensors file: aside, synced to the disk, then renamed over `path`, so that a file of that name is
    /// at any moment either the old one or the whole new one. Equal weights give equal bytes.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; what was at `path` is then untouched.
    pub fn write(&self, path: &Path) -> Result<(), WeightsError> {
        file::write(path, &self.tensors, &self.metadata)
    }

    /// Takes every parameter and buffer out of a module, each under `prefix` + its path.
    pub fn from_module<M: Module>(module: &M, prefix: &str) -> Self {
        let mut visitor = Collect {
            path: ModulePath::new(prefix),
            tensors: BTreeMap::new(),
        };
        module.visit(&mut visitor);
        Self {
            tensors: visitor.tensors,
            ..Self::default()
        }
    }

    /// Puts the tensors under `prefix` into a module: all of them, and into each of its parameters and buffers.
    /// Parameters stay on their device and keep whether they require gradients.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] names the first tensor that is missing, has another shape, or has no place.
    pub fn load_into<M: Module>(&self, module: M, prefix: &str) -> Result<M, WeightsError> {
        let mut mapper = Load {
            path: ModulePath::new(prefix),
            weights: self,
            used: BTreeSet::new(),
            problem: None,
        };
        let module = module.map(&mut mapper);
        let problem = mapper.problem.or_else(|| self.unused(prefix, &mapper.used));
        match problem {
            None => Ok(module),
            Some(problem) => Err(WeightsError::Mismatch {
                origin: self.origin(),
                problem,
            }),
        }
    }

    fn unused(&self, prefix: &str, used: &BTreeSet<String>) -> Option<String> {
        let mut extra = self
            .tensors
            .keys()
            .filter(|name| name.starts_with(prefix) && !used.contains(*name) && !is_batch_counter(name));
        let first = extra.next()?;
        let others = match extra.count() {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        Some(format!(
            "the network has no place for {first}{others}{}",
            self.self_description_hint()
        ))
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The data of a tensor.
    pub fn get(&self, name: &str) -> Option<&TensorData> {
        self.tensors.get(name)
    }

    /// A tensor of floats on a device.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] if it is missing, of another rank, or not floats.
    pub fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Result<Tensor<D>, WeightsError> {
        let mismatch = |problem| WeightsError::Mismatch {
            origin: self.origin(),
            problem,
        };
        let data = self
            .tensors
            .get(name)
            .ok_or_else(|| mismatch(format!("{name} is missing{}", self.self_description_hint())))?;
        if data.dtype() != DType::F32 {
            return Err(mismatch(format!("{name} holds integers, expected floats")));
        }
        if data.shape().num_dims() != D {
            return Err(mismatch(format!(
                "{name} is {}, expected {D} dimensions",
                shape_of(data)
            )));
        }
        Ok(Tensor::from_data(data.clone(), device))
    }

    /// Adds or replaces a tensor.
    ///
    /// # Panics
    /// If the data is neither f32 nor i64.
    pub fn insert(&mut self, name: &str, data: TensorData) {
        assert!(
            matches!(data.dtype(), DType::F32 | DType::I64),
            "weights hold f32 and i64, not {:?}",
            data.dtype()
        );
        self.tensors.insert(name.to_owned(), data);
    }

    /// Adds or replaces a tensor of floats.
    pub fn insert_tensor<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) {
        self.insert(name, tensor.into_data().convert::<f32>());
    }

    /// Adds the tensors and metadata of `other`, which win over those of the same name.
    pub fn extend(&mut self, other: Weights) {
        self.tensors.extend(other.tensors);
        self.metadata.extend(other.metadata);
    }

    /// Only the tensors whose names satisfy `keep`, with all metadata.
    pub fn subset(&self, keep: impl Fn(&str) -> bool) -> Weights {
        let tensors = self.tensors.iter().filter(|(name, _)| keep(name));
        Weights {
            tensors: tensors.map(|(name, data)| (name.clone(), data.clone())).collect(),
            metadata: self.metadata.clone(),
            path: self.path.clone(),
        }
    }

    /// A metadata string.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Sets a metadata string.
    pub fn set_metadata(&mut self, key: &str, value: impl Into<String>) {
        self.metadata.insert(key.to_owned(), value.into());
    }

    /// All metadata, sorted by key.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Says which network these are the weights of, so that [`Weights::config`] can build it again.
    ///
    /// # Panics
    /// If the config has no JSON form (a map with keys that are not strings, or a failing `Serialize`).
    pub fn describe(&mut self, kind: &str, config: &impl Serialize) {
        let json = serde_json::to_string(config).expect("a network's config is plain data");
        self.set_metadata(KIND, kind);
        self.set_metadata(CONFIG, json);
    }

    /// Which network the file says it holds.
    pub fn kind(&self) -> Option<&str> {
        self.metadata(KIND)
    }

    /// The config of the network, which must be of the given kind.
    ///
    /// # Errors
    /// [`WeightsError::Description`] if the file holds another kind, does not say, or has a config that does not parse.
    pub fn config<T: DeserializeOwned>(&self, kind: &str) -> Result<T, WeightsError> {
        let wrong = |problem| WeightsError::Description {
            origin: self.origin(),
            problem,
        };
        match self.kind() {
            None => Err(wrong(format!(
                "it does not say what it holds (no {KIND} in its metadata), expected {kind}\n\
                 hint: weights from elsewhere must be imported first"
            ))),
            Some(other) if other != kind => Err(wrong(format!("it holds {other}, expected {kind}"))),
            Some(_) => {
                let json = self.metadata(CONFIG).unwrap_or_default();
                serde_json::from_str(json)
                    .map_err(|error| wrong(format!("its description of the {kind} does not parse: {error}")))
            }
        }
    }

    /// The file for messages: its quoted path, or `weights`.
    pub fn origin(&self) -> String {
        self.path
            .as_ref()
            .map_or_else(|| "weights".to_owned(), |path| format!("{path:?}"))
    }

    /// What the file says or seems to be, for the end of a message.
    fn self_description_hint(&self) -> String {
        if let Some(kind) = self.kind() {
            return format!("\nhint: the file says that it holds: {kind}");
        }
        let holds = |part: &str| self.names().any(|name| name.contains(part));
        let guess = if holds("styles.0.") {
            "an encoder"
        } else if holds("input_layer.0.") && holds("output_layer.") {
            "a recogniser"
        } else if holds("mapping.layers.") {
            "a generator"
        } else if holds("linear7.") {
            "a MobileFaceNet"
        } else {
            return String::new();
        };
        format!("\nhint: the file seems to hold {guess}")
    }
}

/// Where a visitor stands in a module: the prefix, and the names that lead there.
#[derive(Debug)]
pub(crate) struct ModulePath {
    prefix: String,
    names: Vec<String>,
    /// The type of the struct that holds the parameter, such as `Struct:BatchNorm`.
    containers: Vec<String>,
}

impl ModulePath {
    pub(crate) fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            names: Vec::new(),
            containers: Vec::new(),
        }
    }

    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        self.names.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    pub(crate) fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    /// The state-dict key of the parameter being visited.
    pub(crate) fn key(&self) -> String {
        format!("{}{}", self.prefix, self.names.join("."))
    }

    /// The last name, and the struct that it is a field of.
    pub(crate) fn field(&self) -> (&str, &str) {
        let name = self.names.last().map_or("", String::as_str);
        let container = self.containers.last().map_or("", String::as_str);
        (name, container.strip_prefix("Struct:").unwrap_or(container))
    }
}

fn is_batch_counter(name: &str) -> bool {
    name.rsplit('.').next() == Some(NUM_BATCHES_TRACKED)
}

fn shape_of(data: &TensorData) -> String {
    format!("{:?}", data.shape().as_slice())
}

struct Collect {
    path: ModulePath,
    tensors: BTreeMap<String, TensorData>,
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let key = self.path.key();
        if self.path.field() == ("running_var", "BatchNorm") {
            let counter = key.replace("running_var", NUM_BATCHES_TRACKED);
            self.tensors
                .insert(counter, TensorData::new(vec![0i64], Vec::<usize>::new()));
        }
        self.tensors.insert(key, param.val().into_data().convert::<f32>());
    }
}

struct Load<'a> {
    path: ModulePath,
    weights: &'a Weights,
    used: BTreeSet<String>,
    problem: Option<String>,
}

impl Load<'_> {
    fn find(&self, key: &str, expected: &[usize]) -> Result<TensorData, String> {
        let Some(data) = self.weights.get(key) else {
            return Err(format!(
                "{key} is missing, expected {expected:?}{}",
                self.weights.self_description_hint()
            ));
        };
        if data.shape().as_slice() != expected {
            let hint = shape_hint(data.shape().as_slice(), expected);
            return Err(format!(
                "{key} is {}, expected {expected:?}{hint}",
                shape_of(data)
            ));
        }
        if data.dtype() != DType::F32 {
            return Err(format!("{key} holds integers, expected floats"));
        }
        Ok(data.clone())
    }
}

/// What the commonest differences mean.
fn shape_hint(got: &[usize], expected: &[usize]) -> &'static str {
    match (got, expected) {
        ([o, 3, k, l], [p, 6, m, n]) if (o, k, l) == (p, m, n) => {
            "\nhint: the file's network sees the picture alone, this one the picture and the average image"
        }
        ([o, 6, k, l], [p, 3, m, n]) if (o, k, l) == (p, m, n) => {
            "\nhint: the file's network sees the picture and an average image, this one the picture alone"
        }
        ([o, i], [p, j]) if o == p && i != j => "\nhint: is it the same image size and width?",
        _ => "",
    }
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.problem.is_some() {
            return param;
        }
        let key = self.path.key();
        match self.find(&key, param.lazy_shape().as_slice()) {
            Ok(data) => {
                self.used.insert(key);
                let tensor = Tensor::from_data(data, &param.lazy_device());
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(problem) => {
                self.problem = Some(problem);
                param
            }
        }
    }
}

#[cfg(test)]
mod tests;
