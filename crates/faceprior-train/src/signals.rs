//! Asking a run to leave: Ctrl-C, SIGTERM and SIGUSR1 raise a flag that the driver reads after each step.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to write a checkpoint and leave. Clones share the request.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// No request yet, and no signal bound to it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Binds Ctrl-C (SIGINT), SIGTERM and, on Unix, SIGUSR1 to a new request.
    ///
    /// A second Ctrl-C or SIGTERM ends the process at once with exit code 130 or 143: what a user expects who does
    /// not want to wait for the step under way. The last checkpoint on disk is then the one to resume from.
    ///
    /// # Errors
    /// The operating system's, if a handler cannot be set.
    pub fn on_signals() -> io::Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let stop = Self::new();
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
            // Registered first, so that it sees the flag as it was before this very signal.
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop.0))?;
            signal_hook::flag::register(signal, Arc::clone(&stop.0))?;
        }
        #[cfg(unix)]
        signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&stop.0))?;
        Ok(stop)
    }

    /// Makes the request.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether the request was made.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// The flag itself, for work that knows nothing of training; true is a request.
    pub fn flag(&self) -> &AtomicBool {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_the_request() {
        let stop = Stop::new();
        let other = stop.clone();
        assert!(!stop.requested());
        other.request();
        assert!(stop.requested());
    }

    #[cfg(unix)]
    #[test]
    fn a_signal_raises_the_flag() {
        let stop = Stop::on_signals().unwrap();
        signal_hook::low_level::raise(signal_hook::consts::SIGUSR1).unwrap();
        assert!(stop.requested());
    }
}
