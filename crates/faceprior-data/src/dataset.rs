//! Sets of pictures with random access.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::files::{self, Durability};
use crate::{DataError, Encoding, Image, random};

/// Pictures by number, read from any thread.
pub trait Dataset: Send + Sync {
    /// How many pictures there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads picture `index`, always the same one for the same number.
    ///
    /// # Errors
    /// Whatever keeps it from being read; the error names the picture.
    fn read(&self, index: usize) -> Result<Image, DataError>;

    /// The identity of picture `index`, below [`Dataset::num_classes`]; `None` throughout in an unlabelled set.
    fn label(&self, index: usize) -> Option<u32>;

    /// How many identities there are, 0 in an unlabelled set.
    fn num_classes(&self) -> usize;

    /// The name of picture `index`: its path relative to the set's root, `/` between folders.
    fn name(&self, index: usize) -> String;
}

/// Unlabelled pictures: a folder tree or a list of files.
#[derive(Clone, Debug)]
pub struct ImageList {
    root: PathBuf,
    paths: Vec<Box<Path>>,
}

impl ImageList {
    /// All pictures below a folder (see [`files::list_images`]), sorted bytewise.
    ///
    /// # Errors
    /// [`DataError::MissingFolder`], [`DataError::Empty`], [`DataError::Io`].
    pub fn from_folder(root: impl AsRef<Path>) -> Result<ImageList, DataError> {
        let root = root.as_ref();
        let paths = files::list_images(root)?;
        if paths.is_empty() {
            return Err(empty_folder(root));
        }
        Ok(ImageList::new(root, paths))
    }

    /// The pictures of a list of files (see [`files::read_list`]), in the order of the list.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::List`], [`DataError::Empty`].
    pub fn from_list(list: impl AsRef<Path>) -> Result<ImageList, DataError> {
        let (root, paths) = files::read_list(list)?;
        Ok(ImageList::new(root, paths))
    }

    /// A folder or a list of files, whichever `path` is.
    ///
    /// # Errors
    /// Those of [`ImageList::from_folder`] and [`ImageList::from_list`].
    pub fn open(path: impl AsRef<Path>) -> Result<ImageList, DataError> {
        let path = path.as_ref();
        if path.is_file() {
            ImageList::from_list(path)
        } else {
            ImageList::from_folder(path)
        }
    }

    /// Pictures by their paths, relative to `root` or absolute, in the order given.
    pub fn new(root: impl AsRef<Path>, paths: Vec<PathBuf>) -> ImageList {
        let paths = paths.into_iter().map(PathBuf::into_boxed_path).collect();
        ImageList {
            root: root.as_ref().to_owned(),
            paths,
        }
    }

    /// The folder that relative paths start from.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of picture `index` as it was listed: relative to the root, or absolute if it lies elsewhere.
    pub fn listed_path(&self, index: usize) -> &Path {
        &self.paths[index]
    }

    /// The path of picture `index` that can be opened.
    pub fn path(&self, index: usize) -> PathBuf {
        self.root.join(&self.paths[index])
    }

    /// A path for what is made from picture `index` below an output folder: relative, and inside it whatever the list
    /// says (an absolute path loses its root).
    pub fn output_path(&self, index: usize) -> PathBuf {
        use std::path::Component::Normal;
        let normal = self.paths[index]
            .components()
            .filter(|component| matches!(component, Normal(_)));
        normal.collect()
    }
}

impl Dataset for ImageList {
    fn len(&self) -> usize {
        self.paths.len()
    }

    fn read(&self, index: usize) -> Result<Image, DataError> {
        Image::read(self.path(index))
    }

    fn label(&self, _index: usize) -> Option<u32> {
        None
    }

    fn num_classes(&self) -> usize {
        0
    }

    fn name(&self, index: usize) -> String {
        files::display_name(&self.paths[index])
    }
}

/// Labelled pictures: `<root>/<identity>/**/<picture>`, identities and pictures sorted bytewise.
///
/// An identity is a folder with at least one picture; its name is free (BUPT's `Group^identity` is one identity).
#[derive(Clone, Debug)]
pub struct ImageFolder {
    pictures: ImageList,
    labels: Vec<u32>,
    identities: Vec<String>,
}

impl ImageFolder {
    /// Lists the identities below `root`.
    ///
    /// # Errors
    /// [`DataError::MissingFolder`], [`DataError::Empty`], [`DataError::OneIdentity`], [`DataError::Io`].
    pub fn open(root: impl AsRef<Path>) -> Result<ImageFolder, DataError> {
        let root = root.as_ref();
        let listed = files::list_images(root)?;
        if listed.is_empty() {
            return Err(empty_folder(root));
        }
        let total = listed.len();
        let (mut paths, mut labels, mut identities) = (Vec::with_capacity(total), Vec::new(), Vec::new());
        let mut by_identity: BTreeMap<Vec<u8>, Vec<PathBuf>> = BTreeMap::new();
        for path in listed {
            let mut components = path.components();
            if let (Some(identity), Some(_)) = (components.next(), components.next()) {
                by_identity
                    .entry(identity.as_os_str().as_encoded_bytes().to_vec())
                    .or_default()
                    .push(path);
            }
        }
        // By the identity's own name: sorting whole paths would put "a-b/" between "a" and "a/".
        for pictures in by_identity.into_values() {
            let identity = pictures[0]
                .components()
                .next()
                .map(|first| PathBuf::from(first.as_os_str()));
            labels.resize(labels.len() + pictures.len(), identities.len() as u32);
            identities.push(files::display_name(&identity.unwrap_or_default()));
            paths.extend(pictures);
        }
        if paths.len() < total {
            tracing::warn!(
                "{} pictures lie directly in {root:?} and belong to no identity: they are left out",
                total - paths.len()
            );
        }
        ImageFolder {
            pictures: ImageList::new(root, paths),
            labels,
            identities,
        }
        .at_least_two()
    }

    /// The folder that holds the identities.
    pub fn root(&self) -> &Path {
        self.pictures.root()
    }

    /// The names of the identities, by label.
    pub fn identities(&self) -> &[String] {
        &self.identities
    }

    /// The path of picture `index` that can be opened.
    pub fn path(&self, index: usize) -> PathBuf {
        self.pictures.path(index)
    }

    /// The same pictures without their labels.
    pub fn into_unlabelled(self) -> ImageList {
        self.pictures
    }

    /// A random `fraction` of the identities (at least two) with all their pictures; labels are numbered anew.
    /// With the same seed a smaller fraction is a subset of a larger one.
    ///
    /// # Errors
    /// [`DataError::Setting`] unless 0 < `fraction` ≤ 1.
    pub fn fraction_of_identities(&self, fraction: f64, seed: u64) -> Result<ImageFolder, DataError> {
        check_fraction("fraction of identities", fraction)?;
        let count = ((self.identities.len() as f64 * fraction).round() as usize).max(2);
        let order = random::permutation(
            &mut random::stream(seed, b"identity", [0, 0]),
            self.identities.len(),
        );
        let mut kept = vec![false; self.identities.len()];
        for &identity in order.iter().take(count) {
            kept[identity as usize] = true;
        }
        self.filtered(|index| kept[self.labels[index] as usize])
            .at_least_two()
    }

    /// A random `fraction` of every identity's pictures, at least one of each.
    /// With the same seed a smaller fraction is a subset of a larger one.
    ///
    /// # Errors
    /// [`DataError::Setting`] unless 0 < `fraction` ≤ 1.
    pub fn fraction_of_images(&self, fraction: f64, seed: u64) -> Result<ImageFolder, DataError> {
        check_fraction("fraction of images", fraction)?;
        let mut kept = vec![false; self.labels.len()];
        let mut start = 0;
        for pictures in self.labels.chunk_by(|a, b| a == b) {
            let count = ((pictures.len() as f64 * fraction).round() as usize).max(1);
            let clock = [u64::from(pictures[0]), 0];
            let order = random::permutation(&mut random::stream(seed, b"pictures", clock), pictures.len());
            for &picture in order.iter().take(count) {
                kept[start + picture as usize] = true;
            }
            start += pictures.len();
        }
        self.filtered(|index| kept[index]).at_least_two()
    }

    /// Leaves out the identities with fewer than `min_images` pictures (face.evoLVe's `remove_lowshot`, as a choice of
    /// the recipe instead of a deletion).
    ///
    /// # Errors
    /// [`DataError::OneIdentity`] or [`DataError::Empty`] if fewer than two remain.
    pub fn with_at_least(&self, min_images: usize) -> Result<ImageFolder, DataError> {
        let mut counts = vec![0; self.identities.len()];
        for &label in &self.labels {
            counts[label as usize] += 1;
        }
        self.filtered(|index| counts[self.labels[index] as usize] >= min_images)
            .at_least_two()
    }

    /// The pictures for which `keep` says so, labels numbered anew.
    fn filtered(&self, keep: impl Fn(usize) -> bool) -> ImageFolder {
        let mut renumbered = vec![None; self.identities.len()];
        let mut subset = ImageFolder {
            pictures: ImageList {
                root: self.pictures.root.clone(),
                paths: Vec::new(),
            },
            labels: Vec::new(),
            identities: Vec::new(),
        };
        for index in (0..self.labels.len()).filter(|&index| keep(index)) {
            let label = self.labels[index] as usize;
            let new = *renumbered[label].get_or_insert_with(|| {
                subset.identities.push(self.identities[label].clone());
                subset.identities.len() as u32 - 1
            });
            subset.labels.push(new);
            subset.pictures.paths.push(self.pictures.paths[index].clone());
        }
        subset
    }

    fn at_least_two(self) -> Result<ImageFolder, DataError> {
        match self.identities.as_slice() {
            [] => Err(DataError::Empty {
                path: self.root().to_owned(),
                expected: "expected <folder>/<identity>/<picture>.jpg\n\
                           hint: pictures directly in the folder have no identity; use it as an unlabelled set",
            }),
            [identity] => Err(DataError::OneIdentity {
                path: self.root().to_owned(),
                identity: identity.clone(),
            }),
            _ => Ok(self),
        }
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn read(&self, index: usize) -> Result<Image, DataError> {
        self.pictures.read(index)
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(self.labels[index])
    }

    fn num_classes(&self) -> usize {
        self.identities.len()
    }

    fn name(&self, index: usize) -> String {
        self.pictures.name(index)
    }
}

/// Some pictures of another set, in the order given.
pub struct Subset {
    dataset: Arc<dyn Dataset>,
    indices: Vec<usize>,
}

impl Subset {
    /// The pictures `indices` of `dataset`; labels and the number of identities stay as they are.
    ///
    /// # Panics
    /// If an index lies outside the set.
    pub fn new(dataset: Arc<dyn Dataset>, indices: Vec<usize>) -> Subset {
        let len = dataset.len();
        assert!(
            indices.iter().all(|&index| index < len),
            "a subset of {len} pictures names one beyond them"
        );
        Subset { dataset, indices }
    }

    /// `count` random pictures (all, if there are fewer), in ascending order.
    pub fn sample(dataset: Arc<dyn Dataset>, count: usize, seed: u64) -> Subset {
        let order = random::permutation(&mut random::stream(seed, b"subset  ", [0, 0]), dataset.len());
        let mut indices: Vec<usize> = order.iter().take(count).map(|&index| index as usize).collect();
        indices.sort_unstable();
        Subset { dataset, indices }
    }
}

impl Dataset for Subset {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn read(&self, index: usize) -> Result<Image, DataError> {
        self.dataset.read(self.indices[index])
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.dataset.label(self.indices[index])
    }

    fn num_classes(&self) -> usize {
        self.dataset.num_classes()
    }

    fn name(&self, index: usize) -> String {
        self.dataset.name(self.indices[index])
    }
}

/// Several sets one after the other. Identities of different sets are different; if one set is unlabelled, all are.
pub struct Concat {
    parts: Vec<Arc<dyn Dataset>>,
    /// Where each part begins, and the end.
    starts: Vec<usize>,
    first_labels: Vec<u32>,
    num_classes: usize,
}

impl Concat {
    /// Joins the sets in the order given.
    pub fn new(parts: Vec<Arc<dyn Dataset>>) -> Concat {
        let labelled = parts.iter().all(|part| part.num_classes() > 0);
        let (mut starts, mut first_labels, mut num_classes) = (vec![0], Vec::new(), 0);
        for part in &parts {
            starts.push(starts[starts.len() - 1] + part.len());
            first_labels.push(num_classes as u32);
            num_classes += part.num_classes();
        }
        Concat {
            parts,
            starts,
            first_labels,
            num_classes: if labelled { num_classes } else { 0 },
        }
    }

    /// Part and number within it.
    fn locate(&self, index: usize) -> (usize, usize) {
        let part = self.starts.partition_point(|&start| start <= index) - 1;
        (part, index - self.starts[part])
    }
}

impl Dataset for Concat {
    fn len(&self) -> usize {
        self.starts[self.parts.len()]
    }

    fn read(&self, index: usize) -> Result<Image, DataError> {
        let (part, index) = self.locate(index);
        self.parts[part].read(index)
    }

    fn label(&self, index: usize) -> Option<u32> {
        if self.num_classes == 0 {
            return None;
        }
        let (part, index) = self.locate(index);
        self.parts[part]
            .label(index)
            .map(|label| label + self.first_labels[part])
    }

    fn num_classes(&self) -> usize {
        self.num_classes
    }

    fn name(&self, index: usize) -> String {
        let (part, index) = self.locate(index);
        self.parts[part].name(index)
    }
}

/// Writes every picture of a set below `folder` under its own name, in the format of the name's extension.
///
/// # Errors
/// The first error in reading or writing; [`DataError::Setting`] for a name that would leave the folder.
pub fn export(dataset: &dyn Dataset, folder: &Path) -> Result<(), DataError> {
    for index in 0..dataset.len() {
        let name = dataset.name(index);
        if files::leaves_root(Path::new(&name)) {
            return Err(DataError::Setting {
                setting: "picture name",
                got: format!("{name:?}"),
                expected: "a path inside the folder".into(),
            });
        }
        let path = folder.join(name);
        let bytes = dataset.read(index)?.encode(Encoding::from_path(&path)?)?;
        files::write_atomically(&path, &bytes, Durability::Renamed)?;
    }
    Ok(())
}

fn empty_folder(root: &Path) -> DataError {
    DataError::Empty {
        path: root.to_owned(),
        expected: "no file below it ends in jpg, jpeg or png\nhint: check the path, or convert the pictures first",
    }
}

fn check_fraction(setting: &'static str, fraction: f64) -> Result<(), DataError> {
    if fraction > 0.0 && fraction <= 1.0 {
        return Ok(());
    }
    Err(DataError::Setting {
        setting,
        got: fraction.to_string(),
        expected: "more than 0 and at most 1 (0.1 is a tenth)".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A tree of tiny pictures, each of its own colour.
    fn tree(names: &[String]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (i, name) in names.iter().enumerate() {
            let color = [i as u8, 100, 200];
            Image::filled(4, 4, color)
                .write_with(root.path().join(name), Durability::Renamed)
                .unwrap();
        }
        root
    }

    fn identities(counts: &[usize]) -> tempfile::TempDir {
        let of = |(i, &count): (usize, &usize)| (0..count).map(move |k| format!("id {i}/{k:02}.png"));
        tree(&counts.iter().enumerate().flat_map(of).collect::<Vec<_>>())
    }

    fn names(dataset: &dyn Dataset) -> BTreeSet<String> {
        (0..dataset.len()).map(|index| dataset.name(index)).collect()
    }

    #[test]
    fn identities_are_sorted_by_their_own_names() {
        let all = ["a/1.png", "a-b/1.png", "a/0/x.png", "Group^b/1.png", "loose.png"].map(String::from);
        let root = tree(&all);
        let set = ImageFolder::open(root.path()).unwrap();
        assert_eq!(set.identities(), ["Group^b", "a", "a-b"]);
        let listed: Vec<_> = (0..set.len())
            .map(|i| (set.name(i), set.label(i).unwrap()))
            .collect();
        let expected = [
            ("Group^b/1.png", 0),
            ("a/0/x.png", 1),
            ("a/1.png", 1),
            ("a-b/1.png", 2),
        ];
        assert_eq!(listed, expected.map(|(name, label)| (name.to_string(), label)));
        assert_eq!(set.read(2).unwrap().pixel(0, 0), [0, 100, 200]);
        assert_eq!(set.into_unlabelled().label(0), None);
    }

    #[test]
    fn what_cannot_be_a_set_says_so_with_the_cure() {
        let root = tempfile::tempdir().unwrap();
        let open = |path: &Path| ImageFolder::open(path).map(|_| ()).unwrap_err().to_string();
        let missing = open(&root.path().join("nowhere"));
        assert!(
            missing.contains("nowhere") && missing.contains("does not exist") && missing.contains("hint:")
        );
        let empty = open(root.path());
        assert!(
            empty.contains("holds no pictures") && empty.contains("hint:"),
            "{empty}"
        );
        assert!(
            ImageList::open(root.path())
                .unwrap_err()
                .to_string()
                .contains("holds no pictures")
        );
        let loose = open(tree(&["loose.png".into()]).path());
        assert!(
            loose.contains("<identity>") && loose.contains("unlabelled"),
            "{loose}"
        );
        let one = open(identities(&[3]).path());
        assert!(
            one.contains("one identity only (\"id 0\")") && one.contains("hint:"),
            "{one}"
        );
    }

    #[test]
    fn fractions_of_identities_nest_and_renumber() {
        let root = identities(&[2, 3, 1, 4, 2, 2, 5, 1]);
        let set = ImageFolder::open(root.path()).unwrap();
        let (quarter, half) = (
            set.fraction_of_identities(0.25, 5).unwrap(),
            set.fraction_of_identities(0.5, 5).unwrap(),
        );
        assert_eq!((quarter.num_classes(), half.num_classes()), (2, 4));
        assert!(names(&quarter).is_subset(&names(&half)));
        assert_eq!(names(&set.fraction_of_identities(1.0, 5).unwrap()), names(&set));
        assert_ne!(names(&half), names(&set.fraction_of_identities(0.5, 6).unwrap()));
        for (index, &label) in half.labels.iter().enumerate() {
            assert!(half.name(index).starts_with(&half.identities()[label as usize]));
        }
        // Whole identities, never parts of them.
        let whole = |identity: &String| {
            names(&set)
                .iter()
                .filter(|name| name.starts_with(identity))
                .count()
        };
        assert_eq!(half.identities().iter().map(whole).sum::<usize>(), half.len());
        assert!(set.fraction_of_identities(0.0, 1).is_err() && set.fraction_of_identities(1.5, 1).is_err());
        assert!(set.fraction_of_identities(f64::NAN, 1).is_err());
    }

    #[test]
    fn fractions_of_images_keep_every_identity_and_nest() {
        let root = identities(&[2, 10, 1, 20]);
        let set = ImageFolder::open(root.path()).unwrap();
        let (tenth, half) = (
            set.fraction_of_images(0.1, 5).unwrap(),
            set.fraction_of_images(0.5, 5).unwrap(),
        );
        assert_eq!((tenth.len(), half.len()), (1 + 1 + 1 + 2, 1 + 5 + 1 + 10));
        assert_eq!((tenth.num_classes(), half.num_classes()), (4, 4));
        assert!(names(&tenth).is_subset(&names(&half)));
    }

    #[test]
    fn rare_identities_can_be_left_out() {
        let root = identities(&[2, 10, 1, 20]);
        let set = ImageFolder::open(root.path()).unwrap();
        assert_eq!(set.with_at_least(10).unwrap().identities(), ["id 1", "id 3"]);
        assert!(matches!(
            set.with_at_least(11),
            Err(DataError::OneIdentity { .. })
        ));
        assert!(matches!(set.with_at_least(99), Err(DataError::Empty { .. })));
    }

    #[test]
    fn joined_sets_keep_their_identities_apart() {
        let (first, second) = (identities(&[2, 3]), identities(&[1, 1, 1]));
        let first: Arc<dyn Dataset> = Arc::new(ImageFolder::open(first.path()).unwrap());
        let folder = ImageFolder::open(second.path()).unwrap();
        let joined = Concat::new(vec![first.clone(), Arc::new(folder.clone())]);
        assert_eq!((joined.len(), joined.num_classes()), (8, 5));
        let labels: Vec<_> = (0..8).map(|index| joined.label(index).unwrap()).collect();
        assert_eq!(labels, [0, 0, 1, 1, 1, 2, 3, 4]);
        assert_eq!(joined.name(5), "id 0/00.png");
        let mixed = Concat::new(vec![first.clone(), Arc::new(folder.into_unlabelled())]);
        assert_eq!((mixed.label(0), mixed.num_classes(), mixed.len()), (None, 0, 8));
        let subset = Subset::new(first.clone(), vec![4, 0]);
        assert_eq!(
            (subset.len(), subset.label(0), subset.name(1)),
            (2, Some(1), "id 0/00.png".to_string())
        );
        assert_eq!(Subset::sample(first, 3, 1).len(), 3);
    }

    #[test]
    fn what_is_made_from_a_list_stays_below_the_output_folder() {
        let list = ImageList::new(
            "root",
            ["/etc/x.jpg", "a/../b.jpg", "./c d.jpg"]
                .map(PathBuf::from)
                .to_vec(),
        );
        let outputs: Vec<_> = (0..3).map(|index| list.output_path(index)).collect();
        assert_eq!(outputs, ["etc/x.jpg", "a/b.jpg", "c d.jpg"].map(PathBuf::from));
    }

    #[test]
    fn an_exported_set_reads_back() {
        let source = identities(&[1, 2]);
        let set = ImageFolder::open(source.path()).unwrap();
        let target = tempfile::tempdir().unwrap();
        export(&set, target.path()).unwrap();
        let copy = ImageFolder::open(target.path()).unwrap();
        assert_eq!(names(&set), names(&copy));
        assert!((0..3).all(|index| set.read(index).unwrap() == copy.read(index).unwrap()));
    }
}
