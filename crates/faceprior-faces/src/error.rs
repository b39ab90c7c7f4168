//! What can go wrong between a folder of pictures and a folder of crops.

use std::io;
use std::path::PathBuf;

use faceprior_data::DataError;

/// Why faces could not be detected or cut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FacesError {
    /// A setting that cannot work.
    #[error("{name} is {got}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it is.
        got: String,
        /// What would do.
        expected: &'static str,
    },
    /// `FACEPRIOR_ISA` names no instruction set of this processor.
    #[error("{0}")]
    InstructionSet(String),
    /// The pictures cannot be listed, or a crop cannot be written.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A file of the output folder cannot be read or written.
    #[error("cannot {action} {}: {source}\nhint: nothing is lost; run the same command again to go on", path.display())]
    Output {
        /// "write", "lock", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The output folder is the input folder.
    #[error("{} is both input and output\nhint: give another folder for the crops", path.display())]
    SameFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The output folder holds crops that were made otherwise.
    #[error(
        "{} was made with other settings: {differences}\n\
         hint: give the same settings to go on with it, or another output folder", path.display()
    )]
    OtherSettings {
        /// The file with the settings it was made with.
        path: PathBuf,
        /// Each setting that differs, there and here.
        differences: String,
    },
    /// A second process works on the same output folder.
    #[error("{} is in use by another process\nhint: wait for it, or give another output folder", path.display())]
    InUse {
        /// The locked file.
        path: PathBuf,
    },
    /// A file of records holds something else.
    #[error(
        "{} line {line}: {reason}\nhint: repair or remove the line; its picture is then aligned again", path.display()
    )]
    Record {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Two pictures of a list would be written to one file.
    #[error(
        "{first:?} and {second:?} in {} would both be written to {output:?}\n\
         hint: list them in two lists, with an output folder for each", list.display()
    )]
    Collision {
        /// The list.
        list: PathBuf,
        /// One picture.
        first: PathBuf,
        /// Another.
        second: PathBuf,
        /// Where both would go.
        output: PathBuf,
    },
    /// More pictures than allowed cannot be read.
    #[error(
        "{count} pictures cannot be read, {limit} are allowed; the last: {last}\n\
         hint: {} lists them; repair or remove them, or allow more", list.display()
    )]
    TooManyUnreadable {
        /// So many.
        count: usize,
        /// The limit.
        limit: usize,
        /// Why the last cannot be read.
        last: String,
        /// The list of them.
        list: PathBuf,
    },
}
