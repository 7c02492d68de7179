//! Checks that this machine's memory suffices for a step or an evaluation: a failed allocation would abort the program.

use super::evaluation::EVALUATION_CHUNK;
use crate::train::settings::TrainSettings;
use crate::{Error, Result};

/// Numbers of pictures of one process.
pub(super) struct Pictures {
    /// Pictures in a batch.
    pub batch: usize,
    /// Pictures in a meta batch that the generator draws.
    pub meta: usize,
    /// Pictures in a chunk of an evaluation.
    pub test: usize,
}

/// Bytes of memory and swap; none if unknown.
pub(super) fn of_this_machine() -> Option<u128> {
    #[cfg(target_os = "linux")]
    {
        let mut found = std::mem::MaybeUninit::<libc::sysinfo>::uninit();
        // SAFETY: the call writes only the struct, which has the right size.
        if unsafe { libc::sysinfo(found.as_mut_ptr()) } == 0 {
            // SAFETY: the call succeeded, so the struct is initialised.
            let found = unsafe { found.assume_init() };
            let units = u128::from(found.totalram) + u128::from(found.totalswap);
            return Some(units * u128::from(found.mem_unit));
        }
    }
    None
}

/// Bytes for `loaded` pictures of this side, and for `inside` of them in the network at once, with `values` each.
fn bytes_of(side: usize, values: usize, loaded: usize, inside: usize) -> u128 {
    4 * (loaded as u128 * 3 * (side * side) as u128 + inside as u128 * values as u128)
}

fn gigabytes(bytes: u128) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// The error for a step or evaluation that needs more bytes than there are.
fn too_large(
    (name, value): (&'static str, usize),
    (what, count, side): (&str, usize, usize),
    needed: u128,
    most: u128,
) -> Error {
    let reason = format!(
        "{what} on {count} pictures of {side} x {side} takes at least {} of memory, and this machine has {}: give less",
        gigabytes(needed),
        gigabytes(most)
    );
    Error::misuse(name, value, reason)
}

/// An error if training the network on the CPU needs more than `most` bytes for its weights and, of the parts that train, their
/// gradients and the optimizer's two moments.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) names the setting to lower, and both sizes.
pub(super) fn check_weights(settings: &TrainSettings, most: u128) -> Result<()> {
    let shape = settings.network_shape();
    let [backbone, head] = shape.least_bytes_of_parts().map(|bytes| bytes as u128);
    let backbone = if settings.optimizer.head_steps < settings.steps { 4 * backbone } else { backbone };
    let needed = backbone.max(4 * head);
    if needed <= most {
        return Ok(());
    }
    let (name, value) = match needed == backbone {
        true => ("width", settings.width),
        false => ("embedding-dim", settings.embedding_dim),
    };
    let reason = format!(
        "training a network of {shape} takes at least {} of memory for its weights, and this machine has {}: give less",
        gigabytes(needed),
        gigabytes(most)
    );
    Err(Error::misuse(name, value, reason))
}

/// An error if embedding a chunk of `pictures` on the CPU certainly needs more than this machine's memory.
/// `values` is a lower bound on the values in the network for one picture.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) names `--image-size`, and both sizes.
pub(crate) fn check_embedding(side: usize, values: usize, pictures: usize) -> Result<()> {
    let chunk = pictures.min(EVALUATION_CHUNK);
    let needed = bytes_of(side, values, chunk, chunk);
    match of_this_machine().filter(|most| needed > *most) {
        Some(most) => Err(too_large(("image-size", side), ("an evaluation", chunk, side), needed, most)),
        None => Ok(()),
    }
}

/// An error if a step or an evaluation certainly needs more than `most` bytes. `values` is a lower bound on
/// the values in the network for one picture.
///
/// # Errors
/// [`Misused`](ddtas_io::Error::Misused) names the setting to lower, and both sizes.
pub(super) fn check(settings: &TrainSettings, values: usize, pictures: &Pictures, most: u128) -> Result<()> {
    let Pictures { batch, meta, test } = *pictures;
    let side = settings.image_size;
    let chunk = settings.optimizer.chunk_size;
    let at_once = if chunk == 0 { batch } else { chunk.min(batch) };
    let step = bytes_of(side, values, batch + meta, at_once.max(meta));
    let evaluation = bytes_of(side, values, test, test);
    let needed = step.max(evaluation);
    if needed <= most {
        return Ok(());
    }
    let setting = if step < evaluation || batch.max(meta) <= 1024 {
        ("image-size", side)
    } else if meta > batch {
        ("meta-images", settings.generator.meta_images)
    } else if settings.images_per_class < settings.classes_per_batch.unwrap_or(0) {
        ("classes-per-batch", settings.classes_per_batch.unwrap_or(0))
    } else {
        ("images-per-class", settings.images_per_class)
    };
    let (what, count) = if step < evaluation { ("an evaluation", test) } else { ("a step", batch + meta) };
    Err(too_large(setting, (what, count, side), needed, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_cannot_fit_are_named_by_the_setting_to_lower() {
        let usual = TrainSettings::default();
        let of = |settings: &TrainSettings| {
            check_weights(settings, 1_000_000_000).map_err(|error| error.to_string())
        };
        of(&usual).unwrap();
        let mut wide = TrainSettings { width: 1024, ..usual.clone() };
        let said = of(&wide).unwrap_err();
        assert!(said.starts_with("--width 1024: training a network of"), "{said}");
        // The head alone is trained: one copy of the backbone's weights fits.
        wide.optimizer.head_steps = wide.steps;
        of(&wide).unwrap();
        let said = of(&TrainSettings { embedding_dim: 65_536, ..wide }).unwrap_err();
        assert!(said.starts_with("--embedding-dim 65536: training a network of"), "{said}");
    }

    #[test]
    fn what_cannot_fit_is_named_with_both_sizes_and_what_fits_is_not_refused() {
        let usual = TrainSettings::default();
        let small = Pictures { batch: 80, meta: 10, test: 128 };
        let of = |settings: &TrainSettings, pictures: &Pictures| {
            let values = 3 * settings.width * settings.image_size.pow(2);
            check(settings, values, pictures, 32_000_000_000).map_err(|error| error.to_string())
        };
        of(&usual, &small).unwrap();
        let large = TrainSettings { image_size: 1024, ..usual.clone() };
        let said = of(&large, &small).unwrap_err();
        let wanted = "--image-size 1024: an evaluation on 128 pictures of 1024 x 1024 takes at least 53.2 GB of memory, and this \
                      machine has 32.0 GB: give less";
        assert_eq!(said, wanted);
        let many = Pictures { batch: 1 << 24, ..small };
        let said = of(&TrainSettings { images_per_class: 1 << 20, ..usual.clone() }, &many).unwrap_err();
        assert!(
            said.starts_with("--images-per-class 1048576: a step on 16777226 pictures of 48 x 48"),
            "{said}"
        );
        // With chunks, only the pictures themselves are in memory at once.
        let some = Pictures { batch: 100_000, meta: 0, test: 128 };
        assert!(of(&usual, &some).is_err());
        let mut chunked = usual;
        chunked.optimizer.chunk_size = 100;
        of(&chunked, &some).unwrap();
        assert!(of_this_machine().is_none_or(|bytes| bytes > 1 << 28));
    }
}
