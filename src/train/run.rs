//! A training run from beginning to end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;

use super::checkpoint;
use super::device::{moved, place};
use super::engine::Engine;
use super::generator::Generator;
use super::records::{EvaluationRecord, Record, RecordWriter, StepRecord};
use super::report::{self, Baseline, Extent, Findings};
use super::settings::{DatasetKind, TrainSettings};
use crate::backend::{self, DeviceSpec, Nearest};
use crate::data::{
    self, Dataset, EvaluationBatches, FolderSettings, Loader, LoaderSettings, PkSampler, Split, TestCrop,
    synthetic::SyntheticSettings,
};
use crate::files;
use crate::generator::{GeneratorKind, MetaSource, Thresholds};
use crate::loss::{Embeddings, Rows};
use crate::model::EmbeddingNetwork;
use crate::retrieval::{Recall, recall};
use crate::{Error, Result};

/// The values of K in Recall@K.
const RECALL_AT: [usize; 4] = [1, 2, 4, 8];

/// Test pictures whose neighbours the report shows, and how many of them.
const QUERIES: usize = 10;
const NEIGHBOURS: usize = 8;

/// Pictures embedded at once.
const EVALUATION_CHUNK: usize = 128;

/// Sets the meta batches' draws apart from the training batches'.
const META_SEED: u64 = 0x6d65_7461;

/// What a run tells while it goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device is chosen and open.
    Computing {
        /// `cpu`, `cuda:0`: where network and loss are.
        device: &'a str,
        /// Why `auto` came to the CPU, where a GPU was to be expected.
        reason: Option<&'a str>,
    },
    /// The data set is open and the run folder made.
    Started {
        /// Pictures and classes.
        dataset: &'a Dataset,
        /// Where the results go.
        folder: &'a Path,
        /// Steps in an epoch.
        steps_per_epoch: usize,
    },
    /// Something the user should know; the run goes on.
    Warning(&'a str),
    /// A step is done.
    Step {
        /// What happened.
        record: &'a StepRecord,
        /// Pictures a second, over the last steps.
        images_per_second: f64,
    },
    /// An evaluation has begun.
    Evaluating {
        /// Pictures embedded so far.
        done: usize,
        /// Pictures of the test classes.
        total: usize,
    },
    /// An evaluation is done.
    Evaluated(&'a EvaluationRecord),
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The run folder.
    pub folder: PathBuf,
    /// Recall of nearest neighbours by raw pixels.
    pub pixels: Recall,
    /// Recall of the network before training.
    pub before: Recall,
    /// Recall of the best checkpoint.
    pub best: Recall,
    /// Steps the best checkpoint was trained.
    pub best_step: usize,
    /// Recall after the last step.
    pub after: Recall,
    /// Steps in which nothing was mined and the weights stayed.
    pub steps_without_pairs: usize,
    /// Pictures that could not be read: stand-ins used in training.
    pub replaced: usize,
    /// Pictures that could not be read: left out of the evaluation.
    pub skipped: usize,
    /// Seconds of training, without evaluations.
    pub training_seconds: f64,
    /// Seconds of the whole run.
    pub total_seconds: f64,
}

/// Trains a network and writes the run folder: config.toml, metrics.jsonl, best.safetensors.
///
/// # Errors
/// Settings out of range, data that cannot be used, a file that cannot be written, or a run that diverged.
pub fn train(settings: &TrainSettings, tell: &mut dyn FnMut(Event<'_>)) -> Result<Summary> {
    settings.validate()?;
    let begun = Instant::now();
    let place = place(settings.device.parse()?)?;
    let backend = backend::open(&place.spec)?;
    tell(Event::Computing { device: &place.spec.to_string(), reason: place.reason.as_deref() });
    let dataset = open_dataset(settings)?;
    let sampler = PkSampler::new(
        dataset.train.by_class(),
        settings.classes_per_batch,
        settings.images_per_class,
        settings.seed,
    )?;
    let steps_per_epoch = sampler.steps_per_epoch();
    let network = make_network(settings, &place.network)?;
    let generator = make_generator(settings, &place.spec)?;
    let fresh_meta = generator.is_some() && settings.generator.meta == MetaSource::Fresh;
    let meta_sampler = fresh_meta.then(|| meta_sampler(settings, &dataset)).transpose()?;

    let folder = make_folder(settings, &dataset.name)?;
    let config = toml::to_string(settings).map_err(|error| Error::format(&folder, error.to_string()))?;
    files::write_atomic(&folder.join("config.toml"), config.as_bytes())?;
    let metrics = RecordWriter::create(&folder.join("metrics.jsonl"))?;
    tell(Event::Started { dataset: &dataset, folder: &folder, steps_per_epoch });
    dataset.warnings.iter().for_each(|warning| tell(Event::Warning(warning)));

    let test = Test { split: &dataset.test, image_size: settings.image_size };
    let mut run = Run {
        settings,
        test,
        engine: Engine::new(network, settings, backend, generator, place.network),
        best_path: folder.join("best.safetensors"),
        best: None,
        metrics,
        tell,
    };
    let (pixels, skipped) = run.test.recall_by_pixels(&mut run.engine)?;
    if skipped > 0 {
        (run.tell)(Event::Warning(&format!("{skipped} test pictures cannot be read and are left out")));
    }
    let before = run.evaluate(0)?;

    let mut loader_settings = LoaderSettings::new(settings.image_size, settings.steps as u64, settings.seed);
    loader_settings.workers = settings.workers;
    loader_settings.augment.crop_area = (settings.smallest_crop, 1.0);
    let mut meta_loader = meta_sampler
        .map(|sampler| {
            let meta_settings = LoaderSettings { seed: settings.seed ^ META_SEED, ..loader_settings.clone() };
            Loader::new(Arc::clone(&dataset.train), sampler, meta_settings)
        })
        .transpose()?;
    let loader = Loader::new(Arc::clone(&dataset.train), sampler, loader_settings)?;
    let mut after = before.clone();
    let (mut steps_without_pairs, mut replaced, mut training_seconds) = (0, 0, 0.0);
    let mut clock = Instant::now();
    for (step, batch) in loader.enumerate() {
        let batch = batch?;
        replaced += batch.replaced;
        let meta = meta_loader.as_mut().and_then(Iterator::next).transpose()?;
        replaced += meta.as_ref().map_or(0, |meta| meta.replaced);
        let moved = run.engine.step(step, &batch, meta.as_ref())?;
        steps_without_pairs += usize::from(!moved);
        let epoch = (step + 1) as f64 / steps_per_epoch as f64;
        let seconds = clock.elapsed().as_secs_f64();
        clock = Instant::now();
        training_seconds += seconds;
        run.record_step(step, epoch, batch.labels.len() as f64 / seconds)?;

        let done = step + 1;
        let every = settings.evaluate_every * steps_per_epoch;
        if done == settings.steps || (every > 0 && done % every == 0) {
            after = run.evaluate(done)?;
            clock = Instant::now();
        }
    }
    if replaced > 0 {
        (run.tell)(Event::Warning(&format!(
            "{replaced} unreadable training pictures were met; another of the class stood in each time"
        )));
    }
    if steps_without_pairs > 0 {
        (run.tell)(Event::Warning(&format!(
            "{steps_without_pairs} of {} batches mined no pair and left the weights alone",
            settings.steps
        )));
    }
    // The evaluation of step 0 has already set it.
    let Some(best) = run.best else { return Err(Error::Training("no evaluation took place".into())) };
    let extent = |split: &Split| Extent { classes: split.class_names().len(), pictures: split.len() };
    let findings = Findings {
        dataset: dataset.name.clone(),
        train: extent(&dataset.train),
        test: extent(&dataset.test),
        baselines: vec![Baseline { name: "raw pixels".into(), recall: pixels.at.clone() }],
        training_seconds,
        queries: report::queries(&dataset.test, &best.pictures, &best.nearest, QUERIES, NEIGHBOURS)?,
    };
    findings.save(&folder)?;
    report::write(&folder)?;
    let summary = Summary {
        folder: folder.clone(),
        pixels,
        before,
        best: best.recall,
        best_step: best.step,
        after,
        steps_without_pairs,
        replaced,
        skipped,
        training_seconds,
        total_seconds: begun.elapsed().as_secs_f64(),
    };
    Ok(summary)
}

/// What a run holds from its first to its last step.
struct Run<'a> {
    settings: &'a TrainSettings,
    test: Test<'a>,
    engine: Engine,
    best_path: PathBuf,
    best: Option<Best>,
    metrics: RecordWriter,
    tell: &'a mut dyn FnMut(Event<'_>),
}

/// The best evaluation so far, whose weights are in the checkpoint.
struct Best {
    step: usize,
    recall: Recall,
    nearest: Nearest,
    /// Picture of each row of `nearest`.
    pictures: Vec<usize>,
}

impl Run<'_> {
    /// Measures Recall@K after `step` steps, and keeps the weights if they are the best so far.
    fn evaluate(&mut self, step: usize) -> Result<Recall> {
        let total = self.test.split.len();
        let embedded = self.engine.embed(self.test.batches()?, |done| {
            (self.tell)(Event::Evaluating { done, total });
        })?;
        let (recall, nearest) = search(&mut self.engine, embedded.view()?.into(), &embedded.labels)?;
        let record = EvaluationRecord { step, recall: recall.at.clone() };
        self.metrics.append(&Record::Evaluation(record.clone()))?;
        (self.tell)(Event::Evaluated(&record));
        let first = |recall: &Recall| recall.get(1).unwrap_or(0.0);
        if self.best.as_ref().is_none_or(|best| first(&recall) > first(&best.recall)) {
            let mut facts = vec![
                ("ddtas.step", step.to_string()),
                ("ddtas.seed", self.settings.seed.to_string()),
                ("ddtas.recall@1", format!("{:.4}", first(&recall))),
            ];
            if let Some(generator) = self.engine.generator() {
                let state = serde_json::to_string(generator.thresholds())
                    .map_err(|error| Error::format(&self.best_path, error.to_string()))?;
                facts.push((checkpoint::GENERATOR, state));
            }
            let shape = self.settings.network_shape();
            checkpoint::save(&self.engine.network, &shape, &facts, &self.best_path)?;
            self.best = Some(Best { step, recall: recall.clone(), nearest, pictures: embedded.indices });
        }
        Ok(recall)
    }

    fn record_step(&mut self, step: usize, epoch: f64, images_per_second: f64) -> Result<()> {
        let output = &self.engine.output;
        let (mined_pos, mined_neg) = output.mined();
        let loss = self.engine.loss_settings();
        let finite = |value: f64| value.is_finite().then_some(value);
        let record = StepRecord {
            step,
            epoch,
            loss: output.loss,
            gamma_pos: finite(output.gamma_pos),
            gamma_neg: finite(output.gamma_neg),
            lambda_pos: loss.lambda_pos,
            lambda_neg: loss.lambda_neg,
            mined_pos,
            mined_neg,
            active: output.active,
            mean_pos: finite(output.mean_pos),
            mean_neg: finite(output.mean_neg),
            learning_rate: self.engine.learning_rate(step),
            hypergradient: self
                .engine
                .generator()
                .and_then(Generator::last_hypergradient)
                .map(|gradient| [gradient.pos, gradient.neg]),
        };
        self.metrics.append(&Record::Step(record.clone()))?;
        (self.tell)(Event::Step { record: &record, images_per_second });
        Ok(())
    }
}

/// The test classes, at the network's size.
struct Test<'a> {
    split: &'a Arc<Split>,
    image_size: usize,
}

impl Test<'_> {
    fn batches(&self) -> Result<EvaluationBatches> {
        EvaluationBatches::new(Arc::clone(self.split), self.image_size, TestCrop::default(), EVALUATION_CHUNK)
    }

    /// Recall of nearest neighbours among the pictures themselves, cut as for the network, by the cosine
    /// of their pixels less their mean; and how many pictures cannot be read.
    fn recall_by_pixels(&self, engine: &mut Engine) -> Result<(Recall, usize)> {
        let (mut pixels, mut labels, mut skipped) = (Vec::new(), Vec::new(), 0);
        for batch in self.batches()? {
            let batch = batch?;
            pixels.extend(batch.pixels);
            labels.extend(batch.labels);
            skipped += batch.skipped;
        }
        let area = self.image_size * self.image_size;
        let dim = 3 * area;
        for picture in pixels.chunks_exact_mut(dim) {
            for (plane, (mean, deviation)) in picture.chunks_exact_mut(area).zip(channels()) {
                plane.iter_mut().for_each(|value| *value = *value * deviation + mean);
            }
            to_unit_row(picture);
        }
        let pixels = ndarray::ArrayView2::from_shape((labels.len(), dim), &pixels)
            .map_err(|error| Error::Dataset(error.to_string()))?;
        Ok((search(engine, pixels.into(), &labels)?.0, skipped))
    }
}

/// Mean and deviation that the data module normalised each channel by.
fn channels() -> impl Iterator<Item = (f32, f32)> {
    data::MEAN.into_iter().zip(data::STANDARD_DEVIATION)
}

/// Takes the mean off a picture and scales it to unit norm, so that brightness and contrast do not decide.
fn to_unit_row(picture: &mut [f32]) {
    let mean = picture.iter().map(|&value| f64::from(value)).sum::<f64>() / picture.len() as f64;
    let norm = picture.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>().sqrt();
    if norm < 1e-6 {
        // A picture of one colour resembles no other.
        picture.fill((picture.len() as f32).sqrt().recip());
    } else {
        picture.iter_mut().for_each(|value| *value = ((f64::from(*value) - mean) / norm) as f32);
    }
}

fn search<'a>(
    engine: &mut Engine,
    embeddings: Embeddings<'a>,
    labels: &'a [i64],
) -> Result<(Recall, Nearest)> {
    recall(engine.backend(), &Rows::new(embeddings, labels), &RECALL_AT)
}

fn open_dataset(settings: &TrainSettings) -> Result<Dataset> {
    match (settings.dataset, &settings.data_root) {
        (DatasetKind::Folder, Some(root)) => data::folder(
            root,
            &FolderSettings { train_classes: settings.train_classes, ..FolderSettings::default() },
        ),
        (DatasetKind::Folder, None) => Err(Error::Dataset("--dataset folder needs --data-root DIR".into())),
        (DatasetKind::Synthetic, _) => data::synthetic::synthetic(&SyntheticSettings {
            seed: settings.data_seed,
            ..SyntheticSettings::default()
        }),
    }
}

/// The network to start from. It is drawn or read on the CPU and then moved, so that a seed means the same
/// weights on every device.
fn make_network(settings: &TrainSettings, device: &Device) -> Result<EmbeddingNetwork> {
    let cpu = Device::flex().autodiff();
    cpu.seed(settings.seed);
    let shape = settings.network_shape();
    let mut network = EmbeddingNetwork::new(&shape, &cpu);
    if let Some(path) = &settings.init {
        let stored = checkpoint::shape(path)?;
        if stored != shape {
            return Err(Error::format(
                path,
                format!(
                    "holds a network of --width {} --depth {} --embedding-dim {}: give the same",
                    stored.width, stored.depth, stored.embedding_dim
                ),
            ));
        }
        network = checkpoint::load(network, path)?;
    }
    Ok(moved(network, device))
}

fn make_generator(settings: &TrainSettings, spec: &DeviceSpec) -> Result<Option<Generator>> {
    let generator = &settings.generator;
    if generator.kind == GeneratorKind::Off {
        return Ok(None);
    }
    let thresholds = match &generator.generator_init {
        Some(path) => checkpoint::thresholds(path)?,
        None => Thresholds::new(settings.first_lambda(), generator),
    };
    Ok(Some(Generator::new(generator.clone(), thresholds, backend::open(spec)?)))
}

fn meta_sampler(settings: &TrainSettings, dataset: &Dataset) -> Result<PkSampler> {
    let generator = &settings.generator;
    PkSampler::new(
        dataset.train.by_class(),
        generator.meta_classes,
        generator.meta_images,
        settings.seed ^ META_SEED,
    )
}

/// Creates the run folder: the one asked for, which must be new or empty, or the next free number under runs/.
fn make_folder(settings: &TrainSettings, dataset: &str) -> Result<PathBuf> {
    if let Some(folder) = &settings.output {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let mut entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
        if entries.next().is_some() {
            return Err(Error::format(folder, "the run folder is not empty: give another --output"));
        }
        return Ok(folder.clone());
    }
    let root = Path::new("runs");
    std::fs::create_dir_all(root).map_err(Error::io("create", root))?;
    for number in 1.. {
        let folder = root.join(format!("{dataset}-{number:03}"));
        // Creating is the test: of two runs that start at once, one gets the number.
        match std::fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::Io { action: "create", path: folder, source }),
        }
    }
    unreachable!("the loop ends only by returning")
}
