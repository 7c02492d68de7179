//! The scalar truth against the reference cases in `tests/golden` (SPEC 7).

use ddtas::loss::{ElementType, reference};
use ddtas_cases::{Case, Expected, golden, is_clear};

fn close(name: &str, what: &str, got: f64, wanted: f64, scale: f64) {
    let error = if got == wanted { 0.0 } else { (got - wanted).abs() };
    assert!(error <= 1e-9 * scale, "{name}: {what} is {got}, expected {wanted}");
}

#[test]
fn the_float64_truth_reproduces_every_golden_case() {
    let cases = golden();
    assert_eq!(cases.len(), 12);
    for case in cases {
        let truth = Expected::evaluate(&case.batch(), &case.settings, &case.anchors.tangent, None).unwrap();
        let Case { name, expected: e, .. } = case;
        assert_eq!(
            (truth.probe_neg, truth.total_pos, truth.active),
            (e.probe_neg, e.total_pos, e.active),
            "{name}"
        );
        assert_eq!(truth.count_pos, e.count_pos, "{name}");
        assert_eq!(truth.count_neg, e.count_neg, "{name}");
        close(&name, "loss", truth.loss, e.loss, e.loss.abs());
        close(&name, "gamma_pos", truth.gamma_pos, e.gamma_pos, 1.0);
        close(&name, "gamma_neg", truth.gamma_neg, e.gamma_neg, 1.0);
        for (what, got, wanted) in [
            ("dL/dlambda_pos", truth.dloss_dlambda_pos, e.dloss_dlambda_pos),
            ("dL/dlambda_neg", truth.dloss_dlambda_neg, e.dloss_dlambda_neg),
            ("threshold_pos", truth.threshold_gradient.pos, e.threshold_gradient.pos),
            ("threshold_neg", truth.threshold_gradient.neg, e.threshold_gradient.neg),
        ] {
            close(&name, what, got, wanted, wanted.abs());
        }
        for i in 0..e.min_pos.len() {
            close(&name, "min_pos", truth.min_pos[i], e.min_pos[i], 1.0);
            close(&name, "max_neg", truth.max_neg[i], e.max_neg[i], 1.0);
        }
        let scale = e.gradient.iter().fold(0.0, |scale: f64, x| scale.max(x.abs()));
        for (got, wanted) in truth.gradient.iter().zip(&e.gradient) {
            close(&name, "gradient", *got, *wanted, scale);
        }
    }
}

#[test]
fn no_pair_comes_near_a_threshold_when_rows_are_rounded_to_f16() {
    // So that `ddtas-bench verify --tf32` may ask for exact counts. Sums of f16 products err by up to 7e-7.
    const SLACK: f64 = 1.5e-6;
    for case in golden() {
        let rounded = case.rounded_to(ElementType::F16).unwrap();
        let truth = reference(&rounded.batch(), &case.settings).unwrap();
        assert!(is_clear(&truth, &case.settings, SLACK), "{}", case.name);
    }
}
