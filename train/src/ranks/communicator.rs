//! NCCL: messages through the memory of this rank's GPU, with timeouts.
//!
//! NCCL says nothing of a rank that has died, or only seconds later, and waits for ever. So the communicator is one
//! that never blocks, and every wait ends by an error of NCCL's, by a process that is seen to have ended, or by a time
//! limit.

use std::ffi::{CStr, c_char};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{self, ncclDataType_t::ncclUint8, ncclResult_t};

use super::rendezvous::{Meeting, Member};
use super::staging::{Ends, Staging, gpus};
use crate::{Error, Result};

/// A small message takes less, and a sleep more.
const AWAKE: Duration = Duration::from_millis(1);
/// Time between two looks at the other processes; what one that has ended has sent before has come by the next.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the end of a communicator may take.
const END: Duration = Duration::from_secs(10);

/// `ncclConfig_t` as NCCL 2.14 had it, the first that need not block; later ones take it and choose what is not in it.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
}

const CONFIG: Config = Config { size: 20, magic: 0xcafe_beef, version: 21_400, blocking: 0 };

/// This rank's end of NCCL's communicator.
pub(super) struct Communicator {
    raw: sys::ncclComm_t,
    rank: usize,
    members: Vec<Member>,
    limit: Duration,
    staging: ManuallyDrop<Staging>,
    /// Not whole yet, or not any more.
    broken: bool,
}

/// Whether driver and NCCL are here: cudarc panics where it does not find them, or what it looks for in them.
///
/// # Errors
/// [`ddtas::Error::Unavailable`].
pub(super) fn check_libraries() -> Result<()> {
    // SAFETY: loads and unloads the two libraries; their initialisers have no precondition.
    let (driver, nccl) =
        unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::nccl::sys::is_culib_present()) };
    let missing = match (driver, nccl) {
        (true, true) => {
            let mut version = 0;
            // SAFETY: the call writes the number, which outlives it.
            accepted(unsafe { sys::ncclGetVersion(&raw mut version) }, std::ptr::null_mut())?;
            if version >= CONFIG.version as i32 {
                return Ok(());
            }
            format!("NCCL is older than 2.14, which --ranks nccl needs: libnccl.so is version {version}")
        }
        (false, _) => {
            "no NVIDIA driver on this machine (libcuda was not found), and --ranks nccl communicates between GPUs".into()
        }
        (true, false) => "libnccl.so was not found: install NCCL (libnccl2 of NVIDIA's packages for Debian and Ubuntu, \
                          nvidia-nccl-cu13 of PyPI), and where that has libnccl.so.2 alone: ln -s libnccl.so.2 libnccl.so \
                          in its folder, and that folder in LD_LIBRARY_PATH"
            .into(),
    };
    Err(ddtas::Error::Unavailable(missing).into())
}

/// What rank 0 makes, and all need to join the same communicator.
///
/// # Errors
/// [`Error::Lost`] if NCCL finds no network.
pub(super) fn unique_id() -> Result<Vec<u8>> {
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: the call writes the id, which outlives it.
    accepted(unsafe { sys::ncclGetUniqueId(&raw mut id) }, std::ptr::null_mut())?;
    Ok(bytemuck::cast_slice::<c_char, u8>(&id.internal).to_vec())
}

impl Communicator {
    /// Joins the others of a `meeting` by messages through GPU number `ordinal`.
    ///
    /// # Errors
    /// [`ddtas::Error::Unavailable`] without that GPU; [`Error::Lost`] if NCCL refuses, or a rank does not come within `limit`.
    pub fn join(meeting: Meeting, rank: usize, ordinal: usize, limit: Duration) -> Result<Self> {
        let count = gpus()?;
        if ordinal >= count {
            return Err(ddtas::Error::Unavailable(format!(
                "rank {rank} needs GPU {ordinal} of {}, where it sees {count}: NCCL takes a GPU for each rank; start fewer there, or set LOCAL_RANK=0 where each process sees one of its own alone",
                meeting.members[rank].host
            ))
            .into());
        }
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut id.internal);
        if meeting.id.len() != bytes.len() {
            return Err(Error::Lost("rank 0 has written an id of another length than NCCL's".into()));
        }
        bytes.copy_from_slice(&meeting.id);
        let staging = ManuallyDrop::new(Staging::on(ordinal)?);
        let (size, members) = (meeting.members.len() as i32, meeting.members);
        let mut joined = Self { raw: std::ptr::null_mut(), rank, members, limit, staging, broken: true };
        let mut config = CONFIG;
        let config = (&raw mut config).cast();
        // SAFETY: what it points to outlives the call, the struct has the size that it says, and the GPU's context is current.
        let begun =
            unsafe { sys::ncclCommInitRankConfig(&raw mut joined.raw, size, id, rank as i32, config) };
        joined.accepted(begun)?;
        joined.settle()?;
        joined.broken = false;
        Ok(joined)
    }

    /// Every rank's bytes, in their order; as many of each.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn gather(&mut self, own: &[u8]) -> Result<Vec<u8>> {
        self.carry(own, own.len() * self.members.len(), |ends, comm| {
            // SAFETY: the buffers hold as many bytes as are sent and received.
            unsafe { sys::ncclAllGather(ends.from, ends.to, own.len(), ncclUint8, comm, ends.stream) }
        })
    }

    /// The message of rank `root`, `length` bytes long; the others' `own` are left unread.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn broadcast(&mut self, root: usize, own: &[u8], length: usize) -> Result<Vec<u8>> {
        let own = if self.rank == root { own } else { &[] };
        self.carry(own, length, |ends, comm| {
            // SAFETY: the root's buffer holds the message, and that of each has room for it.
            unsafe {
                let stream = ends.stream;
                sys::ncclBroadcast(ends.from, ends.to, length, ncclUint8, root as i32, comm, stream)
            }
        })
    }

    /// Sends each rank its part of `own`, and returns what each has sent here, in their order; parts have the same
    /// length on all ranks.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn exchange(&mut self, own: &[u8], parts: &[Range<usize>]) -> Result<Vec<u8>> {
        let length = parts[self.rank].len();
        self.carry(own, length * parts.len(), |ends, comm| {
            let Ends { from, to, stream } = *ends;
            let mut answers = Vec::with_capacity(2 * parts.len() + 2);
            // SAFETY: every part is within the bytes that are sent, and the room for what is received has all parts of
            // this length.
            unsafe {
                answers.push(sys::ncclGroupStart());
                for (rank, part) in parts.iter().enumerate() {
                    let (peer, from) = (rank as i32, from.byte_add(part.start));
                    answers.push(sys::ncclSend(from, part.len(), ncclUint8, peer, comm, stream));
                    let to = to.byte_add(rank * length);
                    answers.push(sys::ncclRecv(to, length, ncclUint8, peer, comm, stream));
                }
                answers.push(sys::ncclGroupEnd());
            }
            answers.into_iter().find(|answer| !good(*answer)).unwrap_or(ncclResult_t::ncclSuccess)
        })
    }

    /// Takes `own` to the GPU, does what `call` issues there, and returns the first `count` bytes that have come.
    fn carry(
        &mut self,
        own: &[u8],
        count: usize,
        call: impl FnOnce(&Ends, sys::ncclComm_t) -> ncclResult_t,
    ) -> Result<Vec<u8>> {
        if self.broken {
            return Err(Error::Lost("NCCL was given up before".into()));
        }
        let carried = self.staging.take(own, count).and_then(|ends| {
            self.carried(call(&ends, self.raw))?;
            self.staging.give(count)
        });
        self.broken = carried.is_err();
        carried
    }

    /// Waits until what NCCL was asked for, with this answer, is done.
    fn carried(&self, asked: ncclResult_t) -> Result<()> {
        self.accepted(asked)?;
        // What is not issued yet has no place in the stream, so that the event would be one of before.
        self.settle()?;
        self.staging.mark()?;
        self.wait(|| self.staging.is_done())
    }

    /// Waits until NCCL has issued what it was asked for.
    fn settle(&self) -> Result<()> {
        self.wait(|| Ok(state(self.raw) == ncclResult_t::ncclSuccess))
    }

    fn wait(&self, over: impl Fn() -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        let (mut looked, mut ended) = (begun, Vec::new());
        while !over()? {
            self.accepted(state(self.raw))?;
            if begun.elapsed() < AWAKE {
                thread::yield_now();
                continue;
            }
            thread::sleep(AWAKE / 5);
            if looked.elapsed() > LOOK_EVERY {
                looked = Instant::now();
                // By then others may have ended for the same reason.
                if !ended.is_empty() {
                    return Err(self.gone(&ended));
                }
                ended = self.ended();
            }
            if begun.elapsed() > self.limit {
                return Err(Error::Lost(format!(
                    "no message from the other ranks for {} s (--rank-timeout): one of them hangs, or its machine is gone",
                    self.limit.as_secs()
                )));
            }
        }
        Ok(())
    }

    /// The ranks whose processes have ended.
    fn ended(&self) -> Vec<usize> {
        let ended = |rank: &usize| self.members[*rank].has_ended(&self.members[self.rank]);
        (0..self.members.len()).filter(ended).collect()
    }

    fn gone(&self, ranks: &[usize]) -> Error {
        let name = |&rank: &usize| {
            let Member { process, host, .. } = &self.members[rank];
            format!("rank {rank} (process {process} of {host})")
        };
        let names: Vec<String> = ranks.iter().map(name).collect();
        Error::Lost(format!("ended without a word: {}", names.join(", ")))
    }

    /// [`Error::Lost`] unless the answer is good, of the ranks behind it if any have ended, which may take a moment to be seen.
    fn accepted(&self, answer: ncclResult_t) -> Result<()> {
        accepted(answer, self.raw).map_err(|error| match answer {
            ncclResult_t::ncclInvalidUsage | ncclResult_t::ncclInvalidArgument => error,
            _ => self.named(error),
        })
    }

    fn named(&self, error: Error) -> Error {
        let begun = Instant::now();
        loop {
            let ended = self.ended();
            if !ended.is_empty() {
                return self.gone(&ended);
            }
            if begun.elapsed() > LOOK_EVERY {
                return error;
            }
            thread::sleep(LOOK_EVERY / 10);
        }
    }

    /// Sends what is still on its way, and closes.
    fn close(&mut self) -> bool {
        self.limit = END;
        // SAFETY: it is whole, and not used after.
        let begun = unsafe { sys::ncclCommFinalize(self.raw) };
        let flushed = good(begun) && self.settle().is_ok();
        // SAFETY: as above.
        flushed && good(unsafe { sys::ncclCommDestroy(self.raw) })
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let whole = !self.broken && !thread::panicking();
        if (whole && self.close()) || abort(self.raw) {
            // SAFETY: dropped only here. Where NCCL is stuck, freeing what it uses would be stuck as well.
            unsafe { ManuallyDrop::drop(&mut self.staging) };
        }
    }
}

/// Whether what is on its way could be called off in time: NCCL's own threads may be stuck with a rank that is gone.
fn abort(communicator: sys::ncclComm_t) -> bool {
    let address = communicator.expose_provenance();
    let (done, over) = mpsc::channel();
    thread::spawn(move || {
        // SAFETY: nobody else uses it any more. Null is nothing to abort.
        unsafe { sys::ncclCommAbort(std::ptr::with_exposed_provenance_mut(address)) };
        done.send(())
    });
    over.recv_timeout(END).is_ok()
}

/// What NCCL says of a communicator now.
fn state(communicator: sys::ncclComm_t) -> ncclResult_t {
    let mut state = ncclResult_t::ncclSuccess;
    // SAFETY: the communicator is live, and the call writes the state, which outlives it.
    let answer = unsafe { sys::ncclCommGetAsyncError(communicator, &raw mut state) };
    if good(answer) { state } else { answer }
}

fn good(answer: ncclResult_t) -> bool {
    matches!(answer, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress)
}

/// [`Error::Lost`] with NCCL's words unless the answer is good.
fn accepted(answer: ncclResult_t, communicator: sys::ncclComm_t) -> Result<()> {
    if good(answer) {
        return Ok(());
    }
    // SAFETY: both answer with a string that ends, the second also for no communicator.
    let words = unsafe { [sys::ncclGetErrorString(answer), sys::ncclGetLastError(communicator)] };
    let words = words.into_iter().filter(|words| !words.is_null()).map(|words| {
        // SAFETY: a string of NCCL's, which it may overwrite in its next call.
        unsafe { CStr::from_ptr(words) }.to_string_lossy().trim().replace('\n', "; ")
    });
    let words: Vec<String> = words.filter(|words| !words.is_empty()).collect();
    let hint = match answer {
        ncclResult_t::ncclInvalidUsage => "; NCCL does not allow two ranks on one GPU",
        _ => "; NCCL_DEBUG=WARN says more",
    };
    Err(Error::Lost(format!("NCCL: {}{hint}", words.join(": "))))
}
