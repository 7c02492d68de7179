//! f32 rows rounded to f16.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::loss::{ElementType, LossOutput, OwnedEmbeddings};
use ddtas_cases::{self as cases, Case, parts};
use ndarray::Array2;

use super::{answers, bits, device, parts_on};

#[test]
fn rounded_f32_gives_the_bits_of_f16_rows() {
    // Whole and partial granules, ignored rows, references, duplicates, and every tile mined.
    let names = ["a_tile_and_one", "rectangular_ignored_labels", "duplicates", "everything_mined_140x330"];
    for case in cases::generated_to_round().into_iter().filter(|case| names.contains(&case.name.as_str())) {
        let narrow = case.rounded_to(ElementType::F16).expect("rows of unit length");
        for (hopper, budget) in [(false, 1 << 30), (true, 0)] {
            let answer = |case: &Case, exact: bool| {
                let mut backend =
                    DeviceBackend::new(device(25, hopper), Options { budget: Some(budget), tf32: !exact });
                let answers = answers(&mut backend, case);
                (bits(&answers), answers.1, backend.device().launched().to_vec())
            };
            let (rounded, given) = (answer(&case, false), answer(&narrow, true));
            let what = format!("{}, hopper {hopper}, budget {budget}", case.name);
            assert!((rounded.0, rounded.1) == (given.0, given.1), "{what}");
            // The same kernels are launched, except for the one that prepares the rows.
            let prepared = |name: &&'static str| name.replace("rounded_f32", "f16");
            let kernels: Vec<String> = rounded.2.iter().map(prepared).collect();
            assert_eq!(kernels, given.2, "{what}");
            assert_ne!(rounded.2, given.2, "{what}");
        }
    }
}

#[test]
fn rounded_f32_agrees_on_hopper_s_kernels() {
    let options = Options { tf32: true, ..Options::default() };
    let mut backend = DeviceBackend::new(device(26, true), options);
    cases::run_all_tf32(&mut backend, cases::generated_to_round());
}

#[test]
fn rounded_f32_agrees_in_parts_on_hopper_s_kernels() {
    let rounded = |case: Case| {
        let Case { expected, .. } = case.rounded_to(ElementType::F16).expect("rows of unit length");
        Case { expected, ..case }
    };
    parts::run_all(parts_on(85, true, false), cases::generated_to_round().into_iter().map(rounded));
}

#[test]
fn rounded_f32_of_any_length_is_rounded_at_unit_length() {
    for (name, scale) in
        [("odd_sizes_257x130", 1.0f32), ("rectangular_ignored_labels", 3.0), ("a_tile_and_one", 1e28)]
    {
        let to_round = cases::generated_to_round().into_iter().find(|case| case.name == name);
        let case = to_round.expect("the case is in the table");
        let with = |rows: &dyn Fn(&cases::Side) -> Array2<f32>, dtype: ElementType| {
            let side = |side: &cases::Side| cases::Side {
                rows: OwnedEmbeddings::new(&rows(side), dtype),
                ..side.clone()
            };
            let references = case.references.as_ref().map(side);
            Case { anchors: side(&case.anchors), references, ..case.clone() }
        };
        let length = |i: usize| scale * (1 + i % 4) as f32;
        let stretched = |side: &cases::Side| {
            let unit = side.rows.view().to_f64();
            Array2::from_shape_fn(unit.dim(), |(i, d)| unit[[i, d]] as f32 * length(i))
        };
        let lengths = |rows: &Array2<f64>| rows.outer_iter().map(|x| x.dot(&x).sqrt()).collect::<Vec<_>>();
        let unit = |side: &cases::Side| {
            let rows = stretched(side).mapv(f64::from);
            let lengths = lengths(&rows);
            Array2::from_shape_fn(rows.dim(), |(i, d)| (rows[[i, d]] / lengths[i]) as f32)
        };
        let (given, narrow) = (with(&stretched, ElementType::F32), with(&unit, ElementType::F16));
        for hopper in [false, true] {
            let options = Options { tf32: true, ..Options::default() };
            let mut backend = DeviceBackend::new(device(35, hopper), options);
            let (mut output, mut plain) = (LossOutput::default(), LossOutput::default());
            backend.normalized_loss(&given.batch(), &case.settings, &mut output).unwrap();
            backend.loss(&narrow.batch(), &case.settings, &mut plain).unwrap();
            let what = format!("{name}, hopper {hopper}");
            assert!((output.loss - plain.loss).abs() <= 1e-6 * plain.loss, "{what}");
            let sides = std::iter::once(&given.anchors).chain(&given.references);
            let gradients =
                |output: LossOutput| std::iter::once(output.gradient).chain(output.reference_gradient);
            for (side, (got, of_unit)) in sides.zip(gradients(output).zip(gradients(plain))) {
                let rows = side.rows.view().to_f64();
                let (mut worst, mut most) = (0.0f64, 0.0f64);
                for (i, length) in lengths(&rows).into_iter().enumerate() {
                    let (u, g) = (rows.row(i).mapv(|x| x / length), of_unit.row(i).mapv(f64::from));
                    let want = (&g - &u * g.dot(&u)) / length * f64::from(scale);
                    for (got, want) in got.row(i).iter().zip(&want) {
                        assert!(got.is_finite(), "{what}");
                        worst = worst.max((f64::from(*got) * f64::from(scale) - want).abs());
                        most = most.max(want.abs());
                    }
                }
                // The gradient goes back through the normalization of the rows before rounding.
                assert!(most > 0.0 && worst <= 1e-6 * most, "{what}: {}", worst / most);
            }
        }
    }
}
