//! Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask the run to stop; a second Ctrl-C or SIGTERM ends the program at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ddtas_train::{Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// A shell's exit code for a program that a signal ended is this plus the signal's number.
const SIGNALLED: i32 = 128;

/// Ignores SIGXFSZ, as Rust ignores SIGPIPE: a write beyond the limit of a file's size then fails.
pub fn ignore_file_limit() {
    #[cfg(unix)]
    // SAFETY: no handler is installed, and no other thread runs yet.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// State set by the signal handlers.
pub struct Signals {
    stop: Arc<AtomicBool>,
    number: Arc<AtomicUsize>,
}

impl Signals {
    /// Installs the signal handlers.
    ///
    /// # Errors
    /// [`Unavailable`](ddtas::Error::Unavailable) if the system refuses.
    pub fn listen() -> Result<Self> {
        let signals = Self { stop: Arc::default(), number: Arc::default() };
        for signal in [SIGINT, SIGTERM] {
            // In this order: for the first signal `stop` is not set yet, for the next one it is.
            flag::register_conditional_shutdown(signal, SIGNALLED + signal, Arc::clone(&signals.stop))
                .map_err(deaf)?;
            signals.stop_on(signal)?;
        }
        #[cfg(unix)]
        if !hang_up::is_ignored() {
            // A second one does not end the program: shell and system each send one when a terminal closes.
            signals.stop_on(hang_up::SIGHUP)?;
        }
        // mpirun passes this signal on to its processes without ending them soon after.
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

    /// The flag that the first signal sets.
    pub fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// The exit code for a program that this signal ended.
    pub fn exit_code(&self) -> ExitCode {
        let code = SIGNALLED as usize + self.number.load(Ordering::Relaxed);
        u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

fn deaf(error: std::io::Error) -> Error {
    ddtas::Error::Unavailable(format!("cannot listen for signals: {error}")).into()
}

/// The signal of a closed terminal.
#[cfg(unix)]
mod hang_up {
    pub use signal_hook::consts::SIGHUP;

    /// Whether the signal is ignored because the program was started so, as by `nohup`, to outlive its terminal.
    pub fn is_ignored() -> bool {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: without a new action the call only writes the old one to `action`.
        let found = unsafe { libc::sigaction(SIGHUP, std::ptr::null(), action.as_mut_ptr()) } == 0;
        // SAFETY: the call succeeded, so `action` is initialised.
        found && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
    }
}
