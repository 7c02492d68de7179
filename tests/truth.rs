//! The scalar truth against central differences, in float64.

use ddtas::Error;
use ddtas::loss::gradient::weigh;
use ddtas::loss::select::Selection;
use ddtas::loss::similarity::Similarities;
use ddtas::loss::threshold::threshold_gradient;
use ddtas::loss::{
    Batch, DoubleBatch, DoubleRows, Identity, LossSettings, Mining, Rows, UnitCheck, reference,
    reference_threshold_gradient,
};
use ndarray::{Array2, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ROWS: usize = 14;
const DIM: usize = 5;

fn batch() -> (Array2<f64>, Vec<i64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut rows = Array2::from_shape_simple_fn((ROWS, DIM), || rng.random::<f64>() - 0.3);
    for mut row in rows.outer_iter_mut() {
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    (rows, (0..ROWS as i64).map(|i| i / 3).collect())
}

/// L at rows that may have left the unit sphere, with the sets held fixed.
fn loss(rows: &Array2<f64>, labels: &[i64], selection: &Selection, settings: &LossSettings) -> f64 {
    weigh(&Similarities::new((rows, labels), None), selection, settings, ROWS).loss
}

fn gradient(
    rows: &Array2<f64>,
    labels: &[i64],
    selection: &Selection,
    settings: &LossSettings,
) -> Array2<f64> {
    let g = weigh(&Similarities::new((rows, labels), None), selection, settings, ROWS).weights;
    (&g + &g.t()).dot(rows)
}

fn all_settings() -> [LossSettings; 3] {
    let defaults = LossSettings::default();
    [
        defaults,
        LossSettings { mining: Mining::None, ..defaults },
        LossSettings {
            lambda_pos: 0.9,
            lambda_neg: 0.3,
            alpha: 15.0,
            beta: 3.0,
            mining: Mining::Asms,
            ..defaults
        },
    ]
}

#[test]
fn the_gradient_agrees_with_central_differences() {
    let (rows, labels) = batch();
    for settings in all_settings() {
        let selection = Selection::new(&Similarities::new((&rows, &labels), None), &settings);
        assert!((0..ROWS).any(|i| selection.is_active(i)));
        let analytic = gradient(&rows, &labels, &selection, &settings);
        for i in 0..ROWS {
            for d in 0..DIM {
                let step = 1e-5;
                let at = |by: f64| {
                    let mut moved = rows.clone();
                    moved[[i, d]] += by;
                    loss(&moved, &labels, &selection, &settings)
                };
                let wanted = (at(step) - at(-step)) / (2.0 * step);
                assert!((analytic[[i, d]] - wanted).abs() < 1e-8, "{} {wanted}", analytic[[i, d]]);
            }
        }
    }
}

#[test]
fn derivatives_by_lambda_agree_with_central_differences() {
    let (rows, labels) = batch();
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let tangent = Array2::from_shape_simple_fn((ROWS, DIM), || rng.random::<f64>() - 0.5);
    for settings in all_settings() {
        let similarities = Similarities::new((&rows, &labels), None);
        let selection = Selection::new(&similarities, &settings);
        let weighted = weigh(&similarities, &selection, &settings, ROWS);
        let mut tilt = tangent.dot(&rows.t());
        tilt += &rows.dot(&tangent.t());
        let sums = threshold_gradient(&similarities, &selection, &settings, &tilt, ROWS);

        let step = 1e-5;
        let pos = |by: f64| LossSettings { lambda_pos: settings.lambda_pos + by, ..settings };
        let neg = |by: f64| LossSettings { lambda_neg: settings.lambda_neg + by, ..settings };
        let loss_at = |settings: LossSettings| loss(&rows, &labels, &selection, &settings);
        let along_at =
            |settings: LossSettings| (gradient(&rows, &labels, &selection, &settings) * &tangent).sum();
        for (what, got, wanted) in [
            ("dL/dlambda_pos", weighted.dloss_dlambda_pos, loss_at(pos(step)) - loss_at(pos(-step))),
            ("dL/dlambda_neg", weighted.dloss_dlambda_neg, loss_at(neg(step)) - loss_at(neg(-step))),
            ("threshold_pos", sums.pos, along_at(pos(step)) - along_at(pos(-step))),
            ("threshold_neg", sums.neg, along_at(neg(step)) - along_at(neg(-step))),
        ] {
            let wanted = wanted / (2.0 * step);
            assert!((got - wanted).abs() < 1e-7 * (1.0 + wanted.abs()), "{what}: {got} {wanted}");
        }
    }
}

#[test]
fn float64_rows_give_the_truth_of_the_same_rows_in_float32() {
    let narrow = batch().0.mapv(|x| x as f32);
    let (rows, labels) = (narrow.mapv(f64::from), batch().1);
    let (split, settings) = (5, LossSettings::default());
    let (left, right) = (narrow.slice(s![..split, ..]), narrow.slice(s![split.., ..]));
    let cases = [
        (Batch::square(narrow.view(), &labels), None),
        (
            Batch::rectangular(Rows::new(left, &labels[..split]), Rows::new(right, &labels[split..]))
                .with_reference_gradient(),
            Some((split, split)),
        ),
        // The anchors are among the references.
        (
            Batch::rectangular(Rows::new(left, &labels[..split]), Rows::new(narrow.view(), &labels))
                .with_reference_gradient()
                .with_identity(Identity::From(0)),
            Some((split, 0)),
        ),
    ];
    for (single, split) in cases {
        let side = |from: usize, to: usize| DoubleRows {
            embeddings: rows.slice(s![from..to, ..]),
            labels: &labels[from..to],
        };
        let double = DoubleBatch {
            anchors: side(0, split.map_or(ROWS, |(anchors, _)| anchors)),
            references: split.map(|(_, first)| side(first, ROWS)),
            identity: single.identity,
            reference_gradient: true,
            check: UnitCheck::Check,
        };
        let (want, got) = (reference(&single, &settings).unwrap(), double.reference(&settings).unwrap());
        assert_eq!(got.weighted.loss, want.weighted.loss);
        assert!(want.active() > 0 && got.gradient == want.gradient);
        assert_eq!(got.reference_gradient, want.reference_gradient);

        let tangent = double.anchors.embeddings.mapv(|x| 1.0 - x);
        let want = reference_threshold_gradient(&single, &settings, &tangent, None).unwrap();
        assert_eq!(double.threshold_gradient(&settings, &tangent, None).unwrap(), want);
    }
}

#[test]
fn float64_rows_that_do_not_fit_are_refused() {
    let (rows, labels) = batch();
    let fine = DoubleRows { embeddings: rows.view(), labels: &labels };
    let square = DoubleBatch {
        anchors: fine,
        references: None,
        identity: Identity::ByValue,
        reference_gradient: false,
        check: UnitCheck::Check,
    };
    let fails = |batch: DoubleBatch<'_>| batch.reference(&LossSettings::default()).unwrap_err();
    let short = DoubleRows { labels: &labels[1..], ..fine };
    assert!(matches!(fails(DoubleBatch { anchors: short, ..square }), Error::LengthMismatch { .. }));
    let narrow = DoubleRows { embeddings: rows.slice(s![.., 1..]), ..fine };
    let unlike = DoubleBatch { references: Some(narrow), check: UnitCheck::Trust, ..square };
    assert!(matches!(fails(unlike), Error::LengthMismatch { expected: 5, got: 4, .. }));
    let doubled = &rows * 2.0;
    let long = DoubleRows { embeddings: doubled.view(), ..fine };
    assert!(matches!(fails(DoubleBatch { anchors: long, ..square }), Error::NotUnit { row: 0, .. }));
    let absent = DoubleBatch { references: Some(fine), identity: Identity::From(1), ..square };
    assert!(matches!(fails(absent), Error::InvalidSetting { name: "identity", .. }));
}
