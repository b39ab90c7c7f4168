//! Pair verification: is it one person on two pictures?
//!
//! The k-fold procedure of LFW's view 2 as face.evoLVe and InsightFace compute it, to the letter: squared Euclidean
//! distances of normalised embeddings, thresholds 0, 0.01, …, 3.99, contiguous unshuffled folds, per fold the first
//! of the thresholds with the best accuracy on the other folds, accuracy with it on the fold held out. "Same" is a
//! distance strictly below the threshold.
//!
//! Beside it stands what the procedure lacks: thresholds that are not on a grid, rates that need no threshold, and
//! intervals over people (see [`bootstrap`](crate::bootstrap)). The accuracy of a bootstrap draw is that of the
//! whole procedure on the weighted pairs: per fold the best threshold of the weighted training pairs, the weighted
//! accuracy on the held-out pairs, and the plain mean over the folds that have weight left. With PCA, the
//! projections stay those fitted to the unweighted pairs.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bootstrap::{Bootstrap, Difference, Distribution, Estimate};
use crate::linalg::{Matrix, dot};
use crate::mistakes::{Mistakes, worst_pairs};
use crate::pca::Pca;
use crate::roc::Roc;
use crate::{Embeddings, EvalError};

/// One comparison of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Row of the first picture's embedding.
    pub left: usize,
    /// Row of the second picture's embedding.
    pub right: usize,
    /// Whether the list says that both show one person.
    pub same: bool,
    /// Who is on the two pictures, by any numbering: the unit that intervals resample. Where people are not
    /// known, see [`people_of_pairs`].
    pub people: [u32; 2],
}

/// How pairs are scored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Protocol {
    /// Folds of the cross-validation.
    pub folds: usize,
    /// Principal components to project on, fitted per fold on both sides of the training pairs, without whitening,
    /// rows then renormalised. None: the embeddings as they are.
    pub pca: Option<usize>,
    /// Intervals.
    pub bootstrap: Bootstrap,
}

impl Default for Protocol {
    fn default() -> Self {
        Self {
            folds: 10,
            pca: None,
            bootstrap: Bootstrap::default(),
        }
    }
}

/// FARs at which TAR is reported, where the impostor pairs suffice.
pub const FARS: [f64; 6] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];

/// FAR of [`ValAtFar`].
pub const VAL_FAR: f64 = 1e-3;

/// What a list of pairs says of a model. Rates are shares, 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Pairs in the list.
    pub pairs: usize,
    /// Of them, pairs of one person.
    pub genuine: usize,
    /// Of them, pairs of two people.
    pub impostor: usize,
    /// The settings.
    pub protocol: Protocol,
    /// Mean accuracy over the folds, thresholds on the grid: the number that papers report.
    pub accuracy: Estimate,
    /// Its standard deviation over the folds (divisor n).
    pub accuracy_std: f64,
    /// Mean of the folds' thresholds.
    pub threshold: f64,
    /// The same with thresholds at the midpoints of the training distances.
    pub exact_accuracy: Estimate,
    /// Its standard deviation over the folds (divisor n).
    pub exact_accuracy_std: f64,
    /// Mean of the folds' exact thresholds.
    pub exact_threshold: f64,
    /// Area under the ROC curve of all pairs, a tie counting half.
    pub auc: Estimate,
    /// Equal error rate.
    pub eer: Estimate,
    /// TAR at each of [`FARS`] that the impostor pairs suffice for.
    pub tar_at_far: Vec<TarAtFar>,
    /// VAL at [`VAL_FAR`] as InsightFace computes it.
    pub val_at_far: ValAtFar,
    /// Each fold, in order.
    pub folds: Vec<Fold>,
    /// ROC averaged over the folds at each threshold of the grid.
    pub mean_roc: MeanRoc,
}

/// One fold of the cross-validation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fold {
    /// Accuracy on the held-out pairs with `threshold`.
    pub accuracy: f64,
    /// First of the grid's thresholds with the best training accuracy.
    pub threshold: f64,
    /// Accuracy on the held-out pairs with `exact_threshold`.
    pub exact_accuracy: f64,
    /// First midpoint of training distances with the best training accuracy; 0 when rejecting all is best.
    pub exact_threshold: f64,
}

/// The rate of genuine pairs accepted at a rate of impostor pairs accepted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TarAtFar {
    /// Share of impostor pairs accepted.
    pub far: f64,
    /// Share of genuine pairs accepted.
    pub tar: Estimate,
}

/// VAL at a FAR by InsightFace's rule: per fold, the threshold where the training pairs' FAR, linearly interpolated
/// between thresholds 0, 0.001, …, 3.999, reaches the target (0 when it never does; the largest when several
/// thresholds have exactly that FAR), then both rates on the held-out pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValAtFar {
    /// FAR aimed at.
    pub target: f64,
    /// Mean over folds of the share of genuine held-out pairs accepted.
    pub val: f64,
    /// Its standard deviation over the folds (divisor n).
    pub val_std: f64,
    /// Mean over folds of the share of impostor held-out pairs accepted.
    pub far: f64,
}

/// Rates averaged over the folds' held-out pairs, at the grid's thresholds. A fold without pairs of a kind counts
/// as rate 0, as in the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeanRoc {
    /// 0, 0.01, …, 3.99.
    pub thresholds: Vec<f64>,
    /// Share of impostor pairs accepted.
    pub far: Vec<f64>,
    /// Share of genuine pairs accepted.
    pub tar: Vec<f64>,
}

/// A model's result with what is needed to compare it with another's, and to plot it.
#[derive(Clone, Debug)]
pub struct Scored {
    result: Verification,
    pairs: Arc<[Pair]>,
    distances: Vec<f64>,
    roc: Roc,
    accuracy_draws: Distribution,
    exact_draws: Distribution,
    auc_draws: Distribution,
}

/// First model minus second, on the same pairs and draws.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Of the mean accuracy over folds, thresholds on the grid.
    pub accuracy: Difference,
    /// Of the same with exact thresholds.
    pub exact_accuracy: Difference,
    /// Of the area under the ROC curve.
    pub auc: Difference,
}

/// Scores L2-normalised embeddings on a list of pairs.
///
/// ```
/// use faceprior_eval::Embeddings;
/// use faceprior_eval::bootstrap::Bootstrap;
/// use faceprior_eval::verification::{Pair, Protocol, verify};
///
/// // Two pictures of person 0, two of person 1.
/// let embeddings = Embeddings::new(2, vec![1.0, 0.0, 0.9, 0.1, 0.0, 1.0, 0.1, 0.9])?.normalized();
/// let pair = |left, right, people: [u32; 2]| Pair { left, right, same: people[0] == people[1], people };
/// let pairs = [pair(0, 1, [0, 0]), pair(0, 2, [0, 1]), pair(2, 3, [1, 1]), pair(1, 3, [0, 1])];
/// let protocol = Protocol { folds: 2, bootstrap: Bootstrap { draws: 100, ..Bootstrap::default() }, ..Protocol::default() };
/// let scored = verify(&embeddings, &pairs, &protocol)?;
/// assert_eq!(scored.result().accuracy.value, 1.0);
/// # Ok::<(), faceprior_eval::EvalError>(())
/// ```
///
/// # Errors
/// When a pair names a row that does not exist, either kind of pair is missing, the pairs do not fill the folds,
/// there are fewer dimensions or training pictures than principal components, or a setting is out of range.
pub fn verify(embeddings: &Embeddings, pairs: &[Pair], protocol: &Protocol) -> Result<Scored, EvalError> {
    check(embeddings, pairs, protocol)?;
    let held_out = contiguous_folds(pairs.len(), protocol.folds);
    let shared = match protocol.pca {
        None => Some(
            pairs
                .iter()
                .map(|p| embeddings.squared_distance(p.left, p.right))
                .collect::<Vec<_>>(),
        ),
        Some(_) => None,
    };
    let all = embeddings.to_matrix();
    let folds: Vec<FoldPairs> = held_out
        .par_iter()
        .map(|test| match (&shared, protocol.pca) {
            (None, Some(components)) => Ok(FoldPairs::new(
                &projected_distances(&all, pairs, test, components)?,
                pairs,
                test,
            )),
            (distances, _) => Ok(FoldPairs::new(
                distances.as_deref().unwrap_or_default(),
                pairs,
                test,
            )),
        })
        .collect::<Result<_, EvalError>>()?;
    let mut distances = vec![0.0; pairs.len()];
    for fold in &folds {
        fold.test
            .pairs
            .iter()
            .zip(&fold.test.distances)
            .for_each(|(&pair, &d)| distances[pair as usize] = d);
    }

    let ones = vec![1.0; pairs.len()];
    let of_fold = |fold: &FoldPairs| {
        let threshold = fold.train.best_grid_threshold(&ones);
        let exact_threshold = fold.train.best_exact_threshold(&ones);
        Fold {
            accuracy: fold.test.accuracy(threshold, &ones),
            threshold,
            exact_accuracy: fold.test.accuracy(exact_threshold, &ones),
            exact_threshold,
        }
    };
    let per_fold: Vec<Fold> = folds.iter().map(of_fold).collect();

    let same: Vec<bool> = pairs.iter().map(|p| p.same).collect();
    let scores: Vec<f64> = distances.iter().map(|d| -d).collect();
    let roc = Roc::of_pairs(&scores, &same)?;
    let genuine = same.iter().filter(|&&same| same).count();
    let fars: Vec<f64> = FARS
        .into_iter()
        .filter(|&far| roc.tar_at_far(far).is_some())
        .collect();
    let people: Vec<[u32; 2]> = pairs.iter().map(|p| p.people).collect();
    let mut draws = protocol.bootstrap.resample(&people, |weights| {
        let mut values = vec![
            mean_accuracy(&folds, Ranking::best_grid_threshold, weights),
            mean_accuracy(&folds, Ranking::best_exact_threshold, weights),
        ];
        match roc.weighted_rates(weights, &fars) {
            Some(rates) => values.extend([rates.auc, rates.eer].into_iter().chain(rates.tar)),
            None => values.resize(4 + fars.len(), f64::NAN),
        }
        values
    })?;
    let level = protocol.bootstrap.level;
    let tar_draws = draws.split_off(4);
    let Ok([accuracy_draws, exact_draws, auc_draws, eer_draws]) = <[Distribution; 4]>::try_from(draws) else {
        unreachable!("four statistics come before the rates at each FAR");
    };
    let tar_at_far = fars
        .iter()
        .zip(&tar_draws)
        .map(|(&far, draws)| TarAtFar {
            far,
            tar: draws.estimate(roc.tar_at_far(far).unwrap_or(0.0), level),
        })
        .collect();
    let column = |of: fn(&Fold) -> f64| per_fold.iter().map(of).collect::<Vec<f64>>();
    let (accuracy, accuracy_std) = mean_and_std(&column(|f| f.accuracy));
    let (exact_accuracy, exact_accuracy_std) = mean_and_std(&column(|f| f.exact_accuracy));
    let result = Verification {
        pairs: pairs.len(),
        genuine,
        impostor: pairs.len() - genuine,
        protocol: *protocol,
        accuracy: accuracy_draws.estimate(accuracy, level),
        accuracy_std,
        threshold: mean_and_std(&column(|f| f.threshold)).0,
        exact_accuracy: exact_draws.estimate(exact_accuracy, level),
        exact_accuracy_std,
        exact_threshold: mean_and_std(&column(|f| f.exact_threshold)).0,
        auc: auc_draws.estimate(roc.auc(), level),
        eer: eer_draws.estimate(roc.eer(), level),
        tar_at_far,
        val_at_far: val_at_far(&folds, VAL_FAR),
        mean_roc: mean_roc(&folds),
        folds: per_fold,
    };
    Ok(Scored {
        result,
        pairs: pairs.into(),
        distances,
        roc,
        accuracy_draws,
        exact_draws,
        auc_draws,
    })
}

/// The difference of two models, the first minus the second, on the same draws of people.
///
/// # Errors
/// When the two were not scored on the same pairs with the same protocol.
pub fn compare(first: &Scored, second: &Scored) -> Result<Comparison, EvalError> {
    if first.pairs != second.pairs {
        return Err(EvalError::NotPaired { what: "pairs" });
    }
    let (a, b) = (&first.result, &second.result);
    if (a.protocol.folds, a.protocol.bootstrap) != (b.protocol.folds, b.protocol.bootstrap) {
        return Err(EvalError::NotPaired { what: "protocols" });
    }
    let level = a.protocol.bootstrap.level;
    let grid = [a.accuracy.value, b.accuracy.value];
    let exact = [a.exact_accuracy.value, b.exact_accuracy.value];
    Ok(Comparison {
        accuracy: first
            .accuracy_draws
            .difference(&second.accuracy_draws, grid, level),
        exact_accuracy: first.exact_draws.difference(&second.exact_draws, exact, level),
        auc: first
            .auc_draws
            .difference(&second.auc_draws, [a.auc.value, b.auc.value], level),
    })
}

impl Scored {
    /// The numbers.
    pub fn result(&self) -> &Verification {
        &self.result
    }

    /// The pairs, in the list's order.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// Squared distance of each pair, in the list's order; with PCA, each under the projection of the fold that
    /// holds it out.
    pub fn distances(&self) -> &[f64] {
        &self.distances
    }

    /// Cosine similarities of the genuine and of the impostor pairs, for plots: 1 − distance / 2.
    pub fn cosines(&self) -> (Vec<f64>, Vec<f64>) {
        let of = |same: bool| {
            let pairs = self
                .pairs
                .iter()
                .zip(&self.distances)
                .filter(|(pair, _)| pair.same == same);
            pairs.map(|(_, d)| 1.0 - d / 2.0).collect()
        };
        (of(true), of(false))
    }

    /// The exact curve of all pairs, on negated squared distances.
    pub fn roc(&self) -> &Roc {
        &self.roc
    }

    /// The up to `count` worst pairs of each kind.
    pub fn mistakes(&self, count: usize) -> Mistakes {
        let same: Vec<bool> = self.pairs.iter().map(|pair| pair.same).collect();
        worst_pairs(&self.distances, &same, count)
    }
}

/// People for a list that says only which pictures are of one person: pictures joined by genuine pairs are one
/// person, any other picture is a person of its own. `pairs` are (left, right, same) rows; the answer is in their
/// order.
pub fn people_of_pairs(pairs: &[(usize, usize, bool)]) -> Vec<[u32; 2]> {
    let count = pairs
        .iter()
        .map(|&(left, right, _)| left.max(right) + 1)
        .max()
        .unwrap_or(0);
    let mut parent: Vec<u32> = (0..count as u32).collect();
    fn root(parent: &mut [u32], mut at: u32) -> u32 {
        while parent[at as usize] != at {
            parent[at as usize] = parent[parent[at as usize] as usize];
            at = parent[at as usize];
        }
        at
    }
    for &(left, right, _) in pairs.iter().filter(|pair| pair.2) {
        let (a, b) = (root(&mut parent, left as u32), root(&mut parent, right as u32));
        parent[a.max(b) as usize] = a.min(b);
    }
    pairs
        .iter()
        .map(|&(left, right, _)| [left, right].map(|row| root(&mut parent, row as u32)))
        .collect()
}

fn check(embeddings: &Embeddings, pairs: &[Pair], protocol: &Protocol) -> Result<(), EvalError> {
    let rows = embeddings.len();
    for (index, pair) in pairs.iter().enumerate() {
        if let Some(row) = [pair.left, pair.right].into_iter().find(|&row| row >= rows) {
            return Err(EvalError::UnknownRow {
                pair: index,
                row,
                rows,
            });
        }
    }
    let genuine = pairs.iter().filter(|pair| pair.same).count();
    if genuine == 0 || genuine == pairs.len() {
        return Err(EvalError::OneKindOfPair {
            genuine,
            impostor: pairs.len() - genuine,
        });
    }
    if protocol.folds < 2 || protocol.folds > pairs.len() {
        return Err(EvalError::BadFolds {
            pairs: pairs.len(),
            folds: protocol.folds,
        });
    }
    Ok(())
}

/// scikit-learn's KFold: contiguous, the first n mod k folds one longer.
fn contiguous_folds(pairs: usize, folds: usize) -> Vec<Range<usize>> {
    let (size, longer) = (pairs / folds, pairs % folds);
    let start = |fold: usize| fold * size + fold.min(longer);
    (0..folds).map(|fold| start(fold)..start(fold + 1)).collect()
}

fn projected_distances(
    all: &Matrix,
    pairs: &[Pair],
    test: &Range<usize>,
    components: usize,
) -> Result<Vec<f64>, EvalError> {
    let training = || {
        pairs
            .iter()
            .enumerate()
            .filter(|(index, _)| !test.contains(index))
    };
    let sides = training()
        .map(|(_, p)| p.left)
        .chain(training().map(|(_, p)| p.right));
    let data: Vec<f64> = sides.flat_map(|row| all.row(row)).copied().collect();
    let fitted = Pca::fit_matrix(
        Matrix {
            rows: data.len() / all.cols,
            cols: all.cols,
            data,
        },
        components,
    )?;
    let mut projected = fitted.project_matrix(all.clone());
    for row in 0..projected.rows {
        let row = projected.row_mut(row);
        let norm = dot(row, row).sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|x| *x /= norm);
        }
    }
    let distance = |p: &Pair| {
        projected
            .row(p.left)
            .iter()
            .zip(projected.row(p.right))
            .map(|(x, y)| (x - y).powi(2))
            .sum::<f64>()
    };
    Ok(pairs.iter().map(distance).collect())
}

/// The pairs of one side of a fold by rising distance.
struct Ranking {
    distances: Vec<f64>,
    pairs: Vec<u32>,
    same: Vec<bool>,
}

struct FoldPairs {
    train: Ranking,
    test: Ranking,
}

impl FoldPairs {
    fn new(distances: &[f64], pairs: &[Pair], test: &Range<usize>) -> Self {
        let (held_out, training): (Vec<u32>, Vec<u32>) =
            (0..pairs.len() as u32).partition(|&pair| test.contains(&(pair as usize)));
        let rank = |mut chosen: Vec<u32>| {
            chosen.sort_by(|&a, &b| distances[a as usize].total_cmp(&distances[b as usize]));
            Ranking {
                distances: chosen.iter().map(|&pair| distances[pair as usize]).collect(),
                same: chosen.iter().map(|&pair| pairs[pair as usize].same).collect(),
                pairs: chosen,
            }
        };
        Self {
            train: rank(training),
            test: rank(held_out),
        }
    }
}

const GRID: usize = 400;

fn grid_threshold(index: usize) -> f64 {
    index as f64 * 0.01
}

impl Ranking {
    /// What accepting one more pair does to the weight of right answers.
    fn gain(&self, at: usize, weights: &[f64]) -> f64 {
        let weight = weights[self.pairs[at] as usize];
        if self.same[at] { weight } else { -weight }
    }

    /// First threshold of the grid with the largest weight of right answers.
    fn best_grid_threshold(&self, weights: &[f64]) -> f64 {
        let (mut best, mut best_index) = (f64::NEG_INFINITY, 0);
        let (mut right, mut at) = (0.0, 0);
        for index in 0..GRID {
            let threshold = grid_threshold(index);
            while at < self.distances.len() && self.distances[at] < threshold {
                right += self.gain(at, weights);
                at += 1;
            }
            if right > best {
                (best, best_index) = (right, index);
            }
        }
        grid_threshold(best_index)
    }

    /// First of the midpoints between neighbouring distances of pairs with weight that has the largest weight of
    /// right answers; 0 when rejecting every pair is as good, just above the last when accepting every pair is best.
    fn best_exact_threshold(&self, weights: &[f64]) -> f64 {
        let (mut best, mut threshold) = (0.0, 0.0);
        let (mut right, mut last) = (0.0, f64::NEG_INFINITY);
        for (at, &distance) in self.distances.iter().enumerate() {
            let gain = self.gain(at, weights);
            if gain == 0.0 {
                continue;
            }
            if right > best && distance > last {
                (best, threshold) = (right, (last + distance) / 2.0);
            }
            right += gain;
            last = distance;
        }
        if right > best { last.next_up() } else { threshold }
    }

    /// Share of the weight answered rightly; NaN without weight.
    fn accuracy(&self, threshold: f64, weights: &[f64]) -> f64 {
        let (mut right, mut total) = (0.0, 0.0);
        for ((&pair, &same), &distance) in self.pairs.iter().zip(&self.same).zip(&self.distances) {
            let weight = weights[pair as usize];
            total += weight;
            right += if same == (distance < threshold) {
                weight
            } else {
                0.0
            };
        }
        right / total
    }

    /// Shares of the genuine and of the impostor pairs accepted; 0 for a kind without pairs.
    fn rates(&self, threshold: f64) -> (f64, f64) {
        let accepted = &self.same[..self.distances.partition_point(|&d| d < threshold)];
        let share = |kind: bool| {
            let count = |same: &[bool]| same.iter().filter(|&&same| same == kind).count() as f64;
            let all = count(&self.same);
            if all == 0.0 { 0.0 } else { count(accepted) / all }
        };
        (share(true), share(false))
    }
}

/// Mean over the folds that have weight of the accuracy with each fold's own best threshold.
fn mean_accuracy(folds: &[FoldPairs], best: fn(&Ranking, &[f64]) -> f64, weights: &[f64]) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for fold in folds {
        let accuracy = fold.test.accuracy(best(&fold.train, weights), weights);
        if !accuracy.is_nan() {
            sum += accuracy;
            count += 1.0;
        }
    }
    sum / count
}

fn mean_roc(folds: &[FoldPairs]) -> MeanRoc {
    let thresholds: Vec<f64> = (0..GRID).map(grid_threshold).collect();
    let (mut far, mut tar) = (vec![0.0; GRID], vec![0.0; GRID]);
    for fold in folds {
        for (index, &threshold) in thresholds.iter().enumerate() {
            let (accepted_genuine, accepted_impostor) = fold.test.rates(threshold);
            tar[index] += accepted_genuine / folds.len() as f64;
            far[index] += accepted_impostor / folds.len() as f64;
        }
    }
    MeanRoc { thresholds, far, tar }
}

fn val_at_far(folds: &[FoldPairs], target: f64) -> ValAtFar {
    let rates: Vec<(f64, f64)> = folds
        .iter()
        .map(|fold| fold.test.rates(fold.train.threshold_of_far(target)))
        .collect();
    let (val, val_std) = mean_and_std(&rates.iter().map(|r| r.0).collect::<Vec<_>>());
    let (far, _) = mean_and_std(&rates.iter().map(|r| r.1).collect::<Vec<_>>());
    ValAtFar {
        target,
        val,
        val_std,
        far,
    }
}

impl Ranking {
    fn threshold_of_far(&self, target: f64) -> f64 {
        const STEPS: usize = 4000;
        let impostor: Vec<f64> = self
            .distances
            .iter()
            .zip(&self.same)
            .filter(|(_, same)| !**same)
            .map(|(d, _)| *d)
            .collect();
        let threshold = |step: usize| step as f64 * 0.001;
        let far = |step: usize| match impostor.len() {
            0 => 0.0,
            all => impostor.partition_point(|&d| d < threshold(step)) as f64 / all as f64,
        };
        if far(STEPS - 1) < target {
            return 0.0;
        }
        let above = (0..STEPS).find(|&step| far(step) > target).unwrap_or(STEPS);
        if above == 0 || above == STEPS {
            return threshold(above.min(STEPS - 1));
        }
        let (low, high) = (far(above - 1), far(above));
        threshold(above - 1) + (target - low) / (high - low) * 0.001
    }
}

fn mean_and_std(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Two pictures of each of `people` people, `spread` apart, and a list that pairs them with each other and with
    /// the next person.
    fn sample(people: usize, spread: f32, seed: u64) -> (Embeddings, Vec<Pair>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let dim = 6;
        let mut data = Vec::new();
        for _ in 0..people {
            let center: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            for _ in 0..2 {
                data.extend(center.iter().map(|c| c + spread * rng.random_range(-1.0f32..1.0)));
            }
        }
        let mut pairs = Vec::new();
        for person in 0..people {
            let next = (person + 1) % people;
            let (a, b) = (person as u32, next as u32);
            pairs.push(Pair {
                left: 2 * person,
                right: 2 * person + 1,
                same: true,
                people: [a, a],
            });
            pairs.push(Pair {
                left: 2 * person,
                right: 2 * next + 1,
                same: false,
                people: [a, b],
            });
        }
        (Embeddings::new(dim, data).unwrap().normalized(), pairs)
    }

    /// The first candidate with the best share of right answers among (distance, same) pairs.
    fn naive_best(train: &[(f64, bool)], candidates: &[f64]) -> f64 {
        let mut best = (-1.0, 0.0);
        for &threshold in candidates {
            let right = train.iter().filter(|(d, same)| (*d < threshold) == *same).count() as f64;
            if right > best.0 {
                best = (right, threshold);
            }
        }
        best.1
    }

    fn exact_candidates(train: &[(f64, bool)]) -> Vec<f64> {
        let mut distances: Vec<f64> = train.iter().map(|p| p.0).collect();
        distances.sort_by(f64::total_cmp);
        distances.dedup();
        let midpoints = distances.windows(2).map(|w| (w[0] + w[1]) / 2.0);
        let last = distances.last().map(|d| d.next_up());
        [0.0].into_iter().chain(midpoints).chain(last).collect()
    }

    /// Distances on a coarse grid of their own, so that ties and values on thresholds are common.
    fn weighted_list() -> impl Strategy<Value = Vec<(f64, bool, usize)>> {
        prop::collection::vec(
            (
                (0u32..40).prop_map(|d| f64::from(d) * 0.1),
                any::<bool>(),
                0usize..4,
            ),
            4..60,
        )
    }

    proptest! {
        #[test]
        fn weighted_folds_agree_with_repeating_the_pairs(list in weighted_list(), folds in 2usize..4) {
            let distances: Vec<f64> = list.iter().map(|p| p.0).collect();
            let weights: Vec<f64> = list.iter().map(|p| p.2 as f64).collect();
            let pairs: Vec<Pair> =
                list.iter().map(|p| Pair { left: 0, right: 0, same: p.1, people: [0, 0] }).collect();
            let grid: Vec<f64> = (0..400).map(|i| f64::from(i) * 0.01).collect();
            for test in contiguous_folds(list.len(), folds) {
                let repeated = |held_out: bool| -> Vec<(f64, bool)> {
                    let chosen = list.iter().enumerate().filter(|(i, _)| test.contains(i) == held_out);
                    chosen.flat_map(|(_, p)| vec![(p.0, p.1); p.2]).collect()
                };
                let (train, held_out) = (repeated(false), repeated(true));
                let fold = FoldPairs::new(&distances, &pairs, &test);
                let on_grid = fold.train.best_grid_threshold(&weights);
                prop_assert_eq!(on_grid, naive_best(&train, &grid));
                let exact = fold.train.best_exact_threshold(&weights);
                prop_assert_eq!(exact, naive_best(&train, &exact_candidates(&train)));
                for threshold in [on_grid, exact] {
                    let right = held_out.iter().filter(|(d, same)| (*d < threshold) == *same).count() as f64;
                    let accuracy = fold.test.accuracy(threshold, &weights);
                    let expected = right / held_out.len() as f64;
                    prop_assert!(accuracy == expected || (accuracy.is_nan() && expected.is_nan()));
                }
            }
        }
    }

    #[test]
    fn folds_are_scikit_learns() {
        let lengths: Vec<usize> = contiguous_folds(603, 10).iter().map(Range::len).collect();
        assert_eq!(lengths, [61, 61, 61, 60, 60, 60, 60, 60, 60, 60]);
        assert_eq!(contiguous_folds(5, 2), [0..3, 3..5]);
    }

    #[test]
    fn a_better_model_is_told_from_a_worse_one_by_the_paired_interval() {
        let protocol = Protocol::default();
        let (good, pairs) = sample(150, 0.2, 1);
        let (bad, _) = sample(150, 1.2, 2);
        let (good, bad) = (
            verify(&good, &pairs, &protocol).unwrap(),
            verify(&bad, &pairs, &protocol).unwrap(),
        );
        let of = |scored: &Scored| scored.result().accuracy.value;
        assert!(
            of(&good) > 0.95 && (0.5..0.85).contains(&of(&bad)),
            "{} {}",
            of(&good),
            of(&bad)
        );
        let comparison = compare(&good, &bad).unwrap();
        assert!(comparison.accuracy.is_clear() && comparison.auc.is_clear());
        assert_eq!(comparison.accuracy.value, of(&good) - of(&bad));
        assert_eq!(comparison.auc.share_better, 1.0);
        let none = compare(&good, &good).unwrap();
        assert!(!none.accuracy.is_clear() && none.accuracy.value == 0.0 && none.accuracy.share_better == 0.5);
        let without = Protocol {
            bootstrap: Bootstrap {
                draws: 0,
                ..protocol.bootstrap
            },
            ..protocol
        };
        let quick = verify(&sample(150, 0.2, 1).0, &pairs, &without).unwrap();
        assert_eq!(
            (quick.result().accuracy.value, quick.result().accuracy.interval),
            (of(&good), None)
        );
        let interval = good.result().accuracy.interval.unwrap();
        assert!(interval.low <= of(&good) && of(&good) <= interval.high && interval.low < interval.high);
    }

    #[test]
    fn results_are_the_same_on_any_number_of_threads_and_survive_json() {
        let (embeddings, pairs) = sample(60, 0.6, 3);
        for pca in [None, Some(4)] {
            let protocol = Protocol {
                pca,
                bootstrap: Bootstrap {
                    draws: 100,
                    ..Default::default()
                },
                folds: 5,
            };
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                pool.install(|| verify(&embeddings, &pairs, &protocol))
                    .unwrap()
                    .result()
                    .clone()
            };
            let result = on(1);
            assert!(result == on(4));
            let json = serde_json::to_string(&result).unwrap();
            let read: Verification = serde_json::from_str(&json).unwrap();
            assert_eq!((read.pairs, read.protocol), (result.pairs, result.protocol));
            assert!((read.accuracy.value - result.accuracy.value).abs() < 1e-12);
        }
    }

    #[test]
    fn val_at_far_is_held_out_and_interpolated() {
        // Training impostors of the only other fold at 1.0, 1.1, …, 1.9: FAR 0.1 is reached between 1.000 and 1.001.
        let distances: Vec<f64> = (0..20).map(|i| 1.0 + f64::from(i % 10) * 0.1).collect();
        let pairs: Vec<Pair> = (0..20)
            .map(|_| Pair {
                left: 0,
                right: 0,
                same: false,
                people: [0, 1],
            })
            .collect();
        let fold = FoldPairs::new(&distances, &pairs, &(10..20));
        assert!((fold.train.threshold_of_far(0.05) - 1.0005).abs() < 1e-9);
        assert!((fold.train.threshold_of_far(0.1) - 1.1).abs() < 1e-9);
        assert_eq!(fold.train.threshold_of_far(1.0), 3.999);
        let far_apart: Vec<f64> = vec![4.0; 20];
        assert_eq!(
            FoldPairs::new(&far_apart, &pairs, &(10..20))
                .train
                .threshold_of_far(1e-3),
            0.0
        );
    }

    #[test]
    fn people_follow_from_genuine_pairs() {
        let pairs = [
            (0, 1, true),
            (1, 2, true),
            (3, 2, false),
            (4, 5, false),
            (5, 4, false),
        ];
        let people = people_of_pairs(&pairs);
        assert_eq!(people, [[0, 0], [0, 0], [3, 0], [4, 5], [5, 4]]);
        assert!(people_of_pairs(&[]).is_empty());
    }

    #[test]
    fn lists_that_cannot_be_scored_are_errors() {
        let (embeddings, pairs) = sample(8, 0.1, 4);
        let of = |pairs: &[Pair], protocol| {
            verify(&embeddings, pairs, &protocol)
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        let mut unknown = pairs.clone();
        unknown[3].right = 16;
        assert_eq!(
            of(&unknown, Protocol::default()),
            "pair 3 names embedding 16, but there are 16"
        );
        let genuine: Vec<Pair> = pairs.iter().copied().filter(|p| p.same).collect();
        assert!(of(&genuine, Protocol::default()).starts_with("the list has 8 genuine and 0 impostor pairs"));
        let many = Protocol {
            folds: 17,
            ..Default::default()
        };
        assert!(of(&pairs, many).starts_with("16 pairs cannot be cut into 17 folds\nhint: "));
        assert!(
            of(
                &pairs,
                Protocol {
                    pca: Some(7),
                    ..Default::default()
                }
            )
            .contains("7 principal components")
        );
        let (a, b) = (
            verify(&embeddings, &pairs, &Protocol::default()),
            Protocol {
                folds: 4,
                ..Default::default()
            },
        );
        let error = compare(&a.unwrap(), &verify(&embeddings, &pairs, &b).unwrap()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot compare two results: their protocols differ")
        );
    }
}
