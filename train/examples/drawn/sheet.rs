//! Pictures of what was learned, as PNG files.

use std::io::Cursor;
use std::path::Path;

use ddtas_train::{Error, Result};
use image::{ImageFormat, RgbImage};

/// Writes a picture.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written.
pub fn write(path: &Path, sheet: &RgbImage) -> Result<()> {
    let mut bytes = Cursor::new(Vec::new());
    sheet
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|error| Error::format(path, format!("the picture cannot be encoded: {error}")))?;
    Ok(ddtas_io::files::write_atomic(path, &bytes.into_inner())?)
}
