//! Ctrl-C and SIGTERM: the first asks the run to stop, the second ends the program at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ddtas::{Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// A shell's exit code for a program that a signal ended: this plus the signal's number.
const SIGNALLED: i32 = 128;

/// What the signals have said so far.
pub struct Signals {
    stop: Arc<AtomicBool>,
    number: Arc<AtomicUsize>,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system does not let it.
    pub fn listen() -> Result<Self> {
        let signals = Self { stop: Arc::default(), number: Arc::default() };
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds `stop` unset, the next one set.
            flag::register_conditional_shutdown(signal, SIGNALLED + signal, Arc::clone(&signals.stop))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&signals.number), signal as usize))
                .and_then(|_| flag::register(signal, Arc::clone(&signals.stop)))
                .map_err(|error| Error::Unavailable(format!("cannot listen for signals: {error}")))?;
        }
        Ok(signals)
    }

    /// Set by the first signal.
    pub fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// The exit code of a program that the signal ended.
    pub fn exit_code(&self) -> ExitCode {
        let code = SIGNALLED as usize + self.number.load(Ordering::Relaxed);
        u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
    }
}
