//! Ranks: processes or threads that train one network together, and their messages.
//!
//! | file | what |
//! | --- | --- |
//! | `one.rs` | a single process |
//! | `threads.rs` | threads of one process |
//! | `mpi.rs` | processes that `mpirun` or `srun` started |
//! | `nccl.rs` | processes that any launcher started, with messages between their GPUs |
//! | `launcher.rs` | the rank of a process, from a launcher's environment variables |
//! | `rendezvous.rs` | how these processes find each other |
//! | `communicator.rs` | NCCL, with timeouts |
//! | `staging.rs` | buffers for messages in the memory of a GPU |
//!
//! Every rank makes the same calls in the same order. A rank that fails sends the reason in place of its next
//! message ([`together`]), and the others end with that reason.

#[cfg(feature = "nccl")]
mod communicator;
#[cfg(any(feature = "nccl", test))]
mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod one;
#[cfg(any(feature = "nccl", all(test, target_os = "linux")))]
mod rendezvous;
#[cfg(feature = "nccl")]
mod staging;
mod threads;

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use bytemuck::Pod;
use ndarray::Array2;

use crate::arguments::quoted;
use crate::{Error, Result};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use one::One;
pub use threads::on_threads;

/// Collective communication of ranks.
pub trait Collective {
    /// This rank's number, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// This rank's number among those on its machine.
    fn local_rank(&self) -> usize;

    /// The messages of all ranks, in their order; lengths may differ.
    ///
    /// # Errors
    /// [`Error::Rank`] if another rank has failed.
    fn all_gather(&self, own: &[u8]) -> Result<Messages>;

    /// Divides `values`, of the same length on every rank, into one share for each rank ([`share`]), and
    /// sends each rank its share. Returns the shares that this rank receives, in the order of ranks.
    ///
    /// # Errors
    /// As [`all_gather`](Collective::all_gather).
    fn exchange(&self, values: &[f32]) -> Result<Vec<f32>>;

    /// The message of rank 0; those of other ranks are ignored.
    ///
    /// # Errors
    /// As [`all_gather`](Collective::all_gather).
    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>>;

    /// Tells the other ranks, in place of the next message, that this rank has failed.
    fn fail(&self, reason: &str);

    /// Bytes that this rank has sent so far; a message counts once for every rank that receives it.
    fn sent(&self) -> u64;

    /// The command that starts as many ranks as these were started, without the settings of a run.
    fn command(&self) -> String {
        "ddtas-train".to_owned()
    }

    /// The command that resumes the run in `folder` on as many ranks.
    fn to_resume(&self, folder: &Path) -> String {
        format!("{} --resume {}", self.command(), quoted(folder))
    }

    /// Replaces `values` by their sum over all ranks, added in the order of ranks and in double precision:
    /// the same bits on every rank, and in every run with as many ranks. Each rank adds one share, and so
    /// sends `2 (size - 1) / size` times the values, as in a ring.
    ///
    /// # Errors
    /// As [`all_gather`](Collective::all_gather).
    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let received = self.exchange(values)?;
        let own = share(values.len(), self.rank(), self.size()).len();
        let mut sums = vec![0.0f64; own];
        for part in received.chunks_exact(own.max(1)) {
            sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        values.copy_from_slice(&gather(self, &sums)?);
        Ok(())
    }

    /// Waits until every rank has made this call.
    ///
    /// # Errors
    /// As [`all_gather`](Collective::all_gather).
    fn barrier(&self) -> Result<()> {
        self.all_gather(&[]).map(|_| ())
    }
}

/// The messages of all ranks, concatenated.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Messages {
    bytes: Vec<u8>,
    lengths: Vec<usize>,
}

impl Messages {
    /// The message of each rank.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.bytes.as_slice();
        self.lengths.iter().map(move |&length| rest.split_off(..length).unwrap_or_default())
    }

    /// The values in all messages.
    #[must_use]
    pub fn values<T: Pod>(&self) -> Vec<T> {
        bytemuck::pod_collect_to_vec(&self.bytes)
    }
}

/// The contiguous part of `total` items that belongs to `rank` of `size` ranks; parts differ in length by at most 1.
#[must_use]
pub fn share(total: usize, rank: usize, size: usize) -> Range<usize> {
    let start = |rank: usize| total / size * rank + (total % size).min(rank);
    start(rank)..start(rank + 1)
}

/// The values of all ranks, in their order.
///
/// # Errors
/// As [`Collective::all_gather`].
pub fn gather<T: Pod>(ranks: &(impl Collective + ?Sized), own: &[T]) -> Result<Vec<T>> {
    Ok(ranks.all_gather(bytemuck::cast_slice(own))?.values())
}

/// The rows of all ranks, in their order.
///
/// # Errors
/// As [`Collective::all_gather`].
pub fn gather_rows(ranks: &dyn Collective, own: Array2<f32>) -> Result<Array2<f32>> {
    if ranks.size() == 1 {
        return Ok(own);
    }
    let columns = own.ncols();
    let values: Vec<f32> = gather(ranks, &own.into_iter().collect::<Vec<_>>())?;
    Array2::from_shape_vec((values.len() / columns.max(1), columns), values)
        .map_err(|error| Error::Training(format!("the rows of two ranks differ in shape: {error}")))
}

/// Whether `here` is true on any rank.
///
/// # Errors
/// As [`Collective::all_gather`].
pub fn any(ranks: &dyn Collective, here: bool) -> Result<bool> {
    if ranks.size() == 1 {
        return Ok(here);
    }
    Ok(gather(ranks, &[u8::from(here)])?.contains(&1))
}

/// Runs `work` on each rank and waits for all of them; an error on one rank ends the others, too.
///
/// # Errors
/// Errors of `work`; [`Error::Rank`] if another rank has failed.
pub fn together<T>(ranks: &Rc<dyn Collective>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = work().and_then(|value| ranks.barrier().map(|()| value));
    if let Err(error) = &done
        && !matches!(error, Error::Rank { .. })
    {
        ranks.fail(&error.to_string());
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_lose_nothing_and_double_nothing() {
        for total in [0, 1, 2, 7, 80, 81] {
            for size in 1..9 {
                let shares: Vec<_> = (0..size).map(|rank| share(total, rank, size)).collect();
                let all: Vec<usize> = shares.iter().cloned().flatten().collect();
                assert_eq!(all, (0..total).collect::<Vec<_>>());
                let lengths = shares.iter().map(Range::len);
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
            }
        }
    }
}
