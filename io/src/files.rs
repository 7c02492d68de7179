//! Atomic writing of files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Beginning and end of the names of temporary files.
const PARTIAL: [&str; 2] = [".ddtas-", ".partial"];

/// Most symbolic links that are followed, as many as Linux follows.
const LINKS: usize = 40;

/// Writes `bytes` to a new temporary file beside `path` and renames it: a full disk or a killed process
/// leaves the old file, or none, never half of one. A symbolic link stays and its target is replaced; a
/// device or a pipe is written to directly.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written, flushed or renamed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_together(&[(path, bytes)])
}

/// As [`write_atomic`] for files that belong together: all are written before the first is renamed. If a later rename fails,
/// the files before it are the new ones.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_together(files: &[(&Path, &[u8])]) -> Result<()> {
    let mut partials = Vec::new();
    let mut write = |path: &Path, bytes: &[u8]| {
        if is_special(path) {
            return OpenOptions::new().write(true).open(path)?.write_all(bytes);
        }
        let real = target(path);
        let (partial, mut file) = partial_beside(&real)?;
        partials.push((partial, real, path.to_path_buf()));
        file.write_all(bytes).and_then(|()| file.sync_all())
    };
    let written =
        files.iter().try_for_each(|(path, bytes)| write(path, bytes).map_err(Error::io("write", path)));
    let rename = |(partial, real, path): &(PathBuf, PathBuf, PathBuf)| {
        fs::rename(partial, real).map_err(Error::io("write", path))
    };
    written.and_then(|()| partials.iter().try_for_each(rename)).inspect_err(|_| {
        // Best effort: what is left of a failed write is of no use.
        partials.iter().for_each(|(partial, ..)| _ = fs::remove_file(partial));
    })
}

/// Serialises a path as text, also one that is not UTF-8.
///
/// # Errors
/// Errors of `serializer`.
pub fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// A new file that no other writer has, in the folder of `path`.
fn partial_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let [head, tail] = PARTIAL;
        let partial = path.with_file_name(format!("{head}{}-{number}{tail}", std::process::id()));
        match File::create_new(&partial) {
            // Left by an earlier process of the same id, or by another machine.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => return made.map(|file| (partial, file)),
        }
    }
}

/// Whether `path` has the name of a temporary file, which a process killed during a write leaves.
#[must_use]
pub fn is_partial(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with(PARTIAL[0]) && name.ends_with(PARTIAL[1])
}

/// Whether `path` is there and neither a file nor a folder.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Reads a file that a flag names.
///
/// # Errors
/// As [`check_regular`]; [`Error::Io`] if it cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    check_regular(path)?;
    fs::read(path).map_err(Error::io("read", path))
}

/// Refuses pipes, where reading may wait for ever, and devices, which may have no end.
///
/// # Errors
/// [`Error::Format`].
pub fn check_regular(path: &Path) -> Result<()> {
    if is_special(path) { Err(Error::format(path, "is a pipe or a device: give a file")) } else { Ok(()) }
}

/// Where `path` leads if it is a symbolic link, even to a file that is not there yet.
fn target(path: &Path) -> PathBuf {
    let mut path = path.to_path_buf();
    for _ in 0..LINKS {
        let Ok(link) = fs::read_link(&path) else { break };
        path = folder_of(&path).join(link);
    }
    path
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether the path ends in a file's name: `a/` and `a/.` do not, though [`Path::file_name`] finds `a`.
fn names_file(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    path.file_name().is_some_and(|name| bytes.ends_with(name.as_encoded_bytes()))
}

/// Checks that a result can be written to `path`, before the work that makes it. `name` is the setting.
///
/// # Errors
/// [`Error::Misused`] unless `path` is a file's name in a folder that is there and can be written to.
pub fn check_place(name: &'static str, path: &Path) -> Result<()> {
    if is_special(path) {
        return Ok(());
    }
    let real = target(path);
    if !names_file(path) || !names_file(&real) || !folder_of(&real).is_dir() || real.is_dir() {
        return Err(Error::misuse(name, path.display(), "must be a file in an existing folder"));
    }
    let looked_up = match fs::symlink_metadata(&real) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        // Such as a name that is too long.
        found => found.map(drop),
    };
    let made = looked_up.and_then(|()| partial_beside(&real));
    made.and_then(|(partial, _)| fs::remove_file(partial))
        .map_err(|error| Error::misuse(name, path.display(), format!("cannot be written: {error}")))
}

/// As [`check_place`]; also checks that `path` is none of `others`, the files that are read or written beside
/// it, each with its setting.
///
/// # Errors
/// As [`check_place`]; [`Error::Misused`] that names both settings.
pub fn check_output(
    name: &'static str,
    path: &Path,
    others: impl IntoIterator<Item = (&'static str, PathBuf)>,
) -> Result<()> {
    check_apart(name, path, others)?;
    check_place(name, path)
}

fn check_apart(
    name: &'static str,
    path: &Path,
    others: impl IntoIterator<Item = (&'static str, PathBuf)>,
) -> Result<()> {
    let own = canonical(path).filter(|_| !is_special(path));
    let same = |(_, other): &(_, PathBuf)| own.is_some() && canonical(other) == own;
    match others.into_iter().find(same) {
        Some((other, _)) => {
            Err(Error::misuse(name, path.display(), format!("is also the file of --{other}: give another")))
        }
        None => Ok(()),
    }
}

/// The canonical path of a file, which need not exist yet.
fn canonical(path: &Path) -> Option<PathBuf> {
    let real = target(path);
    Some(fs::canonicalize(folder_of(&real)).ok()?.join(real.file_name()?))
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt, symlink};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn writers_at_once_leave_one_whole_file_and_nothing_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("a"), folder.path().join("a.partial"));
        fs::write(&other, "the user's").unwrap();
        std::thread::scope(|scope| {
            for letter in [b'x', b'y', b'z'] {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write_atomic(path, &[letter; 100_000]).unwrap();
                        let read = fs::read(path).unwrap();
                        assert!(read.len() == 100_000 && read.iter().all(|&byte| byte == read[0]));
                    }
                });
            }
        });
        assert_eq!(fs::read(&other).unwrap(), b"the user's");
        assert_eq!(names(folder.path()), ["a", "a.partial"]);
    }

    #[test]
    fn of_files_that_belong_together_none_is_replaced_unless_all_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("none/b"));
        fs::write(&a, "old").unwrap();
        assert!(write_together(&[(&a, b"new"), (&b, b"new")]).is_err());
        assert_eq!(fs::read(&a).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn links_are_followed_and_devices_stay() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("inner")).unwrap();
        fs::write(at("inner/file"), "old").unwrap();
        symlink("inner/file", at("link")).unwrap();
        symlink("link", at("link of link")).unwrap();
        symlink("inner/new", at("dangling")).unwrap();
        symlink("/dev/null", at("null")).unwrap();
        for name in ["link of link", "dangling", "null"] {
            check_place("out", &at(name)).unwrap();
            write_atomic(&at(name), b"new").unwrap();
            assert!(at(name).is_symlink(), "{name}");
        }
        for name in ["inner/file", "inner/new"] {
            assert_eq!(fs::read(at(name)).unwrap(), b"new", "{name}");
        }
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        assert_eq!(names(&at("inner")), ["file", "new"]);
    }

    #[test]
    fn places_that_cannot_be_written_are_named_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x".repeat(255), "a".into()] {
            check_place("out", &folder.path().join(name)).unwrap();
        }
        let long = folder.path().join("x".repeat(256));
        for path in [
            Path::new("/proc/x.npy"),
            &long,
            &folder.path().join("none/a"),
            &folder.path().join("a/"),
            folder.path(),
        ] {
            let said = check_place("out", path).unwrap_err().to_string();
            assert!(said.starts_with(&format!("--out {}: ", path.display())), "{said}");
        }
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn an_output_is_no_input() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a"), "").unwrap();
        symlink("a", at("b")).unwrap();
        let said = check_apart("out", &at("b"), [("query", at("none")), ("checkpoint", at("./a"))]);
        let said = said.unwrap_err().to_string();
        assert!(said.ends_with("/b: is also the file of --checkpoint: give another"), "{said}");
        assert!(check_apart("plot", &at("new"), [("save-embeddings", at("./new"))]).is_err());
        check_apart("out", &at("c"), [("checkpoint", at("a"))]).unwrap();
        let null = Path::new("/dev/null");
        check_apart("out", null, [("embeddings", null.into())]).unwrap();
    }
}
