//! A meta objective without a threshold: whether the nearest neighbour is of the right class.
//!
//! The soft contrastive loss falls when lambda and all similarities rise together, up to a collapse of all embeddings to one
//! point, and no threshold of the meta loss prevents a learned lambda from causing that. So this objective is invariant to
//! shift and scale: it subtracts the embeddings' mean and divides by their spread. Then it is neighbourhood components
//! analysis: minus the log of the right class's share among a row's soft neighbours.

use ndarray::{Array2, ArrayView2, Axis};

/// Temperature of the softmax over neighbours, in squared spreads.
const TEMPERATURE: f64 = 0.1;

/// Spread below which the rows count as equal, and the objective as 0.
const LEAST_SPREAD: f64 = 1e-6;

/// The objective on embeddings `[B, D]` with `labels`, and its gradient, `[B, D]`: the mean over the rows
/// that have another row of their class, or 0 if there are none. Rows with a negative label are ignored.
#[must_use]
pub fn neighbours(embeddings: ArrayView2<'_, f64>, labels: &[i64]) -> (f64, Array2<f64>) {
    let none = || (0.0, Array2::zeros(embeddings.dim()));
    let Some(mean) = embeddings.mean_axis(Axis(0)) else { return none() };
    let centred = &embeddings - &mean;
    let rows = centred.nrows();
    let spread = (centred.iter().map(|x| x * x).sum::<f64>() / rows as f64).sqrt();
    if spread < LEAST_SPREAD {
        return none();
    }
    let scaled = &centred / spread;
    let mut weights = scaled.dot(&scaled.t());
    let (mut loss, mut asking) = (0.0, 0);
    for (i, mut row) in weights.outer_iter_mut().enumerate() {
        let counts = |j: usize| j != i && labels[j] >= 0;
        let right = |j: usize| counts(j) && labels[j] == labels[i];
        if labels[i] < 0 || !(0..rows).any(right) {
            row.fill(0.0);
            continue;
        }
        let most = (0..rows).filter(|&j| counts(j)).fold(f64::NEG_INFINITY, |most, j| row[j].max(most));
        row.indexed_iter_mut().for_each(|(j, s)| {
            *s = if counts(j) { ((*s - most) / TEMPERATURE).exp() } else { 0.0 };
        });
        let all = row.sum();
        let own: f64 = (0..rows).filter(|&j| right(j)).map(|j| row[j]).sum();
        loss -= (own / all).max(f64::MIN_POSITIVE).ln();
        asking += 1;
        // d/ds of -log(own / all).
        row.indexed_iter_mut().for_each(|(j, s)| {
            let of_own = if right(j) { *s / own.max(f64::MIN_POSITIVE) } else { 0.0 };
            *s = (*s / all - of_own) / TEMPERATURE;
        });
    }
    if asking == 0 {
        return none();
    }
    let share = 1.0 / f64::from(asking);
    let mut gradient = (&weights + &weights.t()).dot(&scaled) * share;
    // The derivatives of dividing by the spread and of subtracting the mean.
    let along = (&gradient * &scaled).sum() / rows as f64;
    gradient = (gradient - &scaled * along) / spread;
    let Some(mean) = gradient.mean_axis(Axis(0)) else { return none() };
    (loss * share, gradient - mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn rows() -> (Array2<f64>, Vec<i64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        (Array2::from_shape_fn((9, 5), |_| rng.random_range(-1.0..1.0)), vec![0, 0, 0, 1, 1, 2, -1, 2, 3])
    }

    #[test]
    fn gradient_is_the_derivative() {
        let (mut rows, labels) = rows();
        let (_, gradient) = neighbours(rows.view(), &labels);
        let h = 1e-5;
        for (at, want) in gradient.indexed_iter() {
            let value = rows[at];
            let mut loss = |moved| {
                rows[at] = moved;
                neighbours(rows.view(), &labels).0
            };
            let found = (loss(value + h) - loss(value - h)) / (2.0 * h);
            rows[at] = value;
            assert!((found - want).abs() < 1e-6, "{at:?}: {want} is not {found}");
        }
    }

    #[test]
    fn neither_scale_nor_place_matters() {
        let (rows, labels) = rows();
        let moved = rows.mapv(|x| 0.01 * x + 3.0);
        let (here, there) = (neighbours(rows.view(), &labels).0, neighbours(moved.view(), &labels).0);
        assert!(here > 0.1 && (here - there).abs() < 1e-9, "{here} {there}");
    }

    #[test]
    fn nobody_to_ask_for_is_zero() {
        let (rows, _) = rows();
        for labels in [[0, 1, 2, 3, 4, 5, 6, 7, 8], [-1; 9]] {
            let (loss, gradient) = neighbours(rows.view(), &labels);
            assert!(loss == 0.0 && gradient.iter().all(|&g| g == 0.0));
        }
        assert_eq!(neighbours(Array2::ones((9, 2)).view(), &[0; 9]).0, 0.0);
        assert_eq!(neighbours(Array2::zeros((0, 2)).view(), &[]).0, 0.0);
    }
}
