//! `--dataset in-shop`: DeepFashion In-Shop Clothes Retrieval. `list_eval_partition.txt` assigns each item to
//! training or test, and each test picture to the queries or the gallery.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::archive::Unpacking;
use super::dataset::{Dataset, Source};
use super::decode::PixelBox;
use super::root::{Classes, Published, Root, number, relative, source};
use crate::Result;

pub(super) const IN_SHOP: Published = Published {
    name: "In-Shop",
    page: "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html (img.zip, list_eval_partition.txt)",
    archives: &[("img.zip", "img"), ("Img/img.zip", "Img/img")],
    wrappers: &["In-shop Clothes Retrieval Benchmark"],
    extent: (52_712, 7_982),
    recall_at: &[1, 10, 20, 30],
};

const LIST: &str = "list_eval_partition.txt";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Train,
    Query,
    Gallery,
}

/// Opens the set at `path`; `crop` cuts every picture to its bounding box.
///
/// # Errors
/// [`Error::Dataset`](crate::Error::Dataset) if a file is missing or an item is on both sides,
/// [`Format`](ddtas_io::Error::Format) if a list is malformed, errors of [`Root::open`].
pub(super) fn open(path: &Path, crop: bool, unpacking: &mut Unpacking<'_>) -> Result<Dataset> {
    let root = Root::open(path, &IN_SHOP, unpacking)?;
    let table = root.table::<3>(&[LIST, "Eval/list_eval_partition.txt"], 2)?;
    // The list has paths img/...; in the download the folder is Img/img.
    let images = root.need(&["img", "Img/img"])?;
    let folder = images.parent().unwrap_or(Path::new(""));
    let boxes = crop.then(|| boxes(&root)).transpose()?;
    let pictures = table.read(|[file, item, side]| {
        let side = match side.as_str() {
            "train" => Side::Train,
            "query" => Side::Query,
            "gallery" => Side::Gallery,
            other => return Err(format!("{other:?} is not train, query or gallery")),
        };
        let missing = || format!("{file} has no line in list_bbox_inshop.txt");
        let source = source(folder.join(relative(file)?), file, boxes.as_ref(), missing)?;
        Ok((item.clone(), side, source))
    })?;
    let mut train: BTreeMap<String, Vec<Source>> = BTreeMap::new();
    // Queries and gallery pictures of each test item.
    let mut test: BTreeMap<String, (Vec<Source>, Vec<Source>)> = BTreeMap::new();
    for (item, side, source) in pictures {
        match side {
            Side::Train => train.entry(item).or_default().push(source),
            Side::Query => test.entry(item).or_default().0.push(source),
            Side::Gallery => test.entry(item).or_default().1.push(source),
        }
    }
    if let Some(item) = train.keys().find(|item| test.contains_key(*item)) {
        return Err(root.refuse(&format!("lists item {item} for both training and test")));
    }
    let (mut queries, mut gallery) = (Classes::new(), Classes::new());
    for (item, (asked, searched)) in test {
        queries.push((item.clone(), asked));
        gallery.push((item, searched));
    }
    root.dataset(train.into_iter().collect(), queries, Some(gallery))
}

fn boxes(root: &Root) -> Result<HashMap<String, PixelBox>> {
    let table = root.table::<7>(&["list_bbox_inshop.txt", "Anno/list_bbox_inshop.txt"], 2)?;
    let boxes = table.read(|[file, _, _, left, top, right, bottom]| {
        let side = |word: &str| number::<u32>(word, "number of pixels");
        let (left, top, right, bottom) = (side(left)?, side(top)?, side(right)?, side(bottom)?);
        if right <= left || bottom <= top {
            return Err(format!("the box {left} {top} {right} {bottom} is empty"));
        }
        Ok((file.clone(), PixelBox { left, top, width: right - left, height: bottom - top }))
    })?;
    Ok(boxes.into_iter().collect())
}
