//! `ddtas-train`: trains an image-retrieval network and writes a run folder; evaluates it, embeds and searches with it.

mod embed;
mod eval;
mod progress;
mod search;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ddtas::train::TrainSettings;

/// Trains an image-retrieval network with DDTAS and measures Recall@K on classes it never saw.
///
/// Without arguments it trains on car silhouettes drawn in memory, in a few minutes on two cores.
#[derive(Parser)]
#[command(version, args_override_self = true, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
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
}

fn main() -> ExitCode {
    let Arguments { command, settings } = Arguments::parse();
    let outcome = match command {
        None => train::train(&settings),
        Some(Command::Eval(arguments)) => eval::eval(&arguments),
        Some(Command::Embed(arguments)) => embed::embed(&arguments),
        Some(Command::Search(arguments)) => search::search(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ddtas-train: {error}");
            ExitCode::FAILURE
        }
    }
}
