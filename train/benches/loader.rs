//! Images per second of the training loader: decode, random crop, resize, mirror, colour, normalise.
//!
//! `cargo bench --bench loader -- --data-root DIR [--jitter 0]` prints one JSON object. `DIR` has a folder
//! for each class. Pictures are not cached. benches/loader.py compares it with torch.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use ddtas_train::Result;
use ddtas_train::data::{
    AugmentSettings, Cropper, FolderSettings, Loader, LoaderSettings, PkSampler, Preprocessing, folder,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[derive(Parser)]
struct Arguments {
    /// Pictures, a folder per class.
    #[arg(long)]
    data_root: PathBuf,
    /// Side of the cropped pictures, in pixels.
    #[arg(long, default_value_t = 224)]
    image_size: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Batches of 16 classes x 5 pictures to time, after four to warm up.
    #[arg(long, default_value_t = 60)]
    batches: u64,
    /// Largest relative change of brightness, contrast and saturation; 0 for none.
    #[arg(long, default_value_t = 0.2)]
    jitter: f64,
    /// Passed by cargo; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

const WARM_UP: u64 = 4;
const CLASSES: usize = 16;
const PER_CLASS: usize = 5;
/// Number of pictures for which each stage is timed separately, on one thread.
const STAGED: usize = 300;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loader: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let without_cache = FolderSettings { cache_bytes: 0, ..FolderSettings::default() };
    let split = folder(&arguments.data_root, &without_cache)?.train;
    // The crops of `RandomResizedCrop` in benches/loader.py.
    let augment =
        AugmentSettings { smallest_crop: 0.4, jitter: arguments.jitter, ..AugmentSettings::default() };
    let sampler = PkSampler::new(split.by_class(), CLASSES, PER_CLASS, 0)?;
    let settings = LoaderSettings {
        augment: augment.clone(),
        workers: arguments.workers,
        ..LoaderSettings::new(arguments.image_size, WARM_UP + arguments.batches, 0)
    };
    let mut loader = Loader::new(Arc::clone(&split), sampler, settings)?;
    for batch in loader.by_ref().take(WARM_UP as usize) {
        batch?;
    }
    let begun = Instant::now();
    let mut images = 0;
    for batch in loader {
        images += batch?.labels.len();
    }
    let images_per_second = images as f64 / begun.elapsed().as_secs_f64();

    let (mut decoding, mut cutting) = (0.0, 0.0);
    let (mut cropper, mut rng) =
        (Cropper::new(arguments.image_size, Preprocessing::default())?, ChaCha8Rng::seed_from_u64(0));
    let mut pixels = Vec::with_capacity(cropper.floats());
    for index in (0..split.len()).cycle().take(STAGED) {
        let begun = Instant::now();
        let picture = split.picture(index)?;
        let decoded = Instant::now();
        pixels.clear();
        cropper.train(&picture, &augment, &mut rng, &mut pixels)?;
        decoding += (decoded - begun).as_secs_f64();
        cutting += decoded.elapsed().as_secs_f64();
    }
    let milliseconds = |seconds: f64| 1e3 * seconds / STAGED as f64;
    println!(
        "{}",
        serde_json::json!({
            "images_per_second": images_per_second,
            "workers": arguments.workers,
            "jitter": arguments.jitter,
            "decode_ms": milliseconds(decoding),
            "crop_resize_augment_ms": milliseconds(cutting),
        })
    );
    Ok(())
}
