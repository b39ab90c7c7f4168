//! Progress on standard error: a bar with rate and time left on a terminal, a line now and then elsewhere, and a
//! log that does not tear the bars.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use faceprior::train::driver::{Event, Reporter};
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Time between two lines where standard error is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(15);

/// Where log lines go: standard error, above the bars that are on show.
pub fn log_writer() -> impl Write {
    LogWriter
}

struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Says something on standard error, above the bars.
pub fn say(message: impl Display) {
    BARS.suspend(|| eprintln!("{message}"));
}

/// How far a piece of work is.
pub struct Progress {
    title: String,
    unit: &'static str,
    total: u64,
    /// Done before this process began, and so not part of its rate.
    before: u64,
    started: Instant,
    show: Show,
}

enum Show {
    Nothing,
    Bar(ProgressBar),
    Lines(Mutex<Instant>),
}

impl Progress {
    /// `total` units of work, `before` of them done by an earlier process.
    pub fn new(title: impl Into<String>, unit: &'static str, total: u64, before: u64, quiet: bool) -> Self {
        let title = title.into();
        let show = if quiet {
            Show::Nothing
        } else if io::stderr().is_terminal() {
            let bar = BARS.add(ProgressBar::new(total));
            let style = ProgressStyle::with_template("{prefix:12} {bar:24} {pos}/{len} {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(title.clone());
            bar.set_position(before);
            Show::Bar(bar)
        } else {
            Show::Lines(Mutex::new(Instant::now()))
        };
        Self {
            title,
            unit,
            total,
            before,
            started: Instant::now(),
            show,
        }
    }

    /// `done` units are done, those of earlier processes included.
    pub fn at(&self, done: u64, note: impl Display) {
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = done.saturating_sub(self.before) as f64 / seconds.max(1e-9);
        let left = Duration::from_secs_f64(self.total.saturating_sub(done) as f64 / rate.max(1e-3));
        self.at_rate(done, rate, left, note);
    }

    /// The same where rate and time left are known better than from the mean.
    pub fn at_rate(&self, done: u64, rate: f64, left: Duration, note: impl Display) {
        let left = HumanDuration(Duration::from_secs(left.as_secs()));
        match &self.show {
            Show::Nothing => {}
            Show::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(format!("{rate:.1} {}/s, {left:#} left  {note}", self.unit));
            }
            Show::Lines(last) => {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.elapsed() >= BETWEEN_LINES {
                    *last = Instant::now();
                    eprintln!(
                        "{}: {done}/{} {}, {rate:.1}/s, {left:#} left  {note}",
                        self.title, self.total, self.unit
                    );
                }
            }
        }
    }

    /// A remark beside the bar, such as that a checkpoint is being written.
    fn note(&self, note: impl Display) {
        if let Show::Bar(bar) = &self.show {
            bar.set_message(note.to_string());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
        }
    }
}

/// Shows what a training run does.
pub struct TrainingProgress {
    quiet: bool,
    progress: Option<Progress>,
}

impl TrainingProgress {
    /// Shows nothing but warnings when `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self {
            quiet,
            progress: None,
        }
    }
}

impl Reporter for TrainingProgress {
    fn report(&mut self, event: Event<'_>) {
        match event {
            Event::Started {
                stage,
                images,
                total_images,
                resumed_from,
            } => {
                if !self.quiet {
                    match resumed_from {
                        Some(path) => say(format_args!("{stage}: resumed from {}", path.display())),
                        None => say(format_args!("{stage}: {total_images} images to see")),
                    }
                }
                let progress = Progress::new(stage.as_str(), "img", total_images, images, self.quiet);
                self.progress = Some(progress);
            }
            Event::Step {
                clock,
                report,
                images_per_second,
                remaining,
            } => {
                if let Some(progress) = &self.progress {
                    let note = format!("loss {:.4}", report.loss);
                    progress.at_rate(clock.images, images_per_second, remaining, note);
                }
            }
            Event::Evaluating { .. } => {
                if let Some(progress) = &self.progress {
                    progress.note("evaluating");
                }
            }
            Event::Evaluated { clock, evaluation } => {
                if !self.quiet {
                    let values: Vec<String> = evaluation
                        .values
                        .iter()
                        .map(|(name, value)| format!("{name} {value:.4}"))
                        .collect();
                    say(format_args!(
                        "  after {:>8} images: {}",
                        clock.images,
                        values.join(", ")
                    ));
                }
            }
            Event::Checkpoint { path } => tracing::debug!("wrote {}", path.display()),
            Event::Warning { message } => say(format_args!("warning: {message}")),
        }
    }
}
