//! The C ABI of the static and the shared library (`include/ddtas.h`, which cbindgen writes from here).
//!
//! | file | concern |
//! | --- | --- |
//! | `types.rs` | the structs and enums that cross the border |
//! | `input.rs` | from C to Rust: every pointer, size and enum is checked |
//! | `output.rs` | from Rust to C |
//! | `steps.rs` | the four steps of a part of a batch |
//! | `context.rs` | one device, its threads, its workspace, its message; the lock around them |
//! | `engine/` | the backends, and rows in device memory |
//! | `failure.rs` | a status and its text |
//!
//! No global state; panics are caught at every entry; no pointer to the caller's data is kept after a call.
//! `docs/linking.md` is the manual.

use std::ffi::c_char;

mod context;
mod engine;
mod failure;
mod input;
mod output;
mod steps;
mod types;

pub use context::Context;
pub use steps::{ddtas_gradient, ddtas_same_class, ddtas_select, ddtas_sweep};
pub use types::{
    ContextOptions, DDTAS_ABI_VERSION, DDTAS_ABSENT, DDTAS_NO_NEIGHBOUR, Dtype, Identity, LossResult,
    LossScalars, Memory, MiningMode, Part, RowCheck, Rows, Settings, Status, StreamMode, Tangents,
};

use crate::backend::Nearest;
use crate::loss::{Batch, UnitCheck};
use crate::retrieval::{recall, recall_by};
use context::{State, enter, guard};
use engine::DeviceBatch;
use failure::{Failure, Outcome};
use input::{CheckedRows, Extent, Role, check_typed, matrix};
use output::{Filled, LossTarget, write_slice};
use types::Versioned;

/// Version of the linked library's binary interface. Compare it with DDTAS_ABI_VERSION, the header's.
#[unsafe(no_mangle)]
pub extern "C" fn ddtas_abi_version() -> u32 {
    DDTAS_ABI_VERSION
}

/// Version of the library, "MAJOR.MINOR.PATCH". Never NULL, never freed.
#[unsafe(no_mangle)]
pub extern "C" fn ddtas_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Makes a context and writes it to `*context`, which is NULL if that fails.
///
/// `options` NULL means the defaults. `message`, if not NULL, receives the reason of a failure, cut to
/// `message_bytes` and always NUL-terminated. Destroy the context with ddtas_context_destroy.
///
/// # Safety
/// Every pointer is NULL or leads to what its type says; `message` has `message_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_context_create(
    options: *const ContextOptions,
    context: *mut *mut Context,
    message: *mut c_char,
    message_bytes: usize,
) -> Status {
    let created = guard(|| {
        check_typed("context", context.cast_const())?;
        // SAFETY: checked just now; the caller's promise.
        unsafe { context.write(std::ptr::null_mut()) };
        // SAFETY: handed on to the caller.
        let created = unsafe { Context::new(options) }?;
        // SAFETY: as above.
        unsafe { context.write(Box::into_raw(Box::new(created))) };
        Ok(())
    });
    let (status, text) = match created {
        Ok(()) => (Status::Ok, String::new()),
        Err(Failure { status, message }) => (status, message),
    };
    // SAFETY: handed on to the caller.
    unsafe { write_text(&text, message, message_bytes) };
    status
}

/// Destroys a context: waits until its threads have ended, and frees its memory. NULL is allowed. No other
/// call may be using it. In a forked child the parent's threads and memory are left alone, and the child's
/// own are ended.
///
/// # Safety
/// `context` is NULL or a live context, which must not be used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_context_destroy(context: *mut Context) {
    if check_typed("context", context.cast_const()).is_ok() {
        // SAFETY: made by `ddtas_context_create` from a Box; the caller gives it up.
        let context = unsafe { Box::from_raw(context) };
        let _ = guard(move || {
            drop(context);
            Ok(())
        });
    }
}

/// Copies the message of the context's last call, empty if that succeeded, cut to `bytes` and always
/// NUL-terminated.
///
/// Returns the message's whole length without the NUL. To ask for the length alone, pass 0 `bytes`; `buffer`
/// may then be NULL. If threads share a context, one may read the message of another's call.
///
/// # Safety
/// `context` is NULL or a live context; `buffer` has `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_context_message(
    context: *const Context,
    buffer: *mut c_char,
    bytes: usize,
) -> usize {
    let text = guard(|| {
        check_typed("context", context)?;
        // SAFETY: the caller's promise.
        let context = unsafe { &*context };
        Ok(context.here()?.message().clone())
    });
    let text = text.unwrap_or_else(|failure| failure.message);
    // SAFETY: handed on to the caller.
    unsafe { write_text(&text, buffer, bytes) };
    text.len()
}

/// Copies the name of the context's device ("cpu", "cuda:0") as ddtas_context_message copies the
/// message, and returns its length; 0 for a context that is NULL.
///
/// # Safety
/// As ddtas_context_message.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_context_device(
    context: *const Context,
    buffer: *mut c_char,
    bytes: usize,
) -> usize {
    let mut name = String::new();
    // SAFETY: handed on to the caller.
    unsafe {
        enter(context, |state| {
            name = state.engine.name();
            Ok(())
        })
    };
    // SAFETY: handed on to the caller.
    unsafe { write_text(&name, buffer, bytes) };
    name.len()
}

/// Writes the bytes that the context's workspace holds now. Except for kept pairs, it stays as large as the
/// largest batch so far needed it: to free it, destroy the context and make another.
///
/// # Safety
/// Every pointer is NULL or leads to what its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_workspace_bytes(context: *const Context, bytes: *mut usize) -> Status {
    let work = |state: &mut State| {
        check_typed("bytes", bytes.cast_const())?;
        // SAFETY: checked just now; the caller's promise.
        unsafe { bytes.write(state.engine.workspace_bytes()) };
        Ok(())
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// Sets settings to their defaults, the paper's, and fields that this library does not know to zero. Pass
/// sizeof(ddtas_settings) for `struct_size`.
///
/// # Safety
/// `settings` is NULL or leads to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_settings_init(settings: *mut Settings, struct_size: usize) -> Status {
    let initialised = guard(|| {
        check_typed("settings", settings.cast_const())?;
        input::check_size::<Settings>(struct_size)?;
        // SAFETY: the caller's promise: as many bytes.
        unsafe { settings.cast::<u8>().write_bytes(0, struct_size) };
        // SAFETY: as above; the alignment was checked.
        unsafe { settings.cast::<usize>().write(struct_size) };
        // SAFETY: `read` would accept what is there now.
        unsafe { input::write_back(settings, &Settings { struct_size, ..Settings::initial() }) };
        Ok(())
    });
    initialised.map_or_else(|failure| failure.status, |()| Status::Ok)
}

/// Mines pairs and evaluates the loss and its gradient.
///
/// `settings` NULL means the paper's values. With `references` NULL every row of `anchors` is compared with
/// every other (the square form); otherwise anchors are compared with references (such as a memory bank),
/// whose `identity` says which of them are anchors. `result` is written only if the call succeeds. The
/// context remembers the pairs for ddtas_threshold_gradient.
///
/// # Safety
/// Every pointer, those within structs too, is NULL or leads to memory of the length its comment
/// states, which no other thread writes to during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_loss(
    context: *mut Context,
    settings: *const Settings,
    anchors: *const Rows,
    references: *const Rows,
    result: *mut LossResult,
) -> Status {
    let work = |state: &mut State| {
        // SAFETY: handed on to the caller.
        let (settings, check, normalize) = unsafe { input::settings(settings) }?;
        // SAFETY: as above.
        let anchors = unsafe { CheckedRows::read("anchors", anchors, Role::Labelled) }?;
        // SAFETY: as above.
        let references = unsafe { CheckedRows::read_against(&anchors, references, Role::Labelled) }?;
        // SAFETY: as above.
        let target = unsafe { LossTarget::read(result, &anchors, references.as_ref()) }?;

        let (pool, engine, buffers) = state.parts();
        if anchors.memory == Memory::Device {
            if normalize {
                let message =
                    "ddtas_loss normalises host rows alone: ddtas_enqueue_loss those in device memory";
                return Err(Failure::new(Status::InvalidValue, message));
            }
            let gradients = target.gradients();
            let batch = DeviceBatch { gradients, check, ..DeviceBatch::new(anchors, references) };
            // SAFETY: handed on to the caller.
            unsafe { engine.device_loss(&batch, &settings, buffers.output) }?;
        } else {
            // SAFETY: handed on to the caller.
            let batch = unsafe { input::batch(&anchors, references.as_ref(), buffers.rows) }?;
            let reference_gradient = target.wants_reference_gradient();
            let batch = Batch { reference_gradient, check, ..batch };
            let output = &mut *buffers.output;
            State::compute(pool, engine, |backend| match normalize {
                true => backend.normalized_loss(&batch, &settings, output),
                false => backend.loss(&batch, &settings, output),
            })?;
        }
        *buffers.total = None;
        let mined = buffers.output.mined();
        let found = [Filled::SameClass, Filled::Sweep, Filled::Select, Filled::Gradient(mined)];
        // SAFETY: handed on to the caller.
        unsafe { target.write(buffers.output, anchors.memory, &found) };
        Ok(())
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// Issues a loss and its gradient on the context's stream without waiting. Rows, gradients, thresholds and
/// scalars are in device memory, which must stay valid until the stream has finished.
///
/// Otherwise as ddtas_loss. `gradient` receives dL/d(anchors), `count` rows of `dim`; `reference_gradient`
/// likewise dL/d(references), or is NULL. `lambda`, if not NULL, points to lambda_pos and lambda_neg, which
/// replace those of `settings`; they must be within -2 to 2 and are not checked, and no
/// ddtas_threshold_gradient can follow, since it would read them again. A bad row is not an error of this
/// call: it makes the loss and the gradients NaN, and `scalars` names it. After the first call of a shape
/// nothing is allocated, so that calls can be captured in a graph.
///
/// # Safety
/// As ddtas_loss, until the stream has finished.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_enqueue_loss(
    context: *mut Context,
    settings: *const Settings,
    anchors: *const Rows,
    references: *const Rows,
    gradient: *mut f32,
    reference_gradient: *mut f32,
    lambda: *const f64,
    scalars: *mut LossScalars,
) -> Status {
    let work = |state: &mut State| {
        // SAFETY: handed on to the caller.
        let (settings, check, normalize) = unsafe { input::settings(settings) }?;
        // SAFETY: as above.
        let anchors = unsafe { CheckedRows::read("anchors", anchors, Role::Labelled) }?;
        // SAFETY: as above.
        let references = unsafe { CheckedRows::read_against(&anchors, references, Role::Labelled) }?;
        if anchors.memory != Memory::Device {
            let message =
                "ddtas_enqueue_loss takes rows in device memory: ddtas_loss takes those of the host";
            return Err(Failure::new(Status::InvalidValue, message));
        }
        check_typed("gradient", gradient.cast_const())?;
        check_typed("scalars", scalars.cast_const())?;
        if !lambda.is_null() {
            check_typed("lambda", lambda)?;
        }
        if references.is_none() && !reference_gradient.is_null() {
            let message = "the square form has no gradient of references: set reference_gradient to NULL";
            return Err(Failure::new(Status::InvalidValue, message));
        }
        let (_, engine, buffers) = state.parts();
        let gradients = [gradient, reference_gradient];
        let batch = DeviceBatch { gradients, check, ..DeviceBatch::new(anchors, references) };
        *buffers.total = None;
        // SAFETY: handed on to the caller.
        unsafe { engine.device_enqueue(&batch, &settings, normalize, lambda, scalars) }
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// Derivatives by the two loss thresholds of the loss gradient's product with a direction: the sums over all
/// mined pairs of the context's last ddtas_loss of dG_ij/dlambda * (t_i . e_j + e_i . t_j).
///
/// After ddtas_gradient the sums are the part's share: along the tangent of its anchors, and of references
/// that are no anchors. `anchors` and `references` must be those of that call. If the tangent is the motion
/// of the embeddings along the meta gradient, the sums times minus the learning rate are dL_meta/dlambda of
/// the threshold generator. Rows in device memory need tangents in device memory, which are not checked for
/// NaN.
///
/// # Safety
/// As ddtas_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_threshold_gradient(
    context: *mut Context,
    anchors: *const Rows,
    references: *const Rows,
    tangents: *const Tangents,
    gradient_lambda_pos: *mut f64,
    gradient_lambda_neg: *mut f64,
) -> Status {
    let work = |state: &mut State| {
        let role = if state.total.is_some() { Role::OfPart } else { Role::Labelled };
        // SAFETY: handed on to the caller.
        let anchors = unsafe { CheckedRows::read("anchors", anchors, role) }?;
        // SAFETY: as above.
        let references = unsafe { CheckedRows::read_against(&anchors, references, role) }?;
        // SAFETY: as above.
        let tangents = unsafe { input::read(tangents) }?;
        check_typed("gradient_lambda_pos", gradient_lambda_pos.cast_const())?;
        check_typed("gradient_lambda_neg", gradient_lambda_neg.cast_const())?;
        if anchors.extent.count > 0 {
            check_typed("tangents.anchors", tangents.anchors)?;
        }
        let tangent = tangent_extent("anchors", &anchors, tangents.anchor_stride)?;
        let moving = references.filter(|_| !tangents.references.is_null());
        if moving.is_some() {
            check_typed("tangents.references", tangents.references)?;
        }
        let moving =
            moving.map(|rows| tangent_extent("references", &rows, tangents.reference_stride)).transpose()?;

        let (pool, engine, buffers) = state.parts();
        let sums = if anchors.memory == Memory::Device {
            let batch = DeviceBatch::new(anchors, references);
            let reference = if moving.is_some() { tangents.references } else { std::ptr::null() };
            // SAFETY: handed on to the caller.
            unsafe { engine.device_threshold_gradient(&batch, [tangents.anchors, reference]) }?
        } else {
            let [own, other] = buffers.tangents;
            // SAFETY: handed on to the caller.
            let batch = unsafe { input::batch(&anchors, references.as_ref(), buffers.rows) }?;
            let batch = Batch { total: *buffers.total, check: UnitCheck::Trust, ..batch };
            // SAFETY: as above.
            let tangent = unsafe { matrix(tangents.anchors, tangent, own) }?;
            // SAFETY: as above.
            let moving = moving.map(|extent| unsafe { matrix(tangents.references, extent, other) });
            let moving = moving.transpose()?;
            State::compute(pool, engine, |backend| backend.threshold_gradient(&batch, tangent, moving))?
        };
        // SAFETY: checked above; the caller's promise.
        unsafe { gradient_lambda_pos.write(sums.pos) };
        // SAFETY: as above.
        unsafe { gradient_lambda_neg.write(sums.neg) };
        Ok(())
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// The `k` most similar references of every query, most similar first, equal ones by index.
///
/// `references` NULL searches the queries among themselves, each left out of its own list. Labels are ignored
/// and may be NULL. `indices` and `similarities` receive `count` rows of `k`, always in host memory; with
/// fewer than `k` references the rest of a row is DDTAS_NO_NEIGHBOUR and -inf. Rows in device memory are
/// searched there, without a copy.
///
/// # Safety
/// As ddtas_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_nearest(
    context: *mut Context,
    queries: *const Rows,
    references: *const Rows,
    k: usize,
    indices: *mut u32,
    similarities: *mut f32,
) -> Status {
    let work = |state: &mut State| {
        // SAFETY: handed on to the caller.
        let queries = unsafe { CheckedRows::read("queries", queries, Role::Unlabelled) }?;
        // SAFETY: as above.
        let references = unsafe { CheckedRows::read_against(&queries, references, Role::Unlabelled) }?;
        some("k", k)?;
        Extent::new("neighbours", queries.extent.count, k, 0, size_of::<u32>())?;
        check_typed("indices", indices.cast_const())?;
        check_typed("similarities", similarities.cast_const())?;

        let (pool, engine, buffers) = state.parts();
        let there = references.unwrap_or(queries).extent.count;
        let depth = k.min(there);
        let nearest = if queries.memory == Memory::Device {
            // SAFETY: handed on to the caller.
            unsafe { engine.device_nearest(&DeviceBatch::new(queries, references), None, depth) }?
        } else {
            let [own, other] = buffers.rows;
            // SAFETY: handed on to the caller.
            let rows = unsafe { queries.view(own) }?;
            // SAFETY: as above.
            let others = references.map(|rows| unsafe { rows.view(other) }).transpose()?;
            State::compute(pool, engine, |backend| backend.nearest(&rows, others.as_ref(), depth))?
        };
        let lists = nearest.indices.outer_iter().zip(nearest.similarities.outer_iter());
        for (row, (own_indices, own_similarities)) in lists.enumerate() {
            for place in 0..k {
                let at = row * k + place;
                // SAFETY: at < count * k, and the caller's promise.
                unsafe {
                    indices.add(at).write(own_indices.get(place).copied().unwrap_or(Nearest::NONE));
                }
                let similarity = own_similarities.get(place).copied().unwrap_or(f32::NEG_INFINITY);
                // SAFETY: as above.
                unsafe { similarities.add(at).write(similarity) };
            }
        }
        Ok(())
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// Recall@K: the share of rows whose K nearest other rows hold one of their class, for every K of `ks`.
///
/// Rows with a negative label are neither queries nor neighbours; a row alone in its class is no query.
/// `recall_at` receives `k_count` values in the order of `ks`; `queries`, if not NULL, the number of rows
/// that were counted. `ks`, `recall_at` and `queries` are always in host memory. Rows are searched in blocks,
/// whose lists take 64 MiB. Rows in device memory are searched there; their labels and the lists are copied
/// to the host.
///
/// # Safety
/// As ddtas_loss; `ks` and `recall_at` have `k_count` entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ddtas_recall_at_k(
    context: *mut Context,
    rows: *const Rows,
    ks: *const usize,
    k_count: usize,
    recall_at: *mut f64,
    queries: *mut u64,
) -> Status {
    let work = |state: &mut State| {
        // SAFETY: handed on to the caller.
        let rows = unsafe { CheckedRows::read("rows", rows, Role::Labelled) }?;
        some("k_count", k_count)?;
        check_typed("ks", ks)?;
        check_typed("recall_at", recall_at.cast_const())?;
        if !queries.is_null() {
            check_typed("queries", queries.cast_const())?;
        }
        Extent::new("values of K", k_count, 1, 0, size_of::<f64>())?;
        // SAFETY: checked above; the caller's promise.
        let ks = unsafe { std::slice::from_raw_parts(ks, k_count) };

        let (pool, engine, buffers) = state.parts();
        let found = if rows.memory == Memory::Device {
            // SAFETY: handed on to the caller.
            let labels = unsafe { engine.device_labels(&rows) }?;
            let batch = DeviceBatch::new(rows, None);
            // SAFETY: as above.
            recall_by(&labels, ks, &mut |picked, k| unsafe {
                engine.device_nearest(&batch, Some(picked), k)
            })?
        } else {
            // SAFETY: handed on to the caller.
            let view = unsafe { rows.view(buffers.rows[0]) }?;
            State::compute(pool, engine, |backend| recall(backend, &view, None, ks))?
        };
        let values: Vec<f64> = ks.iter().map(|&k| found.get(k).unwrap_or(f64::NAN)).collect();
        // SAFETY: checked above; the caller's promise.
        unsafe { write_slice(recall_at, &values) };
        // SAFETY: as above.
        unsafe { write_slice(queries, &[found.queries as u64]) };
        Ok(())
    };
    // SAFETY: handed on to the caller.
    unsafe { enter(context, work) }
}

/// Refuses a count of 0.
fn some(name: &str, count: usize) -> Outcome<()> {
    let refused = || Failure::new(Status::InvalidValue, format!("{name} = 0 is out of range: 1 or more"));
    if count == 0 { Err(refused()) } else { Ok(()) }
}

fn tangent_extent(name: &str, rows: &CheckedRows, stride: usize) -> Outcome<Extent> {
    let extent = rows.extent;
    let extent = Extent::or_none(name, extent.count, extent.dim, stride, size_of::<f32>())?;
    if rows.memory == Memory::Device && extent.stride != extent.dim {
        let message = "the tangents lie in device memory: their row stride must be the dimension";
        return Err(Failure::new(Status::InvalidShape, message));
    }
    Ok(extent)
}

/// Copies text, cut to the buffer, with a NUL behind it.
///
/// # Safety
/// `buffer` is NULL or has `bytes` bytes.
unsafe fn write_text(text: &str, buffer: *mut c_char, bytes: usize) {
    if buffer.is_null() || bytes == 0 {
        return;
    }
    // Never half a character.
    let length = text.floor_char_boundary(bytes - 1);
    // SAFETY: length < bytes, and the caller's promise.
    unsafe { write_slice(buffer.cast(), &text.as_bytes()[..length]) };
    // SAFETY: as above.
    unsafe { buffer.add(length).write(0) };
}
