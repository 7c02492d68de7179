//! P-K batches: P classes, K pictures of each (SPEC 6: 16 x 5 in the paper).

use rand::seq::{SliceRandom, index};
use rand::{Rng, RngExt};

use super::random::{Purpose, generator};
use crate::error::check;
use crate::{Error, Result};

/// Draws batches of P classes x K pictures; batch `step` depends only on (seed, step).
///
/// A round is a random order of all classes, cut into batches of P, so that classes occur equally often and
/// none twice in a batch. The rest of a round (fewer than P classes) is dropped. Pictures are drawn without
/// replacement; a class with fewer than K gives all its pictures, and some of them again.
#[derive(Debug, Clone)]
pub struct PkSampler {
    by_class: Vec<Vec<usize>>,
    classes: usize,
    pictures: usize,
    seed: u64,
}

impl PkSampler {
    /// A sampler of P = `classes` and K = `pictures`; `by_class` has the picture indices of each class.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) if one of the two is 0;
    /// [`Misused`](ddtas_io::Error::Misused) if there are fewer than P classes; [`Error::Dataset`] for a
    /// class without pictures.
    pub fn new(by_class: &[Vec<usize>], classes: usize, pictures: usize, seed: u64) -> Result<Self> {
        check(classes > 0, "classes-per-batch", classes, "at least 1")?;
        check(pictures > 0, "images-per-class", pictures, "at least 1")?;
        fewer_than(by_class.len(), "classes-per-batch", classes)?;
        if let Some(class) = by_class.iter().position(Vec::is_empty) {
            return Err(Error::Dataset(format!("class {class} of the training split has no picture")));
        }
        Ok(Self { by_class: by_class.to_vec(), classes, pictures, seed })
    }

    /// Pictures in a batch, P x K.
    pub fn batch_size(&self) -> usize {
        self.classes * self.pictures
    }

    /// Number of batches with as many pictures as the split has, rounded up.
    pub fn steps_per_epoch(&self) -> usize {
        let pictures: usize = self.by_class.iter().map(Vec::len).sum();
        pictures.div_ceil(self.batch_size())
    }

    /// The pictures of batch `step`, class by class.
    pub fn batch(&self, step: u64) -> Vec<usize> {
        let batches_per_round = (self.by_class.len() / self.classes) as u64;
        let (round, place) = (step / batches_per_round, (step % batches_per_round) as usize);
        let mut order: Vec<usize> = (0..self.by_class.len()).collect();
        order.shuffle(&mut generator(self.seed, Purpose::ClassOrder, round, 0));
        let mut rng = generator(self.seed, Purpose::Pictures, step, 0);
        let drawn = &order[place * self.classes..][..self.classes];
        drawn.iter().flat_map(|&class| draw(&self.by_class[class], self.pictures, &mut rng)).collect()
    }
}

/// An error if `classes` exceeds `there`, the number of training classes; `name` is the flag.
pub(crate) fn fewer_than(there: usize, name: &'static str, classes: usize) -> Result<()> {
    let reason = || format!("asks for more than the {there} training classes there are: give at most that");
    if classes <= there { Ok(()) } else { Err(Error::misuse(name, classes, reason())) }
}

/// Draws `count` of `pictures`, all different if there are enough.
fn draw(pictures: &[usize], count: usize, rng: &mut impl Rng) -> Vec<usize> {
    let without = count.min(pictures.len());
    let mut drawn: Vec<usize> =
        index::sample(rng, pictures.len(), without).into_iter().map(|i| pictures[i]).collect();
    while drawn.len() < count {
        drawn.push(pictures[rng.random_range(0..pictures.len())]);
    }
    drawn
}
