use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};

use super::*;
use crate::init::Init;

#[derive(Module, Debug)]
struct Inner {
    weight: Param<Tensor<4>>,
}

#[derive(Module, Debug)]
struct Net {
    first: (Inner, Inner),
    bias: Option<Param<Tensor<1>>>,
}

fn net(seed: u64, device: &Device) -> Net {
    let mut init = Init::new(seed, device);
    let mut inner = |inputs| Inner {
        weight: init.normal([8, inputs, 3, 3], 1.0),
    };
    Net {
        first: (inner(6), inner(3)),
        bias: Some(Init::new(seed, device).uniform([8], 1.0)),
    }
}

fn values(weights: &Weights, name: &str) -> Vec<f32> {
    weights.get(name).unwrap().try_to_vec().unwrap()
}

fn message<T>(result: Result<T, WeightsError>) -> String {
    result.err().expect("this must fail").to_string()
}

/// A safetensors file written byte by byte.
fn file_with(header: &str, data: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_file_gives_back_what_was_written() {
    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a \"net\"\nof two lines.safetensors");
    let mut weights = Weights::from_module(&net(1, &device), "encoder.");
    assert_eq!(
        weights.names().collect::<Vec<_>>(),
        ["encoder.bias", "encoder.first.0.weight", "encoder.first.1.weight"]
    );
    weights.insert("labels", TensorData::new(vec![1i64, -2], [2]));
    weights.describe("net", &[3, 4]);
    weights.set_metadata(LICENSE, "MIT");
    weights.write(&path).unwrap();

    let read = Weights::read(&path).unwrap();
    assert_eq!(read.tensors, weights.tensors);
    assert_eq!(read.metadata, weights.metadata);
    assert_eq!(read.config::<Vec<u32>>("net").unwrap(), [3, 4]);
    let loaded = read
        .subset(|name| name != "labels")
        .load_into(net(2, &device), "encoder.")
        .unwrap();
    assert_eq!(
        Weights::from_module(&loaded, "encoder.").get("encoder.bias"),
        weights.get("encoder.bias")
    );
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing is left aside"
    );
}

#[test]
fn equal_weights_give_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |name: &str| {
        let mut weights = Weights::from_module(&net(1, &Device::flex()), "");
        for key in ["c", "a", "d", "b"] {
            weights.set_metadata(key, key.to_uppercase());
        }
        let path = folder.path().join(name);
        weights.write(&path).unwrap();
        std::fs::read(path).unwrap()
    };
    assert_eq!(bytes("one"), bytes("two"));
}

#[test]
fn the_safetensors_crate_reads_what_we_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let mut weights = Weights::new();
    weights.insert("f", TensorData::new(vec![1.5f32, -2.0, 0.25], [3]));
    weights.insert("i", TensorData::new(vec![7i64], Vec::<usize>::new()));
    weights.set_metadata("key", "a \"value\"");
    weights.write(&path).unwrap();

    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(
        file.tensor("f").unwrap().data(),
        [1.5f32, -2.0, 0.25].map(f32::to_le_bytes).concat()
    );
    assert_eq!(file.tensor("i").unwrap().shape(), [0usize; 0]);
    assert_eq!(file.tensor("i").unwrap().dtype(), safetensors::Dtype::I64);
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["key"], "a \"value\"");
}

#[test]
fn narrow_and_wide_floats_are_converted() {
    let header = r#"{"bf":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"d":{"dtype":"F64","shape":[1,1],"data_offsets":[4,12]},"h":{"dtype":"F16","shape":[2],"data_offsets":[12,16]},"u":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}"#;
    let mut data = vec![0x80, 0x3f, 0x20, 0xc0]; // 1.0, -2.5
    data.extend((-0.1f64).to_le_bytes());
    data.extend([0x00, 0x3c, 0x01, 0x00]); // 1.0, the smallest subnormal 2^-24
    data.extend([1, 2, 255]);
    let file = file_with(header, &data);
    let weights = Weights::read(file.path()).unwrap();
    assert_eq!(values(&weights, "bf"), [1.0, -2.5]);
    assert_eq!(values(&weights, "d"), [-0.1]);
    assert_eq!(values(&weights, "h"), [1.0, 2.0f32.powi(-24)]);
    assert_eq!(
        weights.get("u").unwrap().try_to_vec::<i64>().unwrap(),
        [1, 2, 255]
    );
}

#[test]
fn loading_is_strict() {
    let device = Device::flex();
    let weights = Weights::from_module(&net(1, &device), "");

    let mut missing = weights.subset(|name| name != "bias");
    let text = message(missing.load_into(net(2, &device), ""));
    assert_eq!(text, "cannot load weights: bias is missing, expected [8]");

    missing.insert("bias", TensorData::zeros::<f32, _>([8]));
    missing.insert("other.bias", TensorData::zeros::<f32, _>([8]));
    missing.describe("odd", &());
    let text = message(missing.load_into(net(2, &device), ""));
    assert!(
        text.contains("no place for other.bias\nhint: the file says that it holds: odd"),
        "{text}"
    );

    let mut counted = weights.clone();
    counted.insert(
        "first.0.num_batches_tracked",
        TensorData::new(vec![5i64], Vec::<usize>::new()),
    );
    counted.load_into(net(2, &device), "").unwrap();

    let mut plain = weights;
    plain.insert("first.0.weight", TensorData::zeros::<f32, _>([8, 3, 3, 3]));
    let text = message(plain.load_into(net(2, &device), ""));
    assert!(
        text.contains("first.0.weight is [8, 3, 3, 3], expected [8, 6, 3, 3]\nhint: "),
        "{text}"
    );
}

#[test]
fn loaded_parameters_keep_their_gradient_state() {
    let device = Device::flex().autodiff();
    let weights = Weights::from_module(&net(1, &device), "");
    let loaded = weights.load_into(net(2, &device), "").unwrap();
    assert!(loaded.first.0.weight.val().is_require_grad());
    let frozen = weights.load_into(net(2, &device).no_grad(), "").unwrap();
    assert!(!frozen.first.0.weight.val().is_require_grad());
}

#[test]
fn broken_files_are_clear_errors() {
    let error = |header: &str, data: &[u8]| {
        let file = file_with(header, data);
        let text = message(Weights::read(file.path()));
        assert!(
            text.contains(&format!("{:?}", file.path())),
            "{text} names the file"
        );
        text
    };
    let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(error(one, &[0; 7]).contains("it is truncated: 69 bytes, its header declares 70"));
    assert!(error(one, &[0; 9]).contains("trailing bytes"));
    // A shape that would need more memory than there is.
    let bomb = r#"{"a":{"dtype":"F32","shape":[1000000000000000],"data_offsets":[0,4000000000000000]}}"#;
    assert!(error(bomb, &[0; 8]).contains("truncated"));
    let wrong = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
    assert!(error(wrong, &[0; 8]).contains("header"));
    assert!(error("{}}", &[]).contains("header"));
    let exotic = r#"{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#;
    assert!(error(exotic, &[0; 2]).contains("F8_E4M3"));

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"abc").unwrap();
    assert!(message(Weights::read(file.path())).contains("only 3 bytes"));
    std::fs::write(file.path(), b"PK\x03\x04rest of a zip archive").unwrap();
    assert!(message(Weights::read(file.path())).contains("PyTorch checkpoint\nhint: "));
    std::fs::write(file.path(), [0xff; 64]).unwrap();
    assert!(message(Weights::read(file.path())).contains("truncated or another format"));
    assert!(
        message(Weights::read(Path::new("/no/such/file"))).starts_with("cannot read \"/no/such/file\": ")
    );
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    std::fs::create_dir_all(path.join("occupied")).unwrap(); // a folder cannot be replaced by a file
    let text = message(Weights::new().write(&path));
    assert!(text.starts_with("cannot write "), "{text}");
    assert!(path.join("occupied").is_dir());
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing is left aside"
    );
}

#[cfg(unix)]
#[test]
fn any_file_name_works() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder
        .path()
        .join(std::ffi::OsStr::from_bytes(b"caf\xe9 'net'\xff"));
    let weights = Weights::from_module(&net(1, &Device::flex()), "");
    weights.write(&path).unwrap();
    assert_eq!(Weights::read(&path).unwrap().tensors, weights.tensors);
}

#[test]
fn a_file_says_what_it_holds() {
    let mut weights = Weights::new();
    assert!(message(weights.config::<u32>("encoder")).contains("does not say what it holds"));
    weights.describe("generator", &7);
    assert_eq!(
        message(weights.config::<u32>("encoder")),
        "cannot use weights: it holds generator, expected encoder"
    );
    assert!(message(weights.config::<String>("generator")).contains("does not parse"));
    assert_eq!(weights.config::<u32>("generator").unwrap(), 7);
}
