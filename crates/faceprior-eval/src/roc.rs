//! Rates at every threshold: AUC, EER, TAR at FAR and the points of the curve.
//!
//! Scores are similarities: the higher, the more alike. Pass distances negated. A pair is accepted at a threshold
//! when its score is at or above it; FAR is the share of impostor pairs accepted (FMR, FPR), TAR that of genuine
//! pairs (TPR, 1 − FNMR).

use serde::{Deserialize, Serialize};

use crate::EvalError;

/// The scores of a list of pairs, ranked once; every rate is then one pass.
#[derive(Clone, Debug)]
pub struct Roc {
    /// By falling score.
    ranked: Vec<Ranked>,
    genuine: usize,
    impostor: usize,
}

#[derive(Clone, Copy, Debug)]
struct Ranked {
    score: f64,
    pair: u32,
    genuine: bool,
}

/// One operating point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RocPoint {
    /// Pairs at or above it are accepted.
    pub threshold: f64,
    /// Share of impostor pairs accepted.
    pub far: f64,
    /// Share of genuine pairs accepted.
    pub tar: f64,
}

/// The rates of one pass over weighted pairs.
#[derive(Clone, Debug)]
pub(crate) struct Rates {
    pub(crate) auc: f64,
    pub(crate) eer: f64,
    /// At each FAR asked for.
    pub(crate) tar: Vec<f64>,
}

impl Roc {
    /// Ranks the scores of genuine and of impostor pairs.
    ///
    /// # Errors
    /// When either is empty.
    pub fn new(genuine: &[f64], impostor: &[f64]) -> Result<Self, EvalError> {
        let scores: Vec<f64> = genuine.iter().chain(impostor).copied().collect();
        let same: Vec<bool> = (0..scores.len()).map(|i| i < genuine.len()).collect();
        Self::of_pairs(&scores, &same)
    }

    /// Ranks the scores of pairs, each said to be genuine or not.
    ///
    /// # Errors
    /// When there is none of either kind.
    pub fn of_pairs(scores: &[f64], same: &[bool]) -> Result<Self, EvalError> {
        let genuine = same.iter().filter(|&&same| same).count();
        let impostor = same.len() - genuine;
        if genuine == 0 || impostor == 0 {
            return Err(EvalError::OneKindOfPair { genuine, impostor });
        }
        let mut ranked: Vec<Ranked> = (0u32..)
            .zip(scores.iter().zip(same))
            .map(|(pair, (&score, &genuine))| Ranked { score, pair, genuine })
            .collect();
        ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(Self {
            ranked,
            genuine,
            impostor,
        })
    }

    /// Area under the curve: the chance that a genuine pair scores above an impostor pair, a tie counting half.
    /// Exact over all pairs of pairs.
    pub fn auc(&self) -> f64 {
        self.plain_rates(&[]).auc
    }

    /// Equal error rate: where FAR = 1 − TAR, on the straight line between the two operating points around it.
    pub fn eer(&self) -> f64 {
        self.plain_rates(&[]).eer
    }

    /// TAR at the FAR `far`: the threshold is the ⌊far·n⌋-th (from 0) largest of the n impostor scores, and the
    /// genuine scores strictly above it count. None when far·n < 1: too few impostor pairs to speak of that rate.
    pub fn tar_at_far(&self, far: f64) -> Option<f64> {
        (accepted_impostors(far, self.impostor as f64) >= 1.0).then(|| self.plain_rates(&[far]).tar[0])
    }

    /// The corners of the curve, from (0, 0) to (1, 1) by falling threshold: the points between which it runs
    /// straight. Tied scores make one step.
    pub fn points(&self) -> Vec<RocPoint> {
        let first = self.ranked[0].score.next_up();
        let mut points = vec![RocPoint {
            threshold: first,
            far: 0.0,
            tar: 0.0,
        }];
        let (mut genuine, mut impostor) = (0usize, 0usize);
        for tie in self.ranked.chunk_by(|a, b| a.score == b.score) {
            let own = tie.iter().filter(|pair| pair.genuine).count();
            genuine += own;
            impostor += tie.len() - own;
            let far = impostor as f64 / self.impostor as f64;
            let tar = genuine as f64 / self.genuine as f64;
            let point = RocPoint {
                threshold: tie[0].score,
                far,
                tar,
            };
            let end = points.len() - 1;
            let straight_on = end > 0 && {
                let (a, b) = (points[end - 1], points[end]);
                (a.far == b.far && b.far == far) || (a.tar == b.tar && b.tar == tar)
            };
            if straight_on {
                points[end] = point;
            } else {
                points.push(point);
            }
        }
        points
    }

    fn plain_rates(&self, fars: &[f64]) -> Rates {
        let totals = [self.genuine as f64, self.impostor as f64];
        self.rates_with(|_| 1.0, totals, fars)
    }

    /// The rates when pair i of the list counts `weights[i]` times; none when one kind has no weight.
    pub(crate) fn weighted_rates(&self, weights: &[f64], fars: &[f64]) -> Option<Rates> {
        let mut totals = [0.0, 0.0];
        for pair in &self.ranked {
            totals[usize::from(!pair.genuine)] += weights[pair.pair as usize];
        }
        (totals[0] > 0.0 && totals[1] > 0.0)
            .then(|| self.rates_with(|pair| weights[pair as usize], totals, fars))
    }

    fn rates_with(&self, weight: impl Fn(u32) -> f64, totals: [f64; 2], fars: &[f64]) -> Rates {
        let [all_genuine, all_impostor] = totals;
        let limits: Vec<f64> = fars
            .iter()
            .map(|&far| accepted_impostors(far, all_impostor))
            .collect();
        let mut tar = vec![f64::NAN; fars.len()];
        let (mut genuine, mut impostor) = (0.0, 0.0);
        let mut area = 0.0;
        let mut eer = None;
        let mut at = 0;
        while at < self.ranked.len() {
            let score = self.ranked[at].score;
            let mut tied = [0.0, 0.0];
            while let Some(pair) = self.ranked.get(at).filter(|pair| pair.score == score) {
                tied[usize::from(!pair.genuine)] += weight(pair.pair);
                at += 1;
            }
            area += tied[0] * (all_impostor - impostor - 0.5 * tied[1]);
            if tied[1] > 0.0 {
                for (tar, &limit) in tar.iter_mut().zip(&limits) {
                    if tar.is_nan() && impostor + tied[1] > limit {
                        *tar = genuine / all_genuine;
                    }
                }
            }
            if eer.is_none() {
                // FAR − FRR climbs from −1 to 1; the first step to zero or above holds the crossing.
                let excess = |g: f64, i: f64| i / all_impostor - (1.0 - g / all_genuine);
                let (before, after) = (
                    excess(genuine, impostor),
                    excess(genuine + tied[0], impostor + tied[1]),
                );
                if after >= 0.0 && after > before {
                    eer = Some((impostor - before / (after - before) * tied[1]) / all_impostor);
                }
            }
            genuine += tied[0];
            impostor += tied[1];
        }
        tar.iter_mut()
            .filter(|tar| tar.is_nan())
            .for_each(|tar| *tar = 1.0);
        Rates {
            auc: area / (all_genuine * all_impostor),
            eer: eer.unwrap_or(0.5),
            tar,
        }
    }
}

/// ⌊far·n⌋, of the real product: 0.001·3000 is 3 whatever the rounding of 0.001.
fn accepted_impostors(far: f64, impostors: f64) -> f64 {
    (far * impostors * (1.0 + 1e-12)).floor()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Scores on a coarse grid, so that ties are common.
    fn scores() -> impl Strategy<Value = Vec<f64>> {
        prop::collection::vec((0i32..12).prop_map(f64::from), 1..40)
    }

    proptest! {
        #[test]
        fn auc_is_the_share_of_pairs_of_pairs_in_order(genuine in scores(), impostor in scores()) {
            let mut wins = 0.0;
            for g in &genuine {
                for i in &impostor {
                    wins += if g > i { 1.0 } else { 0.5 * f64::from(g == i) };
                }
            }
            let expected = wins / (genuine.len() * impostor.len()) as f64;
            let roc = Roc::new(&genuine, &impostor).unwrap();
            prop_assert!((roc.auc() - expected).abs() < 1e-12);
            // The trapezoids under the corners hold the same area.
            let points = roc.points();
            let area: f64 = points.windows(2).map(|w| (w[1].far - w[0].far) * (w[0].tar + w[1].tar) / 2.0).sum();
            prop_assert!((area - expected).abs() < 1e-12);
        }

        #[test]
        fn tar_at_far_follows_its_definition(genuine in scores(), impostor in scores(), far in 0.0..1.0f64) {
            let mut sorted = impostor.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let index = (far * sorted.len() as f64).floor() as usize;
            let above = genuine.iter().filter(|&&g| g > sorted[index]).count() as f64;
            let expected = (index >= 1).then_some(above / genuine.len() as f64);
            prop_assert_eq!(Roc::new(&genuine, &impostor).unwrap().tar_at_far(far), expected);
        }

        #[test]
        fn integer_weights_are_repetitions(
            pairs in prop::collection::vec((0i32..12, any::<bool>(), 0usize..4), 1..40)
        ) {
            let scores: Vec<f64> = pairs.iter().map(|p| f64::from(p.0)).collect();
            let same: Vec<bool> = pairs.iter().map(|p| p.1).collect();
            let weights: Vec<f64> = pairs.iter().map(|p| p.2 as f64).collect();
            let repeated = |kind: bool| -> Vec<f64> {
                pairs.iter().filter(|p| p.1 == kind).flat_map(|p| vec![f64::from(p.0); p.2]).collect()
            };
            let fars = [0.1, 0.5];
            if let Ok(roc) = Roc::of_pairs(&scores, &same) {
                let weighted = roc.weighted_rates(&weights, &fars);
                match Roc::new(&repeated(true), &repeated(false)) {
                    Err(_) => prop_assert!(weighted.is_none()),
                    Ok(explicit) => {
                        let (weighted, plain) = (weighted.unwrap(), explicit.plain_rates(&fars));
                        prop_assert!((weighted.auc - plain.auc).abs() < 1e-12);
                        prop_assert!((weighted.eer - plain.eer).abs() < 1e-12);
                        prop_assert_eq!(weighted.tar, plain.tar);
                    }
                }
            }
        }

        #[test]
        fn eer_lies_on_the_curve(genuine in scores(), impostor in scores()) {
            let roc = Roc::new(&genuine, &impostor).unwrap();
            let eer = roc.eer();
            let on_a_segment = roc.points().windows(2).any(|w| {
                let (dx, dy) = (w[1].far - w[0].far, w[1].tar - w[0].tar);
                let cross = (eer - w[0].far) * dy - (1.0 - eer - w[0].tar) * dx;
                let inside = |low: f64, x: f64, high: f64| low - 1e-9 <= x && x <= high + 1e-9;
                cross.abs() < 1e-9 && inside(w[0].far, eer, w[1].far) && inside(w[0].tar, 1.0 - eer, w[1].tar)
            });
            prop_assert!(on_a_segment, "{eer}");
        }
    }

    #[test]
    fn separated_scores_are_perfect_and_equal_ones_are_chance() {
        let perfect = Roc::new(&[2.0, 3.0], &[0.0, 1.0]).unwrap();
        assert_eq!(
            (perfect.auc(), perfect.eer(), perfect.tar_at_far(0.5)),
            (1.0, 0.0, Some(1.0))
        );
        let chance = Roc::new(&[1.0; 4], &[1.0; 9]).unwrap();
        assert_eq!((chance.auc(), chance.eer()), (0.5, 0.5));
        assert_eq!(chance.tar_at_far(1.0), Some(1.0));
        assert_eq!(chance.points().len(), 2);
        assert!(matches!(
            Roc::new(&[], &[1.0]),
            Err(EvalError::OneKindOfPair {
                genuine: 0,
                impostor: 1
            })
        ));
    }

    #[test]
    fn a_rate_that_is_a_whole_number_of_impostors_is_not_lost_to_rounding() {
        for n in 1..=20_000u32 {
            assert_eq!(accepted_impostors(1e-3, f64::from(n)), f64::from(n / 1000));
        }
    }
}
