//! Margin heads: cross-entropy over the cosines between an embedding and the direction of every class.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;

use crate::backend::{Function, apply2, dims, small_tensor, tensor, values};
use crate::feature_map::is_cpu;
use crate::kernels::dense::{self, Matrix};
use crate::kernels::{Isa, Shared, parallel, parallel_chunks};
use crate::pool::Buffer;
use crate::reference;

/// What a margin makes of the cosine of the target class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TargetMargin {
    /// cos(θ + m) (ArcFace, Deng et al. 2019). Beyond θ = π − m, where it would rise again, cos θ − m·sin(π − m); with
    /// `easy`, targets with cos θ ≤ 0 get no margin at all instead.
    Angle {
        /// m, in radians.
        margin: f32,
        /// Whether the margin ends at cos θ = 0.
        easy: bool,
    },
    /// cos θ − m (CosFace, Wang et al. 2018).
    Cosine {
        /// m, a difference of cosines.
        margin: f32,
    },
}

/// Mean cross-entropy of a margin head, and for each picture the number of classes whose logit is above its target's.
///
/// Logits are `scale` times the cosines, the target's after the margin. On the CPU they are made for some classes at a
/// time, forward and backward, and never kept: beyond the weight and its gradient, memory does not grow with classes.
///
/// # Shapes
/// `x`: `[N, D]`; `weight`: `[C, D]`; `labels`: `[N]` in 0..C; output `[1]` and N counts.
///
/// # Panics
/// If a label is not below C.
pub fn margin_cross_entropy(
    x: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: f32,
    target: TargetMargin,
) -> (Tensor<1>, Vec<u32>) {
    let known: Vec<i64> = labels.to_data().iter::<i64>().collect();
    let classes = weight.dims()[0];
    let valid = |label: &i64| usize::try_from(*label).is_ok_and(|label| label < classes);
    assert!(
        known.iter().all(valid),
        "a label is not one of the {classes} classes"
    );
    if !is_cpu(&x.device()) {
        let logits = reference::margin_logits(x, weight, labels.clone(), scale, target);
        return reference::cross_entropy(logits, labels);
    }
    let above = Arc::new(OnceLock::new());
    let head = MarginHead {
        labels: known.into_iter().map(|label| label as usize).collect(),
        scale,
        target,
        above: above.clone(),
    };
    let loss = apply2(head, x, weight);
    (loss, above.get().cloned().unwrap_or_default())
}

/// The logits of a margin head themselves, in plain tensor code.
///
/// # Shapes
/// `x`: `[N, D]`; `weight`: `[C, D]`; `labels`: `[N]` in 0..C; output `[N, C]`.
pub fn margin_logits(
    x: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: f32,
    target: TargetMargin,
) -> Tensor<2> {
    reference::margin_logits(x, weight, labels, scale, target)
}

impl TargetMargin {
    /// The target's cosine after the margin, and the derivative.
    fn apply(self, cos: f32) -> (f32, f32) {
        match self {
            Self::Cosine { margin } => (cos - margin, 1.0),
            Self::Angle { margin, easy } => {
                let (sin_m, cos_m) = margin.sin_cos();
                if easy && cos <= 0.0 {
                    return (cos, 1.0);
                }
                if !easy && cos <= -cos_m {
                    return (cos - margin * sin_m, 1.0);
                }
                // sin² θ is kept off 0, where its root has no derivative.
                let square = 1.0 - cos * cos;
                let sin = square.clamp(MIN_SINE_SQUARE, 1.0).sqrt();
                let slope = if square > MIN_SINE_SQUARE { cos / sin } else { 0.0 };
                (cos * cos_m - sin * sin_m, cos_m + sin_m * slope)
            }
        }
    }
}

/// Least sin² θ of a target.
pub(crate) const MIN_SINE_SQUARE: f32 = 1e-10;
/// Least length of a vector that is normalised.
const MIN_LENGTH: f32 = 1e-12;

/// Classes whose logits exist at a time.
const CLASS_BLOCK: usize = 128;
/// Classes are cut into at most so many parts, each of which has its own sum of the embeddings' gradients.
const MAX_PARTS: usize = 16;

/// Cross-entropy over classes, block by block.
#[derive(Clone, Debug)]
struct MarginHead {
    labels: Arc<[usize]>,
    scale: f32,
    target: TargetMargin,
    above: Arc<OnceLock<Vec<u32>>>,
}

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct Saved {
    /// Embeddings of length 1, `[N, D]`, and one over their lengths.
    directions: Arc<[f32]>,
    inverse_lengths: Arc<[f32]>,
    weight: FlexTensor,
    /// Cosines of the targets.
    cosines: Arc<[f32]>,
    /// Log of the sum over classes of e^logit.
    log_sums: Arc<[f32]>,
}

/// Rows of length 1, and one over the lengths.
fn normalized(rows: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let lengths = rows.chunks_exact(width).map(inverse_length).collect::<Vec<_>>();
    let rows = rows.chunks_exact(width).zip(&lengths);
    let directions = rows.flat_map(|(row, length)| row.iter().map(move |value| value * length));
    (directions.collect(), lengths)
}

fn inverse_length(row: &[f32]) -> f32 {
    1.0 / dot(row, row).sqrt().max(MIN_LENGTH)
}

/// Sixteen chains of sums, which the compiler makes vectors of.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a_rows, b_rows) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_rows
        .remainder()
        .iter()
        .zip(b_rows.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_rows.zip(b_rows) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

impl MarginHead {
    /// Blocks of classes of each part; they depend on the number of classes alone.
    fn parts(classes: usize) -> (usize, usize) {
        let blocks = classes.div_ceil(CLASS_BLOCK);
        let part_blocks = blocks.div_ceil(MAX_PARTS);
        (blocks.div_ceil(part_blocks), part_blocks)
    }

    /// Calls `f(classes, weight rows, one over their lengths, logits [N, classes])` for each block of a part.
    fn blocks(
        &self,
        part: Range<usize>,
        width: usize,
        directions: &[f32],
        weight: &[f32],
        cosines: &[f32],
        mut f: impl FnMut(Range<usize>, &[f32], &[f32], &mut [f32]),
    ) {
        let classes = weight.len() / width;
        for block in part {
            let of_block = block * CLASS_BLOCK..classes.min((block + 1) * CLASS_BLOCK);
            let rows = &weight[of_block.start * width..of_block.end * width];
            let lengths: Vec<_> = rows.chunks_exact(width).map(inverse_length).collect();
            let mut logits = Buffer::take(self.labels.len() * of_block.len());
            dense::rows_by_rows_here(Isa::best(), width, directions, rows, &mut logits);
            for (picture, logits) in logits.chunks_exact_mut(of_block.len()).enumerate() {
                for (logit, length) in logits.iter_mut().zip(&lengths) {
                    *logit *= length * self.scale;
                }
                if of_block.contains(&self.labels[picture]) {
                    let (target, _) = self.target.apply(cosines[picture]);
                    logits[self.labels[picture] - of_block.start] = target * self.scale;
                }
            }
            f(of_block, rows, &lengths, &mut logits);
        }
    }
}

impl Function<2> for MarginHead {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> (FlexTensor, Saved) {
        let ([n, width], [classes, _]) = (dims(&x), dims(&weight));
        let (directions, inverse_lengths) = normalized(values(&x), width);
        let cosines: Vec<_> = directions
            .chunks_exact(width)
            .zip(self.labels.iter())
            .map(|(direction, label)| {
                let row = &values(&weight)[label * width..(label + 1) * width];
                dot(direction, row) * inverse_length(row)
            })
            .collect();
        let targets: Vec<_> = cosines
            .iter()
            .map(|cos| self.target.apply(*cos).0 * self.scale)
            .collect();

        // For each part and picture: the largest logit, the sum of e^(logit − largest), and the logits above the target.
        let (parts, part_blocks) = Self::parts(classes);
        let mut found = vec![[f32::NEG_INFINITY, 0.0, 0.0]; parts * n];
        let blocks = classes.div_ceil(CLASS_BLOCK);
        parallel_chunks(&mut found, n, |part, found| {
            let part = part * part_blocks..blocks.min((part + 1) * part_blocks);
            self.blocks(
                part,
                width,
                &directions,
                values(&weight),
                &cosines,
                |of_block, _, _, logits| {
                    for (picture, logits) in logits.chunks_exact(of_block.len()).enumerate() {
                        let [largest, sum, above] = &mut found[picture];
                        let most = logits.iter().copied().fold(*largest, f32::max);
                        *sum *= (*largest - most).exp();
                        *largest = most;
                        *sum += logits.iter().map(|logit| (logit - most).exp()).sum::<f32>();
                        *above += logits.iter().filter(|logit| **logit > targets[picture]).count() as f32;
                    }
                },
            );
        });
        let of_picture = |picture: usize| found.iter().skip(picture).step_by(n);
        let log_sums: Vec<_> = (0..n)
            .map(|picture| {
                let most = of_picture(picture).fold(f32::NEG_INFINITY, |most, part| most.max(part[0]));
                let sum = of_picture(picture)
                    .map(|part| part[1] * (part[0] - most).exp())
                    .sum::<f32>();
                most + sum.ln()
            })
            .collect();
        let above = (0..n).map(|picture| of_picture(picture).map(|part| part[2] as u32).sum());
        // Set once: a function runs forward once.
        let _ = self.above.set(above.collect());
        let loss = log_sums
            .iter()
            .zip(&targets)
            .map(|(sum, target)| f64::from(sum - target));
        let loss = (loss.sum::<f64>() / n as f64) as f32;
        let saved = Saved {
            directions: directions.into(),
            inverse_lengths: inverse_lengths.into(),
            weight,
            cosines: cosines.into(),
            log_sums: log_sums.into(),
        };
        (small_tensor(&[loss], [1]), saved)
    }

    /// With p the softmax and g the gradient of the loss: that of a logit is `g/N · (p − [target])`, and a direction's
    /// part along the vector itself falls out: `dv = (dv̂ − v̂·(v̂·dv̂))/|v|`.
    fn backward(&self, saved: Saved, dy: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let Saved {
            directions,
            inverse_lengths,
            weight,
            cosines,
            log_sums,
        } = saved;
        let ([classes, width], n) = (dims(&weight), self.labels.len());
        let gradient = values(&dy)[0] * self.scale / n as f32;
        let (parts, part_blocks) = Self::parts(classes);
        let blocks = classes.div_ceil(CLASS_BLOCK);
        let mut dw = Buffer::take(classes * width);
        let mut sums = Buffer::zeroed(parts * n * width);
        let (to_dw, to_sums) = (Shared::new(&mut dw), Shared::new(&mut sums));
        parallel(parts, |part| {
            // SAFETY: each part has its own sums, and the rows of its classes.
            let sums = unsafe { std::slice::from_raw_parts_mut(to_sums.at(part * n * width), n * width) };
            let part = part * part_blocks..blocks.min((part + 1) * part_blocks);
            self.blocks(
                part,
                width,
                &directions,
                values(&weight),
                &cosines,
                |of_block, rows, lengths, logits| {
                    let count = of_block.len();
                    for (picture, logits) in logits.chunks_exact_mut(count).enumerate() {
                        for logit in logits.iter_mut() {
                            *logit = (*logit - log_sums[picture]).exp() * gradient;
                        }
                        if of_block.contains(&self.labels[picture]) {
                            let target = &mut logits[self.labels[picture] - of_block.start];
                            *target = (*target - gradient) * self.target.apply(cosines[picture]).1;
                        }
                    }
                    // SAFETY: as above.
                    let dw = unsafe {
                        std::slice::from_raw_parts_mut(to_dw.at(of_block.start * width), count * width)
                    };
                    let gradients = |rows, inner, transposed| Matrix {
                        values: &*logits,
                        rows,
                        inner,
                        transposed,
                    };
                    dense::by_columns_here(Isa::best(), gradients(count, n, true), &directions, width, dw);
                    for ((dw, row), length) in dw
                        .chunks_exact_mut(width)
                        .zip(rows.chunks_exact(width))
                        .zip(lengths)
                    {
                        let along = dot(dw, row) * length * length;
                        for (dw, value) in dw.iter_mut().zip(row) {
                            *dw = (*dw - value * along) * length;
                        }
                    }
                    // The rows' lengths belong to the logits' gradients from here on.
                    for logits in logits.chunks_exact_mut(count) {
                        logits
                            .iter_mut()
                            .zip(lengths)
                            .for_each(|(logit, length)| *logit *= length);
                    }
                    let gradients = Matrix {
                        values: &*logits,
                        rows: n,
                        inner: count,
                        transposed: false,
                    };
                    let mut sum = Buffer::take(n * width);
                    dense::by_columns_here(Isa::best(), gradients, rows, width, &mut sum);
                    sums.iter_mut()
                        .zip(sum.iter())
                        .for_each(|(total, sum)| *total += sum);
                },
            );
        });
        let mut dx = Buffer::take(n * width);
        for (picture, dx) in dx.chunks_exact_mut(width).enumerate() {
            dx.fill(0.0);
            for part in sums.chunks_exact(n * width) {
                dx.iter_mut()
                    .zip(&part[picture * width..])
                    .for_each(|(dx, sum)| *dx += sum);
            }
            let (direction, length) = (&directions[picture * width..][..width], inverse_lengths[picture]);
            let along = dot(dx, direction);
            for (dx, value) in dx.iter_mut().zip(direction) {
                *dx = (*dx - value * along) * length;
            }
        }
        [Some(tensor(dx, [n, width])), Some(tensor(dw, [classes, width]))]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::testing::{assert_close, assert_twins, random};

    fn labels(labels: &[i64]) -> Tensor<1, Int> {
        let data = TensorData::new(labels.to_vec(), [labels.len()]);
        Tensor::from_data(data, &Device::flex().autodiff())
    }

    #[test]
    fn agrees_with_logits_that_are_written_out() {
        for target in [
            TargetMargin::Angle {
                margin: 0.5,
                easy: false,
            },
            TargetMargin::Angle {
                margin: 0.5,
                easy: true,
            },
            TargetMargin::Cosine { margin: 0.35 },
        ] {
            for classes in [1, 7, 700] {
                let of_pictures: Vec<i64> = (0..9).map(|picture| picture * 53 % classes).collect();
                let labels = labels(&of_pictures);
                assert_twins(
                    |[x, weight]| margin_cross_entropy(x, weight, labels.clone(), 8.0, target).0,
                    |[x, weight]| {
                        let logits = margin_logits(x, weight, labels.clone(), 8.0, target);
                        reference::cross_entropy(logits, labels.clone()).0
                    },
                    [[9, 37], [classes as usize, 37]],
                    2e-5,
                );
            }
        }
    }

    #[test]
    fn classes_above_the_target_are_counted() {
        let (x, weight) = (random([6, 20], 1), random([300, 20], 2));
        let labels = labels(&[0, 299, 17, 128, 127, 256]);
        let target = TargetMargin::Cosine { margin: 0.1 };
        let (loss, above) = margin_cross_entropy(x.clone(), weight.clone(), labels.clone(), 4.0, target);
        let logits = margin_logits(x, weight, labels.clone(), 4.0, target);
        let (expected, counts) = reference::cross_entropy(logits, labels);
        assert_close(loss, expected, 1e-5);
        assert_eq!(above, counts);
    }

    /// Targets on the class's own direction, where the sine has no derivative, and huge scales.
    #[test]
    fn extremes_stay_finite() {
        let x = random([2, 8], 1).require_grad();
        let weight = Tensor::cat(vec![x.clone().detach(), x.clone().detach().neg()], 0);
        let target = TargetMargin::Angle {
            margin: 0.5,
            easy: false,
        };
        let (loss, _) = margin_cross_entropy(x.clone(), weight, labels(&[0, 3]), 1e4, target);
        let gradient = x.grad(&loss.backward()).expect("x is tracked");
        assert!(
            crate::testing::values(gradient)
                .iter()
                .all(|value| value.is_finite())
        );
    }
}
