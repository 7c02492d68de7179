//! Data, network, generator and loaders from the settings of a run.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use burn::tensor::Device;

use super::evaluation::EVALUATION_CHUNK;
use super::ram::{self, Pictures};
use crate::data::{Dataset, ImageBatch, Loader, LoaderSettings, PkSampler, fewer_than};
use crate::generator::{GeneratorKind, MetaSource, Thresholds};
use crate::model::{EmbeddingNetwork, seeded};
use crate::ranks::{Collective, share};
use crate::train::checkpoint::Checkpoint;
use crate::train::device::{RunDevice, find, moved, open};
use crate::train::engine::Engine;
use crate::train::generator::Generator;
use crate::train::settings::TrainSettings;
use crate::{Error, Result};
use ddtas::backend::DeviceSpec;

/// Makes the random draws of meta batches differ from those of training batches.
const META_SEED: u64 = 0x6d65_7461;

/// The training engine and the samplers of its batches.
pub(super) struct Setup {
    pub engine: Engine,
    pub sampler: PkSampler,
    /// Sampler of the generator's batches, if it draws its own.
    pub meta_sampler: Option<PkSampler>,
}

impl Setup {
    /// Adds the samplers of `dataset` to an engine.
    pub fn new(
        settings: &TrainSettings,
        dataset: &Dataset,
        engine: Engine,
        (device, ranks): (&RunDevice, &dyn Collective),
    ) -> Result<Self> {
        let by_class = dataset.train.by_class();
        let classes = settings.classes_per_batch.unwrap_or(by_class.len());
        let sampler = PkSampler::new(by_class, classes, settings.images_per_class, settings.seed)?;
        engine.check_batch(("classes-per-batch times --images-per-class", sampler.batch_size()))?;
        let fresh_meta = engine.generator().is_some() && settings.generator.meta == MetaSource::Fresh;
        let meta_sampler = fresh_meta.then(|| meta_sampler(settings, dataset)).transpose()?;
        if let Some(sampler) = &meta_sampler {
            engine.check_batch(("meta-classes times --meta-images", sampler.batch_size()))?;
        }
        if let Some(most) = memory_of(device) {
            let own = |pictures| share(pictures, ranks.rank(), ranks.size()).len();
            let pictures = Pictures {
                batch: own(sampler.batch_size()),
                meta: meta_sampler.as_ref().map_or(0, |sampler| own(sampler.batch_size())),
                test: own(dataset.test.len()).min(EVALUATION_CHUNK),
            };
            let values = engine.network.backbone.least_values(settings.image_size);
            ram::check(settings, values, &pictures, most)?;
        }
        Ok(Self { engine, sampler, meta_sampler })
    }
}

/// Bytes of memory of this machine, if the network is there.
fn memory_of(device: &RunDevice) -> Option<u128> {
    ram::of_this_machine().filter(|_| device.network == Device::flex().autodiff())
}

/// The device, and an engine whose network has the weights of the run's checkpoint `last`, or else initial ones: random, of
/// `--weights` or of `--init`. Needs no data, so that unsuitable files are reported before a data set is unpacked.
pub(super) fn make_engine(
    settings: &TrainSettings,
    last: Option<&Checkpoint>,
    ranks: &Rc<dyn Collective>,
) -> Result<(RunDevice, Engine)> {
    let device = find(settings.device.parse()?, ranks.local_rank())?;
    let backend = open(&device.spec)?;
    memory_of(&device).map_or(Ok(()), |most| ram::check_weights(settings, most))?;
    let network = match last {
        Some(last) => make_network(settings, Some(last), &device.network)?,
        None => first_network(settings, &device.network)?,
    };
    let generator = make_generator(settings, &device.spec, last.is_some())?;
    let engine = Engine::new(network, settings, backend, generator, device.network.clone());
    let mut engine = engine.with_ranks(Rc::clone(ranks));
    if last.is_none() {
        first_optimizer(settings, &mut engine)?;
    }
    Ok((device, engine))
}

/// Restores the optimizer's moments if `--init` is a checkpoint that contains them.
pub(super) fn first_optimizer(settings: &TrainSettings, engine: &mut Engine) -> Result<()> {
    let Some(init) = settings.init.as_deref().filter(|path| !path.is_dir()) else { return Ok(()) };
    let mut archive = Checkpoint::open(init)?.into_archive();
    engine.take_optimizer(&mut archive).map_err(|reason| Error::format(init, reason))
}

/// Iterator over the batches of some steps of a run, each with a meta batch if the generator draws its own.
pub(super) struct Batches {
    train: Loader,
    meta: Option<Loader>,
}

impl Batches {
    /// Starts the loaders.
    pub fn new(
        settings: &TrainSettings,
        dataset: &Dataset,
        sampler: &PkSampler,
        meta_sampler: Option<&PkSampler>,
        steps: Range<usize>,
        ranks: &dyn Collective,
    ) -> Result<Self> {
        let mut loader = LoaderSettings::new(settings.image_size, steps.len() as u64, settings.seed);
        loader.preprocessing = settings.backbone.preprocessing();
        loader.first_step = steps.start as u64;
        loader.workers = settings.workers;
        loader.rank = (ranks.rank(), ranks.size());
        loader.augment = settings.augment.clone();
        let meta = meta_sampler.map(|sampler| {
            let settings = LoaderSettings { seed: settings.seed ^ META_SEED, ..loader.clone() };
            Loader::new(Arc::clone(&dataset.train), sampler.clone(), settings)
        });
        let train = Loader::new(Arc::clone(&dataset.train), sampler.clone(), loader)?;
        Ok(Self { train, meta: meta.transpose()? })
    }
}

impl Iterator for Batches {
    type Item = Result<(ImageBatch, Option<ImageBatch>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.train.next()?;
        let meta = self.meta.as_mut().and_then(Iterator::next).transpose();
        Some(batch.and_then(|batch| Ok((batch, meta?))))
    }
}

/// The network with its initial weights: random, of `--weights`, or of `--init`.
pub(super) fn first_network(settings: &TrainSettings, device: &Device) -> Result<EmbeddingNetwork> {
    let init = settings.init.as_deref().map(Checkpoint::open).transpose()?;
    make_network(settings, init.as_ref(), device)
}

/// A network with the weights of `stored`, of `--weights`, or random ones. They are read or drawn on the CPU
/// and then moved to `device`, so that a seed gives the same weights on every device.
fn make_network(
    settings: &TrainSettings,
    stored: Option<&Checkpoint>,
    device: &Device,
) -> Result<EmbeddingNetwork> {
    let cpu = Device::flex().autodiff();
    let shape = settings.network_shape();
    seeded(&cpu, settings.seed, || {
        let mut network = EmbeddingNetwork::new(&shape, &cpu);
        if let Some(stored) = stored {
            let found = stored.shape()?;
            if found != shape {
                let message = format!("holds a network of {found}: give the same");
                return Err(Error::format(stored.path(), message));
            }
            network = stored.fill(network)?;
        } else if let Some(path) = &settings.weights {
            network.backbone = network.backbone.with_weights(path)?;
        }
        Ok(moved(network, device))
    })
}

/// The threshold generator in its initial state; a resumed run restores its state afterwards.
fn make_generator(settings: &TrainSettings, spec: &DeviceSpec, resumed: bool) -> Result<Option<Generator>> {
    let generator = &settings.generator;
    if generator.kind == GeneratorKind::Off {
        return Ok(None);
    }
    let thresholds = match &generator.generator_init {
        Some(path) if !resumed => Checkpoint::open(path)?.thresholds(generator)?,
        _ => Thresholds::new(settings.first_lambda(), generator),
    };
    Ok(Some(Generator::new(generator.clone(), thresholds, open(spec)?)))
}

fn meta_sampler(settings: &TrainSettings, dataset: &Dataset) -> Result<PkSampler> {
    let generator = &settings.generator;
    let there = dataset.train.by_class().len();
    let wanted = generator.classes_of(there);
    fewer_than(there, "meta-classes", wanted)?;
    PkSampler::new(dataset.train.by_class(), wanted, generator.meta_images, settings.seed ^ META_SEED)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
mod tests {
    use super::*;
    use crate::data::synthetic::{SyntheticSettings, synthetic};
    use crate::ranks::One;

    #[test]
    fn meta_batches_are_other_pictures_than_training_batches_and_varied_otherwise() {
        let mut settings = TrainSettings { image_size: 16, images_per_class: 2, ..TrainSettings::default() };
        (settings.generator.kind, settings.generator.meta_classes) = (GeneratorKind::Head, Some(4));
        let cars =
            SyntheticSettings { classes: 8, train_pictures: 6, test_pictures: 2, ..Default::default() };
        let dataset = synthetic(&cars).unwrap();
        let sampler = PkSampler::new(dataset.train.by_class(), 4, 2, settings.seed).unwrap();
        let meta = meta_sampler(&settings, &dataset).unwrap();
        assert_eq!(meta.batch_size(), sampler.batch_size());
        assert!((0..4).all(|step| meta.batch(step) != sampler.batch(step)));
        // The same pictures for both, cropped and coloured apart.
        let mut batches = Batches::new(&settings, &dataset, &sampler, Some(&sampler), 3..4, &One).unwrap();
        let (batch, meta) = batches.next().unwrap().unwrap();
        let meta = meta.unwrap();
        assert_eq!((&batch.indices, &meta.indices), (&sampler.batch(3), &sampler.batch(3)));
        assert_ne!(batch.pixels, meta.pixels);
    }
}
