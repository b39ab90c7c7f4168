//! The reference procedures' own numbers on stored embeddings.

use std::path::{Path, PathBuf};

use faceprior_eval::bootstrap::Bootstrap;
use faceprior_eval::frechet::{frechet_distance, polynomial_mmd};
use faceprior_eval::roc::Roc;
use faceprior_eval::verification::{Pair, Protocol, people_of_pairs, verify};
use faceprior_eval::{Embeddings, EvalError};
use safetensors::{Dtype, SafeTensors};

fn golden(name: &str) -> Vec<u8> {
    read(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../goldens")
            .join(name),
    )
}

fn read(path: &PathBuf) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A tensor's values as f64, and its shape.
fn values(file: &SafeTensors<'_>, name: &str) -> (Vec<f64>, Vec<usize>) {
    let tensor = file.tensor(name).unwrap();
    let bytes = tensor.data();
    let values = match tensor.dtype() {
        Dtype::F64 => bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
            .collect(),
        Dtype::I64 => bytes
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
            .collect(),
        Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
        other => panic!("{name} is {other:?}"),
    };
    (values, tensor.shape().to_vec())
}

fn embeddings(file: &SafeTensors<'_>, name: &str) -> Embeddings {
    let (values, shape) = values(file, name);
    Embeddings::new(shape[1], values.into_iter().map(|x| x as f32).collect()).unwrap()
}

fn verification_golden(file: &SafeTensors<'_>) -> (Embeddings, Vec<Pair>) {
    let same: Vec<bool> = values(file, "issame").0.into_iter().map(|s| s != 0.0).collect();
    let rows: Vec<_> = same
        .iter()
        .enumerate()
        .map(|(k, &same)| (2 * k, 2 * k + 1, same))
        .collect();
    let pairs = rows.iter().zip(people_of_pairs(&rows));
    let pairs = pairs
        .map(|(&(left, right, same), people)| Pair {
            left,
            right,
            same,
            people,
        })
        .collect();
    (embeddings(file, "embeddings"), pairs)
}

fn quick(pca: Option<usize>) -> Protocol {
    Protocol {
        pca,
        bootstrap: Bootstrap {
            draws: 20,
            ..Bootstrap::default()
        },
        ..Protocol::default()
    }
}

#[test]
fn the_k_fold_procedure_gives_the_references_numbers() {
    let bytes = golden("verification.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (embeddings, pairs) = verification_golden(&file);
    let scored = verify(&embeddings, &pairs, &quick(None)).unwrap();
    let result = scored.result();
    let column =
        |of: fn(&faceprior_eval::verification::Fold) -> f64| result.folds.iter().map(of).collect::<Vec<_>>();
    assert_eq!(column(|fold| fold.accuracy), values(&file, "accuracy").0);
    assert_eq!(column(|fold| fold.threshold), values(&file, "best_thresholds").0);
    for (own, name) in [(&result.mean_roc.tar, "tpr"), (&result.mean_roc.far, "fpr")] {
        for (threshold, (own, expected)) in own.iter().zip(values(&file, name).0).enumerate() {
            assert!(
                (own - expected).abs() < 1e-12,
                "{name} at threshold {threshold}: {own}, expected {expected}"
            );
        }
    }
    assert_eq!((result.pairs, result.genuine), (603, 302));
}

#[test]
fn the_k_fold_procedure_with_pca_gives_the_references_numbers() {
    let bytes = golden("verification.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (embeddings, pairs) = verification_golden(&file);
    let scored = verify(&embeddings, &pairs, &quick(Some(16))).unwrap();
    let accuracy: Vec<f64> = scored.result().folds.iter().map(|fold| fold.accuracy).collect();
    assert_eq!(accuracy, values(&file, "accuracy_pca16").0);
}

#[test]
fn frechet_and_kernel_distance_give_the_references_numbers() -> Result<(), EvalError> {
    let bytes = golden("fid.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (x, y) = (embeddings(&file, "x"), embeddings(&file, "y"));
    for (own, name) in [
        (frechet_distance(&x, &y)?, "fid"),
        (polynomial_mmd(&x, &y)?, "kid_all"),
    ] {
        let expected = values(&file, name).0[0];
        assert!(
            (own / expected - 1.0).abs() < 1e-6,
            "{name}: {own}, expected {expected}"
        );
    }
    Ok(())
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn tar_at_far_follows_the_exact_rule_on_a_million_impostor_pairs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/webface.safetensors");
    let bytes = read(&path);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (positive, negative) = (embeddings(&file, "positive"), embeddings(&file, "negative"));
    let all_pairs = |rows: std::ops::Range<usize>| {
        rows.clone()
            .flat_map(move |i| (i + 1..rows.end).map(move |j| (i, j)))
    };
    let people = (0..positive.len()).step_by(5);
    let genuine: Vec<f64> = people
        .flat_map(|first| all_pairs(first..first + 5))
        .map(|(i, j)| positive.cosine(i, j))
        .collect();
    let impostor: Vec<f64> = all_pairs(0..negative.len())
        .map(|(i, j)| negative.cosine(i, j))
        .collect();
    assert_eq!(
        vec![genuine.len() as f64, impostor.len() as f64],
        values(&file, "genuine_count").0
    );
    let roc = Roc::new(&genuine, &impostor).unwrap();
    let expected = values(&file, "tpr_exact_1e-2_1e-3_1e-4").0;
    for (far, expected) in [1e-2, 1e-3, 1e-4].into_iter().zip(expected) {
        assert_eq!(roc.tar_at_far(far), Some(expected), "at {far}");
    }
    assert_eq!(roc.tar_at_far(1e-7), None);
}
