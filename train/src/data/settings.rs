//! Command-line arguments that select a data set.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::archive::Unpacking;
use super::dataset::Dataset;
use super::folder::{FolderSettings, TrainClasses, folder};
use super::synthetic::{SyntheticSettings, synthetic};
use super::{cars196, cub200, in_shop, sop};
use crate::Result;
use crate::error::fits;

/// Where pictures come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DatasetKind {
    /// Car silhouettes drawn in memory from a seed: 98 classes to train, 98 unseen ones to test.
    #[default]
    Synthetic,
    /// Your own pictures: a folder for each class, and the first half of the classes trains; or a split by folders or lists named
    /// train and test.
    Folder,
    /// Stanford Cars: classes 1 to 98 train, 99 to 196 test.
    Cars196,
    /// Caltech-UCSD Birds 200-2011: classes 1 to 100 train, 101 to 200 test.
    Cub200,
    /// Stanford Online Products: its own split.
    Sop,
    /// DeepFashion In-Shop Clothes Retrieval: its own split into training, queries and gallery.
    InShop,
}

impl DatasetKind {
    /// Whether the data set is read from `--data-root`.
    #[must_use]
    pub fn is_on_disk(self) -> bool {
        self != Self::Synthetic
    }

    /// Whether its annotations have bounding boxes.
    #[must_use]
    pub fn has_boxes(self) -> bool {
        matches!(self, Self::Cars196 | Self::Cub200 | Self::InShop)
    }
}

/// A data set to open.
#[derive(Debug, Clone, PartialEq, Eq, Default, clap::Args, Serialize, Deserialize)]
pub struct DatasetSettings {
    /// The data set.
    #[arg(long, value_enum, default_value_t)]
    pub dataset: DatasetKind,
    /// Folder of the data set, or its archive as it was downloaded (.tgz, .tar.gz, .tar, .zip).
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_root: Option<PathBuf>,
    /// How many classes train, the first by name, or all; the others test (--dataset folder) [default: half of them].
    #[arg(long, value_name = "N|all")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_classes: Option<TrainClasses>,
    /// Crop every picture to its bounding box (cars196, cub200, in-shop).
    #[arg(long, hide_short_help = true)]
    #[serde(default)]
    pub crop_to_box: bool,
    /// Seed of --dataset synthetic; figures of runs with different ones cannot be compared.
    #[arg(long, value_name = "SEED", default_value_t = 0, hide_short_help = true)]
    pub data_seed: u64,
}

impl DatasetSettings {
    /// Checks the settings without accessing the disk.
    ///
    /// # Errors
    /// [`Misused`](ddtas_io::Error::Misused) names the first wrong setting.
    pub fn validate(&self) -> Result<()> {
        let kind = self.dataset;
        let checks = [
            (
                !kind.is_on_disk() || self.data_root.is_some(),
                "data-root",
                "missing: --dataset other than synthetic needs --data-root DIR: a folder with one folder of pictures a class \
                 (folder), or a data set as docs/datasets.md says",
            ),
            (
                self.data_root.is_none() || kind.is_on_disk(),
                "data-root",
                "needs --dataset folder, or the name of the set that lies there: the default is drawn and reads nothing",
            ),
            (
                !self.crop_to_box || kind.has_boxes(),
                "crop-to-box",
                "only cars196, cub200 and in-shop have boxes",
            ),
            (
                self.train_classes.is_none() || kind == DatasetKind::Folder,
                "train-classes",
                "for --dataset folder only: the others have a split of their own",
            ),
            (
                self.data_seed == 0 || !kind.is_on_disk(),
                "data-seed",
                "for --dataset synthetic only: the others draw no pictures",
            ),
        ];
        checks.into_iter().try_for_each(|(good, name, range)| fits(good, name, "", range))
    }

    /// As [`open_until`](Self::open_until), but cannot be stopped.
    ///
    /// # Errors
    /// As [`open_until`](Self::open_until).
    pub fn open(&self, tell: &mut dyn FnMut(&str)) -> Result<Dataset> {
        self.open_until(&AtomicBool::new(false), tell)
    }

    /// Opens the data set: reads its lists and checks that its files exist. Pictures are not opened yet.
    ///
    /// `tell` is given a line before an archive is unpacked, which takes long; setting `stop` ends that.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate); [`Error::Dataset`](crate::Error::Dataset) if it is missing or incomplete;
    /// [`Format`](ddtas_io::Error::Format) for a damaged list or archive; [`Io`](ddtas_io::Error::Io);
    /// [`Error::Stopped`](crate::Error::Stopped).
    pub fn open_until(&self, stop: &AtomicBool, tell: &mut dyn FnMut(&str)) -> Result<Dataset> {
        self.validate()?;
        let unpacking = &mut Unpacking { stop, tell };
        let root = self.data_root.clone().unwrap_or_default();
        match self.dataset {
            DatasetKind::Synthetic => {
                synthetic(&SyntheticSettings { seed: self.data_seed, ..SyntheticSettings::default() })
            }
            DatasetKind::Folder => folder(
                &root,
                &FolderSettings { train_classes: self.train_classes, ..FolderSettings::default() },
            ),
            DatasetKind::Cars196 => cars196::open(&root, self.crop_to_box, unpacking),
            DatasetKind::Cub200 => cub200::open(&root, self.crop_to_box, unpacking),
            DatasetKind::Sop => sop::open(&root, unpacking),
            DatasetKind::InShop => in_shop::open(&root, self.crop_to_box, unpacking),
        }
    }
}
