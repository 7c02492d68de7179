//! `ddtas-train`: trains an image-retrieval network and writes a run folder; evaluates it, embeds and searches with it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod embed;
mod eval;
mod heap;
mod help;
mod progress;
mod ranks;
mod resume;
mod search;
mod shell;
mod signals;
mod splits;
mod train;
mod unused;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use ddtas_io::console;
use ddtas_train::train::{Preset, TrainSettings};

/// Trains an image-retrieval network with DDTAS and measures Recall@K on classes it never saw.
///
/// Without arguments it trains on car silhouettes drawn in memory, in about a minute on two cores. -h lists the settings of
/// a first run, --help all of them; each subcommand has its own --help.
#[derive(Parser)]
#[command(
    version,
    args_override_self = true,
    args_conflicts_with_subcommands = true,
    next_help_heading = "Runs"
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// A named set of settings; flags you give override it.
    #[arg(long, value_enum)]
    preset: Option<Preset>,
    /// Continue the run in this folder, with its settings.
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    ranks: ranks::RankArguments,
    /// Print only warnings, errors and the result.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Print the result as one JSON object.
    #[arg(long, hide_short_help = true)]
    json: bool,
    #[command(flatten)]
    settings: TrainSettings,
}

/// The subcommands.
#[derive(Subcommand)]
enum Command {
    /// Evaluates a checkpoint on a data set's unseen classes, or embeddings in a file: Recall@K, R-precision, MAP@R, NMI.
    Eval(eval::EvalArguments),
    /// Embeds the pictures of a folder tree into a file.
    Embed(embed::EmbedArguments),
    /// Finds the pictures of a collection that are most similar to a picture.
    Search(search::SearchArguments),
    /// Lists the pictures of a data set, a line each: class, split and path, separated by tabs.
    Splits(splits::SplitsArguments),
    /// Prints a shell completion script.
    Completions(shell::CompletionsArguments),
    /// Prints the manual page, or writes the pages of all commands into a folder.
    Man(shell::ManArguments),
}

/// The command line. Values may be negative numbers, so that errors about one name its flag.
fn command() -> clap::Command {
    let numbers = |argument: clap::Arg| argument.allow_negative_numbers(true);
    // Subcommands share settings with training, but are short enough to show all of theirs.
    let shown = |argument: clap::Arg| numbers(argument).hide_short_help(false);
    let command = Arguments::command().version(shell::version());
    let command = command.mut_args(numbers).mut_subcommands(|command| command.mut_args(shown));
    command.mut_subcommand("splits", splits::on_disk)
}

/// Flags of other programs, and what to use instead.
const FAMILIAR: [(&str, &str); 2] = [
    ("--batch-size", "a batch is --classes-per-batch times --images-per-class"),
    ("--epochs", "give --steps; a run's second line says how many make an epoch"),
];

/// Parses the command line; ends the program with an error if it is not valid.
fn parsed(command: clap::Command) -> ArgMatches {
    let is_training = !std::env::args_os().any(|word| command.find_subcommand(word).is_some());
    // Finding the ranges means parsing each flag again, so it is done only for help.
    let is_asked = std::env::args_os().any(|word| word == "--help" || word == "help");
    let command = if is_asked { help::with_ranges(command) } else { command };
    command.try_get_matches().unwrap_or_else(|error| {
        let unknown =
            error.get(ContextKind::InvalidArg).filter(|_| error.kind() == ErrorKind::UnknownArgument);
        let is_unknown = |flag: &str| matches!(unknown, Some(ContextValue::String(text)) if text == flag);
        match FAMILIAR.iter().find(|(flag, _)| is_training && is_unknown(flag)) {
            Some((flag, advice)) => {
                console::say(format_args!("ddtas-train: {flag}: {advice}"));
                std::process::exit(2)
            }
            None => error.exit(),
        }
    })
}

fn main() -> ExitCode {
    heap::keep();
    signals::ignore_file_limit();
    let mut matches = parsed(command());
    if let Some(preset) = matches.get_one::<Preset>("preset") {
        matches = parsed(preset.apply(command()));
    }
    let Arguments { command: chosen, resume, ranks: on, preset, quiet, json, settings } =
        Arguments::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let done = |()| ExitCode::SUCCESS;
    let output = train::Output { quiet, json };
    let code = match (chosen, resume) {
        (Some(Command::Eval(arguments)), _) => {
            ranks::share_processors(1).and_then(|()| eval::eval(&arguments, quiet)).map(done)
        }
        (Some(Command::Embed(arguments)), _) => {
            ranks::share_processors(1).and_then(|()| embed::embed(&arguments, quiet)).map(done)
        }
        (Some(Command::Search(arguments)), _) => {
            ranks::share_processors(1).and_then(|()| search::search(&arguments, quiet)).map(done)
        }
        (Some(Command::Splits(arguments)), _) => splits::splits(&arguments).map(done),
        (Some(Command::Completions(arguments)), _) => shell::completions(&arguments, command()).map(done),
        (Some(Command::Man(arguments)), _) => shell::man(&arguments, help::with_ranges(command())).map(done),
        (None, None) => {
            let unused = unused::unused(&matches, &settings);
            preset
                .map_or(Ok(()), |preset| preset.check(&settings))
                .and_then(|()| train::train(&settings, unused, output, &on))
        }
        (None, Some(folder)) => resume::overrides(&matches, &settings)
            .and_then(|overrides| train::resume(&folder, &overrides, output, &on)),
    };
    code.unwrap_or_else(|error| console::failed("ddtas-train", &error))
}
