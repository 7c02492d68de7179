//! Published weights read into named backbones, and checkpoints of these backbones.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::collections::BTreeMap;
use std::path::Path;

use assert_cmd::Command;
use burn::store::ModuleSnapshot;
use burn::tensor::{Device, Distribution, Tensor};
use ddtas_fixtures::FixtureSettings;
use ddtas_io::tensors::{Dtype, TensorFile, to_bytes};
use ddtas_train::data::{Cropper, DatasetKind};
use ddtas_train::model::{
    Backbone, BackboneKind, EmbeddingNetwork, Features, NetworkShape, Normalise, PoolingKind, to_array,
};
use ddtas_train::train::checkpoint::{self, Checkpoint};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn shape(backbone: BackboneKind) -> NetworkShape {
    NetworkShape {
        backbone,
        pooling: backbone.pooling(),
        width: 0,
        depth: 0,
        embedding_dim: 8,
        head: ddtas_train::model::HeadKind::Linear,
    }
}

/// Random tensors of a file of published weights, with a classifier and a batch counter, which are not read.
fn published(backbone: &Backbone) -> Tensors {
    let mut draw = 0u32;
    let mut values = |count: usize| -> Vec<f32> {
        (0..count)
            .map(|_| {
                draw = draw.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                0.5 + (draw >> 8) as f32 / (1 << 24) as f32
            })
            .collect()
    };
    let mut tensors: Tensors = backbone
        .collect(None, None, true)
        .into_iter()
        .map(|tensor| {
            let shape: Vec<usize> = tensor.shape.iter().copied().collect();
            let count = shape.iter().product();
            (backbone.file_name(&tensor.name), (shape, values(count)))
        })
        .collect();
    tensors.insert("fc.weight".into(), (vec![2, 2], values(4)));
    tensors.insert("bn1.num_batches_tracked".into(), (vec![1], values(1)));
    tensors
}

fn write(path: &Path, tensors: &Tensors) {
    let bytes: Vec<Vec<u8>> =
        tensors.values().map(|(_, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let entries = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, (shape, _)), bytes)| (name.as_str(), Dtype::F32, &shape[..], &bytes[..]));
    std::fs::write(path, to_bytes(&BTreeMap::new(), entries.collect()).unwrap()).unwrap();
}

#[test]
fn weights_that_fit_are_taken_and_others_are_named() {
    let (folder, device) = (tempfile::tempdir().unwrap(), Device::flex());
    let path = folder.path().join("weights.safetensors");
    let network = || Backbone::new(&shape(BackboneKind::Resnet18), &device);
    let good = published(&network());
    write(&path, &good);
    let filled = network().with_weights(&path).unwrap();
    for tensor in filled.collect(None, None, true) {
        let bytes = tensor.clone().into_parts().unwrap().4;
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        assert_eq!(values, good[&filled.file_name(&tensor.name)].1, "{}", tensor.name);
    }
    // Names with the prefix that PyTorch's DataParallel writes.
    let wrapped = good.iter().map(|(name, tensor)| (format!("module.{name}"), tensor.clone()));
    write(&path, &wrapped.collect());
    network().with_weights(&path).unwrap();

    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        write(&path, &tensors);
        network().with_weights(&path).map(|_| ()).unwrap_err().to_string()
    };
    let name = "layer3.1.bn2.running_var";
    let said = refused(&|tensors| drop(tensors.remove(name)));
    assert!(said.contains("not weights of resnet18: no tensor `") && said.contains(name), "{said}");
    let said = refused(&|tensors| drop(tensors.insert("layer5.weight".into(), (vec![1], vec![1.0]))));
    assert!(said.contains("layer5.weight` is not part of it"), "{said}");
    let said = refused(&|tensors| tensors.get_mut(name).unwrap().0 = vec![2, 128]);
    assert!(said.contains(name) && said.contains("[2, 128]") && said.contains("[256]"), "{said}");
    let said = refused(&|tensors| tensors.get_mut(name).unwrap().1[7] = f32::NAN);
    assert!(said.contains(name) && said.contains("NaN"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for (other, name) in [
        (BackboneKind::Resnet50, "resnet50"),
        (BackboneKind::EfficientnetLite0, "efficientnet-lite0"),
        (BackboneKind::VitS16, "vit-s16 or vit-s16-augreg"),
    ] {
        let said = refused(&|tensors| *tensors = published(&Backbone::new(&shape(other), &device)));
        let fits = format!("); they fit --backbone {name}");
        assert!(said.contains("not weights of resnet18 (") && said.ends_with(&fits), "{said}");
    }
}

/// The three planes of an orange picture (red 255, green 51, blue 0) as the network receives it.
fn orange(kind: BackboneKind) -> Vec<f32> {
    let picture = image::RgbImage::from_pixel(12, 10, image::Rgb([255, 51, 0]));
    let mut pixels = Vec::new();
    Cropper::new(8, kind.preprocessing()).unwrap().test(&picture, &mut pixels).unwrap();
    pixels
}

#[test]
fn pictures_are_scaled_as_for_the_published_weights() {
    // Of red 1, green 0.2 and blue 0.
    let imagenet = [(1.0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.0 - 0.406) / 0.225];
    for (kind, wanted) in [
        (BackboneKind::Residual, imagenet),
        (BackboneKind::Resnet18, imagenet),
        (BackboneKind::Resnet50, imagenet),
        (BackboneKind::VitS16, imagenet),
        (BackboneKind::VitS16Augreg, [1.0, -0.6, -1.0]),
        // (byte - 127) / 128.
        (BackboneKind::EfficientnetLite0, [1.0, -0.59375, -0.9921875]),
        // Blue first: 0 - 104, 51 - 117, 255 - 128.
        (BackboneKind::BnInception, [-104.0, -66.0, 127.0]),
    ] {
        let planes = orange(kind);
        assert_eq!(planes.len(), 3 * 64);
        for (plane, wanted) in planes.chunks(64).zip(wanted) {
            let far = plane.iter().find(|value| (**value - wanted).abs() > 1e-5 * wanted.abs());
            assert!(far.is_none(), "{kind:?}: {far:?}, not {wanted}");
        }
    }
}

/// The JSON that a subcommand prints with `--json`.
fn json(command: &str, more: &[(&str, &Path)]) -> serde_json::Value {
    let mut program = Command::cargo_bin("ddtas-train").unwrap();
    program.args(command.split(' ')).arg("--json");
    for (flag, path) in more {
        program.arg(flag).arg(path);
    }
    serde_json::from_slice(&program.assert().success().get_output().stdout).unwrap()
}

#[test]
fn published_weights_embed_and_search_without_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (weights, pictures, out) = (at("weights.safetensors"), at("data"), at("out.safetensors"));
    let mut tensors = published(&Backbone::new(&shape(BackboneKind::Resnet18), &Device::flex()));
    // Weights of both signs keep activations small.
    let convolutions = tensors.values_mut().filter(|(shape, _)| shape.len() == 4);
    convolutions.flat_map(|(_, values)| values).for_each(|value| *value = 0.1 * (*value - 1.0));
    write(&weights, &tensors);
    runs::folder_of_pictures(&pictures, 3, 2);
    let query = pictures.join("class01/0.png");
    let network = "--backbone resnet18 --image-size 32";

    let export = json(
        &format!("embed {network}"),
        &[("--weights", &weights), ("--images", &pictures), ("--out", &out)],
    );
    assert_eq!((&export["dim"], &export["pictures"]), (&512.into(), &6.into()));
    let find = |pooling: &str, gallery: &Path| {
        let command = format!("search --pooling {pooling} {network}");
        json(&command, &[("--weights", &weights), ("--query", &query), ("--gallery", gallery)])
    };
    let found = find("avg", &out);
    assert_eq!(found["queries"][0]["answers"][0]["name"], "class01/0.png");
    assert_eq!(found, find("avg", &pictures));
    // A gallery that was embedded with another pooling is refused.
    let mut other = Command::cargo_bin("ddtas-train").unwrap();
    other.args(["search", "--pooling", "max", "--backbone", "resnet18", "--image-size", "32", "--weights"]);
    other.arg(&weights).arg("--query").arg(&query).arg("--gallery").arg(&out);
    runs::assert_refused(&mut other, "another network");

    // The report of a run from these weights calls its start pretrained.
    runs::folder_of_pictures(&pictures, 4, 2);
    let run = at("run");
    let mut training = runs::small_run(&run, 1);
    training.args(["--backbone", "resnet18", "--image-size", "32", "--classes-per-batch", "2"]);
    training.args(["--dataset", "folder", "--data-root"]);
    training.arg(&pictures).arg("--weights").arg(&weights);
    let table = String::from_utf8(training.assert().success().get_output().stdout.clone()).unwrap();
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    for text in [table, page] {
        assert!(text.contains("before training (pretrained, random head)"), "{text}");
    }
}

#[test]
fn only_transformers_are_pooled_by_their_class_token_unless_told() {
    use PoolingKind::{Avg, Cls};
    use clap::ValueEnum;
    let poolings = BackboneKind::value_variants().iter().map(|kind| kind.pooling()).collect::<Vec<_>>();
    assert_eq!(poolings, [Avg, Avg, Avg, Avg, Avg, Cls, Cls]);
}

#[test]
fn a_start_from_random_weights_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut program = runs::small_run(&run, 1);
    program.args(["--backbone", "resnet18", "--classes-per-batch", "2", "--image-size", "32"]);
    let said = String::from_utf8(program.assert().success().get_output().stderr.clone()).unwrap();
    let line = "resnet18 starts from random weights";
    assert_eq!(
        said.lines().filter(|said| said.contains(line) && said.contains("--weights")).count(),
        1,
        "{said}"
    );
    assert!(std::fs::read_to_string(run.join("config.toml")).unwrap().contains(line));
}

#[test]
fn damaged_files_are_one_line_each() {
    let (folder, device) = (tempfile::tempdir().unwrap(), Device::flex());
    let path = folder.path().join("weights.pth");
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let network = Backbone::new(&shape(BackboneKind::Resnet18), &device);
        let said = network.with_weights(&path).map(|_| ()).unwrap_err().to_string();
        assert!(said.lines().count() == 1 && said.contains("weights.pth"), "{said}");
        said
    };
    refused(b"");
    refused(b"PK");
    refused(&[0x80, 2, b'}', b'q', 0, b'.', 0, 0, 0]);
    // A pickle that asks for four gigabytes of text.
    refused(&[0x80, 2, b'X', 0xff, 0xff, 0xff, 0xff, b'a', b'b', b'.']);
    refused(&[b'P', b'K', 3, 4, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    refused(&[0xff; 64]);
    // A TAR archive whose first bytes are a ZIP's: refused, since its sparse files could fill the memory.
    let mut header = tar::Header::new_gnu();
    header.set_path("PK").unwrap();
    header.set_cksum();
    let said = refused(&[&header.as_bytes()[..], &[0; 1024]].concat());
    assert!(said.contains("is a TAR archive"), "{said}");
    refused(b"nothing of the kind, but long enough to look at");
    assert!(
        Backbone::new(&shape(BackboneKind::Resnet18), &device)
            .with_weights(&folder.path().join("none"))
            .is_err()
    );
}

#[test]
fn checkpoints_bear_the_fields_names_and_come_back() {
    let (folder, device) = (tempfile::tempdir().unwrap(), Device::flex());
    let path = folder.path().join("checkpoint.safetensors");
    let shape = NetworkShape { pooling: PoolingKind::Gem, ..shape(BackboneKind::EfficientnetLite0) };
    device.seed(1);
    let network = EmbeddingNetwork::new(&shape, &device);
    checkpoint::save(&network, &shape, &[], &path).unwrap();

    let bytes = std::fs::read(&path).unwrap();
    let file = TensorFile::parse(&path, &bytes).unwrap();
    for name in [
        "backbone._conv_stem.weight",
        "backbone._blocks.15._bn2.running_var",
        "pooling.exponent",
        "head.weight",
    ] {
        assert!(file.has(name), "{name}");
    }
    let back = Checkpoint::open(&path).unwrap();
    assert_eq!(back.shape().unwrap(), shape);
    device.seed(2);
    let again = back.fill(EmbeddingNetwork::new(&shape, &device)).unwrap();
    let images = Tensor::random([2, 3, 33, 33], Distribution::Normal(0.0, 1.0), &device);
    let embed =
        |network: &EmbeddingNetwork| to_array(network.forward(images.clone(), Normalise::Running)).unwrap();
    assert_eq!(embed(&network), embed(&again));
}

#[test]
fn feature_maps_have_the_fields_shapes() {
    let device = Device::flex();
    for (kind, features, sides) in [
        (BackboneKind::EfficientnetLite0, 1280, [3, 4]),
        (BackboneKind::Resnet18, 512, [3, 4]),
        (BackboneKind::Resnet50, 2048, [3, 4]),
        (BackboneKind::BnInception, 1024, [3, 3]),
    ] {
        for (size, side) in [96, 97].into_iter().zip(sides) {
            let network = Backbone::new(&shape(kind), &device);
            let images = Tensor::random([1, 3, size, size], Distribution::Normal(0.0, 1.0), &device);
            let Features::Map(map) = network.forward(images, Normalise::Running) else {
                panic!("{kind:?} answers no map")
            };
            assert_eq!(map.dims(), [1, features, side, side], "{kind:?} at {size}");
        }
    }
    let network = Backbone::new(&shape(BackboneKind::VitS16), &device);
    let images = Tensor::random([1, 3, 96, 64], Distribution::Normal(0.0, 1.0), &device);
    let Features::Tokens(tokens) = network.forward(images, Normalise::Running) else { panic!("no tokens") };
    assert_eq!(tokens.dims(), [1, 1 + 6 * 4, 384]);
}

#[test]
fn the_papers_preset_trains_bn_inception_on_cars196() {
    let folder = tempfile::tempdir().unwrap();
    let (weights, run) = (folder.path().join("weights.safetensors"), folder.path().join("run"));
    let network = Backbone::new(&shape(BackboneKind::BnInception), &Device::flex());
    let mut tensors = published(&network);
    // Of both signs, and of He's variance, so that values keep their size through the network.
    for (shape, values) in tensors.values_mut().filter(|(shape, _)| shape.len() == 4) {
        let inputs: usize = shape[1..].iter().product();
        let scale = (24.0 / inputs as f32).sqrt();
        values.iter_mut().for_each(|value| *value = scale * (*value - 1.0));
    }
    write(&weights, &tensors);
    let cars = FixtureSettings {
        dataset: DatasetKind::Cars196,
        layout: None,
        classes: 8,
        images_per_class: 5,
        picture_width: 40,
        seed: 3,
        archive: false,
    };
    let cars = ddtas_fixtures::write(&cars, &folder.path().join("cars")).unwrap();
    let mut program = Command::cargo_bin("ddtas-train").unwrap();
    program.args(["--preset", "paper", "--dataset", "cars196", "--image-size", "32", "--steps", "1"]);
    program.arg("--weights").arg(&weights).arg("--data-root").arg(cars).arg("--output").arg(&run);
    program.assert().success();

    let (steps, _) = runs::records(&run);
    assert!(steps.len() == 1 && steps[0].loss > 0.0 && steps[0].loss.is_finite(), "{steps:?}");
    let path = run.join("last.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = TensorFile::parse(&path, &bytes).unwrap();
    let change = |name: &str| {
        let before = &tensors[name].1;
        let after = file.floats(&format!("backbone.{name}"), before.len()).unwrap();
        before.iter().zip(after).fold(0.0f64, |most, (&a, b)| most.max((f64::from(a) - b).abs()))
    };
    // Adam's first step is the learning rate, whatever the gradient.
    let moved = change("inception_4a_3x3.weight");
    assert!((9e-6..1.1e-5).contains(&moved), "{moved}");
    for part in ["weight", "bias", "running_mean", "running_var"] {
        assert_eq!(change(&format!("inception_4a_3x3_bn.{part}")), 0.0, "{part}");
    }
}
