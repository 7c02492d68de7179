//! Altered checkpoints: each is refused by a line that says what does not fit.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use ddtas_io::tensors::Dtype;
use runs::{Tensor, assert_refused, change, small_run};

fn find(tensors: &mut [Tensor], wanted: impl Fn(&Tensor) -> bool) -> &mut Tensor {
    tensors.iter_mut().find(|tensor| wanted(tensor)).unwrap()
}

/// The last checkpoint of a small run.
fn last(place: &Path) -> PathBuf {
    small_run(&place.join("run"), 2).assert().success();
    place.join("run/last.safetensors")
}

#[test]
fn networks_that_do_not_fit_their_file_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let (last, changed) = (last(place.path()), place.path().join("changed.safetensors"));
    let refused = |what: &str| {
        let mut command = Command::cargo_bin("ddtas-train").unwrap();
        command.args(["eval", "--dataset", "synthetic", "--checkpoint"]).arg(&changed);
        assert_refused(&mut command, what);
    };
    let with_width = |width: &str| {
        change(&last, &changed, |facts, _| {
            let shape = facts.get_mut("ddtas.network").unwrap();
            *shape = shape.replace("\"width\":8", &format!("\"width\":{width}"));
        });
    };
    with_width("5000");
    refused("its network has width 5000, which is not 1 to 4096");
    with_width("4000");
    refused("is too small to hold a network of --width 4000");
    change(&last, &changed, |facts, _| {
        facts.insert("ddtas.network".into(), r#"{"backbone":"resnet50","embedding_dim":60000}"#.into());
    });
    refused("is too small to hold a network of --backbone resnet50");
    with_width("9");
    refused("does not fit the network: tensor `backbone.");
    change(&last, &changed, |_, tensors| find(tensors, |tensor| tensor.0 == "head.weight").2 = vec![1024]);
    refused("tensor `head.weight` is F32 of shape [1024], not F32 of shape [32, 32]");
    change(&last, &changed, |_, tensors| tensors.retain(|tensor| tensor.0 != "head.bias"));
    refused("does not fit the network: no tensor `head.bias`");
}

#[test]
fn moments_that_do_not_fit_their_weights_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let (last, changed) = (last(place.path()), place.path().join("changed.safetensors"));
    let run = place.path().join("next");
    let refused = |what: &str| {
        assert_refused(small_run(&run, 2).arg("--init").arg(&changed), what);
        assert!(!run.exists());
    };
    let of_head = |tensor: &Tensor| tensor.0.starts_with("optimizer.head.weight.") && tensor.1 == Dtype::F32;
    change(&last, &changed, |_, tensors| {
        let moment = find(tensors, of_head);
        moment.2 = vec![moment.2.iter().product()];
    });
    refused("tensor `optimizer.head.weight.");
    change(&last, &changed, |_, tensors| {
        let place = tensors.iter().position(of_head).unwrap();
        tensors.remove(place);
    });
    refused("no tensor `optimizer.head.weight.");
    change(&last, &changed, |_, tensors| {
        let mut moment = find(tensors, of_head).clone();
        moment.0 = moment.0.replace("head.weight", "head.height");
        tensors.push(moment);
    });
    refused("belongs to no weight of the network");
    change(&last, &changed, |_, tensors| {
        let rank = find(tensors, |tensor| tensor.0 == "optimizer.head.weight.__rank");
        rank.3 = 3u64.to_le_bytes().to_vec();
    });
    refused("is not 2, the dimensions of its weight");
}

#[test]
fn the_head_is_stored_as_torch_does_and_older_files_are_read_as_they_were_written() {
    let place = tempfile::tempdir().unwrap();
    // The network has 32 features: with as many dimensions the shape does not show the layout.
    for dim in [16, 32] {
        let run = |name: &str| place.path().join(format!("{name}-{dim}"));
        let (new, old) = (run("new"), run("old"));
        let (dimensions, mean) = (["--embedding-dim", &dim.to_string()], ["--ema", "0.5"]);
        small_run(&new, 2).args(dimensions).args(mean).assert().success();
        std::fs::create_dir(&old).unwrap();
        for file in ["config.toml", "metrics.jsonl"] {
            std::fs::copy(new.join(file), old.join(file)).unwrap();
        }
        change(&new.join("last.safetensors"), &old.join("last.safetensors"), |facts, tensors| {
            facts.remove("ddtas.head.weight").unwrap();
            for name in ["head.weight", "ema.head.weight"] {
                let (_, _, shape, bytes) = find(tensors, |tensor| tensor.0 == name);
                assert_eq!(*shape, [dim, 32]);
                let values = bytes.chunks_exact(4).map(<[u8]>::to_vec).collect::<Vec<_>>();
                *bytes = (0..32 * dim).flat_map(|at| values[at % dim * 32 + at / dim].clone()).collect();
                shape.reverse();
            }
        });
        let last = |run: &Path| {
            let mut command = Command::cargo_bin("ddtas-train").unwrap();
            command.args(["--steps", "4", "--resume"]).arg(run).assert().success();
            std::fs::read(run.join("last.safetensors")).unwrap()
        };
        assert!(last(&old) == last(&new), "{dim} dimensions");
    }
}
