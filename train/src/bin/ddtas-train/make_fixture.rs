//! `ddtas-train make-fixture`: a published data set in small, drawn.

use std::io::Write;
use std::path::PathBuf;

use ddtas_io::console::print;
use ddtas_train::data::DatasetKind;
use ddtas_train::data::fixture::{FixtureSettings, Layout, write};

#[derive(clap::Args)]
pub struct MakeFixtureArguments {
    /// The set: cars196, cub200, sop or in-shop.
    #[arg(long, value_enum)]
    dataset: DatasetKind,
    /// Folder to write it into, new or empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Which of the layouts of cars196 [default: car-ims].
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// Classes, of which the first half trains.
    #[arg(long, default_value_t = 16)]
    classes: usize,
    /// Pictures of each class.
    #[arg(long, default_value_t = 6)]
    images_per_class: usize,
    /// Width of the pictures in pixels.
    #[arg(long, default_value_t = 96)]
    picture_width: usize,
    /// Seed of the cars.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the archives as they are downloaded, not what is in them.
    #[arg(long)]
    archive: bool,
}

/// Writes the fixture and prints what to give as `--data-root`.
pub fn make_fixture(arguments: &MakeFixtureArguments) -> ddtas_train::Result<()> {
    let settings = FixtureSettings {
        dataset: arguments.dataset,
        layout: arguments.layout,
        classes: arguments.classes,
        images_per_class: arguments.images_per_class,
        picture_width: arguments.picture_width,
        seed: arguments.seed,
        archive: arguments.archive,
    };
    let root = write(&settings, &arguments.out)?;
    print(|out| writeln!(out, "{}", root.display()))
}
