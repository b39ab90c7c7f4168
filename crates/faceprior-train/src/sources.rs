//! The recipe's pictures as data sets and pairs.
//!
//! Rendered sets of one recipe show different people: each of prior, labels and test draws its identities from a
//! seed of its own.

use std::path::Path;
use std::sync::Arc;

use faceprior_data::{Concat, DataError, Dataset, Image, ImageFolder, ImageList, SyntheticFaces, random};

use crate::TrainError;
use crate::embed::PairSet;
use crate::recipe::{LabelledData, PriorData, Recipe, TestData};
use crate::schedule;

/// Folds of rendered test pairs.
const TEST_FOLDS: usize = 10;

/// The labelled set of a recipe, cut into what trains and what chooses the best checkpoint.
#[derive(Clone)]
pub struct Labelled {
    /// Pictures to train on; labels are numbered from 0 without gaps.
    pub train: Arc<dyn Dataset>,
    /// Pairs of people who are not in `train`, if the recipe holds some out.
    pub validation: Option<PairSet>,
}

/// The unlabelled pictures of stages 1 and 2.
///
/// # Errors
/// Folders or lists that are missing, empty or malformed.
pub fn prior(recipe: &Recipe) -> Result<Arc<dyn Dataset>, TrainError> {
    Ok(match &recipe.data.prior {
        PriorData::Folders { paths } => {
            let mut parts: Vec<Arc<dyn Dataset>> = Vec::new();
            for path in paths {
                parts.push(Arc::new(ImageList::from_folder(path)?));
            }
            Arc::new(Concat::new(parts))
        }
        PriorData::List { path } => Arc::new(ImageList::from_list(path)?),
        PriorData::Synthetic { identities, pictures } => {
            Arc::new(rendered(recipe, "prior", *identities, *pictures).unlabelled())
        }
    })
}

/// The labelled pictures of stage 3.
///
/// # Errors
/// Folders that are missing or empty, one identity only, or fewer identities than are to be held out and trained on.
pub fn labelled(recipe: &Recipe) -> Result<Labelled, TrainError> {
    let (all, place): (Arc<dyn Dataset>, &Path) = match &recipe.data.labels {
        LabelledData::Identities { path, fraction } => {
            let folder = ImageFolder::open(path)?;
            let seed = schedule::seed(recipe.seed, "fraction of identities");
            let folder = if *fraction < 1.0 {
                folder.fraction_of_identities(*fraction, seed)?
            } else {
                folder
            };
            (Arc::new(folder), path)
        }
        LabelledData::Synthetic { identities, pictures } => (
            Arc::new(rendered(recipe, "labels", *identities, *pictures)),
            Path::new("rendered faces"),
        ),
    };
    let held_out = recipe.data.validation_identities;
    if held_out == 0 {
        return Ok(Labelled {
            train: all,
            validation: None,
        });
    }
    let people = all.num_classes();
    if people < held_out + 2 {
        return Err(TrainError::Invalid(format!(
            "{place:?} holds {people} identities, expected at least {} to hold out {held_out} and train on two\n\
             hint: lower data.validation_identities",
            held_out + 2
        )));
    }
    let mut rng = random::stream(
        schedule::seed(recipe.seed, "validation identities"),
        b"held out",
        [0, 0],
    );
    let mut is_held_out = vec![false; people];
    for person in random::permutation(&mut rng, people).into_iter().take(held_out) {
        is_held_out[person as usize] = true;
    }
    let validation = People::of(&all, |person| is_held_out[person]);
    let pairs_seed = schedule::seed(recipe.seed, "validation pairs");
    Ok(Labelled {
        validation: Some(PairSet::sample(
            Arc::new(validation),
            recipe.data.validation_pairs,
            pairs_seed,
        )?),
        train: Arc::new(People::of(&all, |person| !is_held_out[person])),
    })
}

/// The pairs of the final score.
///
/// # Errors
/// A folder or pairs file that is missing or malformed, or pairs of unknown pictures.
pub fn test_pairs(recipe: &Recipe) -> Result<PairSet, TrainError> {
    match &recipe.data.test {
        TestData::Pairs { path, pairs } => PairSet::from_lfw(path, pairs),
        TestData::Synthetic {
            identities,
            pictures,
            pairs,
        } => {
            let faces = rendered(recipe, "test", *identities, *pictures);
            let pairs = faces.pairs(
                TEST_FOLDS,
                pairs / (2 * TEST_FOLDS),
                schedule::seed(recipe.seed, "test pairs"),
            )?;
            PairSet::named(Arc::new(faces), &pairs)
        }
    }
}

/// Side of rendered pictures: half as large again as what the networks see, so that they are resized as photographs
/// are.
fn rendered_size(recipe: &Recipe) -> usize {
    recipe.prior.resolution.max(recipe.backbone.image_size) * 3 / 2
}

fn rendered(recipe: &Recipe, part: &str, identities: usize, pictures: usize) -> SyntheticFaces {
    let seed = schedule::seed(recipe.seed, &format!("rendered faces, {part}"));
    SyntheticFaces::new(seed, identities, pictures, rendered_size(recipe))
}

/// Some people of a labelled set, numbered anew.
struct People {
    dataset: Arc<dyn Dataset>,
    indices: Vec<usize>,
    labels: Vec<u32>,
    num_classes: usize,
}

impl People {
    fn of(dataset: &Arc<dyn Dataset>, keep: impl Fn(usize) -> bool) -> Self {
        let mut renumbered = vec![None; dataset.num_classes()];
        let mut people = Self {
            dataset: Arc::clone(dataset),
            indices: Vec::new(),
            labels: Vec::new(),
            num_classes: 0,
        };
        for index in 0..dataset.len() {
            let Some(person) = dataset
                .label(index)
                .map(|label| label as usize)
                .filter(|&person| keep(person))
            else {
                continue;
            };
            let label = *renumbered[person].get_or_insert_with(|| {
                people.num_classes += 1;
                people.num_classes as u32 - 1
            });
            people.indices.push(index);
            people.labels.push(label);
        }
        people
    }
}

impl Dataset for People {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn read(&self, index: usize) -> Result<Image, DataError> {
        self.dataset.read(self.indices[index])
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(self.labels[index])
    }

    fn num_classes(&self) -> usize {
        self.num_classes
    }

    fn name(&self, index: usize) -> String {
        self.dataset.name(self.indices[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(changes: &[&str]) -> Recipe {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        Recipe::load("demo", &changes).unwrap()
    }

    #[test]
    fn people_held_out_do_not_train_and_labels_have_no_gaps() {
        let recipe = recipe(&["data.validation_identities=5", "data.validation_pairs=40"]);
        let labelled = labelled(&recipe).unwrap();
        let train = labelled.train;
        let validation = labelled.validation.unwrap();
        let names = |set: &dyn Dataset| (0..set.len()).map(|index| set.name(index)).collect::<Vec<_>>();
        let held_out = names(&**validation.dataset());
        assert!(names(&*train).iter().all(|name| !held_out.contains(name)));
        assert_eq!(validation.dataset().num_classes(), 5);
        let mut labels: Vec<u32> = (0..train.len()).filter_map(|index| train.label(index)).collect();
        labels.dedup();
        assert_eq!(labels, (0..train.num_classes() as u32).collect::<Vec<_>>());
        assert_eq!(validation.pairs().len(), 40);
    }

    #[test]
    fn too_few_people_are_an_error_with_a_cure() {
        let recipe = recipe(&[
            "data.labels.identities=6",
            "data.validation_identities=5",
            "data.validation_pairs=40",
        ]);
        let error = labelled(&recipe).err().unwrap().to_string();
        assert!(
            error.contains("holds 6 identities, expected at least 7"),
            "{error}"
        );
        assert!(error.contains("lower data.validation_identities"), "{error}");
    }

    #[test]
    fn missing_folders_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("not here");
        let path = missing.display();
        let recipe = recipe(&[
            &format!("data.prior={{source=\"folders\", paths=\"{path}\"}}"),
            &format!("data.labels={{source=\"identities\", path=\"{path}\", fraction=1}}"),
            &format!("data.test={{source=\"pairs\", path=\"{path}\", pairs=\"{path}/pairs.txt\"}}"),
        ]);
        let errors = [
            prior(&recipe).err().unwrap(),
            labelled(&recipe).err().unwrap(),
            test_pairs(&recipe).err().unwrap(),
        ];
        for error in errors {
            let error = error.to_string();
            assert!(
                error.contains("not here") && error.contains("does not exist"),
                "{error}"
            );
        }
    }
}
