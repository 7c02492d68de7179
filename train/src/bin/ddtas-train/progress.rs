//! Progress of the subcommands.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ddtas_io::console::{printable, say};
use ddtas_train::inference::{Event, Skipped};
use indicatif::{ProgressBar, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A bar on a terminal; elsewhere a line every few seconds, once something takes that long.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
    quiet: bool,
    last_line: Instant,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal && !quiet { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{msg:11} {bar:24} {pos}/{len} [{elapsed}<{eta}]") {
            bar.set_style(style);
        }
        // A terminal that cannot move its cursor shows no bar, and would show no line above it.
        let terminal = terminal && !bar.is_hidden();
        Self { bar, terminal, quiet, last_line: Instant::now() }
    }

    pub fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Embedding { done, total } => self.count("embedding", "pictures", done, total),
            Event::Searching { done, total } => self.count("searching", "queries", done, total),
            Event::Clustering { step, steps } => self.count("clustering", "steps at most", step, steps),
            Event::Note(_) if self.quiet => {}
            Event::Note(note) => self.line(note),
            Event::Warning(warning) => self.line(&format!("warning: {warning}")),
            _ => {}
        }
    }

    fn count(&mut self, what: &'static str, unit: &str, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message(what);
        if !self.terminal && !self.quiet && self.last_line.elapsed() > LINE_EVERY {
            self.last_line = Instant::now();
            say(format_args!("{what}: {done} of {total} {unit}"));
        }
    }

    fn line(&self, line: &str) {
        if self.terminal && !self.quiet {
            self.bar.println(printable(line));
        } else {
            say(line);
        }
    }

    /// Runs `work` and takes the bar away, whatever came of it.
    pub fn during<T>(
        quiet: bool,
        work: impl FnOnce(&mut Self) -> ddtas_train::Result<T>,
    ) -> ddtas_train::Result<T> {
        let mut progress = Self::new(quiet);
        let outcome = work(&mut progress);
        progress.bar.finish_and_clear();
        outcome
    }
}

/// Warns of unreadable pictures, naming the first few.
pub fn warn_of_skipped(skipped: &[Skipped]) {
    const NAMED: usize = 10;
    for bad in skipped.iter().take(NAMED) {
        say(format_args!("warning: left out {}: {}", bad.path.display(), bad.reason));
    }
    if skipped.len() > NAMED {
        say(format_args!("warning: and {} more that cannot be read", skipped.len() - NAMED));
    }
}
