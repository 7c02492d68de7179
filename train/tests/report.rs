//! report.html from the files of a run's folder.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::fs;
use std::path::Path;

use ddtas::backend::Nearest;
use ddtas_train::Error;
use ddtas_train::data::synthetic::{SyntheticSettings, synthetic};
use ddtas_train::train::PairLoss;
use ddtas_train::train::report::{self, Baseline, Findings};
use ddtas_train::train::{EvaluationRecord, Record, Shown, StepRecord, TrainSettings, choose, read_records};
use ndarray::Array2;

fn step(step: usize) -> Record {
    let way = step as f64 / 200.0;
    Record::Step(StepRecord {
        step,
        epoch: step as f64 / 49.0,
        loss: 1.2 - 0.6 * way + 0.1 * (step as f64 * 1.7).sin(),
        gamma_pos: Some(if step.is_multiple_of(7) { 0.1 } else { 0.14 }),
        gamma_neg: Some(0.006),
        lambda_pos: 0.7,
        lambda_neg: 0.7,
        mined_pos: 300 - step as u64,
        mined_neg: if step == 199 { 0 } else { 4000 - 15 * step as u64 },
        active: 80,
        mean_pos: Some(0.8),
        mean_neg: (step != 3).then_some(0.4 - 0.2 * way),
        hypergradient: None,
        sent_bytes: None,
        learning_rate: 2e-3 * (1.0 - way),
    })
}

fn evaluation(step: usize, at_1: f64) -> Record {
    let recall = [1, 2, 4, 8].into_iter().enumerate().map(|(i, k)| (k, at_1 + 0.08 * i as f64)).collect();
    Record::Evaluation(EvaluationRecord {
        step,
        recall,
        r_precision: Some(at_1 / 2.0),
        map_at_r: Some(at_1 / 3.0),
    })
}

fn write_run(folder: &Path, records: &[Record]) {
    fs::write(folder.join("config.toml"), "seed = 5\nloss = \"a<b>\"\n[augment]\nflip = 0.5\n").unwrap();
    let lines: String = records.iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect();
    fs::write(folder.join("metrics.jsonl"), lines).unwrap();
}

fn whole_run() -> Vec<Record> {
    let mut records = vec![evaluation(0, 0.013)];
    records.extend((0..200).map(step));
    records.insert(101, evaluation(100, 0.31));
    records.push(evaluation(200, 0.284));
    records
}

fn findings() -> (Findings, image::RgbImage) {
    let settings =
        SyntheticSettings { classes: 20, train_pictures: 2, test_pictures: 4, ..Default::default() };
    let cars = synthetic(&settings).unwrap();
    let n = cars.test.len();
    // The next pictures in the set as neighbours: some of the same class, some of the next.
    let nearest = |chosen: &[usize]| Nearest {
        indices: Array2::from_shape_fn((chosen.len(), 8), |(i, j)| ((chosen[i] + j + 1) % n) as u32),
        similarities: Array2::from_shape_fn((chosen.len(), 8), |(_, j)| 0.95 - 0.06 * j as f32),
    };
    let rows: Vec<usize> = (0..n).collect();
    let shown = choose(&rows, &rows, (8, 0), |chosen| Ok(nearest(chosen))).unwrap();
    let (queries, sheet) = report::queries(&cars.test, &cars.test, &shown).unwrap();
    let findings = Findings {
        dataset: "synthetic".into(),
        train: cars.train.extent(),
        test: cars.test.extent(),
        seen: false,
        baselines: vec![Baseline {
            name: "raw pixels".into(),
            recall: vec![(1, 0.02), (2, 0.04), (4, 0.06), (8, 0.1)],
        }],
        training_seconds: 127.4,
        queries,
    };
    (findings, sheet)
}

#[test]
fn report_shows_recall_plots_neighbours_and_settings() {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), &whole_run());
    let (findings, sheet) = findings();
    findings.save(folder.path(), &sheet).unwrap();
    let path = report::write(folder.path()).unwrap();
    let page = fs::read_to_string(&path).unwrap();
    for part in [
        "R@8",
        "raw pixels",
        "before training (random weights)",
        "from 1.3 % before training",
        "Trained on 20 pictures of 10 classes, tested on 40 pictures of 10 classes it never saw.",
        "best, after 100 steps",
        ">31.0</b>",
        ">28.4</td>",
        "2:07 ",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!(page.matches("<svg").count(), 6);
    let recall = page.split("<svg").nth(1).and_then(|rest| rest.split("</svg>").next()).unwrap();
    assert!(recall.contains(">\n40\n<"), "Recall@K in per cent: {recall}");
    assert!(page.contains("Unchanged throughout. Loss thresholds: lambda 0.7."));
    assert!(
        page.contains("<th>R-P</th>")
            && page.contains("<td><b>15.5</b></td>")
            && page.contains("<td><b>10.3</b></td>")
    );
    for svg in page.split("<svg").skip(1).filter_map(|rest| rest.split("</svg>").next()) {
        assert!(!svg.contains("NaN") && !svg.contains("#010203"), "{svg}");
    }
    assert!(page.contains("a&#60;b&#62;") && !page.contains("a<b>"), "settings are escaped");
    assert!(page.contains("augment.flip"));
    assert!(!page.contains("src=\"http") && !page.contains("href="), "nothing is fetched");
    assert_eq!(page.matches("data:image/png;base64,").count(), 8 * 9);
    assert_eq!(
        page.matches("<figure class=\"right\">").count() + page.matches("<figure class=\"wrong\">").count(),
        64
    );

    let strip = image::open(folder.path().join("neighbours.png")).unwrap().into_rgb8();
    let frame = |column: u32, row: u32| strip.get_pixel(130 + 8 + column * 114, 18 + row * 144).0;
    let query = &findings.queries[0];
    for (column, answer) in query.answers.iter().enumerate() {
        let green = frame(column as u32, 0)[1] > 128;
        assert_eq!(green, answer.right, "frame of answer {column}");
        let whole =
            (0..106).all(|along| strip.get_pixel(130 + column as u32 * 114 + along, 18).0 != [255; 3]);
        assert_eq!(whole, answer.right, "a broken frame says wrong");
    }

    // The first row of the sheet has a heading, and captions below its pictures.
    let is_written = |mut rows: std::ops::Range<u32>| {
        rows.any(|y| (0..100).any(|x| strip.get_pixel(8 + x, y).0 == [0; 3]))
    };
    assert!(is_written(8..16) && is_written(126..134), "no heading, or no class below the first query");

    let again = report::write(folder.path()).unwrap();
    assert_eq!(fs::read_to_string(again).unwrap(), page, "the same files give the same report");
}

#[test]
fn half_a_line_that_a_killed_run_left_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), &whole_run()[..20]);
    let metrics = folder.path().join("metrics.jsonl");
    let torn = fs::read_to_string(&metrics).unwrap() + "{\"kind\":\"st";
    fs::write(&metrics, torn).unwrap();
    assert_eq!(read_records(&metrics).unwrap().len(), 20);
}

#[test]
fn files_that_are_missing_or_something_else_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = report::write(folder.path()).unwrap_err();
    assert!(
        matches!(&error, Error::Program(ddtas_io::Error::Io { path, .. }) if path.ends_with("config.toml")),
        "{error}"
    );
    write_run(folder.path(), &whole_run());
    let error = report::write(folder.path()).unwrap_err();
    assert!(
        matches!(&error, Error::Program(ddtas_io::Error::Io { path, .. }) if path.ends_with("report.json")),
        "{error}"
    );
    fs::write(folder.path().join("report.json"), "{}").unwrap();
    let error = report::write(folder.path()).unwrap_err();
    assert!(
        matches!(&error, Error::Program(ddtas_io::Error::Format { path, .. }) if path.ends_with("report.json")),
        "{error}"
    );
    fs::write(folder.path().join("config.toml"), "= nonsense").unwrap();
    assert!(matches!(report::write(folder.path()), Err(Error::Program(ddtas_io::Error::Format { .. }))));
}

#[test]
fn queries_are_not_the_same_picture_of_every_class() {
    let rows: Vec<usize> = (0..200).collect();
    let chosen = |seed| -> Vec<usize> {
        let none = |chosen: &[usize]| Ok(Nearest::none(chosen.len(), 1)?);
        choose(&rows, &rows, (10, seed), none).unwrap().iter().map(|shown| shown.picture).collect()
    };
    for seed in 0..4 {
        let pictures = chosen(seed);
        assert!(pictures.iter().enumerate().all(|(part, picture)| picture / 20 == part), "{pictures:?}");
        assert!(pictures.iter().any(|picture| picture % 10 != pictures[0] % 10), "{pictures:?}");
        assert_eq!(pictures, chosen(seed));
    }
    assert_ne!(chosen(0), chosen(1));
}

#[test]
fn pictures_and_neighbours_are_named_by_their_places_in_the_splits() {
    // The first two queries and the first picture of the gallery are unreadable.
    let (rows, searched) = ([2, 3, 4], [1, 2]);
    let nearest = |chosen: &[usize]| {
        let mut nearest = Nearest::none(chosen.len(), 2)?;
        nearest.indices.row_mut(0).assign(&ndarray::array![1, 0]);
        Ok(nearest)
    };
    let shown = choose(&rows, &searched, (3, 0), nearest).unwrap();
    assert_eq!(shown.iter().map(|shown| shown.picture).collect::<Vec<_>>(), rows);
    assert_eq!(shown[0].answers.iter().map(|answer| answer.0).collect::<Vec<_>>(), [2, 1]);
    assert!(shown[1].answers.is_empty());

    // The fourth test class has pictures 12 to 15 of the queries, and 6 and 7 of the gallery.
    let settings =
        SyntheticSettings { classes: 20, train_pictures: 2, test_pictures: 4, ..Default::default() };
    let cars = synthetic(&settings).unwrap();
    let shown = [Shown { picture: 12, answers: vec![(7, 0.5), (3, 0.4)] }];
    let (queries, _) = report::queries(&cars.test, &cars.train, &shown).unwrap();
    assert_eq!([0, 1].map(|answer| queries[0].answers[answer].right), [true, false]);
}

#[test]
fn plots_mark_warm_up_and_memory_and_draw_equal_thresholds_once() {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), &whole_run());
    let (findings, sheet) = findings();
    findings.save(folder.path(), &sheet).unwrap();
    let settings = TrainSettings { memory_size: 8, memory_start: Some(150), ..TrainSettings::default() };
    let page = |settings: &TrainSettings| {
        fs::write(folder.path().join("config.toml"), toml::to_string(settings).unwrap()).unwrap();
        fs::read_to_string(report::write(folder.path()).unwrap()).unwrap()
    };
    let marked = page(&settings);
    let plots = marked.matches("<svg").count();
    assert_eq!(marked.matches(">\nend of warm-up\n<").count(), plots, "{marked}");
    assert_eq!(marked.matches(">\nmemory\n<").count(), plots);
    assert_eq!(marked.matches(">\nstep\n<").count(), plots);
    let together = page(&TrainSettings { memory_start: None, ..settings.clone() });
    assert_eq!(together.matches(">\nend of warm-up, memory\n<").count(), plots);
    let none = page(&TrainSettings { memory_start: None, memory_size: 0, warm_up: 0.0, ..settings });
    assert!(!none.contains("end of warm-up") && none.contains("lambda 0.7."));
    let margin = page(&TrainSettings { loss: PairLoss::Contrastive, ..TrainSettings::default() });
    assert!(margin.contains("margin 0.7."));
    // The page names the window of the running mean.
    assert!(margin.contains("Bold: mean of 11 steps."));
}
