//! One loss over a batch whose activations do not fit in memory: the network sees it in chunks, twice.
//!
//! `cargo run --release -p ddtas --no-default-features --example chunked_batch`
//!
//! First all chunks are embedded, and only the embeddings are kept. After one loss over all embeddings each
//! chunk is embedded again, and its backward pass starts from its rows of dL/dE (Gao et al., "Scaling Deep
//! Contrastive Learning Batch Size under Memory Limited Setup", 2021). With autodiff that is backward of
//! `sum(E * stop_gradient(dL/dE))`.

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, LossOutput, LossSettings};
use ndarray::{Array1, Array2, ArrayView2, Axis, Zip};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ROWS: usize = 1_200;
const CHUNK: usize = 130;
const CLASSES: usize = 200;
const INPUTS: usize = 48;
const HIDDEN: usize = 96;
const DIM: usize = 32;

/// Two layers with a ReLU between them, then unit length.
struct Network {
    first: Array2<f32>,
    second: Array2<f32>,
}

/// What the backward pass needs of a forward pass; for a whole batch of pictures it would not fit in memory.
struct Activations {
    hidden: Array2<f32>,
    length: Array1<f32>,
    embeddings: Array2<f32>,
}

impl Network {
    fn forward(&self, inputs: ArrayView2<'_, f32>) -> Activations {
        let hidden = inputs.dot(&self.first).mapv_into(|value| value.max(0.0));
        let mut embeddings = hidden.dot(&self.second);
        let length = embeddings.map_axis(Axis(1), |row| row.dot(&row).sqrt());
        embeddings /= &length.view().insert_axis(Axis(1));
        Activations { hidden, length, embeddings }
    }

    /// Adds the gradient of the weights that follows from the rows `upstream` of dL/dE.
    fn backward(
        &self,
        inputs: ArrayView2<'_, f32>,
        kept: &Activations,
        upstream: ArrayView2<'_, f32>,
        gradient: &mut Network,
    ) {
        // A normalised row does not change along itself.
        let inward = (&upstream * &kept.embeddings).sum_axis(Axis(1)).insert_axis(Axis(1));
        let outer = (&upstream - &kept.embeddings * &inward) / kept.length.view().insert_axis(Axis(1));
        let mut inner = outer.dot(&self.second.t());
        Zip::from(&mut inner).and(&kept.hidden).for_each(|inner, hidden| {
            if *hidden == 0.0 {
                *inner = 0.0;
            }
        });
        gradient.second += &kept.hidden.t().dot(&outer);
        gradient.first += &inputs.t().dot(&inner);
    }

    fn zeros() -> Self {
        Self { first: Array2::zeros((INPUTS, HIDDEN)), second: Array2::zeros((HIDDEN, DIM)) }
    }
}

fn loss_of(embeddings: ArrayView2<'_, f32>, labels: &[i64]) -> ddtas::Result<LossOutput> {
    let mut output = LossOutput::default();
    CpuBackend::new().loss(&Batch::square(embeddings, labels), &LossSettings::default(), &mut output)?;
    Ok(output)
}

fn at_once(
    network: &Network,
    inputs: ArrayView2<'_, f32>,
    labels: &[i64],
) -> ddtas::Result<(LossOutput, Network)> {
    let kept = network.forward(inputs);
    let output = loss_of(kept.embeddings.view(), labels)?;
    let mut gradient = Network::zeros();
    network.backward(inputs, &kept, output.gradient.view(), &mut gradient);
    Ok((output, gradient))
}

fn in_chunks(
    network: &Network,
    inputs: ArrayView2<'_, f32>,
    labels: &[i64],
) -> ddtas::Result<(LossOutput, Network)> {
    let chunks = || inputs.axis_chunks_iter(Axis(0), CHUNK);
    let mut embeddings = Array2::zeros((inputs.nrows(), DIM));
    for (chunk, mut rows) in chunks().zip(embeddings.axis_chunks_iter_mut(Axis(0), CHUNK)) {
        rows.assign(&network.forward(chunk).embeddings);
    }
    let output = loss_of(embeddings.view(), labels)?;
    let mut gradient = Network::zeros();
    for (chunk, upstream) in chunks().zip(output.gradient.axis_chunks_iter(Axis(0), CHUNK)) {
        network.backward(chunk, &network.forward(chunk), upstream, &mut gradient);
    }
    Ok((output, gradient))
}

fn main() -> ddtas::Result<()> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut draw = |rows, columns, scale: f32| {
        Array2::from_shape_simple_fn((rows, columns), || scale * (random.random::<f32>() - 0.5))
    };
    let network = Network { first: draw(INPUTS, HIDDEN, 0.3), second: draw(HIDDEN, DIM, 0.3) };
    let (centres, noise) = (draw(CLASSES, INPUTS, 1.0), draw(ROWS, INPUTS, 1.4));
    let labels: Vec<i64> = (0..ROWS).map(|row| (row % CLASSES) as i64).collect();
    let inputs = Array2::from_shape_fn((ROWS, INPUTS), |(i, d)| centres[[i % CLASSES, d]] + noise[[i, d]]);

    let (chunked, got) = in_chunks(&network, inputs.view(), &labels)?;
    let (whole, wanted) = at_once(&network, inputs.view(), &labels)?;
    println!("{ROWS} rows, activations of {CHUNK} at a time");
    println!(
        "loss in chunks {:.9}, at once {:.9}, {} anchors active",
        chunked.loss, whole.loss, whole.active
    );
    assert!(whole.active > 0, "the comparison needs a loss");
    assert!((chunked.loss - whole.loss).abs() <= 1e-5 * whole.loss);
    for (layer, got, wanted) in [("first", got.first, wanted.first), ("second", got.second, wanted.second)] {
        let largest = wanted.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let error = (&got - &wanted).iter().fold(0.0f32, |most, x| most.max(x.abs()));
        println!("gradient of the {layer} layer within {:.1e} of its largest entry", error / largest);
        assert!(got.iter().all(|x| x.is_finite()) && largest > 0.0 && error <= 1e-4 * largest);
    }
    Ok(())
}
