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
            lines.push(format!("{class}\t{name}\t{}", path.display()));
        }
    }
    Ok(print(|out| lines.iter().try_for_each(|line| writeln!(out, "{line}")))?)
}
