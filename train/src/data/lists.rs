//! A split by lists of pictures: `train.txt`, and `test.txt` or `query.txt` and `gallery.txt`.
//!
//! A line holds a picture's path, absolute or relative to the list's folder, and its class, separated by a
//! tab, a comma or blanks. If there is no class, the name of the picture's folder is used. A line that as a
//! whole is the path of a file has no class. Empty lines, lines that begin with `#` and a byte order mark are skipped.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use ddtas_io::console::counted;

use super::files::{is_picture, name_of_bytes};
use super::folder::{Files, SplitFiles, SplitPaths};
use crate::{Error, Result};

/// What editors on Windows and spreadsheets begin a UTF-8 file with.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The split by the lists in `root`; none if there are no lists.
///
/// # Errors
/// [`Format`](ddtas_io::Error::Format) for a line without class, a picture that does not exist or is listed
/// twice, and a list with fewer than two classes.
pub(super) fn sides(root: &Path) -> Result<Option<SplitFiles>> {
    let list = |name: &str| Some(root.join(format!("{name}.txt"))).filter(|path| path.is_file());
    let Some(paths) = SplitPaths::of(list) else { return Ok(None) };
    paths.read(|list| classes(root, list)).map(Some)
}

fn classes(root: &Path, list: &Path) -> Result<Files> {
    let text = fs::read(list).map_err(Error::io("read", list))?;
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
    let (mut classes, mut listed) = (Files::new(), HashSet::new());
    for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let bad = |reason: String| Error::format(list, format!("line {}: {reason}", number + 1));
        // A path may contain a separator, so the whole line is tried first.
        let (mut path, mut class) = (root.join(name_of_bytes(line)), None);
        if !path.is_file() {
            let (name, named) = parts(line);
            (path, class) = (root.join(name_of_bytes(name)), named);
            if !path.is_file() {
                // A header, a third column or quotes leave something else than a picture's name before the last comma.
                let csv = line.contains(&b',') && !is_picture(&path)
                    || line.iter().any(|byte| b"\"\\".contains(byte));
                let advice = if csv {
                    "; a list is no CSV file: a line is a path with / and a class, without header, quotes or more columns"
                } else {
                    ""
                };
                return Err(bad(format!("there is no picture {}{advice}", path.display())));
            }
        }
        if !listed.insert(path.clone()) {
            return Err(bad(format!("names {} twice: as a query it would find itself", path.display())));
        }
        let folder = || path.parent().and_then(Path::file_name).map(OsString::from);
        let class = class.map(name_of_bytes).or_else(folder).ok_or_else(|| bad("names no class".into()))?;
        classes.entry(class).or_default().push(path);
    }
    if classes.len() < 2 {
        let count = counted(classes.len(), "class");
        return Err(Error::format(list, format!("names {count}: at least 2 are needed")));
    }
    Ok(classes)
}

/// Path and class of a line, split at the last tab, else at the last comma, else at the last blank.
fn parts(line: &[u8]) -> (&[u8], Option<&[u8]>) {
    let separators: [fn(u8) -> bool; 3] = [|byte| byte == b'\t', |byte| byte == b',', |byte| byte == b' '];
    for separates in separators {
        if let Some(place) = line.iter().rposition(|&byte| separates(byte)) {
            let (path, class) = (line[..place].trim_ascii(), line[place + 1..].trim_ascii());
            return (path, Some(class).filter(|class| !class.is_empty()));
        }
    }
    (line, None)
}
