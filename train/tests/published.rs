//! Cars196, CUB-200-2011, SOP and In-Shop: every layout, archives, damaged sets, and training on each set.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use ddtas_fixtures::mat::{encode, number, text};
use ddtas_fixtures::{FixtureSettings, Layout, write};
use ddtas_train::data::mat::{Array, Variables, read};
use ddtas_train::data::synthetic::Fleet;
use ddtas_train::data::{Artist, Dataset, DatasetKind, DatasetSettings, Split};

const CLASSES: usize = 9;
const PICTURES: usize = 4;
const WIDTH: usize = 80;

/// Every set in every layout, as files and as archives.
fn all() -> Vec<FixtureSettings> {
    let kinds = [
        (DatasetKind::Cars196, Some(Layout::CarIms)),
        (DatasetKind::Cars196, Some(Layout::Devkit)),
        (DatasetKind::Cars196, Some(Layout::ClassFolders)),
        (DatasetKind::Cub200, None),
        (DatasetKind::Sop, None),
        (DatasetKind::InShop, None),
    ];
    let settings = |(dataset, layout), archive| FixtureSettings { archive, ..fixture(dataset, layout) };
    kinds.into_iter().flat_map(|kind| [settings(kind, false), settings(kind, true)]).collect()
}

fn fixture(dataset: DatasetKind, layout: Option<Layout>) -> FixtureSettings {
    FixtureSettings {
        dataset,
        layout,
        classes: CLASSES,
        images_per_class: PICTURES,
        picture_width: WIDTH,
        seed: 3,
        archive: false,
    }
}

fn settings(dataset: DatasetKind, root: &Path) -> DatasetSettings {
    DatasetSettings { dataset, data_root: Some(root.to_path_buf()), ..Default::default() }
}

fn open(dataset: DatasetKind, root: &Path) -> Dataset {
    settings(dataset, root).open(&mut |_| ()).unwrap()
}

fn refusal(dataset: DatasetKind, root: &Path) -> String {
    let said = settings(dataset, root).open(&mut |_| ()).unwrap_err().to_string();
    assert!(!said.contains('\n'), "{said}");
    said
}

/// Writes a fixture to a new folder: that folder, and the data set's root in it.
fn made(dataset: DatasetKind, layout: Option<Layout>) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let root = write(&fixture(dataset, layout), &place.path().join("set")).unwrap();
    (place, root)
}

/// Asserts that the pictures of each class are those that were drawn for it, up to JPEG's mean error of a few
/// grey levels. `first`: the split's first class in the fleet; `numbers`: its pictures of each class.
fn assert_drawn(split: &Split, first: usize, numbers: &[usize], cropped: bool) {
    let height = (WIDTH * 7 / 10) as u32;
    let fleet = Fleet::new(CLASSES, height as usize, 3).unwrap();
    for (label, class) in split.by_class().iter().enumerate() {
        assert_eq!(class.len(), numbers.len());
        for (&index, &number) in class.iter().zip(numbers) {
            let picture = split.picture(index).unwrap();
            let drawn = fleet.draw(first + label, number);
            let left = if cropped { 0 } else { (WIDTH as u32 - height) * (number as u32 % 3) / 2 };
            let width = if cropped { height } else { WIDTH as u32 };
            assert_eq!(picture.dimensions(), (width, height));
            let distance = |(x, y): (u32, u32)| {
                let (got, want) = (picture.get_pixel(x + left, y).0, drawn.get_pixel(x, y).0);
                got.iter().zip(want).map(|(&got, want)| got.abs_diff(want) as f64).sum::<f64>() / 3.0
            };
            let all = (0..height).flat_map(|y| (0..height).map(move |x| (x, y)));
            let mean = all.map(distance).sum::<f64>() / f64::from(height * height);
            assert!(mean < 12.0, "class {label}, picture {number}: {mean} grey levels off");
        }
    }
}

#[test]
fn every_layout_is_read_back_as_it_was_drawn() {
    for fixture in all() {
        let place = tempfile::tempdir().unwrap();
        let root = write(&fixture, &place.path().join("set")).unwrap();
        let mut told = Vec::new();
        let dataset = settings(fixture.dataset, &root).open(&mut |line| told.push(line.to_string())).unwrap();
        println!("{fixture:?}");
        assert_eq!(told.is_empty(), !fixture.archive, "{told:?}");
        assert_eq!(dataset.train.class_names().len(), 4);
        assert_eq!(dataset.test.class_names().len(), 5);
        // The development kit lists its training half before its test half.
        let order: &[usize] =
            if fixture.layout == Some(Layout::Devkit) { &[0, 2, 1, 3] } else { &[0, 1, 2, 3] };
        assert_drawn(&dataset.train, 0, order, false);
        let recall_at: &[usize] = match fixture.dataset {
            DatasetKind::Sop => &[1, 10, 100, 1000],
            DatasetKind::InShop => &[1, 10, 20, 30],
            _ => &[1, 2, 4, 8],
        };
        assert_eq!(dataset.recall_at, recall_at);
        match &dataset.gallery {
            Some(gallery) => {
                assert_eq!(fixture.dataset, DatasetKind::InShop);
                assert_eq!(gallery.class_names(), dataset.test.class_names());
                assert_drawn(&dataset.test, 4, &[0, 2], false);
                assert_drawn(gallery, 4, &[1, 3], false);
            }
            None => assert_drawn(&dataset.test, 4, order, false),
        }
        assert_eq!(dataset.warnings.len(), 1, "a fixture is smaller than the set: {:?}", dataset.warnings);
        // Opened again, the set uses the unpacked files and prints nothing.
        settings(fixture.dataset, &root).open(&mut |line| panic!("told again: {line}")).unwrap();
    }
}

#[test]
fn the_98th_car_trains() {
    let place = tempfile::tempdir().unwrap();
    let all = FixtureSettings {
        classes: 196,
        images_per_class: 2,
        ..fixture(DatasetKind::Cars196, Some(Layout::CarIms))
    };
    let cars = open(DatasetKind::Cars196, &write(&all, &place.path().join("set")).unwrap());
    assert_eq!([cars.train.class_names().len(), cars.test.class_names().len()], [98, 98]);
}

#[test]
fn crop_to_box_leaves_the_car_alone() {
    for (kind, layout, order) in [
        (DatasetKind::Cars196, Some(Layout::CarIms), [0, 1, 2, 3]),
        (DatasetKind::Cars196, Some(Layout::Devkit), [0, 2, 1, 3]),
        (DatasetKind::Cub200, None, [0, 1, 2, 3]),
        (DatasetKind::InShop, None, [0, 1, 2, 3]),
    ] {
        let (_place, root) = made(kind, layout);
        let dataset =
            DatasetSettings { crop_to_box: true, ..settings(kind, &root) }.open(&mut |_| ()).unwrap();
        assert_drawn(&dataset.train, 0, &order, true);
    }
    let (_place, root) = made(DatasetKind::Cars196, Some(Layout::ClassFolders));
    let boxed = DatasetSettings { crop_to_box: true, ..settings(DatasetKind::Cars196, &root) };
    assert!(boxed.open(&mut |_| ()).unwrap_err().to_string().contains("no boxes"));
}

#[test]
fn copies_wrapped_in_other_folders_are_found() {
    let (place, root) = made(DatasetKind::Cub200, None);
    assert_eq!(open(DatasetKind::Cub200, &root.join("CUB_200_2011")).train.len(), 16);
    let (_other, root) = made(DatasetKind::Cars196, Some(Layout::Devkit));
    for half in ["cars_train", "cars_test"] {
        fs::rename(root.join(half), root.join("inner")).unwrap();
        fs::create_dir(root.join(half)).unwrap();
        fs::rename(root.join("inner"), root.join(half).join(half)).unwrap();
    }
    fs::rename(
        root.join("cars_test_annos_withlabels.mat"),
        root.join("devkit/cars_test_annos_withlabels.mat"),
    )
    .unwrap();
    assert_eq!(open(DatasetKind::Cars196, &root).test.len(), 20);
    let (_third, root) = made(DatasetKind::InShop, None);
    for (file, folder) in
        [("list_eval_partition.txt", "Eval"), ("list_bbox_inshop.txt", "Anno"), ("img", "Img")]
    {
        let folder = place.path().join("In-shop Clothes Retrieval Benchmark").join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::rename(root.join(file), folder.join(file)).unwrap();
    }
    assert_eq!(open(DatasetKind::InShop, place.path()).gallery.unwrap().len(), 10);
    // Class folders in two halves, as in one published copy of Cars196.
    let (_fourth, root) = made(DatasetKind::Cars196, Some(Layout::ClassFolders));
    let halves = place.path().join("halves");
    for entry in fs::read_dir(&root).unwrap() {
        let class = entry.unwrap().path();
        for (half, picture) in
            [("train", "000.jpg"), ("train", "001.jpg"), ("test", "002.jpg"), ("test", "003.jpg")]
        {
            let folder = halves.join(half).join(class.file_name().unwrap());
            fs::create_dir_all(&folder).unwrap();
            fs::rename(class.join(picture), folder.join(picture)).unwrap();
        }
    }
    let dataset = open(DatasetKind::Cars196, &halves);
    assert_drawn(&dataset.test, 4, &[0, 1, 2, 3], false);
}

#[test]
fn archives_given_one_by_one_find_what_lies_beside_them() {
    for (dataset, layout, archive) in [
        (DatasetKind::Cars196, Some(Layout::CarIms), "car_ims.tgz"),
        (DatasetKind::Cars196, Some(Layout::Devkit), "cars_train.tgz"),
        (DatasetKind::InShop, None, "img.zip"),
    ] {
        let place = tempfile::tempdir().unwrap();
        write(&FixtureSettings { archive: true, ..fixture(dataset, layout) }, place.path()).unwrap();
        let given = place.path().join(archive);
        if layout == Some(Layout::Devkit) {
            // The archives beside the given one must be unpacked already.
            assert_eq!(open(dataset, place.path()).train.len(), 16);
        }
        assert_eq!(open(dataset, &given).train.len(), 16, "{archive}");
    }
}

#[test]
fn a_missing_file_is_named_with_where_to_get_the_set() {
    for (dataset, layout, file, page) in [
        (DatasetKind::Cars196, Some(Layout::CarIms), "cars_annos.mat", "car_dataset.html"),
        (DatasetKind::Cars196, Some(Layout::CarIms), "car_ims/000017.jpg", "car_dataset.html"),
        (DatasetKind::Cars196, Some(Layout::Devkit), "cars_test_annos_withlabels.mat", "car_dataset.html"),
        (DatasetKind::Cars196, Some(Layout::Devkit), "cars_test/00003.jpg", "car_dataset.html"),
        (DatasetKind::Cub200, None, "CUB_200_2011/image_class_labels.txt", "cub_200_2011"),
        (DatasetKind::Sop, None, "Stanford_Online_Products/Ebay_test.txt", "lifted_struct"),
        (DatasetKind::Sop, None, "Stanford_Online_Products/car_final/110000011319_2.JPG", "lifted_struct"),
        (DatasetKind::InShop, None, "list_eval_partition.txt", "InShopRetrieval"),
        (DatasetKind::InShop, None, "img/WOMEN/Cars/id_00000002/02_1_front.jpg", "InShopRetrieval"),
    ] {
        let (_place, root) = made(dataset, layout);
        fs::remove_file(root.join(file)).unwrap();
        let said = refusal(dataset, &root);
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        assert!(
            said.contains(name) && said.contains(page) && said.contains("docs/datasets.md"),
            "{file}: {said}"
        );
    }
    let empty = tempfile::tempdir().unwrap();
    for dataset in [DatasetKind::Cars196, DatasetKind::Cub200, DatasetKind::Sop, DatasetKind::InShop] {
        assert!(refusal(dataset, empty.path()).contains("holds n"), "{dataset:?}");
        assert!(refusal(dataset, &empty.path().join("gone")).contains("does not exist"));
        fs::write(empty.path().join("notes.txt"), "x").unwrap();
        assert!(refusal(dataset, &empty.path().join("notes.txt")).contains("neither a folder nor"));
        let nothing = DatasetSettings { dataset, ..Default::default() }.open(&mut |_| ()).unwrap_err();
        assert!(nothing.to_string().contains("--data-root"));
    }
}

#[test]
fn a_list_that_is_off_is_refused_by_its_line() {
    let (_place, root) = made(DatasetKind::Cub200, None);
    let change = |file: &str, from: &str, to: &str, expected: &str| {
        let path = root.join("CUB_200_2011").join(file);
        let before = fs::read_to_string(&path).unwrap();
        fs::write(&path, before.replacen(from, to, 1)).unwrap();
        let said = refusal(DatasetKind::Cub200, &root);
        assert!(said.contains(file) && said.contains(expected), "{said}");
        fs::write(&path, before).unwrap();
    };
    change("image_class_labels.txt", "\n2 1", "\n2 201", "line 2: class 201 is not one of 1 to 200");
    change("image_class_labels.txt", "\n2 1", "\n2 x", "line 2: \"x\" is not a class number");
    change("image_class_labels.txt", "\n2 1", "\n2", "line 2: not 2 columns");
    change("images.txt", "\n5 002.", "\n5 ../../002.", "line 5: the path");
    change("images.txt", "\n5 002.", "\n99 002.", "line 5: picture 99 has no line in image_class_labels.txt");

    let (_place, root) = made(DatasetKind::Sop, None);
    let lists = root.join("Stanford_Online_Products");
    fs::copy(lists.join("Ebay_train.txt"), lists.join("Ebay_test.txt")).unwrap();
    assert!(refusal(DatasetKind::Sop, &root).contains("item 1 in both lists"));
    fs::write(lists.join("Ebay_test.txt"), "image_id class_id super_class_id path\n").unwrap();
    assert!(refusal(DatasetKind::Sop, &root).contains("cut short"));

    let (_place, root) = made(DatasetKind::InShop, None);
    let list = root.join("list_eval_partition.txt");
    let text = fs::read_to_string(&list).unwrap();
    fs::write(&list, text.replacen("query", "probe", 1)).unwrap();
    assert!(refusal(DatasetKind::InShop, &root).contains("\"probe\" is not train, query or gallery"));
    fs::write(&list, text.replacen("train", "gallery", 1)).unwrap();
    assert!(refusal(DatasetKind::InShop, &root).contains("for both training and test"));
    fs::write(&list, text.replace("gallery", "train")).unwrap();
    assert!(refusal(DatasetKind::InShop, &root).contains("for both training and test"));
}

#[test]
fn annotations_that_are_off_are_refused_by_their_number() {
    let (_place, root) = made(DatasetKind::Cars196, Some(Layout::CarIms));
    let path = root.join("cars_annos.mat");
    let whole = read(&path).unwrap();
    let change = |field: &str, value: Array, expected: &str| {
        let mut changed = whole.clone();
        let Array::Structs { fields, values } = &mut changed.0[0].1 else { panic!("no structs") };
        let place = fields.iter().position(|known| known == field).unwrap();
        values[place + 2 * fields.len()] = value;
        fs::write(&path, encode(&changed, false)).unwrap();
        let crop = DatasetSettings { crop_to_box: true, ..settings(DatasetKind::Cars196, &root) };
        let said = crop.open(&mut |_| ()).unwrap_err().to_string();
        assert!(said.contains("annotation 3: ") && said.contains(expected), "{said}");
    };
    change("class", number(197.0), "not one of 1 to 196");
    change("class", number(1.5), "not one of 1 to 196");
    change("class", text("three"), "not one of 1 to 196");
    change("relative_im_path", number(3.0), "is not text");
    change("relative_im_path", text("/etc/passwd"), "leads out");
    change("bbox_x2", number(0.0), "bounding box is empty");
    fs::write(&path, encode(&Variables::default(), true)).unwrap();
    assert!(refusal(DatasetKind::Cars196, &root).contains("no variable named annotations"));
    fs::write(&path, "<html>404</html>").unwrap();
    assert!(refusal(DatasetKind::Cars196, &root).contains("not a MAT-file"));
}

#[test]
fn damaged_archives_are_told_and_leave_nothing() {
    for (name, dataset) in
        [("CUB_200_2011.tgz", DatasetKind::Cub200), ("Stanford_Online_Products.zip", DatasetKind::Sop)]
    {
        let place = tempfile::tempdir().unwrap();
        let settings = FixtureSettings { archive: true, ..fixture(dataset, None) };
        let archive = write(&settings, place.path()).unwrap();
        assert!(archive.ends_with(name));
        let whole = fs::read(&archive).unwrap();
        for half in [&whole[..whole.len() / 2], &whole[..20], b"", b"<html>sign in first</html>"] {
            fs::write(&archive, half).unwrap();
            let said = refusal(dataset, &archive);
            assert!(said.contains(name), "{said}");
            assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1, "something was left behind: {said}");
        }
        fs::write(&archive, whole).unwrap();
        assert_eq!(open(dataset, &archive).train.len(), 16);
    }
}

#[test]
fn settings_that_do_not_go_together_are_named() {
    let refused = |settings: DatasetSettings| settings.validate().unwrap_err().to_string();
    let root = Some(PathBuf::from("x"));
    let sop = DatasetSettings { dataset: DatasetKind::Sop, data_root: root, ..Default::default() };
    assert!(refused(DatasetSettings { crop_to_box: true, ..sop.clone() }).contains("crop-to-box"));
    assert!(
        refused(DatasetSettings { train_classes: Some(ddtas_train::data::TrainClasses::First(3)), ..sop })
            .contains("train-classes")
    );
    let place = tempfile::tempdir().unwrap();
    for (change, name) in [
        ((|s| s.classes = 3) as fn(&mut FixtureSettings), "classes"),
        (|s| s.images_per_class = 1, "images-per-class"),
        (|s| s.picture_width = 900, "picture-width"),
        (|s| s.layout = Some(Layout::Devkit), "layout"),
        (|s| s.dataset = DatasetKind::Folder, "dataset"),
    ] {
        let mut settings = fixture(DatasetKind::Sop, None);
        change(&mut settings);
        assert!(write(&settings, &place.path().join("new")).unwrap_err().to_string().contains(name));
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    fs::write(place.path().join("mine"), "x").unwrap();
    let error = write(&fixture(DatasetKind::Sop, None), place.path()).unwrap_err();
    assert!(error.to_string().contains("not empty"));
}

fn ddtas_train() -> Command {
    Command::cargo_bin("ddtas-train").unwrap()
}

#[test]
fn each_set_is_made_trained_on_and_judged_at_its_own_k() {
    for (dataset, header) in [
        ("cars196", "R@1     R@2     R@4     R@8"),
        ("cub200", "R@1     R@2     R@4     R@8"),
        ("sop", "R@1    R@10   R@100  R@1000"),
        ("in-shop", "R@1    R@10    R@20    R@30"),
    ] {
        let place = tempfile::tempdir().unwrap();
        let kind = <DatasetKind as clap::ValueEnum>::from_str(dataset, false).unwrap();
        let small =
            FixtureSettings { classes: 12, images_per_class: 6, archive: true, ..fixture(kind, None) };
        let root = write(&small, &place.path().join("set")).unwrap();

        let mut train = ddtas_train();
        train.args(["--dataset", dataset, "--steps", "3", "--image-size", "16"]).arg("--data-root").arg(root);
        train.args(["--width", "8", "--classes-per-batch", "4", "--images-per-class", "3", "--output"]);
        let output = train.arg(place.path().join("run")).assert().success().get_output().clone();
        let (printed, said) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(printed.contains(header), "{dataset}: {printed}");
        assert!(said.contains("unpacking") && said.contains("36 training pictures of 6 classes"), "{said}");
        let queries = if dataset == "in-shop" { "18 queries" } else { "36 queries" };
        assert!(printed.contains(queries), "{dataset}: {printed}");
        assert_eq!(said.contains("searched in a gallery of 18"), dataset == "in-shop", "{said}");
        let config = fs::read_to_string(place.path().join("run/config.toml")).unwrap();
        assert!(config.contains(&format!("dataset = \"{dataset}\"")), "{config}");

        // `eval` of the checkpoint takes the run's settings: the same set, the same K, the same recall.
        let mut eval = ddtas_train();
        eval.args(["eval", "--json", "--checkpoint"]).arg(place.path().join("run/best.safetensors"));
        let found = eval.assert().success().get_output().stdout.clone();
        let found: serde_json::Value = serde_json::from_slice(&found).unwrap();
        let metrics = fs::read_to_string(place.path().join("run/metrics.jsonl")).unwrap();
        let evaluations =
            metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let recalls: Vec<_> = evaluations
            .filter(|line| line["kind"] == "evaluation")
            .map(|line| line["recall"].clone())
            .collect();
        assert!(recalls.contains(&found["at"]), "{dataset}: {found} is none of {recalls:?}");
        assert_eq!(found["gallery"].as_u64(), (dataset == "in-shop").then_some(18));
        for figure in ["r_precision", "map_at_r"] {
            assert!((0.0..=1.0).contains(&found[figure].as_f64().unwrap()), "{dataset}: {found}");
        }
    }
}

#[test]
fn the_program_says_in_one_line_what_is_missing() {
    let place = tempfile::tempdir().unwrap();
    let output =
        ddtas_train().args(["--dataset", "cub200", "--data-root"]).arg(place.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.starts_with("ddtas-train: ") && said.lines().count() == 1, "{said}");
    assert!(said.contains("images.txt") && said.contains("CUB_200_2011.tgz"), "{said}");
}
