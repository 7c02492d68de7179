//! MAT-files: SciPy's files are read as SciPy reads them, SciPy reads ours, and damaged files are refused.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ddtas_fixtures::mat::{encode, number, structs, text};
use ddtas_train::data::mat::{Array, Variables, parse, read};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::{Value, json};

const FILES: &str = "tests/mat";

/// Whether `array` equals what tests/mat/scipy_files.py printed; numbers are text, exact to the last bit.
fn is_same(array: &Array, expected: &Value) -> bool {
    let all = |arrays: &[Array], key: &str| {
        let expected = expected[key].as_array();
        expected.is_some_and(|expected| {
            expected.len() == arrays.len()
                && arrays.iter().zip(expected).all(|(array, expected)| is_same(array, expected))
        })
    };
    match array {
        Array::Numbers(numbers) => {
            let number = |value: &Value| value.as_str().unwrap().parse::<f64>().unwrap();
            let expected = expected["numbers"].as_array();
            expected.is_some_and(|expected| expected.iter().map(number).eq(numbers.iter().copied()))
        }
        Array::Text(text) => expected["text"] == json!(text),
        Array::Cells(cells) => all(cells, "cells"),
        Array::Structs { fields, values } => expected["fields"] == json!(fields) && all(values, "values"),
    }
}

fn assert_same(variables: &Variables, expected: &Value, what: &str) {
    let expected = expected.as_object().unwrap();
    assert_eq!(variables.0.len(), expected.len(), "{what}");
    for (name, array) in &variables.0 {
        assert!(
            is_same(array, &expected[name]),
            "{what}, {name}: read {array:?}, expected {}",
            expected[name]
        );
    }
}

fn mat_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "mat"));
    files.sort();
    files
}

/// Checks every file of a folder that `scipy_files.py write` filled.
fn check_folder(folder: &Path) {
    let mut checked = 0;
    for file in mat_files(folder) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        checked += 1;
        if let Some(kind) = name.strip_prefix("refused_") {
            let error = read(&file).unwrap_err().to_string();
            assert!(error.contains(&format!("variable {kind} ")), "{error}");
            continue;
        }
        let expected = file.with_file_name(format!("{}.json", name.trim_end_matches("_compressed")));
        let expected = serde_json::from_slice(&fs::read(expected).unwrap()).unwrap();
        assert_same(&read(&file).unwrap(), &expected, name);
    }
    assert_eq!(checked, 13);
}

/// Runs scipy_files.py with `$DDTAS_PYTHON` or python3; `None` without SciPy.
fn scipy(arguments: &[&str]) -> Option<Vec<u8>> {
    let python = std::env::var("DDTAS_PYTHON").unwrap_or_else(|_| "python3".into());
    let there = Command::new(&python).args(["-c", "import numpy, scipy.io"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        println!("skipped: {python} cannot import scipy");
        return None;
    }
    let output =
        Command::new(&python).arg(format!("{FILES}/scipy_files.py")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(output.stdout)
}

#[test]
fn files_by_scipy_are_read_as_scipy_reads_them() {
    check_folder(Path::new(FILES));
}

#[test]
fn files_by_the_present_scipy_are_read_too() {
    let place = tempfile::tempdir().unwrap();
    if scipy(&["write", place.path().to_str().unwrap()]).is_some() {
        check_folder(place.path());
    }
}

#[test]
fn scipy_reads_what_is_written() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("ours.mat");
    let variables = Variables(vec![
        ("small".into(), number(7.0)),
        ("negative".into(), Array::Numbers(vec![-1.5, 300.0, 1e300, 0.0])),
        ("halves".into(), Array::Numbers(vec![300.0, 0.0, 65_535.0])),
        ("name".into(), text("Citroën")),
        ("cells".into(), Array::Cells(vec![text("a"), number(1.0), Array::Cells(vec![])])),
        (
            "records".into(),
            structs(&["x", "longer"], vec![number(1.0), text("one"), number(2.0), text("two")]),
        ),
    ]);
    for compressed in [false, true] {
        let bytes = encode(&variables, compressed);
        assert_eq!(parse(&bytes).unwrap(), variables, "{compressed}");
        fs::write(&file, bytes).unwrap();
        let Some(read) = scipy(&["read", file.to_str().unwrap()]) else { return };
        assert_same(&variables, &serde_json::from_slice(&read).unwrap(), &format!("{compressed}"));
    }
}

#[test]
fn what_is_no_level_5_file_is_named() {
    let refused = |bytes: &[u8]| parse(bytes).unwrap_err();
    assert!(refused(b"").contains("shorter than its header"));
    assert!(refused(&[b' '; 200]).contains("level 5"));
    assert!(refused(b"MATLAB 7.3 MAT-file, Platform: GLNXA64").contains("save it with -v7"));
    assert!(refused(b"\x89HDF\r\n\x1a\n").contains("level 7.3"));
    let mut other = encode(&Variables::default(), false);
    other[124] = 2;
    assert!(refused(&other).contains("level 5"));
    let place = tempfile::tempdir().unwrap();
    let error = read(&place.path().join("none.mat")).unwrap_err().to_string();
    assert!(error.contains("none.mat"), "{error}");
}

/// A file of these little-endian words behind a valid header.
fn file_of(words: &[u32]) -> Vec<u8> {
    let mut file = encode(&Variables::default(), false);
    file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    file
}

#[test]
fn sizes_that_the_file_cannot_hold_are_refused_before_memory_is_taken() {
    // A matrix of 4 GB in a file of 144 bytes.
    assert!(parse(&file_of(&[14, u32::MAX - 7, 0, 0])).unwrap_err().contains("the file ends within"));
    // Matrices of 2^31-1 x 2^31-1 cells, of 65536 x 65536 structs with one field, and of 2^60 numbers.
    let side = i32::MAX as u32;
    let header = |class: u32, sides: [u32; 2]| vec![6, 8, class, 0, 5, 8, sides[0], sides[1], 1, 0];
    let matrix = |mut parts: Vec<u32>| {
        parts.splice(0..0, [14, 4 * parts.len() as u32]);
        parse(&file_of(&parts)).unwrap_err()
    };
    assert!(matrix(header(1, [side, side])).contains("ends before cell 1"));
    let mut structs = header(2, [1 << 16, 1 << 16]);
    structs.extend([4 << 16 | 5, 1, 1, 1, 97, 0]);
    assert!(matrix(structs).contains("ends before field a of struct 1"));
    let mut numbers = header(6, [1 << 30, 1 << 30]);
    numbers.extend([9, 8, 0, 0]);
    assert!(
        matrix(numbers)
            .contains("has 8 bytes of type 9 where its dimensions ask for 1152921504606846976 values")
    );
    assert!(matrix(header(1, [u32::MAX, 1])).contains("ends before cell 1"));
    let mut sides = header(1, [side, side]);
    sides.splice(4..8, [5, 16, side, side, side, side]);
    assert!(matrix(sides).contains("more elements than can be counted"));
}

#[test]
fn deep_nests_and_bombs_are_refused() {
    let nest = (0..40).fold(number(1.0), |inner, _| Array::Cells(vec![inner]));
    let bytes = encode(&Variables(vec![("nest".into(), nest)]), false);
    assert!(parse(&bytes).unwrap_err().contains("nested more than 32 deep"));

    let zeros = Array::Numbers(vec![0.0; 70 << 20]);
    let bytes = encode(&Variables(vec![("zeros".into(), zeros)]), true);
    assert!(bytes.len() < 1 << 20, "70 MiB of zeros deflate well");
    assert!(parse(&bytes).unwrap_err().contains("inflates to more than"));

    // Contents that are small in a file and larger in memory: field names, one-byte numbers, empty cells.
    let names = structs(&vec!["a"; 4 << 20], Vec::new());
    let bytes = Array::Numbers(vec![1.0; 20 << 20]);
    for (name, array) in [("names", names), ("numbers", bytes)] {
        let bytes = encode(&Variables(vec![(name.into(), array)]), true);
        assert!(bytes.len() < 1 << 20, "{name}: {} bytes", bytes.len());
        let said = parse(&bytes).unwrap_err();
        assert!(said.contains(&format!("variable {name} ")) && said.contains("bytes of memory"), "{said}");
    }
    let count = 3 << 20;
    let mut cells = vec![14, 40 + 8 * count, 6, 8, 1, 0, 5, 8, 1, count, 1, 0];
    cells.extend([14, 0].repeat(count as usize));
    assert!(parse(&file_of(&cells)).unwrap_err().contains("bytes of memory"));
}

fn array() -> impl Strategy<Value = Array> {
    let number = prop_oneof![(0u8..).prop_map(f64::from), (0u16..).prop_map(f64::from), -1e300..1e300f64];
    let numbers = proptest::collection::vec(number, 0..10).prop_map(Array::Numbers);
    let leaf = prop_oneof![numbers, "[ -~]{0,20}|[À-ÿ一-三]{1,5}".prop_map(Array::Text)];
    leaf.prop_recursive(3, 40, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Array::Cells),
            (1usize..4, 0usize..3).prop_flat_map(move |(fields, count)| {
                let names = ["a", "longer_name", "c"];
                proptest::collection::vec(inner.clone(), fields * count)
                    .prop_map(move |values| structs(&names[..fields], values))
            }),
        ]
    })
}

/// A fixed seed gives the same files in every run; `.ci/random.sh` draws others.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn what_is_written_is_read_again(arrays in proptest::collection::vec(array(), 0..4), compressed: bool) {
        let named = arrays.into_iter().enumerate().map(|(i, array)| (format!("v{i}"), array)).collect();
        let variables = Variables(named);
        prop_assert_eq!(parse(&encode(&variables, compressed)), Ok(variables));
    }
}

proptest! {
    #![proptest_config(cases(3000))]

    /// Files with changed bytes, extreme words or a missing end give a result or an error, and do not panic.
    #[test]
    fn mutated_files_are_read_or_refused(
        which: prop::sample::Index,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..4, any::<u8>()), 1..6),
        cut: prop::sample::Index,
        is_cut: bool,
    ) {
        let files = mat_files(Path::new(FILES));
        let mut bytes = fs::read(which.get(&files)).unwrap();
        for (place, kind, value) in changes {
            let place = place.index(bytes.len());
            let word = place.min(bytes.len() - 4) / 4 * 4;
            match kind {
                0 => bytes[place] = value,
                1 => bytes[place] ^= 1 << (value % 8),
                2 => bytes[word..word + 4].copy_from_slice(&u32::MAX.to_le_bytes()),
                _ => bytes[word..word + 4].copy_from_slice(&u32::from(value).to_le_bytes()),
            }
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Err(reason) = parse(&bytes) {
            prop_assert!(!reason.is_empty() && !reason.contains('\n') && reason.len() < 500, "{}", reason);
        }
    }
}
