//! From a file to a picture.

use std::path::Path;

use image::{ImageReader, RgbImage, imageops};

/// A part of a picture in pixels: a bounding box of an annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelBox {
    /// Columns to the left of it.
    pub left: u32,
    /// Rows above it.
    pub top: u32,
    /// Columns in it, at least 1.
    pub width: u32,
    /// Rows in it, at least 1.
    pub height: u32,
}

/// Decodes by content, not by extension: data sets hold PNGs that are called .jpg.
pub(super) fn decode(path: &Path) -> Result<RgbImage, String> {
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let picture = reader.map_err(|e| e.to_string())?.decode().map_err(|e| e.to_string())?.into_rgb8();
    if picture.width() == 0 || picture.height() == 0 {
        return Err("it has no pixels".into());
    }
    Ok(picture)
}

/// What of `picture` lies in `area`; annotations may reach past the border, but not lie outside.
pub(super) fn cut(picture: &RgbImage, area: PixelBox) -> Result<RgbImage, String> {
    let width = picture.width().saturating_sub(area.left).min(area.width);
    let height = picture.height().saturating_sub(area.top).min(area.height);
    if width == 0 || height == 0 {
        return Err(format!(
            "its bounding box lies outside its {} x {} pixels",
            picture.width(),
            picture.height()
        ));
    }
    Ok(imageops::crop_imm(picture, area.left, area.top, width, height).to_image())
}
