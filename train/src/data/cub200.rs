//! `--dataset cub200`: Caltech-UCSD Birds 200-2011. Classes 1 to 100 train, 101 to 200 test.
//!
//! Reads `images.txt`, `image_class_labels.txt`, `classes.txt` if it exists, and `bounding_boxes.txt` if
//! pictures are cropped.

use std::collections::HashMap;
use std::path::Path;

use super::archive::Unpacking;
use super::dataset::{Dataset, RECALL_AT};
use super::decode::PixelBox;
use super::root::{Published, Root, number, relative, source};
use crate::Result;

pub(super) const CUB200: Published = Published {
    name: "CUB-200-2011",
    page: "https://www.vision.caltech.edu/datasets/cub_200_2011/ (CUB_200_2011.tgz)",
    archives: &[("CUB_200_2011.tgz", "CUB_200_2011")],
    wrappers: &["CUB_200_2011"],
    extent: (11_788, 200),
    recall_at: RECALL_AT,
};

/// The last training class.
const LAST_TRAINING_CLASS: usize = 100;

/// Opens the set at `path`; `crop` cuts every picture to its bounding box.
///
/// # Errors
/// [`Error::Dataset`](crate::Error::Dataset) if a file is missing, [`Format`](ddtas_io::Error::Format) if a
/// list is malformed, errors of [`Root::open`].
pub(super) fn open(path: &Path, crop: bool, unpacking: &mut Unpacking<'_>) -> Result<Dataset> {
    let root = Root::open(path, &CUB200, unpacking)?;
    let images = root.table::<2>(&["images.txt"], 0)?;
    let labels = root.table::<2>(&["image_class_labels.txt"], 0)?;
    let class_of: HashMap<usize, usize> = labels
        .read(|[image, class]| {
            let class = number(class, "class number")?;
            if !(1..=200).contains(&class) {
                return Err(format!("class {class} is not one of 1 to 200"));
            }
            Ok((number(image, "picture number")?, class))
        })?
        .into_iter()
        .collect();
    let boxes = crop.then(|| boxes(&root)).transpose()?;
    let names: HashMap<usize, String> = match root.find(&["classes.txt"]) {
        Some(_) => root
            .table::<2>(&["classes.txt"], 0)?
            .read(|[class, name]| Ok((number(class, "class number")?, name.clone())))?
            .into_iter()
            .collect(),
        None => HashMap::new(),
    };
    let pictures = images.read(|[image, file]| {
        let image = number(image, "picture number")?;
        let class = *class_of
            .get(&image)
            .ok_or_else(|| format!("picture {image} has no line in image_class_labels.txt"))?;
        let path = images.folder().join("images").join(relative(file)?);
        let missing = || format!("picture {image} has no line in bounding_boxes.txt");
        Ok((class, source(path, &image, boxes.as_ref(), missing)?))
    })?;
    root.by_number(pictures, LAST_TRAINING_CLASS, |class| names.get(&class).cloned())
}

fn boxes(root: &Root) -> Result<HashMap<usize, PixelBox>> {
    let table = root.table::<5>(&["bounding_boxes.txt"], 0)?;
    let boxes = table.read(|[image, left, top, width, height]| {
        let side =
            |word: &str| number::<f64>(word, "number of pixels").map(|value| value.round().max(0.0) as u32);
        let (left, top, width, height) = (side(left)?, side(top)?, side(width)?.max(1), side(height)?.max(1));
        Ok((number(image, "picture number")?, PixelBox { left, top, width, height }))
    })?;
    Ok(boxes.into_iter().collect())
}
