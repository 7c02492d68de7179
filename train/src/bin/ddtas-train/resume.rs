//! Flags that may be given together with --resume.

use clap::ArgMatches;
use clap::parser::ValueSource;
use ddtas_train::train::{Overrides, TrainSettings};
use ddtas_train::{Error, Result};

/// The settings that may change when a run is resumed.
const CHANGEABLE: [&str; 8] = [
    "device",
    "workers",
    "checkpoint_every",
    "max_bad_images",
    "data_root",
    "ranks",
    "rendezvous",
    "rank_timeout",
];

/// The changes that were asked for on the command line.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) if one is given that the run's result depends on.
pub fn overrides(matches: &ArgMatches, settings: &TrainSettings) -> Result<Overrides> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut ids = matches.ids().map(clap::Id::as_str);
    let allowed = |id: &str| ["resume", "quiet", "json"].contains(&id) || CHANGEABLE.contains(&id);
    // Groups of arguments have ids as well, in the case of their types.
    let argument = |id: &str| id.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_');
    if let Some(fixed) = ids.find(|&id| argument(id) && given(id) && !allowed(id)) {
        let changeable = CHANGEABLE.map(|id| format!("--{}", flag(id))).join(", ");
        let reason = format!(
            "takes its settings from the run's config.toml: leave out --{} ({changeable} may change)",
            flag(fixed)
        );
        return Err(Error::misuse("resume", "", reason));
    }
    Ok(Overrides {
        device: given("device").then(|| settings.device.clone()),
        workers: given("workers").then_some(settings.workers),
        checkpoint_every: given("checkpoint_every").then_some(settings.checkpoint_every),
        max_bad_images: given("max_bad_images").then_some(settings.max_bad_images),
        data_root: settings.data.data_root.clone().filter(|_| given("data_root")),
    })
}

/// The argument as it is typed: its field's name, except where that says too little alone.
fn flag(id: &str) -> String {
    if id == "kind" { "generator".into() } else { id.replace('_', "-") }
}
