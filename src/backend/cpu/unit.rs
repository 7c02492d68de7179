//! Rows of any length: scaled to unit length before the passes, and gradients turned back after them.
//!
//! With u = x / |x|, dL/dx = (g - (g . u) u) / |x| for g = dL/du. Half-precision rows are normalised in
//! single precision and rounded once; the backward pass takes u unrounded.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2};

use super::rows::{contiguous, double_square_sum, grow, square_sum};
use super::simd::{Lanes, Level, Work};
use super::tasks::Workers;
use crate::loss::{Batch, Embeddings, LossOutput, Rows};
use crate::{Error, Result};

/// Rows that a thread takes at once.
const CHUNK: usize = 32;

/// Lengths whose inverse and squared entries f32 represents with full precision.
const USUAL: std::ops::Range<f64> = 1e-15..1e15;

/// Both sides of a batch at unit length.
#[derive(Debug, Default)]
pub struct UnitRows {
    anchors: UnitSide,
    references: UnitSide,
}

/// One side. Only the buffer of the rows' type is used.
#[derive(Debug, Default)]
struct UnitSide {
    single: Vec<f32>,
    half: Vec<f16>,
    brain: Vec<bf16>,
    lengths: Vec<f64>,
}

impl UnitRows {
    /// Normalises the rows of a batch whose shapes were checked.
    pub fn set(&mut self, batch: &Batch<'_>, workers: Workers<'_>) -> Result<()> {
        self.set_anchors(&batch.anchors, workers)?;
        let references = batch.references.as_ref();
        references.map_or(Ok(()), |rows| self.references.set("references", &rows.embeddings, workers))
    }

    /// Normalises the rows of one side, without references.
    pub fn set_anchors(&mut self, rows: &Rows<'_>, workers: Workers<'_>) -> Result<()> {
        self.anchors.set("anchors", &rows.embeddings, workers)
    }

    /// The unit rows, as they were set last.
    pub fn anchors<'a>(&'a self, rows: &'a Rows<'_>) -> Result<Embeddings<'a>> {
        Ok(self.anchors.rows(rows)?.embeddings)
    }

    /// The batch with its unit rows, as they were set last.
    pub fn batch<'a>(&'a self, batch: &'a Batch<'_>) -> Result<Batch<'a>> {
        let references = batch.references.as_ref().map(|rows| self.references.rows(rows)).transpose()?;
        Ok(Batch {
            anchors: self.anchors.rows(&batch.anchors)?,
            references,
            identity: batch.identity,
            reference_gradient: batch.reference_gradient,
            total: batch.total,
            check: batch.check,
        })
    }

    /// Turns gradients with respect to the unit rows into those with respect to the rows of `batch`.
    pub fn normalize_backward(
        &self,
        batch: &Batch<'_>,
        workers: Workers<'_>,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.anchors_backward(&batch.anchors, entries(&mut output.gradient)?, workers)?;
        match (&batch.references, &mut output.reference_gradient) {
            (Some(rows), Some(gradient)) => {
                self.references.normalize_backward(&rows.embeddings, entries(gradient)?, workers)
            }
            _ => Ok(()),
        }
    }

    /// As [`normalize_backward`](Self::normalize_backward), for the anchors alone.
    pub fn anchors_backward(
        &self,
        rows: &Rows<'_>,
        gradient: &mut [f32],
        workers: Workers<'_>,
    ) -> Result<()> {
        self.anchors.normalize_backward(&rows.embeddings, gradient, workers)
    }

    /// Bytes its buffers hold.
    pub fn bytes(&self) -> usize {
        [&self.anchors, &self.references].map(UnitSide::bytes).iter().sum()
    }
}

impl UnitSide {
    fn set(&mut self, name: &'static str, rows: &Embeddings<'_>, workers: Workers<'_>) -> Result<()> {
        let Self { single, half, brain, lengths } = self;
        match rows {
            Embeddings::F32(view) => normalise(contiguous(name, view)?, view.dim(), single, lengths, workers),
            Embeddings::F16(view) => normalise(contiguous(name, view)?, view.dim(), half, lengths, workers),
            Embeddings::Bf16(view) => normalise(contiguous(name, view)?, view.dim(), brain, lengths, workers),
        }
        Ok(())
    }

    fn rows<'a>(&'a self, given: &'a Rows<'_>) -> Result<Rows<'a>> {
        let shape = (given.embeddings.rows(), given.embeddings.dim());
        let embeddings = match &given.embeddings {
            Embeddings::F32(_) => Embeddings::F32(matrix(shape, &self.single)?),
            Embeddings::F16(_) => Embeddings::F16(matrix(shape, &self.half)?),
            Embeddings::Bf16(_) => Embeddings::Bf16(matrix(shape, &self.brain)?),
        };
        Ok(Rows { embeddings, labels: given.labels })
    }

    fn normalize_backward(
        &self,
        rows: &Embeddings<'_>,
        gradient: &mut [f32],
        workers: Workers<'_>,
    ) -> Result<()> {
        let (dim, lengths) = (rows.dim(), &self.lengths);
        match rows {
            Embeddings::F32(view) => {
                normalize_backward(contiguous(GRADIENT, view)?, dim, lengths, gradient, workers)
            }
            Embeddings::F16(view) => {
                normalize_backward(contiguous(GRADIENT, view)?, dim, lengths, gradient, workers)
            }
            Embeddings::Bf16(view) => {
                normalize_backward(contiguous(GRADIENT, view)?, dim, lengths, gradient, workers)
            }
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        let narrow = self.half.capacity() + self.brain.capacity();
        self.single.capacity() * 4 + narrow * 2 + self.lengths.capacity() * 8
    }
}

const GRADIENT: &str = "gradient";

fn entries(gradient: &mut Array2<f32>) -> Result<&mut [f32]> {
    gradient.as_slice_mut().ok_or(Error::NotContiguous { rows: GRADIENT })
}

fn matrix<T>((rows, dim): (usize, usize), values: &[T]) -> Result<ArrayView2<'_, T>> {
    ArrayView2::from_shape((rows, dim), &values[..rows * dim])
        .map_err(|_| Error::NotContiguous { rows: "unit rows" })
}

/// A type of rows, read and written as single precision.
trait Entry: Copy + Default + Send + Sync {
    /// The row in single precision: itself, or converted into `buffer`.
    fn read<'a>(row: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];

    /// Lets `values` write the row in single precision, through `buffer` if the row is narrower.
    fn write(row: &mut [Self], buffer: &mut [f32], values: impl FnOnce(&mut [f32]));
}

impl Entry for f32 {
    #[inline(always)]
    fn read<'a>(row: &'a [Self], _buffer: &'a mut [f32]) -> &'a [f32] {
        row
    }

    #[inline(always)]
    fn write(row: &mut [Self], _buffer: &mut [f32], values: impl FnOnce(&mut [f32])) {
        values(row);
    }
}

macro_rules! narrow_entry {
    ($type:ty) => {
        impl Entry for $type {
            fn read<'a>(row: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
                row.convert_to_f32_slice(buffer);
                buffer
            }

            fn write(row: &mut [Self], buffer: &mut [f32], values: impl FnOnce(&mut [f32])) {
                values(buffer);
                row.convert_from_f32_slice(buffer);
            }
        }
    };
}

narrow_entry!(f16);
narrow_entry!(bf16);

fn normalise<T: Entry>(
    rows: &[T],
    (count, dim): (usize, usize),
    unit: &mut Vec<T>,
    lengths: &mut Vec<f64>,
    workers: Workers<'_>,
) {
    grow(unit, rows.len());
    lengths.resize(count, 0.0);
    let unit = unit[..rows.len()].chunks_mut(CHUNK * dim);
    let parts = rows.chunks(CHUNK * dim).zip(unit).zip(lengths.chunks_mut(CHUNK));
    workers.for_each_item(parts, |((rows, unit), lengths)| {
        Level::best().dispatch(Normalise { rows, dim, unit, lengths });
    });
}

fn normalize_backward<T: Entry>(
    rows: &[T],
    dim: usize,
    lengths: &[f64],
    gradient: &mut [f32],
    workers: Workers<'_>,
) {
    let gradient = gradient.chunks_mut(CHUNK * dim);
    let parts = rows.chunks(CHUNK * dim).zip(gradient).zip(lengths.chunks(CHUNK));
    workers.for_each_item(parts, |((rows, gradient), lengths)| {
        Level::best().dispatch(NormalizeBackward { rows, dim, lengths, gradient });
    });
}

struct Normalise<'a, T> {
    rows: &'a [T],
    dim: usize,
    unit: &'a mut [T],
    lengths: &'a mut [f64],
}

impl<T: Entry> Work for Normalise<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _simd: S) {
        let [mut read, mut written] = [(); 2].map(|()| vec![0.0; self.dim]);
        let rows = self.rows.chunks(self.dim).zip(self.unit.chunks_mut(self.dim));
        for ((row, unit), length) in rows.zip(self.lengths) {
            let row = T::read(row, &mut read);
            *length = length_of(row);
            let length = *length;
            T::write(unit, &mut written, |unit| {
                let both = unit.iter_mut().zip(row);
                if USUAL.contains(&length) {
                    let inverse = (1.0 / length) as f32;
                    both.for_each(|(unit, value)| *unit = value * inverse);
                } else if length.is_finite() {
                    // A row of zeros stays zero; the check reports it.
                    let divisor = if length > 0.0 { length } else { 1.0 };
                    both.for_each(|(unit, value)| *unit = (f64::from(*value) / divisor) as f32);
                } else {
                    unit.fill(f32::NAN);
                }
            });
        }
    }
}

#[inline(always)]
fn length_of(row: &[f32]) -> f64 {
    let length = square_sum(row).sqrt();
    if USUAL.contains(&length) || !length.is_finite() {
        return length;
    }
    double_square_sum(row).sqrt()
}

struct NormalizeBackward<'a, T> {
    rows: &'a [T],
    dim: usize,
    lengths: &'a [f64],
    gradient: &'a mut [f32],
}

impl<T: Entry> Work for NormalizeBackward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _simd: S) {
        let mut read = vec![0.0; self.dim];
        let rows = self.rows.chunks(self.dim).zip(self.gradient.chunks_mut(self.dim));
        for ((row, gradient), &length) in rows.zip(self.lengths) {
            let row = T::read(row, &mut read);
            if USUAL.contains(&length) {
                let inverse = (1.0 / length) as f32;
                let inward = dot(gradient, row) * inverse;
                for (g, value) in gradient.iter_mut().zip(row) {
                    *g = (*g - inward * (value * inverse)) * inverse;
                }
            } else if length > 0.0 {
                let unit = |value: &f32| f64::from(*value) / length;
                let inward: f64 =
                    gradient.iter().zip(row).map(|(g, value)| f64::from(*g) * unit(value)).sum();
                for (g, value) in gradient.iter_mut().zip(row) {
                    *g = ((f64::from(*g) - inward * unit(value)) / length) as f32;
                }
            } else {
                // A row of zeros has no derivative, and a NaN stays one.
                gradient.fill(if length == 0.0 { 0.0 } else { f32::NAN });
            }
        }
    }
}

/// A dot product in sixteen sums, which the compiler vectorises.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::super::CpuBackend;
    use crate::Error;
    use crate::backend::Backend;
    use crate::loss::{Batch, Embeddings, LossOutput, LossSettings, Rows, reference};
    use half::{bf16, f16};
    use ndarray::Array2;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Rows in float64 around a centre for each class, of different lengths around `scale`, and labels, of
    /// which some are ignored.
    fn drawn(count: usize, dim: usize, scale: f64, seed: u64) -> (Array2<f64>, Vec<i64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = |rows| Array2::from_shape_fn((rows, dim), |_| rng.random_range(-1.0..1.0f64));
        let labels: Vec<i64> = (0..count as i64).map(|i| if i % 13 == 12 { -1 } else { i % 6 }).collect();
        let centres = draw(6);
        let mut rows = 3.0 * draw(count);
        for (i, mut row) in rows.outer_iter_mut().enumerate() {
            row += &centres.row(i % 6);
            row *= scale * (1.0 + i as f64);
        }
        (rows, labels)
    }

    /// dL/dx from dL/du, u = x / |x|, in float64.
    fn by_hand(rows: &Array2<f64>, gradient: &Array2<f64>) -> Array2<f64> {
        let mut answer = gradient.clone();
        for (row, mut g) in rows.outer_iter().zip(answer.outer_iter_mut()) {
            let largest = row.fold(0.0f64, |most, x| most.max(x.abs()));
            let length = largest * row.map(|x| (x / largest).powi(2)).sum().sqrt();
            let unit = row.map(|x| x / length);
            let inward = g.dot(&unit);
            g.scaled_add(-inward, &unit);
            g /= length;
        }
        answer
    }

    fn worst(got: &Array2<f32>, want: &Array2<f64>) -> f64 {
        let largest = want.fold(0.0f64, |most, x| most.max(x.abs()));
        assert!(largest > 0.0);
        let errors = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs() / largest);
        // The largest in this order is a NaN, if there is one.
        errors.max_by(f64::total_cmp).unwrap()
    }

    fn check<'a>(embeddings: [Embeddings<'a>; 2], labels: [&'a [i64]; 2], bound: f64) {
        let [anchors, references] =
            [0, 1].map(|side| Rows { embeddings: embeddings[side], labels: labels[side] });
        let settings = LossSettings::default();
        let both = Batch::rectangular(anchors, references).with_reference_gradient();
        for batch in [Batch::square(embeddings[0], labels[0]), both] {
            let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
            backend.normalized_loss(&batch, &settings, &mut output).unwrap();
            // The truth for the rows that the backend has normalised.
            let unit = backend.unit.batch(&batch).unwrap();
            let truth = reference(&unit, &settings).unwrap();
            assert!(
                truth.active() > 5 && (output.loss - truth.weighted.loss).abs() < 1e-5 * truth.weighted.loss
            );
            let error = worst(&output.gradient, &by_hand(&embeddings[0].to_f64(), &truth.gradient));
            assert!(error < bound, "{error}");
            if let (Some(got), Some(want)) = (&output.reference_gradient, &truth.reference_gradient) {
                let error = worst(got, &by_hand(&embeddings[1].to_f64(), want));
                assert!(error < bound, "{error}");
            }
            let again = CpuBackend::new().loss(&unit, &settings, &mut output);
            assert!(again.is_ok(), "of unit length");
        }
    }

    #[test]
    fn gradients_are_those_of_rows_as_they_were_given() {
        for (dim, scale) in [(37, 1.0), (130, 1e-2), (16, 1e28), (5, 1e36), (16, 1e-28), (33, 1e-35)] {
            let ((rows, labels), (others, other_labels)) =
                (drawn(70, dim, scale, 1), drawn(41, dim, scale, 2));
            let single = [&rows, &others].map(|rows| rows.mapv(|x| x as f32));
            check([0, 1].map(|side| single[side].view().into()), [&labels, &other_labels], 2e-5);
        }
        let ((rows, labels), (others, other_labels)) = (drawn(70, 37, 1.0, 1), drawn(41, 37, 1.0, 2));
        let half = [&rows, &others].map(|rows| rows.mapv(f16::from_f64));
        check([0, 1].map(|side| Embeddings::F16(half[side].view())), [&labels, &other_labels], 1e-3);
        let brain = [&rows, &others].map(|rows| rows.mapv(bf16::from_f64));
        check([0, 1].map(|side| Embeddings::Bf16(brain[side].view())), [&labels, &other_labels], 1e-2);
    }

    #[test]
    fn rows_without_a_direction_are_named() {
        let (rows, labels) = drawn(70, 37, 1.0, 3);
        let good = rows.mapv(|x| x as f32);
        for (value, message) in
            [(0.0, "row 40 of the anchors is all zeros"), (f32::INFINITY, "row 40 of the anchors holds")]
        {
            let mut rows = good.clone();
            rows.row_mut(40).fill(value);
            let (batch, mut output) = (Batch::square(rows.view(), &labels), LossOutput::default());
            let error = CpuBackend::new().normalized_loss(&batch, &LossSettings::default(), &mut output);
            assert!(error.unwrap_err().to_string().starts_with(message));
            let batch = batch.trusted();
            CpuBackend::new().normalized_loss(&batch, &LossSettings::default(), &mut output).unwrap();
        }
    }

    #[test]
    fn rows_without_entries_and_gradients_of_another_length_are_refused() {
        let mut backend = CpuBackend::new();
        let empty = Array2::<f32>::zeros((3, 0));
        let refused = backend.normalize(&Rows::new(empty.view(), &[0, 1, 2])).map(drop);
        assert!(matches!(refused, Err(Error::Empty { .. })));
        let rows = Array2::<f32>::ones((3, 2));
        let rows = Rows::new(rows.view(), &[0, 1, 2]);
        for entries in [5, 7] {
            let refused = backend.normalize_backward(&rows, &mut vec![0.0; entries]);
            assert!(matches!(refused, Err(Error::LengthMismatch { expected: 6, .. })), "{entries}");
        }
        backend.normalize_backward(&rows, &mut [0.0; 6]).unwrap();
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let (rows, labels) = drawn(300, 65, 1.0, 4);
        let rows = rows.mapv(|x| x as f32);
        let batch = Batch::square(rows.view(), &labels);
        let outputs = [1, 2, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut output = LossOutput::default();
            let settings = LossSettings::default();
            pool.install(|| CpuBackend::new().normalized_loss(&batch, &settings, &mut output)).unwrap();
            output
        });
        assert!(outputs[0].active > 100);
        assert!(outputs.iter().all(|output| output == &outputs[0]));
    }
}
