//! The run directory: one process at a time, and everything that a run leaves.
//!
//! ```text
//! recipe.toml    resolved       samples/       step-…-<name>.png
//! log.jsonl      one record a line   checkpoints/   see `checkpoint`
//! .lock                         export/        <name>.safetensors
//! ```
//!
//! `log.jsonl` is replay-safe: a run that is resumed from step N first drops the records after N, so the log of an
//! interrupted run reads like that of an uninterrupted one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::TrainError;
use crate::checkpoint::Checkpoints;
use crate::files::{create_dir, write_whole};
use crate::recipe::{Recipe, StageName};

/// What to do with what is in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Go on with the run that is there, or begin one.
    ResumeOrBegin,
    /// Go on with the run that is there, or fail.
    Resume,
}

/// An open run directory, locked until dropped.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    stage: StageName,
    recipe_hash: String,
    checkpoints: Checkpoints,
    log: File,
    _lock: File,
}

impl Run {
    /// Opens a run directory for a stage, creating it if need be, and locks it.
    ///
    /// # Errors
    /// [`TrainError::Locked`], [`TrainError::NotARun`], [`TrainError::NothingToResume`],
    /// [`TrainError::RecipeChanged`] if a part of the recipe that this stage follows from differs, and
    /// [`TrainError::Io`].
    pub fn open(dir: &Path, stage: StageName, recipe: &Recipe, start: Start) -> Result<Self, TrainError> {
        let recipe_path = dir.join("recipe.toml");
        let exists = recipe_path.is_file();
        if start == Start::Resume && !exists {
            return Err(TrainError::NothingToResume { dir: dir.to_owned() });
        }
        create_dir(dir)?;
        if !exists && holds_other_files(dir)? {
            return Err(TrainError::NotARun { dir: dir.to_owned() });
        }
        let lock = lock(dir)?;
        if exists {
            let text = fs::read_to_string(&recipe_path).map_err(TrainError::io("read", &recipe_path))?;
            let started = Recipe::from_toml(&text, &format!("{recipe_path:?}"), &[])?;
            let changes: Vec<String> = started
                .differences_for(recipe, stage)
                .into_iter()
                .map(|(key, was, now)| format!("{key} was {was}, is now {now}"))
                .collect();
            if !changes.is_empty() {
                return Err(TrainError::RecipeChanged {
                    dir: dir.to_owned(),
                    changes,
                });
            }
        } else {
            write_whole(&recipe_path, recipe.resolved().as_bytes())?;
        }
        for folder in ["samples", "export"] {
            create_dir(&dir.join(folder))?;
        }
        let checkpoints = Checkpoints::open(dir.join("checkpoints"))?;
        let log = open_log(&dir.join(LOG))?;
        Ok(Self {
            dir: dir.to_owned(),
            stage,
            recipe_hash: recipe.hash(),
            checkpoints,
            log,
            _lock: lock,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The stage that runs here.
    pub fn stage(&self) -> StageName {
        self.stage
    }

    /// Hash of the recipe that the run was opened with.
    pub fn recipe_hash(&self) -> &str {
        &self.recipe_hash
    }

    /// Its checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// Where pictures of the training go.
    pub fn samples_dir(&self) -> PathBuf {
        self.dir.join("samples")
    }

    /// Where the results go.
    pub fn export_dir(&self) -> PathBuf {
        self.dir.join("export")
    }

    /// Adds a record to `log.jsonl`: `event`, `step`, `images` and whatever else. A number that is not finite is
    /// written as null.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn record(
        &mut self,
        event: &str,
        step: u64,
        images: u64,
        fields: impl IntoIterator<Item = (String, Value)>,
    ) -> Result<(), TrainError> {
        let mut record = Map::new();
        record.insert("event".to_owned(), event.into());
        record.insert("step".to_owned(), step.into());
        record.insert("images".to_owned(), images.into());
        record.extend(fields);
        let mut line = Value::Object(record).to_string();
        line.push('\n');
        self.log
            .write_all(line.as_bytes())
            .map_err(TrainError::io("write", &self.dir.join(LOG)))
    }

    /// Makes the log survive a power cut, so that it is never behind a checkpoint.
    pub(crate) fn sync_log(&self) -> Result<(), TrainError> {
        self.log
            .sync_data()
            .map_err(TrainError::io("sync", &self.dir.join(LOG)))
    }

    /// Drops the records after `step`, and a last line that a killed process left half written.
    pub(crate) fn rewind_log(&mut self, step: u64) -> Result<(), TrainError> {
        let path = self.dir.join(LOG);
        let mut text = Vec::new();
        File::open(&path)
            .and_then(|mut file| file.read_to_end(&mut text))
            .map_err(TrainError::io("read", &path))?;
        let mut kept = Vec::with_capacity(text.len());
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let whole = line.ends_with(b"\n");
            let record = serde_json::from_slice::<Value>(line).ok();
            if whole
                && record
                    .and_then(|record| record["step"].as_u64())
                    .is_some_and(|at| at <= step)
            {
                kept.extend_from_slice(line);
            }
        }
        if kept.len() != text.len() {
            write_whole(&path, &kept)?;
            self.log = open_log(&path)?;
        }
        Ok(())
    }
}

/// Reads the records of a run's log; a last line that is still being written is left out.
///
/// # Errors
/// [`TrainError::Io`].
pub fn read_log(run_dir: &Path) -> Result<Vec<Value>, TrainError> {
    let path = run_dir.join(LOG);
    let text = fs::read(&path).map_err(TrainError::io("read", &path))?;
    Ok(text
        .split(|&byte| byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect())
}

const LOG: &str = "log.jsonl";
const LOCK: &str = ".lock";

fn open_log(path: &Path) -> Result<File, TrainError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(TrainError::io("open", path))
}

fn holds_other_files(dir: &Path) -> Result<bool, TrainError> {
    for entry in fs::read_dir(dir).map_err(TrainError::io("list", dir))? {
        if entry.map_err(TrainError::io("list", dir))?.file_name() != LOCK {
            return Ok(true);
        }
    }
    Ok(false)
}

fn lock(dir: &Path) -> Result<File, TrainError> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .write(true)
        .truncate(false)
        .open(&path)
        .map_err(TrainError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => {
            let process = std::process::id().to_string();
            file.set_len(0)
                .and_then(|()| file.write_all(process.as_bytes()))
                .map_err(TrainError::io("write", &path))?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let holder = file
                .read_to_string(&mut holder)
                .ok()
                .map(|_| holder)
                .filter(|holder| !holder.is_empty());
            Err(TrainError::Locked {
                dir: dir.to_owned(),
                holder,
            })
        }
        Err(TryLockError::Error(error)) => Err(TrainError::io("lock", &path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(changes: &[&str]) -> Recipe {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        Recipe::load("demo", &changes).unwrap()
    }

    fn open(dir: &Path, changes: &[&str], start: Start) -> Result<Run, TrainError> {
        Run::open(dir, StageName::Prior, &recipe(changes), start)
    }

    fn log(dir: &Path) -> String {
        fs::read_to_string(dir.join(LOG)).unwrap()
    }

    #[test]
    fn a_second_process_is_refused_and_a_third_may_follow() {
        let dir = tempfile::tempdir().unwrap();
        let run = open(dir.path(), &[], Start::ResumeOrBegin).unwrap();
        let error = open(dir.path(), &[], Start::ResumeOrBegin)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("is in use by process ") && error.contains(&std::process::id().to_string()),
            "{error}"
        );
        drop(run);
        open(dir.path(), &[], Start::Resume).unwrap();
    }

    #[test]
    fn a_folder_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("holiday.jpg"), "x").unwrap();
        let error = open(dir.path(), &[], Start::ResumeOrBegin)
            .unwrap_err()
            .to_string();
        assert!(error.contains("is no run directory"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn resuming_needs_a_run_and_its_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a dir \"quoted\"");
        let error = open(&path, &[], Start::Resume).unwrap_err().to_string();
        assert!(error.contains("there is no run to resume"), "{error}");
        assert!(!path.exists(), "a failed resume leaves nothing behind");
        drop(open(&path, &[], Start::ResumeOrBegin).unwrap());
        let error = open(&path, &["prior.learning_rate_g=0.1"], Start::Resume)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("prior.learning_rate_g was 0.002, is now 0.1"),
            "{error}"
        );
        open(&path, &["scratch.learning_rate=0.5"], Start::Resume).unwrap();
    }

    #[test]
    fn records_after_the_resumed_step_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut run = open(dir.path(), &[], Start::ResumeOrBegin).unwrap();
        for step in 1..=4 {
            run.record("step", step, step * 8, [("loss".to_owned(), (0.5).into())])
                .unwrap();
        }
        drop(run);
        let mut torn = log(dir.path());
        assert!(
            torn.starts_with(r#"{"event":"step","images":8,"loss":0.5,"step":1}"#),
            "{torn}"
        );
        torn.push_str(r#"{"event":"step","images":16,"st"#);
        fs::write(dir.path().join(LOG), &torn).unwrap();
        let mut run = open(dir.path(), &[], Start::Resume).unwrap();
        run.rewind_log(2).unwrap();
        run.record("step", 3, 24, []).unwrap();
        let steps: Vec<u64> = log(dir.path())
            .lines()
            .map(|line| {
                serde_json::from_str::<Value>(line).unwrap()["step"]
                    .as_u64()
                    .unwrap()
            })
            .collect();
        assert_eq!(steps, [1, 2, 3]);
    }
}
