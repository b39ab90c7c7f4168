//! Verification pairs in LFW's format.
//!
//! ```text
//! 10<tab>300                                  folds, pairs of each kind in a fold
//! Abel_Pacheco<tab>1<tab>4                    same: name, n1, n2
//! Abdel_Madi<tab>1<tab>Dean_Barker<tab>1      different: name1, n1, name2, n2
//! ```
//! `name n` is the picture `name/name_%04d.jpg`. Fields are separated by tabs, or by spaces where a line has no tab.
//! A header of one number (LFW's development sets) means one fold.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use crate::files::{self, Durability};
use crate::{DataError, Dataset};

/// Two pictures and whether they show the same person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Name of the first picture: its path relative to the root of the set.
    pub left: String,
    /// Name of the second picture.
    pub right: String,
    /// Whether both show one person.
    pub same: bool,
    /// The fold, from 0.
    pub fold: usize,
}

/// The pictures that pairs may name: from a path without its extension to the whole path.
#[derive(Clone, Debug, Default)]
pub struct Pictures {
    by_stem: HashMap<String, String>,
    people: HashSet<String>,
}

impl Pictures {
    /// The pictures with these names (relative paths with extensions).
    pub fn new<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Pictures {
        let mut pictures = Pictures::default();
        for name in names {
            let name: String = name.into();
            let stem = match name.rsplit_once('.') {
                Some((stem, extension)) if !extension.contains('/') => stem,
                _ => name.as_str(),
            };
            if let Some((person, _)) = stem.split_once('/') {
                pictures.people.insert(person.to_owned());
            }
            pictures.by_stem.insert(stem.to_owned(), name);
        }
        pictures
    }

    /// All pictures of a data set.
    pub fn of(dataset: &dyn Dataset) -> Pictures {
        Pictures::new((0..dataset.len()).map(|index| dataset.name(index)))
    }

    /// All pictures below a folder.
    ///
    /// # Errors
    /// Those of [`files::list_images`].
    pub fn in_folder(root: impl AsRef<Path>) -> Result<Pictures, DataError> {
        Ok(Pictures::new(
            files::list_images(root)?
                .iter()
                .map(|path| files::display_name(path)),
        ))
    }

    fn find(&self, person: &str, number: u32) -> Result<String, String> {
        let stem = stem(person, number);
        if let Some(name) = self.by_stem.get(&stem) {
            return Ok(name.clone());
        }
        Err(if self.people.contains(person) {
            format!(
                "there is no picture {stem:?} (jpg, jpeg or png)\n\
                 hint: {person:?} has other pictures; this one may be missing, or was left out when faces were cut"
            )
        } else {
            format!(
                "nobody is named {person:?}\n\
                 hint: check that these pairs belong to this set, and that the folder is the one above the identities"
            )
        })
    }
}

/// LFW's name of a picture, without the extension.
fn stem(person: &str, number: u32) -> String {
    format!("{person}/{person}_{number:04}")
}

/// Reads a pairs file; every picture must be one of `pictures`.
///
/// # Errors
/// [`DataError::Io`]; [`DataError::Pairs`] names the line, what is wrong with it, and the cure.
pub fn read(path: impl AsRef<Path>, pictures: &Pictures) -> Result<Vec<Pair>, DataError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|error| DataError::io("read", path, error))?;
    parse(&bytes, pictures).map_err(|(line, reason)| DataError::Pairs {
        path: path.to_owned(),
        line,
        reason,
    })
}

fn parse(bytes: &[u8], pictures: &Pictures) -> Result<Vec<Pair>, (usize, String)> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count();
        (line, "it is not UTF-8 text".to_string())
    })?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line))
        .filter(|(_, l)| !l.trim().is_empty());

    let no_header = || {
        "the first line must be the header, folds and pairs a fold, as in \"10\\t300\"\n\
         hint: 10 folds of 300 same and 300 different pairs are 6,000 lines"
            .to_string()
    };
    let (line, header) = lines.next().ok_or_else(|| (1, no_header()))?;
    let numbers: Option<Vec<usize>> = header
        .split_whitespace()
        .map(|field| field.parse().ok())
        .collect();
    let (folds, per_fold) = match numbers.as_deref() {
        Some(&[folds, pairs]) if folds > 0 && pairs > 0 => (folds, pairs),
        Some(&[pairs]) if pairs > 0 => (1, pairs),
        _ => return Err((line, no_header())),
    };
    let per_kind = folds.checked_mul(per_fold);
    let expected = per_kind
        .and_then(|pairs| pairs.checked_mul(2))
        .ok_or_else(|| (line, no_header()))?;

    let mut pairs: Vec<Pair> = Vec::new();
    let mut last = line;
    for (line, content) in lines {
        last = line;
        let fields: Vec<&str> = if content.contains('\t') {
            content.split('\t').map(str::trim).collect()
        } else {
            content.split_whitespace().collect()
        };
        let number = |field: &str| {
            field
                .parse::<u32>()
                .map_err(|_| (line, format!("{field:?} is not the number of a picture")))
        };
        let find = |person: &str, n: &str| pictures.find(person, number(n)?).map_err(|reason| (line, reason));
        let fold = pairs.len() / (2 * per_fold);
        pairs.push(match *fields {
            [name, n1, n2] => Pair {
                left: find(name, n1)?,
                right: find(name, n2)?,
                same: true,
                fold,
            },
            [name1, n1, name2, n2] => Pair {
                left: find(name1, n1)?,
                right: find(name2, n2)?,
                same: false,
                fold,
            },
            _ => {
                let got = fields.len();
                return Err((
                    line,
                    format!("{got} fields, expected 3 (name, n1, n2) or 4 (name1, n1, name2, n2)"),
                ));
            }
        });
    }
    if pairs.len() != expected {
        let reason = format!(
            "the file ends after {} pairs, the header promises {folds} folds of 2 x {per_fold}\n\
             hint: the file may be cut off, or its header may belong to another one",
            pairs.len()
        );
        return Err((last, reason));
    }
    Ok(pairs)
}

/// Writes pairs in LFW's format: folds in order, in each the same pairs before the different ones.
///
/// # Errors
/// [`DataError::Io`]; [`DataError::Setting`] if folds differ in size, or a name is not `name/name_%04d.ext`.
pub fn write(path: impl AsRef<Path>, pairs: &[Pair]) -> Result<(), DataError> {
    let folds = pairs.iter().map(|pair| pair.fold + 1).max().unwrap_or(0);
    let per_fold = pairs.len() / (2 * folds.max(1));
    let mut text = format!("{folds}\t{per_fold}\n");
    for fold in 0..folds {
        for same in [true, false] {
            let chosen: Vec<&Pair> = pairs
                .iter()
                .filter(|pair| (pair.fold, pair.same) == (fold, same))
                .collect();
            if chosen.len() != per_fold {
                return Err(DataError::Setting {
                    setting: "pairs of a fold",
                    got: format!("{} with same = {same} in fold {fold}", chosen.len()),
                    expected: format!("{per_fold}, as many as in every other fold and kind"),
                });
            }
            for pair in chosen {
                let ((left, n1), (right, n2)) = (split(&pair.left)?, split(&pair.right)?);
                text.push_str(&if same {
                    format!("{left}\t{n1}\t{n2}\n")
                } else {
                    format!("{left}\t{n1}\t{right}\t{n2}\n")
                });
            }
        }
    }
    files::write_atomically(path.as_ref(), text.as_bytes(), Durability::Synced)
}

/// Person and number of `name/name_%04d.ext`.
fn split(name: &str) -> Result<(&str, u32), DataError> {
    let parts = || {
        let (person, file) = name.split_once('/')?;
        let number = file
            .rsplit_once('.')?
            .0
            .strip_prefix(person)?
            .strip_prefix('_')?
            .parse()
            .ok()?;
        let plain = !person.contains(['\t', '\n', '\r']) && name.starts_with(&stem(person, number));
        plain.then_some((person, number))
    };
    parts().ok_or_else(|| DataError::Setting {
        setting: "name of a picture in a pair",
        got: format!("{name:?}"),
        expected: "LFW's form, name/name_0001.jpg".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pictures() -> Pictures {
        Pictures::new([
            "Ann Lee/Ann Lee_0001.jpg",
            "Ann Lee/Ann Lee_0012.png",
            "Bo/Bo_0001.jpeg",
            "Cy.D/Cy.D_0003.jpg",
        ])
    }

    const TEXT: &str = "2\t1\nAnn Lee\t1\t12\nAnn Lee\t1\tBo\t1\r\nBo 1 1\nCy.D 3 Bo 1\n\n";

    #[test]
    fn reads_folds_names_and_extensions() {
        let pairs = parse(TEXT.as_bytes(), &pictures()).unwrap();
        let expected = [
            ("Ann Lee/Ann Lee_0001.jpg", "Ann Lee/Ann Lee_0012.png", true, 0),
            ("Ann Lee/Ann Lee_0001.jpg", "Bo/Bo_0001.jpeg", false, 0),
            ("Bo/Bo_0001.jpeg", "Bo/Bo_0001.jpeg", true, 1),
            ("Cy.D/Cy.D_0003.jpg", "Bo/Bo_0001.jpeg", false, 1),
        ];
        let read: Vec<_> = pairs
            .iter()
            .map(|p| (p.left.as_str(), p.right.as_str(), p.same, p.fold))
            .collect();
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.txt");
        let pairs = parse(TEXT.as_bytes(), &pictures()).unwrap();
        write(&path, &pairs).unwrap();
        assert_eq!(read(&path, &pictures()).unwrap(), pairs);
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .starts_with("2\t1\nAnn Lee\t1\t12\n")
        );
        let uneven = write(&path, &pairs[..3]).unwrap_err().to_string();
        assert!(uneven.contains("fold"), "{uneven}");
        let odd = Pair {
            left: "plain.jpg".into(),
            ..pairs[0].clone()
        };
        assert!(
            write(&path, &[odd, pairs[1].clone()])
                .unwrap_err()
                .to_string()
                .contains("plain.jpg")
        );
    }

    #[test]
    fn errors_name_the_line_and_the_cure() {
        let refused = |text: &str| {
            let (line, reason) = parse(text.as_bytes(), &pictures()).unwrap_err();
            format!("{line}: {reason}")
        };
        let unknown = refused("1\t1\nAnn Lee\t1\t12\nAnn Lee\t1\tZoe\t1\n");
        assert!(
            unknown.starts_with("3: nobody is named \"Zoe\"") && unknown.contains("hint:"),
            "{unknown}"
        );
        let missing = refused("1\t1\nAnn Lee\t1\t2\n");
        assert!(
            missing.starts_with("2: there is no picture \"Ann Lee/Ann Lee_0002\""),
            "{missing}"
        );
        assert!(refused("1\t1\nBo\tx\t1\n").starts_with("2: \"x\" is not the number"));
        assert!(refused("1\t1\nBo\t1\n").starts_with("2: 2 fields"));
        assert!(refused("Bo\t1\t1\n").starts_with("1: the first line must be the header"));
        assert!(refused("").starts_with("1: the first line"));
        assert!(refused("1\t1\nBo\t1\t1\n").starts_with("2: the file ends after 1 pairs"));
        assert!(refused("99999999\t99999999\nBo 1 1\n").contains("the file ends"));
        assert!(refused("1\t18446744073709551615\nBo 1 1\n").starts_with("1: the first line must be"));
        let (line, _) = parse(b"1\t1\n\xFF", &pictures()).unwrap_err();
        assert_eq!(line, 2);
    }

    #[test]
    fn a_header_of_one_number_is_one_fold() {
        let pairs = parse(b"1\nBo 1 1\nBo 1 Cy.D 3\n", &pictures()).unwrap();
        assert_eq!(pairs.iter().map(|pair| pair.fold).collect::<Vec<_>>(), [0, 0]);
    }
}
