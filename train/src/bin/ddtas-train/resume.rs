//! Flags that may be given together with --resume.

use clap::ArgMatches;
use clap::parser::ValueSource;
use ddtas_train::train::{Overrides, TrainSettings};
use ddtas_train::{Error, Result};

/// Settings that may change besides [`Overrides::NAMES`].
const OTHERS: [&str; 4] = ["ranks", "rendezvous", "rank_timeout", "steps"];

/// The changed settings on the command line.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) for a setting that must not change.
pub fn overrides(matches: &ArgMatches, settings: &TrainSettings) -> Result<Overrides> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut ids = matches.ids().map(clap::Id::as_str);
    let changeable = || Overrides::NAMES.into_iter().chain(OTHERS);
    let allowed = |id: &str| changeable().chain(["resume", "quiet", "json"]).any(|allowed| allowed == id);
    // Groups of arguments also have ids, named like their types, with capitals.
    let argument = |id: &str| id.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_');
    if let Some(fixed) = ids.find(|&id| argument(id) && given(id) && !allowed(id)) {
        let changeable: Vec<_> = changeable().map(|id| format!("--{}", flag(id))).collect();
        let changeable = changeable.join(", ");
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
        steps: given("steps").then_some(settings.steps),
        data_root: settings.data.data_root.clone().filter(|_| given("data_root")),
    })
}

/// The flag of an argument: its field's name, except for the field `kind` of the generator's settings.
fn flag(id: &str) -> String {
    if id == "kind" { "generator".into() } else { id.replace('_', "-") }
}
