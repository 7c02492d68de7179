//! The reference cases of SPEC 7, read from tests/golden.

use std::collections::HashMap;
use std::path::Path;

use ddtas::loss::{Hypergradient, LossSettings, Mining};
use ndarray::Array2;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::{Case, Dtype, Expected, Matrix, Side};

/// Every file of tests/golden, by name.
pub fn golden() -> Vec<Case> {
    // Seen from where cargo starts a package's tests, the root or a folder in it: the program may run elsewhere than it was built.
    let folder =
        ["tests/golden", "../tests/golden"].map(Path::new).into_iter().find(|folder| folder.is_dir());
    let mut paths: Vec<_> = std::fs::read_dir(folder.expect("the working directory is a package's"))
        .expect("tests/golden is part of the repository")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Case {
    let bytes = std::fs::read(path).expect("readable");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
    let metadata = header.metadata().clone().expect("SPEC 7 asks for metadata");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = |name: &str| file.tensor(name).unwrap_or_else(|_| panic!("{path:?} has no {name}"));

    let settings = settings(&metadata);
    let anchors = Side {
        rows: Matrix::F32(matrix(&tensor("embeddings"))),
        labels: integers(&tensor("labels")),
        tangent: matrix(&tensor("tangent")),
    };
    // The files have no means; the reference fills them in, and everything else is theirs.
    let mut expected = Expected::new(Dtype::F32, &anchors, None, &settings);
    let scalar = |name: &str| floats(&tensor(name))[0];
    let count = |name: &str| integers(&tensor(name))[0].unsigned_abs();
    let counts = |name: &str| integers(&tensor(name)).iter().map(|&n| n as u32).collect();
    let narrow = |name: &str| floats(&tensor(name)).iter().map(|&value| value as f32).collect();
    let output = &mut expected.output;
    output.loss = scalar("expected.loss");
    output.gradient = wide_matrix(&tensor("expected.grad"));
    output.gamma_pos = scalar("expected.gamma_pos");
    output.gamma_neg = scalar("expected.gamma_neg");
    output.probe_neg = count("expected.probe_neg");
    output.total_pos = count("expected.total_pos");
    output.active = count("expected.active");
    output.min_pos = narrow("expected.min_pos");
    output.max_neg = narrow("expected.max_neg");
    output.count_pos = counts("expected.count_pos");
    output.count_neg = counts("expected.count_neg");
    output.dloss_dlambda_pos = scalar("expected.dloss_dlambda_pos");
    output.dloss_dlambda_neg = scalar("expected.dloss_dlambda_neg");
    expected.hyper = Hypergradient { pos: scalar("expected.hyper_pos"), neg: scalar("expected.hyper_neg") };
    Case { name: metadata["case"].clone(), dtype: Dtype::F32, settings, anchors, references: None, expected }
}

fn settings(metadata: &HashMap<String, String>) -> LossSettings {
    let number = |name: &str| metadata[name].parse::<f64>().expect("a number");
    LossSettings {
        mining: if metadata["adaptive"] == "true" { Mining::AtAsms } else { Mining::Asms },
        gamma: number("gamma"),
        negative_ratio: number("neg_ratio"),
        probe_ratio: number("probe_neg_ratio"),
        tolerance: number("tolerance"),
        alpha: number("alpha"),
        beta: number("beta"),
        lambda_pos: number("lam_pos"),
        lambda_neg: number("lam_neg"),
    }
}

/// Little-endian values of `N` bytes each.
fn values<T, const N: usize>(tensor: &TensorView<'_>, from: fn([u8; N]) -> T) -> Vec<T> {
    tensor.data().chunks_exact(N).map(|chunk| from(chunk.try_into().expect("N bytes"))).collect()
}

fn floats(tensor: &TensorView<'_>) -> Vec<f64> {
    values(tensor, f64::from_le_bytes)
}

fn integers(tensor: &TensorView<'_>) -> Vec<i64> {
    values(tensor, i64::from_le_bytes)
}

fn shaped<T>(tensor: &TensorView<'_>, values: Vec<T>) -> Array2<T> {
    Array2::from_shape_vec((tensor.shape()[0], tensor.shape()[1]), values).expect("a matrix")
}

fn matrix(tensor: &TensorView<'_>) -> Array2<f32> {
    shaped(tensor, values(tensor, f32::from_le_bytes))
}

fn wide_matrix(tensor: &TensorView<'_>) -> Array2<f32> {
    shaped(tensor, floats(tensor)).mapv(|value| value as f32)
}
