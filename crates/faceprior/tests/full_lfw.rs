//! Alignment and verification on LFW with a public recogniser: the yardstick that both are right.

use std::path::Path;
use std::process::Command;

/// What the reference procedure reaches on these pictures is 99.03% ± 0.43.
const FLOOR: f64 = 0.989;

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn a_public_mobilefacenet_verifies_lfw_aligned_by_this_program() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let (pictures, pairs) = (shared.join("data/lfw/images"), shared.join("data/lfw/pairs.txt"));
    let model = shared.join("models/mobilefacenet_casia_068.safetensors");
    let folder = tempfile::tempdir().expect("a folder");
    let crops = folder.path().join("crops");

    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_faceprior"));
        command.args(["--json", "--quiet", "--device", "cpu"]);
        command
    };
    let run = |command: &mut Command| -> serde_json::Value {
        let output = command.output().expect("the program starts");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let aligned = run(program()
        .args(["align", "--one", "--size", "96x112"])
        .args([&pictures, &crops]));
    assert_eq!(
        (&aligned["listed"], &aligned["without_face"]),
        (&7701.into(), &0.into())
    );

    let scored = run(program()
        .args(["eval", "pairs", "--flip", "concat", "--no-center-crop", "--model"])
        .arg(&model)
        .arg("--images")
        .arg(&crops)
        .arg("--pairs")
        .arg(&pairs));
    let accuracy = scored["model"]["accuracy"]["value"]
        .as_f64()
        .expect("an accuracy");
    assert!(accuracy >= FLOOR, "{accuracy}");
}
