//! `ddtas-train`: trains an image-retrieval network and writes a run folder.

mod train;

use std::process::ExitCode;

use clap::Parser;
use ddtas::train::TrainSettings;

/// Trains an image-retrieval network with DDTAS and measures Recall@K on classes it never saw.
///
/// Without arguments it trains on car silhouettes drawn in memory, in a few minutes on two cores.
#[derive(Parser)]
#[command(version, args_override_self = true)]
struct Arguments {
    #[command(flatten)]
    settings: TrainSettings,
}

fn main() -> ExitCode {
    let Arguments { settings } = Arguments::parse();
    match train::train(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ddtas-train: {error}");
            ExitCode::FAILURE
        }
    }
}
