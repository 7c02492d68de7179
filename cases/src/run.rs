//! A case through a backend.

use std::borrow::Borrow;
use std::collections::HashSet;

use ddtas::backend::{Backend, Nearest};
use ddtas::loss::{Batch, ElementType, Embeddings, LossOutput, LossSettings, Rows, ThresholdGradient};
use ddtas::{Error, Result};
use half::f16;
use ndarray::{Array2, s};

use crate::random::{Draw, draw, tangent};
use crate::{Case, Report};

/// Runs a case through the loss and the threshold pass of a backend.
///
/// # Errors
/// Errors of the backend.
pub fn run(case: &Case, backend: &mut dyn Backend) -> Result<Report> {
    answer(case, backend).map(|(output, sums)| Report::new(&case.expected, &output, sums))
}

fn answer(case: &Case, backend: &mut dyn Backend) -> Result<(LossOutput, ThresholdGradient)> {
    let batch = case.batch();
    let mut output = LossOutput::default();
    backend.loss(&batch, &case.settings, &mut output)?;
    let moving = case.references.as_ref().map(|side| side.tangent.view());
    let sums = backend.threshold_gradient(&batch, case.anchors.tangent.view(), moving)?;
    Ok((output, sums))
}

/// Runs a case of f32 rows through a backend that may multiply in TF32: its results must be the truth's for
/// rows rounded as the backend rounds them, [`to_tf32`]. The backend gets the case's own rows.
///
/// # Errors
/// Errors of the backend or of the truth; [`Error::Unavailable`] for rows of another type.
pub fn run_tf32(case: &Case, backend: &mut dyn Backend) -> Result<Report> {
    let rounded = rounded(case)?;
    answer(case, backend).map(|(output, sums)| Report::new(&rounded.expected, &output, sums))
}

/// The value that an entry of f32 rows is rounded to where TF32 is allowed: the nearest f16, which has TF32's
/// 11 bits, and below 2^-14 the nearest multiple of 2^-24.
#[must_use]
pub fn to_tf32(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// A case of f32 rows as [`to_tf32`] rounds them.
fn rounded(case: &Case) -> Result<Case> {
    if case.dtype() != ElementType::F32 {
        return Err(Error::Unavailable(format!("{}: TF32 is for f32 rows", case.name)));
    }
    case.rounded_to(ElementType::F16)
}

/// Runs cases through every pass of a backend.
///
/// # Panics
/// Names every case that differs from the truth by more than its bounds.
pub fn run_all(backend: &mut dyn Backend, cases: impl IntoIterator<Item = impl Borrow<Case>>) {
    check_all(backend, cases, |backend, case| check(backend, case, case));
}

/// Runs cases of f32 rows through every pass of a backend that may multiply in TF32, and compares with the
/// truth of the rounded rows, within their bounds.
///
/// # Panics
/// As [`run_all`].
pub fn run_all_tf32(backend: &mut dyn Backend, cases: impl IntoIterator<Item = impl Borrow<Case>>) {
    let rounded = |case: &Case| rounded(case).map_err(|error| error.to_string());
    check_all(backend, cases, |backend, case| check(backend, case, &rounded(case)?));
}

fn check_all(
    backend: &mut dyn Backend,
    cases: impl IntoIterator<Item = impl Borrow<Case>>,
    check: impl Fn(&mut dyn Backend, &Case) -> Result<(), String>,
) {
    let mut count = 0;
    let mut failures = Vec::new();
    for case in cases {
        count += 1;
        let case = case.borrow();
        // If a kernel hangs, the last line names its case.
        println!("case {} {:?}", case.name, case.dtype());
        if let Err(difference) = check(backend, case) {
            failures.push(format!("{} {:?}: {difference}", case.name, case.dtype()));
        }
    }
    println!("{}: {count} cases, {} failed", backend.name(), failures.len());
    assert!(count > 0, "an empty table proves nothing");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Checks a backend's results for `case` against `truth`, which is the same case or has its rows rounded.
fn check(backend: &mut dyn Backend, case: &Case, truth: &Case) -> Result<(), String> {
    let say = |error: Error| error.to_string();
    let (output, sums) = answer(case, backend).map_err(say)?;
    let (report, bounds) = (Report::new(&truth.expected, &output, sums), &truth.expected.bounds);
    if !report.is_within(bounds) {
        return Err(format!("{report:?} is not within {bounds:?}"));
    }
    let batch = case.batch();
    for k in [1, 10] {
        let found = backend.nearest(&batch.anchors, batch.references.as_ref(), k).map_err(say)?;
        check_nearest(&truth.batch(), k, &found)?;
    }
    Ok(())
}

/// Checks that a backend refills an output that holds the results of another batch of the same shape: no pass
/// writes the entries of ignored rows, or a gradient that is not asked for.
///
/// # Panics
/// If a result differs from that in a new output.
pub fn check_outputs_are_refilled(backend: &mut dyn Backend) {
    let how = Draw { rows: 60, dim: 16, classes: 9, noise: 1.8, ignored: 0, duplicates: 0 };
    let ((rows, labels), (others, other_labels)) = (draw(how, 1), draw(how, 2));
    let ignored = |labels: &[i64]| -> Vec<i64> {
        labels.iter().enumerate().map(|(row, label)| if row % 3 == 0 { -1 } else { *label }).collect()
    };
    let (few, other_few) = (ignored(&labels), ignored(&other_labels));
    let pair = |own, other| {
        Batch::rectangular(Rows::new(rows.view(), own), Rows::new(others.view(), other))
            .with_reference_gradient()
    };
    let mut again = LossOutput::default();
    for batch in [pair(&labels, &other_labels), pair(&few, &other_few), Batch::square(rows.view(), &few)] {
        let mut new = LossOutput::default();
        for output in [&mut new, &mut again] {
            backend.loss(&batch, &LossSettings::default(), output).expect("a valid batch");
        }
        assert!(new.active > 20);
        assert_eq!(again, new);
    }
}

/// Checks that a threshold gradient is that of the last loss, or refused: of other references, with another
/// tangent of theirs, or after a loss that failed or whose rows were of any length.
///
/// # Panics
/// If one is not refused.
pub fn check_what_is_remembered(backend: &mut dyn Backend) {
    let how = Draw { rows: 30, dim: 8, classes: 4, noise: 1.5, ignored: 0, duplicates: 0 };
    let ((rows, labels), (others, other_labels)) = (draw(how, 1), draw(how, 2));
    let anchors = Rows::new(rows.view(), &labels);
    let against = |labels| Batch::rectangular(anchors, Rows::new(others.view(), labels));
    let (batch, settings, mut output) =
        (against(&other_labels), LossSettings::default(), LossOutput::default());
    let (own, moving) = (tangent(30, 8, 1), tangent(30, 8, 2));
    let sums = |backend: &mut dyn Backend, batch: &Batch<'_>, moving: &Array2<f32>| {
        backend.threshold_gradient(batch, own.view(), Some(moving.view()))
    };
    backend.loss(&batch, &settings, &mut output).expect("a valid batch");
    let want = sums(backend, &batch, &moving).expect("the batch of the last loss");
    assert!(want.pos != 0.0 && want.neg != 0.0);

    let reversed: Vec<i64> = other_labels.iter().rev().copied().collect();
    assert!(matches!(sums(backend, &against(&reversed), &moving), Err(Error::OutOfOrder(_))));
    let narrow = [&rows, &others].map(|rows| rows.slice(s![.., ..7]).as_standard_layout().into_owned());
    let narrow =
        Batch::rectangular(Rows::new(narrow[0].view(), &labels), Rows::new(narrow[1].view(), &other_labels));
    assert!(matches!(sums(backend, &narrow, &moving), Err(Error::LengthMismatch { .. })));
    let shorter = sums(backend, &batch, &tangent(29, 8, 2));
    assert!(matches!(shorter, Err(Error::LengthMismatch { .. })), "{shorter:?}");
    let mut bad = moving.clone();
    bad[[17, 3]] = f32::NAN;
    let refused = sums(backend, &batch, &bad);
    assert!(matches!(refused, Err(Error::NotFinite { rows: "reference tangent", row: 17 })), "{refused:?}");
    assert_eq!(sums(backend, &batch, &moving).expect("still the same"), want);

    let wrong = LossSettings { alpha: -1.0, ..settings };
    let part = Batch { total: Some(30), ..batch };
    type Call<'a> = &'a dyn Fn(&mut dyn Backend, &mut LossOutput) -> bool;
    let calls: [Call<'_>; 3] = [
        &|backend, output| backend.loss(&batch, &wrong, output).is_err(),
        &|backend, output| backend.same_class(&part, &wrong, output).is_err(),
        &|backend, output| backend.normalized_loss(&batch, &settings, output).is_ok(),
    ];
    for call in calls {
        backend.loss(&batch, &settings, &mut output).expect("a valid batch");
        assert!(call(backend, &mut output));
        assert!(matches!(sums(backend, &batch, &moving), Err(Error::OutOfOrder(_))));
    }
}

/// Checks a retrieval against the similarities in float64; ties within the error may swap. Tensor cores
/// truncate sums of 16-bit products, once for every 8 of them: 4e-6 was seen at D = 1,024 on an H200.
///
/// # Errors
/// The first query whose list is wrong.
pub fn check_nearest(batch: &Batch<'_>, k: usize, found: &Nearest) -> Result<(), String> {
    let embeddings = &batch.anchors.embeddings;
    let cut = match embeddings {
        Embeddings::F32(_) => 0.0,
        Embeddings::F16(_) | Embeddings::Bf16(_) => embeddings.dim().div_ceil(8) as f64 * 2.0f64.powi(-24),
    };
    let bound = 2e-6 + cut;
    let s = embeddings.to_f64().dot(&batch.reference_rows().embeddings.to_f64().t());
    if found.indices.dim() != (s.nrows(), k) || found.similarities.dim() != (s.nrows(), k) {
        return Err(format!("nearest: shape {:?}, want {:?}", found.indices.dim(), (s.nrows(), k)));
    }
    for (query, row) in s.outer_iter().enumerate() {
        let mut order: Vec<usize> = (0..row.len()).filter(|&j| !batch.is_square() || j != query).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        let mut seen = HashSet::new();
        for place in 0..k {
            let (index, value) =
                (found.indices[[query, place]], f64::from(found.similarities[[query, place]]));
            let wrong =
                |want: String| Err(format!("nearest[{query}, {place}] is {index} at {value}, want {want}"));
            let Some(&best) = order.get(place) else {
                if index != Nearest::NONE || value != f64::NEG_INFINITY {
                    return wrong("none".into());
                }
                continue;
            };
            let valid = (index as usize) < row.len()
                && order.contains(&(index as usize))
                && seen.insert(index)
                && (row[index as usize] - value).abs() <= bound
                && (row[best] - value).abs() <= bound;
            if !valid {
                return wrong(format!("{best} at {}", row[best]));
            }
        }
    }
    Ok(())
}
