//! Data sets, P-K sampler, augmentation and loader, also with bad input.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use ddtas_train::Error;
use ddtas_train::data::{
    AugmentSettings, Cropper, Dataset, EvaluationBatches, FolderSettings, ImageBatch, Loader, LoaderSettings,
    PkSampler, Preprocessing, Split, TrainClasses, check_classes, folder,
};
use image::{Rgb, RgbImage};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Writes a picture whose red is its class and whose green is its number.
fn write_picture(path: &Path, class: usize, number: usize) {
    let shade = |x: u32, y: u32| Rgb([(class * 40) as u8, (number * 25) as u8, (x * 4 + y) as u8]);
    RgbImage::from_fn(24, 20, shade).save(path).unwrap();
}

/// Writes `counts[i]` pictures to folder `c<i>`.
fn write_classes(root: &Path, counts: &[usize]) {
    for (class, &count) in counts.iter().enumerate() {
        let dir = root.join(format!("c{class}"));
        fs::create_dir(&dir).unwrap();
        for number in 0..count {
            write_picture(&dir.join(format!("{number}.png")), class, number);
        }
    }
}

fn open(counts: &[usize]) -> (tempfile::TempDir, Dataset) {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), counts);
    let dataset = folder(root.path(), &FolderSettings::default()).unwrap();
    (root, dataset)
}

fn message(root: &Path, settings: &FolderSettings) -> String {
    folder(root, settings).unwrap_err().to_string()
}

fn loader(split: &Arc<Split>, settings: LoaderSettings) -> Loader {
    let classes = split.class_names().len().min(2);
    let sampler = PkSampler::new(split.by_class(), classes, 3, settings.seed).unwrap();
    Loader::new(Arc::clone(split), sampler, settings).unwrap()
}

fn batches(split: &Arc<Split>, settings: LoaderSettings) -> Vec<ImageBatch> {
    loader(split, settings).map(|batch| batch.unwrap()).collect()
}

#[test]
fn classes_are_sorted_and_halved() {
    let (_root, dataset) = open(&[2, 3, 2, 2, 4]);
    assert_eq!(dataset.train.class_names(), ["c0", "c1"]);
    assert_eq!(dataset.test.class_names(), ["c2", "c3", "c4"]);
    assert_eq!(dataset.train.labels(), [0, 0, 1, 1, 1]);
    assert_eq!(dataset.test.by_class()[2], [4, 5, 6, 7]);
    assert!(dataset.warnings.is_empty());
}

#[test]
fn train_classes_moves_the_border() {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), &[2; 6]);
    let with = |n| {
        folder(
            root.path(),
            &FolderSettings { train_classes: Some(TrainClasses::First(n)), ..Default::default() },
        )
    };
    assert_eq!(with(4).unwrap().train.class_names().len(), 4);
    for out_of_range in [0, 1, 5, 6, 1000] {
        assert!(
            matches!(with(out_of_range), Err(Error::Program(ddtas_io::Error::InvalidSetting { .. }))),
            "{out_of_range}"
        );
    }
}

#[test]
fn unusable_folders_are_explained() {
    let root = tempfile::tempdir().unwrap();
    let settings = FolderSettings::default();
    assert!(message(&root.path().join("missing"), &settings).contains("does not exist"));
    assert!(message(root.path(), &settings).contains("it is empty"));

    fs::create_dir(root.path().join("hollow")).unwrap();
    fs::write(root.path().join("hollow/notes.txt"), "no picture").unwrap();
    assert!(message(root.path(), &settings).contains("there is no picture in its 1 folder;"));

    write_picture(&root.path().join("loose.png"), 0, 0);
    assert!(message(root.path(), &settings).contains("it has 1 picture without a folder per class"));
    assert!(message(&root.path().join("loose.png"), &settings).contains("is not a folder"));

    write_classes(root.path(), &[2, 2, 2]);
    assert!(message(root.path(), &settings).contains("holds 3 classes with pictures: at least 4"));
}

#[test]
fn other_layouts_are_explained() {
    let place = tempfile::tempdir().unwrap();
    let said = |name: &str, folders: &[&str]| {
        let root = place.path().join(name);
        for folder in folders {
            fs::create_dir_all(root.join(folder)).unwrap();
            write_picture(&root.join(folder).join("0.png"), 0, 0);
        }
        message(&root, &FolderSettings::default()).replace(place.path().to_str().unwrap(), "")
    };
    let years = said("years", &["a/2024", "b/2024", "c/2025"]);
    assert!(
        years.contains(
            "its pictures lie in folders within folders, the first is /years/a/2024/0.png; give a folder"
        ),
        "{years}"
    );
    let alone = said("alone", &["train/a", "train/b", "val/c"]);
    assert!(
        alone.contains("it holds train, but not test, nor query and gallery (beside train: val)"),
        "{alone}"
    );
    let capitals = said("capitals", &["Train/a", "Test/b"]);
    assert!(
        capitals.contains("it holds Test, Train: the names of a split are in small letters (test)"),
        "{capitals}"
    );
    let wrapped = said("wrapped", &["photos/a", "photos/b"]);
    assert!(wrapped.ends_with("lie in its only folder: give --data-root /wrapped/photos"), "{wrapped}");
    let twice = said("twice", &["photos/all/a", "photos/all/b"]);
    assert!(twice.ends_with(": give --data-root /twice/photos/all"), "{twice}");
    let side = said("side", &["train/a/x", "test/a"]);
    assert!(
        side.contains("no class in --data-root /side/train: its pictures lie in folders within folders"),
        "{side}"
    );
}

#[test]
fn one_picture_and_empty_classes_are_counted() {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), &[2, 1, 0, 1, 3]);
    let dataset = folder(root.path(), &FolderSettings::default()).unwrap();
    assert_eq!(dataset.train.class_names(), ["c0", "c1"]);
    let wanted = [
        "1 training class with one picture only, whose positives are the same picture, varied: c1",
        "1 test class with one picture only, without positives: c3",
        "1 class left out, no picture inside: c2",
    ];
    assert_eq!(dataset.warnings, wanted);

    let singles = tempfile::tempdir().unwrap();
    write_classes(singles.path(), &[2, 2, 1, 1]);
    assert!(message(singles.path(), &FolderSettings::default()).contains("nothing to retrieve"));
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn batches_hold_p_classes_of_k_pictures(
        counts in proptest::collection::vec(1usize..9, 1..30), p in 1usize..30, k in 1usize..8, step in 0u64..1000,
    ) {
        let mut next = 0;
        let by_class: Vec<Vec<usize>> = counts.iter().map(|&n| { next += n; (next - n..next).collect() }).collect();
        let sampler = PkSampler::new(&by_class, p, k, 7);
        if p > counts.len() {
            let refused = sampler.is_err_and(|error| error.to_string().starts_with("--classes-per-batch "));
            prop_assert!(refused);
            return Ok(());
        }
        let sampler = sampler.unwrap();
        let batch = sampler.batch(step);
        prop_assert_eq!(&batch, &sampler.batch(step));
        prop_assert_eq!(batch.len(), p * k);
        let mut classes = BTreeSet::new();
        for group in batch.chunks(k) {
            let class = by_class.iter().position(|c| c.contains(&group[0])).unwrap();
            prop_assert!(group.iter().all(|i| by_class[class].contains(i)));
            let different: BTreeSet<_> = group.iter().collect();
            prop_assert_eq!(different.len(), k.min(counts[class]), "replacement only where a class is short");
            prop_assert!(classes.insert(class), "class {} came twice", class);
        }
    }
}

#[test]
fn a_round_of_the_sampler_visits_every_class_once() {
    let by_class: Vec<Vec<usize>> = (0..12).map(|c| vec![2 * c, 2 * c + 1]).collect();
    let sampler = PkSampler::new(&by_class, 4, 2, 3).unwrap();
    for round in 0..5 {
        let seen: BTreeSet<usize> =
            (0..3).flat_map(|i| sampler.batch(3 * round + i)).map(|picture| picture / 2).collect();
        assert_eq!(seen.len(), 12, "round {round}");
    }
    let other = PkSampler::new(&by_class, 4, 2, 4).unwrap();
    assert!((0..8).any(|step| sampler.batch(step) != other.batch(step)), "the seed must matter");
}

#[test]
fn each_round_and_each_batch_is_drawn_anew() {
    let by_class: Vec<Vec<usize>> = (0..12).map(|c| (10 * c..10 * c + 10).collect()).collect();
    let sampler = PkSampler::new(&by_class, 4, 3, 3).unwrap();
    let classes = |step| sampler.batch(step).into_iter().step_by(3).map(|picture| picture / 10);
    let first: Vec<Vec<usize>> = (0..8).map(|round| classes(3 * round).collect()).collect();
    assert!((1..8).all(|round| first[round] != first[0]), "{first:?}");
    let mut drawn: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); 12];
    for step in 0..36 {
        let batch = sampler.batch(step);
        for three in batch.chunks(3) {
            let different: BTreeSet<usize> = three.iter().copied().collect();
            assert_eq!(different.len(), 3, "a picture twice in a batch");
            drawn[three[0] / 10].extend(different);
        }
    }
    assert!(drawn.iter().all(|pictures| pictures.len() > 7), "{drawn:?}");
}

#[test]
fn a_class_with_few_pictures_gives_all_of_them_and_repeats_any() {
    let sampler = PkSampler::new(&[vec![0, 1, 2], vec![3, 4, 5]], 2, 4, 1).unwrap();
    let mut repeated = BTreeSet::new();
    for step in 0..40 {
        for four in sampler.batch(step).chunks(4) {
            assert_eq!(four[..3].iter().collect::<BTreeSet<_>>().len(), 3, "{four:?}");
            repeated.insert(four[3]);
        }
    }
    assert_eq!(repeated.len(), 6, "{repeated:?}");
    // Eight pictures to an epoch, of which the split has six.
    assert_eq!(sampler.steps_per_epoch(), 1);
    assert_eq!(PkSampler::new(&[vec![0; 3], vec![1; 4]], 2, 2, 1).unwrap().steps_per_epoch(), 2);
}

#[test]
fn every_picture_is_varied_by_itself_and_anew_in_every_step() {
    let root = tempfile::tempdir().unwrap();
    for class in 0..4 {
        fs::create_dir(root.path().join(format!("c{class}"))).unwrap();
        // All the same.
        (0..2).for_each(|number| write_picture(&root.path().join(format!("c{class}/{number}.png")), 0, 0));
    }
    let split = folder(root.path(), &FolderSettings::default()).unwrap().train;
    let all = batches(&split, LoaderSettings::new(16, 4, 11));
    let seen: BTreeSet<Vec<u32>> = all
        .iter()
        .flat_map(|batch| batch.pixels.chunks(3 * 16 * 16))
        .map(|picture| picture.iter().map(|value| value.to_bits()).collect())
        .collect();
    assert_eq!(seen.len(), 4 * all[0].labels.len());
    assert_ne!(all, batches(&split, LoaderSettings::new(16, 4, 12)), "the seed changes nothing");
}

#[test]
fn loader_gives_the_same_batches_for_any_number_of_workers() {
    let (_root, dataset) = open(&[5, 2, 4, 2, 2, 2]);
    let with = |workers, queue| LoaderSettings { workers, queue, ..LoaderSettings::new(16, 9, 11) };
    let expected = batches(&dataset.train, with(1, 1));
    assert_eq!(expected.len(), 9);
    assert!(expected.iter().all(|batch| batch.pixels.len() == 6 * 3 * 16 * 16 && batch.replaced == 0));
    assert_ne!(expected[0].pixels, expected[1].pixels);
    for (workers, queue) in [(1, 4), (2, 1), (2, 5), (5, 3)] {
        assert_eq!(
            expected,
            batches(&dataset.train, with(workers, queue)),
            "{workers} workers, queue {queue}"
        );
    }
    let rest = batches(&dataset.train, LoaderSettings { first_step: 6, ..LoaderSettings::new(16, 3, 11) });
    assert_eq!(expected[6..], rest, "a continued run sees the batches it would have seen");
}

#[test]
fn loader_stops_when_dropped_early() {
    let (_root, dataset) = open(&[5, 2, 4, 2]);
    for taken in [0, 1, 3] {
        let settings = LoaderSettings { workers: 3, ..LoaderSettings::new(16, u64::MAX, 1) };
        let mut loader = loader(&dataset.train, settings);
        assert_eq!(loader.by_ref().take(taken).filter(Result::is_ok).count(), taken);
        drop(loader);
    }
    assert_eq!(Arc::strong_count(&dataset.train), 1, "no worker is left that holds the split");
}

#[test]
fn broken_training_pictures_are_replaced_from_their_class() {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), &[4, 4, 2, 2]);
    fs::write(root.path().join("c0/1.png"), "not a picture").unwrap();
    let whole = fs::read(root.path().join("c1/2.png")).unwrap();
    fs::write(root.path().join("c1/2.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(root.path().join("c1/3.png"), []).unwrap();
    let dataset = folder(root.path(), &FolderSettings::default()).unwrap();

    let got = batches(&dataset.train, LoaderSettings { workers: 2, ..LoaderSettings::new(16, 20, 5) });
    assert!(got.iter().map(|batch| batch.replaced).sum::<usize>() > 0);
    for batch in &got {
        assert_eq!(batch.labels.iter().filter(|&&label| label == 0).count(), 3);
        assert!(batch.indices.iter().all(|index| ![1, 6, 7].contains(index)), "{:?}", batch.indices);
        let of_class_0: BTreeSet<_> = batch.indices.iter().filter(|&&index| index < 4).collect();
        assert_eq!(of_class_0.len(), 3, "three can be read, so none need come twice");
    }
    let unreadable = dataset.train.unreadable();
    let paths: Vec<_> = unreadable.iter().map(|file| file.path.strip_prefix(root.path()).unwrap()).collect();
    assert_eq!(paths, ["c0/1.png", "c1/2.png", "c1/3.png"].map(Path::new));
    assert!(unreadable.iter().all(|file| !file.reason.is_empty()));
}

#[test]
fn a_training_class_without_readable_pictures_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), &[2, 2, 2, 2]);
    for number in 0..2 {
        fs::write(root.path().join(format!("c1/{number}.png")), "x").unwrap();
    }
    let dataset = folder(root.path(), &FolderSettings::default()).unwrap();
    let mut loader = loader(&dataset.train, LoaderSettings::new(16, 5, 1));
    let error = loader.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("class c1 of the training split has no readable picture (2 tried)"), "{error}");
    assert!(loader.next().is_none(), "an error ends the loader");
}

#[test]
fn evaluation_leaves_broken_pictures_out() {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), &[2, 2, 3, 4]);
    fs::write(root.path().join("c3/0.png"), "x").unwrap();
    let split = folder(root.path(), &FolderSettings::default()).unwrap().test;
    for chunk in [1, 2, 3, 100] {
        let walk = EvaluationBatches::new(Arc::clone(&split), (16, Preprocessing::default()), chunk).unwrap();
        let got: Vec<ImageBatch> = walk.map(|batch| batch.unwrap()).collect();
        assert_eq!(got.len(), 7usize.div_ceil(chunk));
        let indices: Vec<usize> = got.iter().flat_map(|batch| batch.indices.clone()).collect();
        assert_eq!(indices, [0, 1, 2, 4, 5, 6]);
        assert_eq!(split.unreadable().len(), 1);
        assert!(got.iter().all(|batch| batch.pixels.len() == batch.indices.len() * 3 * 16 * 16));
    }
    fs::write(root.path().join("c2/0.png"), "x").unwrap();
    fs::write(root.path().join("c2/1.png"), "x").unwrap();
    fs::write(root.path().join("c2/2.png"), "x").unwrap();
    let split = folder(root.path(), &FolderSettings::default()).unwrap().test;
    let walk = EvaluationBatches::new(Arc::clone(&split), (16, Preprocessing::default()), 2).unwrap();
    let labels: Vec<i64> = walk.flat_map(|batch| batch.unwrap().labels).collect();
    let error = check_classes(&split, &labels).unwrap_err().to_string();
    assert!(error.contains("class c2 of the test split has no readable picture (3 tried): "), "{error}");
}

#[test]
fn pictures_stay_within_the_memory_budget() {
    let root = tempfile::tempdir().unwrap();
    write_classes(root.path(), &[4, 4, 2, 2]);
    let bytes = 24 * 20 * 3;
    for (budget, kept) in [(0, 0), (bytes - 1, 0), (3 * bytes + 1, 3), (100 * bytes, 8)] {
        let settings = FolderSettings { cache_bytes: budget, ..Default::default() };
        let train = folder(root.path(), &settings).unwrap().train;
        for index in (0..8).chain(0..8) {
            let picture = train.picture(index).unwrap();
            assert_eq!(picture.get_pixel(0, 0).0[..2], [(index / 4 * 40) as u8, (index % 4 * 25) as u8]);
        }
        assert_eq!(train.cached_bytes(), kept * bytes, "budget {budget}");
    }
}

#[test]
fn crops_stay_inside_whatever_the_picture_is() {
    let settings = AugmentSettings::default();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut cropper = Cropper::new(16, Preprocessing::default()).unwrap();
    for (width, height) in [(1, 1), (1, 300), (300, 1), (7, 5), (64, 64), (200, 90)] {
        let picture = RgbImage::from_pixel(width, height, Rgb([255, 128, 0]));
        for _ in 0..50 {
            let mut pixels = Vec::new();
            cropper.train(&picture, &settings, &mut rng, &mut pixels).unwrap();
            cropper.test(&picture, &mut pixels).unwrap();
            assert_eq!(pixels.len(), 2 * cropper.floats());
            assert!(pixels.iter().all(|value| value.is_finite() && value.abs() < 3.0));
        }
    }
}

#[test]
fn test_crop_is_the_normalised_middle() {
    let mut cropper = Cropper::new(16, Preprocessing::default()).unwrap();
    // Red in the middle square, grey elsewhere; where the two sides differ by an odd number, as torchvision rounds.
    for (width, first) in [(64, 16), (65, 16), (67, 18)] {
        let colour = |x| if (first..first + 32).contains(&x) { Rgb([255, 0, 0]) } else { Rgb([128; 3]) };
        let picture = RgbImage::from_fn(width, 32, |x, _| colour(x));
        let mut pixels = Vec::new();
        cropper.test(&picture, &mut pixels).unwrap();
        let plane = 16 * 16;
        for (c, value) in [1.0, 0.0, 0.0].into_iter().enumerate() {
            let Preprocessing { mean, deviation, .. } = Preprocessing::default();
            let want = (value - mean[c]) / deviation[c];
            let near = |got: &f32| (got - want).abs() < 1e-5;
            assert!(pixels[c * plane..][..plane].iter().all(near), "{width} pixels, channel {c}");
        }
    }
}

#[test]
fn flips_mirror_half_of_the_pictures() {
    let ramp = RgbImage::from_fn(16, 16, |x, _| Rgb([x as u8 * 16; 3]));
    let settings = AugmentSettings { smallest_crop: 1.0, flip: 0.5, jitter: 0.0 };
    let mut cropper = Cropper::new(16, Preprocessing::default()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut seen = BTreeMap::new();
    let mut plain = Vec::new();
    cropper.test(&ramp, &mut plain).unwrap();
    for _ in 0..200 {
        let mut pixels = Vec::new();
        cropper.train(&ramp, &settings, &mut rng, &mut pixels).unwrap();
        let mirrored: Vec<f32> = plain.chunks(16).flat_map(|row| row.iter().rev().copied()).collect();
        // Colours are still computed without jitter, and rounded.
        let near = |want: &[f32]| pixels.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-4);
        let flipped = near(&mirrored);
        assert!(flipped || near(&plain));
        *seen.entry(flipped).or_insert(0) += 1;
    }
    assert!((70..=130).contains(&seen[&true]), "{seen:?}");
    let never = AugmentSettings { flip: 0.0, ..settings };
    for _ in 0..20 {
        let mut pixels = Vec::new();
        cropper.train(&ramp, &never, &mut rng, &mut pixels).unwrap();
        assert!(pixels[0] < pixels[15], "mirrored without --flip");
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let (_root, dataset) = open(&[2, 2, 2, 2]);
    let refused = |change: fn(&mut LoaderSettings)| {
        let mut settings = LoaderSettings::new(16, 1, 0);
        change(&mut settings);
        let sampler = PkSampler::new(dataset.train.by_class(), 2, 2, 0).unwrap();
        matches!(
            Loader::new(Arc::clone(&dataset.train), sampler, settings),
            Err(Error::Program(
                ddtas_io::Error::InvalidSetting { .. } | ddtas_io::Error::InvalidArgument { .. }
            ))
        )
    };
    assert!(refused(|s| s.image_size = 0));
    assert!(refused(|s| s.workers = 0));
    assert!(refused(|s| s.queue = 0));
    assert!(refused(|s| s.augment.smallest_crop = 0.0));
    assert!(refused(|s| s.augment.flip = f64::NAN));
    assert!(refused(|s| s.augment.jitter = 1.0));
    assert!(!refused(|_| ()));
    assert!(PkSampler::new(dataset.train.by_class(), 2, 0, 0).is_err());
    for (size, chunk) in [(0, 1), (16, 0)] {
        let walk = EvaluationBatches::new(Arc::clone(&dataset.test), (size, Preprocessing::default()), chunk);
        assert!(walk.is_err(), "{size}, {chunk}");
    }
}
