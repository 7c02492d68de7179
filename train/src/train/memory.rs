//! Cross-batch memory: a batch is also compared with embeddings of earlier batches (Wang et al., CVPR 2020).
//!
//! The anchors are the batch's rows; the references are the batch's rows followed by those of the memory. The
//! memory is constant and gets no gradient. The batch's rows get one both as anchors and as references, so
//! that an empty memory gives the loss and gradient of the square form. Since they are the first references,
//! no row is paired with itself.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use super::checkpoint::archive::Archive;
use super::pair_loss::PairLoss;
use super::parts::Part;
use crate::Result;
use crate::ranks::Collective;
use ddtas::backend::Backend;
use ddtas::loss::{Batch, Identity, LossOutput, LossSettings, Rows, ThresholdGradient};

/// Embeddings and labels of the last batches, oldest first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Memory {
    capacity: usize,
    /// Step from which on rows are kept.
    start: usize,
    dim: usize,
    /// `[rows, dim]`, row-major.
    embeddings: Vec<f32>,
    labels: Vec<i64>,
}

/// A batch's rows, followed by those of the memory.
struct References {
    embeddings: Array2<f32>,
    labels: Vec<i64>,
}

impl Memory {
    /// An empty memory for `capacity` rows of `dim` dimensions, filled from step `start` on. With capacity 0
    /// it stays empty.
    #[must_use]
    pub fn new(capacity: usize, start: usize, dim: usize) -> Self {
        Self { capacity, start, dim, ..Self::default() }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Adds the rows of the batch of `step`, and drops the oldest rows beyond the capacity.
    pub fn push(&mut self, step: usize, embeddings: ArrayView2<'_, f32>, labels: &[i64]) {
        // A resumed run may have more steps and so a later start; a memory that has rows is filled all the same.
        if self.capacity == 0 || step < self.start && self.is_empty() {
            return;
        }
        self.embeddings.extend(embeddings.iter());
        self.labels.extend(labels);
        let surplus = self.labels.len().saturating_sub(self.capacity);
        self.labels.drain(..surplus);
        self.embeddings.drain(..surplus * self.dim);
    }

    /// Evaluates the loss of a batch against itself and the memory; the gradient is that of the batch's rows, `[B, dim]`.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn loss(
        &self,
        backend: &mut dyn Backend,
        pair_loss: PairLoss,
        rows: (ArrayView2<'_, f32>, &[i64]),
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let (embeddings, labels) = rows;
        if self.is_empty() {
            return Ok(pair_loss.evaluate(backend, &Batch::square(embeddings, labels), settings, output)?);
        }
        let references = self.references(embeddings, labels)?;
        let batch = references.batch(embeddings, labels).with_reference_gradient();
        pair_loss.evaluate(backend, &batch, settings, output)?;
        if let Some(back) = &output.reference_gradient {
            output.gradient += &back.slice(s![..labels.len(), ..]);
        }
        Ok(())
    }

    /// The sums of SPEC 5 over the pairs of the last [`loss`](Memory::loss), which must have been of the same
    /// batch. `tangent` is edot of the batch's rows, `[B, dim]`; that of the memory is 0.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn threshold_gradient(
        &self,
        backend: &mut dyn Backend,
        rows: (ArrayView2<'_, f32>, &[i64]),
        tangent: ArrayView2<'_, f32>,
    ) -> Result<ThresholdGradient> {
        let (embeddings, labels) = rows;
        if self.is_empty() {
            return Ok(backend.threshold_gradient(&Batch::square(embeddings, labels), tangent, None)?);
        }
        let references = self.references(embeddings, labels)?;
        let mut moving = Array2::zeros(references.embeddings.dim());
        moving.slice_mut(s![..labels.len(), ..]).assign(&tangent);
        let batch = references.batch(embeddings, labels).with_reference_gradient();
        Ok(backend.threshold_gradient(&batch, tangent, Some(moving.view()))?)
    }

    /// [`loss`](Memory::loss) on one or more ranks, each with the rows `own` of the batch and their gradient.
    /// Returns whether any gradient is non-zero.
    ///
    /// # Errors
    /// Errors of the backend and of the ranks.
    pub(super) fn loss_on_ranks(
        &self,
        (ranks, own): (&dyn Collective, Range<usize>),
        backend: &mut dyn Backend,
        pair_loss: PairLoss,
        rows: (ArrayView2<'_, f32>, &[i64]),
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<bool> {
        let (embeddings, labels) = rows;
        if ranks.size() > 1 && pair_loss == PairLoss::SoftContrastive {
            let references = self.references(embeddings, labels)?;
            return references.part(labels.len(), own, ranks).loss(backend, settings, output);
        }
        self.loss(backend, pair_loss, rows, settings, output)?;
        let any = output.gradient.iter().any(|&entry| entry != 0.0);
        if own.len() < labels.len() {
            // The other losses cannot be divided: every rank evaluates the whole loss.
            output.gradient = output.gradient.slice(s![own, ..]).to_owned();
        }
        Ok(any)
    }

    /// [`threshold_gradient`](Memory::threshold_gradient) after [`loss_on_ranks`](Memory::loss_on_ranks);
    /// `tangent` is that of the rows `own`.
    ///
    /// # Errors
    /// Errors of the backend and of the ranks.
    pub(super) fn threshold_gradient_on_ranks(
        &self,
        (ranks, own): (&dyn Collective, Range<usize>),
        backend: &mut dyn Backend,
        rows: (ArrayView2<'_, f32>, &[i64]),
        tangent: ArrayView2<'_, f32>,
    ) -> Result<ThresholdGradient> {
        if ranks.size() == 1 {
            return self.threshold_gradient(backend, rows, tangent);
        }
        let (embeddings, labels) = rows;
        let references = self.references(embeddings, labels)?;
        references.part(labels.len(), own, ranks).threshold_gradient(backend, tangent)
    }

    fn references(&self, embeddings: ArrayView2<'_, f32>, labels: &[i64]) -> Result<References> {
        let rows = labels.len() + self.len();
        let values = embeddings.iter().chain(&self.embeddings).copied().collect();
        let joined = Array2::from_shape_vec((rows, self.dim), values);
        let embeddings = joined.map_err(|_| ddtas::Error::LengthMismatch {
            what: "dimensions of the embeddings beside the memory",
            expected: self.dim,
            got: embeddings.ncols(),
        })?;
        Ok(References { embeddings, labels: [labels, self.labels.as_slice()].concat() })
    }

    /// Adds the rows to a checkpoint.
    pub(super) fn put(&self, archive: &mut Archive) {
        if !self.is_empty() {
            archive.put_numbers(EMBEDDINGS, &[self.len(), self.dim], &self.embeddings);
            archive.put_numbers(LABELS, &[self.len()], &self.labels);
        }
    }

    /// Restores the rows from a checkpoint; the error says what does not fit.
    pub(super) fn take(&mut self, archive: &mut Archive) -> std::result::Result<(), String> {
        let found = (archive.take_numbers::<f32>(EMBEDDINGS), archive.take_numbers::<i64>(LABELS));
        match found {
            (None, None) => Ok(()),
            (Some((shape, embeddings)), Some((_, labels)))
                if shape == [labels.len(), self.dim] && labels.len() <= self.capacity =>
            {
                (self.embeddings, self.labels) = (embeddings, labels);
                Ok(())
            }
            _ => Err("the cross-batch memory does not fit --memory-size and --embedding-dim".into()),
        }
    }
}

/// Names of the rows and labels in a checkpoint.
const EMBEDDINGS: &str = "memory.embeddings";
const LABELS: &str = "memory.labels";

impl References {
    fn batch<'a>(&'a self, embeddings: ArrayView2<'a, f32>, labels: &'a [i64]) -> Batch<'a> {
        let anchors = Rows::new(embeddings, labels);
        Batch::rectangular(anchors, Rows::new(self.embeddings.view(), &self.labels))
            .with_identity(Identity::From(0))
    }

    fn part<'a>(&'a self, total: usize, own: Range<usize>, ranks: &'a dyn Collective) -> Part<'a> {
        Part { references: (self.embeddings.view(), &self.labels), total, own, ranks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn every_row_of_the_batch_is_the_reference_that_its_identity_names() {
        let mut memory = Memory::new(3, 0, 2);
        memory.push(0, array![[0.0, 1.0], [1.0, 0.0]].view(), &[4, 5]);
        let (rows, labels) = (array![[0.6, 0.8], [0.8, 0.6]], [5, 6]);
        let references = memory.references(rows.view(), &labels).unwrap();
        let batch = references.batch(rows.view(), &labels);
        batch.validate().unwrap();
        for (i, row) in rows.outer_iter().enumerate() {
            let named = batch.identity.of(i).unwrap();
            assert_eq!((references.embeddings.row(named), references.labels[named]), (row, labels[i]));
        }
    }
}
