//! A process without file handles. A test binary of its own, since the limit is the whole process's.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::fs;

use ddtas_train::Error;
use ddtas_train::data::Split;

/// Sets the most file handles of this process, and returns the number before.
fn limit_handles(most: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a struct that lives through them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        let before = std::mem::replace(&mut limit.rlim_cur, most);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        before
    }
}

#[test]
fn a_picture_is_not_unreadable_because_there_is_no_file_handle() {
    let folder = tempfile::tempdir().unwrap();
    runs::folder_of_pictures(folder.path(), 1, 1);
    let file = folder.path().join("class00/0.png");
    assert!(fs::metadata(&file).is_ok());
    let split = Split::from_files(vec![("class00".into(), vec![file])], 0);
    let before = limit_handles(0);
    let picture = split.picture(0);
    limit_handles(before);
    let error = picture.unwrap_err();
    assert!(matches!(error, Error::Program(ddtas_io::Error::Io { .. })), "{error}");
    assert!(split.unreadable().is_empty());
    split.picture(0).unwrap();
}
