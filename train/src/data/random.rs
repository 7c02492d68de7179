//! A random generator for each purpose and position, so that results do not depend on the order of work.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What random numbers are used for. Streams of different purposes are independent.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    /// Order of the classes within a round of the sampler.
    ClassOrder = 1,
    /// Pictures of the classes of a batch.
    Pictures = 2,
    /// Crop, flip and colour of one picture of a batch.
    Augment = 3,
    /// The design of a synthetic class.
    Design = 4,
    /// Pose, scene and light of a synthetic picture.
    Scene = 5,
}

/// The generator for (seed, purpose, a, b): ChaCha with these four numbers as key.
pub(super) fn generator(seed: u64, purpose: Purpose, a: u64, b: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (part, value) in key.chunks_exact_mut(8).zip([seed, purpose as u64, a, b]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}
