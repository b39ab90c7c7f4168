//! From text to a [`Recipe`] and back: files, built-in recipes, changes from the command line, errors that help.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::{Recipe, RecognizerRecipe, SCHEMA, StageName};

/// The recipes that come with the program: name and text.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("demo", include_str!("../../../../recipes/demo.toml")),
    ("small", include_str!("../../../../recipes/small.toml")),
    ("paper", include_str!("../../../../recipes/paper.toml")),
];

/// What is wrong with a recipe, where, and how to mend it.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {problem}{}", hint.as_ref().map(|hint| format!("\nhint: {hint}")).unwrap_or_default())]
pub struct RecipeError {
    /// The file, or the built-in recipe's name.
    pub origin: String,
    /// What was found and what was expected.
    pub problem: String,
    /// The cure, where there is one.
    pub hint: Option<String>,
}

impl Recipe {
    /// Reads a recipe file, or a built-in recipe by its name, and applies `key=value` changes in order.
    ///
    /// A value is TOML (`3`, `true`, `[1, 2]`, `{ kind = "constant" }`); what is not TOML is taken as a string.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML, an unknown recipe or key, a value of the wrong kind or out of
    /// range. Each names the file and the key.
    pub fn load(recipe: impl AsRef<Path>, changes: &[String]) -> Result<Self, RecipeError> {
        let path = recipe.as_ref();
        let name = path.to_string_lossy();
        if let Some((name, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::from_toml(text, &format!("built-in recipe {name:?}"), changes);
        }
        let text = std::fs::read_to_string(path).map_err(|error| {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            RecipeError {
                origin: format!("{path:?}"),
                problem: format!("cannot read the recipe: {error}"),
                hint: Some(match nearest(&name, &names) {
                    Some(near) => format!("did you mean the built-in recipe {near:?}?"),
                    None => format!(
                        "give a file, or one of the built-in recipes: {}",
                        names.join(", ")
                    ),
                }),
            }
        })?;
        Self::from_toml(&text, &format!("{path:?}"), changes)
    }

    /// Reads a recipe from text; `origin` names it in errors. See [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load), without the file's.
    pub fn from_toml(text: &str, origin: &str, changes: &[String]) -> Result<Self, RecipeError> {
        let fail = |problem: String, hint: Option<String>| RecipeError {
            origin: origin.to_owned(),
            problem,
            hint,
        };
        let mut table: Table =
            toml::from_str(text).map_err(|error| fail(error.to_string().trim_end().to_owned(), None))?;
        for change in changes {
            set(&mut table, change).map_err(|problem| fail(problem, None))?;
        }
        match table.get("schema").and_then(Value::as_integer) {
            Some(schema) if schema == i64::from(SCHEMA) => {}
            Some(schema) => {
                return Err(fail(
                    format!("schema is {schema}, expected {SCHEMA}"),
                    Some("the recipe was written for another version of the program".to_owned()),
                ));
            }
            None => {
                return Err(fail(
                    "no schema".to_owned(),
                    Some(format!("begin with `schema = {SCHEMA}`")),
                ));
            }
        }
        let recipe = Self::deserialize(table).map_err(|error| {
            let (problem, hint) = explain(&error);
            fail(problem, hint)
        })?;
        recipe.check().map_err(|problem| fail(problem, None))?;
        Ok(recipe)
    }

    /// The recipe with every field written out, as a run directory keeps it. [`from_toml`](Self::from_toml) reads
    /// it back to the same recipe.
    pub fn resolved(&self) -> String {
        toml::to_string(self).expect("a recipe holds only what TOML can say")
    }

    /// BLAKE3 of the resolved text, in hexadecimal: equal for two files that mean the same.
    pub fn hash(&self) -> String {
        blake3::hash(self.resolved().as_bytes()).to_hex().to_string()
    }

    /// What the twin of stage 3 trains by: the recogniser's settings with `[scratch]` in place of its own.
    pub fn scratch_recognizer(&self) -> RecognizerRecipe {
        RecognizerRecipe {
            learning_rate: self.scratch.learning_rate,
            warmup_images: self.scratch.warmup_images,
            margin_ramp_images: self.scratch.margin_ramp_images,
            freeze_epochs: self.scratch.freeze_epochs,
            ..self.recognizer.clone()
        }
    }

    /// Fields in which two recipes differ, as (dotted key, value here, value there).
    pub fn differences(&self, other: &Self) -> Vec<(String, String, String)> {
        let (here, there) = (self.fields(), other.fields());
        let absent = || "absent".to_owned();
        let keys: BTreeSet<&String> = here.keys().chain(there.keys()).collect();
        keys.into_iter()
            .filter(|key| here.get(*key) != there.get(*key))
            .map(|key| {
                let value =
                    |fields: &BTreeMap<String, String>| fields.get(key).cloned().unwrap_or_else(absent);
                (key.clone(), value(&here), value(&there))
            })
            .collect()
    }

    /// The [`differences`](Self::differences) that a run of `stage` would feel.
    pub fn differences_for(&self, other: &Self, stage: StageName) -> Vec<(String, String, String)> {
        let felt = |key: &str| {
            stage.keys().iter().any(|prefix| {
                key.strip_prefix(prefix)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || prefix.ends_with('_'))
            })
        };
        self.differences(other)
            .into_iter()
            .filter(|(key, ..)| felt(key))
            .collect()
    }

    fn fields(&self) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        let table = Table::try_from(self).expect("a recipe holds only what TOML can say");
        flatten(&mut fields, String::new(), &Value::Table(table));
        fields
    }
}

/// Applies one `key=value` to the tree.
fn set(table: &mut Table, change: &str) -> Result<(), String> {
    let malformed =
        || format!("cannot apply {change:?}, expected key=value such as prior.budget.images=20000");
    let (key, text) = change.split_once('=').ok_or_else(malformed)?;
    let mut parts: Vec<&str> = key.split('.').map(str::trim).collect();
    let last = parts
        .pop()
        .filter(|last| !last.is_empty())
        .ok_or_else(malformed)?;
    let mut here = table;
    for part in parts {
        here = here
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| format!("cannot apply {change:?}: {part} is a value, expected a table"))?;
    }
    let value = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    here.insert(last.to_owned(), value);
    Ok(())
}

/// Turns the parser's message about an unknown key into one with the full key and its nearest neighbour.
fn explain(error: &toml::de::Error) -> (String, Option<String>) {
    let text = error.to_string();
    let section = text
        .lines()
        .find_map(|line| line.strip_prefix("in `"))
        .and_then(|rest| rest.strip_suffix('`'));
    let message = error.message();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let full = |key: &str| section.map_or_else(|| key.to_owned(), |section| format!("{section}.{key}"));
    match (
        message.starts_with("unknown field"),
        message.starts_with("missing field"),
        quoted.split_first(),
    ) {
        (true, _, Some((unknown, known))) => {
            let hint = match nearest(unknown, known) {
                Some(near) => format!("did you mean {:?}?", full(near)),
                None => format!("the keys there are {}", known.join(", ")),
            };
            (format!("unknown key {:?}", full(unknown)), Some(hint))
        }
        (_, true, Some((missing, _))) => (format!("missing key {:?}", full(missing)), None),
        _ => (
            section.map_or_else(|| message.to_owned(), |section| format!("{section}: {message}")),
            None,
        ),
    }
}

/// The candidate that is at most a third of its letters away.
fn nearest<'a>(text: &str, candidates: &[&'a str]) -> Option<&'a str> {
    candidates
        .iter()
        .map(|candidate| (edit_distance(text, candidate), *candidate))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, candidate)| *distance <= candidate.chars().count().div_ceil(3))
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions and replacements that turn `a` into `b` (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn flatten(fields: &mut BTreeMap<String, String>, key: String, value: &Value) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() {
                    name.clone()
                } else {
                    format!("{key}.{name}")
                };
                flatten(fields, key, value);
            }
        }
        value => {
            fields.insert(key, value.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use faceprior_eval::Flip;

    use super::*;
    use crate::recipe::{Head, PriorData};

    fn demo(changes: &[&str]) -> Result<Recipe, RecipeError> {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        Recipe::load("demo", &changes)
    }

    #[test]
    fn built_in_recipes_are_valid_and_survive_resolution() {
        for (name, _) in BUILT_IN {
            let recipe = Recipe::load(name, &[]).unwrap_or_else(|error| panic!("{error}"));
            let again = Recipe::from_toml(&recipe.resolved(), name, &[]).unwrap();
            assert_eq!(recipe, again, "{name}");
            assert_eq!(recipe.hash(), again.hash(), "{name}");
        }
    }

    #[test]
    fn changes_reach_every_kind_of_value() {
        let recipe = demo(&[
            "prior.budget.images=123",
            "prior.r1.weight=2",
            "eval.flip=none",
            "recognizer.head={ kind = \"cosface\", scale = 32.0, margin = 0.2 }",
            "data.prior={source=\"folders\", paths=\"a dir/b\"}",
            "about=it's \"quoted\" = so",
        ]);
        // `prior.r1.weight=2` is an integer where a float is wanted: TOML's own distinction, forgiven.
        let recipe = recipe.unwrap();
        assert_eq!(recipe.prior.budget.images, 123);
        assert_eq!(recipe.prior.r1.weight, 2.0);
        assert_eq!(recipe.eval.flip, Flip::None);
        assert_eq!(
            recipe.recognizer.head,
            Head::Cosface {
                scale: 32.0,
                margin: 0.2
            }
        );
        assert_eq!(
            recipe.data.prior,
            PriorData::Folders {
                paths: vec!["a dir/b".into()]
            }
        );
        assert_eq!(recipe.about, "it's \"quoted\" = so");
        assert_ne!(recipe.hash(), demo(&[]).unwrap().hash());
    }

    #[test]
    fn an_unknown_key_names_file_key_and_neighbour() {
        let error = demo(&["prior.budget.imagse=1"]).unwrap_err().to_string();
        assert_eq!(
            error,
            "built-in recipe \"demo\": unknown key \"prior.budget.imagse\"\n\
             hint: did you mean \"prior.budget.images\"?"
        );
        let error = demo(&["qqqqqq=1"]).unwrap_err().to_string();
        assert!(
            error.contains("unknown key \"qqqqqq\"") && error.contains("backbone, prior, encoder"),
            "{error}"
        );
        let error = demo(&["recognizer.head.margni=1"]).unwrap_err().to_string();
        assert!(
            error.contains("\"recognizer.head.margni\"") && error.contains("head.margin\"?"),
            "{error}"
        );
    }

    #[test]
    fn values_out_of_range_name_their_key() {
        for (change, expected) in [
            (
                "backbone.image_size=100",
                "backbone.image_size is 100, expected a multiple of 16",
            ),
            (
                "backbone.depth=20",
                "backbone.depth is 20, expected 18, 34, 50, 100 or 152",
            ),
            (
                "prior.resolution=48",
                "prior.resolution is 48, expected 32, 64, 128 or 256",
            ),
            (
                "recognizer.budget.batch_size=0",
                "recognizer.budget.batch_size is 0, expected at least 1",
            ),
            (
                "recognizer.learning_rate=-1.0",
                "recognizer.learning_rate is -1, expected a number of at least 0",
            ),
            ("recognizer.learning_rate=nan", "recognizer.learning_rate is NaN"),
            ("schema=2", "schema is 2, expected 1"),
            (
                "seed.x=2",
                "cannot apply \"seed.x=2\": seed is a value, expected a table",
            ),
            ("seed", "expected key=value"),
            ("eval.flip=both", "eval.flip: unknown variant `both`"),
        ] {
            let error = demo(&[change]).unwrap_err().to_string();
            assert!(error.contains(expected), "{change}: {error}");
        }
    }

    #[test]
    fn a_missing_recipe_suggests_a_name() {
        let error = Recipe::load("smal", &[]).unwrap_err().to_string();
        assert!(
            error.contains("cannot read the recipe")
                && error.contains("did you mean")
                && error.contains("small")
        );
        let error = Recipe::load("nowhere/x.toml", &[]).unwrap_err().to_string();
        assert!(error.contains("demo, small, paper"), "{error}");
    }

    #[test]
    fn a_stage_feels_only_its_own_changes() {
        let (old, new) = (
            demo(&[]).unwrap(),
            demo(&["scratch.learning_rate=0.5", "data.workers=9"]).unwrap(),
        );
        assert_eq!(old.differences(&new).len(), 2);
        assert!(old.differences_for(&new, StageName::Recognizer).is_empty());
        let felt = old.differences_for(&new, StageName::Scratch);
        assert_eq!(felt.len(), 1);
        assert_eq!(
            (felt[0].0.as_str(), felt[0].2.as_str()),
            ("scratch.learning_rate", "0.5")
        );
        let held_out = demo(&["data.validation_pairs=7"]).unwrap();
        assert_eq!(old.differences_for(&held_out, StageName::Recognizer).len(), 1);
        assert!(old.differences_for(&held_out, StageName::Prior).is_empty());
        let rounded = demo(&["activations.precision=bf16"]).unwrap();
        for stage in [
            StageName::Prior,
            StageName::Encoder,
            StageName::Recognizer,
            StageName::Scratch,
        ] {
            assert_eq!(old.differences_for(&rounded, stage).len(), 1);
        }
        assert!(demo(&["activations.precision=f16"]).is_err());
    }

    #[test]
    fn the_twin_differs_only_where_it_says() {
        let recipe = demo(&["scratch.learning_rate=0.07"]).unwrap();
        let twin = recipe.scratch_recognizer();
        assert_eq!(twin.learning_rate, 0.07);
        assert_eq!(twin.budget, recipe.recognizer.budget);
        assert_eq!(twin.head, recipe.recognizer.head);
    }
}
