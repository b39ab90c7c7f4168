//! What a pipeline showed, in three lines, and the floors below which it counts as having failed.
//!
//! Each line says one thing that was learnt: the prior's pictures came nearer to the real ones, the encoder finds
//! pictures again, the recogniser tells people apart that it has never seen. Whether the prior helped is reported as it
//! fell and is no floor.

use std::path::Path;

use faceprior_train::TrainError;
use faceprior_train::recipe::StageName;
use faceprior_train::run::read_log;
use serde::Serialize;
use serde_json::Value;

use crate::pipeline::Scores;

/// Accuracy of guessing.
const CHANCE: f64 = 0.5;

/// The numbers that the three lines stand on.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// Distance of the prior's samples to the real pictures, at the first evaluation and at the last.
    pub sample_distance: [f64; 2],
    /// Mean squared error of held-out reconstructions, at the last evaluation.
    pub reconstruction_error: f64,
    /// That of the mean picture, which looks at nothing.
    pub mean_picture_error: f64,
    /// Accuracy on people seen nowhere else, from the prior, and the lower end of its interval.
    pub accuracy: [f64; 2],
    /// The same, from scratch.
    pub scratch_accuracy: [f64; 2],
    /// From the prior minus from scratch, as text with its interval.
    pub difference: String,
}

impl Findings {
    /// Reads them from the stages' logs and the scores.
    ///
    /// # Errors
    /// Logs that cannot be read or lack an evaluation.
    pub fn of(dir: &Path, scores: &Scores) -> Result<Self, TrainError> {
        let prior = Evaluations::read(dir, StageName::Prior)?;
        let encoder = Evaluations::read(dir, StageName::Encoder)?;
        let accuracy = |scored: &faceprior_eval::verification::Scored| {
            let accuracy = scored.result().accuracy;
            [
                accuracy.value,
                accuracy.interval.map_or(accuracy.value, |interval| interval.low),
            ]
        };
        Ok(Self {
            sample_distance: [prior.first("sample_distance")?, prior.last("sample_distance")?],
            reconstruction_error: encoder.last("mse")?,
            mean_picture_error: encoder.last("mse_of_mean_picture")?,
            accuracy: accuracy(&scores.pretrained),
            scratch_accuracy: accuracy(&scores.scratch),
            difference: scores.difference.accuracy.as_points(),
        })
    }

    /// One line for each stage.
    pub fn lines(&self) -> [String; 3] {
        let [early, late] = self.sample_distance;
        let percent =
            |[value, low]: [f64; 2]| format!("{:.1}% (at least {:.1}%)", 100.0 * value, 100.0 * low);
        [
            format!("prior       its samples came from {early:.3} to {late:.3} of the real pictures"),
            format!(
                "encoder     held-out pictures are found again with error {:.4}; the mean picture has {:.4}",
                self.reconstruction_error, self.mean_picture_error
            ),
            format!(
                "recogniser  strangers told apart: {} from the prior, {} from scratch; difference {}",
                percent(self.accuracy),
                percent(self.scratch_accuracy),
                self.difference
            ),
        ]
    }

    /// The floors that were missed; empty when all is well.
    pub fn failures(&self) -> Vec<String> {
        let [early, late] = self.sample_distance;
        let floors = [
            (
                late < early,
                format!(
                    "the prior's last samples are {late:.3} from the real pictures, its first {early:.3}"
                ),
            ),
            (
                self.reconstruction_error < self.mean_picture_error,
                format!(
                    "reconstructions have error {:.4}, no less than the mean picture's {:.4}",
                    self.reconstruction_error, self.mean_picture_error
                ),
            ),
            (
                self.accuracy[1] > CHANCE,
                format!(
                    "the recogniser from the prior is not above chance: {:?}",
                    self.accuracy
                ),
            ),
            (
                self.scratch_accuracy[1] > CHANCE,
                format!(
                    "the recogniser from scratch is not above chance: {:?}",
                    self.scratch_accuracy
                ),
            ),
        ];
        floors
            .into_iter()
            .filter_map(|(met, failure)| (!met).then_some(failure))
            .collect()
    }
}

/// The evaluations of one run, in order.
struct Evaluations {
    stage: StageName,
    records: Vec<Value>,
}

impl Evaluations {
    fn read(dir: &Path, stage: StageName) -> Result<Self, TrainError> {
        let records = read_log(&dir.join(stage.as_str()))?;
        let records = records
            .into_iter()
            .filter(|record| record["event"] == "evaluation")
            .collect();
        Ok(Self { stage, records })
    }

    fn first(&self, name: &str) -> Result<f64, TrainError> {
        self.value(self.records.first(), name)
    }

    fn last(&self, name: &str) -> Result<f64, TrainError> {
        self.value(self.records.last(), name)
    }

    fn value(&self, record: Option<&Value>, name: &str) -> Result<f64, TrainError> {
        record.and_then(|record| record[name].as_f64()).ok_or_else(|| {
            TrainError::Invalid(format!(
                "the log of the {} stage has no evaluation with {name}",
                self.stage
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Findings {
        Findings {
            sample_distance: [2.0, 1.0],
            reconstruction_error: 0.1,
            mean_picture_error: 0.2,
            accuracy: [0.7, 0.68],
            scratch_accuracy: [0.7, 0.68],
            difference: "+0.00 points".to_owned(),
        }
    }

    #[test]
    fn each_floor_can_be_missed() {
        assert!(good().failures().is_empty());
        let missed = [
            Findings {
                sample_distance: [1.0, 1.0],
                ..good()
            },
            Findings {
                reconstruction_error: 0.2,
                ..good()
            },
            Findings {
                accuracy: [0.52, 0.49],
                ..good()
            },
            Findings {
                scratch_accuracy: [0.52, 0.49],
                ..good()
            },
            Findings {
                reconstruction_error: f64::NAN,
                ..good()
            },
        ];
        for findings in missed {
            assert_eq!(findings.failures().len(), 1, "{findings:?}");
        }
    }
}
