//! The C ABI against the float64 truth: the whole table of cases through its functions, which the backend
//! [`Abi`] calls. The C programs beside this file test hostile input, with sanitizers (`.ci/linked.sh`).
#![allow(clippy::undocumented_unsafe_blocks, reason = "every call below hands in live memory of its own")]
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

mod abi;
#[cfg(feature = "emulated")]
mod device;

use std::ptr::null;

use abi::{Abi, empty_result, settings_of};
use ddtas::backend::Backend;
use ddtas::capi::*;
use ddtas::loss::{self, Batch, LossOutput, LossSettings, UnitCheck};
use ddtas_cases as cases;
use ddtas_cases::parts::{self, loss_in_parts};
use ddtas_cases::random::{Draw, draw, tangent};
use half::bf16;
use ndarray::{Array2, s};

#[test]
fn golden_cases_agree_through_the_c_abi() {
    cases::run_all(&mut Abi::open("cpu", 0, 0, Memory::Host), cases::golden());
}

#[test]
fn every_type_and_form_agrees_with_packed_rows() {
    cases::run_all(&mut Abi::open("cpu", 2, 0, Memory::Host), cases::generated());
}

#[test]
fn every_type_and_form_agrees_with_strided_rows() {
    cases::run_all(&mut Abi::open("cpu", 1, 3, Memory::Host), cases::generated());
}

fn random_batch(seed: u64) -> (Array2<f32>, Vec<i64>) {
    draw(Draw { rows: 120, dim: 40, classes: 20, noise: 1.8, ignored: 9, duplicates: 13 }, seed)
}

#[test]
fn parts_of_strided_rows_have_the_bits_of_the_whole() {
    // tests/capi/parts.c does this with packed f32 rows.
    let (rows, labels) = random_batch(61);
    let brain = rows.mapv(bf16::from_f32);
    let open = |_: &usize| -> Box<dyn Backend> { Box::new(Abi::open("cpu", 1, 3, Memory::Host)) };
    let (settings, mut whole) = (LossSettings::default(), LossOutput::default());
    open(&0).loss(&Batch::square(brain.view(), &labels), &settings, &mut whole).unwrap();
    let lengths = [0, 1, 79, 0, 40];
    let mut backends: Vec<_> = lengths.iter().map(open).collect();
    let all = loss::Rows::new(brain.view(), &labels);
    let found = loss_in_parts(&mut backends, &all, &lengths, &settings, tangent(120, 40, 3).view()).unwrap();
    assert!((found.output.loss - whole.loss).abs() <= 1e-6 * whole.loss && whole.active > 0);
    // Sums over the batch, in another order, are equal up to rounding; all else bit for bit.
    let sums = LossOutput {
        loss: whole.loss,
        dloss_dlambda_pos: whole.dloss_dlambda_pos,
        dloss_dlambda_neg: whole.dloss_dlambda_neg,
        mean_pos: whole.mean_pos,
        mean_neg: whole.mean_neg,
        ..found.output
    };
    assert_eq!(sums, whole);
}

#[test]
fn parts_and_identity_through_the_c_abi_agree_with_the_truth() {
    let open = |part| -> Box<dyn Backend> { Box::new(Abi::open("cpu", 1 + part % 2, part, Memory::Host)) };
    parts::run_all(open, cases::generated().into_iter().chain(cases::golden()));
    parts::check_memory(open);
    parts::check_identity(&mut *open(3));
}

#[test]
fn pairs_of_a_block_of_references_are_mined_if_another_block_makes_the_anchor_active() {
    // The block holds no positive of any anchor.
    let (rows, labels) = random_batch(66);
    let (own, block) =
        ([loss::Rows::new(rows.slice(s![..20, ..]), &[900; 20])], loss::Rows::new(rows.view(), &labels));
    let part = Batch::part(own[0], block, loss::Identity::ByValue, 20).trusted();
    let (settings, mut output) = (LossSettings::default(), LossOutput::default());
    let mut abi = Abi::open("cpu", 1, 0, Memory::Host);
    let (min_pos, count_pos) = ([0.2; 20], [3; 20]);
    abi.same_class(&part, &settings, &mut output).unwrap();
    abi.sweep(&part, loss::RowNumbers::new(&min_pos, &[]), &mut output).unwrap();
    let max_neg = output.max_neg.clone();
    abi.select(&part, loss::RowNumbers::new(&max_neg, &[]), output.pair_totals(), &mut output).unwrap();
    let count_neg = output.count_neg.clone();
    // The call compares the numbers of mined pairs.
    let (pos, neg) = (loss::RowNumbers::new(&count_pos[..], &[]), loss::RowNumbers::new(&count_neg[..], &[]));
    abi.gradient(&part, pos, neg, &mut output).unwrap();
    assert_eq!(output.mined(), (0, 0));
    assert!(output.mined_of_part(&count_pos, &count_neg).1 > 20 && output.loss > 0.0);
}

#[test]
fn a_search_without_labels_follows_a_larger_one_and_the_budget_is_the_caller_s() {
    let (rows, labels) = random_batch(67);
    let abi = Abi::open("cpu", 1, 0, Memory::Host);
    let laid = abi.lay(&loss::Rows::new(rows.view(), &labels));
    for count in [120, 30] {
        let queries = Rows { count, labels: null(), ..laid.rows };
        let (mut indices, mut similarities) = (vec![7u32; count], vec![7f32; count]);
        let (to, and) = (indices.as_mut_ptr(), similarities.as_mut_ptr());
        let status = unsafe { ddtas_nearest(abi.handle.0, &raw const queries, null(), 1, to, and) };
        assert_eq!(status, Status::Ok, "{}", abi.message());
    }
    let bytes = [1, 0].map(|workspace_bytes| {
        let options = ContextOptions { device: c"cpu".as_ptr(), threads: 1, ..unsafe { std::mem::zeroed() } };
        let options = ContextOptions { struct_size: size_of::<ContextOptions>(), workspace_bytes, ..options };
        let (mut context, mut bytes) = (std::ptr::null_mut(), 0);
        let mut result = empty_result();
        unsafe {
            ddtas_context_create(&raw const options, &raw mut context, std::ptr::null_mut(), 0);
            let status = ddtas_loss(context, null(), &raw const laid.rows, null(), &raw mut result);
            assert_eq!((status, ddtas_workspace_bytes(context, &raw mut bytes)), (Status::Ok, Status::Ok));
            ddtas_context_destroy(context);
        }
        bytes
    });
    assert!(bytes[0] + 1000 < bytes[1], "{bytes:?}: of one byte, and of the default");
}

#[test]
fn a_message_is_never_cut_within_a_character() {
    let options = ContextOptions { device: c"\u{e4}\u{f6}\u{fc}".as_ptr(), ..unsafe { std::mem::zeroed() } };
    let options = ContextOptions { struct_size: size_of::<ContextOptions>(), ..options };
    for bytes in 1..30 {
        let (mut context, mut message) = (std::ptr::null_mut(), [7u8; 30]);
        let to = message.as_mut_ptr().cast();
        let status = unsafe { ddtas_context_create(&raw const options, &raw mut context, to, bytes) };
        assert_eq!(status, Status::InvalidValue);
        let text = std::ffi::CStr::from_bytes_until_nul(&message).unwrap().to_str();
        assert!(text.is_ok_and(|text| text.len() + 2 >= bytes), "{bytes}: {message:?}");
    }
}

#[test]
fn identity_by_index_through_the_c_abi_is_that_of_the_library() {
    let (rows, labels) = random_batch(62);
    // The batch is among the references, but rounded, so that it cannot be recognised by value.
    let (mut references, mut reference_labels) = random_batch(63);
    references
        .slice_mut(s![20..60, ..])
        .assign(&rows.slice(s![..40, ..]).mapv(|x| bf16::from_f32(x).to_f32()));
    reference_labels[20..60].copy_from_slice(&labels[..40]);
    let list: Vec<u32> = (20..60).map(|j| if j % 3 == 0 { DDTAS_ABSENT } else { j }).collect();
    let anchors = loss::Rows::new(rows.slice(s![..40, ..]), &labels[..40]);
    let against = loss::Rows::new(references.view(), &reference_labels);
    let batch = Batch::rectangular(anchors, against).with_reference_gradient().trusted();
    let settings = LossSettings::default();
    let mut positives = Vec::new();
    for identity in [loss::Identity::ByValue, loss::Identity::List(&list), loss::Identity::From(20)] {
        let batch = batch.with_identity(identity);
        let (mut got, mut wanted) = (LossOutput::default(), LossOutput::default());
        let (mut abi, mut cpu) =
            (Abi::open("cpu", 1, 2, Memory::Host), ddtas::backend::cpu::CpuBackend::new());
        abi.loss(&batch, &settings, &mut got).unwrap();
        cpu.loss(&batch, &settings, &mut wanted).unwrap();
        assert_eq!(got, wanted, "{identity:?}");
        let total_pos = got.total_pos;
        let tangent = tangent(40, 40, 5);
        let sums = [&mut abi as &mut dyn Backend, &mut cpu]
            .map(|b| b.threshold_gradient(&batch, tangent.view(), None));
        let [got, wanted] = sums.map(Result::unwrap);
        assert_eq!(got, wanted, "{identity:?}");
        positives.push(total_pos);
    }
    let known = |count: usize| labels[..40].iter().take(count).filter(|label| **label >= 0).count() as u64;
    assert_eq!(positives[0] - positives[2], known(40), "each anchor is one positive less");
    assert!(positives[2] < positives[1] && positives[1] < positives[0], "{positives:?}");
}

#[test]
fn a_program_with_the_first_header_goes_on_working() {
    // The structs of the first header are shorter; the program's memory behind them may hold anything.
    let (rows, labels) = random_batch(64);
    let abi = Abi::open("cpu", 1, 0, Memory::Host);
    // Keeps the memory alive that `laid` points to.
    let held = abi.lay(&loss::Rows::new(rows.view(), &labels));
    let mut laid = held.rows;
    let mut result = empty_result();
    let whole = unsafe { ddtas_loss(abi.handle.0, null(), &raw const laid, null(), &raw mut result) };
    assert!(whole == Status::Ok && result.total_neg > 0);
    laid.struct_size = std::mem::offset_of!(Rows, identity);
    (laid.identity, laid.identity_first, laid.identity_list) = (-1, 99, std::ptr::without_provenance(1));
    let mut old = empty_result();
    (old.struct_size, old.total_neg) = (std::mem::offset_of!(LossResult, total_neg), 77);
    let paper = settings_of(&LossSettings::default(), UnitCheck::Check);
    let settings =
        Settings { struct_size: std::mem::offset_of!(Settings, normalize), normalize: 77, ..paper };
    for references in [null(), &raw const laid] {
        let settings = &raw const settings;
        let status = unsafe { ddtas_loss(abi.handle.0, settings, &raw const laid, references, &raw mut old) };
        assert_eq!((status, old.total_neg), (Status::Ok, 77), "{}", abi.message());
        assert!((old.loss - result.loss).abs() < 1e-6 * result.loss);
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = cases::golden().into_iter().find(|case| case.name == "odd_sizes_257x130").unwrap();
    let mut outputs = [1, 2, 5].map(|threads| {
        let mut output = LossOutput::default();
        Abi::open("cpu", threads, 1, Memory::Host).loss(&case.batch(), &case.settings, &mut output).unwrap();
        output
    });
    assert!(outputs[0].active > 0);
    outputs.rotate_left(1);
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[1], outputs[2]);
}

#[test]
fn recall_through_the_c_abi_is_that_of_the_library() {
    let case = cases::golden().into_iter().find(|case| case.name == "hard_many_mined").unwrap();
    let batch = case.batch();
    let expected = ddtas::retrieval::recall(
        &mut ddtas::backend::cpu::CpuBackend::new(),
        &batch.anchors,
        None,
        &[1, 2, 8],
    )
    .unwrap();
    let abi = Abi::open("cpu", 0, 5, Memory::Host);
    // Out of order, with a repeated k and one far beyond the number of rows.
    let (recall, queries) = abi.recall(&abi.lay(&batch.anchors).rows, &[8, 1, 2, 1, usize::MAX]).unwrap();
    assert_eq!(queries, expected.queries as u64);
    assert_eq!(recall[..4], [8, 1, 2, 1].map(|k| expected.get(k).unwrap()));
    assert_eq!(recall[4], 1.0, "a list of everything holds one of every class");
    assert!(recall[1] < 1.0, "a case that recall does not trivially pass");
}

#[test]
fn auto_is_the_device_that_programs_take() {
    let taken = ddtas::backend::auto().spec.to_string();
    assert_eq!(Abi::open("auto", 1, 0, Memory::Host).name(), taken);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_gpus_says_how_to_install_one_with_them() {
    let options = ContextOptions { device: c"cuda".as_ptr(), ..unsafe { std::mem::zeroed() } };
    let options = ContextOptions { struct_size: size_of::<ContextOptions>(), ..options };
    let (mut context, mut message) = (std::ptr::null_mut(), [0u8; 256]);
    let status = unsafe {
        ddtas_context_create(&raw const options, &raw mut context, message.as_mut_ptr().cast(), message.len())
    };
    let message = std::ffi::CStr::from_bytes_until_nul(&message).unwrap().to_str().unwrap();
    assert_eq!(status, Status::Unavailable);
    assert!(message.ends_with("with `packaging/install.sh PREFIX cuda`"), "{message}");
}

#[test]
fn a_device_without_memory_of_its_own_refuses_device_rows() {
    let case = cases::golden().remove(0);
    let mut abi = Abi::open("cpu", 1, 0, Memory::Device);
    let mut output = LossOutput::default();
    let rows = abi.lay(&case.batch().anchors);
    for error in [
        abi.loss(&case.batch(), &case.settings, &mut output).unwrap_err(),
        abi.nearest(&case.batch().anchors, None, 1).unwrap_err(),
        abi.recall(&rows.rows, &[1]).unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "Unavailable: the device cpu takes rows in host memory only");
    }
}

#[test]
fn a_newer_header_is_understood_until_it_uses_what_is_new() {
    let case = cases::golden().remove(0);
    let mut abi = Abi::open("cpu", 1, 0, Memory::Host);
    let mut output = LossOutput::default();
    abi.loss(&case.batch(), &case.settings, &mut output).unwrap();

    #[repr(C)]
    struct Newer {
        settings: Settings,
        added: f64,
    }
    let rows = abi.lay(&case.batch().anchors);
    let run = |added: f64| {
        let mut newer = Newer { settings: settings_of(&case.settings, UnitCheck::Check), added };
        newer.settings.struct_size = size_of::<Newer>();
        let mut result = empty_result();
        let settings = (&raw const newer).cast::<Settings>();
        let status =
            unsafe { ddtas_loss(abi.handle.0, settings, &raw const rows.rows, null(), &raw mut result) };
        (status, result.loss)
    };
    assert_eq!(run(0.0), (Status::Ok, output.loss));
    assert_eq!(run(1.0), (Status::StructSize, 0.0));
    assert!(abi.message().contains("ddtas_settings.struct_size"), "{}", abi.message());

    let dirty = Settings {
        struct_size: 77,
        mining: 77,
        gamma: 77.0,
        ..settings_of(&case.settings, UnitCheck::Check)
    };
    let mut newer = Newer { settings: dirty, added: 77.0 };
    let status = unsafe { ddtas_settings_init((&raw mut newer).cast(), size_of::<Newer>()) };
    assert_eq!((status, newer.settings.struct_size, newer.added), (Status::Ok, size_of::<Newer>(), 0.0));
    let paper = LossSettings::default();
    assert_eq!((newer.settings.mining, newer.settings.gamma), (MiningMode::AtAsms as i32, paper.gamma));
    assert_eq!(newer.settings.lambda_neg, paper.lambda_neg);
}

#[test]
fn a_struct_size_that_cuts_a_field_is_refused() {
    let (rows, labels) = random_batch(65);
    let abi = Abi::open("cpu", 1, 0, Memory::Host);
    let held = abi.lay(&loss::Rows::new(rows.view(), &labels));
    let list: Vec<u32> = (0..120).collect();
    let (identity, identity_list) = (Identity::List as i32, list.as_ptr());
    let whole = Rows { identity, identity_list, ..held.rows };
    let run = |rows_size, result_size| {
        let references = Rows { struct_size: rows_size, ..whole };
        let mut result = LossResult { struct_size: result_size, ..empty_result() };
        unsafe {
            ddtas_loss(abi.handle.0, null(), &raw const held.rows, &raw const references, &raw mut result)
        }
    };
    let (rows_size, result_size) = (size_of::<Rows>(), size_of::<LossResult>());
    assert_eq!(run(rows_size, result_size), Status::Ok, "{}", abi.message());
    for missing in 1..8 {
        assert_eq!(run(rows_size - missing, result_size), Status::StructSize, "{missing}");
        assert_eq!(run(rows_size, result_size - missing), Status::StructSize, "{missing}");
    }
    // The end of a field, which an older header may have had.
    assert_eq!(run(std::mem::offset_of!(Rows, identity_list), result_size), Status::NullPointer);
    assert_eq!(run(rows_size, result_size - 8), Status::Ok, "{}", abi.message());
}
