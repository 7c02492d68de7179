//! Settings as command-line arguments.

/// Name of an enum's value on the command line.
#[must_use]
pub fn name_of(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Settings without arguments.
pub(crate) fn defaults<T: clap::Args>() -> T {
    let matches = T::augment_args(clap::Command::new("settings")).get_matches_from(["settings"]);
    T::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}
