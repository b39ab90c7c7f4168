//! What can go wrong between a file and a batch.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate: it names the file and, where there is one, the cure.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused to read or write something.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was tried: "read", "write", "list".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The bytes are not a whole, valid JPEG or PNG.
    #[error("cannot decode {name}: {reason}")]
    Decode {
        /// The picture, as it was named by the caller.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The header promises more pixels than the limits allow; nothing was allocated.
    #[error(
        "cannot decode {name}: its header says {width}x{height} pixels, the limit is {max_pixels} in all\n\
         hint: if the picture is genuine, make it smaller or raise the decoding limit"
    )]
    TooLarge {
        /// The picture.
        name: String,
        /// Width in pixels by the header.
        width: usize,
        /// Height in pixels by the header.
        height: usize,
        /// The limit.
        max_pixels: usize,
    },
    /// No encoder for this extension.
    #[error(
        "cannot write {path:?}: the extension must be jpg, jpeg or png\nhint: the format is taken from the extension"
    )]
    UnknownFormat {
        /// The file that was to be written.
        path: PathBuf,
    },
    /// A folder that should hold pictures is not there.
    #[error(
        "folder {path:?} does not exist (or is not a folder)\nhint: check the path; relative paths start in the current folder"
    )]
    MissingFolder {
        /// The folder.
        path: PathBuf,
    },
    /// A folder or list holds no pictures.
    #[error("{path:?} holds no pictures: {expected}")]
    Empty {
        /// The folder or list.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
    /// A labelled set with fewer than two identities: there is nothing to tell apart.
    #[error(
        "{path:?} holds one identity only ({identity:?}), a recogniser needs at least two\n\
         hint: the layout is <folder>/<identity>/<picture>.jpg; give the folder above the identities"
    )]
    OneIdentity {
        /// The root of the set.
        path: PathBuf,
        /// The only identity.
        identity: String,
    },
    /// A line of a file list that cannot be used.
    #[error("list {path:?}, line {line}: {reason}")]
    List {
        /// The list.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong, and the cure.
        reason: String,
    },
    /// A line of a pairs file that cannot be used.
    #[error("pairs file {path:?}, line {line}: {reason}")]
    Pairs {
        /// The pairs file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong, and the cure.
        reason: String,
    },
    /// A setting that cannot work.
    #[error("{setting} is {got}, expected {expected}")]
    Setting {
        /// The setting's name.
        setting: &'static str,
        /// What it was set to.
        got: String,
        /// What would work, and the cure.
        expected: String,
    },
    /// More pictures could not be read than the loader tolerates.
    #[error(
        "{count} pictures of {len} could not be read, the limit is {limit}; the last one: {last}\n\
         hint: repair or remove them, or raise the limit of unreadable pictures"
    )]
    TooManyUnreadable {
        /// Distinct pictures that failed so far.
        count: usize,
        /// Pictures in the set.
        len: usize,
        /// The limit that was passed.
        limit: usize,
        /// The last failure in full.
        last: String,
    },
    /// A data set panicked on a worker thread.
    #[error("reading picture {name} panicked: {message}")]
    WorkerPanicked {
        /// The picture.
        name: String,
        /// The panic's message.
        message: String,
    },
}

impl DataError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> DataError {
        DataError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
