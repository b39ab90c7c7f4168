//! One self-contained HTML page: what was done, what came out, how sure that is.
//!
//! A [`Report`] is composed of few kinds of [`Block`] and rendered in one go. The page needs nothing beside it: no
//! scripts, no fonts, no network (its own content policy forbids them), pictures inside as data URIs. It reads on
//! paper, on a phone, and in the dark. Every text is escaped; markup comes only from [`Svg`], which this crate makes
//! itself.

use askama::Template;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::EvalError;
use crate::bootstrap::{Difference, Estimate, Interval};
use crate::plot::Svg;
use crate::verification::{Scored, compare};

/// A page.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Its heading, and the name of the browser's tab.
    pub title: String,
    /// A line above the heading: which program, which run, when.
    pub kicker: String,
    /// What was learnt, in one sentence each; the first is set largest.
    pub summary: Vec<String>,
    /// The few numbers to remember.
    pub figures: Vec<KeyFigure>,
    /// The body.
    pub sections: Vec<Section>,
}

/// A number to remember.
#[derive(Clone, Debug, Default)]
pub struct KeyFigure {
    /// The number, with its unit.
    pub value: String,
    /// What it is.
    pub label: String,
    /// Its interval, or what to compare it with; may be empty.
    pub detail: String,
}

impl KeyFigure {
    /// A share as a percentage, its interval below.
    pub fn estimate(label: impl Into<String>, estimate: &Estimate) -> Self {
        let percent = |x: f64| format!("{:.1}", 100.0 * x);
        let detail = estimate
            .interval
            .map(|Interval { low, high }| format!("interval {} to {}", percent(low), percent(high)));
        Self {
            value: format!("{}%", percent(estimate.value)),
            label: label.into(),
            detail: detail.unwrap_or_default(),
        }
    }
}

/// A part of the page under its own heading.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Heading, also in the table of contents.
    pub title: String,
    /// What it holds, in order.
    pub blocks: Vec<Block>,
}

/// What a section is made of.
#[derive(Clone, Debug)]
pub enum Block {
    /// A paragraph.
    Text(String),
    /// A paragraph set apart: a limit, a caution.
    Note(String),
    /// A table.
    Table(Table),
    /// A chart with a caption (may be empty). Its description for those who cannot see it is in the chart.
    Chart {
        /// The chart.
        svg: Svg,
        /// Text below it.
        caption: String,
    },
    /// Pictures side by side, as many as fit.
    Pictures(Vec<Picture>),
    /// Names and values: provenance, settings.
    Facts(Vec<(String, String)>),
    /// Text set as it is: a recipe, a command.
    Code {
        /// Line above it, such as the file's name; may be empty.
        caption: String,
        /// The text.
        text: String,
    },
}

/// A table whose first column names its rows.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Line above it.
    pub caption: String,
    /// The columns, the first that of the rows' names.
    pub columns: Vec<Column>,
    /// The rows.
    pub rows: Vec<Row>,
    /// Small print below it; may be empty.
    pub note: String,
}

/// A column of a table.
#[derive(Clone, Debug, Default)]
pub struct Column {
    /// Its heading; may be empty.
    pub title: String,
    /// Whether it holds words, set from the left, rather than numbers, set from the right.
    pub words: bool,
}

impl Column {
    /// A column of words.
    pub fn words(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            words: true,
        }
    }

    /// A column of numbers.
    pub fn numbers(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            words: false,
        }
    }
}

/// A row of a table.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// As many as there are columns.
    pub cells: Vec<Cell>,
    /// Whether a rule sets it apart from those above: a difference, a total.
    pub apart: bool,
}

/// A cell of a table.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    /// The value.
    pub text: String,
    /// A smaller second line, such as an interval; may be empty.
    pub detail: String,
    /// Whether it stands out.
    pub strong: bool,
}

impl Table {
    fn is_words(&self, column: usize) -> bool {
        self.columns.get(column).is_some_and(|column| column.words)
    }
}

impl Cell {
    /// A cell of one line.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }

    /// The same with a second line.
    pub fn detail(self, detail: impl Into<String>) -> Self {
        Self {
            detail: detail.into(),
            ..self
        }
    }

    /// A share as a percentage, its interval below.
    pub fn estimate(estimate: &Estimate) -> Self {
        let percent = |x: f64| format!("{:.2}", 100.0 * x);
        let detail = estimate
            .interval
            .map(|Interval { low, high }| format!("{} – {}", percent(low), percent(high)));
        Self::new(format!("{}%", percent(estimate.value))).detail(detail.unwrap_or_default())
    }

    /// A difference of shares in percentage points, its interval below; strong when the interval excludes 0.
    pub fn difference(difference: &Difference) -> Self {
        let points = |x: f64| format!("{:+.2}", 100.0 * x).replace('-', "−");
        let detail = difference
            .interval
            .map(|Interval { low, high }| format!("{} to {}", points(low), points(high)));
        let cell = Self::new(points(difference.value)).detail(detail.unwrap_or_default());
        Self {
            strong: difference.is_clear(),
            ..cell
        }
    }
}

/// A PNG picture with its caption.
#[derive(Clone, Debug)]
pub struct Picture {
    png: Vec<u8>,
    width: u32,
    height: u32,
    caption: String,
    alt: String,
}

impl Picture {
    /// A picture from the bytes of a PNG file; `alt` says what it shows to those who cannot see it, `caption`
    /// stands below it (may be empty).
    ///
    /// # Errors
    /// When the bytes are not those of a PNG file.
    pub fn new(png: Vec<u8>, caption: impl Into<String>, alt: impl Into<String>) -> Result<Self, EvalError> {
        let (caption, alt) = (caption.into(), alt.into());
        let size = |at: usize| {
            let bytes = png
                .get(at..at + 4)
                .and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
            bytes.map(u32::from_be_bytes).filter(|&size| size > 0)
        };
        let is_png = png.starts_with(b"\x89PNG\r\n\x1a\n") && png.get(12..16) == Some(b"IHDR");
        match (is_png, size(16), size(20)) {
            (true, Some(width), Some(height)) => Ok(Self {
                png,
                width,
                height,
                caption,
                alt,
            }),
            _ => Err(EvalError::NotPng { caption }),
        }
    }

    fn data_uri(&self) -> String {
        format!("data:image/png;base64,{}", STANDARD.encode(&self.png))
    }

    /// Small pictures are shown larger, by whole numbers so that pixels stay square.
    fn zoom(&self) -> u32 {
        (320 / self.width).clamp(1, 8)
    }
}

impl Report {
    /// The page.
    ///
    /// # Errors
    /// When rendering fails, which a report's content cannot cause.
    pub fn html(&self) -> Result<String, EvalError> {
        Ok(Page { report: self }.render()?)
    }
}

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    report: &'a Report,
}

/// The table that compares models scored on the same pairs: a row for each, then the paired difference of the first
/// to each other, bold where its interval excludes 0.
///
/// # Errors
/// When the models were not scored on the same pairs with the same protocol.
pub fn comparison_table(models: &[(&str, &Scored)]) -> Result<Table, EvalError> {
    let fars: Vec<f64> = match models.first() {
        Some((_, scored)) => scored
            .result()
            .tar_at_far
            .iter()
            .map(|t| t.far)
            .filter(|&far| (1e-3..=1e-2).contains(&far))
            .collect(),
        None => return Ok(Table::default()),
    };
    let titles = ["Accuracy", "With exact thresholds", "AUC", "EER"].map(str::to_owned);
    let at_far = fars.iter().map(|far| format!("TAR at FAR {}%", far * 100.0));
    let numbers = titles.into_iter().chain(at_far).map(Column::numbers);
    let columns: Vec<Column> = [Column::words("")].into_iter().chain(numbers).collect();
    let mut rows = Vec::new();
    for (name, scored) in models {
        let result = scored.result();
        let mut cells = vec![
            Cell::new(*name),
            Cell::estimate(&result.accuracy),
            Cell::estimate(&result.exact_accuracy),
            Cell::estimate(&result.auc),
            Cell::estimate(&result.eer),
        ];
        let tar = |far: &f64| result.tar_at_far.iter().find(|t| t.far == *far);
        cells.extend(
            fars.iter()
                .map(|far| tar(far).map_or(Cell::new("–"), |t| Cell::estimate(&t.tar))),
        );
        rows.push(Row { cells, apart: false });
    }
    let Some(((first_name, first), others)) = models.split_first() else {
        return Ok(Table::default());
    };
    for (index, (name, scored)) in others.iter().enumerate() {
        let comparison = compare(first, scored)?;
        let mut cells = vec![
            Cell::new(format!("{first_name} −\u{a0}{name}")).detail("paired, in points"),
            Cell::difference(&comparison.accuracy),
            Cell::difference(&comparison.exact_accuracy),
            Cell::difference(&comparison.auc),
        ];
        cells.resize(columns.len(), Cell::default());
        rows.push(Row {
            cells,
            apart: index == 0,
        });
    }
    let result = first.result();
    let bootstrap = result.protocol.bootstrap;
    let note = format!(
        "{} pairs ({} genuine, {} impostor) in {} folds. Small figures: {}% intervals, {} draws of people (seed {}); \
         differences on the same draws, bold where the interval excludes 0.",
        result.pairs,
        result.genuine,
        result.impostor,
        result.protocol.folds,
        (bootstrap.level * 1000.0).round() / 10.0,
        bootstrap.draws,
        bootstrap.seed,
    );
    Ok(Table {
        caption: "Are two pictures of one person?".into(),
        columns,
        rows,
        note,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::Bootstrap;
    use crate::plot::{Axis, LineChart, Series};
    use crate::verification::{Pair, Protocol, verify};
    use crate::{Embeddings, linalg};

    /// A PNG file of 1 × 1 pixels.
    fn png() -> Vec<u8> {
        let text = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";
        STANDARD.decode(text).unwrap()
    }

    fn every_block(text: &str) -> Vec<Block> {
        let text = text.to_owned();
        let cells = vec![Cell::new(text.clone()).detail(text.clone()); 2];
        vec![
            Block::Text(text.clone()),
            Block::Note(text.clone()),
            Block::Table(Table {
                caption: text.clone(),
                columns: vec![Column::words(text.clone()), Column::numbers(text.clone())],
                rows: vec![Row { cells, apart: true }],
                note: text.clone(),
            }),
            Block::Chart {
                svg: LineChart {
                    title: text.clone(),
                    x: Axis::linear(text.clone()),
                    series: vec![Series::new(text.clone(), vec![[0.0, 1.0], [1.0, 0.0]])],
                    ..LineChart::default()
                }
                .svg(),
                caption: text.clone(),
            },
            Block::Pictures(vec![Picture::new(png(), text.clone(), text.clone()).unwrap()]),
            Block::Facts(vec![(text.clone(), text.clone())]),
            Block::Code {
                caption: text.clone(),
                text: text.clone(),
            },
        ]
    }

    #[test]
    fn every_text_is_escaped_wherever_it_stands() {
        let hostile = "<script>\"'&</script>";
        let figure = KeyFigure {
            value: hostile.into(),
            label: hostile.into(),
            detail: hostile.into(),
        };
        let report = Report {
            title: hostile.into(),
            kicker: hostile.into(),
            summary: vec![hostile.into(); 2],
            figures: vec![figure],
            sections: vec![Section {
                title: hostile.into(),
                blocks: every_block(hostile),
            }],
        };
        let html = report.html().unwrap();
        assert!(!html.contains("<script") && !html.contains("</script"));
        // Title twice, kicker, summary, figure, section (contents and heading), and each block's texts.
        let texts = html.matches("script&gt;").count() + html.matches("script&#62;").count();
        assert!(texts >= 2 * 25, "only {texts}");
    }

    #[test]
    fn the_page_is_whole_and_refers_to_nothing_outside() {
        let section = |title: &str| Section {
            title: title.into(),
            blocks: every_block("plain"),
        };
        let report = Report {
            sections: vec![section("one"), section("two")],
            ..Report::default()
        };
        let html = report.html().unwrap();
        for outside in ["http://", "https://", "src=\"/", "url(", "@import", "<link"] {
            let allowed = html.matches("http://www.w3.org/2000/svg").count();
            let found = html.matches(outside).count() - if outside == "http://" { allowed } else { 0 };
            assert_eq!(found, 0, "{outside}");
        }
        for tag in [
            "html", "body", "main", "section", "table", "figure", "svg", "style", "dl", "pre", "nav", "p",
        ] {
            let opened =
                html.matches(&format!("<{tag} ")).count() + html.matches(&format!("<{tag}>")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(html.contains("data:image/png;base64,iVBORw0KGgo"));
        assert!(
            html.contains("width=\"8\" height=\"8\" alt=\"plain\""),
            "a small picture is enlarged"
        );
        assert!(html.contains("scope=\"row\"") && html.contains("scope=\"col\""));
    }

    #[test]
    fn only_png_files_are_pictures() {
        let error = Picture::new(b"\xff\xd8\xff\xe0 a JPEG".to_vec(), "faces", "").unwrap_err();
        assert_eq!(
            error.to_string(),
            "picture \"faces\" of the report is not a PNG file"
        );
        assert!(Picture::new(png()[..20].to_vec(), "cut", "").is_err());
    }

    #[test]
    fn the_comparison_table_has_a_row_per_model_and_per_difference() {
        let embeddings = |seed| {
            let rows = linalg::tests::random(80, 5, seed);
            Embeddings::new(5, rows.data.iter().map(|&x| x as f32).collect())
                .unwrap()
                .normalized()
        };
        let pairs: Vec<Pair> = (0..40)
            .map(|k| {
                let person = k as u32;
                let people = [person, if k % 2 == 0 { person } else { (person + 1) % 40 }];
                Pair {
                    left: 2 * k,
                    right: 2 * k + 1,
                    same: k % 2 == 0,
                    people,
                }
            })
            .collect();
        let protocol = Protocol {
            bootstrap: Bootstrap {
                draws: 50,
                ..Bootstrap::default()
            },
            ..Protocol::default()
        };
        let scored: Vec<Scored> = (1..4)
            .map(|seed| verify(&embeddings(seed), &pairs, &protocol).unwrap())
            .collect();
        let models = [
            ("pretrained", &scored[0]),
            ("from scratch", &scored[1]),
            ("pixels", &scored[2]),
        ];
        let table = comparison_table(&models).unwrap();
        assert_eq!(table.rows.len(), 5);
        assert!(
            table
                .rows
                .iter()
                .all(|row| row.cells.len() == table.columns.len())
        );
        assert_eq!(table.rows[3].cells[0].text, "pretrained −\u{a0}from scratch");
        assert!(table.rows[3].apart && !table.rows[4].apart);
        assert!(comparison_table(&[]).unwrap().rows.is_empty());
    }
}
