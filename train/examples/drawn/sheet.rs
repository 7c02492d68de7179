//! PNG files of results: a column for each scene, named rows, and a key of the colours.

use std::io::Cursor;
use std::path::Path;

use ddtas_train::{Error, Result};
use image::{ImageFormat, Rgb, RgbImage, imageops};

use crate::lettering::{self, LETTER};
use crate::materials::Material;

/// Width of a row's name, and space between panels.
const NAME: u32 = 10 * LETTER;
const GAP: u32 = 6;
/// Height of the key, and width of an entry.
const KEY: u32 = 2 * LETTER;
const ENTRY: u32 = 12 * LETTER;

/// A picture of square panels.
pub struct Sheet {
    picture: RgbImage,
    side: u32,
}

impl Sheet {
    /// An empty sheet with a row for each name in `rows`, of `columns` panels of `side` pixels, and with the
    /// colours of `key` below.
    pub fn new(
        columns: usize,
        side: u32,
        rows: &[&str],
        key: impl Iterator<Item = (Material, [u8; 3])>,
    ) -> Self {
        let (right, bottom) = Self::corner(side, columns, rows.len());
        let mut picture = RgbImage::from_pixel(right.max(NAME + 6 * ENTRY), bottom + KEY, Rgb([255; 3]));
        for (row, name) in rows.iter().enumerate() {
            lettering::write(&mut picture, name, (GAP, Self::corner(side, 0, row).1 + (side - LETTER) / 2));
        }
        for (x, (material, colour)) in (NAME..).step_by(ENTRY as usize).zip(key) {
            let square = RgbImage::from_pixel(LETTER, LETTER, Rgb(colour));
            imageops::replace(&mut picture, &square, x.into(), bottom.into());
            let name = format!("{material:?}").to_lowercase();
            lettering::write(&mut picture, &name, (x + LETTER + LETTER / 2, bottom));
        }
        Self { picture, side }
    }

    /// Upper left corner of a panel.
    fn corner(side: u32, column: usize, row: usize) -> (u32, u32) {
        (NAME + column as u32 * (side + GAP), GAP + row as u32 * (side + GAP))
    }

    /// Puts a panel in its place.
    pub fn place(&mut self, column: usize, row: usize, panel: &RgbImage) {
        let (x, y) = Self::corner(self.side, column, row);
        imageops::replace(&mut self.picture, panel, x.into(), y.into());
    }

    /// Writes the picture.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut bytes = Cursor::new(Vec::new());
        self.picture
            .write_to(&mut bytes, ImageFormat::Png)
            .map_err(|error| Error::format(path, format!("the picture cannot be encoded: {error}")))?;
        Ok(ddtas_io::files::write_atomic(path, &bytes.into_inner())?)
    }
}
