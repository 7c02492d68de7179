//! Ranks as threads of one process, for trials without MPI or NCCL, and for tests.

use std::cell::Cell;
use std::panic::resume_unwind;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::{Collective, Messages, share};
use crate::{Error, Result};

/// The message of a rank.
type Message = Arc<Vec<u8>>;

/// State shared by all ranks. In a meeting each rank deposits a message and receives those of all.
struct Group {
    state: Mutex<State>,
    /// Notifies of the end of a meeting, or of a rank's failure.
    changed: Condvar,
}

struct State {
    /// Number of meetings so far.
    meeting: u64,
    /// Messages deposited for the next meeting so far, by rank.
    deposited: Vec<Option<Message>>,
    /// Messages of the last meeting, by rank.
    last: Vec<Message>,
    /// The first rank that has failed, and its reason.
    failed: Option<(usize, String)>,
}

/// One rank.
struct Thread {
    group: Arc<Group>,
    rank: usize,
    size: usize,
    sent: Cell<u64>,
}

/// Runs `work` on `size` ranks, as threads that divide the processors evenly, and returns the result of rank 0.
///
/// # Errors
/// Errors of `work` on rank 0, which are [`Error::Rank`] if another rank has failed;
/// [`ddtas::Error::Unavailable`] if no thread can be started.
pub fn on_threads<T: Send>(size: usize, work: impl Fn(Rc<dyn Collective>) -> Result<T> + Sync) -> Result<T> {
    let state = State { meeting: 0, deposited: vec![None; size], last: Vec::new(), failed: None };
    let group = Arc::new(Group { state: Mutex::new(state), changed: Condvar::new() });
    let threads = (rayon::current_num_threads() / size.max(1)).max(1);
    let unavailable = |what: String| ddtas::Error::Unavailable(format!("cannot start a rank: {what}"));
    thread::scope(|scope| {
        let mut ranks = Vec::with_capacity(size);
        for rank in 0..size {
            let member = Thread { group: Arc::clone(&group), rank, size, sent: Cell::new(0) };
            // Each rank has its own pool, so that it never waits for work of another rank.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool = pool.map_err(|error| unavailable(error.to_string()))?;
            let work = &work;
            let started = thread::Builder::new()
                .name(format!("rank-{rank}"))
                .spawn_scoped(scope, move || pool.install(move || work(Rc::new(member))));
            ranks.push(started.map_err(|error| unavailable(error.to_string()))?);
        }
        let mut done = ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|panic| resume_unwind(panic)));
        let first = done.next().unwrap_or_else(|| Err(Error::setting("ranks", 0, "at least 1")));
        done.for_each(drop);
        first
    })
}

impl Group {
    /// Ignores poisoning: the state is consistent whenever the lock is released.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, rank: usize, reason: &str) {
        self.lock().failed.get_or_insert_with(|| (rank, reason.to_owned()));
        self.changed.notify_all();
    }
}

impl Thread {
    /// Deposits `own`, waits for all ranks, and returns their messages.
    fn meet(&self, own: Vec<u8>) -> Result<Vec<Message>> {
        let mut state = self.group.lock();
        let meeting = state.meeting;
        state.deposited[self.rank] = Some(Arc::new(own));
        if state.failed.is_none() && state.deposited.iter().all(Option::is_some) {
            state.last = state.deposited.iter_mut().filter_map(Option::take).collect();
            state.meeting += 1;
            self.group.changed.notify_all();
        }
        loop {
            if state.meeting > meeting {
                return Ok(state.last.clone());
            }
            if let Some((rank, reason)) = &state.failed {
                return Err(Error::Rank { rank: *rank, reason: reason.clone() });
            }
            state = self.group.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn count(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }
}

impl Collective for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> usize {
        self.rank
    }

    fn command(&self) -> String {
        format!("ddtas-train --ranks {}", self.size)
    }

    fn all_gather(&self, own: &[u8]) -> Result<Messages> {
        let messages = self.meet(own.to_vec())?;
        self.count(own.len() * (self.size - 1));
        let lengths = messages.iter().map(|message| message.len()).collect();
        Ok(Messages { bytes: messages.iter().flat_map(|message| message.iter().copied()).collect(), lengths })
    }

    fn exchange(&self, values: &[f32]) -> Result<Vec<f32>> {
        let own = share(values.len(), self.rank, self.size);
        let messages = self.meet(bytemuck::cast_slice(values).to_vec())?;
        self.count(size_of::<f32>() * (values.len() - own.len()));
        let bytes = own.start * size_of::<f32>()..own.end * size_of::<f32>();
        let part = |message: &Message| bytemuck::pod_collect_to_vec::<u8, f32>(&message[bytes.clone()]);
        Ok(messages.iter().flat_map(part).collect())
    }

    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>> {
        let own = if self.rank == 0 { message } else { Vec::new() };
        self.count(own.len() * (self.size - 1));
        Ok(self.meet(own)?[0].to_vec())
    }

    fn fail(&self, reason: &str) {
        self.group.fail(self.rank, reason);
    }

    fn sent(&self) -> u64 {
        self.sent.get()
    }
}

impl Drop for Thread {
    /// Reports a rank that has ended or panicked, since the others would wait for it forever.
    fn drop(&mut self) {
        self.group.fail(self.rank, "has ended before the others");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::{gather, together};
    use super::*;

    #[test]
    fn messages_come_in_the_order_of_ranks() {
        for size in 1..5 {
            let seen = on_threads(size, |ranks| {
                let own: Vec<u32> = vec![ranks.rank() as u32; ranks.rank()];
                let lengths: Vec<usize> =
                    ranks.all_gather(bytemuck::cast_slice(&own))?.iter().map(<[u8]>::len).collect();
                let first = ranks.broadcast(vec![ranks.rank() as u8 + 7])?;
                together(&ranks, || Ok((gather(&*ranks, &own)?, lengths, first)))
            });
            let (values, lengths, first) = seen.unwrap();
            let want: Vec<u32> = (0..size as u32).flat_map(|rank| vec![rank; rank as usize]).collect();
            assert_eq!(values, want);
            assert_eq!(lengths, (0..size).map(|rank| 4 * rank).collect::<Vec<_>>());
            assert_eq!(first, [7]);
        }
    }

    #[test]
    fn sums_are_those_of_rank_order_whatever_arrives_first() {
        // Values for which sums in single precision would depend on the order.
        let value = |rank: usize, i: usize| [1e8f32, 1.25, -1e8, 0.3][(rank + i) % 4];
        for size in 1..5 {
            for length in [0, 1, 3, 10] {
                let (sums, sent) = on_threads(size, |ranks| {
                    thread::sleep(std::time::Duration::from_millis(((size - ranks.rank()) * 2) as u64));
                    let mut values: Vec<f32> = (0..length).map(|i| value(ranks.rank(), i)).collect();
                    together(&ranks, || {
                        ranks.all_reduce(&mut values).map(|()| (values.clone(), ranks.sent()))
                    })
                })
                .unwrap();
                let want: Vec<f32> = (0..length)
                    .map(|i| (0..size).map(|rank| f64::from(value(rank, i))).sum::<f64>() as f32)
                    .collect();
                assert_eq!(sums, want, "{size} ranks, {length} values");
                let own = share(length, 0, size).len();
                assert_eq!(sent, 4 * ((length - own) + own * (size - 1)) as u64);
            }
        }
    }

    #[test]
    fn a_rank_that_fails_ends_the_others_with_its_reason() {
        let ended = AtomicUsize::new(0);
        let done: Result<()> = on_threads(3, |ranks| {
            let done = together(&ranks, || {
                ranks.barrier()?;
                if ranks.rank() == 2 {
                    return Err(Error::Dataset("no picture".into()));
                }
                loop {
                    ranks.barrier()?;
                }
            });
            ended.fetch_add(1, Ordering::Relaxed);
            done
        });
        assert_eq!(done.unwrap_err().to_string(), "rank 2: no picture");
        assert_eq!(ended.into_inner(), 3);
    }

    #[test]
    fn a_rank_that_panics_ends_the_others() {
        let done = std::panic::catch_unwind(|| {
            on_threads(2, |ranks| {
                assert!(ranks.rank() != 1, "planted");
                together(&ranks, || ranks.barrier())
            })
        });
        assert!(done.is_err());
    }
}
