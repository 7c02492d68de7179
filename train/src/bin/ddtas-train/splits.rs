//! `ddtas-train splits`: lists the pictures of a data set, for other training programs.

use std::io::Write;

use ddtas_io::console::{print, say};
use ddtas_train::data::{DatasetSettings, Source};
use ddtas_train::{Error, Result};

#[derive(clap::Args)]
pub struct SplitsArguments {
    #[command(flatten)]
    dataset: DatasetSettings,
}

/// The subcommand's arguments: a data set on disk, and none of the settings that only drawn or cropped pictures have.
pub fn on_disk(command: clap::Command) -> clap::Command {
    command
        .mut_arg("dataset", |argument| {
            argument.required(true).default_value(clap::builder::Resettable::Reset)
        })
        .mut_arg("crop_to_box", |argument| argument.hide(true))
        .mut_arg("data_seed", |argument| argument.hide(true))
}

/// Whether `text` contains a separator of the output.
fn breaks_lines(text: &str) -> bool {
    text.contains(['\t', '\n', '\r'])
}

/// Prints class, split and path of each picture, separated by tabs; warnings go to standard error.
pub fn splits(arguments: &SplitsArguments) -> Result<()> {
    let dataset = arguments.dataset.open(&mut |line| say(line))?;
    dataset.warnings.iter().for_each(say);
    let mut lines = Vec::new();
    let gallery = dataset.gallery.as_ref().map(|gallery| ("gallery", gallery));
    for (name, split) in [("train", &dataset.train), ("test", &dataset.test)].into_iter().chain(gallery) {
        for (index, source) in split.sources().iter().enumerate() {
            let class = split.class_name(index);
            let Source::File(path) = source else {
                let reason = "only whole files can be listed: give a data set on disk, without --crop-to-box";
                return Err(Error::misuse("dataset", "", reason));
            };
            let Some(path) = path.to_str().filter(|path| !breaks_lines(path) && !breaks_lines(class)) else {
                return Err(Error::Dataset(format!(
                    "{path:?} cannot be listed: its name or its class's has a tab or a line break, or is not UTF-8: rename it"
                )));
            };
            lines.push(format!("{class}\t{name}\t{path}"));
        }
    }
    Ok(print(|out| lines.iter().try_for_each(|line| writeln!(out, "{line}")))?)
}
