use std::io;
use std::path::{Path, PathBuf};

use faceprior_data::DataError;
use faceprior_eval::EvalError;
use faceprior_nets::weights::WeightsError;

use crate::recipe::{RecipeError, StageName};

/// Why a run could not start, go on or end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Something is wrong with the recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// Something is wrong with the pictures.
    #[error(transparent)]
    Data(DataError),
    /// Something is wrong with a file of weights.
    #[error(transparent)]
    Weights(WeightsError),
    /// Something is wrong with what was to be scored.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The operating system refused.
    #[error("cannot {action} {path:?}: {source}{}", cure(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another process works in the run directory.
    #[error(
        "run directory {dir:?} is in use{}\nhint: wait for that process, stop it, or choose another directory",
        holder.as_ref().map(|pid| format!(" by process {pid}")).unwrap_or_default()
    )]
    Locked {
        /// The run directory.
        dir: PathBuf,
        /// The process, if it left its number.
        holder: Option<String>,
    },
    /// A folder that is neither empty nor a run directory was given as one.
    #[error(
        "{dir:?} is not empty and is no run directory (it has no recipe.toml)\nhint: choose a new directory"
    )]
    NotARun {
        /// The folder.
        dir: PathBuf,
    },
    /// A run was to be resumed where there is none.
    #[error("there is no run to resume in {dir:?}\nhint: check the path, or start a run without --resume")]
    NothingToResume {
        /// The folder.
        dir: PathBuf,
    },
    /// A run was to be resumed under another recipe.
    #[error(
        "run directory {dir:?} was started with another recipe: {}\n\
         hint: resume with {:?}, or choose another directory",
        changes.join("; "), dir.join("recipe.toml")
    )]
    RecipeChanged {
        /// The run directory.
        dir: PathBuf,
        /// `key: was a, now b`.
        changes: Vec<String>,
    },
    /// A checkpoint could not be written. The ones before it are untouched.
    #[error("cannot write checkpoint {path:?}: {cause}\nhint: {hint}")]
    CheckpointWrite {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What was tried in it, and the system's answer.
        cause: String,
        /// What is still good, and what to do.
        hint: String,
    },
    /// There are checkpoints, and none of them is whole.
    #[error(
        "no checkpoint in {dir:?} can be used: {}\n\
         hint: restore them from a copy, or delete the run directory to start again",
        problems.join("; ")
    )]
    AllDamaged {
        /// The folder of checkpoints.
        dir: PathBuf,
        /// What is wrong with each.
        problems: Vec<String>,
    },
    /// A checkpoint is whole but does not fit the stage that is to go on from it.
    #[error(
        "cannot resume from checkpoint {path:?}: {source}\n\
         hint: it was written by another network or another version; choose another run directory"
    )]
    CheckpointMismatch {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The cause.
        source: Box<TrainError>,
    },
    /// A checkpoint of another stage.
    #[error("checkpoint {path:?} is of stage {found}, expected {expected}")]
    OtherStage {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Its stage.
        found: StageName,
        /// The stage of the run.
        expected: StageName,
    },
    /// The loss or a parameter left the real numbers.
    #[error(
        "training diverged at step {step} ({images} images): {what}\nhint: {}lower the learning rate or its warm-up",
        last_good.as_ref().map(|path| format!("the last good checkpoint is {path:?}; ")).unwrap_or_default()
    )]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// Images seen with it.
        images: u64,
        /// The loss and its value, or the parameter.
        what: String,
        /// The newest checkpoint.
        last_good: Option<PathBuf>,
    },
    /// Settings, files and pictures that are each right and do not go together.
    #[error("{0}")]
    Invalid(String),
}

impl From<DataError> for TrainError {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Io { action, path, source } => Self::Io { action, path, source },
            error => Self::Data(error),
        }
    }
}

impl From<WeightsError> for TrainError {
    fn from(error: WeightsError) -> Self {
        match error {
            WeightsError::Io { action, path, source } => Self::Io { action, path, source },
            error => Self::Weights(error),
        }
    }
}

impl TrainError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Whether the disk, or the user's share of it, is full.
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }
}

/// Without a hint: for a message that gives its own.
pub(crate) fn without_hint(error: &TrainError) -> String {
    let text = error.to_string();
    text.split("\nhint:").next().unwrap_or_default().to_owned()
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn cure(error: &io::Error) -> &'static str {
    if is_full(error) {
        "\nhint: the disk is full: free some space, then start the same command to resume"
    } else {
        ""
    }
}
