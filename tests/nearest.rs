//! Searches by the emulated kernels must equal the CPU's bit for bit. Similarities are exact in every type
//! and order of addition, and many of them are equal.

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::loss::{Embeddings, Rows};
use ndarray::Array2;

/// A backend on a device with `multiprocessors`, on which the splits of few queries depend. `hopper`: with
/// Hopper's kernels; `exact`: f32 rows are not rounded.
fn backend(seed: u64, multiprocessors: u32, hopper: bool, exact: bool) -> DeviceBackend<EmulatedDevice> {
    let device = EmulatedDevice::new(seed).with_multiprocessors(multiprocessors);
    let device = if hopper { device.as_hopper() } else { device };
    DeviceBackend::new(device, Options { tf32: !exact, ..Options::default() })
}

/// Rows with 16 entries of 1/4 or -1/4, spread evenly over `dim`: similarities are multiples of 1/8.
fn rows(count: usize, dim: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    let mut rows = Array2::zeros((count, dim));
    for row in 0..count {
        for entry in 0..16 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            rows[[row, entry * dim / 16]] = if state >> 63 == 0 { 0.25 } else { -0.25 };
        }
    }
    rows
}

/// Asserts that `backend` and the CPU find the same neighbours, in the references or among the queries.
fn agree(backend: &mut dyn Backend, queries: &Rows<'_>, references: Option<&Rows<'_>>, k: usize, what: &str) {
    let expected = CpuBackend::new().nearest(queries, references, k).expect("the rows are valid");
    let found = backend.nearest(queries, references, k).expect("the rows are valid");
    assert!(found == expected, "{what}, k = {k}");
}

#[test]
fn any_number_of_splits_finds_the_same_in_every_type() {
    let (e, r) = (rows(140, 16, 1), rows(600, 16, 2));
    let (e16, r16) = (e.mapv(half::f16::from_f32), r.mapv(half::f16::from_f32));
    let (eb, rb) = (e.mapv(half::bf16::from_f32), r.mapv(half::bf16::from_f32));
    let labels = vec![0; 600];
    let types = [
        (Embeddings::F32(e.view()), Embeddings::F32(r.view()), true),
        (Embeddings::F32(e.view()), Embeddings::F32(r.view()), false),
        (Embeddings::F16(e16.view()), Embeddings::F16(r16.view()), true),
        (Embeddings::Bf16(eb.view()), Embeddings::Bf16(rb.view()), true),
    ];
    for (seed, (queries, references, exact)) in (0..).zip(types) {
        let (queries, references) = (
            Rows { embeddings: queries, labels: &labels[..140] },
            Rows { embeddings: references, labels: &labels },
        );
        for hopper in [false, true] {
            // One block for all references, two, and one for each tile.
            for (multiprocessors, k) in [(1, 10), (4, 40), (64, 200)] {
                let what = format!("type {seed}, hopper {hopper}, {multiprocessors} multiprocessors");
                let mut backend = backend(seed, multiprocessors, hopper, exact);
                agree(&mut backend, &queries, Some(&references), k, &what);
            }
        }
    }
}

#[test]
fn rows_among_themselves_leave_themselves_out() {
    // Ten distinct rows among 300: nearly all similarities of a list are equal. The last two k are all other
    // rows, and more than there are.
    let few = Array2::from_shape_fn((300, 16), |(row, d)| rows(10, 16, 3)[[row % 10, d]]);
    let labels = vec![0; 300];
    let queries = Rows::new(few.view(), &labels);
    for (seed, hopper) in [(10, false), (11, true)] {
        for (multiprocessors, k) in [(1, 1), (1, 50), (8, 31), (8, 299), (8, 400)] {
            let what = format!("hopper {hopper}, {multiprocessors} multiprocessors");
            agree(&mut backend(seed, multiprocessors, hopper, true), &queries, None, k, &what);
        }
    }
}

#[test]
fn references_that_grow_more_similar_cut_their_lists_again_and_again() {
    // The similarities are 2,000 successive f16 numbers from 1/4 on: each exceeds all before it.
    let references = Array2::from_shape_fn((2_000, 2), |(row, d)| {
        let similarity = half::f16::from_bits(0x3400 + row as u16);
        let across = (1.0 - similarity.to_f32().powi(2)).max(0.0).sqrt();
        if d == 0 { similarity } else { half::f16::from_f32(across) }
    });
    let queries = Array2::from_shape_fn((3, 2), |(_, d)| half::f16::from_f32(if d == 0 { 1.0 } else { 0.0 }));
    let labels = vec![0; 2_000];
    let queries = Rows::new(Embeddings::F16(queries.view()), &labels[..3]);
    let references = Rows::new(Embeddings::F16(references.view()), &labels);
    for (seed, hopper) in [(20, false), (21, true)] {
        for (multiprocessors, k) in [(1, 1), (1, 64), (3, 150)] {
            let what = format!("hopper {hopper}, {multiprocessors} multiprocessors");
            agree(&mut backend(seed, multiprocessors, hopper, true), &queries, Some(&references), k, &what);
        }
    }
}

#[test]
fn rows_wider_than_a_resident_tile_agree() {
    // A query tile of 576 dimensions does not stay in shared memory, one of 512 does.
    for (dim, exact) in [(576, true), (576, false), (512, true)] {
        let (e, r) = (rows(5, dim, 4), rows(390, dim, 5));
        let labels = vec![0; 390];
        let (queries, references) = (Rows::new(e.view(), &labels[..5]), Rows::new(r.view(), &labels));
        let what = format!("{dim} dimensions, exact {exact}");
        agree(&mut backend(30, 1, true, exact), &queries, Some(&references), 20, &what);
    }
}

#[test]
fn lists_too_long_for_shared_memory_are_merged_where_they_are() {
    let (e, r) = (rows(2, 16, 6), rows(7_000, 16, 7));
    let labels = vec![0; 7_000];
    let (queries, references) = (Rows::new(e.view(), &labels[..2]), Rows::new(r.view(), &labels));
    for (seed, multiprocessors, hopper) in [(40, 3, false), (41, 1, true)] {
        let what = format!("hopper {hopper}");
        agree(&mut backend(seed, multiprocessors, hopper, true), &queries, Some(&references), 6_400, &what);
        agree(&mut backend(seed, multiprocessors, hopper, true), &queries, Some(&references), 1_000, &what);
    }
}

#[test]
fn more_queries_than_lists_have_memory_for_are_searched_in_turns() {
    // Five query tiles, whose lists take 1 MiB each: two tiles at a time.
    let (e, r) = (rows(600, 16, 8), rows(300, 16, 9));
    let (e16, r16) = (e.mapv(half::f16::from_f32), r.mapv(half::f16::from_f32));
    let labels = vec![0; 600];
    let queries = Rows { embeddings: Embeddings::F16(e16.view()), labels: &labels };
    let references = Rows { embeddings: Embeddings::F16(r16.view()), labels: &labels[..300] };
    for (seed, hopper, turns) in [(50, false, 3), (51, true, 3)] {
        let device = EmulatedDevice::new(seed).with_multiprocessors(1).with_list_bytes(1 << 21);
        let device = if hopper { device.as_hopper() } else { device };
        let mut backend = DeviceBackend::new(device, Options::default());
        agree(&mut backend, &queries, Some(&references), 10, &format!("hopper {hopper}"));
        let merges =
            backend.device().launched().iter().filter(|kernel| **kernel == "retrieval_merge").count();
        assert_eq!(merges, turns, "hopper {hopper}");
    }
}
