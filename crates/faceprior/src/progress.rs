//! Progress on standard error: bars with rate and time left, and a log that does not tear them.

use std::io::{self, Write};
use std::sync::LazyLock;

use indicatif::MultiProgress;

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

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
