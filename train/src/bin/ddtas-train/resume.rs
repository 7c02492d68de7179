//! Flags that may be given together with --resume.

use clap::ArgMatches;
use clap::parser::ValueSource;
use ddtas_train::train::{Overrides, TrainSettings};
use ddtas_train::{Error, Result};

/// Arguments of the ranks, which may change besides [`Overrides::names`].
const RANKS: [&str; 3] = ["ranks", "rendezvous", "rank_timeout"];

/// Arguments that say what to do with the run, not how it trains.
const OTHERS: [&str; 3] = ["resume", "quiet", "json"];

/// The changed settings on the command line.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) for a setting that must not change.
pub fn overrides(matches: &ArgMatches, settings: &TrainSettings) -> Result<Overrides> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let changeable = || Overrides::names().chain(RANKS);
    let command = crate::command();
    let refused = command.get_arguments().find(|argument| {
        let id = argument.get_id().as_str();
        given(id) && !changeable().chain(OTHERS).any(|allowed| allowed == id)
    });
    if let Some(argument) = refused {
        let flag = argument.get_long().unwrap_or(argument.get_id().as_str());
        let changeable: Vec<_> = changeable().map(|id| format!("--{}", id.replace('_', "-"))).collect();
        let changeable = changeable.join(", ");
        let reason = format!(
            "takes its settings from the run's config.toml: leave out --{flag} ({changeable} may change)"
        );
        return Err(Error::misuse("resume", "", reason));
    }
    Ok(Overrides::new(settings, given))
}
