//! The loss of a part of a batch in four steps, between which the caller exchanges what the parts found.

use super::context::{Context, State, enter};
use super::failure::{Failure, Outcome};
use super::input::{self, CheckedRows, Role, check_typed};
use super::output::{Filled, LossTarget};
use super::types::{LossResult, Memory, Part, Rows, Settings, Status};
use crate::loss::{Batch, PairTotals, RowNumbers, UnitCheck};

/// First step of the loss of a part of a batch: fills in `min_pos`, `total_pos`, `total_neg`, `mean_pos` and
/// `mean_neg` of `result`. ddtas_sweep, ddtas_select and ddtas_gradient follow.
///
/// The four steps together do what ddtas_loss does. `anchors` are some rows of a batch of `part->total` rows,
/// or none; `references` are all rows of the batch, in the same order for every part, followed by rows that
/// are anchors of no part, if there are any. `identity` of the references says which of them the anchors are.
/// Each part has a context of its own. Between the steps the caller gathers the results of all parts and
/// passes them in `part`. From the numbers of its references a part sums its own rows of the gradient, so no
/// gradients are exchanged. For the gradient of references that are no anchors, they take the anchors' place in
/// parts of their own (docs/parts.md, "The gradient of references"); these may have more rows than `total`.
///
/// `settings` NULL means the paper's values; they hold for all four steps. All steps take the same rows.
/// After a failed step, or a ddtas_loss in between, start again with ddtas_same_class. If all steps get the
/// same `result`, it holds in the end what ddtas_loss writes there, for the part's own pairs. On the CPU each
/// row's numbers and gradient equal those of the whole batch bit for bit, however it is split; the losses of
/// all parts add up to its loss but for rounding. Rows must be in host memory.
///
/// # Safety
/// As ddtas_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_same_class(
    context: *mut Context,
    settings: *const Settings,
    anchors: *const Rows,
    references: *const Rows,
    part: *const Part,
    result: *mut LossResult,
) -> Status {
    // SAFETY: handed on to the caller.
    unsafe { run(context, Call::SameClass(settings), [anchors, references], part, result) }
}

/// Second step: fills in `max_neg` and `probe_neg` of `result`, from `min_pos` in `part`.
///
/// # Safety
/// As ddtas_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_sweep(
    context: *mut Context,
    anchors: *const Rows,
    references: *const Rows,
    part: *const Part,
    result: *mut LossResult,
) -> Status {
    // SAFETY: handed on to the caller.
    unsafe { run(context, Call::Sweep, [anchors, references], part, result) }
}

/// Third step: fills in `count_pos`, `count_neg`, `gamma_pos` and `gamma_neg` of `result`, from `max_neg`,
/// `probe_neg` and `total_pos` in `part`.
///
/// # Safety
/// As ddtas_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_select(
    context: *mut Context,
    anchors: *const Rows,
    references: *const Rows,
    part: *const Part,
    result: *mut LossResult,
) -> Status {
    // SAFETY: handed on to the caller.
    unsafe { run(context, Call::Select, [anchors, references], part, result) }
}

/// Last step: fills in the part's share of the loss and of its derivatives, `active`, `mined_pos` and
/// `mined_neg` of `result`, and the whole gradient of its anchors, from `count_pos` and `count_neg` in
/// `part`. `reference_gradient` must be NULL.
///
/// The gradient of an anchor is complete, its row of (G + G^T) E, if `part` has the numbers of all references
/// that are anchors. ddtas_threshold_gradient then returns the part's share.
///
/// # Safety
/// As ddtas_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_gradient(
    context: *mut Context,
    anchors: *const Rows,
    references: *const Rows,
    part: *const Part,
    result: *mut LossResult,
) -> Status {
    // SAFETY: handed on to the caller.
    unsafe { run(context, Call::Gradient, [anchors, references], part, result) }
}

enum Call {
    SameClass(*const Settings),
    Sweep,
    Select,
    Gradient,
}

/// # Safety
/// As [`ddtas_same_class`].
unsafe fn run(
    context: *mut Context,
    step: Call,
    [anchors, references]: [*const Rows; 2],
    part: *const Part,
    result: *mut LossResult,
) -> Status {
    let work = |state: &mut State| {
        // SAFETY: handed on to the caller.
        let anchors = unsafe { CheckedRows::read("anchors", anchors, Role::OfPart) }?;
        // SAFETY: as above.
        let references = unsafe { CheckedRows::read_against(&anchors, references, Role::OfPart) }?;
        let missing = || Failure::new(Status::NullPointer, "references is NULL: a part has some");
        let references = references.ok_or_else(missing)?;
        if anchors.memory == Memory::Device {
            let message = "the steps of a part take rows in host memory only: \
                           rows in device memory are not supported yet";
            return Err(Failure::new(Status::Unavailable, message));
        }
        // SAFETY: as above.
        let part = unsafe { input::read(part) }?;
        let (known, there) = (part.reference_numbers, references.extent.count);
        if known > there {
            let message = format!("part.reference_numbers = {known}, and there are {there} references");
            return Err(Failure::new(Status::InvalidShape, message));
        }
        // SAFETY: as above.
        let target = unsafe { LossTarget::read(result, &anchors, None) }?;

        let (pool, engine, buffers) = state.parts();
        let (output, lengths) = (&mut *buffers.output, (anchors.extent.count, known));
        // SAFETY: as above.
        let batch = unsafe { input::batch(&anchors, Some(&references), buffers.rows) }?;
        let mut batch = Batch { total: Some(part.total), check: UnitCheck::Trust, ..batch };
        let found = match step {
            Call::SameClass(settings) => {
                // SAFETY: as above.
                let (settings, check, normalize) = unsafe { input::settings(settings) }?;
                if normalize {
                    let message = "the steps of a part take rows of unit length: set normalize to 0";
                    return Err(Failure::new(Status::InvalidValue, message));
                }
                batch.check = check;
                State::compute(pool, engine, |backend| backend.same_class(&batch, &settings, output))?;
                Filled::SameClass
            }
            Call::Sweep => {
                // SAFETY: as above.
                let min_pos = unsafe { numbers("min_pos", part.min_pos, part.reference_min_pos, lengths) }?;
                State::compute(pool, engine, |backend| backend.sweep(&batch, min_pos, output))?;
                Filled::Sweep
            }
            Call::Select => {
                // SAFETY: as above.
                let max_neg = unsafe { numbers("max_neg", part.max_neg, part.reference_max_neg, lengths) }?;
                let totals = PairTotals { probe_neg: part.probe_neg, total_pos: part.total_pos };
                State::compute(pool, engine, |backend| backend.select(&batch, max_neg, totals, output))?;
                Filled::Select
            }
            Call::Gradient => {
                // SAFETY: as above.
                let pos = unsafe { numbers("count_pos", part.count_pos, part.reference_count_pos, lengths) }?;
                // SAFETY: as above.
                let neg = unsafe { numbers("count_neg", part.count_neg, part.reference_count_neg, lengths) }?;
                State::compute(pool, engine, |backend| backend.gradient(&batch, pos, neg, output))?;
                Filled::Gradient(output.mined_of_part(pos.anchors, neg.anchors))
            }
        };
        *buffers.total = Some(part.total);
        // SAFETY: as above.
        unsafe { target.write(output, Memory::Host, &[found]) };
        Ok(())
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// The numbers of a part's anchors and of the first references.
///
/// # Safety
/// Where there are rows, the pointers are NULL, misaligned, or lead to a number for each.
unsafe fn numbers<'a, T>(
    name: &str,
    of_anchors: *const T,
    of_references: *const T,
    (anchors, references): (usize, usize),
) -> Outcome<RowNumbers<'a, T>> {
    if anchors > 0 {
        check_typed(&format!("part.{name}"), of_anchors)?;
    }
    if references > 0 {
        check_typed(&format!("part.reference_{name}"), of_references)?;
    }
    // SAFETY: checked just now; the caller's promise.
    let own = unsafe { input::slice(of_anchors, anchors) };
    // SAFETY: as above.
    let other = unsafe { input::slice(of_references, references) };
    Ok(RowNumbers::new(own, other))
}
