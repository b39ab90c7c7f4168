//! `faceprior model inspect`: what a weights file holds.

use std::collections::BTreeMap;

use anyhow::Result;
use faceprior::nets::weights::Weights;
use serde::Serialize;

use super::Context;
use crate::args;

#[derive(Serialize)]
struct Inspected {
    file: String,
    kind: Option<String>,
    metadata: BTreeMap<String, String>,
    tensors: usize,
    numbers: usize,
    /// Numbers by the first part of their tensors' names.
    parts: BTreeMap<String, usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    shapes: Vec<(String, Vec<usize>)>,
}

pub fn run(context: &Context, arguments: args::Model) -> Result<()> {
    let args::Model::Inspect { file, tensors } = arguments;
    let weights = Weights::read(&file)?;
    let shapes: Vec<(String, Vec<usize>)> = weights
        .names()
        .filter_map(|name| Some((name.to_owned(), weights.get(name)?.shape().to_vec())))
        .collect();
    let mut parts = BTreeMap::new();
    for (name, shape) in &shapes {
        let part = name.split('.').next().unwrap_or(name).to_owned();
        *parts.entry(part).or_insert(0) += shape.iter().product::<usize>();
    }
    let inspected = Inspected {
        file: file.display().to_string(),
        kind: weights.kind().map(str::to_owned),
        metadata: weights
            .metadata_entries()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        tensors: shapes.len(),
        numbers: parts.values().sum(),
        parts,
        shapes: if tensors { shapes } else { Vec::new() },
    };
    if context.json {
        return super::print_json(&inspected);
    }
    println!("file      {}", inspected.file);
    println!(
        "kind      {}",
        inspected
            .kind
            .as_deref()
            .unwrap_or("not said (no faceprior metadata)")
    );
    println!(
        "tensors   {} with {} numbers",
        inspected.tensors, inspected.numbers
    );
    for (part, numbers) in &inspected.parts {
        println!("  {part:<18} {numbers}");
    }
    for (key, value) in &inspected.metadata {
        println!("{key}  {value}");
    }
    for (name, shape) in &inspected.shapes {
        println!("{name}  {shape:?}");
    }
    Ok(())
}
