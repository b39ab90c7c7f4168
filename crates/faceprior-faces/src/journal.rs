//! The records of an output folder: what is finished, with which settings, and what was found.
//!
//! `faces.jsonl` is both the result and the memory of a run: one line for every finished picture, appended only after
//! the picture's crops are in place and, on Linux, on the disk. What a killed run had not yet recorded is done again;
//! a line that was cut short is dropped. Each shard has files of its own (`faces-2-of-8.jsonl`).

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use faceprior_data::files::{Durability, write_atomically};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::FacesError;
use crate::align::{AlignSettings, Shard};
use crate::similarity::Landmarks;

/// One line of `faces.jsonl`: a finished picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PictureRecord {
    /// The picture's path as it was listed, escaped as [`names`](crate::names) says.
    pub picture: String,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Its faces, the most certain first; may be empty.
    pub faces: Vec<FaceRecord>,
    /// The crop of the picture's centre, if that was asked for and no face was found; as [`FaceRecord::crop`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub center_crop: Option<String>,
}

/// A face of a finished picture, in pixels of the picture as it was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaceRecord {
    /// x1, y1, x2, y2.
    #[serde(rename = "box")]
    pub bounds: [f32; 4],
    /// Probability of being a face.
    pub score: f32,
    /// Left eye, right eye, nose, left and right corner of the mouth, each (x, y).
    pub landmarks: Landmarks,
    /// The crop's path in the output folder, escaped; absent for a face that was not cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crop: Option<String>,
}

/// Reads the records of an output folder's `faces.jsonl`, one after the other.
///
/// # Errors
/// [`FacesError::Output`] if the file cannot be read; each item [`FacesError::Record`] for a line that is no record.
/// A last line without its newline is not an error: a killed run may leave it.
pub fn read_records(
    path: &Path,
) -> Result<impl Iterator<Item = Result<PictureRecord, FacesError>>, FacesError> {
    Ok(Lines::open(path)?.map(|line| line.map(|line| line.record)))
}

struct Line {
    record: PictureRecord,
    /// Bytes of the file up to and with this line.
    end: u64,
}

struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: usize,
    end: u64,
    buffer: Vec<u8>,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, FacesError> {
        Ok(Self::of(
            path,
            File::open(path).map_err(|source| output("read", path, source))?,
        ))
    }

    fn of(path: &Path, file: File) -> Self {
        Self {
            path: path.to_owned(),
            reader: BufReader::new(file),
            number: 0,
            end: 0,
            buffer: Vec::new(),
        }
    }
}

impl Iterator for Lines {
    type Item = Result<Line, FacesError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.buffer.clear();
        if let Err(source) = self.reader.read_until(b'\n', &mut self.buffer) {
            return Some(Err(output("read", &self.path, source)));
        }
        if self.buffer.pop() != Some(b'\n') {
            return None;
        }
        self.number += 1;
        self.end += self.buffer.len() as u64 + 1;
        let record = serde_json::from_slice(&self.buffer).map_err(|error| FacesError::Record {
            path: self.path.clone(),
            line: self.number,
            reason: error.to_string(),
        });
        Some(record.map(|record| Line {
            record,
            end: self.end,
        }))
    }
}

/// How many, over all runs into the folder (pictures that cannot be read: in this run).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Pictures that are finished.
    pub pictures: u64,
    /// Faces that were found in them.
    pub faces: u64,
    /// Crops that were written.
    pub crops: u64,
    /// Pictures without a face.
    pub without_face: u64,
    /// Pictures that cannot be read; the next run tries them again.
    pub unreadable: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, record: &PictureRecord) {
        self.pictures += 1;
        self.faces += record.faces.len() as u64;
        self.crops += record.faces.iter().filter(|face| face.crop.is_some()).count() as u64;
        self.crops += u64::from(record.center_crop.is_some());
        self.without_face += u64::from(record.faces.is_empty());
    }
}

/// The files of one process in an output folder, locked against a second one.
pub(crate) struct Journal {
    path: PathBuf,
    /// Locked as long as it is open.
    file: File,
    /// Bytes of whole lines in `file`.
    len: u64,
    done: HashSet<u128>,
    pending: Vec<u8>,
    pending_records: usize,
    committed_at: Instant,
    counts: Counts,
    no_face: TextList,
    unreadable: TextList,
}

impl Journal {
    /// Longest time that a finished picture waits for its record.
    const PERIOD: Duration = Duration::from_secs(5);
    /// Most finished pictures that wait for their records.
    const RECORDS: usize = 4096;

    /// Opens or makes the records in `out`.
    pub(crate) fn open(
        out: &Path,
        input: &str,
        settings: &AlignSettings,
        shard: Option<Shard>,
    ) -> Result<Self, FacesError> {
        fs::create_dir_all(out).map_err(|source| output("make folder", out, source))?;
        let part = Shard::suffix(shard);
        let path = out.join(format!("faces{part}.jsonl"));
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| output("write", &path, source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FacesError::InUse { path }),
            // A file system without locks: the user is trusted not to start twice.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(source)) => return Err(output("lock", &path, source)),
        }
        agree_on_settings(&out.join("align.json"), input, settings)?;

        let mut journal = Self {
            file,
            len: 0,
            done: HashSet::new(),
            pending: Vec::new(),
            pending_records: 0,
            committed_at: Instant::now(),
            counts: Counts::default(),
            no_face: TextList::create(out.join(format!("no_face{part}.txt")))?,
            unreadable: TextList::create(out.join(format!("unreadable{part}.txt")))?,
            path,
        };
        // Through the same handle: where locks are mandatory, no other may read.
        let handle = journal
            .file
            .try_clone()
            .map_err(|source| output("read", &journal.path, source))?;
        for line in Lines::of(&journal.path, handle) {
            let Line { record, end } = line?;
            journal.len = end;
            journal.done.insert(key(&record.picture));
            journal.counts.add(&record);
            if record.faces.is_empty() {
                journal.no_face.push(&record.picture)?;
            }
        }
        journal.truncate()?;
        journal.read_other_parts(out)?;
        Ok(journal)
    }

    /// What other shards, or runs without shards, have finished in the same folder is not done again.
    fn read_other_parts(&mut self, out: &Path) -> Result<(), FacesError> {
        let entries = fs::read_dir(out).map_err(|source| output("list", out, source))?;
        for entry in entries {
            let path = entry.map_err(|source| output("list", out, source))?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let is_part = name == "faces.jsonl" || (name.starts_with("faces-") && name.ends_with(".jsonl"));
            if is_part && path != self.path {
                for record in read_records(&path)? {
                    self.done.insert(key(&record?.picture));
                }
            }
        }
        Ok(())
    }

    /// Whether a picture, by its escaped name, is finished.
    pub(crate) fn is_done(&self, picture: &str) -> bool {
        self.done.contains(&key(picture))
    }

    /// Counts over this part of the folder.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    pub(crate) fn unreadable_list(&self) -> &Path {
        &self.unreadable.path
    }

    /// A finished picture whose crops are in place; it is recorded with the next commit.
    pub(crate) fn finished(&mut self, record: &PictureRecord) -> Result<(), FacesError> {
        serde_json::to_writer(&mut self.pending, record)
            .map_err(|error| output("write", &self.path, error.into()))?;
        self.pending.push(b'\n');
        self.pending_records += 1;
        self.counts.add(record);
        if record.faces.is_empty() {
            self.no_face.push(&record.picture)?;
        }
        Ok(())
    }

    /// A picture that cannot be read, and why, on one line.
    pub(crate) fn unreadable(&mut self, picture: &str, reason: &str) -> Result<(), FacesError> {
        self.counts.unreadable += 1;
        self.unreadable
            .push(&format!("{picture}\t{}", reason.replace('\n', "; ")))
    }

    /// Commits if it is time to.
    pub(crate) fn commit_if_due(&mut self) -> Result<(), FacesError> {
        if self.pending_records >= Self::RECORDS || self.committed_at.elapsed() >= Self::PERIOD {
            self.commit()?;
        }
        Ok(())
    }

    /// Records the finished pictures, after their crops have reached the disk.
    pub(crate) fn commit(&mut self) -> Result<(), FacesError> {
        self.no_face.flush()?;
        self.unreadable.flush()?;
        if !self.pending.is_empty() {
            let written = sync_file_system(&self.file)
                .and_then(|()| self.file.write_all(&self.pending))
                .and_then(|()| self.file.sync_data());
            if let Err(source) = written {
                // Half a line would be dropped by the next run in any case.
                let _ = self.truncate();
                return Err(output("write", &self.path, source));
            }
            self.len += self.pending.len() as u64;
            self.pending.clear();
            self.pending_records = 0;
        }
        self.committed_at = Instant::now();
        Ok(())
    }

    /// Drops what is behind the last whole line, and goes on writing there.
    fn truncate(&mut self) -> Result<(), FacesError> {
        let cut = self
            .file
            .set_len(self.len)
            .and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
        cut.map(drop)
            .map_err(|source| output("write", &self.path, source))
    }
}

/// A text file that is written anew by each run.
struct TextList {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl TextList {
    fn create(path: PathBuf) -> Result<Self, FacesError> {
        let file = File::create(&path).map_err(|source| output("write", &path, source))?;
        Ok(Self {
            path,
            writer: BufWriter::new(file),
        })
    }

    fn push(&mut self, line: &str) -> Result<(), FacesError> {
        writeln!(self.writer, "{line}").map_err(|source| output("write", &self.path, source))
    }

    fn flush(&mut self) -> Result<(), FacesError> {
        self.writer
            .flush()
            .map_err(|source| output("write", &self.path, source))
    }
}

/// 128 bits of a name: with a hundred million pictures, the chance that any two share them is below 1e-22.
fn key(picture: &str) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, picture).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Everything written to the file system of `file` is on the disk: one call for thousands of crops.
#[cfg(target_os = "linux")]
fn sync_file_system(file: &File) -> io::Result<()> {
    Ok(rustix::fs::syncfs(file)?)
}

#[cfg(not(target_os = "linux"))]
fn sync_file_system(_: &File) -> io::Result<()> {
    Ok(())
}

#[derive(Serialize, Deserialize)]
struct SettingsFile {
    schema: u32,
    input: String,
    settings: Value,
}

/// Writes the settings into a new folder, or compares them with those that the folder was made with.
fn agree_on_settings(path: &Path, input: &str, settings: &AlignSettings) -> Result<(), FacesError> {
    let unreadable = |reason: String| FacesError::Record {
        path: path.to_owned(),
        line: 1,
        reason,
    };
    let here = SettingsFile {
        schema: 1,
        input: input.to_owned(),
        settings: serde_json::to_value(settings).map_err(|error| unreadable(error.to_string()))?,
    };
    let mut here = serde_json::to_value(here).map_err(|error| unreadable(error.to_string()))?;
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            here["version"] = env!("CARGO_PKG_VERSION").into();
            let text = format!("{here:#}\n");
            Ok(write_atomically(path, text.as_bytes(), Durability::Synced)?)
        }
        Err(source) => Err(output("read", path, source)),
        Ok(bytes) => {
            let there: Value =
                serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))?;
            let mut differences = Vec::new();
            compare("", &there, &here, &mut differences);
            if differences.is_empty() {
                return Ok(());
            }
            Err(FacesError::OtherSettings {
                path: path.to_owned(),
                differences: differences.join(", "),
            })
        }
    }
}

/// Lists the leaves of `here` that `there` does not have or has otherwise.
fn compare(name: &str, there: &Value, here: &Value, differences: &mut Vec<String>) {
    match (there, here) {
        (Value::Object(there), Value::Object(here)) => {
            for (key, value) in here {
                compare(key, there.get(key).unwrap_or(&Value::Null), value, differences);
            }
        }
        _ if there == here => {}
        _ => differences.push(format!("{name} is {there} there and {here} here")),
    }
}

fn output(action: &'static str, path: &Path, source: io::Error) -> FacesError {
    FacesError::Output {
        action,
        path: path.to_owned(),
        source,
    }
}
