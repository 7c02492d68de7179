//! Searches and Recall@K of rows given by device address.

use ddtas::Error;
use ddtas::backend::device::{DeviceBackend, ElementType, Options, ResidentBatch, ResidentRows};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::backend::{Backend, Picked};
use ddtas::loss::{Embeddings, Rows, UnitCheck};
use ddtas::retrieval::{recall, recall_by};
use half::{bf16, f16};
use ndarray::Array2;

use super::{backend, batch, nearest, rows};

/// Rows for searches, without labels and gradient.
fn searched<T>(rows: &Array2<T>) -> ResidentRows {
    ResidentRows { count: rows.nrows(), embeddings: rows.as_ptr() as u64, labels: 0, gradient: 0 }
}

/// Compares searches of rows in device memory and in host memory, in one type.
fn search_both_ways<T>(
    (e, r): (&Array2<T>, &Array2<T>),
    dtype: ElementType,
    embeddings: fn(&Array2<T>) -> Embeddings<'_>,
) {
    // More queries than one tile; some k exceed the references.
    for (references, k) in [(None, 1), (None, 200), (Some(r), 1), (Some(r), 7), (Some(r), 60)] {
        let labels = [0; 140];
        let side = |rows| Rows { embeddings: embeddings(rows), labels: &labels[..rows.nrows()] };
        let host =
            backend().nearest(&side(e), references.map(side).as_ref(), k).expect("rows of unit length");
        let batch = ResidentBatch { dtype, ..batch(searched(e), references.map(searched)) };
        assert_eq!(nearest(&batch, k).expect("the same rows"), host, "{dtype:?}, k = {k}");
    }
}

#[test]
fn neighbours_of_resident_rows_are_those_of_the_host_s_in_every_type_and_form() {
    let ((e, _), (r, _)) = (rows(140, 0.0), rows(30, 0.1));
    search_both_ways((&e, &r), ElementType::F32, |m| Embeddings::F32(m.view()));
    let half = |m: &Array2<f32>| m.mapv(f16::from_f32);
    search_both_ways((&half(&e), &half(&r)), ElementType::F16, |m| Embeddings::F16(m.view()));
    let brain = |m: &Array2<f32>| m.mapv(bf16::from_f32);
    search_both_ways((&brain(&e), &brain(&r)), ElementType::Bf16, |m| Embeddings::Bf16(m.view()));
}

#[test]
fn a_search_with_bad_rows_addresses_or_k_is_refused() {
    let ((e, _), (mut r, _)) = (rows(20, 0.0), rows(9, 0.1));
    r[[4, 0]] = f32::NAN;
    r[[6, 1]] = 2.0;
    let (queries, references) = (searched(&e), searched(&r));
    let error = nearest(&batch(queries, Some(references)), 3).unwrap_err();
    assert!(matches!(error, Error::NotFinite { rows: "references", row: 4 }), "{error}");
    r[[4, 0]] = 0.0;
    r[[4, 1]] = 1.0;
    let error = nearest(&batch(searched(&r), None), 3).unwrap_err();
    assert!(matches!(error, Error::NotUnit { rows: "queries", row: 6, .. }), "{error}");
    let trusted = ResidentBatch { check: UnitCheck::Trust, ..batch(searched(&r), None) };
    nearest(&trusted, 3).unwrap();

    for k in [0, 1 << 32] {
        let error = nearest(&batch(queries, None), k).unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { name: "k", .. }), "{error}");
    }
    for address in [0, queries.embeddings + 2] {
        let bad = ResidentRows { embeddings: address, ..queries };
        for refused in [batch(bad, None), batch(queries, Some(bad))] {
            let error = nearest(&refused, 1).unwrap_err();
            assert!(matches!(error, Error::InvalidSetting { name: "embeddings", .. }), "{error}");
        }
    }
    let none = ResidentRows { count: 0, ..queries };
    assert!(matches!(nearest(&batch(none, None), 1), Err(Error::Empty { rows: "queries" })));
    assert!(matches!(nearest(&batch(queries, Some(none)), 1), Err(Error::Empty { rows: "references" })));
}

#[test]
fn recall_of_resident_rows_leaves_ignored_ones_out() {
    let (mut e, mut labels) = rows(140, 0.0);
    for row in (0..140).step_by(5) {
        labels[row] = -1;
    }
    // An ignored row is not checked.
    e[[5, 0]] = f32::NAN;
    e[[135, 0]] = f32::NAN;
    let batch = batch(ResidentRows { labels: labels.as_ptr() as u64, ..searched(&e) }, None);
    let ks = [1, 2, 8];
    let mut backend = backend();
    let host = recall(&mut backend, &Rows::new(e.view(), &labels), None, &ks).unwrap();
    // SAFETY: as in `run`.
    let there = unsafe { backend.labels_resident(&batch.anchors) }.unwrap();
    assert_eq!(there, labels);
    let mut among = |picked: &Picked<'_>, k| {
        // SAFETY: as in `run`.
        unsafe { backend.nearest_resident(&batch, Some(picked), k) }
    };
    assert_eq!(recall_by(&there, &ks, &mut among).unwrap(), host);
    assert!(host.at[0].1 < 1.0 && host.queries > 100, "rows that recall does not trivially pass: {host:?}");

    for listed in [&[][..], &[3, 140]] {
        let few = &[1, 2][..];
        for picked in
            [Picked { queries: listed, gallery: None }, Picked { queries: few, gallery: Some(listed) }]
        {
            let error = among(&picked, 1).unwrap_err();
            let named = matches!(error, Error::Empty { .. } | Error::InvalidSetting { name: "picked", .. });
            assert!(named, "{picked:?}: {error}");
        }
    }
    // SAFETY: as in `run`.
    let refused = unsafe {
        let picked = Picked { queries: &[1, 2], gallery: None };
        backend.nearest_resident(
            &ResidentBatch { references: Some(batch.anchors), ..batch },
            Some(&picked),
            1,
        )
    };
    assert!(matches!(refused, Err(Error::InvalidSetting { name: "picked", .. })), "{refused:?}");
    let good = &[1, 2, 3][..];
    // Far beyond the number of picked rows, too.
    for (bad, row) in [(&[4, 5, 6][..], 5), (&[134, 135, 136], 135)] {
        for picked in
            [Picked { queries: bad, gallery: Some(good) }, Picked { queries: good, gallery: Some(bad) }]
        {
            // In a workspace of its own, which is no larger than it needs to be.
            let mut backend = DeviceBackend::new(EmulatedDevice::new(5), Options::default());
            // SAFETY: as in `run`.
            let error = unsafe { backend.nearest_resident(&batch, Some(&picked), 1) }.unwrap_err();
            let named = matches!(error, Error::NotFinite { rows: "queries", row: said } if said == row);
            assert!(named, "the caller's row: {error}");
        }
    }
}
