//! NCCL: messages through the memory of this rank's GPU, with timeouts.
//!
//! If a rank has died, NCCL reports that seconds later or never, and waits forever. So the communicator is
//! non-blocking, and every wait ends with an error of NCCL, with a process found to have ended, or at a time
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

/// How long to wait actively before sleeping: a small message takes less time, a sleep more.
const AWAKE: Duration = Duration::from_millis(1);
/// Time between two checks of the other processes; an end is reported at the next one, when last messages have arrived.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time limit for closing a communicator.
const END: Duration = Duration::from_secs(10);

/// `ncclConfig_t` of NCCL 2.14, the first that need not block; later versions accept it and use defaults for newer fields.
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
    /// Whether the communicator is not complete yet, or an error has made it unusable.
    broken: bool,
}

/// Checks that driver and NCCL are installed and new enough: cudarc would panic without them or their symbols.
///
/// # Errors
/// [`ddtas::Error::Unavailable`].
pub(super) fn check_libraries() -> Result<()> {
    // SAFETY: loads and unloads the two libraries, whose initialisers have no precondition.
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

/// Makes NCCL's id, on rank 0; all ranks need it to join the same communicator.
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
    /// Joins the ranks of `meeting` in a communicator, with messages through GPU number `ordinal`.
    ///
    /// # Errors
    /// [`ddtas::Error::Unavailable`] without that GPU; [`Error::Lost`] if NCCL fails, or a rank does not join within `limit`.
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
        // SAFETY: the pointers outlive the call, the struct has the size that it states, and the GPU's context is current.
        let begun =
            unsafe { sys::ncclCommInitRankConfig(&raw mut joined.raw, size, id, rank as i32, config) };
        joined.accepted(begun)?;
        joined.settle()?;
        joined.broken = false;
        Ok(joined)
    }

    /// The bytes of all ranks, in their order; each rank has the same number.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn gather(&mut self, own: &[u8]) -> Result<Vec<u8>> {
        self.carry(own, own.len() * self.members.len(), |ends, comm| {
            // SAFETY: the buffers hold as many bytes as are sent and received.
            unsafe { sys::ncclAllGather(ends.from, ends.to, own.len(), ncclUint8, comm, ends.stream) }
        })
    }

    /// The message of rank `root`, `length` bytes long; `own` of the other ranks is not used.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn broadcast(&mut self, root: usize, own: &[u8], length: usize) -> Result<Vec<u8>> {
        let own = if self.rank == root { own } else { &[] };
        self.carry(own, length, |ends, comm| {
            // SAFETY: the root's buffer holds the message, and each rank's buffer has room for it.
            unsafe {
                let stream = ends.stream;
                sys::ncclBroadcast(ends.from, ends.to, length, ncclUint8, root as i32, comm, stream)
            }
        })
    }

    /// Sends each rank its part of `own`, and returns the parts that the ranks sent here, in their order.
    /// `parts` are the same on all ranks.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn exchange(&mut self, own: &[u8], parts: &[Range<usize>]) -> Result<Vec<u8>> {
        let length = parts[self.rank].len();
        self.carry(own, length * parts.len(), |ends, comm| {
            let Ends { from, to, stream } = *ends;
            let mut answers = Vec::with_capacity(2 * parts.len() + 2);
            // SAFETY: every part is within the bytes sent, and the receive buffer has room for a part of this
            // length from every rank.
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

    /// Copies `own` to the GPU, issues `call`, waits for it, and returns the first `count` bytes received.
    fn carry(
        &mut self,
        own: &[u8],
        count: usize,
        call: impl FnOnce(&Ends, sys::ncclComm_t) -> ncclResult_t,
    ) -> Result<Vec<u8>> {
        if self.broken {
            return Err(Error::Lost("NCCL was given up before".into()));
        }
        let carried = self.staging.upload(own, count).and_then(|ends| {
            self.carried(call(&ends, self.raw))?;
            self.staging.download(count)
        });
        self.broken = carried.is_err();
        carried
    }

    /// Waits until a call of NCCL that returned `asked` is done.
    fn carried(&self, asked: ncclResult_t) -> Result<()> {
        self.accepted(asked)?;
        // Before NCCL has issued its work to the stream, an event recorded there would not include it.
        self.settle()?;
        self.staging.mark()?;
        self.wait(|| self.staging.is_done())
    }

    /// Waits until NCCL has issued all calls.
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
                // Reported only at the second check: by then other processes may have ended for the same reason.
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

    /// [`Error::Lost`] unless `answer` is a success; names the ranks whose processes have ended, which it may take a moment to see.
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

    /// Completes pending messages and closes the communicator. Returns whether that succeeded in time.
    fn close(&mut self) -> bool {
        self.limit = END;
        // SAFETY: the communicator is complete, and not used afterwards.
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
            // SAFETY: dropped only here. If NCCL hangs, freeing its buffers would hang as well, so they are leaked.
            unsafe { ManuallyDrop::drop(&mut self.staging) };
        }
    }
}

/// Aborts a communicator. Returns whether that succeeded in time: NCCL's threads may hang if a rank is gone.
fn abort(communicator: sys::ncclComm_t) -> bool {
    let address = communicator.expose_provenance();
    let (done, over) = mpsc::channel();
    thread::spawn(move || {
        // SAFETY: nothing else uses the communicator any more; null is allowed.
        unsafe { sys::ncclCommAbort(std::ptr::with_exposed_provenance_mut(address)) };
        done.send(())
    });
    over.recv_timeout(END).is_ok()
}

/// Current state of a communicator.
fn state(communicator: sys::ncclComm_t) -> ncclResult_t {
    let mut state = ncclResult_t::ncclSuccess;
    // SAFETY: the communicator is live, and the call writes the state, which outlives it.
    let answer = unsafe { sys::ncclCommGetAsyncError(communicator, &raw mut state) };
    if good(answer) { state } else { answer }
}

fn good(answer: ncclResult_t) -> bool {
    matches!(answer, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress)
}

/// [`Error::Lost`] with NCCL's message unless `answer` is a success.
fn accepted(answer: ncclResult_t, communicator: sys::ncclComm_t) -> Result<()> {
    if good(answer) {
        return Ok(());
    }
    // SAFETY: both return a terminated string or null; the second accepts null.
    let words = unsafe { [sys::ncclGetErrorString(answer), sys::ncclGetLastError(communicator)] };
    let words = words.into_iter().filter(|words| !words.is_null()).map(|words| {
        // SAFETY: a terminated string of NCCL, copied before the next call may overwrite it.
        unsafe { CStr::from_ptr(words) }.to_string_lossy().trim().replace('\n', "; ")
    });
    let words: Vec<String> = words.filter(|words| !words.is_empty()).collect();
    let hint = match answer {
        ncclResult_t::ncclInvalidUsage => "; NCCL does not allow two ranks on one GPU",
        _ => "; NCCL_DEBUG=WARN says more",
    };
    Err(Error::Lost(format!("NCCL: {}{hint}", words.join(": "))))
}
