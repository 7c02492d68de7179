//! Pooling of a backbone's output to a feature vector for each picture.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

/// Lower bound of the values in the generalised mean.
const SMALLEST: f32 = 1e-6;

/// Initial exponent of the generalised mean; 1 would be the average, infinity the maximum.
const EXPONENT: f64 = 3.0;

/// Output of a backbone.
#[derive(Debug, Clone)]
pub enum Features {
    /// `[N, C, H, W]`.
    Map(Tensor<4>),
    /// `[N, 1 + T, C]`: the class token, then one for each patch.
    Tokens(Tensor<3>),
}

/// How features are pooled over the picture.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum PoolingKind {
    /// The average.
    #[default]
    Avg,
    /// The maximum.
    Max,
    /// The sum of average and maximum.
    #[value(name = "avg+max")]
    #[serde(rename = "avg+max")]
    AvgMax,
    /// The generalised mean (GeM), with a learned exponent that starts at 3.
    Gem,
    /// The class token (vision transformers).
    Cls,
}

/// Pools features.
#[derive(Module, Debug)]
pub struct Pooling {
    /// The generalised mean's exponent.
    exponent: Option<Param<Tensor<1>>>,
    #[module(skip)]
    kind: PoolingKind,
}

impl Pooling {
    /// A pooling of this `kind`; only the generalised mean has a weight.
    #[must_use]
    pub fn new(kind: PoolingKind, device: &Device) -> Self {
        let exponent = || Initializer::Constant { value: EXPONENT }.init([1], device);
        Self { exponent: (kind == PoolingKind::Gem).then(exponent), kind }
    }

    /// Features to vectors `[N, C]`.
    #[must_use]
    pub fn forward(&self, features: Features) -> Tensor<2> {
        // Positions last: `[N, C, T]`.
        let (places, class) = match features {
            Features::Map(map) => {
                let [count, channels, height, width] = map.dims();
                (map.reshape([count, channels, height * width]), None)
            }
            Features::Tokens(tokens) => {
                let [count, length, channels] = tokens.dims();
                let class = tokens.clone().slice([0..count, 0..1, 0..channels]).reshape([count, channels]);
                (tokens.slice([0..count, 1..length, 0..channels]).swap_dims(1, 2), Some(class))
            }
        };
        let [count, channels, _] = places.dims();
        let pooled = match (self.kind, class) {
            (PoolingKind::Cls, Some(class)) => return class,
            // `BackboneKind::validate` refuses `Cls` for a map.
            (PoolingKind::Avg | PoolingKind::Cls, _) => places.mean_dim(2),
            (PoolingKind::Max, _) => places.max_dim(2),
            (PoolingKind::AvgMax, _) => places.clone().mean_dim(2) + places.max_dim(2),
            (PoolingKind::Gem, _) => self.generalised_mean(places),
        };
        pooled.reshape([count, channels])
    }

    /// `mean(x^p)^(1/p)`, with x clamped to at least `SMALLEST`.
    fn generalised_mean(&self, places: Tensor<3>) -> Tensor<3> {
        let Some(exponent) = &self.exponent else { return places.mean_dim(2) };
        let exponent = exponent.val().reshape([1, 1, 1]);
        let powers = (places.clamp_min(SMALLEST).log() * exponent.clone()).exp();
        (powers.mean_dim(2).log() / exponent).exp()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
mod tests {
    use burn::tensor::TensorData;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const COUNT: usize = 2;
    const CHANNELS: usize = 3;
    /// Height and width of the map, whose positions are the patches of the tokens.
    const SIDES: [usize; 2] = [4, 5];
    const PLACES: usize = SIDES[0] * SIDES[1];

    /// Where the value of a channel is: at a position, or (`None`) in the class token.
    fn at(tokens: bool, image: usize, channel: usize, place: Option<usize>) -> usize {
        if tokens {
            let token = place.map_or(0, |place| 1 + place);
            (image * (1 + PLACES) + token) * CHANNELS + channel
        } else {
            (image * CHANNELS + channel) * PLACES + place.unwrap()
        }
    }

    /// `[N, C]` in float64.
    fn pooled(kind: PoolingKind, tokens: bool, values: &[f64], exponent: f64) -> Vec<f64> {
        let of = |image, channel| {
            let places: Vec<f64> =
                (0..PLACES).map(|place| values[at(tokens, image, channel, Some(place))]).collect();
            let average = |values: &[f64]| values.iter().sum::<f64>() / PLACES as f64;
            let maximum = || places.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            match kind {
                PoolingKind::Avg => average(&places),
                PoolingKind::Max => maximum(),
                PoolingKind::AvgMax => average(&places) + maximum(),
                PoolingKind::Gem => {
                    let powers: Vec<f64> = places.iter().map(|x| x.max(1e-6).powf(exponent)).collect();
                    average(&powers).powf(1.0 / exponent)
                }
                PoolingKind::Cls => values[at(tokens, image, channel, None)],
            }
        };
        (0..COUNT).flat_map(|image| (0..CHANNELS).map(move |channel| of(image, channel))).collect()
    }

    fn assert_near(what: &str, got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (at, (&got, want)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(got) - want).abs() <= 1e-5, "{what}, entry {at}: {got}, not {want}");
        }
    }

    #[test]
    fn poolings_and_their_gradients_are_the_formulas() {
        let device = Device::flex().autodiff();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (tokens, kind) in [
            (false, PoolingKind::Avg),
            (false, PoolingKind::Max),
            (false, PoolingKind::AvgMax),
            (false, PoolingKind::Gem),
            (true, PoolingKind::Avg),
            (true, PoolingKind::Max),
            (true, PoolingKind::AvgMax),
            (true, PoolingKind::Gem),
            (true, PoolingKind::Cls),
        ] {
            let what = format!("{kind:?} of {}", if tokens { "tokens" } else { "a map" });
            let length = COUNT * CHANNELS * (PLACES + usize::from(tokens));
            // Some are negative, in one channel all of them: the generalised mean takes these as 1e-6.
            let mut values: Vec<f32> = (0..length).map(|_| rng.random_range(-0.5..2.0)).collect();
            (0..PLACES).for_each(|place| values[at(tokens, 1, 2, Some(place))] -= 3.0);
            let probe: Vec<f32> = (0..COUNT * CHANNELS).map(|_| rng.random_range(-1.0..1.0)).collect();

            let input = Tensor::<1>::from_data(TensorData::from(&values[..]), &device).require_grad();
            let features = if tokens {
                Features::Tokens(input.clone().reshape([COUNT, 1 + PLACES, CHANNELS]))
            } else {
                Features::Map(input.clone().reshape([COUNT, CHANNELS, SIDES[0], SIDES[1]]))
            };
            let pooling = Pooling::new(kind, &device);
            let output = pooling.forward(features);
            assert_eq!(output.dims(), [COUNT, CHANNELS], "{what}");
            let weights = Tensor::<2>::from_data(TensorData::new(probe.clone(), [COUNT, CHANNELS]), &device);
            let gradients = (output.clone() * weights).sum().backward();
            let read = |tensor: Tensor<1>| crate::model::read(tensor).unwrap();

            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            let sum = |values: &[f64], exponent: f64| -> f64 {
                let pooled = pooled(kind, tokens, values, exponent).into_iter();
                pooled.zip(&probe).map(|(value, &weight)| value * f64::from(weight)).sum()
            };
            let by_difference = |of: &dyn Fn(f64) -> f64| (of(1e-6) - of(-1e-6)) / 2e-6;
            let moved = |at: usize, by: f64| {
                let mut values = values.clone();
                values[at] += by;
                sum(&values, 3.0)
            };
            let wanted: Vec<f64> = (0..length).map(|at| by_difference(&|by| moved(at, by))).collect();
            assert_near(
                &what,
                &read(output.reshape([COUNT * CHANNELS])),
                &pooled(kind, tokens, &values, 3.0),
            );
            assert_near(&format!("dL/dx, {what}"), &read(input.grad(&gradients).unwrap()), &wanted);
            let exponent = pooling.exponent.and_then(|exponent| exponent.val().grad(&gradients)).map(read);
            let wanted = by_difference(&|by| sum(&values, 3.0 + by));
            assert_eq!(exponent.is_some(), kind == PoolingKind::Gem, "{what}");
            exponent.inspect(|got| assert_near(&format!("dL/dp, {what}"), got, &[wanted]));
        }
    }
}
