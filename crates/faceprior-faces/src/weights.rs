//! The weights of MTCNN's three networks, which ship inside the program.
//!
//! They are facenet-pytorch's (MIT, see `weights/LICENSE-facenet-pytorch`), number for number.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

/// One parameter.
pub(crate) struct Parameter {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// The parameters of one network by name.
pub(crate) struct Tensors(BTreeMap<String, Parameter>);

impl Tensors {
    pub(crate) fn pnet() -> Self {
        Self::parse(include_bytes!("../weights/pnet.safetensors"))
    }

    pub(crate) fn rnet() -> Self {
        Self::parse(include_bytes!("../weights/rnet.safetensors"))
    }

    pub(crate) fn onet() -> Self {
        Self::parse(include_bytes!("../weights/onet.safetensors"))
    }

    /// Not a user's file: that it is whole is a property of the build, and a test of it.
    fn parse(bytes: &[u8]) -> Self {
        let file = SafeTensors::deserialize(bytes).expect("the embedded weights are a safetensors file");
        let parameter = |view: safetensors::tensor::TensorView<'_>| {
            assert_eq!(view.dtype(), Dtype::F32, "the embedded weights are f32");
            let (chunks, _) = view.data().as_chunks::<4>();
            Parameter {
                shape: view.shape().to_vec(),
                values: chunks.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            }
        };
        Self(
            file.tensors()
                .into_iter()
                .map(|(name, view)| (name, parameter(view)))
                .collect(),
        )
    }

    pub(crate) fn get(&self, name: &str) -> &Parameter {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("the embedded weights have no tensor {name:?}"))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.0.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }
}
