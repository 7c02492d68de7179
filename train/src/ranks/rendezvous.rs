//! How processes find each other through a file that all can access.
//!
//! Rank r writes its entry `FILE.r`, which identifies the process uniquely ([`Member`]). Rank 0 removes files
//! of earlier runs, reads the entries, and writes FILE with NCCL's id and all entries. Another rank accepts
//! FILE if it contains its own entry, and then removes `FILE.r`; if rank 0 has removed `FILE.r` as an old
//! one, the rank writes it again. When all entries are gone, rank 0 removes FILE. So no rank accepts a file
//! of an earlier run. Simultaneous runs need different files.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ddtas_io::files::{check_place, write_atomic};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Time between two reads of the files, which may be on another machine.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A process of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Member {
    /// The number of ranks that this process was started with.
    size: usize,
    /// Name of its machine.
    pub host: String,
    /// Its process-id namespace: containers on one machine have different ones.
    namespace: PathBuf,
    pub process: u32,
    /// Time of its arrival in nanoseconds, since a later process may have the same process id.
    came: u64,
}

impl Member {
    /// # Errors
    /// [`Error::io`] if host name or namespace cannot be read.
    fn this(size: usize) -> Result<Self> {
        let (name, namespace) = ("/proc/sys/kernel/hostname", "/proc/self/ns/pid");
        let host = fs::read_to_string(name).map_err(Error::io("read", name))?.trim().to_owned();
        let namespace = fs::read_link(namespace).map_err(Error::io("read", namespace))?;
        let came = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        Ok(Self { size, host, namespace, process: std::process::id(), came })
    }

    /// Whether the process has ended. `false` if that is unknown, as from another machine or namespace (`seen_from`).
    pub fn has_ended(&self, seen_from: &Self) -> bool {
        if (&self.host, &self.namespace) != (&seen_from.host, &seen_from.namespace) {
            return false;
        }
        match fs::read_to_string(format!("/proc/{}/stat", self.process)) {
            // The state follows the name, which ends with the last parenthesis. Z is a zombie, X a dead process.
            Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }
}

/// Contents of FILE.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meeting {
    /// NCCL's id, from rank 0.
    pub id: Vec<u8>,
    /// All ranks' entries, in their order.
    pub members: Vec<Member>,
}

/// Meets the other ranks through `file`; `id` is called on rank 0.
///
/// # Errors
/// [`Error::Lost`] if a rank does not come within `limit`; an error if `file` cannot be written or is an unrelated file.
pub(super) fn meet(
    file: &Path,
    (rank, size): (usize, usize),
    limit: Duration,
    id: impl FnOnce() -> Result<Vec<u8>>,
) -> Result<Meeting> {
    check_place("rendezvous", file)?;
    let own = Member::this(size)?;
    if rank == 0 { lead(file, own, limit, id) } else { join(file, rank, own, limit) }
}

/// What rank 0 does.
fn lead(file: &Path, own: Member, limit: Duration, id: impl FnOnce() -> Result<Vec<u8>>) -> Result<Meeting> {
    let size = own.size;
    let entries: Vec<PathBuf> = (1..size).map(|rank| entry(file, rank)).collect();
    // Only rendezvous files are removed; reading another file is an error.
    if read::<Meeting>(file)?.is_some() {
        remove(file)?;
    }
    for entry in &entries {
        if read::<Member>(entry)?.is_some() {
            remove(entry)?;
        }
    }
    let mut found = vec![None; entries.len()];
    let all = until(limit, || {
        for (found, entry) in found.iter_mut().zip(&entries).filter(|(found, _)| found.is_none()) {
            *found = read::<Member>(entry)?;
        }
        Ok(found.iter().all(Option::is_some))
    })?;
    if !all {
        let missing = (1..size).filter(|rank| found[rank - 1].is_none());
        return Err(absent(missing, file, limit));
    }
    let members: Vec<Member> = std::iter::once(own).chain(found.into_iter().flatten()).collect();
    if let Some(rank) = members.iter().position(|member| member.size != size) {
        let other = members[rank].size;
        return Err(Error::Training(format!(
            "rank {rank} was told of {other} ranks, and rank 0 of {size}: all need the same WORLD_SIZE"
        )));
    }
    let meeting = Meeting { id: id()?, members };
    write(file, &meeting)?;
    let taken = until(limit, || Ok(!entries.iter().any(|entry| entry.exists())))?;
    remove(file)?;
    let late = (1..size).filter(|rank| entries[rank - 1].exists());
    if taken { Ok(meeting) } else { Err(absent(late, file, limit)) }
}

/// What the other ranks do.
fn join(file: &Path, rank: usize, own: Member, limit: Duration) -> Result<Meeting> {
    let entry = entry(file, rank);
    let mut meeting = None;
    until(limit, || {
        meeting = read::<Meeting>(file)?.filter(|meeting| meeting.members.get(rank) == Some(&own));
        if meeting.is_none() && read::<Member>(&entry)?.as_ref() != Some(&own) {
            write(&entry, &own)?;
        }
        Ok(meeting.is_some())
    })?;
    remove(&entry)?;
    meeting.ok_or_else(|| absent(std::iter::once(0), file, limit))
}

fn entry(file: &Path, rank: usize) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{rank}"));
    name.into()
}

fn absent(ranks: impl Iterator<Item = usize>, file: &Path, limit: Duration) -> Error {
    let ranks: Vec<String> = ranks.map(|rank| rank.to_string()).collect();
    let many = if ranks.len() > 1 { "ranks" } else { "rank" };
    Error::Lost(format!(
        "{many} {} did not come to --rendezvous {} within {} s (--rank-timeout): start all ranks with the same file, on a disk that all see",
        ranks.join(", "),
        file.display(),
        limit.as_secs()
    ))
}

/// Polls until `is` returns true; returns false after `limit`.
fn until(limit: Duration, mut is: impl FnMut() -> Result<bool>) -> Result<bool> {
    let begun = Instant::now();
    loop {
        if is()? {
            return Ok(true);
        }
        if begun.elapsed() > limit {
            return Ok(false);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|_| {
            Error::format(path, "is not a rendezvous file of ddtas-train: name another file by --rendezvous")
        }),
        // NFS reports a file that was replaced while open as stale.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::StaleNetworkFileHandle) => {
            Ok(None)
        }
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(value).map_err(|error| Error::io("write", path)(error.into()))?;
    Ok(write_atomic(path, &bytes)?)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Runs the rendezvous of all ranks, with rank `last` started some time after the others.
    fn all(file: &Path, size: usize, last: usize) -> Vec<Meeting> {
        thread::scope(|scope| {
            let start = |rank| {
                scope.spawn(move || {
                    if rank == last {
                        thread::sleep(Duration::from_millis(120));
                    }
                    meet(file, (rank, size), LIMIT, || Ok(vec![7; 128])).unwrap()
                })
            };
            let started: Vec<_> = (0..size).map(start).collect();
            started.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_meet_whoever_comes_last_and_whatever_is_left_of_others() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("id");
        let old = Member { came: 1, process: 1, ..Member::this(3).unwrap() };
        for size in [1, 3] {
            for last in 0..size {
                write(&file, &Meeting { id: vec![0; 128], members: vec![old.clone(); 3] }).unwrap();
                for rank in 1..size {
                    write(&entry(&file, rank), &old).unwrap();
                }
                let meetings = all(&file, size, last);
                assert!(meetings.iter().all(|meeting| *meeting == meetings[0]), "{meetings:?}");
                assert_eq!((&meetings[0].id, meetings[0].members.len()), (&vec![7; 128], size));
                assert!(!meetings[0].members.contains(&old));
                assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "something is left");
            }
        }
    }

    #[test]
    fn whoever_does_not_come_is_named() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("id");
        let limit = Duration::from_millis(1);
        let alone = |rank, size| meet(&file, (rank, size), limit, || Ok(Vec::new())).unwrap_err().to_string();
        assert!(alone(0, 3).starts_with("ranks 1, 2 did not come to --rendezvous "), "{}", alone(0, 3));
        assert!(alone(1, 3).starts_with("rank 0 did not come to --rendezvous "), "{}", alone(1, 3));
        thread::scope(|scope| {
            let other = scope.spawn(|| meet(&file, (1, 3), Duration::from_secs(5), || Ok(Vec::new())));
            let said = meet(&file, (0, 2), LIMIT, || Ok(Vec::new())).unwrap_err().to_string();
            assert_eq!(said, "rank 1 was told of 3 ranks, and rank 0 of 2: all need the same WORLD_SIZE");
            assert!(other.join().unwrap().is_err());
        });
    }

    #[test]
    fn a_file_of_another_kind_stays() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("notes");
        for path in [file.clone(), entry(&file, 1)] {
            fs::write(&path, "mine").unwrap();
            let said = meet(&file, (0, 2), LIMIT, || Ok(Vec::new())).unwrap_err().to_string();
            assert!(said.contains("name another file by --rendezvous"), "{said}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
            fs::remove_file(&path).unwrap();
        }
        let nowhere = place.path().join("nowhere/id");
        let said = meet(&nowhere, (0, 2), LIMIT, || Ok(Vec::new())).unwrap_err().to_string();
        assert!(said.starts_with("--rendezvous "), "{said}");
    }

    #[test]
    fn a_process_that_has_ended_is_seen_from_its_own_machine() {
        let this = Member::this(1).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let member = Member { process: child.id(), ..this.clone() };
        assert!(!this.has_ended(&this) && !member.has_ended(&this));
        child.kill().unwrap();
        let ended = |member: &Member| until(LIMIT, || Ok(member.has_ended(&this))).unwrap();
        assert!(ended(&member), "its exit code has not been asked for");
        child.wait().unwrap();
        assert!(member.has_ended(&this));
        assert!(!Member { host: "another".into(), ..member }.has_ended(&this));
    }
}
