//! The ranges of the training settings in their help.

use clap::{Args, Command, FromArgMatches};
use ddtas_io::Error as Program;
use ddtas_train::Error;
use ddtas_train::train::TrainSettings;

/// `command` with the range of each setting at the end of its `--help`. The text is that of the validation
/// error, so that both always agree.
pub fn with_ranges(command: Command) -> Command {
    let settings = TrainSettings::augment_args(Command::new("settings"));
    let ranges: Vec<(String, &'static str)> = settings
        .get_arguments()
        .filter_map(|argument| {
            let range = ["inf", &u64::MAX.to_string()]
                .into_iter()
                .find_map(|value| range(settings.clone(), argument.get_long()?, value));
            Some((argument.get_id().to_string(), range?))
        })
        .collect();
    ranges.into_iter().fold(command, |command, (id, range)| {
        command.mut_arg(id, |argument| {
            let help = argument.get_long_help().or(argument.get_help()).cloned().unwrap_or_default();
            argument.long_help(format!("{help} [range: {range}]"))
        })
    })
}

/// The range in the error for an invalid `value` of a flag, without the reason that some errors append.
fn range(settings: Command, flag: &str, value: &str) -> Option<&'static str> {
    let matches = settings.no_binary_name(true).try_get_matches_from([format!("--{flag}={value}")]).ok()?;
    let refused = TrainSettings::from_arg_matches(&matches).ok()?.validate().err()?;
    let Error::Program(Program::InvalidSetting { name, range, .. }) = refused else { return None };
    (name == flag).then(|| range.split(':').next().unwrap_or(range))
}
