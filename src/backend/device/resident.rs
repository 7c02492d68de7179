//! Calls on rows that are in device memory: neither rows nor gradients are copied.

use bytemuck::cast_slice_mut;

use super::enqueue::{ResidentIdentity, ResidentPart, ResidentSettings};
use super::passes::Passes;
use super::retrieval::Searched;
use super::shape::Shape;
use super::transfer::{
    IdentityAt, Input, RowTolerance, SideAddresses, download_anchors, download_scalars, download_terms,
};
use super::{Device, DeviceBackend, Precision};
use crate::backend::{Nearest, Picked};
use crate::loss::{ElementType, LossOutput, LossSettings, ThresholdGradient, UnitCheck};
use crate::{Error, Result};

/// One side of a batch: device addresses of rows, labels and the gradient to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentRows {
    /// Number of rows, B or N.
    pub count: usize,
    /// `[count, dim]` in the batch's type, row-major without gaps.
    pub embeddings: u64,
    /// `[count]`, i64.
    pub labels: u64,
    /// `[count, dim]`, f32: receives dL/d(rows). For references 0 means not wanted.
    pub gradient: u64,
}

/// Anchors against references, all in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentBatch {
    /// Dimensions D.
    pub dim: usize,
    /// Type of the rows of both sides.
    pub dtype: ElementType,
    /// The rows the loss is averaged over.
    pub anchors: ResidentRows,
    /// The rows they are compared with; `None` means the anchors.
    pub references: Option<ResidentRows>,
    /// Whether rows are checked first.
    pub check: UnitCheck,
}

impl ResidentBatch {
    pub(super) fn shape(&self, tf32: bool) -> Shape {
        let precision = Precision::of(self.dtype, tf32);
        Shape {
            references: self.references.map(|rows| rows.count),
            reference_gradient: self.references.is_some_and(|rows| rows.gradient != 0),
            ..Shape::square(self.anchors.count, self.dim, precision)
        }
    }

    /// Addresses of a loss's input; anchors among the references are recognised by value.
    pub(super) fn input(&self) -> Input {
        let addresses = |rows: &ResidentRows| SideAddresses {
            rows: rows.embeddings,
            labels: rows.labels,
            gradient: rows.gradient,
        };
        let both = [&self.anchors, self.references.as_ref().unwrap_or(&self.anchors)];
        Input { addresses: both.map(addresses), check: self.row_check(), identity: IdentityAt::default() }
    }

    fn row_check(&self) -> RowTolerance {
        RowTolerance { check: self.check, tolerance: self.dtype.norm_tolerance() }
    }

    /// The sides that there are, with their names in messages; `first` names the anchors.
    fn sides(&self, first: &'static str) -> impl Iterator<Item = (&'static str, ResidentRows)> {
        let references = self.references.map(|rows| ("references", rows));
        [Some((first, self.anchors)), references].into_iter().flatten()
    }

    fn validate_rows(&self, first: &'static str) -> Result<()> {
        for (name, rows) in self.sides(first) {
            if rows.count == 0 || self.dim == 0 {
                return Err(Error::Empty { rows: name });
            }
            aligned("embeddings", rows.embeddings, self.dtype.bytes() as u64)?;
        }
        Ok(())
    }

    fn validate_picked(&self, picked: &[u32]) -> Result<()> {
        let absent = |&&row: &&u32| self.references.is_some() || row as usize >= self.anchors.count;
        picked.iter().find(absent).map_or(Ok(()), |row| {
            let range = "rows of a batch in the square form";
            Err(Error::InvalidSetting { name: "picked", value: row.to_string(), range })
        })
    }

    /// One side of a search, or its `picked` rows; `all` is the shape of the whole batch.
    fn searched<'a>(
        &self,
        name: &'static str,
        rows: &ResidentRows,
        picked: Option<&'a [u32]>,
        all: Shape,
    ) -> Result<Searched<'a>> {
        self.validate_picked(picked.unwrap_or_default())?;
        let count = picked.map_or(rows.count, <[u32]>::len);
        if count == 0 {
            return Err(Error::Empty { rows: name });
        }
        let (shape, check) = (Shape { anchors: count, ..all }, self.row_check());
        Ok(Searched { name, shape, check, resident: true, picked: picked.map(|picked| (picked, rows.count)) })
    }

    pub(super) fn validate(&self) -> Result<()> {
        self.validate_rows("anchors")?;
        for (name, rows) in self.sides("anchors") {
            aligned("labels", rows.labels, 8)?;
            if name == "anchors" || rows.gradient != 0 {
                aligned("gradient", rows.gradient, 4)?;
            }
        }
        Ok(())
    }
}

pub(super) fn aligned(name: &'static str, address: u64, alignment: u64) -> Result<()> {
    if address != 0 && address.is_multiple_of(alignment) {
        return Ok(());
    }
    Err(Error::InvalidSetting {
        name,
        value: format!("{address:#x}"),
        range: "an address in device memory, aligned to its elements",
    })
}

impl<D: Device> DeviceBackend<D> {
    /// [`Backend::loss`](crate::backend::Backend::loss) on device memory, without copies: the gradient is
    /// written where the batch says, and is complete on return. Only the scalars of `output` are filled; its
    /// gradients and values per anchor are left empty.
    ///
    /// # Errors
    /// As [`Backend::loss`](crate::backend::Backend::loss), and [`Error::InvalidSetting`] for an address that
    /// is null or not aligned.
    ///
    /// # Safety
    /// Every address must lead to live memory of this device, of the length its
    /// field states, whose content is complete on the device's stream, and nothing else may
    /// write to it until this returns. The gradients must not overlap anything else.
    pub unsafe fn loss_resident(
        &mut self,
        batch: &ResidentBatch,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let (identity, total) = (ResidentIdentity::ByValue, batch.anchors.count);
        let whole = ResidentPart { batch: *batch, identity, total, normalize: false };
        let settings = ResidentSettings { settings: *settings, lambda: 0 };
        let loss = self.begin_resident(&whole, &settings, false)?;
        let input = whole.input();
        let (buffer, device) = self.resumed(&loss)?;
        let mut passes = Passes::new(&mut *device, buffer, &loss);
        passes.whole_loss(&input, passes.scalars())?;
        *output = LossOutput::default();
        download_scalars(device, buffer, &loss, input.check.tolerance, output)?;
        self.remembered = Some(loss);
        Ok(())
    }

    /// Fills in the values per anchor (`min_pos`, `max_neg`, `count_pos`, `count_neg`) of the last loss,
    /// which [`loss_resident`](Self::loss_resident) leaves on the device.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] without a loss before it; [`Error::Device`] if a copy fails.
    pub fn anchors_of_last_loss(&mut self, output: &mut LossOutput) -> Result<()> {
        let Self { device, loss, remembered, .. } = self;
        let (Some(remembered), Some(buffer)) = (remembered, loss.buffer()) else {
            return Err(Error::OutOfOrder("the values of the anchors need a loss before them"));
        };
        download_anchors(device, buffer, remembered, output)
    }

    /// Each anchor's term of the last loss, and whether its gradient is a product of tiles; otherwise it was
    /// summed pair by pair.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] without a loss before it; [`Error::Device`] if a copy fails.
    pub fn terms_of_last_loss(&mut self) -> Result<(Vec<f64>, Vec<bool>)> {
        let Self { device, loss, remembered, .. } = self;
        let (Some(remembered), Some(buffer)) = (remembered, loss.buffer()) else {
            return Err(Error::OutOfOrder("the terms of the loss need a loss before them"));
        };
        download_terms(device, buffer, remembered)
    }

    /// [`Backend::threshold_gradient`](crate::backend::Backend::threshold_gradient) with f32 tangents in
    /// device memory, `[B, D]` and `[N, D]`; address 0 for the references means zero. NaN is not checked for.
    ///
    /// # Errors
    /// As [`Backend::threshold_gradient`](crate::backend::Backend::threshold_gradient), and
    /// [`Error::InvalidSetting`] for an address that is null or not aligned.
    ///
    /// # Safety
    /// As [`loss_resident`](Self::loss_resident), for the tangents; of the batch only the shape is used.
    pub unsafe fn threshold_gradient_resident(
        &mut self,
        batch: &ResidentBatch,
        tangents: [u64; 2],
    ) -> Result<ThresholdGradient> {
        aligned("tangent", tangents[0], 4)?;
        if tangents[1] != 0 {
            aligned("reference tangent", tangents[1], 4)?;
        }
        // In the square form the anchors' tangent is that of both sides.
        let tangents = [tangents[0], if batch.references.is_some() { tangents[1] } else { 0 }];
        self.sum_threshold(batch.shape(self.tf32), true, |_, _, _| Ok(tangents))
    }

    /// [`Backend::nearest`](crate::backend::Backend::nearest) on device memory, without a copy of the rows;
    /// the lists are returned to the host. Labels and gradients of the batch are ignored; its `check`
    /// applies.
    ///
    /// With `picked`, for the square form only, there is a list for each of `picked.queries`, which holds
    /// indices into `picked.gallery` (of the batch if that is `None`). Only these rows are checked, and
    /// errors name rows of the batch.
    ///
    /// # Errors
    /// As [`Backend::nearest`](crate::backend::Backend::nearest), and [`Error::InvalidSetting`] for an
    /// address that is null or not aligned, for a picked row that the batch does not have, and for picked
    /// rows of a batch with references.
    ///
    /// # Safety
    /// As [`loss_resident`](Self::loss_resident), for the embeddings.
    pub unsafe fn nearest_resident(
        &mut self,
        batch: &ResidentBatch,
        picked: Option<&Picked<'_>>,
        k: usize,
    ) -> Result<Nearest> {
        batch.validate_rows("queries")?;
        let all = Shape { references: None, ..batch.shape(self.tf32) };
        let queries = batch.searched("queries", &batch.anchors, picked.map(|picked| picked.queries), all)?;
        let gallery = match (picked, &batch.references) {
            (Some(picked), _) => Some(("queries", &batch.anchors, picked.gallery)),
            (None, Some(references)) => Some(("references", references, None)),
            (None, None) => None,
        };
        let there = |address: u64| move |_: &mut D, _: &mut D::Buffer, _| Ok(address);
        let place = there(batch.anchors.embeddings);
        let Some((name, rows, listed)) = gallery else { return self.find(&queries, None, k, &place) };
        let side = batch.searched(name, rows, listed, all)?;
        self.with_gallery(&side, &there(rows.embeddings), |backend, gallery| {
            backend.find(&queries, Some(gallery), k, &place)
        })
    }

    /// Copies the labels of rows in device memory to the host.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for an address that is null or not aligned; [`Error::OutOfMemory`] if the
    /// host cannot hold them; [`Error::Device`] if the copy fails.
    ///
    /// # Safety
    /// As [`loss_resident`](Self::loss_resident), for the labels.
    pub unsafe fn labels_resident(&mut self, rows: &ResidentRows) -> Result<Vec<i64>> {
        aligned("labels", rows.labels, 8)?;
        let mut labels = Vec::new();
        if labels.try_reserve_exact(rows.count).is_err() {
            let bytes = rows.count.saturating_mul(size_of::<i64>());
            return Err(Error::OutOfMemory { what: "labels", bytes });
        }
        labels.resize(rows.count, 0);
        // SAFETY: handed on to the caller.
        unsafe { self.device.download_from(rows.labels, cast_slice_mut(&mut labels)) }?;
        Ok(labels)
    }
}
