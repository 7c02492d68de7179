//! Copies to the device (rows, labels, identity) and back (scalars, results of the anchors, gradients).

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use ndarray::Array2;

use super::Device;
use super::layout::{LossLayout, SideRegions};
use super::params::TILE;
use super::remembered::Remembered;
use super::shape::tiles;
use super::workspace::Region;
use crate::loss::{Batch, Embeddings, Identity, LossOutput, LossScalars, Rows, UnitCheck, check_unit};
use crate::{Error, Result};

/// The `NO_ROW` of params.h, which C writes as an unsigned literal.
pub(super) const NO_ROW: u32 = u32::MAX;

/// The bytes of a contiguous matrix.
pub(super) fn matrix_bytes<'a>(embeddings: &'a Embeddings<'_>, rows: &'static str) -> Result<&'a [u8]> {
    let bytes = match embeddings {
        Embeddings::F32(m) => m.as_slice().map(cast_slice),
        Embeddings::F16(m) => m.as_slice().map(cast_slice),
        Embeddings::Bf16(m) => m.as_slice().map(cast_slice),
    };
    bytes.ok_or(Error::NotContiguous { rows })
}

/// Addresses of a loss's rows, and how they are checked and identified.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    /// Of the anchors, and of the references.
    pub(super) addresses: [SideAddresses; 2],
    pub(super) check: RowTolerance,
    pub(super) identity: IdentityAt,
}

/// Addresses of one side's input and gradient, in the workspace or in the caller's memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct SideAddresses {
    pub(super) rows: u64,
    pub(super) labels: u64,
    pub(super) gradient: u64,
}

impl SideRegions {
    pub(super) fn addresses(&self, base: u64) -> SideAddresses {
        let address = |region: Region| base + region.offset as u64;
        SideAddresses {
            rows: address(self.input),
            labels: address(self.labels),
            gradient: address(self.gradient),
        }
    }
}

/// Whether rows are checked, and how far their norms may be from 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowTolerance {
    pub(super) check: UnitCheck,
    pub(super) tolerance: f64,
}

/// How kernels learn which reference is an anchor.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct IdentityAt {
    /// Reference `first + i` is anchor i.
    pub(super) first: u64,
    /// The address of a list, which takes precedence; or 0.
    pub(super) list: u64,
}

/// Copies rows, labels and identity to the device.
pub(super) fn upload<D: Device>(
    device: &mut D,
    buffer: &mut D::Buffer,
    layout: &LossLayout,
    batch: &Batch<'_>,
) -> Result<Input> {
    upload_rows(device, buffer, &layout.anchors, &batch.anchors, "anchors")?;
    if let Some(references) = &batch.references {
        upload_rows(device, buffer, &layout.references, references, "references")?;
    }
    let base = device.address(buffer);
    let mut identity = IdentityAt::default();
    match batch.identity {
        Identity::ByValue => {}
        Identity::From(first) => identity.first = first as u64,
        Identity::List(list) if layout.identity_list.bytes > 0 => {
            device.upload(buffer, layout.identity_list.offset, cast_slice(list))?;
            identity.list = base + layout.identity_list.offset as u64;
        }
        Identity::List(_) => {}
    }
    let check = RowTolerance { check: batch.check, tolerance: batch.anchors.embeddings.norm_tolerance() };
    Ok(Input {
        addresses: [layout.anchors.addresses(base), layout.references.addresses(base)],
        check,
        identity,
    })
}

fn upload_rows<D: Device>(
    device: &mut D,
    buffer: &mut D::Buffer,
    regions: &SideRegions,
    rows: &Rows<'_>,
    name: &'static str,
) -> Result<()> {
    device.upload(buffer, regions.input.offset, matrix_bytes(&rows.embeddings, name)?)?;
    device.upload(buffer, regions.labels.offset, cast_slice(rows.labels))
}

/// Waits for the scalars; refuses bad rows.
pub(super) fn download_scalars<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
    tolerance: f64,
    output: &mut LossOutput,
) -> Result<()> {
    let layout = &loss.layout;
    // u64s, so that the struct's alignment is met.
    let mut words = [0u64; size_of::<LossScalars>() / size_of::<u64>()];
    device.download(buffer, layout.scalars.offset, cast_slice_mut(&mut words))?;
    let scalars: LossScalars = bytemuck::cast(words);
    for (rows, row) in [("anchors", scalars.bad_anchor), ("references", scalars.bad_reference)] {
        if row != NO_ROW {
            check_unit(rows, row as usize, scalars.bad_square_sum, tolerance)?;
        }
    }
    output.set_scalars(&scalars);
    Ok(())
}

/// Downloads the results per anchor.
pub(super) fn download_anchors<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
    output: &mut LossOutput,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let rows = shape.anchors;
    download_list(device, buffer, layout.min_pos, rows, &mut output.min_pos)?;
    download_list(device, buffer, layout.max_neg_out, rows, &mut output.max_neg)?;
    download_list(device, buffer, layout.count_pos, rows, &mut output.count_pos)?;
    download_list(device, buffer, layout.count_neg, rows, &mut output.count_neg)
}

/// Downloads a number for each of `rows` rows.
pub(super) fn download_list<D: Device, T: Pod>(
    device: &mut D,
    buffer: &D::Buffer,
    region: Region,
    rows: usize,
    list: &mut Vec<T>,
) -> Result<()> {
    list.resize(rows, T::zeroed());
    device.download(buffer, region.offset, cast_slice_mut(list))
}

/// Downloads each anchor's term of the loss, and whether its row tile's gradient was computed by tiles; in
/// the caller's order.
pub(super) fn download_terms<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
) -> Result<(Vec<f64>, Vec<bool>)> {
    let Remembered { shape, layout, settings, .. } = loss;
    let rows = shape.anchors;
    let mut sums = vec![0i64; 5 * rows];
    device.download(buffer, layout.sums.offset, cast_slice_mut(&mut sums))?;
    let (wide, counts) = sums.split_at(4 * rows);
    let counts: &[u32] = cast_slice(counts);
    let mut order = vec![0u32; rows];
    device.download(buffer, layout.anchors.order.offset, cast_slice_mut(&mut order))?;
    let mut by_lists = vec![0u8; tiles(rows)];
    device.download(buffer, layout.anchors.by_lists.offset, &mut by_lists)?;
    let (mut terms, mut by_tiles) = (vec![0.0; rows], vec![false; rows]);
    for (row, original) in order.into_iter().enumerate() {
        let original = original as usize;
        by_tiles[original] = by_lists[row / TILE as usize] == 0;
        let (count_pos, count_neg) = (counts[row], counts[rows + row]);
        if count_pos == 0 || count_neg == 0 {
            continue;
        }
        // As in the kernel `weigh`.
        let part = |count: u32, sharpness: f64, sum: i64| {
            2.0 / (shape.total as f64 * f64::from(count)) / sharpness * sum as f64 / settings.sum_scale
        };
        terms[original] =
            part(count_pos, settings.beta, wide[row]) + part(count_neg, settings.alpha, wide[2 * rows + row]);
    }
    Ok((terms, by_tiles))
}

pub(super) fn download_gradients<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
    output: &mut LossOutput,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let size = (shape.anchors, shape.dim);
    download_matrix(device, buffer, layout.anchors.gradient, size, &mut output.gradient)?;
    if shape.reference_gradient {
        let gradient = output.reference_gradient.get_or_insert_default();
        let size = (shape.reference_count(), shape.dim);
        download_matrix(device, buffer, layout.references.gradient, size, gradient)?;
    } else {
        output.reference_gradient = None;
    }
    Ok(())
}

fn download_matrix<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    region: Region,
    size: (usize, usize),
    matrix: &mut Array2<f32>,
) -> Result<()> {
    if matrix.dim() != size || !matrix.is_standard_layout() {
        *matrix = Array2::zeros(size);
    }
    let Some(values) = matrix.as_slice_mut() else { unreachable!("standard layout, see above") };
    device.download(buffer, region.offset, cast_slice_mut(values))
}
