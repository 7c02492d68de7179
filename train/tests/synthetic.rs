//! The synthetic cars: a seed gives the same pictures, and raw pixels do not retrieve them.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::sync::Arc;

use ddtas_train::Error;
use ddtas_train::data::synthetic::{SyntheticSettings, synthetic};
use ddtas_train::data::{EvaluationBatches, Preprocessing};
use ndarray::{Array2, Axis};

fn small() -> SyntheticSettings {
    SyntheticSettings { classes: 8, train_pictures: 3, test_pictures: 2, ..Default::default() }
}

#[test]
fn pictures_depend_on_seed_class_and_number_alone() {
    let (one, two) = (synthetic(&small()).unwrap(), synthetic(&small()).unwrap());
    let other = synthetic(&SyntheticSettings { seed: 1, ..small() }).unwrap();
    let mut pictures = Vec::new();
    // The second set is drawn backwards: the order must not matter.
    for index in (0..one.train.len()).rev() {
        two.train.picture(index).unwrap();
    }
    for index in 0..one.train.len() {
        let picture = one.train.picture(index).unwrap();
        assert_eq!(picture, two.train.picture(index).unwrap());
        assert_ne!(picture, other.train.picture(index).unwrap());
        assert!(!pictures.contains(&picture), "picture {index} came before");
        pictures.push(picture);
    }
}

#[test]
fn splits_are_98_and_98_disjoint_classes_like_cars196() {
    let cars = synthetic(&SyntheticSettings::default()).unwrap();
    assert_eq!((cars.train.class_names().len(), cars.test.class_names().len()), (98, 98));
    assert_eq!((cars.train.len(), cars.test.len()), (98 * 40, 98 * 20));
    assert!(cars.train.class_names().iter().all(|name| !cars.test.class_names().contains(name)));
}

#[test]
fn counts_out_of_range_are_refused() {
    let change: [fn(&mut SyntheticSettings); 4] =
        [|s| s.classes = 3, |s| s.train_pictures = 1, |s| s.test_pictures = 1, |s| s.picture_size = 15];
    for change in change {
        let mut settings = small();
        change(&mut settings);
        assert!(
            matches!(synthetic(&settings), Err(Error::Program(ddtas_io::Error::InvalidArgument { .. }))),
            "{settings:?}"
        );
    }
}

/// Recall@1 of raw pixels on all test classes, by L2, by cosine after subtracting each picture's mean, and by
/// cosine after subtracting the mean picture.
#[test]
fn raw_pixels_retrieve_less_than_a_tenth() {
    let cars = synthetic(&SyntheticSettings { test_pictures: 6, ..Default::default() }).unwrap();
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for batch in EvaluationBatches::new(Arc::clone(&cars.test), (48, Preprocessing::default()), 128).unwrap()
    {
        let batch = batch.unwrap();
        pixels.extend(batch.pixels);
        labels.extend(batch.labels);
    }
    let plain = Array2::from_shape_vec((labels.len(), 3 * 48 * 48), pixels).unwrap();
    let mut by_picture = plain.clone();
    by_picture.rows_mut().into_iter().for_each(|mut row| row -= row.mean().unwrap());
    let by_set = &plain - &plain.mean_axis(Axis(0)).unwrap();
    for (name, rows, cosine) in
        [("L2", plain, false), ("cosine, own mean", by_picture, true), ("cosine, mean picture", by_set, true)]
    {
        let recall = recall_at_1(&rows, &labels, cosine);
        println!("{name}: Recall@1 {:.1} %", 100.0 * recall);
        assert!(recall < 0.1, "{name}: {recall}");
    }
}

fn recall_at_1(rows: &Array2<f32>, labels: &[i64], cosine: bool) -> f64 {
    let products = rows.dot(&rows.t());
    let square = |i: usize| products[[i, i]];
    let score = |i: usize, j: usize| {
        let product = products[[i, j]];
        if cosine { product / (square(i) * square(j)).sqrt() } else { 2.0 * product - square(j) }
    };
    let found = |&i: &usize| {
        let others = (0..labels.len()).filter(|&j| j != i);
        let nearest = others.max_by(|&a, &b| score(i, a).total_cmp(&score(i, b))).unwrap();
        labels[nearest] == labels[i]
    };
    (0..labels.len()).filter(found).count() as f64 / labels.len() as f64
}
