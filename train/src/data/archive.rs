//! Unpacks a data set's archive, as it was downloaded, once, into a folder beside it.
//!
//! `NAME.unpacked` is complete or absent: members are written to `NAME.unpacking`, which is renamed at the end. The archive
//! stays locked meanwhile: a second program waits, and whoever holds the lock may delete the `NAME.unpacking` of a killed
//! program. A stamp file in the folder records the archive that it was made from.

use std::cell::Cell;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use flate2::read::MultiGzDecoder;
use tar::EntryType;
use zip::ZipArchive;

use crate::{Error, Result};

/// How the caller stops the unpacking and hears of its progress.
pub(super) struct Unpacking<'a> {
    /// Ends the unpacking once it is set.
    pub stop: &'a AtomicBool,
    /// Is given one line before anything that takes long.
    pub tell: &'a mut dyn FnMut(&str),
}

/// File in an unpacked folder that records the archive's size and time (`stamp`).
const STAMP: &str = ".ddtas-unpacked";

/// Beyond these an archive is refused as a decompression bomb. The largest of the four data sets has 3 GB in 120,000 files.
#[derive(Debug, Clone, Copy)]
struct Limits {
    bytes: u64,
    members: usize,
}

const LIMITS: Limits = Limits { bytes: 64 << 30, members: 2_000_000 };

/// An archive of n bytes may unpack to EXPANSION n + SLACK bytes.
const EXPANSION: u64 = 20;
const SLACK: u64 = 64 << 20;

/// Time between two attempts to take a lock that another program holds.
const LOCK_EVERY: Duration = Duration::from_millis(50);

/// Bytes counted for each file and folder, besides its contents.
const BLOCK: u64 = 4096;

/// Bytes of headers that may be read between two files of a .tar: the `tar` crate keeps long names there in memory.
const BETWEEN: u64 = 1 << 20;

/// Whether `path` has the name of an archive that [`unpack`] reads.
pub(super) fn is_archive(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    [".tgz", ".tar.gz", ".tar", ".zip"].iter().any(|ending| name.ends_with(ending))
}

/// The folder with the contents of `archive`, a .tgz, .tar or .zip by its first bytes; unpacks it first if necessary.
///
/// # Errors
/// [`Format`](ddtas_io::Error::Format) for an archive that is damaged, encrypted, or holds links or paths that lead out of it;
/// [`Io`](ddtas_io::Error::Io), for example if the disk is full; [`Error::Stopped`]. What was unpacked is then removed.
pub(super) fn unpack(archive: &Path, unpacking: &mut Unpacking<'_>) -> Result<PathBuf> {
    let length = fs::metadata(archive).map_err(Error::io("read", archive))?.len();
    let bytes = LIMITS.bytes.min(length.saturating_mul(EXPANSION).saturating_add(SLACK));
    unpack_within(archive, Limits { bytes, ..LIMITS }, unpacking)
}

fn unpack_within(archive: &Path, limits: Limits, unpacking: &mut Unpacking<'_>) -> Result<PathBuf> {
    let Unpacking { stop, tell } = unpacking;
    let mut file = File::open(archive).map_err(Error::io("read", archive))?;
    let (target, partial) = (with_ending(archive, ".unpacked"), with_ending(archive, ".unpacking"));
    let stamp = stamp(archive, &file)?;
    if is_current(&target, &stamp)? {
        return Ok(target);
    }
    let waiting = format!("waiting for another program that unpacks {}", archive.display());
    let mut told = false;
    // Polls, since a blocking lock would not notice `stop`. Some file systems have no locks: the loop then
    // ends at once, and two programs must not be started at the same time.
    while let Err(TryLockError::WouldBlock) = file.try_lock() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped(waiting));
        }
        if !std::mem::replace(&mut told, true) {
            tell(&waiting);
        }
        std::thread::sleep(LOCK_EVERY);
    }
    if is_current(&target, &stamp)? {
        return Ok(target);
    }
    tell(&format!("unpacking {} into {}, once", archive.display(), target.display()));
    for stale in [&partial, &target] {
        remove(stale)?;
    }
    let unpacked =
        Archive { path: archive, into: &partial, limits, members: 0, bytes: 0, stop }.run(&mut file);
    let finished = unpacked.and_then(|()| {
        let path = partial.join(STAMP);
        fs::write(&path, &stamp).map_err(Error::io("write", &path))?;
        fs::rename(&partial, &target).map_err(Error::io("write", &target))
    });
    if finished.is_err() {
        // Best effort: the next call removes it, too.
        let _ = fs::remove_dir_all(&partial);
    }
    finished.map(|()| target)
}

/// Appends `ending`, as in `a.tgz.unpacked`: `a.tgz` and `a.zip` get different folders.
fn with_ending(archive: &Path, ending: &str) -> PathBuf {
    let mut name = archive.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    archive.with_file_name(name)
}

/// Size and modification time of an archive: another version of the archive has another stamp.
fn stamp(archive: &Path, file: &File) -> Result<String> {
    let about = file.metadata().map_err(Error::io("read", archive))?;
    let modified =
        about.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok(format!("{} bytes, modified {}.{:09}\n", about.len(), modified.as_secs(), modified.subsec_nanos()))
}

/// Whether `target` was unpacked from the archive of this `stamp`; an error if it exists and has no stamp file.
fn is_current(target: &Path, stamp: &str) -> Result<bool> {
    match fs::read_to_string(target.join(STAMP)) {
        Ok(found) => Ok(found == stamp),
        Err(_) if !target.exists() => Ok(false),
        Err(_) => {
            let advice = "is where the archive is to be unpacked, and was not made by ddtas: give it as --data-root, or move it away";
            Err(Error::format(target, advice))
        }
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// An archive that is being unpacked into the folder `into`; `members` and `bytes` count what has been unpacked.
struct Archive<'a> {
    path: &'a Path,
    stop: &'a AtomicBool,
    into: &'a Path,
    limits: Limits,
    members: usize,
    bytes: u64,
}

impl Archive<'_> {
    fn run(mut self, file: &mut File) -> Result<()> {
        fs::create_dir(self.into).map_err(Error::io("create", self.into))?;
        let mut start = [0; 4];
        let got = file.read(&mut start).map_err(Error::io("read", self.path))?;
        file.seek(SeekFrom::Start(0)).map_err(Error::io("read", self.path))?;
        let buffered = io::BufReader::with_capacity(1 << 18, file);
        match &start[..got] {
            [0x1f, 0x8b, ..] => self.tar(MultiGzDecoder::new(buffered)),
            [b'P', b'K', ..] => self.zip(buffered),
            _ => self.tar(buffered),
        }
    }

    fn tar(&mut self, reader: impl Read) -> Result<()> {
        let left = Cell::new(BETWEEN);
        let mut tar = tar::Archive::new(Metered { reader, left: &left });
        for entry in tar.entries().map_err(|error| self.damaged(&error))? {
            let mut entry = entry.map_err(|error| self.damaged(&error))?;
            let name = entry.path().map_err(|error| self.damaged(&error))?.into_owned();
            match entry.header().entry_type() {
                EntryType::Directory => self.folder(&name)?,
                EntryType::Regular | EntryType::Continuous => {
                    // A file's contents are not kept in memory; `count` limits them.
                    left.set(u64::MAX);
                    self.file(&name, &mut entry)?;
                }
                EntryType::XGlobalHeader => {}
                other => return Err(self.refused(&name, &format!("is not a plain file ({other:?})"))),
            }
            left.set(BETWEEN);
        }
        if self.members == 0 {
            return Err(Error::format(
                self.path,
                "holds no file: it is not a .tgz, .tar or .zip with a data set",
            ));
        }
        Ok(())
    }

    fn zip(&mut self, reader: impl Read + Seek) -> Result<()> {
        let mut zip = ZipArchive::new(reader).map_err(|error| self.damaged(&error))?;
        for index in 0..zip.len() {
            let mut member = zip.by_index(index).map_err(|error| self.damaged(&error))?;
            let name = PathBuf::from(member.name().map_err(|error| self.damaged(&error))?.into_owned());
            if member.unix_mode().is_some_and(|mode| mode & 0o170_000 == 0o120_000) {
                return Err(self.refused(&name, "is a link"));
            }
            if member.is_dir() {
                self.folder(&name)?;
            } else {
                self.file(&name, &mut member)?;
            }
        }
        Ok(())
    }

    fn folder(&mut self, name: &Path) -> Result<()> {
        let path = self.place(name)?;
        fs::create_dir_all(&path).map_err(Error::io("create", path))
    }

    fn file(&mut self, name: &Path, reader: &mut dyn Read) -> Result<()> {
        let path = self.place(name)?;
        if path == self.into {
            return Err(self.refused(name, "has no name"));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        // Links are refused, so there is none in this folder that the path could follow.
        let mut file = File::create(&path).map_err(Error::io("write", &path))?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.damaged(&error)),
            };
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped(format!(
                    "unpacking {}, of which nothing is left",
                    self.path.display()
                )));
            }
            self.count(count as u64)?;
            file.write_all(&buffer[..count]).map_err(Error::io("write", &path))?;
        }
    }

    /// Adds to the bytes on disk; an error once they exceed the limit.
    fn count(&mut self, bytes: u64) -> Result<()> {
        self.bytes += bytes;
        if self.bytes > self.limits.bytes {
            let most = self.limits.bytes;
            let reason = format!(
                "unpacks to more than {most} bytes, too much for pictures: unpack it yourself if that is right"
            );
            return Err(Error::format(self.path, reason));
        }
        Ok(())
    }

    /// The path that a member is unpacked to; an error if it is outside the folder.
    fn place(&mut self, name: &Path) -> Result<PathBuf> {
        self.members += 1;
        if self.members > self.limits.members {
            return Err(Error::format(self.path, format!("holds more than {} members", self.limits.members)));
        }
        let mut path = self.into.to_path_buf();
        for part in name.components() {
            self.count(BLOCK)?;
            match part {
                // A backslash separates folders on Windows only; names that contain one are refused everywhere.
                Component::Normal(part) if !part.to_string_lossy().contains('\\') => path.push(part),
                Component::CurDir => {}
                _ => return Err(self.refused(name, "leads out of the folder it is unpacked into")),
            }
        }
        Ok(path)
    }

    fn refused(&self, member: &Path, why: &str) -> Error {
        Error::format(self.path, format!("refused, its member {:?} {why}", member.display().to_string()))
    }

    fn damaged(&self, error: &dyn std::fmt::Display) -> Error {
        Error::format(
            self.path,
            format!("cannot be unpacked ({error}): download it again, or unpack it by hand"),
        )
    }
}

/// A reader that fails once it has returned more than `left` bytes.
struct Metered<'a, R> {
    reader: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        let left = self.left.get().checked_sub(count as u64);
        self.left.set(left.ok_or_else(|| io::Error::other(format!("a name of more than {BETWEEN} bytes")))?);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(archive: &Path, tell: &mut dyn FnMut(&str)) -> Result<PathBuf> {
        super::unpack(archive, &mut Unpacking { stop: &AtomicBool::new(false), tell })
    }

    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            // Written directly, since the crate's own method refuses such names.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            tar.append(&header, *bytes).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn refusal(bytes: &[u8], limits: Limits) -> String {
        let place = tempfile::tempdir().unwrap();
        let inner = place.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let archive = inner.join("set.tar");
        fs::write(&archive, bytes).unwrap();
        let error = unpack_within(
            &archive,
            limits,
            &mut Unpacking { stop: &AtomicBool::new(false), tell: &mut |_| () },
        )
        .unwrap_err()
        .to_string();
        let left = |folder: &Path| fs::read_dir(folder).unwrap().count();
        assert_eq!((left(&inner), left(place.path())), (1, 1), "something was left behind: {error}");
        error
    }

    #[test]
    fn members_that_lead_out_are_refused_and_nothing_stays() {
        for name in ["../escape", "/tmp/escape", "a/../../escape", "a\\..\\escape", ".."] {
            let error = refusal(&tar_of(&[("a/fine", b"x"), (name, b"y")]), LIMITS);
            assert!(error.contains("leads out") || error.contains("has no name"), "{name}: {error}");
        }
        let mut tar = tar::Builder::new(Vec::new());
        for kind in [EntryType::Symlink, EntryType::Link, EntryType::Fifo] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            tar.append_link(&mut header, "link", "/etc/passwd").unwrap();
            let error = refusal(tar.get_ref(), LIMITS);
            assert!(error.contains("is not a plain file"), "{error}");
            tar = tar::Builder::new(Vec::new());
        }
    }

    #[test]
    fn zip_archives_are_held_to_the_same() {
        use std::io::Write;
        use zip::{ZipWriter, write::SimpleFileOptions};

        let zip_of = |name: &str, link: bool| {
            let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
            let options = SimpleFileOptions::default().unix_permissions(0o644);
            zip.start_file("a/fine", options).unwrap();
            zip.write_all(&[7; 5000]).unwrap();
            match link {
                true => zip.add_symlink(name, "/etc/passwd", options).unwrap(),
                false => zip.start_file(name, options).unwrap(),
            }
            zip.finish().unwrap().into_inner()
        };
        for name in ["../escape", "/tmp/escape", "a\\..\\escape"] {
            assert!(refusal(&zip_of(name, false), LIMITS).contains("leads out"), "{name}");
        }
        assert!(refusal(&zip_of("link", true), LIMITS).contains("is a link"));
        assert!(
            refusal(&zip_of("b", false), Limits { bytes: 4999, ..LIMITS }).contains("more than 4999 bytes")
        );
        let whole = zip_of("b", false);
        for at in [38, 45] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            assert!(refusal(&damaged, LIMITS).contains("cannot be unpacked"), "byte {at}");
        }
        assert!(refusal(&whole[..whole.len() - 30], LIMITS).contains("cannot be unpacked"));
    }

    #[test]
    fn bombs_are_refused() {
        let tar = tar_of(&[("a", &[0; 5000]), ("b", &[0; 5000])]);
        assert!(refusal(&tar, Limits { bytes: 9999, ..LIMITS }).contains("more than 9999 bytes"));
        // Empty files and folders count as one block each.
        let tar = tar_of(&[("a/b/c", &[]), ("a/b/d", &[])]);
        assert!(refusal(&tar, Limits { bytes: 20_000, ..LIMITS }).contains("more than 20000 bytes"));
        assert!(refusal(&tar, Limits { members: 1, ..LIMITS }).contains("more than 1 members"));

        // The crate reads a long name into memory before this module sees the entry.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(2 * BETWEEN);
        header.set_cksum();
        let name = vec![b'a'; 2 * BETWEEN as usize];
        let long = [header.as_bytes(), &name[..], &tar_of(&[("a", b"x")])].concat();
        assert!(refusal(&long, LIMITS).contains("a name of more than 1048576 bytes"));

        // 100 MB of zeros compress to 100 KB.
        let mut deflated = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        deflated.write_all(&tar_of(&[("a", &vec![0; 100 << 20])])).unwrap();
        let place = tempfile::tempdir().unwrap();
        let archive = place.path().join("set.tgz");
        fs::write(&archive, deflated.finish().unwrap()).unwrap();
        let said = unpack(&archive, &mut |_| ()).unwrap_err().to_string();
        assert!(said.contains("set.tgz: unpacks to more than 6") && said.contains(" bytes"), "{said}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_program_that_waits_for_another_can_be_stopped() {
        let place = tempfile::tempdir().unwrap();
        let archive = place.path().join("set.tar");
        fs::write(&archive, tar_of(&[("a", b"x")])).unwrap();
        let other = File::open(&archive).unwrap();
        other.lock().unwrap();
        let stop = AtomicBool::new(false);
        let mut told = Vec::new();
        let mut tell = |line: &str| {
            told.push(line.to_owned());
            stop.store(true, Ordering::Relaxed);
        };
        let stopped = super::unpack(&archive, &mut Unpacking { stop: &stop, tell: &mut tell });
        let said = stopped.unwrap_err().to_string();
        assert!(said.starts_with("stopped while waiting for another program that unpacks "), "{said}");
        assert_eq!((told.len(), fs::read_dir(place.path()).unwrap().count()), (1, 1), "{told:?}");
    }

    #[test]
    fn what_a_killed_program_left_is_replaced_and_a_new_archive_unpacked_anew() {
        let place = tempfile::tempdir().unwrap();
        let archive = place.path().join("set.tar");
        fs::write(&archive, tar_of(&[("a", b"first")])).unwrap();
        let partial = place.path().join("set.tar.unpacking");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("half"), "of it").unwrap();

        let mut told = 0;
        let folder = unpack(&archive, &mut |_| told += 1).unwrap();
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"first");
        assert!(!folder.join("half").exists() && !partial.exists());
        assert_eq!(unpack(&archive, &mut |_| told += 1).unwrap(), folder);
        assert_eq!(told, 1, "the second time there is nothing to do");

        fs::write(&archive, tar_of(&[("b", b"another one")])).unwrap();
        unpack(&archive, &mut |_| ()).unwrap();
        assert!(folder.join("b").exists() && !folder.join("a").exists());

        fs::remove_file(folder.join(STAMP)).unwrap();
        assert!(unpack(&archive, &mut |_| ()).unwrap_err().to_string().contains("was not made by ddtas"));
        assert!(folder.join("b").exists(), "what is not ours is left alone");
    }

    #[test]
    fn two_programs_at_once_unpack_once() {
        let place = tempfile::tempdir().unwrap();
        let archive = place.path().join("set.tar");
        let files: Vec<(String, Vec<u8>)> =
            (0..200).map(|i| (format!("f{i}"), vec![i as u8; 2000])).collect();
        let borrowed: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&**name, &**bytes)).collect();
        fs::write(&archive, tar_of(&borrowed)).unwrap();
        let unpacked = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut tell = |line: &str| {
                        unpacked.fetch_add(
                            usize::from(line.starts_with("unpacking")),
                            std::sync::atomic::Ordering::Relaxed,
                        );
                    };
                    let folder = unpack(&archive, &mut tell).unwrap();
                    assert_eq!(fs::read_dir(folder).unwrap().count(), 201);
                });
            }
        });
        assert_eq!(unpacked.into_inner(), 1);
    }
}
