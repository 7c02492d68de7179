//! Parts of a batch, enqueued step by step.

use ddtas::Error;
use ddtas::backend::Backend;
use ddtas::backend::device::{ResidentIdentity, ResidentNumbers, ResidentPart, ResidentSettings};
use ddtas::loss::{LossScalars, LossSettings, Rows};
use ddtas_cases::parts::loss_in_parts;
use ndarray::Array2;

use super::{backend, enqueue, part_of, rows};

/// What two parts found: numbers of the rows, totals, gradient and the parts' scalars.
struct FoundInParts {
    min_pos: Vec<f32>,
    max_neg: Vec<f32>,
    count_pos: Vec<u32>,
    count_neg: Vec<u32>,
    sums: [u64; 2],
    gradient: Array2<f32>,
    scalars: [LossScalars; 2],
}

/// Enqueues the loss of 140 rows in two parts. Thresholds are in device memory, and differ from those in the settings.
fn enqueue_parts((e, labels): (&Array2<f32>, &[i64]), lambda: [f64; 2], normalize: bool) -> FoundInParts {
    let list: Vec<u32> = (0..50).collect();
    let given = ResidentSettings { settings: LossSettings::default(), lambda: lambda.as_ptr() as u64 };
    let mut gradients = [Array2::zeros((50, 2)), Array2::zeros((90, 2))];
    let identities = [ResidentIdentity::List(list.as_ptr() as u64), ResidentIdentity::From(50)];
    let ranges = [0..50, 50..140];
    let part = |p: usize, gradient: &mut Array2<f32>| {
        let part = part_of((e, labels), ranges[p].clone(), gradient, identities[p]);
        ResidentPart { normalize, ..part }
    };
    let parts: Vec<ResidentPart> =
        gradients.iter_mut().enumerate().map(|(p, gradient)| part(p, gradient)).collect();
    let mut backends = [backend(), backend()];
    let (mut min_pos, mut max_neg) = (vec![0.0f32; 140], vec![0.0f32; 140]);
    let (mut count_pos, mut count_neg) = (vec![0u32; 140], vec![0u32; 140]);
    let (mut totals, mut sums) = ([[0u64; 2]; 2], [0u64; 2]);
    let mut scalars = [[0u64; size_of::<LossScalars>() / 8]; 2];
    let at = |base: u64, row: usize| base + 4 * row as u64;
    let numbers = |base: u64, p: usize| ResidentNumbers {
        anchors: at(base, ranges[p].start),
        references: base,
        count: 140,
    };
    let lists = [min_pos.as_mut_ptr() as u64, max_neg.as_mut_ptr() as u64];
    let counts = [count_pos.as_mut_ptr() as u64, count_neg.as_mut_ptr() as u64];
    // SAFETY: every address is that of a matrix or list of this test, which is long enough.
    unsafe {
        for p in 0..2 {
            let to = at(lists[0], ranges[p].start);
            backends[p].enqueue_same_class(&parts[p], &given, to).unwrap();
        }
        for p in 0..2 {
            let (to, found) = (at(lists[1], ranges[p].start), totals[p].as_mut_ptr() as u64);
            backends[p].enqueue_sweep(&parts[p], numbers(lists[0], p), to, found).unwrap();
        }
        // A call on the emulated device has finished when it returns.
        sums[0] = totals[0][0] + totals[1][0];
        sums[1] = totals[0][1] + totals[1][1];
        for p in 0..2 {
            let to = counts.map(|list| at(list, ranges[p].start));
            let sums = sums.as_ptr() as u64;
            backends[p].enqueue_select(&parts[p], numbers(lists[1], p), sums, to).unwrap();
        }
        for p in 0..2 {
            let given = counts.map(|list| numbers(list, p));
            backends[p].enqueue_gradient(&parts[p], given, scalars[p].as_mut_ptr() as u64).unwrap();
        }
    }
    let [first, second] = gradients;
    let gradient = ndarray::concatenate![ndarray::Axis(0), first, second];
    // SAFETY: the words have the size and alignment of LossScalars; its fields allow any bit pattern.
    let scalars = scalars.map(|words| unsafe { words.as_ptr().cast::<LossScalars>().read() });
    FoundInParts { min_pos, max_neg, count_pos, count_neg, sums, gradient, scalars }
}

#[test]
fn parts_that_nobody_waits_for_give_the_bits_of_parts_from_the_host() {
    let (e, labels) = rows(140, 0.0);
    let all = Rows::new(e.view(), &labels);
    let settings = LossSettings { lambda_pos: 0.6, lambda_neg: 0.4, ..LossSettings::default() };
    let mut host: Vec<Box<dyn Backend>> = vec![Box::new(backend()), Box::new(backend())];
    let tangent = Array2::zeros((140, 2));
    let wanted = loss_in_parts(&mut host, &all, &[50, 90], &settings, tangent.view()).unwrap().output;
    assert!(wanted.active > 0, "a batch that mines something");

    let found = enqueue_parts((&e, &labels), [0.6, 0.4], false);
    assert_eq!((found.min_pos, found.max_neg), (wanted.min_pos, wanted.max_neg));
    assert_eq!((found.count_pos, found.count_neg), (wanted.count_pos, wanted.count_neg));
    assert_eq!(found.sums, [wanted.probe_neg, wanted.total_pos]);
    assert_eq!(found.gradient, wanted.gradient);
    // The fixed-point unit of the sums allows for any threshold, so they are rounded more coarsely.
    let loss = found.scalars.iter().map(|scalars| scalars.loss).sum::<f64>();
    assert!((loss - wanted.loss).abs() < 1e-9, "{loss} {}", wanted.loss);
    assert_eq!(found.scalars.iter().map(|scalars| scalars.active).sum::<u64>(), wanted.active);
}

#[test]
fn parts_of_rows_of_any_length_have_the_loss_and_gradient_of_the_whole_batch() {
    let (unit, labels) = rows(140, 0.0);
    let e = unit * 3.0;
    let mut gradient = Array2::from_elem((140, 2), f32::NAN);
    let whole = enqueue(&e, &labels, &mut gradient, true).unwrap();
    let LossSettings { lambda_pos, lambda_neg, .. } = LossSettings::default();
    let found = enqueue_parts((&e, &labels), [lambda_pos, lambda_neg], true);
    let sum = |of: fn(&LossScalars) -> f64| found.scalars.iter().map(of).sum::<f64>();
    assert!(whole.loss > 0.0 && (sum(|part| part.loss) - whole.loss).abs() < 1e-6 * whole.loss);
    assert_eq!(sum(|part| part.mined_pos as f64), whole.mined_pos as f64);
    assert_eq!(sum(|part| part.mined_neg as f64), whole.mined_neg as f64);
    let largest = gradient.iter().fold(0.0f32, |most, entry| most.max(entry.abs()));
    assert!(largest > 0.0);
    let close = |(got, want): (&f32, &f32)| (got - want).abs() <= 1e-5 * largest;
    assert!(found.gradient.iter().zip(&gradient).all(close), "{} {gradient}", found.gradient);
}

#[test]
fn parts_of_another_shape_or_out_of_order_are_refused() {
    let (e, labels) = rows(30, 0.0);
    let mut gradient = Array2::zeros((20, 2));
    let part = part_of((&e, &labels), 0..20, &mut gradient, ResidentIdentity::From(0));
    let given = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
    let mut list = [0u64; 31];
    let address = list.as_mut_ptr() as u64;
    let numbers = ResidentNumbers { anchors: address, references: address, count: 30 };
    let mut backend = backend();
    // SAFETY: every address is that of a matrix or list of this test; refused calls use none.
    unsafe {
        let early = backend.enqueue_sweep(&part, numbers, address, address);
        assert!(matches!(early, Err(Error::OutOfOrder(_))));
        backend.enqueue_same_class(&part, &given, address).unwrap();
        let other = part_of((&e, &labels), 0..19, &mut gradient, ResidentIdentity::From(0));
        let refused = backend.enqueue_sweep(&other, numbers, address, address);
        assert!(matches!(refused, Err(Error::OutOfOrder(_))));
        backend.enqueue_same_class(&part, &given, address).unwrap();
        let many = ResidentNumbers { count: 31, ..numbers };
        let refused = backend.enqueue_sweep(&part, many, address, address);
        assert!(matches!(refused, Err(Error::LengthMismatch { .. })));
        backend.enqueue_same_class(&part, &given, address).unwrap();
        backend.enqueue_sweep(&part, numbers, address, address).unwrap();
        backend.enqueue_select(&part, numbers, address, [address; 2]).unwrap();
        let fewer = ResidentNumbers { count: 29, ..numbers };
        let refused = backend.enqueue_gradient(&part, [numbers, fewer], address);
        assert!(matches!(refused, Err(Error::LengthMismatch { .. })), "{refused:?}");
        for normalize in [false, true] {
            let part = ResidentPart { normalize, ..part };
            backend.enqueue_same_class(&part, &given, address).unwrap();
            backend.enqueue_sweep(&part, numbers, address, address).unwrap();
            backend.enqueue_select(&part, numbers, address, [address; 2]).unwrap();
            backend.enqueue_gradient(&part, [numbers; 2], address).unwrap();
            let sums = backend.threshold_gradient_resident(&part.batch, [e.as_ptr() as u64, 0]);
            assert_eq!(matches!(sums, Err(Error::OutOfOrder(_))), normalize, "{sums:?}");
        }
        let odd = ResidentSettings { lambda: 4, ..given };
        let refused = backend.enqueue_same_class(&part, &odd, address);
        assert!(matches!(refused, Err(Error::InvalidSetting { name: "lambda", .. })));
        let none = ResidentPart { total: 0, ..part };
        let refused = backend.enqueue_same_class(&none, &given, address);
        assert!(matches!(refused, Err(Error::InvalidSetting { name: "total", .. })));
    }
}
