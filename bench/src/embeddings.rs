//! Random embeddings of which a chosen share of the negatives is mined.
//!
//! Classes of five: a random centre a class, noise around it. More noise brings positives and negatives
//! together, so that more negatives are mined; the noise for a wanted share is found by bisection on a sample.

use ddtas_cases::random::normalise;
use ndarray::{Array2, ArrayViewMut1};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use super::Density;
use ddtas::backend::{Backend, cpu::CpuBackend};
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows, UnitCheck};
use ddtas_io::tensors::EmbeddedRows;
use ddtas_io::{Error, Result};

/// Instances a class, as in the paper's batches.
pub const CLASS_SIZE: usize = 5;

/// Rows of the sample on which the noise is found.
const SAMPLE: usize = 2000;

/// Largest length of the noise over that of a class centre.
const MOST_NOISE: f64 = 16.0;

/// Largest relative error of the sample's share.
const CLOSE: f64 = 0.1;

/// A batch to measure: anchors, references of their own or none, and the settings they are mined with.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// The rows of the batch.
    pub anchors: EmbeddedRows,
    /// The rows they are compared with; `None` is the square form.
    pub references: Option<EmbeddedRows>,
    /// Settings of mining and loss.
    pub settings: LossSettings,
    /// Name of the density, if there is one.
    pub density: Option<String>,
    /// Length of the noise over that of a class centre, if rows were drawn so.
    pub noise: Option<f64>,
}

impl Embeddings {
    /// `1280 x 512, middle`.
    #[must_use]
    pub fn name(&self) -> String {
        let (rows, dim) = self.anchors.values.dim();
        let against =
            self.references.as_ref().map_or(String::new(), |r| format!(" against {}", r.labels.len()));
        let density = self.density.as_ref().map_or(String::new(), |density| format!(", {density}"));
        format!("{rows} x {dim}{against}{density}")
    }

    /// Number of ordered negative pairs: of two different labels, both at least 0.
    #[must_use]
    pub fn negatives(&self) -> u64 {
        let sorted = |labels: &[i64]| {
            let mut known: Vec<i64> = labels.iter().copied().filter(|label| *label >= 0).collect();
            known.sort_unstable();
            known
        };
        let anchors = sorted(&self.anchors.labels);
        let references =
            self.references.as_ref().map_or_else(|| anchors.clone(), |rows| sorted(&rows.labels));
        let of_class = |label: &i64| {
            references.partition_point(|other| other <= label)
                - references.partition_point(|other| other < label)
        };
        anchors.iter().map(|label| (references.len() - of_class(label)) as u64).sum()
    }

    /// The batch, rows as float32.
    #[must_use]
    pub fn batch(&self) -> Batch<'_> {
        let (values, labels) = (self.anchors.values.view(), self.anchors.labels.as_slice());
        match &self.references {
            None => Batch::square(values, labels),
            Some(rows) => {
                Batch::rectangular(Rows::new(values, labels), Rows::new(rows.values.view(), &rows.labels))
            }
        }
    }
}

/// The kinds of rows that are drawn; each has random streams of its own.
#[derive(Clone, Copy)]
enum Purpose {
    Centre,
    Anchor,
    Reference,
}

fn stream(seed: u64, purpose: Purpose, index: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((purpose as u64) << 56) | index as u64);
    rng
}

fn add_normal(rng: &mut ChaCha8Rng, scale: f64, row: &mut [f32]) {
    for value in row {
        let normal: f64 = StandardNormal.sample(rng);
        *value += (scale * normal) as f32;
    }
}

/// Every row has generators of its own, so rows do not depend on how many there are or on threads.
fn draw_rows(purpose: Purpose, count: usize, dim: usize, noise: f64, seed: u64) -> EmbeddedRows {
    let mut values = Array2::zeros((count, dim));
    if let Some(values) = values.as_slice_mut() {
        values.par_chunks_mut(CLASS_SIZE * dim).enumerate().for_each(|(class, rows)| {
            let mut centre = vec![0.0; dim];
            add_normal(&mut stream(seed, Purpose::Centre, class), 1.0, &mut centre);
            normalise(ArrayViewMut1::from(&mut centre));
            for (i, row) in rows.chunks_mut(dim).enumerate() {
                row.copy_from_slice(&centre);
                let scale = noise / (dim as f64).sqrt();
                add_normal(&mut stream(seed, purpose, class * CLASS_SIZE + i), scale, row);
                normalise(row.into());
            }
        });
    }
    EmbeddedRows { values, labels: (0..count).map(|i| (i / CLASS_SIZE) as i64).collect() }
}

/// Draws `batch` anchors, and `references` rows of their own if any, of `dim` dimensions, all above 0.
///
/// The same arguments give the same rows, whatever the number of threads.
#[must_use]
pub fn draw(
    batch: usize,
    references: Option<usize>,
    dim: usize,
    density: Density,
    noise: f64,
    seed: u64,
) -> Embeddings {
    Embeddings {
        anchors: draw_rows(Purpose::Anchor, batch, dim, noise, seed),
        references: references.map(|count| draw_rows(Purpose::Reference, count, dim, noise, seed)),
        settings: density.settings(),
        density: Some(density.to_string()),
        noise: Some(noise),
    }
}

/// Share of the negatives in the sets of active anchors.
pub(super) fn mined_share(embeddings: &Embeddings, output: &LossOutput) -> f64 {
    output.mined().1 as f64 / embeddings.negatives().max(1) as f64
}

/// The noise at which the share of `density` is mined in a sample; the share grows with noise.
///
/// # Errors
/// [`Error::Misused`] if no noise gives that share at this dimension.
pub fn find_noise(density: Density, dim: usize, references: Option<usize>, seed: u64) -> Result<f64> {
    let mut backend = CpuBackend::new();
    let mut output = LossOutput::default();
    let mut share_at = |noise| {
        // The paper's settings, even if the rows are then measured with others.
        let sample = Embeddings {
            settings: LossSettings::default(),
            ..draw(SAMPLE, references.map(|_| SAMPLE), dim, density, noise, seed)
        };
        let batch = Batch { check: UnitCheck::Trust, ..sample.batch() };
        backend.loss(&batch, &sample.settings, &mut output)?;
        Ok::<_, Error>(mined_share(&sample, &output))
    };
    let wanted = density.share();
    let (mut low, mut high) = (0.0, MOST_NOISE);
    let mut found = f64::NAN;
    for _ in 0..14 {
        let middle = f64::midpoint(low, high);
        found = share_at(middle)?;
        if found < wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    if (found / wanted - 1.0).abs() < CLOSE {
        return Ok(f64::midpoint(low, high));
    }
    let value = format!("{density} at --dim {dim}");
    Err(Error::misuse(
        "density",
        value,
        "cannot be reached by any noise: give a larger --dim or another share",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_gives_the_wanted_share() {
        for (density, references) in
            [(Density::Late, None), (Density::Start, None), (Density::Middle, Some(1))]
        {
            let noise = find_noise(density, 64, references, 3).unwrap();
            // Another seed, since the noise that was found must fit other rows too. With fewer references
            // than anchors, some anchors would have no positive and mine nothing.
            let embeddings = draw(1500, references.map(|_| 1700), 64, density, noise, 4);
            let mut output = LossOutput::default();
            CpuBackend::new().loss(&embeddings.batch(), &embeddings.settings, &mut output).unwrap();
            let share = mined_share(&embeddings, &output);
            assert!((share / density.share() - 1.0).abs() < 0.2, "{density}: {share}");
        }
    }

    #[test]
    fn all_is_nearly_every_negative() {
        let embeddings = draw(300, None, 32, Density::All, 1.0, 0);
        let mut output = LossOutput::default();
        CpuBackend::new().loss(&embeddings.batch(), &embeddings.settings, &mut output).unwrap();
        assert!(mined_share(&embeddings, &output) > 0.99);
    }

    #[test]
    fn rows_do_not_depend_on_how_many_there_are() {
        let rows = |count| draw(count, None, 7, Density::Late, 0.5, 1).anchors.values;
        assert_eq!(rows(12).slice(ndarray::s![..6, ..]), rows(6));
    }

    #[test]
    fn negatives_are_pairs_of_two_known_labels() {
        let mut embeddings = draw(12, Some(7), 2, Density::Late, 0.5, 1);
        // Classes 0, 1 and 2 have 5, 5 and 2 anchors; classes 0 and 1 have 5 and 2 references.
        assert_eq!(embeddings.negatives(), 5 * 2 + 5 * 5 + 2 * 7);
        embeddings.anchors.labels[0] = -1;
        assert_eq!(embeddings.negatives(), 4 * 2 + 5 * 5 + 2 * 7);
        embeddings.references = None;
        assert_eq!(embeddings.negatives(), 4 * 7 + 5 * 6 + 2 * 9);
    }

    #[test]
    fn a_share_that_one_dimension_cannot_give_is_an_error() {
        assert!(find_noise(Density::Late, 1, None, 0).is_err());
    }
}
