//! Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask the run to stop; a second Ctrl-C or SIGTERM ends the program at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ddtas_train::{Error, Result};
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
    /// [`Unavailable`](ddtas::Error::Unavailable) if the system does not let it.
    pub fn listen() -> Result<Self> {
        let signals = Self { stop: Arc::default(), number: Arc::default() };
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds `stop` unset, the next one set.
            flag::register_conditional_shutdown(signal, SIGNALLED + signal, Arc::clone(&signals.stop))
                .map_err(deaf)?;
            signals.stop_on(signal)?;
        }
        #[cfg(unix)]
        if !hang_up::is_ignored() {
            // No second one ends the program: shell and system each send one when a terminal closes.
            signals.stop_on(hang_up::SIGHUP)?;
        }
        // What mpirun hands on to its processes without ending them soon after.
        #[cfg(unix)]
        signals.stop_on(signal_hook::consts::SIGUSR1)?;
        Ok(signals)
    }

    fn stop_on(&self, signal: i32) -> Result<()> {
        flag::register_usize(signal, Arc::clone(&self.number), signal as usize)
            .and_then(|_| flag::register(signal, Arc::clone(&self.stop)))
            .map_err(deaf)?;
        Ok(())
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

fn deaf(error: std::io::Error) -> Error {
    ddtas::Error::Unavailable(format!("cannot listen for signals: {error}")).into()
}

/// What a closed terminal sends.
#[cfg(unix)]
mod hang_up {
    pub use signal_hook::consts::SIGHUP;

    /// Whether the program was started with the signal ignored, by `nohup` for one, and is to outlive its terminal.
    pub fn is_ignored() -> bool {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: without a new action the call only writes the old one, for which there is room.
        let found = unsafe { libc::sigaction(SIGHUP, std::ptr::null(), action.as_mut_ptr()) } == 0;
        // SAFETY: the call wrote it, since it succeeded.
        found && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
    }
}
