//! The optimizer's moments in a checkpoint, by the names of their weights.
//!
//! Burn keys them by parameter ids, which differ from process to process; a checkpoint names them
//! `optimizer.<weight>.<moment>` instead.

use std::collections::HashMap;

use burn::optim::ModuleOptimizer;
use burn::store::ModuleSnapshot;
use burn::store::burn_pack::{Reader, Scalar, Writer};
use ddtas_io::tensors::Dtype;

use super::archive::{Archive, Entry};
use crate::model::EmbeddingNetwork;

const PREFIX: &str = "optimizer.";

/// Adds the state of `optimizer`, which trains `network`, to `archive`.
pub(in crate::train) fn put(
    archive: &mut Archive,
    optimizer: &ModuleOptimizer,
    network: &EmbeddingNetwork,
) -> Result<(), String> {
    let bytes = optimizer.into_bytes().map_err(|error| error.to_string())?;
    let record = Reader::from_bytes(bytes).map_err(|error| error.to_string())?;
    let names: HashMap<u64, String> = weights(network).map(|(name, number, _)| (number, name)).collect();
    let named = |key: &str| {
        let (number, leaf) = key.split_once('.')?;
        let name = names.get(&number.parse::<u64>().ok()?)?;
        Some(format!("{PREFIX}{name}.{leaf}"))
    };
    let unknown = |key: &str| format!("the optimizer holds {key}, which is not a weight of the network");
    for (key, scalar) in record.scalars() {
        let count = u64::try_from(*scalar).map_err(|error| format!("{key}: {error}"))?;
        archive.put_numbers(named(key).ok_or_else(|| unknown(key))?, &[1], &[count]);
    }
    for tensor in record.into_tensors().map_err(|error| error.to_string())? {
        let (key, entry) = Entry::of(tensor)?;
        archive.put(named(&key).ok_or_else(|| unknown(&key))?, entry);
    }
    Ok(())
}

/// Whether `archive` contains the state of an optimizer.
pub(in crate::train) fn are_in(archive: &Archive) -> bool {
    archive.names().any(|name| name.starts_with(PREFIX))
}

/// `optimizer` with the state from `archive`, for the weights of `network`.
pub(in crate::train) fn take(
    archive: &mut Archive,
    optimizer: ModuleOptimizer,
    network: &EmbeddingNetwork,
) -> Result<ModuleOptimizer, String> {
    let mut tensors = Vec::new();
    let mut scalars = Vec::new();
    // All weights trained so far have the same moments; during `--head-steps` the backbone's have none yet.
    let mut wanted: Option<Vec<String>> = None;
    for (name, number, shape) in weights(network) {
        let state = archive.take_all(&format!("{PREFIX}{name}."));
        if !state.is_empty() {
            let leaves: Vec<String> = state.iter().map(|(leaf, _)| leaf.clone()).collect();
            let wanted = wanted.get_or_insert_with(|| leaves.clone());
            if let Some(leaf) = wanted.iter().find(|leaf| !leaves.contains(*leaf)) {
                return Err(format!("no tensor `{PREFIX}{name}.{leaf}`"));
            }
        }
        for (leaf, entry) in state {
            check(&leaf, &entry, &shape).map_err(|why| format!("tensor `{PREFIX}{name}.{leaf}` {why}"))?;
            let key = format!("{number}.{leaf}");
            match entry.dtype {
                Dtype::F32 => tensors.push(entry.named(key, Some(number))),
                Dtype::U64 => {
                    let count: Vec<u64> = bytemuck::pod_collect_to_vec(&entry.bytes);
                    let count = count.first().ok_or_else(|| format!("{PREFIX}{name}.{leaf} is empty"))?;
                    scalars.push((key, Scalar::from(*count)));
                }
                other => return Err(format!("{PREFIX}{name}.{leaf} is of type {other:?}")),
            }
        }
    }
    if let Some((name, _)) = archive.take_all(PREFIX).first() {
        return Err(format!("{PREFIX}{name} belongs to no weight of the network"));
    }
    let mut writer = Writer::new(tensors);
    for (key, scalar) in &scalars {
        writer = writer.with_scalar(key, *scalar);
    }
    let bytes = writer.into_bytes().map_err(|error| error.to_string())?;
    optimizer.from_bytes(bytes).map_err(|error| error.to_string())
}

/// Checks one part of the state of a weight of this `shape`, since Burn does not.
fn check(leaf: &str, entry: &Entry, shape: &[usize]) -> Result<(), String> {
    let wanted = if entry.dtype == Dtype::F32 { shape } else { &[1] };
    if entry.shape != wanted {
        return Err(format!("has shape {:?}, not {wanted:?}", entry.shape));
    }
    if leaf == "__rank" && entry.bytes != (shape.len() as u64).to_le_bytes() {
        return Err(format!("is not {}, the dimensions of its weight", shape.len()));
    }
    Ok(())
}

/// Name, parameter id and shape of each weight.
fn weights(network: &EmbeddingNetwork) -> impl Iterator<Item = (String, u64, Vec<usize>)> + use<'_> {
    network.collect(None, None, true).into_iter().filter_map(|tensor| {
        let shape = tensor.shape.iter().copied().collect();
        Some((network.file_name(&tensor.name), tensor.param_id?, shape))
    })
}
