//! Rows handed in by their device address give the bits of rows handed in from the host.
//!
//! On the emulated device, whose memory is the host's.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options, ResidentBatch, ResidentRows, ResidentType};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows, UnitCheck};
use ddtas::{Error, Result};
use ndarray::Array2;

/// Unit rows on a circle, no two alike, and labels of three rows a class.
fn rows(count: usize, turn: f32) -> (Array2<f32>, Vec<i64>) {
    let angle = |i: usize| (i as f32 * 0.37 + turn).sin() * 3.0;
    let m = Array2::from_shape_fn((count, 2), |(i, d)| if d == 0 { angle(i).cos() } else { angle(i).sin() });
    (m, (0..count).map(|i| (i / 3) as i64).collect())
}

fn resident(rows: &Array2<f32>, labels: &[i64], gradient: &mut Array2<f32>) -> ResidentRows {
    ResidentRows {
        count: labels.len(),
        embeddings: rows.as_ptr() as u64,
        labels: labels.as_ptr() as u64,
        gradient: gradient.as_mut_ptr() as u64,
    }
}

fn batch(anchors: ResidentRows, references: Option<ResidentRows>) -> ResidentBatch {
    ResidentBatch { dim: 2, dtype: ResidentType::F32, anchors, references, check: UnitCheck::Check }
}

fn backend() -> DeviceBackend<EmulatedDevice> {
    DeviceBackend::new(EmulatedDevice::new(5), Options::default())
}

fn run(batch: &ResidentBatch) -> Result<LossOutput> {
    let mut output = LossOutput::default();
    // SAFETY: the tests below hand in the addresses of matrices that outlive the call.
    unsafe { backend().loss_resident(batch, &LossSettings::default(), &mut output) }.map(|()| output)
}

#[test]
fn square_form_gives_the_same_bits() {
    let (e, labels) = rows(140, 0.0);
    let mut host = LossOutput::default();
    backend().loss(&Batch::square(e.view(), &labels), &LossSettings::default(), &mut host).unwrap();
    assert!(host.active > 0, "a batch that mines something");

    let mut gradient = Array2::zeros((140, 2));
    let own = run(&batch(resident(&e, &labels, &mut gradient), None)).unwrap();
    assert_eq!(gradient, host.gradient);
    assert_eq!((own.loss, own.probe_neg, own.active), (host.loss, host.probe_neg, host.active));
}

#[test]
fn rectangular_form_gives_the_same_bits_on_both_sides() {
    let ((e, labels), (r, reference_labels)) = (rows(30, 0.0), rows(150, 0.1));
    let rectangular =
        Batch::rectangular(Rows::new(e.view(), &labels), Rows::new(r.view(), &reference_labels));
    let mut host = LossOutput::default();
    backend().loss(&rectangular.with_reference_gradient(), &LossSettings::default(), &mut host).unwrap();

    let (mut gradient, mut reference_gradient) = (Array2::zeros((30, 2)), Array2::zeros((150, 2)));
    let references = resident(&r, &reference_labels, &mut reference_gradient);
    let own = run(&batch(resident(&e, &labels, &mut gradient), Some(references))).unwrap();
    assert_eq!(own.loss, host.loss);
    assert_eq!(gradient, host.gradient);
    assert_eq!(Some(reference_gradient), host.reference_gradient);
}

#[test]
fn a_bad_row_and_a_null_address_are_refused() {
    let (mut e, labels) = rows(9, 0.0);
    let mut gradient = Array2::zeros((9, 2));
    e[[4, 0]] = f32::NAN;
    let rows = resident(&e, &labels, &mut gradient);
    assert!(matches!(run(&batch(rows, None)), Err(Error::NotFinite { rows: "anchors", row: 4 })));
    let null = ResidentRows { gradient: 0, ..rows };
    assert!(matches!(run(&batch(null, None)), Err(Error::InvalidSetting { name: "gradient", .. })));
}
