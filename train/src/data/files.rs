//! Recognises picture files by their names, and reports the others.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use ddtas_io::console::counted;

/// Extensions of pictures; case is ignored.
const PICTURES: [&str; 9] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif"];

/// The formats, for messages about missing pictures.
pub(crate) const KINDS: &str = "JPEG, PNG, WebP, GIF, BMP or TIFF";

/// Whether the extension is that of a picture.
pub(crate) fn is_picture(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    PICTURES.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Whether a name begins with a dot.
pub(crate) fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// The last part of a path, as text.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A file name from bytes that need not be UTF-8.
pub(crate) fn name_of_bytes(bytes: &[u8]) -> OsString {
    #[cfg(unix)]
    return std::os::unix::ffi::OsStringExt::from_vec(bytes.to_vec());
    #[cfg(not(unix))]
    String::from_utf8_lossy(bytes).into_owned().into()
}

/// Numbers of files and folders that were ignored, by kind: what takes a plural s, and what follows it.
#[derive(Debug, Default)]
pub(crate) struct IgnoredFiles {
    kinds: BTreeMap<(&'static str, String), usize>,
}

impl IgnoredFiles {
    /// Counts a file that is not a picture, or a folder where pictures are expected.
    pub(crate) fn note(&mut self, path: &Path) {
        if path.is_dir() {
            self.count("folder", " within class folders");
        } else if path.exists() {
            match path.extension() {
                Some(extension) => {
                    self.count("", &format!(".{}", extension.to_string_lossy().to_lowercase()))
                }
                None => self.count("", "without extension"),
            }
        } else {
            self.count("broken link", "");
        }
    }

    /// Adds one to a kind.
    pub(crate) fn count(&mut self, noun: &'static str, rest: &str) {
        *self.kinds.entry((noun, rest.to_owned())).or_default() += 1;
    }

    /// `passed over, not read as pictures: 3 .heic, 1 .txt`, the most frequent first; none if nothing was counted.
    pub(crate) fn line(&self) -> Option<String> {
        let mut kinds: Vec<_> = self.kinds.iter().collect();
        kinds.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        let more = kinds.len().saturating_sub(8);
        let shown = |&(kind, count): &(&(&str, String), &usize)| match kind {
            ("", rest) => format!("{count} {rest}"),
            (noun, rest) => counted(*count, noun) + rest,
        };
        let mut named: Vec<_> = kinds.iter().take(8).map(shown).collect();
        named.extend((more > 0).then(|| counted(more, "other kind")));
        (!named.is_empty()).then(|| format!("passed over, not read as pictures: {}", named.join(", ")))
    }
}
