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

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use ddtas_io::console;
use ddtas_train::train::{Preset, TrainSettings};

/// Trains an image-retrieval network with DDTAS and measures Recall@K on classes it never saw.
///
/// Without arguments it trains on car silhouettes drawn in memory, in a few minutes on two cores. -h shows what a first run may need,
/// --help every setting; the subcommands have a --help of their own.
#[derive(Parser)]
#[command(version, args_override_self = true, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Go on with the run in this folder, by its own settings.
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    ranks: ranks::RankArguments,
    /// Settings by one name; what is given beside it goes before.
    #[arg(long, value_enum)]
    preset: Option<Preset>,
    /// Say nothing of the progress: warnings, errors and the result alone.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Print the result of training as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: TrainSettings,
}

/// What else it does.
#[derive(Subcommand)]
enum Command {
    /// Measures a checkpoint on a data set's unseen classes, or embeddings in a file.
    Eval(eval::EvalArguments),
    /// Embeds the pictures of a folder tree into a file.
    Embed(embed::EmbedArguments),
    /// Finds the pictures of a collection that are most similar to a picture.
    Search(search::SearchArguments),
    /// Prints the pictures of a data set: class, split and path a line, apart by tabs.
    Splits(splits::SplitsArguments),
    /// Prints a script that completes commands and flags in a shell.
    Completions(shell::CompletionsArguments),
    /// Prints the manual page, or writes those of all commands into a folder.
    Man(shell::ManArguments),
}

/// The arguments; what begins with a minus and a digit is a value, so that the flag before it is named where it is off.
fn command() -> clap::Command {
    let numbers = |argument: clap::Arg| argument.allow_negative_numbers(true);
    let command = Arguments::command().version(&*shell::version().leak());
    help::in_sections(command).mut_args(numbers).mut_subcommands(|command| command.mut_args(numbers))
}

fn main() -> ExitCode {
    heap::keep();
    let mut matches = command().get_matches();
    if let Some(preset) = matches.get_one::<Preset>("preset") {
        matches = preset.apply(command()).get_matches();
    }
    let Arguments { command: chosen, resume, ranks, preset, quiet, json, settings } =
        Arguments::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let done = |()| ExitCode::SUCCESS;
    let output = train::Output { quiet, json };
    let code = match (chosen, resume) {
        (Some(Command::Eval(arguments)), _) => eval::eval(&arguments, quiet).map(done),
        (Some(Command::Embed(arguments)), _) => embed::embed(&arguments, quiet).map(done),
        (Some(Command::Search(arguments)), _) => search::search(&arguments, quiet).map(done),
        (Some(Command::Splits(arguments)), _) => splits::splits(&arguments).map(done),
        (Some(Command::Completions(arguments)), _) => shell::completions(&arguments, command()).map(done),
        (Some(Command::Man(arguments)), _) => shell::man(&arguments, command()).map(done),
        (None, None) => {
            let unused = unused::unused(&matches, &settings);
            preset
                .map_or(Ok(()), |preset| preset.check(&settings))
                .and_then(|()| train::train(&settings, unused, output, &ranks))
        }
        (None, Some(folder)) => resume::overrides(&matches, &settings)
            .and_then(|overrides| train::resume(&folder, &overrides, output, &ranks)),
    };
    code.unwrap_or_else(|error| console::failed("ddtas-train", &error))
}
