//! `ddtas-train`: trains an image-retrieval network and writes a run folder.

mod make_fixture;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ddtas::train::TrainSettings;
use make_fixture::{MakeFixtureArguments, make_fixture};

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

#[derive(Subcommand)]
enum Command {
    /// Writes a small copy of a published data set, drawn, in its official layout.
    MakeFixture(MakeFixtureArguments),
}

fn main() -> ExitCode {
    let Arguments { command, settings } = Arguments::parse();
    let outcome = match command {
        None => train::train(&settings),
        Some(Command::MakeFixture(arguments)) => make_fixture(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ddtas-train: {error}");
            ExitCode::FAILURE
        }
    }
}
