//! The comparison that backends are held to can fail: faults planted in a right answer are found.

use ddtas::backend::Nearest;
use ddtas::loss::{Hypergradient, LossOutput};
use ddtas_cases::table as cases;
use ddtas_cases::table::{Case, Dtype, compare, compare_nearest};

/// A case with pairs of both kinds mined.
fn case() -> Case {
    let found = cases::golden().into_iter().find(|case| case.name == "paper_batch80");
    found.expect("tests/golden has it")
}

/// Plants a fault in the right answer and returns what the comparison says.
fn with_fault(plant: impl FnOnce(&mut LossOutput, &mut Hypergradient)) -> Result<(), String> {
    let case = case();
    let (mut output, mut hyper) = (case.expected.output.clone(), case.expected.hyper);
    plant(&mut output, &mut hyper);
    compare(&case.expected, &output, hyper)
}

#[test]
fn the_right_answer_passes() {
    assert_eq!(with_fault(|_, _| {}), Ok(()));
}

#[test]
fn the_float64_reference_agrees_with_the_golden_files() {
    for case in cases::golden() {
        let own = cases::Expected::new(Dtype::F32, &case.anchors, None, &case.settings);
        assert_eq!(compare(&case.expected, &own.output, own.hyper), Ok(()), "{}", case.name);
    }
}

#[test]
fn one_pair_too_many_is_found() {
    let said = with_fault(|output, _| output.count_neg[7] += 1).unwrap_err();
    assert!(said.starts_with("count_neg[7]"), "{said}");
}

#[test]
fn one_wrong_gradient_entry_is_found() {
    let said = with_fault(|output, _| output.gradient[[3, 5]] += 1e-6).unwrap_err();
    assert!(said.starts_with(&format!("gradient[{}]", 3 * 512 + 5)), "{said}");
}

#[test]
fn not_a_number_is_found() {
    assert!(with_fault(|output, _| output.loss = f64::NAN).is_err());
    assert!(with_fault(|output, _| output.gradient[[0, 0]] = f32::NAN).is_err());
    assert!(with_fault(|output, _| output.min_pos[0] = f32::INFINITY).is_err());
}

#[test]
fn a_hyper_gradient_one_part_in_a_thousand_off_is_found() {
    assert!(with_fault(|_, hyper| hyper.pos *= 1.001).is_err());
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
    assert_eq!(compare_nearest(&batch, 1, &found), Ok(()));
    let other = (found.indices[[0, 0]] as usize + 1) % 80;
    found.indices[[0, 0]] = other as u32;
    found.similarities[[0, 0]] = s[[0, other]] as f32;
    assert!(compare_nearest(&batch, 1, &found).is_err());
}

#[test]
fn generated_cases_cover_both_outcomes_of_mining() {
    let cases = cases::generated();
    let mined = |case: &&Case| case.expected.output.mined().1 > 0;
    assert!(cases.iter().filter(mined).count() > 30, "most cases mine something");
    assert!(cases.iter().any(|case| case.expected.output.active == 0), "some mine nothing");
    assert!(cases.iter().any(|case| case.references.is_some() && mined(&case)), "rectangular ones too");
}
