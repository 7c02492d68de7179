//! Progress on standard error: a bar on a terminal, lines elsewhere.

use std::fmt::Display;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::console::{printable, say};

/// Time between two lines where there is no bar.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress of a program.
pub struct Progress {
    bar: ProgressBar,
    /// False where standard error is no terminal, or one that cannot move its cursor.
    has_bar: bool,
    quiet: bool,
    last_line: Instant,
}

impl Progress {
    /// Progress with a bar by this template of indicatif's; `quiet` shows only warnings.
    #[must_use]
    pub fn new(quiet: bool, template: &str) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(0) };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let has_bar = !bar.is_hidden();
        Self { bar, has_bar, quiet, last_line: Instant::now() }
    }

    /// Begins a part of `total` steps, `done` of them by an earlier process: the remaining time is estimated from the others.
    pub fn begin(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.reset_eta();
    }

    /// Moves the bar.
    pub fn at(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
    }

    /// Sets the text beside the bar.
    pub fn message(&self, message: impl Into<std::borrow::Cow<'static, str>>) {
        self.bar.set_message(message);
    }

    /// Prints a line if there is no bar and the last line is some seconds ago, or this one is `due`.
    pub fn instead(&mut self, due: bool, line: impl Display) {
        if !self.has_bar && !self.quiet && (due || self.last_line.elapsed() > LINE_EVERY) {
            self.last_line = Instant::now();
            say(line);
        }
    }

    /// Prints a line above the bar.
    pub fn line(&self, line: &str) {
        if !self.quiet {
            self.print(line);
        }
    }

    /// Prints a warning, also if the progress is quiet.
    pub fn warn(&self, warning: &str) {
        self.print(&format!("warning: {warning}"));
    }

    fn print(&self, line: &str) {
        if self.has_bar {
            self.bar.println(printable(line));
        } else {
            say(line);
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
