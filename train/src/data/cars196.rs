//! `--dataset cars196`: Stanford Cars. Classes 1 to 98 train, 99 to 196 test, in place of the split by pictures in the files.
//!
//! Three layouts are recognised: `car_ims/` with `cars_annos.mat`; `cars_train/` and `cars_test/` with the
//! development kit; a folder per class.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::archive::Unpacking;
use super::dataset::{Dataset, RECALL_AT, Source};
use super::decode::PixelBox;
use super::folder::pictures_of;
use super::mat::{self, Array};
use super::root::{Classes, Published, Root, relative};
use crate::{Error, Result};

pub(super) const CARS196: Published = Published {
    name: "Cars196",
    page: "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (car_ims.tgz, cars_annos.mat) or a copy of it",
    archives: &[
        ("car_ims.tgz", "car_ims"),
        ("cars_train.tgz", "cars_train"),
        ("cars_test.tgz", "cars_test"),
        ("car_devkit.tgz", "devkit"),
    ],
    wrappers: &["stanford_cars", "car_devkit", "car_data", "car_data/car_data"],
    extent: (16_185, 196),
    recall_at: RECALL_AT,
};

/// The last training class; the following ones up to `LAST_CLASS` are for the test.
const LAST_TRAINING_CLASS: usize = 98;
const LAST_CLASS: usize = 196;

/// Opens the set at `path`; `crop` cuts every picture to its bounding box.
///
/// # Errors
/// [`Error::Dataset`] if a file is missing, [`Format`](ddtas_io::Error::Format) if an annotation is
/// malformed, errors of [`Root::open`].
pub(super) fn open(path: &Path, crop: bool, unpacking: &mut Unpacking<'_>) -> Result<Dataset> {
    let root = Root::open(path, &CARS196, unpacking)?;
    if let Some(annotations) = root.find(&["cars_annos.mat"]) {
        return one_folder(&root, &annotations, crop);
    }
    if root.find(&["cars_train", "cars_test", TRAIN_ANNOTATIONS[0], TRAIN_ANNOTATIONS[1]]).is_some() {
        return two_folders(&root, crop);
    }
    if root.find(&["car_ims"]).is_some() {
        return Err(root.refuse("holds car_ims, but no cars_annos.mat"));
    }
    let folders = class_folders(&root)?;
    if folders.is_empty() {
        return Err(root.refuse(
            "holds neither cars_annos.mat, nor devkit/cars_train_annos.mat, nor a folder per class",
        ));
    }
    if crop {
        return Err(root.refuse("is a folder per class, which has no boxes for --crop-to-box"));
    }
    by_folder(&root, folders)
}

const TRAIN_ANNOTATIONS: [&str; 2] = ["devkit/cars_train_annos.mat", "cars_train_annos.mat"];
const TEST_ANNOTATIONS: [&str; 2] =
    ["devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"];

/// Opens the layout with `car_ims/` and `cars_annos.mat`. The paths in the annotations begin with `car_ims/`.
fn one_folder(root: &Root, path: &Path, crop: bool) -> Result<Dataset> {
    let file = mat::read(path)?;
    let images = root.need(&["car_ims"])?;
    let folder = images.parent().unwrap_or(Path::new(""));
    finish(root, annotated(&file, path, "relative_im_path", folder, crop)?, &class_names(&file))
}

/// Opens the layout with `cars_train/`, `cars_test/` and the development kit. Its annotations hold file names without folder.
fn two_folders(root: &Root, crop: bool) -> Result<Dataset> {
    let mut pictures = Vec::new();
    for (list, folder) in [(TRAIN_ANNOTATIONS, "cars_train"), (TEST_ANNOTATIONS, "cars_test")] {
        let path = root.need(&list)?;
        let folder = root.need(&[&format!("{folder}/{folder}"), folder])?;
        pictures.extend(annotated(&mat::read(&path)?, &path, "fname", &folder, crop)?);
    }
    let names = match root.find(&["devkit/cars_meta.mat", "cars_meta.mat"]) {
        Some(path) => class_names(&mat::read(&path)?),
        None => Vec::new(),
    };
    finish(root, pictures, &names)
}

/// The pictures of the struct array `annotations`, each with the number of its class.
fn annotated(
    file: &mat::Variables,
    path: &Path,
    name_field: &str,
    folder: &Path,
    crop: bool,
) -> Result<Vec<(usize, Source)>> {
    let annotations =
        file.get("annotations").ok_or_else(|| Error::format(path, "holds no variable named annotations"))?;
    let column = |name: &str| {
        annotations
            .column(name)
            .ok_or_else(|| Error::format(path, format!("its annotations have no field {name}")))
    };
    let (names, numbers) = (column(name_field)?, column("class")?);
    let sides = if crop {
        Some([column("bbox_x1")?, column("bbox_y1")?, column("bbox_x2")?, column("bbox_y2")?])
    } else {
        None
    };
    let read = |i: usize, name: &Array, class: &Array| -> Result<(usize, Source), String> {
        let class = whole(class).filter(|class| (1..=LAST_CLASS).contains(class));
        let class = class.ok_or_else(|| format!("its class is not one of 1 to {LAST_CLASS}"))?;
        let name = name.as_text().ok_or_else(|| format!("its {name_field} is not text"))?;
        let path = folder.join(relative(name)?);
        let Some(sides) = &sides else { return Ok((class, Source::File(path))) };
        let [x1, y1, x2, y2] = sides.each_ref().map(|side| whole(side[i]));
        let area = x1.zip(y1).zip(x2.zip(y2)).and_then(|((x1, y1), (x2, y2))| pixel_box(x1, y1, x2, y2));
        let area = area.ok_or("its bounding box is empty or not in whole pixels")?;
        Ok((class, Source::Part { path, area }))
    };
    let pictures = names.iter().zip(&numbers).enumerate().map(|(i, (name, class))| {
        read(i, name, class).map_err(|reason| Error::format(path, format!("annotation {}: {reason}", i + 1)))
    });
    pictures.collect()
}

fn whole(array: &Array) -> Option<usize> {
    array
        .as_number()
        .filter(|value| value.fract() == 0.0 && (0.0..=1e9).contains(value))
        .map(|value| value as usize)
}

/// The box from pixel (x1, y1) to pixel (x2, y2), inclusive, counted from 1. Some boxes of the data set begin at 0.
fn pixel_box(x1: usize, y1: usize, x2: usize, y2: usize) -> Option<PixelBox> {
    let (left, top) = (x1.saturating_sub(1), y1.saturating_sub(1));
    let (width, height) = (x2.checked_sub(left)?, y2.checked_sub(top)?);
    let area = [left, top, width, height].map(|side| u32::try_from(side).ok());
    let [Some(left), Some(top), Some(width @ 1..), Some(height @ 1..)] = area else { return None };
    Some(PixelBox { left, top, width, height })
}

fn class_names(file: &mat::Variables) -> Vec<String> {
    let cells = file.get("class_names").and_then(Array::as_cells).unwrap_or_default();
    cells.iter().map(|cell| cell.as_text().unwrap_or_default().to_string()).collect()
}

fn finish(root: &Root, pictures: Vec<(usize, Source)>, names: &[String]) -> Result<Dataset> {
    let name = |class: usize| names.get(class - 1).filter(|name| !name.is_empty()).cloned();
    root.by_number(pictures, LAST_TRAINING_CLASS, name)
}

/// Folders of pictures by class name, from `DIR/<class>/` or from `DIR/train/<class>/` and `DIR/test/<class>/`.
fn class_folders(root: &Root) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut classes: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for folder in root.own_folders() {
        let halves = [folder.join("train"), folder.join("test")];
        let places =
            if halves.iter().all(|half| half.is_dir()) { halves.to_vec() } else { vec![folder.clone()] };
        for place in places {
            for entry in fs::read_dir(&place).map_err(Error::io("list", &place))? {
                let path = entry.map_err(Error::io("list", &place))?.path();
                let pictures = if path.is_dir() { pictures_of(&path)? } else { Vec::new() };
                if !pictures.is_empty() {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    classes.entry(name).or_default().extend(pictures);
                }
            }
        }
        if !classes.is_empty() {
            break;
        }
    }
    Ok(classes)
}

/// Splits class folders in the order of their names. Sorted as bytes, the 196 official names have the same 98 classes first
/// as the class numbers ("FIAT 500 Abarth 2012" is the 98th in both). If there are not 196 folders, the first half trains.
fn by_folder(root: &Root, folders: BTreeMap<String, Vec<PathBuf>>) -> Result<Dataset> {
    let border = if folders.len() == LAST_CLASS { LAST_TRAINING_CLASS } else { folders.len() / 2 };
    let mut train: Classes = folders
        .into_iter()
        .map(|(name, files)| (name, files.into_iter().map(Source::File).collect()))
        .collect();
    let test = train.split_off(border);
    root.dataset(train, test, None)
}
