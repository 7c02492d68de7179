//! Checks of the threshold gradient's arguments: the batch of the last loss, and tangents of its size.

use ndarray::ArrayView2;

use super::{Batch, same_length};
use crate::{Error, Result};

/// Rows and dimensions of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchSize {
    /// B.
    pub anchors: usize,
    /// N; `None` in the square form.
    pub references: Option<usize>,
    /// D.
    pub dim: usize,
}

/// The side that a tangent, `[B, D]` or `[N, D]`, belongs to. A tangent is the derivative of rows, dE/dt.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TangentOf {
    Anchors,
    References,
}

impl BatchSize {
    pub fn of(batch: &Batch<'_>) -> Self {
        let embeddings = &batch.anchors.embeddings;
        Self {
            anchors: embeddings.rows(),
            references: batch.references.map(|rows| rows.embeddings.rows()),
            dim: embeddings.dim(),
        }
    }

    /// Checks that `given` has the size of `self`, the batch of the last loss.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`].
    pub fn is_of_last(self, given: Self) -> Result<()> {
        same_length("anchors of the last loss", self.anchors, given.anchors)?;
        same_length("dimension of the last loss", self.dim, given.dim)?;
        let references = |size: Self| size.references.unwrap_or(0);
        same_length("references of the last loss", references(self), references(given))
    }

    /// Checks the shape of one side's tangent.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`].
    pub fn check_tangent_size(self, side: TangentOf, (rows, dim): (usize, usize)) -> Result<()> {
        let (rows_of, dim_of, expected) = match side {
            TangentOf::Anchors => ("rows of the tangent", "dimension of the tangent", self.anchors),
            TangentOf::References => {
                let expected = self.references.unwrap_or(self.anchors);
                ("rows of the reference tangent", "dimension of the reference tangent", expected)
            }
        };
        same_length(rows_of, expected, rows)?;
        same_length(dim_of, self.dim, dim)
    }

    /// Checks the shape of one side's tangent, and that it is finite.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`], [`Error::NotFinite`].
    pub fn check_tangent(self, side: TangentOf, tangent: &ArrayView2<'_, f32>) -> Result<()> {
        self.check_tangent_size(side, tangent.dim())?;
        let rows = match side {
            TangentOf::Anchors => "tangent",
            TangentOf::References => "reference tangent",
        };
        let bad = tangent.outer_iter().position(|row| !row.iter().all(|value| value.is_finite()));
        bad.map_or(Ok(()), |row| Err(Error::NotFinite { rows, row }))
    }
}
