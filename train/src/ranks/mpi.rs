//! Ranks as processes started by `mpirun` or `srun`.

use std::cell::Cell;

use mpi::Threading;
use mpi::collective::CommunicatorCollectives;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::Root;

use super::{Collective, Messages, share};
use crate::{Error, Result};

/// Sent in place of a message's length by a rank that has failed.
const FAILED: u64 = u64::MAX;

/// One of MPI's processes.
///
/// Before every message the ranks exchange its length, or `FAILED`.
pub struct Mpi {
    /// Finalises MPI when dropped.
    _universe: Universe,
    world: SimpleCommunicator,
    local_rank: usize,
    local_size: usize,
    failed: Cell<bool>,
    sent: Cell<u64>,
}

impl Mpi {
    /// Joins the processes that were started together. Only the calling thread may use the result.
    ///
    /// # Errors
    /// [`ddtas::Error::Unavailable`] if MPI does not start, or has been started before.
    pub fn join() -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or_else(|| ddtas::Error::Unavailable("MPI was started before in this process".into()))?;
        let world = universe.world();
        let local = world.split_shared(world.rank());
        let (local_rank, local_size) = (local.rank() as usize, local.size() as usize);
        let (failed, sent) = (Cell::new(false), Cell::new(0));
        Ok(Self { _universe: universe, world, local_rank, local_size, failed, sent })
    }

    /// Number of ranks on this machine.
    #[must_use]
    pub fn local_size(&self) -> usize {
        self.local_size
    }

    /// The lengths of all ranks' messages, or [`Error::Rank`] with the reason of the first rank that has failed.
    fn lengths(&self, own: u64, reason: &str) -> Result<Vec<u64>> {
        if self.failed.get() {
            return Err(Error::Rank { rank: self.rank(), reason: reason.to_owned() });
        }
        let mut lengths = vec![0u64; self.size()];
        self.world.all_gather_into(&own, &mut lengths[..]);
        let Some(rank) = lengths.iter().position(|&length| length == FAILED) else { return Ok(lengths) };
        self.failed.set(true);
        let mut reason = reason.as_bytes().to_vec();
        self.broadcast_from(rank, &mut reason);
        Err(Error::Rank { rank, reason: String::from_utf8_lossy(&reason).into_owned() })
    }

    fn broadcast_from(&self, root: usize, message: &mut Vec<u8>) {
        let root = self.world.process_at_rank(root as i32);
        let mut length = message.len() as u64;
        root.broadcast_into(&mut length);
        message.resize(length as usize, 0);
        if length > 0 {
            root.broadcast_into(&mut message[..]);
        }
    }

    fn count(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn local_rank(&self) -> usize {
        self.local_rank
    }

    fn command(&self) -> String {
        format!("mpirun -n {} --bind-to none ddtas-train --ranks mpi", self.size())
    }

    fn all_gather(&self, own: &[u8]) -> Result<Messages> {
        let lengths = self.lengths(own.len() as u64, "")?;
        self.count(own.len() * (self.size() - 1));
        let counts = lengths.iter().map(|&length| counted(length)).collect::<Result<Vec<i32>>>()?;
        let mut bytes = vec![0u8; lengths.iter().sum::<u64>() as usize];
        counted(bytes.len() as u64)?;
        if bytes.is_empty() {
            return Ok(Messages { bytes, lengths: vec![0; self.size()] });
        }
        // The address of an empty Rust slice can be the value that Open MPI takes as MPI_IN_PLACE.
        let own = if own.is_empty() { &[0][..0] } else { own };
        let starts = starts(&counts);
        self.world.all_gather_varcount_into(own, &mut PartitionMut::new(&mut bytes[..], counts, starts));
        Ok(Messages { bytes, lengths: lengths.into_iter().map(|length| length as usize).collect() })
    }

    fn exchange(&self, values: &[f32]) -> Result<Vec<f32>> {
        self.lengths(values.len() as u64, "")?;
        counted(values.len() as u64)?;
        let size = self.size();
        let own = share(values.len(), self.rank(), size).len();
        self.count(size_of::<f32>() * (values.len() - own));
        let to: Vec<i32> = (0..size).map(|rank| share(values.len(), rank, size).len() as i32).collect();
        let from = vec![own as i32; size];
        let mut received = vec![0.0f32; own * size];
        let (to_starts, from_starts) = (starts(&to), starts(&from));
        self.world.all_to_all_varcount_into(
            &mpi::datatype::Partition::new(values, to, to_starts),
            &mut PartitionMut::new(&mut received[..], from, from_starts),
        );
        Ok(received)
    }

    fn broadcast(&self, mut message: Vec<u8>) -> Result<Vec<u8>> {
        if self.rank() == 0 {
            counted(message.len() as u64)?;
            self.count(message.len() * (self.size() - 1));
        }
        self.lengths(message.len() as u64, "")?;
        self.broadcast_from(0, &mut message);
        Ok(message)
    }

    fn fail(&self, reason: &str) {
        // The result is an error: this rank's reason, or that of a rank before it.
        let _ = self.lengths(FAILED, reason);
    }

    fn sent(&self) -> u64 {
        self.sent.get()
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // Finalising MPI would wait for all ranks, and they for the next message of this one.
        if std::thread::panicking() {
            self.world.abort(1);
        }
    }
}

/// A length in MPI's type.
fn counted(length: u64) -> Result<i32> {
    i32::try_from(length).map_err(|_| {
        let reason =
            format!("a message of {length} entries is longer than MPI carries: give a smaller batch");
        Error::misuse("images-per-class", "", reason)
    })
}

fn starts(counts: &[i32]) -> Vec<i32> {
    let next = |end: &mut i32, &count: &i32| Some(std::mem::replace(end, *end + count));
    counts.iter().scan(0, next).collect()
}
