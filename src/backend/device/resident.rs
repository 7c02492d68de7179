//! Rows that are in the device's memory already: no copy of them, and none of the gradient.

use half::{bf16, f16};
use ndarray::aview2;

use super::loss::{Ends, Launcher, RowCheck, download_anchors, download_scalars, issue};
use super::plan::Shape;
use super::{Device, DeviceBackend, Precision};
use crate::loss::{Embeddings, Hypergradient, LossOutput, LossSettings, UnitCheck};
use crate::{Error, Result};

/// Type of the rows behind an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResidentType {
    /// Single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Brain floating point.
    Bf16,
}

/// One side of a batch: device addresses of rows, labels and the gradient to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentRows {
    /// Rows B or N.
    pub count: usize,
    /// `[count, dim]` in the batch's type, row-major without gaps.
    pub embeddings: u64,
    /// `[count]`, i64.
    pub labels: u64,
    /// `[count, dim]`, f32, where dL/d(rows) goes. For references 0 means that it is not wanted.
    pub gradient: u64,
}

/// Anchors against references, all in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentBatch {
    /// Dimensions D.
    pub dim: usize,
    /// Type of the rows of both sides.
    pub dtype: ResidentType,
    /// The rows the loss is averaged over.
    pub anchors: ResidentRows,
    /// The rows they are compared with; `None` means the anchors.
    pub references: Option<ResidentRows>,
    /// Whether rows are checked first.
    pub check: UnitCheck,
}

impl ResidentType {
    /// A matrix of this type without rows: it knows the type's precision and tolerance.
    fn empty(self) -> Embeddings<'static> {
        match self {
            Self::F32 => Embeddings::F32(aview2::<f32, 0>(&[])),
            Self::F16 => Embeddings::F16(aview2::<f16, 0>(&[])),
            Self::Bf16 => Embeddings::Bf16(aview2::<bf16, 0>(&[])),
        }
    }
}

impl ResidentBatch {
    fn shape(&self, exact: bool) -> Shape {
        Shape {
            anchors: self.anchors.count,
            references: self.references.map(|rows| rows.count),
            dim: self.dim,
            precision: Precision::of(&self.dtype.empty(), exact),
            reference_gradient: self.references.is_some_and(|rows| rows.gradient != 0),
        }
    }

    fn validate(&self) -> Result<()> {
        let sides = [("anchors", Some(self.anchors)), ("references", self.references)];
        for (name, rows) in sides {
            let Some(rows) = rows else { continue };
            if rows.count == 0 || self.dim == 0 {
                return Err(Error::Empty { rows: name });
            }
            let element = if self.dtype == ResidentType::F32 { 4 } else { 2 };
            aligned("embeddings", rows.embeddings, element)?;
            aligned("labels", rows.labels, 8)?;
            if name == "anchors" || rows.gradient != 0 {
                aligned("gradient", rows.gradient, 4)?;
            }
        }
        Ok(())
    }
}

fn aligned(name: &'static str, address: u64, alignment: u64) -> Result<()> {
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
    /// [`Backend::loss`](crate::backend::Backend::loss) on device memory, without copies: the gradient is written where the
    /// batch says. Returns when it is there. Only the scalars of `output` are
    /// filled; its gradients and values per anchor are left empty.
    ///
    /// # Errors
    /// As [`Backend::loss`](crate::backend::Backend::loss), and [`Error::InvalidSetting`] for an address that is null or not aligned.
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
        self.remembered = None;
        settings.validate()?;
        batch.validate()?;
        let shape = batch.shape(self.options.exact);
        shape.check()?;
        let loss = self.begin(shape, settings, true)?;
        let ends = |rows: &ResidentRows| Ends {
            rows: rows.embeddings,
            labels: rows.labels,
            gradient: rows.gradient,
        };
        let both = [ends(&batch.anchors), ends(batch.references.as_ref().unwrap_or(&batch.anchors))];
        let check = RowCheck { check: batch.check, tolerance: batch.dtype.empty().norm_tolerance() };
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &loss.layout.layout)?;
        let base = device.address(buffer);
        issue(&mut Launcher { device: &mut *device, shape }, base, &loss, both, check)?;
        *output = LossOutput::default();
        download_scalars(device, buffer, &loss, check.tolerance, output)?;
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

    /// [`Backend::hypergradient`](crate::backend::Backend::hypergradient) with f32 tangents in device memory, `[B, D]` and `[N, D]`;
    /// 0 for the references' means zero. They are not checked for NaN.
    ///
    /// # Errors
    /// As [`Backend::hypergradient`](crate::backend::Backend::hypergradient), and [`Error::InvalidSetting`] for an address that is null or
    /// not aligned.
    ///
    /// # Safety
    /// As [`loss_resident`](Self::loss_resident), for the tangents; only the batch's shape is looked at.
    pub unsafe fn hypergradient_resident(
        &mut self,
        batch: &ResidentBatch,
        tangents: [u64; 2],
    ) -> Result<Hypergradient> {
        aligned("tangent", tangents[0], 4)?;
        if tangents[1] != 0 {
            aligned("reference tangent", tangents[1], 4)?;
        }
        self.sum_threshold(batch.shape(self.options.exact), |_, _, _| Ok(tangents))
    }
}
