//! Charts as self-contained SVG.
//!
//! No scripts, no fonts, no files beside it: a chart can be written to disk, or stand in a page. Colours are
//! Okabe and Ito's (safe for colour-blind readers) with a second set for dark pages, chosen by the reader's own
//! setting; each series also has its own dash pattern, so that nothing rests on colour alone, in print either.
//! Every text that comes from outside is escaped.

use std::fmt::{self, Write as _};

use crate::bootstrap::Interval;
use crate::roc::Roc;
use crate::verification::Scored;

/// A finished chart: an `<svg>` element, made only by this module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Svg(String);

impl Svg {
    /// The element's source; also a whole `.svg` file.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Svg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How values lie along an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences, equal lengths.
    #[default]
    Linear,
    /// Equal ratios, equal lengths. Values at or below 0 lie on the lower end.
    Log,
}

/// One axis of a chart.
#[derive(Clone, Debug, Default)]
pub struct Axis {
    /// What it shows, with the unit.
    pub label: String,
    /// Linear or logarithmic.
    pub scale: Scale,
    /// Ends; from the data when none.
    pub range: Option<[f64; 2]>,
    /// Whether values are shares, to be written as percentages.
    pub percent: bool,
}

impl Axis {
    /// A linear axis whose range follows the data.
    pub fn linear(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            ..Self::default()
        }
    }

    /// A logarithmic axis whose range follows the data.
    pub fn log(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            scale: Scale::Log,
            ..Self::default()
        }
    }

    /// The same with these ends.
    pub fn range(self, low: f64, high: f64) -> Self {
        Self {
            range: Some([low, high]),
            ..self
        }
    }

    /// The same with values written as percentages.
    pub fn percent(self) -> Self {
        Self {
            percent: true,
            ..self
        }
    }
}

/// One line of a chart.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// (x, y) in the order they are joined; a value that is not finite leaves a gap.
    pub points: Vec<[f64; 2]>,
    /// (x, low, high) of a shaded band around the line; may be empty.
    pub band: Vec<[f64; 3]>,
    /// Whether it is a reference such as chance level, to be drawn thin and grey.
    pub reference: bool,
}

impl Series {
    /// A line without a band.
    pub fn new(name: impl Into<String>, points: Vec<[f64; 2]>) -> Self {
        Self {
            name: name.into(),
            points,
            ..Self::default()
        }
    }

    /// The same as a thin grey reference.
    pub fn reference(self) -> Self {
        Self {
            reference: true,
            ..self
        }
    }
}

/// Lines over two axes: learning curves, ROC, DET.
#[derive(Clone, Debug, Default)]
pub struct LineChart {
    /// Title above the chart; may be empty.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Lines, in the order of the legend.
    pub series: Vec<Series>,
}

/// A vertical line across a histogram.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Where.
    pub at: f64,
    /// Text beside it.
    pub label: String,
}

/// Overlaid histograms of several samples, each as shares of its own size.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// Title above the chart; may be empty.
    pub title: String,
    /// Axis of the values.
    pub x: Axis,
    /// What is counted, for the other axis: "pairs", "pictures".
    pub counted: String,
    /// Names and values.
    pub samples: Vec<(String, Vec<f64>)>,
    /// Number of bins; 60 when 0.
    pub bins: usize,
    /// Vertical lines, such as a threshold.
    pub marks: Vec<Mark>,
}

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Name at its left.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// Whiskers.
    pub interval: Option<Interval>,
}

/// Horizontal bars with intervals: models side by side.
#[derive(Clone, Debug, Default)]
pub struct BarChart {
    /// Title above the chart; may be empty.
    pub title: String,
    /// Axis of the values.
    pub x: Axis,
    /// Bars from top to bottom.
    pub bars: Vec<Bar>,
    /// Where bars start, such as chance level, and its name.
    pub start: Option<(f64, String)>,
}

/// Exact ROC curves, FAR on a logarithmic axis down to what the impostor pairs can resolve.
pub fn roc_chart(title: &str, curves: &[(&str, &Roc)]) -> Svg {
    let (points, low) = curve_points(curves);
    let mut series: Vec<Series> = points
        .into_iter()
        .map(|(name, points)| Series::new(name, points.iter().map(|p| [p.far, p.tar]).collect()))
        .collect();
    series.push(Series::new("chance", log_spaced(low).map(|far| [far, far]).collect()).reference());
    LineChart {
        title: title.into(),
        x: Axis::log("impostor pairs accepted (FAR)")
            .range(low, 1.0)
            .percent(),
        y: Axis::linear("genuine pairs accepted (TAR)")
            .range(0.0, 1.0)
            .percent(),
        series,
    }
    .svg()
}

/// Detection error trade-off: FRR = 1 − TAR against FAR, both logarithmic.
pub fn det_chart(title: &str, curves: &[(&str, &Roc)]) -> Svg {
    let (points, low) = curve_points(curves);
    let series = points
        .into_iter()
        .map(|(name, points)| Series::new(name, points.iter().map(|p| [p.far, 1.0 - p.tar]).collect()))
        .collect();
    LineChart {
        title: title.into(),
        x: Axis::log("impostor pairs accepted (FAR)")
            .range(low, 1.0)
            .percent(),
        y: Axis::log("genuine pairs rejected (FRR)")
            .range(low, 1.0)
            .percent(),
        series,
    }
    .svg()
}

/// Cosine similarities of genuine and impostor pairs, with the mean best threshold.
pub fn score_histogram(title: &str, scored: &Scored) -> Svg {
    let (genuine, impostor) = scored.cosines();
    let threshold = 1.0 - scored.result().threshold / 2.0;
    Histogram {
        title: title.into(),
        x: Axis::linear("cosine similarity"),
        counted: "pairs".into(),
        samples: vec![("one person".into(), genuine), ("two people".into(), impostor)],
        bins: 60,
        marks: vec![Mark {
            at: threshold,
            label: format!("threshold {threshold:.2}"),
        }],
    }
    .svg()
}

type NamedPoints<'a> = Vec<(&'a str, Vec<crate::roc::RocPoint>)>;

/// The corners of each curve, and the decade of the smallest FAR above 0.
fn curve_points<'a>(curves: &[(&'a str, &Roc)]) -> (NamedPoints<'a>, f64) {
    let points: NamedPoints<'_> = curves.iter().map(|(name, roc)| (*name, roc.points())).collect();
    let fars = points
        .iter()
        .flat_map(|(_, points)| points.iter().map(|p| p.far))
        .filter(|&far| far > 0.0);
    let smallest = fars.fold(0.1, f64::min);
    (points, 10f64.powf(smallest.log10().floor()).max(1e-7))
}

fn log_spaced(low: f64) -> impl Iterator<Item = f64> {
    (0..=60).map(move |step| low.powf(1.0 - f64::from(step) / 60.0))
}

impl LineChart {
    /// Draws the chart.
    pub fn svg(&self) -> Svg {
        let points = || self.series.iter().flat_map(|s| &s.points);
        let bands = || self.series.iter().flat_map(|s| &s.band);
        let x_values = points().map(|p| p[0]).chain(bands().map(|b| b[0]));
        let y_values = points().map(|p| p[1]).chain(bands().flat_map(|b| [b[1], b[2]]));
        let (x, y) = (
            Span::new(&self.x, x_values, false),
            Span::new(&self.y, y_values, true),
        );
        let entries: Vec<Entry<'_>> = entries(self.series.iter().map(|s| (s.name.as_str(), s.reference)));
        let mut canvas = Canvas::new(&self.title, &self.y.label, &entries, HEIGHT);
        let frame = canvas.frame(x, y, &self.x, &self.y);
        canvas.open_clip(&frame);
        for (series, entry) in self.series.iter().zip(&entries) {
            if series.band.is_empty() {
                continue;
            }
            let edge = |which: usize, reversed: bool| {
                let mut points: Vec<[f64; 2]> = series
                    .band
                    .iter()
                    .filter(|b| b.iter().all(|v| v.is_finite()))
                    .map(|b| [b[0], b[which]])
                    .collect();
                if reversed {
                    points.reverse();
                }
                points
            };
            let outline: Vec<[f64; 2]> = edge(1, false).into_iter().chain(edge(2, true)).collect();
            let path = path(outline.iter().map(|p| frame.at(*p)));
            canvas.push(format_args!(
                "<path class=\"fp-band {}\" d=\"{path}Z\"/>",
                entry.class
            ));
        }
        // The first series last, so that it lies on top of those it is compared with.
        for (series, entry) in self.series.iter().zip(&entries).rev() {
            let kind = if series.reference {
                "fp-line fp-thin"
            } else {
                "fp-line"
            };
            let finite = |p: &[f64; 2]| p[0].is_finite() && p[1].is_finite();
            for run in series.points.split(|p| !finite(p)).filter(|run| !run.is_empty()) {
                let on_page: Vec<[f64; 2]> = run.iter().map(|p| frame.at(*p)).collect();
                let path = path(thinned(&on_page).into_iter());
                canvas.push(format_args!(
                    "<path class=\"{kind} {}\" d=\"{path}\"/>",
                    entry.class
                ));
            }
            let known: Vec<&[f64; 2]> = series.points.iter().filter(|p| finite(p)).collect();
            if !series.reference && known.len() <= 16 {
                for [x, y] in known.into_iter().map(|p| frame.at(*p)) {
                    let class = entry.class;
                    canvas.push(format_args!(
                        "<circle class=\"fp-dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\"/>"
                    ));
                }
            }
        }
        canvas.close_clip();
        if !points().any(|p| p[0].is_finite() && p[1].is_finite()) {
            canvas.no_data(&frame);
        }
        let names: Vec<&str> = self
            .series
            .iter()
            .filter(|s| !s.reference)
            .map(|s| s.name.as_str())
            .collect();
        canvas.finish(&format!(
            "line chart of {} against {}: {}",
            self.y.label,
            self.x.label,
            names.join(", ")
        ))
    }
}

impl Histogram {
    /// Draws the chart.
    pub fn svg(&self) -> Svg {
        let values = || {
            self.samples
                .iter()
                .flat_map(|s| &s.1)
                .copied()
                .filter(|v| v.is_finite())
        };
        let x = Span::new(&self.x, values().chain(self.marks.iter().map(|m| m.at)), true);
        let bins = if self.bins == 0 { 60 } else { self.bins };
        let width = (x.high - x.low) / bins as f64;
        let shares: Vec<Vec<f64>> = self
            .samples
            .iter()
            .map(|(_, values)| {
                let mut counts = vec![0.0; bins];
                let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
                for value in &finite {
                    counts[(((value - x.low) / width) as usize).min(bins - 1)] += 1.0 / finite.len() as f64;
                }
                counts
            })
            .collect();
        let y_axis = Axis::linear(format!("share of {} per bin", self.counted)).percent();
        let y = Span::new(&y_axis, shares.iter().flatten().copied().chain([0.0]), true);
        let entries = entries(self.samples.iter().map(|s| (s.0.as_str(), false)));
        let mut canvas = Canvas::new(&self.title, &y_axis.label, &entries, HEIGHT);
        if !self.marks.is_empty() {
            canvas.top += MARK_ROOM;
            canvas.height += MARK_ROOM;
        }
        let frame = canvas.frame(x, y, &self.x, &y_axis);
        canvas.open_clip(&frame);
        let outlines: Vec<String> = shares
            .iter()
            .map(|counts| {
                let mut steps = vec![frame.at([x.low, 0.0])];
                for (bin, &share) in counts.iter().enumerate() {
                    let left = x.low + bin as f64 * width;
                    steps.extend([frame.at([left, share]), frame.at([left + width, share])]);
                }
                steps.push(frame.at([x.high, 0.0]));
                path(steps.into_iter())
            })
            .collect();
        for (outline, entry) in outlines.iter().zip(&entries) {
            canvas.push(format_args!(
                "<path class=\"fp-area {}\" d=\"{outline}Z\"/>",
                entry.class
            ));
        }
        for (outline, entry) in outlines.iter().zip(&entries) {
            canvas.push(format_args!(
                "<path class=\"fp-line fp-step {}\" d=\"{outline}\"/>",
                entry.class
            ));
        }
        canvas.close_clip();
        for mark in self.marks.iter().filter(|mark| mark.at.is_finite()) {
            canvas.mark(&frame, mark.at, &mark.label);
        }
        if values().next().is_none() {
            canvas.no_data(&frame);
        }
        let sizes: Vec<String> = self
            .samples
            .iter()
            .map(|(name, values)| format!("{name} ({} {})", values.len(), self.counted))
            .collect();
        canvas.finish(&format!("histograms of {}: {}", self.x.label, sizes.join(", ")))
    }
}

impl BarChart {
    /// Draws the chart.
    pub fn svg(&self) -> Svg {
        const ROW: f64 = 40.0;
        let ends = |bar: &Bar| match bar.interval {
            Some(interval) => [bar.value, interval.low, interval.high],
            None => [bar.value; 3],
        };
        let start = self.start.as_ref().map(|(at, _)| *at);
        let x = Span::new(&self.x, self.bars.iter().flat_map(ends).chain(start), true);
        let origin = start.unwrap_or(x.low);
        let rows = self.bars.len().max(1) as f64;
        let mut canvas = Canvas::new(&self.title, "", &[], 0.0);
        let names = self
            .bars
            .iter()
            .map(|bar| text_width(&bar.name, 13.0))
            .fold(40.0, f64::max)
            .min(260.0);
        let top = canvas.top + if self.start.is_some() { 22.0 } else { 0.0 };
        let frame = Frame {
            x,
            y: Span {
                scale: Scale::Linear,
                low: rows,
                high: 0.0,
            },
            left: names + 24.0,
            top,
            width: WIDTH - names - 24.0 - 74.0,
            height: rows * ROW,
        };
        canvas.x_axis(&frame, &self.x);
        for (index, bar) in self.bars.iter().enumerate() {
            let middle = top + (index as f64 + 0.5) * ROW;
            canvas.text(frame.left - 12.0, middle + 4.5, "end", "fp-ink", &bar.name);
            if !bar.value.is_finite() {
                canvas.text(frame.left + 8.0, middle + 4.5, "start", "fp-soft", "not measured");
                continue;
            }
            let (from, to) = (frame.x_at(origin), frame.x_at(bar.value));
            let (left, width) = (from.min(to), (from - to).abs());
            canvas.push(format_args!(
                "<rect class=\"fp-bar fp-c0\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"18\" rx=\"2\"/>",
                middle - 9.0
            ));
            let mut end = to;
            if let Some(Interval { low, high }) = bar.interval {
                let (low, high) = (frame.x_at(low), frame.x_at(high));
                end = end.max(high);
                canvas.push(format_args!(
                    "<path class=\"fp-whisker\" d=\"M{low:.1} {a:.1}V{b:.1}M{low:.1} {middle:.1}H{high:.1}M{high:.1} {a:.1}V{b:.1}\"/>",
                    a = middle - 5.0,
                    b = middle + 5.0
                ));
            }
            let label = value_label(bar.value, &self.x, x.high - x.low);
            canvas.text(end + 8.0, middle + 4.5, "start", "fp-ink fp-strong", &label);
        }
        if let Some((at, label)) = &self.start {
            canvas.mark(&frame, *at, label);
        }
        canvas.top = frame.top + frame.height + AXIS_ROOM;
        let rows: Vec<String> = self
            .bars
            .iter()
            .map(|bar| format!("{} {}", bar.name, value_label(bar.value, &self.x, x.high - x.low)))
            .collect();
        canvas.height = canvas.top;
        canvas.finish(&format!("bars of {}: {}", self.x.label, rows.join(", ")))
    }
}

const WIDTH: f64 = 840.0;
/// Height of the area between the axes.
const HEIGHT: f64 = 320.0;
/// Room below it for tick labels and the axis label.
const AXIS_ROOM: f64 = 46.0;
/// Room above it for the labels of vertical lines.
const MARK_ROOM: f64 = 14.0;
const COLORS: usize = 6;

const STYLE: &str = "<style>\
.fp-plot{--fp-ink:#1c2530;--fp-soft:#566270;--fp-rule:#aab4be;--fp-grid:#e6eaee;--fp-paper:#fff;\
--fp0:#0072b2;--fp1:#d55e00;--fp2:#009e73;--fp3:#b3568b;--fp4:#8a6d00;--fp5:#3d9bd1;\
font-family:system-ui,-apple-system,\"Segoe UI\",\"Helvetica Neue\",Arial,sans-serif;font-size:13px}\
@media screen and (prefers-color-scheme:dark){.fp-plot{--fp-ink:#e8edf2;--fp-soft:#a3afbb;--fp-rule:#5d6873;\
--fp-grid:#2a323b;--fp-paper:#14191f;--fp0:#56b4e9;--fp1:#ff9445;--fp2:#2fc69b;--fp3:#e79ac6;--fp4:#f0e442;\
--fp5:#9ad0f5}}\
.fp-plot text{stroke:none}.fp-ink{fill:var(--fp-ink)}.fp-soft{fill:var(--fp-soft)}\
.fp-plot .fp-title{fill:var(--fp-ink);font-size:15px;font-weight:600}.fp-strong{font-weight:600}\
.fp-grid{stroke:var(--fp-grid);fill:none}.fp-rule{stroke:var(--fp-rule);fill:none}\
.fp-line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}.fp-line.fp-thin{stroke-width:1.2}\
.fp-line.fp-step{stroke-width:1.5;stroke-linejoin:miter}.fp-dot{fill:var(--c);stroke:var(--fp-paper);stroke-width:1.2}\
.fp-band{fill:var(--c);opacity:.16}.fp-area{fill:var(--c);opacity:.22}.fp-bar{fill:var(--c);opacity:.75}\
.fp-whisker{stroke:var(--fp-ink);stroke-width:1.6;fill:none}\
.fp-mark{stroke:var(--fp-ink);stroke-dasharray:2 3;fill:none}\
.fp-halo{stroke:var(--fp-paper)!important;stroke-width:4px;stroke-linejoin:round;paint-order:stroke}\
.fp-c0{--c:var(--fp0)}.fp-c1{--c:var(--fp1);stroke-dasharray:7 3}.fp-c2{--c:var(--fp2);stroke-dasharray:2 3}\
.fp-c3{--c:var(--fp3);stroke-dasharray:9 3 2 3}.fp-c4{--c:var(--fp4);stroke-dasharray:12 4}\
.fp-c5{--c:var(--fp5);stroke-dasharray:4 2 1 2}.fp-cr{--c:var(--fp-soft);stroke-dasharray:3 4}\
.fp-plot .fp-dot,.fp-plot .fp-bar{stroke-dasharray:none}\
</style>";

struct Entry<'a> {
    name: &'a str,
    class: &'static str,
}

fn entries<'a>(series: impl Iterator<Item = (&'a str, bool)>) -> Vec<Entry<'a>> {
    const CLASSES: [&str; COLORS] = ["fp-c0", "fp-c1", "fp-c2", "fp-c3", "fp-c4", "fp-c5"];
    let mut next = 0;
    series
        .map(|(name, reference)| {
            if reference {
                return Entry { name, class: "fp-cr" };
            }
            next += 1;
            Entry {
                name,
                class: CLASSES[(next - 1) % COLORS],
            }
        })
        .collect()
}

/// The values that an axis covers.
#[derive(Clone, Copy, Debug)]
struct Span {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Span {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, padded: bool) -> Self {
        let scale = axis.scale;
        if let Some([low, high]) = axis.range
            && low < high
            && (scale == Scale::Linear || low > 0.0)
        {
            return Self { scale, low, high };
        }
        let usable = values.filter(|v| v.is_finite() && (scale == Scale::Linear || *v > 0.0));
        let (low, high) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
            (a.min(v), b.max(v))
        });
        if low > high {
            let low = if scale == Scale::Log { 0.1 } else { 0.0 };
            return Self {
                scale,
                low,
                high: 1.0,
            };
        }
        match scale {
            Scale::Log if high == low => Self {
                scale,
                low: low / 2.0,
                high: high * 2.0,
            },
            Scale::Log => Self {
                scale,
                low: round_ratio(low, false),
                high: round_ratio(high, true),
            },
            Scale::Linear if high == low => {
                let room = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
                Self {
                    scale,
                    low: low - room,
                    high: high + room,
                }
            }
            Scale::Linear if padded => {
                let step = nice_step(high - low);
                Self {
                    scale,
                    low: (low / step).floor() * step,
                    high: (high / step).ceil() * step,
                }
            }
            Scale::Linear => Self { scale, low, high },
        }
    }

    /// 0 at the low end, 1 at the high end.
    fn fraction(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        }
    }

    /// Where labels go.
    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let step = nice_step(self.high - self.low);
                let first = (self.low / step - 1e-9).ceil() as i64;
                let last = (self.high / step + 1e-9).floor() as i64;
                (first..=last).map(|i| i as f64 * step).collect()
            }
            Scale::Log => {
                let decades = (self.high / self.low).log10();
                let multiples: &[f64] = if decades <= 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let stride = (decades / 7.0).ceil().max(1.0) as i32;
                let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
                let decades = (first..=last).filter(|e| e.rem_euclid(stride) == 0);
                let all = decades.flat_map(|e| multiples.iter().map(move |m| m * 10f64.powi(e)));
                all.filter(|v| *v >= self.low * (1.0 - 1e-9) && *v <= self.high * (1.0 + 1e-9))
                    .collect()
            }
        }
    }
}

/// The nearest of 1, 2 and 5 times a power of ten at or below a positive value, or at or above it.
fn round_ratio(value: f64, up: bool) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|m| m * power);
    if up {
        steps
            .into_iter()
            .find(|s| *s >= value * (1.0 - 1e-9))
            .unwrap_or(value)
    } else {
        steps
            .into_iter()
            .rev()
            .find(|s| *s <= value * (1.0 + 1e-9))
            .unwrap_or(value)
    }
}

/// 1, 2 or 5 times a power of ten: the step that gives three to seven ticks.
fn nice_step(range: f64) -> f64 {
    let rough = range / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|m| m * power >= rough * 0.999)
        .unwrap_or(10.0);
    step * power
}

/// A tick's text: as few digits as tell neighbours apart.
fn tick_label(value: f64, axis: &Axis, span: &Span) -> String {
    let factor = if axis.percent { 100.0 } else { 1.0 };
    let shown = value * factor;
    let unit = if axis.percent { "%" } else { "" };
    let decimals = match span.scale {
        Scale::Linear => decimals_of(nice_step((span.high - span.low) * factor)),
        Scale::Log => decimals_of(shown.abs()),
    };
    let (shown, suffix) = match shown.abs() {
        _ if axis.percent => (shown, ""),
        x if x >= 1e6 => (shown / 1e6, "M"),
        x if x >= 1e4 => (shown / 1e3, "k"),
        _ => (shown, ""),
    };
    let text = match suffix {
        "" => format!("{shown:.decimals$}"),
        _ => format!("{shown:.2}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
    };
    let text = if text.trim_matches(['-', '0', '.']).is_empty() {
        "0".to_owned()
    } else {
        text
    };
    format!("{}{suffix}{unit}", text.replace('-', "−"))
}

fn decimals_of(step: f64) -> usize {
    if step <= 0.0 {
        0
    } else {
        (-(step.log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize
    }
}

/// A value with one digit more than its axis.
fn value_label(value: f64, axis: &Axis, range: f64) -> String {
    if !value.is_finite() {
        return "not measured".into();
    }
    let factor = if axis.percent { 100.0 } else { 1.0 };
    let decimals = decimals_of(nice_step(range * factor)) + 1;
    format!(
        "{:.decimals$}{}",
        value * factor,
        if axis.percent { "%" } else { "" }
    )
    .replace('-', "−")
}

/// Where the data go on the page.
struct Frame {
    x: Span,
    y: Span,
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Frame {
    fn x_at(&self, value: f64) -> f64 {
        self.left + self.x.fraction(value).clamp(-1.0, 2.0) * self.width
    }

    fn y_at(&self, value: f64) -> f64 {
        self.top + (1.0 - self.y.fraction(value).clamp(-1.0, 2.0)) * self.height
    }

    fn at(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        [self.x_at(x), self.y_at(y)]
    }
}

struct Canvas {
    body: String,
    title: String,
    /// Lower edge of what is above the axes.
    top: f64,
    height: f64,
}

impl Canvas {
    /// Title, legend, label of the vertical axis; then `height` for the area between the axes.
    fn new(title: &str, y_label: &str, legend: &[Entry<'_>], height: f64) -> Self {
        let mut canvas = Self {
            body: String::new(),
            title: title.into(),
            top: 6.0,
            height: 0.0,
        };
        if !title.is_empty() {
            canvas.text(0.0, canvas.top + 14.0, "start", "fp-title", title);
            canvas.top += 26.0;
        }
        let mut x = 0.0;
        for Entry { name, class } in legend.iter().filter(|entry| !entry.name.is_empty()) {
            let width = 34.0 + text_width(name, 13.0) + 18.0;
            if x > 0.0 && x + width > WIDTH {
                x = 0.0;
                canvas.top += 20.0;
            }
            let y = canvas.top + 9.0;
            canvas.push(format_args!(
                "<path class=\"fp-line {class}\" d=\"M{x:.1} {y:.1}h28\"/>"
            ));
            canvas.text(x + 34.0, y + 4.5, "start", "fp-ink", name);
            x += width;
        }
        if x > 0.0 {
            canvas.top += 26.0;
        }
        if !y_label.is_empty() {
            canvas.text(0.0, canvas.top + 12.0, "start", "fp-soft", y_label);
            canvas.top += 22.0;
        }
        canvas.top += 6.0;
        canvas.height = canvas.top + height + AXIS_ROOM;
        canvas
    }

    fn push(&mut self, text: fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(text);
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let text = escaped(text);
        self.push(format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// Both axes with grid, ticks and labels.
    fn frame(&mut self, x: Span, y: Span, x_axis: &Axis, y_axis: &Axis) -> Frame {
        let labels: Vec<(f64, String)> = y
            .ticks()
            .into_iter()
            .map(|tick| (tick, tick_label(tick, y_axis, &y)))
            .collect();
        let room = labels
            .iter()
            .map(|(_, label)| text_width(label, 13.0))
            .fold(14.0, f64::max);
        let left = room + 10.0;
        let frame = Frame {
            x,
            y,
            left,
            top: self.top,
            width: WIDTH - left - 22.0,
            height: HEIGHT,
        };
        for (tick, label) in labels {
            let at = frame.y_at(tick);
            let right = frame.left + frame.width;
            self.push(format_args!(
                "<path class=\"fp-grid\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>"
            ));
            self.text(left - 8.0, at + 4.5, "end", "fp-soft", &label);
        }
        self.x_axis(&frame, x_axis);
        frame
    }

    fn x_axis(&mut self, frame: &Frame, axis: &Axis) {
        let bottom = frame.top + frame.height;
        for tick in frame.x.ticks() {
            let at = frame.x_at(tick);
            self.push(format_args!(
                "<path class=\"fp-grid\" d=\"M{at:.1} {:.1}V{bottom:.1}\"/>",
                frame.top
            ));
            self.push(format_args!(
                "<path class=\"fp-rule\" d=\"M{at:.1} {bottom:.1}v5\"/>"
            ));
            self.text(
                at,
                bottom + 18.0,
                "middle",
                "fp-soft",
                &tick_label(tick, axis, &frame.x),
            );
        }
        let right = frame.left + frame.width;
        self.push(format_args!(
            "<path class=\"fp-rule\" d=\"M{:.1} {bottom:.1}H{right:.1}\"/>",
            frame.left
        ));
        self.text(right, bottom + 38.0, "end", "fp-soft", &axis.label);
    }

    fn mark(&mut self, frame: &Frame, at: f64, label: &str) {
        let x = frame.x_at(at);
        let (top, bottom) = (frame.top - 4.0, frame.top + frame.height);
        self.push(format_args!(
            "<path class=\"fp-mark\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>"
        ));
        let half = text_width(label, 13.0) / 2.0;
        let middle = x.clamp(half, (WIDTH - half).max(half));
        self.text(middle, top - 5.0, "middle", "fp-ink fp-halo", label);
    }

    fn no_data(&mut self, frame: &Frame) {
        let (x, y) = (frame.left + frame.width / 2.0, frame.top + frame.height / 2.0);
        self.text(x, y, "middle", "fp-soft", "no data");
    }

    /// A nested element cuts off what leaves the axes; unlike a clip path it needs no name, which could clash with
    /// another chart's on the same page.
    fn open_clip(&mut self, frame: &Frame) {
        let (x, y, w, h) = (
            frame.left - 2.0,
            frame.top - 2.0,
            frame.width + 4.0,
            frame.height + 4.0,
        );
        self.push(format_args!(
            "<svg x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" viewBox=\"{x:.1} {y:.1} {w:.1} {h:.1}\">"
        ));
    }

    fn close_clip(&mut self) {
        self.body.push_str("</svg>");
    }

    fn finish(self, description: &str) -> Svg {
        let height = self.height.ceil();
        let label = match self.title.as_str() {
            "" => escaped(description),
            title => escaped(&format!("{title}: {description}")),
        };
        Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"fp-plot\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{label}\">{STYLE}{}</svg>",
            self.body
        ))
    }
}

fn path(points: impl Iterator<Item = [f64; 2]>) -> String {
    let mut path = String::new();
    for (index, [x, y]) in points.enumerate() {
        let _ = write!(path, "{}{x:.1} {y:.1}", if index == 0 { 'M' } else { 'L' });
    }
    path
}

/// Within each half pixel across, the first, lowest, highest and last point: the same picture from any number of
/// points.
fn thinned(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    let column = |p: &[f64; 2]| (p[0] * 2.0).floor();
    let mut kept = Vec::new();
    for run in points.chunk_by(|a, b| column(a) == column(b)) {
        let by_height = |a: &usize, b: &usize| run[*a][1].total_cmp(&run[*b][1]);
        let indices = || 0..run.len();
        let mut chosen = [
            0,
            indices().min_by(by_height).unwrap_or(0),
            indices().max_by(by_height).unwrap_or(0),
            run.len() - 1,
        ];
        chosen.sort_unstable();
        for (position, &index) in chosen.iter().enumerate() {
            if position == 0 || chosen[position - 1] != index {
                kept.push(run[index]);
            }
        }
    }
    kept
}

/// About how wide a text is, for layout; fonts differ.
fn text_width(text: &str, size: f64) -> f64 {
    let ems = |c: char| match c {
        '%' | 'm' | 'w' | 'M' | 'W' => 0.95,
        '.' | ',' | 'i' | 'j' | 'l' | 'I' | ' ' => 0.36,
        c if u32::from(c) >= 0x2e80 => 1.0,
        _ => 0.62,
    };
    text.chars().map(ems).sum::<f64>() * size
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML has no way to write the other control characters.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<[f64; 2]>) -> LineChart {
        LineChart {
            title: "loss".into(),
            x: Axis::linear("images"),
            y: Axis::linear("loss"),
            series: vec![Series::new("g", points)],
        }
    }

    #[test]
    fn text_from_outside_is_escaped() {
        let mut chart = chart(vec![[0.0, 1.0], [1.0, 2.0]]);
        chart.title = "</svg><script>alert(\"1\" & '2')\u{0}".into();
        chart.series[0].name = "<b onload='x'>".into();
        chart.x.label = "\"/><image href=x>".into();
        let svg = chart.svg();
        for forbidden in ["<script", "<b ", "<image", "\u{0}"] {
            assert!(!svg.as_str().contains(forbidden), "{forbidden}");
        }
        assert!(
            svg.as_str()
                .contains("&lt;script&gt;alert(&quot;1&quot; &amp; &#39;2&#39;) ")
        );
    }

    #[test]
    fn elements_are_balanced_and_no_coordinate_is_strange() {
        let bad = [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300, 1e-300];
        let mut svgs = vec![
            chart(vec![]).svg(),
            chart(vec![[1.0, 1.0]]).svg(),
            chart(vec![[f64::NAN, 1.0]]).svg(),
        ];
        for value in bad {
            for scale in [Scale::Linear, Scale::Log] {
                let mut chart = chart(vec![[0.5, 1.0], [value, 2.0], [2.0, value]]);
                chart.x.scale = scale;
                chart.y.scale = scale;
                chart.series[0].band = vec![[0.5, 0.0, value], [1.0, 0.5, 1.5]];
                svgs.push(chart.svg());
            }
            let interval = Some(Interval { low: 0.4, high: 0.6 });
            let bars = vec![
                Bar {
                    name: "a".into(),
                    value,
                    interval,
                },
                Bar {
                    name: "b".into(),
                    value: 0.5,
                    interval,
                },
            ];
            svgs.push(
                BarChart {
                    bars,
                    start: Some((0.5, "chance".into())),
                    ..BarChart::default()
                }
                .svg(),
            );
            let samples = vec![("a".into(), vec![value, 0.3]), ("b".into(), vec![])];
            svgs.push(
                Histogram {
                    samples,
                    ..Histogram::default()
                }
                .svg(),
            );
        }
        for svg in svgs {
            assert_eq!(
                svg.as_str().matches("<svg").count(),
                svg.as_str().matches("</svg>").count()
            );
            for strange in ["NaN", "inf", "\"\"/>"] {
                assert!(!svg.as_str().contains(strange), "{strange} in {svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let span = |low, high, scale| Span { scale, low, high };
        assert_eq!(
            span(0.0, 1.0, Scale::Linear).ticks(),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(span(3.0, 17.0, Scale::Linear).ticks(), [5.0, 10.0, 15.0]);
        let decades: Vec<String> = span(1e-4, 1.0, Scale::Log)
            .ticks()
            .into_iter()
            .map(|t| tick_label(t, &Axis::log("").percent(), &span(1e-4, 1.0, Scale::Log)))
            .collect();
        assert_eq!(decades, ["0.01%", "0.1%", "1%", "10%", "100%"]);
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        let fitted = |low: f64, high: f64| {
            let span = Span::new(&Axis::log(""), [low, high].into_iter(), false);
            (span.low, span.high)
        };
        let (low, high) = fitted(1.1, 21.0);
        assert!(near(low, 1.0) && near(high, 50.0));
        let (low, high) = fitted(0.01, 0.1);
        assert!(near(low, 0.01) && near(high, 0.1));
        let label = |value, low, high| tick_label(value, &Axis::linear(""), &span(low, high, Scale::Linear));
        assert_eq!(
            [label(20_000.0, 0.0, 1e5), label(2.5e6, 0.0, 1e7)],
            ["20k", "2.5M"]
        );
        assert_eq!([label(-0.02, -0.1, 0.1), label(-0.0, -0.1, 0.1)], ["−0.02", "0"]);
    }

    #[test]
    fn many_points_cost_no_more_than_the_page_shows_and_keep_their_extremes() {
        let mut points: Vec<[f64; 2]> = (0..200_000).map(|i| [f64::from(i), 0.5]).collect();
        points[77_777][1] = 9.0;
        let svg = chart(points).svg();
        let drawn = svg.as_str().matches('L').count();
        assert!(
            drawn as f64 <= 4.0 * 2.0 * WIDTH,
            "{drawn} points on {WIDTH} pixels"
        );
        let thin = thinned(&[
            [0.0, 1.0],
            [0.1, 5.0],
            [0.2, -3.0],
            [0.3, 2.0],
            [0.4, 2.5],
            [0.9, 7.0],
        ]);
        assert_eq!(
            thin,
            [[0.0, 1.0], [0.1, 5.0], [0.2, -3.0], [0.4, 2.5], [0.9, 7.0]]
        );
    }
}
