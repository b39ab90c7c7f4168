//! Names of files as text, one a line, whatever bytes they are made of.
//!
//! An ordinary name stands for itself. A backslash is written `\\`, a newline `\n`, a carriage return `\r`, a tab `\t`,
//! and a byte that is not UTF-8 `\xHH`; `/` separates folders on every system.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The path as one line of text.
///
/// ```
/// use faceprior_faces::names::{escape, unescape};
///
/// let odd = std::path::Path::new("a folder/two\nlines.jpg");
/// assert_eq!(escape(odd), "a folder/two\\nlines.jpg");
/// assert_eq!(unescape("a folder/two\\nlines.jpg").as_deref(), Some(odd));
/// ```
pub fn escape(path: &Path) -> String {
    let mut text = String::new();
    for chunk in portable(path).as_encoded_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// The path that [`escape`] wrote, or `None` for text that it does not write.
pub fn unescape(text: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        let (&kind, tail) = rest.split_first()?;
        rest = tail;
        bytes.push(match kind {
            b'\\' => b'\\',
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'x' => {
                let (digits, tail) = rest.split_at_checked(2)?;
                rest = tail;
                u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?
            }
            _ => return None,
        });
    }
    from_bytes(bytes).map(PathBuf::from)
}

#[cfg(unix)]
fn portable(path: &Path) -> &OsStr {
    path.as_os_str()
}

#[cfg(not(unix))]
fn portable(path: &Path) -> OsString {
    let parts: Vec<&OsStr> = path.iter().collect();
    parts.join(OsStr::new("/"))
}

#[cfg(unix)]
fn from_bytes(bytes: Vec<u8>) -> Option<OsString> {
    Some(std::os::unix::ffi::OsStringExt::from_vec(bytes))
}

#[cfg(not(unix))]
fn from_bytes(bytes: Vec<u8>) -> Option<OsString> {
    String::from_utf8(bytes).ok().map(OsString::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone() {
        for (name, text) in [
            ("plain/name 1.jpg", "plain/name 1.jpg"),
            ("tab\tand \"quotes\"", "tab\\tand \"quotes\""),
            ("a\nb\r", "a\\nb\\r"),
            ("back\\x41slash", "back\\\\x41slash"),
            ("grün/面.jpg", "grün/面.jpg"),
        ] {
            assert_eq!(escape(Path::new(name)), text);
            assert_eq!(unescape(text).unwrap(), Path::new(name));
        }
        for wrong in ["\\", "\\q", "\\x4", "\\xzz"] {
            assert_eq!(unescape(wrong), None, "{wrong}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn bytes_that_are_not_utf8_survive() {
        use std::os::unix::ffi::OsStrExt;
        let name = Path::new(OsStr::from_bytes(b"caf\xe9\xff.jpg"));
        assert_eq!(escape(name), "caf\\xe9\\xff.jpg");
        assert_eq!(unescape("caf\\xe9\\xff.jpg").unwrap(), name);
    }
}
