//! Finding pictures, and writing files so that nobody ever sees half of one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use walkdir::WalkDir;

use crate::DataError;

/// Extensions under which pictures are looked for in folders, without regard to case.
pub const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// How much a finished write promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Whole or absent for every process on this machine; a power cut may take it back.
    Renamed,
    /// Also on the disk before the call returns.
    Synced,
}

/// Writes a file aside in its own folder and renames it into place; folders are made as needed.
///
/// # Errors
/// [`DataError::Io`]; the old file, if there was one, is then untouched and nothing is left aside.
pub fn write_atomically(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), DataError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let failed = |error| DataError::io("write", path, error);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Hidden, so that a run which was killed in between leaves nothing that a listing would take for a picture.
    let name = format!(
        ".writing-{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    );
    let aside = folder.join(name);
    let create = || File::create_new(&aside);
    let mut file = match create() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(folder).and_then(|()| create())
        }
        result => result,
    }
    .map_err(failed)?;
    let finish = || -> io::Result<()> {
        file.write_all(bytes)?;
        if durability == Durability::Synced {
            file.sync_all()?;
        }
        drop(file);
        fs::rename(&aside, path)?;
        if durability == Durability::Synced && cfg!(unix) {
            // The name is an entry of the folder: it is on the disk once the folder is.
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    finish().map_err(|error| {
        let _ = fs::remove_file(&aside);
        failed(error)
    })
}

/// Whether the path's extension is one of [`EXTENSIONS`].
pub fn has_picture_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| {
        EXTENSIONS
            .iter()
            .any(|known| known.eq_ignore_ascii_case(extension))
    })
}

/// All pictures below `root`, relative to it, sorted bytewise.
///
/// A picture is a file with one of [`EXTENSIONS`]. Hidden files and folders (a leading dot: among them the
/// `._name.jpg` that macOS leaves) are passed over, links are followed.
///
/// # Errors
/// [`DataError::MissingFolder`], [`DataError::Io`] for a folder that cannot be listed. No picture is no error.
pub fn list_images(root: impl AsRef<Path>) -> Result<Vec<PathBuf>, DataError> {
    let root = root.as_ref();
    if !root.is_dir() {
        return Err(DataError::MissingFolder {
            path: root.to_owned(),
        });
    }
    let hidden = |entry: &walkdir::DirEntry| {
        entry.depth() > 0 && entry.file_name().as_encoded_bytes().first() == Some(&b'.')
    };
    let mut found = Vec::new();
    for entry in WalkDir::new(root)
        .follow_links(true)
        .into_iter()
        .filter_entry(|entry| !hidden(entry))
    {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(root).to_owned();
            DataError::Io {
                action: "list",
                path,
                source: error.into(),
            }
        })?;
        if entry.file_type().is_file() && has_picture_extension(entry.path()) {
            let relative = entry.path().strip_prefix(root).unwrap_or(entry.path());
            found.push(relative.to_owned());
        }
    }
    sort_bytewise(&mut found);
    Ok(found)
}

/// Reads a list of pictures: one path a line, absolute or relative to the list's folder; spaces belong to the path,
/// empty lines are passed over. A list that holds a NUL byte (`find -print0`) is separated by NULs instead, so that
/// names with newlines can be listed.
///
/// Returns the root (the list's folder) and the paths in the order of the list: relative to that root if they lie
/// below it, absolute otherwise.
///
/// # Errors
/// [`DataError::Io`]; [`DataError::Empty`]; [`DataError::List`] for a relative path that leaves the list's folder.
pub fn read_list(list: impl AsRef<Path>) -> Result<(PathBuf, Vec<PathBuf>), DataError> {
    let list = list.as_ref();
    let bytes = fs::read(list).map_err(|error| DataError::io("read", list, error))?;
    let root = list.parent().unwrap_or(Path::new("")).to_owned();
    let separator = if bytes.contains(&0) { 0 } else { b'\n' };
    let mut paths = Vec::new();
    for (i, line) in bytes.split(|&byte| byte == separator).enumerate() {
        let line = if separator == b'\n' {
            line.strip_suffix(b"\r").unwrap_or(line)
        } else {
            line
        };
        if line.is_empty() {
            continue;
        }
        let refuse = |reason: String| DataError::List {
            path: list.to_owned(),
            line: i + 1,
            reason,
        };
        let path = path_from_bytes(line).map_err(|()| refuse("the path is not valid UTF-8".into()))?;
        if path.is_relative() && leaves_root(&path) {
            return Err(refuse(format!(
                "{path:?} leads out of the list's folder\nhint: paths are relative to the list; write an absolute path instead"
            )));
        }
        paths.push(match path.strip_prefix(&root) {
            Ok(inside) if path.is_absolute() => inside.to_owned(),
            _ => path,
        });
    }
    if paths.is_empty() {
        return Err(DataError::Empty {
            path: list.to_owned(),
            expected: "a list has one path a line",
        });
    }
    Ok((root, paths))
}

/// Writes a list that [`read_list`] reads: one path a line, or separated by NULs if a path holds a newline.
///
/// # Errors
/// [`DataError::Io`].
pub fn write_list<P: AsRef<Path>>(list: &Path, paths: &[P]) -> Result<(), DataError> {
    let names = || {
        paths
            .iter()
            .map(|path| path.as_ref().as_os_str().as_encoded_bytes())
    };
    let separator = if names().any(|name| name.contains(&b'\n') || name.ends_with(b"\r")) {
        0
    } else {
        b'\n'
    };
    let mut bytes = Vec::new();
    for name in names() {
        bytes.extend_from_slice(name);
        bytes.push(separator);
    }
    write_atomically(list, &bytes, Durability::Synced)
}

/// A path as text for names, logs and tables: UTF-8 as it is, any other byte as `\xNN`, so that paths which differ
/// only there keep different names.
pub fn display_name(path: &Path) -> String {
    let bytes = path.as_os_str().as_encoded_bytes();
    let mut name = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        name.push_str(chunk.valid());
        for byte in chunk.invalid() {
            name.push_str(&format!("\\x{byte:02X}"));
        }
    }
    name
}

pub(crate) fn sort_bytewise(paths: &mut [PathBuf]) {
    // `Path`'s own order goes by components, which is slower and differs ("a/b" against "a-b").
    paths.sort_unstable_by(|a, b| {
        a.as_os_str()
            .as_encoded_bytes()
            .cmp(b.as_os_str().as_encoded_bytes())
    });
}

/// Whether a relative path climbs above where it starts.
pub(crate) fn leaves_root(path: &Path) -> bool {
    let mut depth = 0i64;
    path.components().any(|component| {
        match component {
            Component::Normal(_) => depth += 1,
            Component::ParentDir => depth -= 1,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => depth = i64::MIN / 2,
        }
        depth < 0
    })
}

#[cfg(unix)]
fn path_from_bytes(bytes: &[u8]) -> Result<PathBuf, ()> {
    use std::os::unix::ffi::OsStrExt;
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
}

#[cfg(not(unix))]
fn path_from_bytes(bytes: &[u8]) -> Result<PathBuf, ()> {
    std::str::from_utf8(bytes).map(PathBuf::from).map_err(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn touch(root: &Path, name: &str) {
        write_atomically(&root.join(name), b"x", Durability::Renamed).unwrap();
    }

    #[test]
    fn lists_pictures_below_a_folder_in_byte_order() {
        let root = tempfile::tempdir().unwrap();
        for name in [
            "b.jpg",
            "a/z.PNG",
            "a-b/c.jpeg",
            "a/with space.jpg",
            "a/\"quoted\"\n.jpg",
            "notes.txt",
            "._b.jpg",
            ".x/y.jpg",
        ] {
            touch(root.path(), name);
        }
        let found = list_images(root.path()).unwrap();
        let expected = [
            "a-b/c.jpeg",
            "a/\"quoted\"\n.jpg",
            "a/with space.jpg",
            "a/z.PNG",
            "b.jpg",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
    }

    #[test]
    fn a_missing_folder_is_named_with_the_cure() {
        let error = list_images("/no/such folder").unwrap_err().to_string();
        assert!(
            error.contains("\"/no/such folder\" does not exist") && error.contains("hint:"),
            "{error}"
        );
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_aside() {
        let root = tempfile::tempdir().unwrap();
        // The target is a folder: the rename fails after the bytes were written.
        touch(root.path(), "target/inside.jpg");
        let error = write_atomically(&root.path().join("target"), b"new", Durability::Synced).unwrap_err();
        assert!(error.to_string().contains("cannot write"), "{error}");
        let names: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["target"]);
        assert!(root.path().join("target/inside.jpg").exists());
    }

    #[test]
    fn lists_take_spaces_carriage_returns_and_absolute_paths() {
        let root = tempfile::tempdir().unwrap();
        let list = root.path().join("faces.txt");
        let inside = root.path().join("in side.jpg");
        fs::write(
            &list,
            format!("a b.jpg\r\n\n{}\n/elsewhere/c.jpg\nd/../e.jpg", inside.display()),
        )
        .unwrap();
        let (found_root, paths) = read_list(&list).unwrap();
        assert_eq!(found_root, root.path());
        assert_eq!(
            paths,
            ["a b.jpg", "in side.jpg", "/elsewhere/c.jpg", "d/../e.jpg"].map(PathBuf::from)
        );
    }

    #[test]
    fn a_list_cannot_lead_out_of_its_folder_unseen() {
        let root = tempfile::tempdir().unwrap();
        let list = root.path().join("faces.txt");
        fs::write(&list, "a.jpg\nb/../../secret.jpg\n").unwrap();
        let error = read_list(&list).unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("secret.jpg") && error.contains("hint:"),
            "{error}"
        );
        fs::write(&list, "\n\n").unwrap();
        assert!(matches!(read_list(&list), Err(DataError::Empty { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_written_list_reads_back(names in prop::collection::vec("[a-z \n\"'é]{1,12}", 1..8)) {
            let root = tempfile::tempdir().unwrap();
            let list = root.path().join("list");
            write_list(&list, &names).unwrap();
            let (_, read) = read_list(&list).unwrap();
            prop_assert_eq!(read, names.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
    }

    #[cfg(unix)]
    #[test]
    fn names_that_are_not_utf8_survive() {
        use std::os::unix::ffi::OsStrExt;
        let root = tempfile::tempdir().unwrap();
        let odd = PathBuf::from(std::ffi::OsStr::from_bytes(b"gr\xFC\xDFe.jpg"));
        write_atomically(&root.path().join(&odd), b"x", Durability::Renamed).unwrap();
        assert_eq!(list_images(root.path()).unwrap(), std::slice::from_ref(&odd));
        assert_eq!(display_name(&odd), "gr\\xFC\\xDFe.jpg");
        let list = root.path().join("list");
        write_list(&list, std::slice::from_ref(&odd)).unwrap();
        assert_eq!(read_list(&list).unwrap().1, [odd]);
    }
}
