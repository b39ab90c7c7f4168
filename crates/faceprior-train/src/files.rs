//! Files that are either the old one or the whole new one, and folders that keep what was renamed into them.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::TrainError;

/// Writes a file aside, syncs it and renames it over `path`.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".partial");
    let aside = Path::new(&aside);
    let written = File::create(aside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(error) = written.and_then(|()| fs::rename(aside, path)) {
        let _ = fs::remove_file(aside);
        return Err(TrainError::io("write", path)(error));
    }
    path.parent().map_or(Ok(()), sync_dir)
}

/// Makes the names in a folder survive a power cut. On systems where a folder cannot be opened it does nothing.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(TrainError::io("sync", dir))?;
    }
    Ok(())
}

pub(crate) fn create_dir(dir: &Path) -> Result<(), TrainError> {
    fs::create_dir_all(dir).map_err(TrainError::io("create", dir))
}
