//! Intervals by resampling people, not pairs.
//!
//! Pairs that share a person are not independent: ten genuine pairs may come from five pictures of one face, and a
//! binomial interval over pairs is too narrow. So *people* are drawn with replacement, as many as there are. With
//! m(a) the number of times person a was drawn, a pair of a and b weighs
//!
//! - m(a) when a = b, for a person drawn twice brings their genuine pairs twice,
//! - m(a)·m(b) otherwise, for each copy of a meets each copy of b,
//!
//! and a statistic of the draw is that of the pairs so weighted. The interval lies between the quantiles of the
//! draws (percentile bootstrap, linear interpolation between order statistics).
//!
//! Weighing a pair by a product is Owen's pigeonhole bootstrap (2007). It never claims too much, and where pairs of
//! two people hardly share anyone (LFW's impostor half) it claims too little: for such pairs alone, intervals are up
//! to √3 times as wide as resampling the pairs would make them.
//!
//! Two models are compared on the *same* draws: the draw-by-draw difference removes what the choice of people does
//! to both, and its interval is what says whether one is better.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::EvalError;

/// How many draws, from which seed, and how wide an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bootstrap {
    /// Number of draws; 0 for no intervals.
    pub draws: usize,
    /// Seed; draw i depends on (seed, i) alone.
    pub seed: u64,
    /// Share of the draws inside the interval, 0 to 1.
    pub level: f64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self {
            draws: 1000,
            seed: 0,
            level: 0.95,
        }
    }
}

/// The ends of an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A number with its bootstrap interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The statistic of the pairs as they are.
    pub value: f64,
    /// Its interval; none when there are fewer than two people, or most draws leave the statistic undefined.
    pub interval: Option<Interval>,
}

/// The difference of two models on the same draws.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// First model minus second, on the pairs as they are.
    pub value: f64,
    /// Interval of the difference over the draws.
    pub interval: Option<Interval>,
    /// Share of the draws in which the first model is better; a tie counts half.
    pub share_better: f64,
}

impl Estimate {
    /// As text for a share: `79.73% [78.10, 81.25]`.
    pub fn as_percent(&self) -> String {
        match self.interval {
            Some(Interval { low, high }) => {
                format!(
                    "{:.2}% [{:.2}, {:.2}]",
                    100.0 * self.value,
                    100.0 * low,
                    100.0 * high
                )
            }
            None => format!("{:.2}%", 100.0 * self.value),
        }
    }
}

impl Difference {
    /// As text for a difference of shares: `+1.93 points [+0.40, +3.31]`.
    pub fn as_points(&self) -> String {
        let points = |x: f64| format!("{:+.2}", 100.0 * x).replace('-', "−");
        match self.interval {
            Some(Interval { low, high }) => {
                format!(
                    "{} points [{}, {}]",
                    points(self.value),
                    points(low),
                    points(high)
                )
            }
            None => format!("{} points", points(self.value)),
        }
    }

    /// Whether the whole interval lies on one side of zero.
    pub fn is_clear(&self) -> bool {
        self.interval
            .is_some_and(|interval| interval.low > 0.0 || interval.high < 0.0)
    }
}

/// A statistic's value in each draw, in the order of the draws; NaN where the draw leaves it undefined.
#[derive(Clone, Debug)]
pub struct Distribution {
    values: Vec<f64>,
}

impl Distribution {
    /// The value in each draw.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The central interval that holds `level` of the draws; none when most are undefined.
    pub fn interval(&self, level: f64) -> Option<Interval> {
        let mut defined: Vec<f64> = self.values.iter().copied().filter(|x| !x.is_nan()).collect();
        if defined.is_empty() || 2 * defined.len() < self.values.len() {
            return None;
        }
        defined.sort_by(f64::total_cmp);
        let tail = (1.0 - level) / 2.0;
        Some(Interval {
            low: quantile(&defined, tail),
            high: quantile(&defined, 1.0 - tail),
        })
    }

    /// A value with this distribution's interval.
    pub fn estimate(&self, value: f64, level: f64) -> Estimate {
        Estimate {
            value,
            interval: self.interval(level),
        }
    }

    /// Draw-by-draw difference to another model's distribution. `values` are the two statistics on the pairs as
    /// they are. Meaningful only when both come from the same pairs and the same [`Bootstrap`].
    pub fn difference(&self, other: &Self, values: [f64; 2], level: f64) -> Difference {
        let differences: Vec<f64> = self
            .values
            .iter()
            .zip(&other.values)
            .map(|(x, y)| x - y)
            .collect();
        let defined = differences.iter().filter(|x| !x.is_nan());
        let (mut wins, mut count) = (0.0, 0.0);
        for &difference in defined {
            count += 1.0;
            wins += if difference > 0.0 {
                1.0
            } else {
                0.5 * f64::from(difference == 0.0)
            };
        }
        Difference {
            value: values[0] - values[1],
            interval: Distribution { values: differences }.interval(level),
            share_better: if count > 0.0 { wins / count } else { 0.5 },
        }
    }
}

/// Quantile of ascending values, with linear interpolation between neighbours.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (position - below as f64) * (sorted[above] - sorted[below])
}

impl Bootstrap {
    /// The distributions of several statistics over the draws.
    ///
    /// `people` names the two people of each pair (equal for a genuine pair; for lists with one picture per person,
    /// a picture is a person). `statistics` gets each pair's weight in a draw, in the order of `people`, and
    /// returns as many values each time, NaN where undefined.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn resample(
        &self,
        people: &[[u32; 2]],
        statistics: impl Fn(&[f64]) -> Vec<f64> + Sync,
    ) -> Result<Vec<Distribution>, EvalError> {
        if !(self.level > 0.0 && self.level < 1.0) {
            let expected = "a share between 0 and 1";
            return Err(EvalError::BadSetting {
                name: "bootstrap.level",
                value: self.level,
                expected,
            });
        }
        let (numbered, count) = numbered(people);
        let draws: Vec<Vec<f64>> = (0..self.draws)
            .into_par_iter()
            .map_init(
                || (vec![0u32; count], vec![0.0; people.len()]),
                |(multiplicity, weights), draw| {
                    self.draw(draw, multiplicity);
                    for (weight, &[a, b]) in weights.iter_mut().zip(&numbered) {
                        let (first, second) = (multiplicity[a as usize], multiplicity[b as usize]);
                        *weight = f64::from(if a == b { first } else { first * second });
                    }
                    statistics(weights)
                },
            )
            .collect();
        // Counted on the pairs as they are, for there may be no draw to count in.
        let count_of_statistics = statistics(&vec![1.0; people.len()]).len();
        // One person always weighs 1: every draw is the sample itself, and the interval would have no width.
        let usable = count >= 2;
        let of = |index: usize| {
            draws
                .iter()
                .map(|draw| if usable { draw[index] } else { f64::NAN })
                .collect()
        };
        Ok((0..count_of_statistics)
            .map(|index| Distribution { values: of(index) })
            .collect())
    }

    /// How often each person is drawn.
    fn draw(&self, draw: usize, multiplicity: &mut [u32]) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(draw as u64);
        multiplicity.fill(0);
        for _ in 0..multiplicity.len() {
            let person = rng.random_range(0..multiplicity.len() as u32);
            multiplicity[person as usize] += 1;
        }
    }
}

/// The same people numbered 0, 1, … in ascending order, and how many there are.
fn numbered(people: &[[u32; 2]]) -> (Vec<[u32; 2]>, usize) {
    let mut distinct: Vec<u32> = people.iter().flatten().copied().collect();
    distinct.sort_unstable();
    distinct.dedup();
    let number = |person| distinct.partition_point(|&other| other < person) as u32;
    (
        people.iter().map(|pair| pair.map(number)).collect(),
        distinct.len(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEOPLE: [[u32; 2]; 6] = [[7, 7], [9, 9], [7, 9], [30, 30], [30, 7], [9, 30]];
    const VALUES: [f64; 6] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];

    fn weighted_mean(weights: &[f64]) -> f64 {
        weights.iter().zip(VALUES).map(|(w, v)| w * v).sum::<f64>() / weights.iter().sum::<f64>()
    }

    #[test]
    fn weights_are_explicit_resampling() {
        let bootstrap = Bootstrap {
            draws: 50,
            seed: 3,
            level: 0.9,
        };
        let fast = bootstrap
            .resample(&PEOPLE, |weights| vec![weighted_mean(weights)])
            .unwrap();
        for draw in 0..50 {
            // The people drawn, as a list; then every pair between copies, genuine pairs once per copy.
            let mut multiplicity = [0; 3];
            bootstrap.draw(draw, &mut multiplicity);
            assert_eq!(multiplicity.iter().sum::<u32>(), 3);
            let drawn: Vec<u32> = [7, 9, 30]
                .iter()
                .zip(multiplicity)
                .flat_map(|(&p, m)| vec![p; m as usize])
                .collect();
            let mut sample = Vec::new();
            for (pair, value) in PEOPLE.iter().zip(VALUES) {
                for (i, &left) in drawn.iter().enumerate() {
                    if pair[0] == pair[1] {
                        sample.extend((left == pair[0]).then_some(value));
                        continue;
                    }
                    let rights = drawn
                        .iter()
                        .enumerate()
                        .filter(|&(j, &right)| j != i && [left, right] == *pair);
                    sample.extend(rights.map(|_| value));
                }
            }
            let naive = sample.iter().sum::<f64>() / sample.len() as f64;
            assert!((fast[0].values()[draw] - naive).abs() < 1e-12);
        }
    }

    #[test]
    fn draws_do_not_depend_on_threads_but_on_the_seed() {
        let run = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let bootstrap = Bootstrap {
                draws: 200,
                seed,
                level: 0.95,
            };
            pool.install(|| bootstrap.resample(&PEOPLE, |w| vec![weighted_mean(w)]))
                .unwrap()[0]
                .values
                .clone()
        };
        assert_eq!(run(1, 0), run(3, 0));
        assert_ne!(run(1, 0), run(1, 1));
    }

    #[test]
    fn interval_of_a_mean_has_the_textbook_width() {
        // 400 people with one genuine pair each: resampling people is resampling values.
        let people: Vec<[u32; 2]> = (0..400).map(|i| [i, i]).collect();
        let values: Vec<f64> = (0..400).map(|i| f64::from(i) / 400.0).collect();
        let mean = |w: &[f64]| w.iter().zip(&values).map(|(w, v)| w * v).sum::<f64>() / w.iter().sum::<f64>();
        let interval = Bootstrap {
            draws: 2000,
            ..Bootstrap::default()
        }
        .resample(&people, |w| vec![mean(w)])
        .unwrap()[0]
            .interval(0.95)
            .unwrap();
        let expected = 2.0 * 1.96 * (1.0f64 / 12.0 / 400.0).sqrt();
        assert!(((interval.high - interval.low) / expected - 1.0).abs() < 0.1);
        assert!(interval.low < 0.49875 && 0.49875 < interval.high);
    }

    #[test]
    fn a_paired_difference_is_narrower_than_its_parts() {
        let people: Vec<[u32; 2]> = (0..100).map(|i| [i, i]).collect();
        let mean = |w: &[f64], shift: f64| {
            let sum: f64 = w
                .iter()
                .enumerate()
                .map(|(i, w)| w * ((i * i % 17) as f64 + shift))
                .sum();
            sum / w.iter().sum::<f64>()
        };
        let draws = Bootstrap::default()
            .resample(&people, |w| vec![mean(w, 0.5), mean(w, 0.0), f64::NAN])
            .unwrap();
        let difference = draws[0].difference(&draws[1], [2.5, 2.0], 0.95);
        let interval = difference.interval.unwrap();
        assert!((interval.low - 0.5).abs() < 1e-9 && (interval.high - 0.5).abs() < 1e-9);
        assert!(difference.is_clear() && difference.share_better == 1.0 && difference.value == 0.5);
        assert_eq!(draws[0].difference(&draws[0], [1.0, 1.0], 0.95).share_better, 0.5);
        assert_eq!(draws[2].interval(0.95), None);
    }

    #[test]
    fn numbers_are_written_as_percentages_and_points() {
        let interval = Some(Interval {
            low: -0.004,
            high: 0.0331,
        });
        let difference = Difference {
            value: 0.0193,
            interval,
            share_better: 0.9,
        };
        assert_eq!(difference.as_points(), "+1.93 points [−0.40, +3.31]");
        assert!(!difference.is_clear());
        let estimate = Estimate {
            value: 0.79734,
            interval: Some(Interval {
                low: 0.781,
                high: 0.8125,
            }),
        };
        assert_eq!(estimate.as_percent(), "79.73% [78.10, 81.25]");
        assert_eq!(
            Estimate {
                interval: None,
                ..estimate
            }
            .as_percent(),
            "79.73%"
        );
    }

    #[test]
    fn without_draws_or_a_second_person_there_is_no_interval() {
        let count = |bootstrap: Bootstrap| bootstrap.resample(&PEOPLE, |_| vec![0.0]).map(|d| d.len());
        assert!(
            count(Bootstrap {
                level: 0.0,
                ..Bootstrap::default()
            })
            .is_err()
        );
        assert!(
            count(Bootstrap {
                level: 1.0,
                ..Bootstrap::default()
            })
            .is_err()
        );
        let none = Bootstrap {
            draws: 0,
            ..Bootstrap::default()
        }
        .resample(&PEOPLE, |_| vec![0.0; 2])
        .unwrap();
        assert_eq!((none.len(), none[1].interval(0.95)), (2, None));
        assert_eq!(none[0].difference(&none[1], [0.5, 0.5], 0.95).share_better, 0.5);
        let alone = Bootstrap::default()
            .resample(&[[4, 4]; 3], |_| vec![0.0])
            .unwrap();
        assert_eq!(alone[0].interval(0.95), None);
    }
}
