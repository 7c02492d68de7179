//! The loss of tensors given by address, for `ddtas.torch` on the CPU.
//!
//! DLPack takes some microseconds a tensor, a tenth of the time of the loss at 80 rows.
//! `ddtas/torch/operator.py` is the only caller, and checks types, shapes, layout and device.

use ddtas::backend::Backend;
use ddtas::loss::{
    Batch, DoubleBatch, DoubleRows, ElementType, Embeddings, Identity, LossOutput, LossScalars, LossSettings,
    Reference, Rows,
};
use half::{bf16, f16};
use ndarray::{ArrayView2, arr0};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::raise;
use crate::input::Known;
use crate::output::{array, vector};
use crate::sides::unit_check;
use crate::workspace::Context;

/// Addresses of the rows and of their int64 labels, number of rows, dimensions, and type.
pub type Place = (usize, usize, usize, usize, u8);

/// Whether rows are normalised first, whether the references get a gradient, and whether rows are checked.
pub type Flags = (bool, bool, bool);

/// The loss, dL/d(rows), dL/d(references) and the statistics, as arrays that own the library's memory, and
/// the statistics as numbers.
pub type Answers = (Py<PyAny>, Py<PyAny>, Option<Py<PyAny>>, Py<PyAny>, [f64; STATISTICS]);

/// Number of statistics, which `ddtas/torch/operator.py` names.
const STATISTICS: usize = COMPUTED + 2;

/// Number of statistics that a loss computes; the others are counts of labels.
pub const COMPUTED: usize = 13;

/// The label that a memory gives a row that is not finite, as in `ddtas/torch/engine.py`.
const NOT_FINITE: i64 = i64::MIN + 1;

/// The code of float64, which the scalar reference takes.
const DOUBLE: u8 = 3;

/// The type that a code of `ddtas/torch/operator.py` stands for, if it is one that backends take.
pub fn element_type(code: u8) -> Option<ElementType> {
    ElementType::ALL.get(usize::from(code)).copied()
}

/// # Safety
/// The address has `count * dim` elements of `T`, initialised and aligned, which do not change during `'a`.
unsafe fn view<'a, T>((address, _, count, dim, _): Place) -> PyResult<ArrayView2<'a, T>> {
    // SAFETY: the caller's promise.
    let values = unsafe { slice(address, count * dim) }?;
    ArrayView2::from_shape((count, dim), values).map_err(|error| PyTypeError::new_err(error.to_string()))
}

/// # Safety
/// As [`view`], for `count` elements.
unsafe fn slice<'a, T>(address: usize, count: usize) -> PyResult<&'a [T]> {
    match (address, count) {
        (_, 0) => Ok(&[]),
        // torch gives address 0 for a tensor whose storage was freed.
        (0, _) => Err(PyValueError::new_err("a tensor has no memory, and entries that should be there")),
        // SAFETY: the caller's promise.
        _ => Ok(unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), count) }),
    }
}

/// # Safety
/// As [`view`].
unsafe fn rows<'a>(place: Place) -> PyResult<Rows<'a>> {
    // SAFETY: handed on to the caller, twice.
    Ok(unsafe { Rows { embeddings: embeddings(place)?, labels: slice(place.1, place.2)? } })
}

/// # Safety
/// As [`view`].
unsafe fn embeddings<'a>(place: Place) -> PyResult<Embeddings<'a>> {
    match element_type(place.4) {
        // SAFETY: handed on to the caller.
        Some(ElementType::F32) => Ok(Embeddings::F32(unsafe { view::<f32>(place) }?)),
        // SAFETY: as above.
        Some(ElementType::F16) => Ok(Embeddings::F16(unsafe { view::<f16>(place) }?)),
        // SAFETY: as above.
        Some(ElementType::Bf16) => Ok(Embeddings::Bf16(unsafe { view::<bf16>(place) }?)),
        None => Err(PyTypeError::new_err("rows of both sides must have one type")),
    }
}

/// # Safety
/// As [`view`].
unsafe fn double_rows<'a>(place: Place) -> PyResult<DoubleRows<'a>> {
    // SAFETY: handed on to the caller.
    let embeddings = unsafe { view::<f64>(place) }?;
    // SAFETY: as above.
    Ok(DoubleRows { embeddings, labels: unsafe { slice(place.1, place.2) }? })
}

/// Evaluates the loss: float32, and float64 for float64 rows. `identity` is the address of an int64 for each
/// row, or 0.
///
/// # Safety
/// Every address leads to live memory of the host, of the length and type that its place states. Nobody
/// writes there meanwhile.
pub unsafe fn loss(
    py: Python<'_>,
    context: &Context,
    (anchors, references): (Place, Option<Place>),
    identity: usize,
    settings: &LossSettings,
    (normalize, reference_gradient, check): Flags,
) -> PyResult<Answers> {
    let known = match identity {
        0 => Known::ByValue,
        // SAFETY: the caller's promise.
        address => Known::list(unsafe { slice::<i64>(address, anchors.2) }?)?,
    };
    let (identity, check) = (known.as_library(), unit_check(check));
    // SAFETY: the caller's promise.
    let labels: &[i64] = unsafe { slice(anchors.1, anchors.2) }?;
    let (loss, gradient, back, scalars) = if anchors.4 == DOUBLE {
        // SAFETY: handed on to the caller, twice.
        let (anchors, references) =
            unsafe { (double_rows(anchors)?, references.map(|place| double_rows(place)).transpose()?) };
        let batch = DoubleBatch { anchors, references, identity, reference_gradient, check };
        let truth = py.detach(|| batch.reference(settings)).map_err(raise)?;
        let scalars = truth.scalars();
        let Reference { gradient, reference_gradient: back, .. } = truth;
        (array(py, arr0(scalars.loss)), array(py, gradient), back.map(|rows| array(py, rows)), scalars)
    } else {
        // SAFETY: handed on to the caller, twice.
        let (anchors, references) =
            unsafe { (rows(anchors)?, references.map(|place| rows(place)).transpose()?) };
        let identity = if references.is_some() { identity } else { Identity::ByValue };
        let batch = Batch { anchors, references, identity, reference_gradient, total: None, check };
        let output = context.compute(py, |backend| {
            let mut output = LossOutput::default();
            if normalize {
                backend.normalized_loss(&batch, settings, &mut output)?;
            } else {
                backend.loss(&batch, settings, &mut output)?;
            }
            Ok(output)
        })?;
        let scalars = output.scalars();
        let LossOutput { gradient, reference_gradient: back, loss, .. } = output;
        (array(py, arr0(loss as f32)), array(py, gradient), back.map(|rows| array(py, rows)), scalars)
    };
    let statistics = with_labels(&scalars, labels);
    Ok((loss, gradient, back, vector(py, statistics.to_vec()), statistics))
}

/// Writes the rows at unit length to the address `unit`, in their type.
///
/// # Safety
/// As [`loss`], for as many entries there as the rows have.
pub unsafe fn normalize(py: Python<'_>, context: &Context, place: Place, unit: usize) -> PyResult<()> {
    // SAFETY: the caller's promise.
    let given = unsafe { unlabelled(place) }?;
    context.compute(py, |backend| {
        let found = backend.normalize(&given)?;
        match &found {
            // SAFETY: the caller's promise.
            Embeddings::F32(rows) => unsafe { copy(rows, unit) },
            // SAFETY: as above.
            Embeddings::F16(rows) => unsafe { copy(rows, unit) },
            // SAFETY: as above.
            Embeddings::Bf16(rows) => unsafe { copy(rows, unit) },
        }
        Ok(())
    })
}

/// Turns a gradient at that address with respect to unit rows into the one with respect to the rows as given.
///
/// # Safety
/// As [`loss`], for as many float32 there as the rows have entries.
pub unsafe fn normalize_backward(
    py: Python<'_>,
    context: &Context,
    place: Place,
    gradient: usize,
) -> PyResult<()> {
    // SAFETY: the caller's promise.
    let given = unsafe { unlabelled(place) }?;
    let count = place.2 * place.3;
    if count == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise; there are entries, so the address is valid.
    let gradient =
        unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(gradient), count) };
    context.compute(py, |backend| backend.normalize_backward(&given, gradient))
}

/// # Safety
/// As [`view`].
unsafe fn unlabelled<'a>(place: Place) -> PyResult<Rows<'a>> {
    // SAFETY: the caller's promise.
    Ok(Rows { embeddings: unsafe { embeddings(place) }?, labels: &[] })
}

/// # Safety
/// There is room for the rows.
unsafe fn copy<T: Copy>(rows: &ArrayView2<'_, T>, to: usize) {
    if let Some(entries) = rows.as_slice() {
        let to: *mut T = std::ptr::with_exposed_provenance_mut(to);
        // SAFETY: the caller's promise; the library's own buffer overlaps nothing.
        unsafe { std::ptr::copy_nonoverlapping(entries.as_ptr(), to, entries.len()) };
    }
}

/// The statistics in the order that `ddtas/torch/operator.py` names them, without the counts of labels.
pub fn statistics(scalars: &LossScalars) -> [f64; COMPUTED] {
    [
        scalars.loss,
        scalars.dloss_dlambda_pos,
        scalars.dloss_dlambda_neg,
        scalars.mean_pos,
        scalars.mean_neg,
        scalars.gamma_pos,
        scalars.gamma_neg,
        scalars.probe_neg as f64,
        scalars.total_pos as f64,
        scalars.total_neg as f64,
        scalars.active as f64,
        scalars.mined_pos as f64,
        scalars.mined_neg as f64,
    ]
}

/// All statistics; the last two count ignored rows, and those a memory found not to be finite.
fn with_labels(scalars: &LossScalars, labels: &[i64]) -> [f64; STATISTICS] {
    let mut all = [0.0; STATISTICS];
    all[..COMPUTED].copy_from_slice(&statistics(scalars));
    for &label in labels.iter().filter(|label| **label < 0) {
        all[COMPUTED + usize::from(label == NOT_FINITE)] += 1.0;
    }
    all
}
