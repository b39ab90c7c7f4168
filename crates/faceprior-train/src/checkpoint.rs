//! Checkpoints: whole or not there, checked when read, the newest and the best kept.
//!
//! ```text
//! checkpoints/step-000001200/state.safetensors   every number of the stage and of the driver
//!                            manifest.json       stage, step, score; length and BLAKE3 of the state
//! ```
//!
//! A checkpoint is written to a hidden folder beside its place, each file synced, then renamed: a process that is
//! killed at any moment leaves the older ones as they were. A checkpoint that fails its checksum is moved aside and
//! the one before it is used, never without saying so.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use faceprior_nets::weights::Weights;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::error::without_hint;
use crate::files::{create_dir, sync_dir, write_whole};
use crate::recipe::StageName;

const STATE: &str = "state.safetensors";
const MANIFEST: &str = "manifest.json";
const SCHEMA: u32 = 1;

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    schema: u32,
    /// The stage whose state it is.
    pub stage: StageName,
    /// Optimiser steps taken.
    pub step: u64,
    /// Images seen.
    pub images: u64,
    /// Result of the evaluation at this step, higher is better.
    pub score: Option<f64>,
    /// Hash of the run's recipe.
    pub recipe_hash: String,
    bytes: u64,
    blake3: String,
}

/// A checkpoint that passed its checks.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
    /// Every number of the stage and of the driver.
    pub state: Weights,
}

/// What to write down with a state.
#[derive(Clone, Copy, Debug)]
pub struct Mark<'a> {
    /// The stage whose state it is.
    pub stage: StageName,
    /// Optimiser steps taken.
    pub step: u64,
    /// Images seen.
    pub images: u64,
    /// Result of the evaluation at this step, higher is better.
    pub score: Option<f64>,
    /// Hash of the run's recipe.
    pub recipe_hash: &'a str,
}

/// The folder of checkpoints of one run. The caller holds the run's lock.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// Opens or creates the folder and clears what interrupted writes left behind.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn open(dir: PathBuf) -> Result<Self, TrainError> {
        create_dir(&dir)?;
        for entry in fs::read_dir(&dir).map_err(TrainError::io("list", &dir))? {
            let path = entry.map_err(TrainError::io("list", &dir))?.path();
            if path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(".step-"))
            {
                fs::remove_dir_all(&path).map_err(TrainError::io("remove", &path))?;
            }
        }
        Ok(Self { dir })
    }

    /// Writes a checkpoint, then removes all but the newest `keep` and the best.
    ///
    /// # Errors
    /// [`TrainError::CheckpointWrite`]; earlier checkpoints are then untouched.
    pub fn write(&self, state: &Weights, mark: Mark<'_>, keep: usize) -> Result<PathBuf, TrainError> {
        self.write_with(|path| Ok(state.write(path)?), mark, keep)
    }

    fn write_with(
        &self,
        write_state: impl FnOnce(&Path) -> Result<(), TrainError>,
        mark: Mark<'_>,
        keep: usize,
    ) -> Result<PathBuf, TrainError> {
        let name = format!("step-{:09}", mark.step);
        let (aside, path) = (self.dir.join(format!(".{name}")), self.dir.join(&name));
        let written = self.write_aside(write_state, mark, &aside).and_then(|()| {
            fs::rename(&aside, &path).map_err(TrainError::io("rename", &aside))?;
            sync_dir(&self.dir)
        });
        if let Err(source) = written {
            let _ = fs::remove_dir_all(&aside);
            let intact = match self.steps()?.pop() {
                Some((_, newest)) => format!("{newest:?} is intact"),
                None => "there is none before it".to_owned(),
            };
            let cure = if source.is_disk_full() {
                "the disk is full: free some space and resume"
            } else {
                "mend the cause and resume"
            };
            let (cause, hint) = (without_hint(&source), format!("{cure}; {intact}"));
            return Err(TrainError::CheckpointWrite { path, cause, hint });
        }
        self.prune(keep)?;
        Ok(path)
    }

    fn write_aside(
        &self,
        write_state: impl FnOnce(&Path) -> Result<(), TrainError>,
        mark: Mark<'_>,
        aside: &Path,
    ) -> Result<(), TrainError> {
        fs::create_dir(aside).map_err(TrainError::io("create", aside))?;
        let state = aside.join(STATE);
        write_state(&state)?;
        let (bytes, blake3) = checksum(&state)?;
        let Mark {
            stage,
            step,
            images,
            score,
            recipe_hash,
        } = mark;
        let recipe_hash = recipe_hash.to_owned();
        let manifest = Manifest {
            schema: SCHEMA,
            stage,
            step,
            images,
            score,
            recipe_hash,
            bytes,
            blake3,
        };
        let text = serde_json::to_vec_pretty(&manifest).map_err(io::Error::other);
        let manifest_path = aside.join(MANIFEST);
        write_whole(
            &manifest_path,
            &text.map_err(TrainError::io("write", &manifest_path))?,
        )
    }

    /// The newest checkpoint that is whole, or none if there are no checkpoints. Damaged ones in front of it are
    /// moved aside (`damaged-step-…`); each is described in the second value, for the user to see.
    ///
    /// # Errors
    /// [`TrainError::AllDamaged`] if there are checkpoints but none is whole: training from the start would be a
    /// silent loss. [`TrainError::Io`].
    pub fn newest(&self) -> Result<(Option<Checkpoint>, Vec<String>), TrainError> {
        let mut problems = Vec::new();
        let mut damaged = Vec::new();
        for (_, path) in self.steps()?.into_iter().rev() {
            match read(&path) {
                Ok(checkpoint) => {
                    for path in damaged {
                        self.set_aside(path)?;
                    }
                    return Ok((Some(checkpoint), problems));
                }
                Err(problem) => {
                    problems.push(format!("checkpoint {path:?} is damaged: {problem}"));
                    damaged.push(path);
                }
            }
        }
        match problems.is_empty() {
            true => Ok((None, problems)),
            false => Err(TrainError::AllDamaged {
                dir: self.dir.clone(),
                problems,
            }),
        }
    }

    /// The step and score of the best-scored checkpoint (the earliest of equals), with its folder.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn best(&self) -> Result<Option<(u64, f64, PathBuf)>, TrainError> {
        let mut best: Option<(u64, f64, PathBuf)> = None;
        for (step, path) in self.steps()? {
            let score = read_manifest(&path).ok().and_then(|manifest| manifest.score);
            if let Some(score) = score
                && best.as_ref().is_none_or(|(_, best, _)| score > *best)
            {
                best = Some((step, score, path));
            }
        }
        Ok(best)
    }

    /// Reads and checks the checkpoint in a folder.
    ///
    /// # Errors
    /// [`TrainError::AllDamaged`] with what is wrong.
    pub fn read(&self, path: &Path) -> Result<Checkpoint, TrainError> {
        read(path).map_err(|problem| TrainError::AllDamaged {
            dir: self.dir.clone(),
            problems: vec![problem],
        })
    }

    /// The folder of the newest checkpoint, unread.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn newest_path(&self) -> Result<Option<PathBuf>, TrainError> {
        Ok(self.steps()?.pop().map(|(_, path)| path))
    }

    /// Steps and folders, oldest first.
    fn steps(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let mut steps = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(TrainError::io("list", &self.dir))? {
            let path = entry.map_err(TrainError::io("list", &self.dir))?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
                steps.push((step, path));
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn prune(&self, keep: usize) -> Result<(), TrainError> {
        let best = self.best()?.map(|(step, ..)| step);
        let steps = self.steps()?;
        let old = steps.len().saturating_sub(keep);
        for (step, path) in &steps[..old] {
            if Some(*step) != best {
                // Renamed first: a half-removed folder must not look like a checkpoint.
                let doomed = self.dir.join(format!(".step-{step:09}"));
                fs::rename(path, &doomed).map_err(TrainError::io("remove", path))?;
                fs::remove_dir_all(&doomed).map_err(TrainError::io("remove", &doomed))?;
            }
        }
        Ok(())
    }

    fn set_aside(&self, path: PathBuf) -> Result<(), TrainError> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let aside = self.dir.join(format!("damaged-{name}"));
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(TrainError::io("remove", &aside))?;
        }
        fs::rename(&path, &aside).map_err(TrainError::io("rename", &path))
    }
}

fn read_manifest(path: &Path) -> Result<Manifest, String> {
    let text = fs::read(path.join(MANIFEST)).map_err(|error| format!("{MANIFEST}: {error}"))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| format!("{MANIFEST}: {error}"))?;
    match manifest.schema {
        SCHEMA => Ok(manifest),
        other => Err(format!("{MANIFEST}: schema is {other}, expected {SCHEMA}")),
    }
}

fn read(path: &Path) -> Result<Checkpoint, String> {
    let manifest = read_manifest(path)?;
    let state = path.join(STATE);
    let (bytes, blake3) = checksum(&state).map_err(|error| error.to_string())?;
    if bytes != manifest.bytes {
        return Err(format!("{STATE} has {bytes} bytes, expected {}", manifest.bytes));
    }
    if blake3 != manifest.blake3 {
        return Err(format!(
            "{STATE} has the checksum {blake3}, expected {}",
            manifest.blake3
        ));
    }
    let state = Weights::read(&state).map_err(|error| error.to_string())?;
    Ok(Checkpoint {
        path: path.to_owned(),
        manifest,
        state,
    })
}

fn checksum(path: &Path) -> Result<(u64, String), TrainError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(TrainError::io("read", path))?;
    let bytes = io::copy(&mut file, &mut hasher).map_err(TrainError::io("read", path))?;
    Ok((bytes, hasher.finalize().to_hex().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    fn state(value: f32) -> Weights {
        let mut weights = Weights::new();
        weights.insert("a", TensorData::new(vec![value; 1000], [1000]));
        weights.set_metadata("note", "kept");
        weights
    }

    fn mark(step: u64, score: Option<f64>) -> Mark<'static> {
        Mark {
            stage: StageName::Prior,
            step,
            images: step * 8,
            score,
            recipe_hash: "hash",
        }
    }

    fn store(dir: &tempfile::TempDir) -> Checkpoints {
        Checkpoints::open(dir.path().join("checkpoints")).unwrap()
    }

    fn step_names(store: &Checkpoints) -> Vec<u64> {
        store.steps().unwrap().into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        assert!(store.newest().unwrap().0.is_none());
        store.write(&state(1.5), mark(3, Some(0.25)), 2).unwrap();
        let (checkpoint, problems) = store.newest().unwrap();
        let checkpoint = checkpoint.unwrap();
        assert!(problems.is_empty());
        assert_eq!((checkpoint.manifest.step, checkpoint.manifest.images), (3, 24));
        assert_eq!(checkpoint.manifest.score, Some(0.25));
        assert_eq!(checkpoint.state.get("a"), state(1.5).get("a"));
        assert_eq!(checkpoint.state.metadata("note"), Some("kept"));
    }

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        for (step, score) in [
            (1, None),
            (2, Some(0.9)),
            (3, Some(0.5)),
            (4, Some(0.9)),
            (5, None),
            (6, None),
        ] {
            store.write(&state(step as f32), mark(step, score), 2).unwrap();
        }
        assert_eq!(step_names(&store), [2, 5, 6]);
        let (step, score, _) = store.best().unwrap().unwrap();
        assert_eq!((step, score), (2, 0.9));
    }

    #[test]
    fn a_damaged_checkpoint_is_reported_and_the_one_before_it_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        for step in 1..=4 {
            store.write(&state(step as f32), mark(step, None), 9).unwrap();
        }
        // One bit flips in the newest, the one before it is cut short, and one has lost its manifest.
        let flipped = dir.path().join("checkpoints/step-000000004").join(STATE);
        let mut bytes = fs::read(&flipped).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&flipped, &bytes).unwrap();
        let cut = dir.path().join("checkpoints/step-000000003").join(STATE);
        fs::write(&cut, &bytes[..100]).unwrap();
        fs::remove_file(dir.path().join("checkpoints/step-000000002").join(MANIFEST)).unwrap();

        let (checkpoint, problems) = store.newest().unwrap();
        assert_eq!(checkpoint.unwrap().manifest.step, 1);
        assert_eq!(problems.len(), 3);
        assert!(
            problems[0].contains("step-000000004") && problems[0].contains("checksum"),
            "{problems:?}"
        );
        assert!(problems[1].contains("has 100 bytes, expected"), "{problems:?}");
        assert!(problems[2].contains(MANIFEST), "{problems:?}");
        assert_eq!(
            step_names(&store),
            [1],
            "damaged ones must not stand in the way of new ones"
        );
        store.write(&state(4.0), mark(4, None), 9).unwrap();
        assert_eq!(store.newest().unwrap().0.unwrap().manifest.step, 4);
    }

    #[test]
    fn only_damaged_checkpoints_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let path = store.write(&state(1.0), mark(1, None), 2).unwrap();
        fs::write(path.join(MANIFEST), "{}").unwrap();
        let error = store.newest().unwrap_err().to_string();
        assert!(
            error.contains("no checkpoint in") && error.contains("step-000000001"),
            "{error}"
        );
        assert!(path.exists(), "nothing is touched when nothing can be used");
    }

    #[test]
    fn a_full_disk_leaves_the_previous_checkpoint_good() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        store.write(&state(1.0), mark(1, None), 1).unwrap();
        let full = |path: &Path| {
            fs::write(path, [0; 100]).unwrap();
            Err(TrainError::io("write", path)(io::ErrorKind::StorageFull.into()))
        };
        let error = store.write_with(full, mark(2, None), 1).unwrap_err().to_string();
        assert!(error.contains("step-000000002"), "{error}");
        assert_eq!(error.matches("the disk is full").count(), 1, "{error}");
        assert!(error.contains("step-000000001\" is intact"), "{error}");
        assert_eq!(step_names(&store), [1]);
        assert_eq!(
            fs::read_dir(dir.path().join("checkpoints")).unwrap().count(),
            1,
            "nothing is left behind"
        );
        assert_eq!(
            store.newest().unwrap().0.unwrap().state.get("a"),
            state(1.0).get("a")
        );
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_and_never_read() {
        let dir = tempfile::tempdir().unwrap();
        store(&dir).write(&state(1.0), mark(1, None), 2).unwrap();
        let partial = dir.path().join("checkpoints/.step-000000002");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("state.safetensors.partial"), [7; 50]).unwrap();
        let store = store(&dir);
        assert!(!partial.exists());
        assert_eq!(store.newest().unwrap().0.unwrap().manifest.step, 1);
        store.write(&state(2.0), mark(2, None), 2).unwrap();
    }
}
