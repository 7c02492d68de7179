//! The number of kernels that a loss launches, in every form: launches dominate the time of a small batch.
#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test stops where something is off; every address is that of a live array of this file"
)]

use ddtas::backend::Backend;
use ddtas::backend::device::params::LossScalars;
use ddtas::backend::device::{
    DeviceBackend, ElementType, Options, ResidentBatch, ResidentIdentity, ResidentNumbers, ResidentOutput,
    ResidentPart, ResidentRows, ResidentSettings,
};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows, UnitCheck};
use ndarray::Array2;

/// Unit rows on a circle, with labels of three rows per class.
fn rows(count: usize) -> (Array2<f32>, Vec<i64>) {
    let angle = |i: usize| (i as f32 * 0.37).sin() * 3.0;
    let m = Array2::from_shape_fn((count, 2), |(i, d)| if d == 0 { angle(i).cos() } else { angle(i).sin() });
    (m, (0..count).map(|i| (i / 3) as i64).collect())
}

type Emulated = DeviceBackend<EmulatedDevice>;

fn backend(budget: usize) -> Emulated {
    let device = EmulatedDevice::new(7).with_multiprocessors(16);
    DeviceBackend::new(device, Options { budget: Some(budget), ..Options::default() })
}

/// The kernels that `call` launches, and the number of its memory fills.
fn launched(backend: &mut Emulated, call: impl FnOnce(&mut Emulated)) -> (Vec<&'static str>, usize) {
    let (kernels, fills) = (backend.device().launched().len(), backend.device().fills());
    call(backend);
    let device = backend.device();
    (device.launched()[kernels..].to_vec(), device.fills() - fills)
}

/// The kernels and memory fills of a square loss of `count` rows on the host.
fn of_square(count: usize, budget: usize) -> (Vec<&'static str>, usize) {
    let (e, labels) = rows(count);
    launched(&mut backend(budget), |backend| {
        let batch = Batch::square(e.view(), &labels);
        backend.loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
    })
}

fn assert_launches((kernels, fills): &(Vec<&'static str>, usize), wanted: (usize, usize)) {
    assert_eq!((kernels.len(), *fills), wanted, "{kernels:?}");
}

const EVERYTHING: usize = 1 << 30;

#[test]
fn a_square_loss() {
    assert_launches(&of_square(80, EVERYTHING), (7, 0));
    // With splits, whose gradients are added.
    assert_launches(&of_square(200, EVERYTHING), (7, 0));
    // More labels than one block sorts.
    assert_launches(&of_square(2_100, EVERYTHING), (8, 0));
    // Tiles that may have to be recomputed.
    assert_launches(&of_square(200, 0), (8, 0));
}

#[test]
fn a_square_loss_of_rows_of_any_length() {
    let (e, labels) = rows(2_100);
    let of_budget = |budget: usize| {
        launched(&mut backend(budget), |backend| {
            let batch = Batch::square(e.view(), &labels);
            backend.normalized_loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
        })
    };
    // One kernel more, of the gradient; and one where tiles may have to be recomputed.
    assert_launches(&of_budget(EVERYTHING), (9, 0));
    assert_launches(&of_budget(1 << 20), (10, 0));
}

#[test]
fn rows_that_are_rounded_are_f16_once_they_are_prepared() {
    let (e, labels) = rows(200);
    let of_device = |device: EmulatedDevice| {
        let options = Options { budget: Some(EVERYTHING), tf32: true };
        launched(&mut DeviceBackend::new(device.with_multiprocessors(16), options), |backend| {
            let batch = Batch::square(e.view(), &labels);
            backend.normalized_loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
        })
    };
    let first = ["order_tiles", "prepare_rounded_f32", "same_class_f16", "sweep_f16", "select_stored"];
    let last = ["weigh", "gradient_f16", "normalize_backward_f32"];
    assert_eq!(of_device(EmulatedDevice::new(7)), ([&first[..], &last].concat(), 0));
    let (kernels, fills) = of_device(EmulatedDevice::new(7).as_hopper());
    let first = ["order_tiles", "prepare_hopper_rounded_f32", "same_class_hopper_f16", "sweep_hopper_f16"];
    let last = ["select_stored_hopper", "weigh", "gradient_hopper_f16", "normalize_backward_f32"];
    assert_eq!((kernels, fills), ([first, last].concat(), 0));
}

#[test]
fn a_loss_against_a_memory() {
    let ((e, labels), (r, reference_labels)) = (rows(90), rows(200));
    let (anchors, references) = (Rows::new(e.view(), &labels), Rows::new(r.view(), &reference_labels));
    let batch = Batch::rectangular(anchors, references);
    let loss = |batch: Batch<'_>| {
        launched(&mut backend(EVERYTHING), |backend| {
            backend.loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
        })
    };
    assert_launches(&loss(batch), (9, 0));
    assert_launches(&loss(batch.with_reference_gradient()), (10, 0));
}

#[test]
fn more_rows_than_one_merge_of_small_tiles_takes() {
    // One merge of wide tiles. Rectangular, since a square batch of so many rows takes minutes here.
    let ((e, labels), (r, reference_labels)) = (rows(10), rows(65_600));
    let (anchors, references) = (Rows::new(e.view(), &labels), Rows::new(r.view(), &reference_labels));
    let batch = Batch::rectangular(anchors, references);
    let (kernels, fills) = launched(&mut backend(EVERYTHING), |backend| {
        backend.loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
    });
    assert_eq!(kernels[..3], ["order_tiles", "order_tiles_wide", "order_merge"]);
    assert_launches(&(kernels, fills), (10, 0));
}

fn resident(rows: &Array2<f32>, labels: &[i64], gradient: u64) -> ResidentRows {
    let (embeddings, labels, count) = (rows.as_ptr() as u64, labels.as_ptr() as u64, labels.len());
    ResidentRows { count, embeddings, labels, gradient }
}

#[test]
fn a_loss_of_resident_rows_and_one_that_nobody_waits_for() {
    let (e, labels) = rows(200);
    let mut gradient = Array2::<f32>::zeros((200, 2));
    let anchors = resident(&e, &labels, gradient.as_mut_ptr() as u64);
    let (dtype, check) = (ElementType::F32, UnitCheck::Check);
    let batch = ResidentBatch { dim: 2, dtype, anchors, references: None, check };
    let waited = launched(&mut backend(EVERYTHING), |backend| {
        let (settings, mut output) = (LossSettings::default(), LossOutput::default());
        // SAFETY: the rows, the labels and the gradient outlive the call.
        unsafe { backend.loss_resident(&batch, &settings, &mut output) }.unwrap();
    });
    assert_launches(&waited, (7, 0));
    let enqueued = |normalize| {
        launched(&mut backend(EVERYTHING), |backend| {
            let part = ResidentPart { batch, identity: ResidentIdentity::ByValue, total: 200, normalize };
            let settings = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
            let mut scalars = [0u64; size_of::<LossScalars>() / 8];
            let output = ResidentOutput { scalars: scalars.as_mut_ptr() as u64, loss: 0 };
            // SAFETY: as above; the scalars outlive the call too.
            unsafe { backend.enqueue_loss(&part, &settings, output) }.unwrap();
        })
    };
    assert_eq!(enqueued(false), waited);
    let (kernels, fills) = enqueued(true);
    assert_eq!(kernels.last(), Some(&"normalize_backward_f32"));
    assert_launches(&(kernels, fills), (8, 0));
}

#[test]
fn the_steps_of_a_part() {
    let (e, labels) = rows(200);
    let mut gradient = Array2::<f32>::zeros((90, 2));
    let anchors = resident(&e, &labels[..90], gradient.as_mut_ptr() as u64);
    let (dtype, check) = (ElementType::F32, UnitCheck::Check);
    let references = Some(resident(&e, &labels, 0));
    let batch = ResidentBatch { dim: 2, dtype, anchors, references, check };
    let part = ResidentPart { batch, identity: ResidentIdentity::From(0), total: 200, normalize: false };
    let settings = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
    // Zeros do for every number here, so one buffer serves as every list.
    let mut list = vec![0u64; 400];
    let address = list.as_mut_ptr() as u64;
    let numbers = ResidentNumbers { anchors: address, references: address, count: 200 };
    let mut backend = backend(EVERYTHING);
    // SAFETY: every address is that of `e`, `labels`, `gradient` or `list`, which are long enough.
    let same_class = launched(&mut backend, |backend| {
        unsafe { backend.enqueue_same_class(&part, &settings, address) }.unwrap();
    });
    assert_launches(&same_class, (8, 0));
    // SAFETY: as above.
    let sweep = launched(&mut backend, |backend| {
        unsafe { backend.enqueue_sweep(&part, numbers, address, address) }.unwrap();
    });
    assert_launches(&sweep, (3, 0));
    // SAFETY: as above.
    let select = launched(&mut backend, |backend| {
        unsafe { backend.enqueue_select(&part, numbers, address, [address; 2]) }.unwrap();
    });
    assert_launches(&select, (3, 0));
    // SAFETY: as above.
    let gradient = launched(&mut backend, |backend| {
        unsafe { backend.enqueue_gradient(&part, [numbers; 2], address) }.unwrap();
    });
    assert_launches(&gradient, (3, 0));
}
