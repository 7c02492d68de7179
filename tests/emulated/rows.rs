//! Rows of any length, rows that are refused, and their order.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::{self, EmulatedDevice};
use ddtas::loss::{
    Batch, ElementType, LossOutput, LossSettings, Mining, OwnedEmbeddings, Rows, UnitCheck, reference,
};
use ddtas_cases as cases;
use ndarray::Array2;

use super::{device, random_rows};

#[test]
fn rows_of_any_length_agree_with_the_cpu() {
    for (name, scale) in
        [("odd_sizes_257x130", 1.0f32), ("rectangular_ignored_labels", 3.0), ("a_tile_and_one", 1e28)]
    {
        for dtype in ElementType::ALL {
            let case = cases::generated_case(name, dtype);
            // Lengths of 1 to 4 times `scale`: the squares of 1e28 overflow f32. f16 cannot hold 1e28.
            let scale = if dtype == ElementType::F16 { scale.min(3.0) } else { scale };
            let stretched = |rows: &OwnedEmbeddings| {
                let mut wide = rows.view().to_f64().mapv(|value| value as f32);
                for (i, mut row) in wide.outer_iter_mut().enumerate() {
                    row *= scale * (1 + i % 4) as f32;
                }
                OwnedEmbeddings::new(&wide, dtype)
            };
            let anchors = stretched(&case.anchors.rows);
            let references = case.references.as_ref().map(|side| stretched(&side.rows));
            let rows = Rows { embeddings: anchors.view(), labels: &case.anchors.labels };
            let batch = match (&references, &case.references) {
                (Some(others), Some(side)) => {
                    let others = Rows { embeddings: others.view(), labels: &side.labels };
                    Batch::rectangular(rows, others).with_reference_gradient()
                }
                _ => Batch::square(rows.embeddings, rows.labels),
            };
            let mut truth = LossOutput::default();
            let mut cpu = ddtas::backend::cpu::CpuBackend::new();
            cpu.normalized_loss(&batch, &case.settings, &mut truth).unwrap();
            for hopper in [false, true] {
                let device = EmulatedDevice::new(33);
                let device = if hopper { device.as_hopper() } else { device };
                let (mut backend, mut output) =
                    (DeviceBackend::new(device, Options::default()), LossOutput::default());
                backend.normalized_loss(&batch, &case.settings, &mut output).unwrap();
                let what = format!("{name}, {dtype:?}, hopper {hopper}");
                // The normalized rows may differ in the last bit of their type.
                let bound = if dtype == ElementType::F32 { 1e-5 } else { 3e-2 };
                assert!((output.loss - truth.loss).abs() <= bound * truth.loss, "{what}");
                let pairs = [(&output.gradient, &truth.gradient)]
                    .into_iter()
                    .chain(output.reference_gradient.as_ref().zip(truth.reference_gradient.as_ref()));
                for (got, want) in pairs {
                    // max() below overlooks a NaN.
                    assert!(got.iter().all(|value| value.is_finite()), "{what}");
                    let most = want.fold(0.0f32, |most, value| most.max(value.abs()));
                    let worst = got.iter().zip(want).fold(0.0f32, |worst, (g, w)| worst.max((g - w).abs()));
                    assert!(most > 0.0 && f64::from(worst / most) <= bound, "{what}: {}", worst / most);
                }
            }
        }
    }
}

#[test]
fn rows_without_a_direction_are_named_as_on_the_cpu() {
    let mut rows = random_rows(150, 24, 8) * 5.0;
    let labels: Vec<i64> = (0..150).map(|row| row / 3).collect();
    let settings = LossSettings::default();
    for (value, message) in
        [(0.0, "row 70 of the anchors is all zeros"), (f32::NAN, "row 70 of the anchors holds")]
    {
        rows.row_mut(70).fill(value);
        let mut backend = DeviceBackend::new(EmulatedDevice::new(34), Options::default());
        let mut output = LossOutput::default();
        let batch = Batch::square(rows.view(), &labels);
        let error = backend.normalized_loss(&batch, &settings, &mut output).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
        // A trusted batch is computed; the gradient of a row of zeros is 0.
        backend.normalized_loss(&batch.trusted(), &settings, &mut output).unwrap();
        let own = output.gradient.row(70);
        assert!(if value == 0.0 { own.iter().all(|&g| g == 0.0) } else { own.iter().all(|g| g.is_nan()) });
    }
}

#[test]
fn labels_of_several_sort_tiles_are_ordered() {
    // Two sort tiles of 2,048 labels in no order, some ignored, every class in both.
    let count = 2200;
    let rows = random_rows(count, 8, 1);
    let labels: Vec<i64> = (0..count).map(|row| (row * 7919 % 40) as i64 - 2).collect();
    let batch = Batch::square(rows.view(), &labels);
    let settings = LossSettings::default();
    let truth = reference(&batch, &settings).unwrap();
    let mut output = LossOutput::default();
    emulated::open(Options::default(), 9).loss(&batch, &settings, &mut output).unwrap();
    assert_eq!(output.total_pos, truth.selection.total_pos);
    for (row, (&got, &want)) in output.min_pos.iter().zip(&truth.selection.min_pos).enumerate() {
        assert!(
            got == want as f32 || (f64::from(got) - want).abs() < 1e-6,
            "m+ of row {row}: {got}, want {want}"
        );
    }
    for (row, (&got, &want)) in output.max_neg.iter().zip(&truth.selection.max_neg).enumerate() {
        assert!(
            got == want as f32 || (f64::from(got) - want).abs() < 1e-6,
            "m- of row {row}: {got}, want {want}"
        );
    }
    assert!((output.mean_neg - truth.mean_neg).abs() < 1e-6, "{} {}", output.mean_neg, truth.mean_neg);
}

#[test]
fn bad_rows_are_named_in_the_caller_s_order() {
    let mut rows = random_rows(200, 24, 2);
    let labels: Vec<i64> = (0..200).map(|row| 199 - row).collect();
    let mut output = LossOutput::default();
    let settings = LossSettings::default();
    // Rows that will be rounded are checked before rounding.
    let mut backends = [(false, true), (false, false), (true, false)].map(|(hopper, exact)| {
        DeviceBackend::new(device(10, hopper), Options { tf32: !exact, ..Options::default() })
    });
    let mut message = |rows: &Array2<f32>| {
        let messages = backends.each_mut().map(|backend| {
            let error = backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut output);
            error.expect_err("a bad row").to_string()
        });
        assert!(messages.iter().all(|other| *other == messages[0]), "{messages:?}");
        messages[0].clone()
    };
    // Beyond the range of f16.
    rows[[199, 5]] = 1e6;
    assert!(message(&rows).starts_with("row 199 of the anchors has L2 norm 1000000"), "{}", message(&rows));
    // Within the tolerance for f16 rows, beyond that for f32 rows.
    rows[[190, 0]] = (rows[[190, 0]].powi(2) + 2.2e-3).sqrt();
    assert!(message(&rows).starts_with("row 190 of the anchors has L2 norm 1.0010"), "{}", message(&rows));
    rows[[150, 3]] = f32::NAN;
    rows[[170, 0]] = 9.0;
    assert_eq!(message(&rows), "row 150 of the anchors holds a value that is not finite (NaN or infinity)");
    rows[[20, 0]] += 2.0;
    let text = message(&rows);
    assert!(text.starts_with("row 20 of the anchors has L2 norm"), "{text}");

    // Trusted, such rows may give any loss, but no error.
    let batch = Batch { check: UnitCheck::Trust, ..Batch::square(rows.view(), &labels) };
    for backend in &mut backends {
        backend.loss(&batch, &settings, &mut output).unwrap();
    }
}

#[test]
fn sums_of_rows_far_from_unit_length_saturate() {
    // Similarities of 10^6 and more: a single term exceeds the range of a row's fixed-point sum.
    let rows = random_rows(150, 24, 4) * 3000.0;
    let labels: Vec<i64> = (0..150).map(|row| row / 3).collect();
    let mut output = LossOutput::default();
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let batch = Batch::square(rows.view(), &labels).trusted();
    emulated::open(Options::default(), 21).loss(&batch, &settings, &mut output).unwrap();
    assert!(output.loss > 1.0 && output.loss.is_finite(), "{}", output.loss);
    assert!(output.dloss_dlambda_pos > 0.0 && output.dloss_dlambda_neg < 0.0, "{output:?}");
}
