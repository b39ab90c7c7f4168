/// What can be wrong with the inputs of an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The number of values is no multiple of the row length.
    #[error(
        "embeddings have {values} values, expected a multiple of the dimension {dim} (which must not be 0)"
    )]
    RaggedRows {
        /// Number of values given.
        values: usize,
        /// Length of a row.
        dim: usize,
    },
    /// A NaN or an infinity among the embeddings.
    #[error(
        "embedding {row} has the value {value}, expected finite numbers\n\
         hint: the network that made it has diverged, or its weights are damaged"
    )]
    NotFinite {
        /// Row of the value.
        row: usize,
        /// The value.
        value: f32,
    },
    /// Two sets of rows that must agree in shape do not.
    #[error("{what} are [{got_rows}, {got_dim}], expected [{expected_rows}, {expected_dim}]")]
    ShapeMismatch {
        /// Which rows.
        what: &'static str,
        /// Rows given.
        got_rows: usize,
        /// Row length given.
        got_dim: usize,
        /// Rows expected.
        expected_rows: usize,
        /// Row length expected.
        expected_dim: usize,
    },
    /// A pair names a row that does not exist.
    #[error("pair {pair} names embedding {row}, but there are {rows}")]
    UnknownRow {
        /// Index of the pair.
        pair: usize,
        /// The row it names.
        row: usize,
        /// Number of embeddings.
        rows: usize,
    },
    /// Verification needs pairs of both kinds.
    #[error(
        "the list has {genuine} genuine and {impostor} impostor pairs, expected at least one of each\n\
         hint: a pairs file has lines of one person (name, two numbers) and of two (name, number, name, number)"
    )]
    OneKindOfPair {
        /// Pairs of one person.
        genuine: usize,
        /// Pairs of two people.
        impostor: usize,
    },
    /// Cross-validation needs at least one pair in each fold and two folds.
    #[error("{pairs} pairs cannot be cut into {folds} folds\nhint: use between 2 folds and one per pair")]
    BadFolds {
        /// Number of pairs.
        pairs: usize,
        /// Folds asked for.
        folds: usize,
    },
    /// More components than the data can have.
    #[error("{components} principal components asked for, but {rows} rows of {dim} values allow 1 to {most}")]
    BadComponents {
        /// Components asked for.
        components: usize,
        /// Rows to fit on.
        rows: usize,
        /// Values per row.
        dim: usize,
        /// Largest number possible.
        most: usize,
    },
    /// A statistic of a sample needs more rows.
    #[error("{what} needs at least {least} rows, got {rows}")]
    TooFewRows {
        /// The statistic.
        what: &'static str,
        /// Fewest rows that define it.
        least: usize,
        /// Rows given.
        rows: usize,
    },
    /// A paired comparison of results that were not made on the same pairs with the same draws.
    #[error(
        "cannot compare two results: their {what} differ\n\
         hint: score both models on the same list with the same protocol"
    )]
    NotPaired {
        /// What differs.
        what: &'static str,
    },
    /// A setting outside its range.
    #[error("{name} is {value}, expected {expected}")]
    BadSetting {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The range in words.
        expected: &'static str,
    },
    /// Bytes given as a picture for the report are not a PNG file.
    #[error("picture \"{caption}\" of the report is not a PNG file")]
    NotPng {
        /// Caption of the picture.
        caption: String,
    },
    /// The page could not be rendered.
    #[error("cannot render the report: {0}")]
    Render(#[from] askama::Error),
}
