//! The comparison of backends with the truth finds faults that are planted in a right answer.

use ddtas::backend::Nearest;
use ddtas::loss::{LossOutput, ThresholdGradient};
use ddtas_cases::{Case, Expected, Report, check_nearest, generated, golden};

/// A case in which positives and negatives are mined.
fn case() -> Case {
    let found = golden().into_iter().find(|case| case.name == "paper_batch80");
    found.expect("tests/golden has it")
}

/// Plants a fault in the right answer: the report of the comparison, and whether it is within the bounds.
fn with_fault(plant: impl FnOnce(&mut LossOutput, &mut ThresholdGradient)) -> (Report, bool) {
    let case = case();
    let (mut output, mut sums) = (case.expected.output(), case.expected.threshold_gradient);
    plant(&mut output, &mut sums);
    let report = Report::new(&case.expected, &output, sums);
    let good = report.is_within(&case.expected.bounds);
    (report, good)
}

#[test]
fn the_right_answer_passes() {
    assert!(with_fault(|_, _| {}).1);
}

#[test]
fn the_float64_reference_agrees_with_the_golden_files() {
    for case in golden() {
        let tangent = &case.anchors.tangent;
        let own = Expected::evaluate(&case.batch(), &case.settings, tangent, None).unwrap();
        let report = Report::new(&case.expected, &own.output(), own.threshold_gradient);
        assert!(report.is_within(&case.expected.bounds), "{}: {report:?}", case.name);
    }
}

#[test]
fn one_pair_too_many_is_found() {
    let (report, good) = with_fault(|output, _| output.count_neg[7] += 1);
    assert!(!good && report.wrong_counts[0].starts_with("count_neg[7]"), "{report:?}");
}

#[test]
fn one_wrong_entry_is_found() {
    let faults: [fn(&mut LossOutput); 6] = [
        |output| output.gradient[[3, 5]] += 1e-6,
        |output| output.loss *= 1.0001,
        |output| output.dloss_dlambda_neg *= 1.0001,
        |output| output.min_pos[3] += 1e-5,
        |output| output.gamma_pos += 1e-5,
        |output| output.mean_neg += 1e-4,
    ];
    for (number, fault) in faults.into_iter().enumerate() {
        let (report, good) = with_fault(|output, _| fault(output));
        assert!(!good, "fault {number}: {report:?}");
    }
}

#[test]
fn not_a_number_is_found() {
    assert!(!with_fault(|output, _| output.loss = f64::NAN).1);
    assert!(!with_fault(|output, _| output.gradient[[0, 0]] = f32::NAN).1);
    assert!(!with_fault(|output, _| output.min_pos[0] = f32::INFINITY).1);
}

#[test]
fn a_threshold_gradient_one_part_in_a_thousand_off_is_found() {
    assert!(!with_fault(|_, sums| sums.pos *= 1.001).1);
}

#[test]
fn a_neighbour_that_is_not_nearest_is_found() {
    let case = case();
    let batch = case.batch();
    let s = batch.anchors.embeddings.to_f64();
    let s = s.dot(&s.t());
    let mut found =
        Nearest { indices: ndarray::Array2::zeros((80, 1)), similarities: ndarray::Array2::zeros((80, 1)) };
    for (query, row) in s.outer_iter().enumerate() {
        let others = (0..80).filter(|&j| j != query);
        let best = others.max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("79 others");
        found.indices[[query, 0]] = best as u32;
        found.similarities[[query, 0]] = row[best] as f32;
    }
    assert_eq!(check_nearest(&batch, 1, &found), Ok(()));
    let other = (found.indices[[0, 0]] as usize + 1) % 80;
    found.indices[[0, 0]] = other as u32;
    found.similarities[[0, 0]] = s[[0, other]] as f32;
    assert!(check_nearest(&batch, 1, &found).is_err());
}

#[test]
fn generated_cases_cover_both_outcomes_of_mining() {
    let cases = generated();
    let mined = |case: &&Case| case.expected.output().mined().1 > 0;
    assert!(cases.iter().filter(mined).count() > 30, "most cases mine something");
    assert!(cases.iter().any(|case| case.expected.active == 0), "some mine nothing");
    assert!(cases.iter().any(|case| case.references.is_some() && mined(&case)), "rectangular ones too");
}
