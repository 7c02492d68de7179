//! The comparison that `benches/device.sh` makes before timing: right answers pass, wrong numbers are named.

use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::loss::{Batch, Embeddings, LossSettings, Rows};
use ddtas_bench::spot_check::{Answer, Figures, SpotCheck, Way, compare};
use ddtas_bench::{Density, EmbeddedRows, draw};
use half::{bf16, f16};
use ndarray::Array2;

const ANCHORS: usize = 128;

/// 300 rows of 40 dimensions; some labels are ignored, and row 11 is a copy of row 10.
fn rows(references: Option<usize>) -> (Array2<f32>, Vec<i64>, Option<EmbeddedRows>) {
    let mut drawn = draw(300, references, 40, Density::Middle, 2.5, 7);
    let copy = drawn.anchors.values.row(10).to_owned();
    drawn.anchors.values.row_mut(11).assign(&copy);
    for row in (0..300).step_by(31) {
        drawn.anchors.labels[row] = -1;
    }
    (drawn.anchors.values, drawn.anchors.labels, drawn.references)
}

fn open(way: Way, seed: u64, tf32: bool) -> ddtas::Result<DeviceBackend<EmulatedDevice>> {
    let device = EmulatedDevice::new(seed);
    let device = if way == Way::EveryGpu { device } else { device.as_hopper() };
    let budget = if way == Way::NothingStored { 0 } else { 1 << 30 };
    Ok(DeviceBackend::new(device, Options { budget: Some(budget), tf32 }))
}

fn held(batch: &Batch<'_>, tf32: bool) -> Figures {
    let settings = LossSettings::default();
    let compared = compare(|way| open(way, 30, tf32), batch, &settings, tf32, ANCHORS);
    compared.expect("the batch is valid").expect("the kernels are right")
}

#[test]
fn right_answers_pass_in_every_type_and_form() {
    let (values, labels, _) = rows(None);
    let f32_rows = Batch::square(values.view(), &labels);
    for tf32 in [false, true] {
        let figures = held(&f32_rows, tf32);
        assert_eq!(figures.anchors, ANCHORS);
        assert!(figures.gradient > 0.0 && figures.terms < 1.0, "{figures:?}");
    }
    let narrow = values.mapv(f16::from_f32);
    held(&Batch { anchors: Rows::new(Embeddings::F16(narrow.view()), &labels), ..f32_rows }, false);
    let narrow = values.mapv(bf16::from_f32);
    held(&Batch { anchors: Rows::new(Embeddings::Bf16(narrow.view()), &labels), ..f32_rows }, false);
}

#[test]
fn right_answers_pass_against_references_of_their_own() {
    let (values, labels, others) = rows(Some(200));
    let others = others.unwrap();
    let references = Rows::new(others.values.view(), &others.labels);
    held(&Batch::rectangular(Rows::new(values.view(), &labels), references), false);
}

#[test]
fn a_wrong_number_is_refused_and_named() {
    let (values, labels, _) = rows(None);
    let narrow = values.mapv(bf16::from_f32);
    let batch = Batch {
        anchors: Rows::new(Embeddings::Bf16(narrow.view()), &labels),
        ..Batch::square(values.view(), &labels)
    };
    let settings = LossSettings::default();
    let right = Answer::new(&mut open(Way::Usual, 31, false).unwrap(), &batch, &settings).unwrap();
    let truth = SpotCheck::new(&batch, &settings, false, ANCHORS);
    truth.check(&right).unwrap();
    right.same_bits(&right).unwrap();
    right.same_counts(&right).unwrap();

    // An active anchor among those that are checked.
    let anchor = (0..ANCHORS).map(|k| k * 2 + k * 37 % 2).find(|&i| right.terms[i] > 0.0).unwrap();
    type Plant = fn(&mut Answer, usize);
    let faults: [(&str, Plant); 9] = [
        ("m+ of anchor", |answer, i| answer.output.min_pos[i] += 1e-5),
        ("m- of anchor", |answer, i| answer.output.max_neg[i] = f32::NAN),
        ("positives, want", |answer, i| answer.output.count_pos[i] += 1),
        ("negatives, want", |answer, i| answer.output.count_neg[i] -= 1),
        ("to the loss, want", |answer, i| {
            answer.terms[i] *= 1.0002;
            answer.output.loss = answer.terms.iter().sum();
        }),
        ("its terms' sum", |answer, _| answer.output.loss *= 1.000_001),
        ("gamma_neg is", |answer, _| answer.output.gamma_neg *= 1.001),
        ("the gradient of anchor", |answer, i| answer.output.gradient[[i, 3]] = f32::NAN),
        ("the gradient of anchor", |answer, i| {
            let other = answer.output.gradient.row(i + 2).to_owned();
            answer.output.gradient.row_mut(i).assign(&other);
        }),
    ];
    for (name, plant) in faults {
        let mut wrong = right.clone();
        plant(&mut wrong, anchor);
        let message = truth.check(&wrong).expect_err(name);
        assert!(message.contains(name), "{name}: {message}");
    }

    // One positive is missing in the anchor's gradient, with a weight of about half of 2 / (B |P|).
    let other = (0..300).find(|&j| j != anchor && labels[j] == labels[anchor]).unwrap();
    let weight = 1.0 / (300 * right.output.count_pos[anchor]) as f32;
    let row = &right.output.gradient.row(anchor) + &values.row(other).mapv(|x| x * weight);
    let mut wrong = right.clone();
    wrong.output.gradient.row_mut(anchor).assign(&row);
    assert!(truth.check(&wrong).unwrap_err().contains("the gradient of anchor"));

    let mut wrong = right.clone();
    wrong.output.gradient[[7, 0]] += f32::EPSILON;
    assert!(right.same_bits(&wrong).unwrap_err().contains("row 7 of the gradient"));
    let mut wrong = right.clone();
    wrong.output.count_neg[9] ^= 1;
    assert!(right.same_bits(&wrong).unwrap_err().contains("count_neg[9]"));
    wrong.output.count_neg[9] ^= 3;
    assert!(right.same_counts(&wrong).unwrap_err().contains("count_neg is off by"));
}
