//! Ranks as processes of any launcher, with messages between their GPUs by NCCL.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use super::communicator::{Communicator, check_libraries, unique_id};
use super::launcher::Launched;
use super::{Collective, Messages, rendezvous, share};
use crate::{Error, Result};

/// Sent in place of a message's length by a rank that has failed.
const FAILED: u64 = u64::MAX;

/// One of the processes that a launcher started.
///
/// Messages start and end in the host's memory; the GPUs only transfer bytes, sums are computed on the host.
/// Before every message the ranks exchange its length, or `FAILED`.
pub struct Nccl {
    communicator: RefCell<Communicator>,
    rank: usize,
    size: usize,
    local_rank: usize,
    local_size: usize,
    failed: Cell<bool>,
    sent: Cell<u64>,
}

impl Nccl {
    /// Joins the processes that were started together, which find each other through `file`. Each uses the
    /// GPU with its local rank as number. Waiting for another rank ends with an error after `limit`.
    ///
    /// # Errors
    /// [`Misused`](ddtas_io::Error::Misused) if the launcher's variables are invalid; [`ddtas::Error::Unavailable`] without
    /// driver, NCCL or GPU; [`Error::Lost`] if another rank does not come.
    pub fn join(file: &Path, limit: Duration) -> Result<Self> {
        let Launched { rank, size, local_rank } = Launched::read(|name| std::env::var(name).ok())?;
        check_libraries()?;
        let meeting = rendezvous::meet(file, (rank, size), limit, unique_id)?;
        let here = |ranks: Range<usize>| {
            let members = &meeting.members;
            members[ranks].iter().filter(|member| member.host == members[rank].host).count()
        };
        let (local_rank, local_size) = (local_rank.unwrap_or_else(|| here(0..rank)), here(0..size));
        let communicator = RefCell::new(Communicator::join(meeting, rank, local_rank, limit)?);
        let (failed, sent) = (Cell::new(false), Cell::new(0));
        Ok(Self { communicator, rank, size, local_rank, local_size, failed, sent })
    }

    /// Number of ranks on this machine.
    #[must_use]
    pub fn local_size(&self) -> usize {
        self.local_size
    }

    /// The lengths of all ranks' messages, or [`Error::Rank`] with the reason of the first rank that has failed.
    fn lengths(&self, own: u64, reason: &str) -> Result<Vec<usize>> {
        if self.failed.get() {
            return Err(Error::Rank { rank: self.rank, reason: reason.to_owned() });
        }
        let mut communicator = self.communicator.borrow_mut();
        let mut gather = |own: u64| communicator.gather(&own.to_ne_bytes());
        let lengths: Vec<u64> = bytemuck::pod_collect_to_vec(&gather(own)?);
        let Some(rank) = lengths.iter().position(|&length| length == FAILED) else {
            return Ok(lengths.into_iter().map(|length| length as usize).collect());
        };
        self.failed.set(true);
        let lengths: Vec<u64> = bytemuck::pod_collect_to_vec(&gather(reason.len() as u64)?);
        let reason = communicator.broadcast(rank, reason.as_bytes(), lengths[rank] as usize)?;
        Err(Error::Rank { rank, reason: String::from_utf8_lossy(&reason).into_owned() })
    }

    fn count(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> usize {
        self.local_rank
    }

    fn command(&self) -> String {
        format!("{} processes of ddtas-train --ranks nccl --rendezvous FILE", self.size)
    }

    fn all_gather(&self, own: &[u8]) -> Result<Messages> {
        let lengths = self.lengths(own.len() as u64, "")?;
        self.count(own.len() * (self.size - 1));
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut bytes = Vec::with_capacity(lengths.iter().sum());
        if longest > 0 {
            // Padded to the longest message. Most messages have equal lengths; others differ by little.
            let mut padded = own.to_vec();
            padded.resize(longest, 0);
            let all = self.communicator.borrow_mut().gather(&padded)?;
            for (message, &length) in all.chunks_exact(longest).zip(&lengths) {
                bytes.extend_from_slice(&message[..length]);
            }
        }
        Ok(Messages { bytes, lengths })
    }

    fn exchange(&self, values: &[f32]) -> Result<Vec<f32>> {
        self.lengths(values.len() as u64, "")?;
        if values.is_empty() {
            return Ok(Vec::new());
        }
        let own = share(values.len(), self.rank, self.size).len();
        self.count(size_of::<f32>() * (values.len() - own));
        let parts: Vec<Range<usize>> = (0..self.size)
            .map(|rank| share(values.len(), rank, self.size))
            .map(|part| size_of::<f32>() * part.start..size_of::<f32>() * part.end)
            .collect();
        let received = self.communicator.borrow_mut().exchange(bytemuck::cast_slice(values), &parts)?;
        Ok(bytemuck::pod_collect_to_vec(&received))
    }

    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>> {
        let length = self.lengths(message.len() as u64, "")?[0];
        if self.rank == 0 {
            self.count(length * (self.size - 1));
        }
        if length == 0 {
            return Ok(Vec::new());
        }
        self.communicator.borrow_mut().broadcast(0, &message, length)
    }

    fn fail(&self, reason: &str) {
        // The result is an error: this rank's reason, or that of a rank before it.
        let _ = self.lengths(FAILED, reason);
    }

    fn sent(&self) -> u64 {
        self.sent.get()
    }
}
