//! Writes features of a backbone and the gradients of all its weights, which tests/backbones.py compares with PyTorch.
//!
//!     cargo run --release --example gradients -- --backbone resnet18 --batch-norm frozen --weights W --inputs IN --out OUT

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::store::ModuleSnapshot;
use burn::tensor::{Device, Tensor, TensorData};
use clap::Parser;
use ddtas_io::tensors::{Dtype, TensorFile, to_bytes};
use ddtas_train::model::{Backbone, BackboneKind, EmbeddingNetwork, Features, NetworkShape, Normalise};
use ddtas_train::train::{BatchNorm, checkpoint};
use ddtas_train::{Error, Result};

#[derive(Parser)]
struct Arguments {
    #[arg(long, value_enum)]
    backbone: BackboneKind,
    /// Its weights.
    #[arg(long)]
    weights: PathBuf,
    /// A .safetensors file: `images` `[N, 3 * side * side]`, and `probe`, dL/d(features), flat in one row.
    #[arg(long)]
    inputs: PathBuf,
    /// Normalise and compute gradients as training with this --batch-norm does.
    #[arg(long, value_enum)]
    batch_norm: BatchNorm,
    /// File to write: `features`, and the gradients by the names of the weights.
    #[arg(long)]
    out: PathBuf,
    /// Also write a checkpoint of the network here.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let device = Device::flex().autodiff();
    let kind = arguments.backbone;
    let shape = NetworkShape {
        backbone: kind,
        pooling: kind.pooling(),
        width: 0,
        depth: 0,
        // As many as resnet18 has features: its head is square, and only its values show in which layout it is stored.
        embedding_dim: 512,
        head: ddtas_train::model::HeadKind::Linear,
    };
    let mut network = EmbeddingNetwork::new(&shape, &device);
    network.backbone = network.backbone.with_weights(&arguments.weights)?;
    if let Some(path) = &arguments.checkpoint {
        checkpoint::save(&network.clone().valid(), &shape, &[], path)?;
    }
    let backbone = network.backbone;

    let bytes = std::fs::read(&arguments.inputs).map_err(Error::io("read", &arguments.inputs))?;
    let file = TensorFile::parse(&arguments.inputs, &bytes)?;
    let (images, probe) = (file.matrix::<f32>("images")?, file.matrix::<f32>("probe")?);
    let count = images.nrows();
    let side = (images.ncols() / 3).isqrt();
    let images = TensorData::new(images.into_raw_vec_and_offset().0, [count, 3, side, side]);
    let mode = match arguments.batch_norm {
        BatchNorm::Trainable | BatchNorm::Synchronised => Normalise::Batch,
        BatchNorm::FrozenStatistics => Normalise::Affine,
        BatchNorm::Frozen => Normalise::Running,
    };
    let (features, shape): (Tensor<1>, Vec<usize>) =
        match backbone.forward(Tensor::from_data(images, &device), mode) {
            Features::Map(map) => (map.clone().flatten(0, 3), map.dims().to_vec()),
            Features::Tokens(tokens) => (tokens.clone().flatten(0, 2), tokens.dims().to_vec()),
        };
    let probe = probe.into_raw_vec_and_offset().0;
    let length = probe.len();
    let probe = Tensor::<1>::from_data(TensorData::new(probe, [length]), &device);
    let gradients = (features.clone() * probe).sum().backward();
    let gradients = named(&backbone, &GradientsParams::from_grads(gradients, &backbone));

    let mut tensors = BTreeMap::from([("features".to_owned(), (shape, features.into_data()))]);
    tensors.extend(gradients);
    let bytes: Vec<Vec<u8>> = tensors.values().map(|(_, data)| data.bytes().to_vec()).collect();
    let entries = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, (shape, _)), bytes)| (name.as_str(), Dtype::F32, &shape[..], &bytes[..]));
    let bytes = to_bytes(&BTreeMap::new(), entries.collect())
        .map_err(|reason| Error::format(&arguments.out, reason))?;
    std::fs::write(&arguments.out, bytes).map_err(Error::io("write", &arguments.out))
}

/// The gradients by the weights' names in files; weights without gradient are left out.
fn named(backbone: &Backbone, gradients: &GradientsParams) -> Vec<(String, (Vec<usize>, TensorData))> {
    struct Named<'a> {
        gradients: &'a GradientsParams,
        names: BTreeMap<u64, String>,
        found: Vec<(String, (Vec<usize>, TensorData))>,
    }
    impl ModuleVisitor for Named<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = self.gradients.get::<D>(param.id);
            let name = self.names.remove(&param.id.val());
            let found = name.zip(gradient);
            self.found.extend(found.map(|(name, g)| (name, (g.dims().to_vec(), g.into_data()))));
        }
    }
    let tensors = backbone.collect(None, None, true).into_iter();
    let names = tensors.filter_map(|tensor| Some((tensor.param_id?, backbone.file_name(&tensor.name))));
    let mut named = Named { gradients, names: names.collect(), found: Vec::new() };
    backbone.visit(&mut named);
    named.found
}
