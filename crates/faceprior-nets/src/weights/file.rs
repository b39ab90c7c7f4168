//! The bytes of a safetensors file: eight bytes with the header's length, a JSON header, the tensors' data.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::{DType, TensorData, bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::WeightsError;

type Tensors = BTreeMap<String, TensorData>;
type Strings = BTreeMap<String, String>;

const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

pub(super) fn read(path: &Path) -> Result<(Tensors, Strings), WeightsError> {
    let io = |source| WeightsError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let format = |problem| WeightsError::Format {
        path: path.to_owned(),
        problem,
    };

    let mut file = File::open(path).map_err(io)?;
    let file_len = file.metadata().map_err(io)?.len();
    if file_len < LENGTH_BYTES {
        return Err(format(format!("it has only {file_len} bytes")));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(io)?;
    let header_len = u64::from_le_bytes(length);
    if header_len > MAX_HEADER.min(file_len - LENGTH_BYTES) {
        return Err(format(foreign_or_truncated(&length, header_len, file_len)));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| format(format!("its header: {error}")))?;

    let data_start = LENGTH_BYTES + header_len;
    let expected = data_start.saturating_add(header.data_len() as u64);
    if expected != file_len {
        let state = if expected > file_len {
            "it is truncated"
        } else {
            "it has trailing bytes"
        };
        return Err(format(format!(
            "{state}: {file_len} bytes, its header declares {expected}"
        )));
    }

    let mut infos: Vec<(String, &TensorInfo)> = header.tensors().into_iter().collect();
    infos.sort_by_key(|(_, info)| info.data_offsets);
    let mut tensors = Tensors::new();
    let mut bytes = Vec::new();
    for (name, info) in infos {
        let (start, end) = info.data_offsets;
        bytes.resize(end - start, 0);
        file.seek(SeekFrom::Start(data_start + start as u64))
            .map_err(io)?;
        file.read_exact(&mut bytes).map_err(io)?;
        let data = decode(&bytes, info).map_err(|problem| format(format!("{name} {problem}")))?;
        tensors.insert(name, data);
    }
    Ok((
        tensors,
        header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
    ))
}

fn foreign_or_truncated(first: &[u8; 8], header_len: u64, file_len: u64) -> String {
    if first.starts_with(b"PK\x03\x04") || first.starts_with(b"\x80\x02") {
        return "it is a PyTorch checkpoint\nhint: import it into safetensors first".to_owned();
    }
    if first.starts_with(b"version ") {
        return "it is a Git LFS pointer\nhint: fetch the file itself with `git lfs pull`".to_owned();
    }
    format!(
        "its header would have {header_len} bytes, the file has {file_len}: it is truncated or another format"
    )
}

fn decode(bytes: &[u8], info: &TensorInfo) -> Result<TensorData, String> {
    fn each<const B: usize, T>(bytes: &[u8], convert: impl Fn([u8; B]) -> T) -> Vec<T> {
        bytes
            .as_chunks::<B>()
            .0
            .iter()
            .map(|&chunk| convert(chunk))
            .collect()
    }
    let shape = info.shape.clone();
    let floats = match info.dtype {
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => {
            let integers = match info.dtype {
                Dtype::I64 => each(bytes, i64::from_le_bytes),
                Dtype::I32 => each(bytes, |b| i64::from(i32::from_le_bytes(b))),
                Dtype::I16 => each(bytes, |b| i64::from(i16::from_le_bytes(b))),
                Dtype::I8 => each(bytes, |b| i64::from(i8::from_le_bytes(b))),
                Dtype::U32 => each(bytes, |b| i64::from(u32::from_le_bytes(b))),
                Dtype::U16 => each(bytes, |b| i64::from(u16::from_le_bytes(b))),
                Dtype::U8 | Dtype::BOOL => each(bytes, |[b]: [u8; 1]| i64::from(b)),
                other => return Err(format!("is of type {other:?}, which is not supported")),
            };
            return Ok(TensorData::new(integers, shape));
        }
    };
    Ok(TensorData::new(floats, shape))
}

pub(super) fn write(path: &Path, tensors: &Tensors, metadata: &Strings) -> Result<(), WeightsError> {
    let aside = aside(path);
    let written = write_new(&aside, tensors, metadata)
        .and_then(|()| std::fs::rename(&aside, path))
        .and_then(|()| sync_directory(path));
    written.map_err(|source| {
        // What could not be finished is of no use; that it cannot be removed either would hide the first cause.
        let _ = std::fs::remove_file(&aside);
        WeightsError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        }
    })
}

/// A name next to `path` that no other writer uses.
fn aside(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(
        ".{}-{}.partial",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    ));
    path.with_file_name(name)
}

fn write_new(path: &Path, tensors: &Tensors, metadata: &Strings) -> std::io::Result<()> {
    // The format's order: wider types first, so that every tensor is aligned; then by name.
    let mut order: Vec<(&String, &TensorData)> = tensors.iter().collect();
    order.sort_by_key(|(_, data)| std::cmp::Reverse(data.dtype().size()));

    let mut file = BufWriter::new(OpenOptions::new().write(true).create_new(true).open(path)?);
    let header = header(&order, metadata)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (_, data) in order {
        file.write_all(&little_endian(data))?;
    }
    file.into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .sync_all()
}

/// The JSON header, padded with spaces to a multiple of eight bytes. Written in a fixed order, which the
/// safetensors crate's own writer does not keep for metadata.
fn header(order: &[(&String, &TensorData)], metadata: &Strings) -> std::io::Result<Vec<u8>> {
    let mut entries = Vec::with_capacity(order.len() + 1);
    if !metadata.is_empty() {
        entries.push(format!("\"__metadata__\":{}", serde_json::to_string(metadata)?));
    }
    let mut start = 0;
    for (name, data) in order {
        let dtype = match data.dtype() {
            DType::I64 => Dtype::I64,
            _ => Dtype::F32,
        };
        let end = start + data.num_elements() * data.dtype().size();
        let info = TensorInfo {
            dtype,
            shape: data.shape().to_vec(),
            data_offsets: (start, end),
        };
        entries.push(format!(
            "{}:{}",
            serde_json::to_string(name)?,
            serde_json::to_string(&info)?
        ));
        start = end;
    }
    let mut header = format!("{{{}}}", entries.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn little_endian(data: &TensorData) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(data.as_bytes());
    }
    Cow::Owned(match data.dtype() {
        DType::I64 => data.iter::<i64>().flat_map(i64::to_le_bytes).collect(),
        _ => data.iter::<f32>().flat_map(f32::to_le_bytes).collect(),
    })
}

/// Makes the rename durable. Only Unix lets a directory be opened and synced.
fn sync_directory(path: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}
