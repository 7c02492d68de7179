//! From Rust to C: the caller's memory for results, and writing them there.

use super::failure::{Failure, Outcome};
use super::input::{CheckedRows, Extent, check_typed, read, write_back};
use super::types::{LossResult, Memory, Status};
use crate::loss::LossOutput;
use ndarray::Array2;

/// The fields of a result that a call fills in.
#[derive(Debug, Clone, Copy)]
pub enum Filled {
    SameClass,
    Sweep,
    Select,
    /// With the numbers of positive and negative pairs that enter the loss.
    Gradient((u64, u64)),
}

/// The caller's result struct, checked.
pub struct LossTarget {
    pointer: *mut LossResult,
    result: LossResult,
    gradient: Option<Extent>,
    reference_gradient: Option<Extent>,
}

impl LossTarget {
    /// Reads and checks the caller's struct.
    ///
    /// # Safety
    /// As [`read`].
    pub unsafe fn read(
        pointer: *mut LossResult,
        anchors: &CheckedRows,
        references: Option<&CheckedRows>,
    ) -> Outcome<Self> {
        // SAFETY: handed on to the caller.
        let result = unsafe { read(pointer.cast_const()) }?;
        let gradient = gradient_extent("gradient", result.gradient, anchors, result.gradient_stride)?;
        let reference_gradient = match references {
            Some(rows) => {
                let stride = result.reference_gradient_stride;
                gradient_extent("reference_gradient", result.reference_gradient, rows, stride)?
            }
            None if result.reference_gradient.is_null() => None,
            None => {
                let message = "the square form and parts have no gradient of references: \
                               set reference_gradient to NULL";
                return Err(Failure::new(Status::InvalidValue, message));
            }
        };
        optional("min_pos", result.min_pos)?;
        optional("max_neg", result.max_neg)?;
        optional("count_pos", result.count_pos)?;
        optional("count_neg", result.count_neg)?;
        Ok(Self { pointer, result, gradient, reference_gradient })
    }

    /// The caller's gradients, NULL where it wants none.
    pub fn gradients(&self) -> [*mut f32; 2] {
        [self.result.gradient, self.result.reference_gradient]
    }

    /// Whether dL/d(references) is wanted.
    pub fn wants_reference_gradient(&self) -> bool {
        self.reference_gradient.is_some()
    }

    /// Writes the fields `found`; gradients in device memory are there already.
    ///
    /// # Safety
    /// Every pointer is NULL or leads to memory of the length its comment states.
    pub unsafe fn write(mut self, output: &LossOutput, memory: Memory, found: &[Filled]) {
        let result = self.result;
        for found in found {
            match *found {
                Filled::SameClass => {
                    // SAFETY: handed on to the caller.
                    unsafe { write_slice(result.min_pos, &output.min_pos) };
                    self.result.total_pos = output.total_pos;
                    self.result.total_neg = output.total_neg;
                    self.result.mean_pos = output.mean_pos;
                    self.result.mean_neg = output.mean_neg;
                }
                Filled::Sweep => {
                    // SAFETY: as above.
                    unsafe { write_slice(result.max_neg, &output.max_neg) };
                    self.result.probe_neg = output.probe_neg;
                }
                Filled::Select => {
                    // SAFETY: as above.
                    unsafe { write_slice(result.count_pos, &output.count_pos) };
                    // SAFETY: as above.
                    unsafe { write_slice(result.count_neg, &output.count_neg) };
                    self.result.gamma_pos = output.gamma_pos;
                    self.result.gamma_neg = output.gamma_neg;
                }
                Filled::Gradient((mined_pos, mined_neg)) => {
                    if memory == Memory::Host {
                        let references = output.reference_gradient.as_ref();
                        // SAFETY: as above.
                        unsafe { write_matrix(result.gradient, self.gradient, Some(&output.gradient)) };
                        // SAFETY: as above.
                        unsafe {
                            write_matrix(result.reference_gradient, self.reference_gradient, references)
                        };
                    }
                    self.result = LossResult {
                        loss: output.loss,
                        dloss_dlambda_pos: output.dloss_dlambda_pos,
                        dloss_dlambda_neg: output.dloss_dlambda_neg,
                        active: output.active,
                        mined_pos,
                        mined_neg,
                        ..self.result
                    };
                }
            }
        }
        // SAFETY: `read` accepted the pointer.
        unsafe { write_back(self.pointer, &self.result) };
    }
}

fn optional<T>(name: &str, pointer: *mut T) -> Outcome<()> {
    if pointer.is_null() { Ok(()) } else { check_typed(name, pointer.cast_const()) }
}

fn gradient_extent(
    name: &str,
    pointer: *mut f32,
    rows: &CheckedRows,
    stride: usize,
) -> Outcome<Option<Extent>> {
    optional(name, pointer)?;
    if pointer.is_null() {
        return Ok(None);
    }
    let extent = Extent::or_none(name, rows.extent.count, rows.extent.dim, stride, size_of::<f32>())?;
    if rows.memory == Memory::Device && extent.stride != extent.dim {
        let message = format!("{name} lies in device memory: its row stride must be the dimension");
        return Err(Failure::new(Status::InvalidShape, message));
    }
    Ok(Some(extent))
}

/// Writes row by row, and leaves alone what lies between two rows.
///
/// # Safety
/// With an extent, `target` leads to memory of that extent.
unsafe fn write_matrix(target: *mut f32, extent: Option<Extent>, matrix: Option<&Array2<f32>>) {
    let (Some(extent), Some(values)) = (extent, matrix.and_then(|matrix| matrix.as_slice())) else { return };
    for (row, values) in values.chunks_exact(extent.dim).enumerate() {
        // SAFETY: row < count, so the row lies within the extent.
        unsafe { write_slice(target.add(row * extent.stride), values) };
    }
}

/// Copies values to the caller, unless `target` is NULL.
///
/// # Safety
/// `target` is NULL or leads to memory for as many values, which is no part of `values`.
pub unsafe fn write_slice<T: Copy>(target: *mut T, values: &[T]) {
    if !target.is_null() {
        // SAFETY: handed on to the caller.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), target, values.len()) };
    }
}
