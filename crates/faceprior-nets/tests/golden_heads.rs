//! Margin heads and losses against the reference's numbers.

mod golden;

use burn::tensor::{Device, Int, Tensor};
use faceprior_nets::fill::fill_by;
use faceprior_nets::heads::{ArcFace, Head, HeadConfig, HeadKind, Margin};
use faceprior_nets::init::Init;
use faceprior_nets::losses::{cross_entropy, focal};
use golden::{assert_close, read};

fn check(name: &str, kind: HeadKind, easy_margin: bool, margin: Margin) {
    let golden = read("heads.safetensors");
    let device = Device::flex().autodiff();
    let config = HeadConfig {
        kind,
        num_classes: 20,
        embedding_dim: 64,
    };
    let head = match config.init(&mut Init::new(0, &device)) {
        Head::ArcFace(arc) => Head::ArcFace(ArcFace { easy_margin, ..arc }),
        other => other,
    };
    let head = fill_by(head, &format!("g.head.{name}."), |key, _, _| {
        (if key.ends_with("bias") { 0.1 } else { 1.0 }, 0.0)
    });
    let features = golden
        .tensor::<2>(&format!("{name}.features"), &device)
        .unwrap()
        .require_grad();
    let labels: Tensor<1, Int> = Tensor::from_data(golden.get("labels").unwrap().clone(), &device);

    let logits = head.logits(features.clone(), labels.clone(), margin);
    let ce = cross_entropy(logits.clone(), labels.clone());
    // The loss in one pass over the classes, which is what training uses.
    let (fused, _) = head.cross_entropy(features.clone(), labels, margin);
    let loss = focal(fused.clone(), 2.0);
    let close = |what: &str, got: Tensor<2>| {
        assert_close(
            &format!("{name} {what}"),
            got,
            &golden,
            &format!("{name}.{what}"),
            1e-4,
        );
    };
    close("logits", logits);
    assert_close(
        &format!("{name} cross-entropy"),
        ce,
        &golden,
        &format!("{name}.cross_entropy"),
        1e-5,
    );
    assert_close(
        &format!("{name} cross-entropy in one pass"),
        fused,
        &golden,
        &format!("{name}.cross_entropy"),
        1e-5,
    );
    assert_close(
        &format!("{name} focal"),
        loss.clone(),
        &golden,
        &format!("{name}.focal"),
        1e-5,
    );

    let gradients = loss.backward();
    close("grad_features", features.grad(&gradients).unwrap());
    let weight = match &head {
        Head::ArcFace(head) => &head.weight,
        Head::CosFace(head) => &head.weight,
        Head::Softmax(head) => {
            let gradient = head.bias.val().grad(&gradients).unwrap();
            assert_close("Softmax bias", gradient, &golden, "Softmax.grad_bias", 1e-4);
            &head.weight
        }
    };
    close("grad_weight", weight.val().grad(&gradients).unwrap());
}

#[test]
fn arc_face() {
    check("ArcFace", HeadKind::ArcFace, false, Margin::default());
}

#[test]
fn arc_face_with_easy_margin() {
    check("ArcFace_easy", HeadKind::ArcFace, true, Margin::default());
}

#[test]
fn arc_face_with_another_scale_and_margin() {
    check(
        "ArcFace_s32_m03",
        HeadKind::ArcFace,
        false,
        Margin {
            scale: 32.0,
            margin: 0.3,
        },
    );
}

#[test]
fn cos_face() {
    check("CosFace", HeadKind::CosFace, false, Margin::default());
}

#[test]
fn softmax() {
    check("Softmax", HeadKind::Softmax, false, Margin::default());
}
