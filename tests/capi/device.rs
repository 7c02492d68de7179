//! Rows and gradients in device memory, that of the emulated device.

use std::ptr::{null, null_mut};

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::capi::*;
use ddtas::loss::{self, Batch, LossOutput, LossSettings, UnitCheck};
use ddtas_cases as cases;
use ndarray::Array2;

use super::abi::{Abi, Target, empty_result, settings_of};
use super::random_batch;

#[test]
fn rows_in_device_memory_agree_in_every_type_and_form() {
    // The emulated device's memory is the host's.
    let mut abi = Abi::open("emulated", 0, 0, Memory::Device);
    cases::run_all(&mut abi, cases::golden());
    let rectangular = |case: &cases::Case| case.references.is_some() && case.name.contains("ignored");
    cases::run_all(&mut abi, cases::generated().into_iter().filter(rectangular));
}

#[test]
fn a_loss_that_is_issued_writes_what_the_loss_answers() {
    let case = cases::golden().into_iter().find(|case| case.name == "hard_many_mined").unwrap();
    let abi = Abi::open("emulated", 0, 0, Memory::Device);
    let batch = case.batch();
    let settings = settings_of(&case.settings, UnitCheck::Check);
    let want = abi
        .evaluate(&batch, |anchors, references, result| unsafe {
            ddtas_loss(abi.handle.0, &raw const settings, anchors, references, result)
        })
        .unwrap();
    let laid = abi.lay(&batch.anchors);
    let mut gradient = Target::new((laid.rows.count, laid.rows.dim), 0);
    let mut scalars: LossScalars = unsafe { std::mem::zeroed() };
    let lambdas = [settings.lambda_pos, settings.lambda_neg];
    // Thresholds in device memory override those of the settings.
    let others = Settings { lambda_pos: 0.1, lambda_neg: 0.2, ..settings };
    for (settings, lambda) in [(settings, null()), (others, lambdas.as_ptr())] {
        scalars.loss = 0.0;
        let status = unsafe {
            let (settings, anchors) = (&raw const settings, &raw const laid.rows);
            let to = (gradient.pointer(), &raw mut scalars);
            ddtas_enqueue_loss(abi.handle.0, settings, anchors, null(), to.0, null_mut(), lambda, to.1)
        };
        abi.check(status).unwrap();
        assert!((scalars.loss - want.result.loss).abs() < 1e-6 * want.result.loss && scalars.loss > 0.0);
        assert_eq!((scalars.active, scalars.total_pos), (want.result.active, want.result.total_pos));
        assert_eq!((scalars.bad_anchor, scalars.bad_reference), (DDTAS_ABSENT, DDTAS_ABSENT));
        let off = &gradient.read() - &want.gradient;
        assert!(off.iter().all(|x| x.abs() < 1e-6), "{off}");
        // Thresholds in the caller's memory may be gone by now.
        let tangents = Tangents {
            struct_size: size_of::<Tangents>(),
            anchors: gradient.pointer(),
            anchor_stride: 0,
            references: null(),
            reference_stride: 0,
        };
        let mut sums = [0f64; 2];
        let [pos, neg] = &mut sums;
        let status = unsafe {
            let (anchors, tangents) = (&raw const laid.rows, &raw const tangents);
            ddtas_threshold_gradient(abi.handle.0, anchors, null(), tangents, &raw mut *pos, &raw mut *neg)
        };
        assert_eq!(status, if lambda.is_null() { Status::Ok } else { Status::OutOfOrder });
        assert_eq!(sums != [0.0; 2], lambda.is_null());
    }
    let host = Abi { memory: Memory::Host, ..abi.clone() };
    let laid = host.lay(&batch.anchors);
    let status = unsafe {
        let to = (gradient.pointer(), &raw mut scalars);
        let anchors = &raw const laid.rows;
        ddtas_enqueue_loss(abi.handle.0, null(), anchors, null(), to.0, null_mut(), null(), to.1)
    };
    assert!(abi.check(status).unwrap_err().to_string().contains("takes rows in device memory"));
}

#[test]
fn rows_of_any_length_are_normalised_on_request() {
    let [(anchors, labels), (references, reference_labels)] = [71, 72].map(|seed| {
        let (mut rows, labels) = random_batch(seed);
        rows.outer_iter_mut().enumerate().for_each(|(i, mut row)| row *= 0.5 + i as f32);
        (rows, labels)
    });
    let references = loss::Rows::new(references.view(), &reference_labels);
    let anchors = loss::Rows::new(anchors.view(), &labels);
    let batch = Batch::rectangular(anchors, references).with_reference_gradient();
    let (paper, mut want) = (LossSettings::default(), LossOutput::default());
    CpuBackend::new().normalized_loss(&batch, &paper, &mut want).unwrap();
    let turned = want.reference_gradient.as_ref().unwrap();
    let settings = Settings { normalize: 1, ..settings_of(&paper, UnitCheck::Check) };
    let host = Abi::open("cpu", 1, 3, Memory::Host);
    let loss_of = |abi: &Abi, settings: Settings| {
        abi.evaluate(&batch, |anchors, references, result| unsafe {
            ddtas_loss(abi.handle.0, &raw const settings, anchors, references, result)
        })
    };
    let got = loss_of(&host, settings).unwrap();
    assert_eq!((&got.gradient, got.reference_gradient.as_ref()), (&want.gradient, Some(turned)));
    // It would be that of unit rows.
    let zeros = [want.gradient.dim(), turned.dim()].map(Array2::<f32>::zeros);
    let after = host.clone().threshold_gradient(&batch, zeros[0].view(), Some(zeros[1].view()));
    assert!(after.unwrap_err().to_string().contains("needs a loss before it"));
    let device = Abi::open("emulated", 0, 0, Memory::Device);
    let (anchors, references) = (device.lay(&batch.anchors), device.lay_references(&batch).unwrap());
    let mut gradients = [want.gradient.dim(), turned.dim()].map(|shape| Target::new(shape, 0));
    let mut scalars: LossScalars = unsafe { std::mem::zeroed() };
    let status = unsafe {
        let [own, other] = &mut gradients;
        let (sides, lambda) = ((&raw const anchors.rows, &raw const references.rows), null());
        let (own, other, to) = (own.pointer(), other.pointer(), &raw mut scalars);
        ddtas_enqueue_loss(device.handle.0, &raw const settings, sides.0, sides.1, own, other, lambda, to)
    };
    device.check(status).unwrap();
    assert!((scalars.loss - want.loss).abs() < 1e-5 * want.loss && want.loss > 0.0);
    assert_eq!((scalars.active, scalars.total_neg), (want.active, want.total_neg));
    for (found, want) in gradients.iter().zip([&want.gradient, turned]) {
        let largest = want.fold(0f32, |most, x| most.max(x.abs()));
        assert!((&found.read() - want).iter().all(|x| x.abs() < 2e-5 * largest));
    }
    let refused = |abi: &Abi, settings| loss_of(abi, settings).map(drop).unwrap_err().to_string();
    assert!(refused(&device, settings).contains("ddtas_enqueue_loss those in device memory"));
    assert!(refused(&host, Settings { normalize: 2, ..settings }).contains("normalize = 2 is out of range"));
    let part = Part { struct_size: size_of::<Part>(), total: 120, ..unsafe { std::mem::zeroed() } };
    let of_part = Batch { reference_gradient: false, ..batch };
    let step = host.evaluate(&of_part, |anchors, references, result| unsafe {
        ddtas_same_class(host.handle.0, &raw const settings, anchors, references, &raw const part, result)
    });
    let message = step.map(drop).unwrap_err().to_string();
    assert!(message.contains("set normalize to 0"), "{message}");
}

#[test]
fn trusted_rows_in_device_memory_are_not_checked_and_a_gradient_is_needed() {
    let case = cases::golden().remove(0);
    let abi = Abi::open("emulated", 0, 0, Memory::Device);
    let laid = abi.lay(&case.batch().anchors);
    let longer = vec![2f32; laid.rows.count * laid.rows.dim];
    let rows = Rows { embeddings: longer.as_ptr().cast(), dtype: Dtype::F32 as i32, ..laid.rows };
    let mut gradient = Target::new((rows.count, rows.dim), 0);
    let loss = |check, gradient: *mut f32| {
        let settings = settings_of(&case.settings, check);
        let mut result = LossResult { gradient, ..empty_result() };
        unsafe { ddtas_loss(abi.handle.0, &raw const settings, &raw const rows, null(), &raw mut result) }
    };
    assert_eq!(loss(UnitCheck::Check, gradient.pointer()), Status::NotUnit);
    assert_eq!(loss(UnitCheck::Trust, gradient.pointer()), Status::Ok);
    assert_eq!(loss(UnitCheck::Trust, null_mut()), Status::NullPointer);
}

#[test]
fn recall_of_rows_in_device_memory_is_that_of_the_host_s() {
    let mut case = cases::golden().into_iter().find(|case| case.name == "hard_many_mined").unwrap();
    let device = Abi::open("emulated", 0, 0, Memory::Device);
    let host = Abi { memory: Memory::Host, ..device.clone() };
    // Ignore one row, every third row, all rows.
    for ignored in [usize::MAX, 3, 1] {
        case.anchors.labels.iter_mut().step_by(ignored).for_each(|label| *label = -1);
        let both = [&device, &host].map(|abi| {
            let laid = abi.lay(&case.batch().anchors);
            abi.recall(&laid.rows, &[1, 4, 1000]).unwrap()
        });
        assert_eq!(both[0], both[1], "every {ignored}th row is ignored");
        assert_eq!(both[0].1 == 0, ignored == 1, "{both:?}");
    }
}

#[test]
fn a_search_in_device_memory_refuses_what_the_loss_refuses() {
    let case = cases::golden().remove(0);
    let abi = Abi::open("emulated", 0, 0, Memory::Device);
    let laid = abi.lay(&case.batch().anchors);
    let good = laid.rows;
    let (mut indices, mut similarities) = ([7u32; 1000], [7f32; 1000]);
    let mut refused = |rows: Rows, references: Option<&Rows>, k: usize| {
        let references = references.map_or(null(), |rows| &raw const *rows);
        let (to, and) = (indices.as_mut_ptr(), similarities.as_mut_ptr());
        let status = unsafe { ddtas_nearest(abi.handle.0, &raw const rows, references, k, to, and) };
        assert!(indices[0] == 7 && similarities[0] == 7.0, "a call that fails writes nothing");
        (status, abi.message())
    };
    let address = good.embeddings.addr();
    let at = |address: usize| std::ptr::without_provenance(address);
    assert_eq!(refused(Rows { embeddings: null(), ..good }, None, 1).0, Status::NullPointer);
    assert_eq!(refused(Rows { embeddings: at(address + 2), ..good }, None, 1).0, Status::Misaligned);
    assert_eq!(refused(Rows { row_stride: good.dim + 1, ..good }, None, 1).0, Status::InvalidShape);
    assert_eq!(refused(good, None, 0), (Status::InvalidValue, "k = 0 is out of range: 1 or more".into()));
    let on_host = Rows { memory: Memory::Host as i32, ..good };
    assert_eq!(refused(good, Some(&on_host), 1).0, Status::InvalidValue);
    assert_eq!(abi.recall(&Rows { labels: null(), ..good }, &[1]).unwrap_err().to_string(), {
        "NullPointer: rows.labels is NULL"
    });
    let bad = vec![f32::NAN; good.count * good.dim];
    let (status, message) = refused(Rows { embeddings: bad.as_ptr().cast(), ..good }, Some(&good), 1);
    assert_eq!((status, message.contains("row 0 of the queries")), (Status::NotFinite, true), "{message}");
    // Labels may be NULL, and k may exceed the number of rows.
    let nameless = Rows { labels: null(), count: 3, ..good };
    let (mut found, mut how_close) = ([7u32; 15], [7f32; 15]);
    let (to, and) = (found.as_mut_ptr(), how_close.as_mut_ptr());
    let status = unsafe { ddtas_nearest(abi.handle.0, &raw const nameless, null(), 5, to, and) };
    assert_eq!(status, Status::Ok, "{}", abi.message());
    assert!(found[..2].iter().all(|&index| index < 3) && found[2..5] == [DDTAS_NO_NEIGHBOUR; 3], "{found:?}");
    assert_eq!(how_close[2..5], [f32::NEG_INFINITY; 3]);
}
