//! `--dataset sop`: Stanford Online Products. `Ebay_train.txt` trains, `Ebay_test.txt` tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::archive::Unpacking;
use super::dataset::{Dataset, Source};
use super::root::{Classes, Published, Root, number, relative};
use crate::Result;

pub(super) const SOP: Published = Published {
    name: "SOP",
    page: "https://cvgl.stanford.edu/projects/lifted_struct/ (Stanford_Online_Products.zip)",
    archives: &[("Stanford_Online_Products.zip", "Stanford_Online_Products")],
    wrappers: &["Stanford_Online_Products"],
    extent: (120_053, 22_634),
    recall_at: &[1, 10, 100, 1000],
};

/// Opens the set at `path`.
///
/// # Errors
/// [`Error::Dataset`](crate::Error::Dataset) if a file is missing or a class is on both sides,
/// [`Format`](ddtas_io::Error::Format) if a list is malformed, errors of [`Root::open`].
pub(super) fn open(path: &Path, unpacking: &mut Unpacking<'_>) -> Result<Dataset> {
    let root = Root::open(path, &SOP, unpacking)?;
    let (train, test) = (side(&root, "Ebay_train.txt")?, side(&root, "Ebay_test.txt")?);
    let in_test: BTreeSet<&String> = test.iter().map(|(name, _)| name).collect();
    if let Some((name, _)) = train.iter().find(|(name, _)| in_test.contains(name)) {
        return Err(root.refuse(&format!("has class {name} in both lists")));
    }
    root.dataset(train, test, None)
}

/// The classes of a list, in the order of their numbers; class 17 is named `item 17`.
fn side(root: &Root, list: &str) -> Result<Classes> {
    let table = root.table::<4>(&[list], 1)?;
    let pictures = table.read(|[_, class, _, file]| {
        Ok((number::<u32>(class, "class number")?, Source::File(table.folder().join(relative(file)?))))
    })?;
    let mut classes: BTreeMap<u32, Vec<Source>> = BTreeMap::new();
    for (class, source) in pictures {
        classes.entry(class).or_default().push(source);
    }
    Ok(classes.into_iter().map(|(class, pictures)| (format!("item {class}"), pictures)).collect())
}
