//! Progress of the subcommands.

use ddtas_io::console::say;
use ddtas_io::progress::Progress;
use ddtas_train::data::Unreadable;
use ddtas_train::inference::Event;

/// Runs `work`, shows its events, and removes the progress bar at the end, also after an error.
pub fn during<T>(
    quiet: bool,
    work: impl FnOnce(&mut dyn FnMut(Event<'_>)) -> ddtas_train::Result<T>,
) -> ddtas_train::Result<T> {
    let mut progress = Progress::new(quiet, "{msg:11} {bar:24} {pos}/{len} [{elapsed}<{eta}]");
    let outcome = work(&mut |event| show(&mut progress, event));
    progress.clear();
    outcome
}

fn show(progress: &mut Progress, event: Event<'_>) {
    let mut count = |what: &'static str, unit: &str, done, total| {
        progress.at(done, total);
        progress.message(what);
        progress.instead(false, format_args!("{what}: {done} of {total} {unit}"));
    };
    match event {
        Event::Embedding { done, total } => count("embedding", "pictures", done, total),
        Event::Searching { done, total } => count("searching", "queries", done, total),
        Event::Clustering { step, steps } => count("clustering", "steps at most", step, steps),
        Event::Note(note) => progress.line(note),
        Event::Warning(warning) => progress.warn(warning),
        _ => {}
    }
}

/// Warns of unreadable pictures, naming the first few.
pub fn warn_of_skipped(skipped: &[Unreadable]) {
    const NAMED: usize = 10;
    for bad in skipped.iter().take(NAMED) {
        say(format_args!("warning: left out {}: {}", bad.path.display(), bad.reason));
    }
    if skipped.len() > NAMED {
        say(format_args!("warning: and {} more that cannot be read", skipped.len() - NAMED));
    }
}
