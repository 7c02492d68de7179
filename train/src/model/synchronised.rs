//! Batch normalisation over all ranks: statistics of the whole batch, and the sums over it for the gradient.
//!
//! Burn has no notion of ranks, but calls a normalisation's backward pass on the thread that began it. So a
//! thread-local variable holds the ranks during a step ([`over`]).

use std::cell::RefCell;
use std::rc::Rc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{Tensor, TensorData, try_read_sync};

use crate::ranks::Collective;
use crate::{Error, Result};

/// The current step, if its normalisations are over all ranks.
struct Step {
    ranks: Rc<dyn Collective>,
    /// Number of messages so far, sent along to detect ranks that do different things.
    messages: u64,
    /// The first error; after it nothing is exchanged.
    failed: Option<Error>,
}

thread_local! {
    static STEP: RefCell<Option<Step>> = const { RefCell::new(None) };
}

/// Runs `work` with batch normalisation over the batch of all `ranks`. Each rank must do the same.
///
/// # Errors
/// Errors of the ranks and of `work`.
pub(crate) fn over<T>(ranks: &Rc<dyn Collective>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if ranks.size() == 1 {
        return work();
    }
    STEP.replace(Some(Step { ranks: Rc::clone(ranks), messages: 0, failed: None }));
    let done = work();
    match STEP.take().and_then(|step| step.failed) {
        Some(error) => Err(error),
        None => done,
    }
}

/// Statistics over all ranks (`[2, C]`: mean, biased variance) from this rank's, which are over `count`
/// values in each channel; and the number of values of all ranks.
pub(super) fn statistics(own: Tensor<2>, count: usize) -> (Tensor<2>, usize) {
    let [_, channels] = own.dims();
    let all = exchanged(count, || super::read(own.clone()));
    let Some(all) = all else { return (own, count) };
    let total: f64 = all.iter().map(|(count, _)| count).sum();
    let mean_of = |value: &dyn Fn(&[f32]) -> f64| {
        all.iter().map(|(count, values)| count * value(values)).sum::<f64>() / total
    };
    let means: Vec<f64> = (0..channels).map(|c| mean_of(&|values| f64::from(values[c]))).collect();
    let variances = (0..channels).map(|c| {
        mean_of(&|values| f64::from(values[channels + c]) + (f64::from(values[c]) - means[c]).powi(2))
    });
    let values: Vec<f32> = means.iter().copied().chain(variances).map(|value| value as f32).collect();
    (Tensor::from_data(TensorData::new(values, [2, channels]), &own.device()), total as usize)
}

/// Sums over all ranks from this rank's sums over `count` values in each channel, times `count` / (values of
/// all ranks): divided by `count`, they give the mean over all ranks.
pub(super) fn sums<B: Backend>(own: FloatTensor<B>, count: usize) -> FloatTensor<B> {
    let unread = |why: String| Error::Training(format!("a tensor cannot be read back: {why}"));
    let all = exchanged(count, || match try_read_sync(B::float_into_data(own.clone())) {
        Some(Ok(data)) => data.try_into_vec::<f32>().map_err(|error| unread(format!("{error:?}"))),
        Some(Err(error)) => Err(unread(error.to_string())),
        None => Err(unread("it would have to be waited for".into())),
    });
    let Some(all) = all else { return own };
    let total: f64 = all.iter().map(|(count, _)| count).sum();
    let shape = own.shape();
    let values = (0..shape.num_elements()).map(|i| {
        (all.iter().map(|(_, values)| f64::from(values[i])).sum::<f64>() * count as f64 / total) as f32
    });
    B::float_from_data(TensorData::new(values.collect::<Vec<_>>(), shape), &own.device())
}

/// Counts and values of all ranks; none outside [`over`] or after an error.
fn exchanged(count: usize, own: impl FnOnce() -> Result<Vec<f32>>) -> Option<Vec<(f64, Vec<f32>)>> {
    STEP.with_borrow_mut(|step| {
        let step = step.as_mut().filter(|step| step.failed.is_none())?;
        step.messages += 1;
        exchange(step, count, own).map_err(|error| step.failed = Some(error)).ok()
    })
}

fn exchange(
    step: &Step,
    count: usize,
    own: impl FnOnce() -> Result<Vec<f32>>,
) -> Result<Vec<(f64, Vec<f32>)>> {
    let head = [step.messages, count as u64];
    let mut message = bytemuck::bytes_of(&head).to_vec();
    message.extend_from_slice(bytemuck::cast_slice(&own()?));
    let mut found = Vec::new();
    for other in step.ranks.all_gather(&message)?.iter() {
        let (start, values) = other.split_at_checked(size_of_val(&head)).unwrap_or_default();
        let [number, count] = bytemuck::try_pod_read_unaligned(start).unwrap_or([0; 2]);
        if number != step.messages || other.len() != message.len() {
            return Err(Error::Training(
                "ranks normalise different layers: all need the same program and settings".into(),
            ));
        }
        found.push((count as f64, bytemuck::pod_collect_to_vec(values)));
    }
    Ok(found)
}
