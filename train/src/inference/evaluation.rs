//! Evaluates a checkpoint on a data set's unseen classes, or embeddings in a file.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Event;
use super::embedder::{Embedder, NetworkSettings};
use super::file::{EmbeddingsFile, Format};
use crate::data::{
    Dataset, DatasetKind, DatasetSettings, RECALL_AT, TrainClasses, Unreadable, check_image_size,
};
use crate::train::{RunFolder, device};
use crate::{Error, Result};
use ddtas::backend::Backend;
use ddtas::loss::{Embeddings, Rows};
use ddtas::retrieval::{self, Metrics};
use ddtas_io::files::as_text;
use ndarray::ArrayView1;

/// What to evaluate, and how.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct EvalSettings {
    /// The network.
    #[command(flatten)]
    pub network: NetworkSettings,
    /// A file of embeddings instead: .npy, with labels in a .json or .labels.npy file of the same name, or .safetensors with
    /// tensors `embeddings` and `labels`, and for a separate gallery `references` and `reference_labels`.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "checkpoint", "backbone", "weights", "pooling", "image_size", "flips",
        "dataset", "data_root", "train_classes", "data_seed", "crop_to_box",
    ])]
    pub embeddings: Option<PathBuf>,

    /// Data set to evaluate on [default: that of the checkpoint's run].
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    /// Folder of the data set, or its archive as it was downloaded.
    #[arg(long, value_name = "PATH")]
    pub data_root: Option<PathBuf>,
    /// How many classes trained, the first by name, or all (--dataset folder) [default: half of them].
    #[arg(long, value_name = "N|all", requires = "dataset")]
    pub train_classes: Option<TrainClasses>,
    /// Seed of --dataset synthetic.
    #[arg(long, value_name = "SEED", requires = "dataset")]
    pub data_seed: Option<u64>,
    /// Crop every picture to its bounding box, as in training (cars196, cub200, in-shop).
    #[arg(long, requires = "dataset")]
    pub crop_to_box: bool,

    /// Values of K in Recall@K, 1 or more, separated by commas [default: those usual for the data set, or 1,2,4,8].
    #[arg(long, value_name = "K", value_delimiter = ',')]
    pub recall_at: Vec<usize>,
    /// Also report NMI: k-means of the queries, with as many clusters as they have classes.
    #[arg(long)]
    pub nmi: bool,
    /// Iterations of k-means at most, 1 or more.
    #[arg(long, value_name = "N", default_value_t = retrieval::NMI_STEPS, requires = "nmi")]
    pub nmi_steps: usize,
    /// Seed of k-means.
    #[arg(long, default_value_t = 0, requires = "nmi")]
    pub seed: u64,
    /// Where to search: auto (a GPU if there is one), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

impl EvalSettings {
    /// The files that the evaluation reads, each with its flag.
    #[must_use]
    pub fn inputs(&self) -> Vec<(&'static str, PathBuf)> {
        let mut files = self.network.files();
        files.extend(self.data_root.clone().map(|path| ("data-root", path)));
        let read = self.embeddings.iter().flat_map(|path| EmbeddingsFile::files(path));
        files.extend(read.map(|path| ("embeddings", path)));
        files
    }

    /// Checks the settings before any picture is embedded.
    fn validate(&self) -> Result<()> {
        let invalid = |name, value: usize, range| Err(Error::setting(name, value, range));
        if self.recall_at.contains(&0) {
            return invalid("recall-at", 0, "1 or more");
        }
        if self.nmi_steps == 0 {
            return invalid("nmi-steps", 0, "1 or more");
        }
        self.network.image_size.map_or(Ok(()), check_image_size)?;
        self.given_dataset().map_or(Ok(()), |given| given.validate())
    }

    /// The data set given by `--dataset`, if any.
    fn given_dataset(&self) -> Option<DatasetSettings> {
        self.dataset.map(|dataset| DatasetSettings {
            dataset,
            data_root: self.data_root.clone(),
            train_classes: self.train_classes,
            crop_to_box: self.crop_to_box,
            data_seed: self.data_seed.unwrap_or(0),
        })
    }
}

/// Results of an evaluation. The field names are those of `--json`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// The file that was evaluated.
    #[serde(serialize_with = "as_text")]
    pub source: PathBuf,
    /// The data set, if a checkpoint was evaluated.
    pub dataset: Option<String>,
    /// Dimensions of an embedding.
    pub dim: usize,
    /// Classes of the queries.
    pub classes: usize,
    /// Rows of the gallery; none if the queries are compared with each other.
    pub gallery: Option<usize>,
    /// Recall@K, R-precision, MAP@R.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// Normalised mutual information of classes and k-means clusters, if it was asked for.
    pub nmi: Option<f64>,
    /// Seed of the k-means for NMI.
    pub nmi_seed: Option<u64>,
    /// Pictures left out because they cannot be read.
    pub skipped: Vec<Unreadable>,
    /// Backend of the search.
    pub backend: String,
    /// Seconds of embedding the pictures.
    pub embedding_seconds: f64,
    /// Seconds of the search.
    pub search_seconds: f64,
    /// Seconds of k-means.
    pub clustering_seconds: f64,
}

/// Evaluates a checkpoint or a file of embeddings.
///
/// # Errors
/// Files or data that cannot be used, settings out of range, [`Error::Dataset`] if no query has a correct answer.
pub fn evaluate(settings: &EvalSettings, tell: &mut dyn FnMut(Event<'_>)) -> Result<Evaluation> {
    settings.validate()?;
    let mut backend = device::open(&settings.device.parse()?)?;
    match &settings.embeddings {
        Some(path) => {
            let (file, gallery) = EmbeddingsFile::read_with_gallery(path)?;
            let labels = file.labels.as_ref().ok_or_else(|| Error::format(path, no_labels(path)))?;
            let queries = Rows::new(file.values.view(), labels);
            let gallery = gallery.as_ref().map(|rows| Rows::new(rows.values.view(), &rows.labels));
            measure(settings, path, &mut *backend, (&queries, gallery.as_ref()), RECALL_AT, tell)
        }
        None => {
            let embedder = Embedder::new(&settings.network)?;
            evaluate_network(settings, &embedder, &mut *backend, tell)
        }
    }
}

fn evaluate_network(
    settings: &EvalSettings,
    embedder: &Embedder,
    backend: &mut dyn Backend,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Evaluation> {
    let dataset = open(settings, embedder.file(), &mut |note| tell(Event::Note(note)))?;
    dataset.warnings.iter().for_each(|warning| tell(Event::Warning(warning)));
    let begun = Instant::now();
    let queries = embedder.embed(&dataset.test, tell)?;
    let gallery = dataset.gallery.as_ref().map(|gallery| embedder.embed(gallery, tell)).transpose()?;
    let embedding_seconds = begun.elapsed().as_secs_f64();
    let rows = Rows::new(queries.view()?, &queries.labels);
    let searched = gallery.as_ref().map(|side| Ok::<_, Error>(Rows::new(side.view()?, &side.labels)));
    let searched = searched.transpose()?;
    let ks = dataset.recall_at;
    let evaluation = measure(settings, embedder.file(), backend, (&rows, searched.as_ref()), ks, tell)?;
    let mut skipped = dataset.test.unreadable();
    skipped.extend(dataset.gallery.iter().flat_map(|gallery| gallery.unreadable()));
    Ok(Evaluation { dataset: Some(dataset.name), skipped, embedding_seconds, ..evaluation })
}

/// Opens the data set given, or else that of the run in whose folder the checkpoint is.
fn open(settings: &EvalSettings, checkpoint: &Path, tell: &mut dyn FnMut(&str)) -> Result<Dataset> {
    if let Some(given) = settings.given_dataset() {
        return given.open(tell);
    }
    let folder = RunFolder::at(checkpoint.parent().unwrap_or(checkpoint));
    if !folder.config().is_file() {
        return Err(Error::misuse(
            "dataset",
            "",
            "missing, and there is no config.toml of a run beside the checkpoint to take it from",
        ));
    }
    let run = folder.settings()?;
    let data_root = settings.data_root.clone().or_else(|| run.data.data_root.clone());
    DatasetSettings { data_root, ..run.data }.open(tell)
}

/// The error message for a file without labels.
fn no_labels(path: &Path) -> String {
    match Format::of(path) {
        Ok(Format::Npy) => {
            let [_, json, npy] = EmbeddingsFile::files(path);
            format!(
                "has no labels beside it: neither {} holds some nor is there {}",
                json.display(),
                npy.display()
            )
        }
        _ => "there is no tensor `labels`".into(),
    }
}

/// Number of queries whose embedding is also in the gallery, with the same bits.
fn in_gallery(queries: &Rows<'_>, gallery: &Rows<'_>) -> usize {
    let (Embeddings::F32(queries), Embeddings::F32(gallery)) = (queries.embeddings, gallery.embeddings)
    else {
        return 0;
    };
    let bits = |row: ArrayView1<'_, f32>| row.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let known: HashSet<Vec<u32>> = gallery.outer_iter().map(bits).collect();
    queries.outer_iter().filter(|row| known.contains(&bits(*row))).count()
}

fn measure(
    settings: &EvalSettings,
    source: &Path,
    backend: &mut dyn Backend,
    (queries, gallery): (&Rows<'_>, Option<&Rows<'_>>),
    recall_at: &[usize],
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Evaluation> {
    let found = gallery.map_or(0, |gallery| in_gallery(queries, gallery));
    if found > 0 {
        let all = queries.labels.len();
        tell(Event::Warning(&format!(
            "{found} of the {all} queries stand in the gallery as well: they find themselves, and all figures are too high"
        )));
    }
    let ks = if settings.recall_at.is_empty() { recall_at } else { &settings.recall_at };
    let begun = Instant::now();
    let metrics = retrieval::evaluate(backend, queries, gallery, ks, &mut |done, total| {
        tell(Event::Searching { done, total });
    })?;
    let search_seconds = begun.elapsed().as_secs_f64();
    if metrics.recall.queries == 0 {
        return Err(Error::Dataset(format!(
            "{}: no query has another row of its class to be found",
            source.display()
        )));
    }
    let begun = Instant::now();
    let steps = settings.nmi_steps;
    let mut clustering = |step| tell(Event::Clustering { step, steps });
    let nmi = settings
        .nmi
        .then(|| retrieval::nmi(backend, queries, steps, settings.seed, &mut clustering))
        .transpose()?;
    Ok(Evaluation {
        source: source.to_path_buf(),
        dataset: None,
        dim: queries.embeddings.dim(),
        classes: retrieval::classes(queries.labels),
        gallery: gallery.map(|rows| rows.labels.len()),
        metrics,
        nmi,
        nmi_seed: settings.nmi.then_some(settings.seed),
        skipped: Vec::new(),
        backend: backend.name(),
        embedding_seconds: 0.0,
        search_seconds,
        clustering_seconds: begun.elapsed().as_secs_f64(),
    })
}
