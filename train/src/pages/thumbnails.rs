//! Thumbnails for pages, as PNG in base64.

use std::io::Cursor;

use data_encoding::BASE64;
use image::{ImageFormat, RgbImage};

use crate::data::{Cropper, Preprocessing};
use crate::{Error, Result};

/// Makes thumbnails of one size.
pub(crate) struct Thumbnails {
    cropper: Cropper,
}

impl Thumbnails {
    /// Thumbnails of `side` x `side` pixels.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) for a side out of range.
    pub(crate) fn new(side: usize) -> Result<Self> {
        Ok(Self { cropper: Cropper::new(side, Preprocessing::default())? })
    }

    /// The thumbnail of a picture: the square in its middle, resized.
    ///
    /// # Errors
    /// [`Error::Dataset`] if the picture cannot be resized.
    pub(crate) fn of(&mut self, picture: &RgbImage) -> Result<RgbImage> {
        let bytes = self.cropper.thumbnail(picture)?;
        let side = self.cropper.size() as u32;
        Ok(RgbImage::from_raw(side, side, bytes).unwrap_or_else(|| RgbImage::new(side, side)))
    }
}

/// A picture as PNG in base64.
///
/// # Errors
/// [`Error::Image`] if it cannot be encoded.
pub(crate) fn base64(picture: &RgbImage) -> Result<String> {
    let png = encode(picture).map_err(|reason| Error::Image { path: "thumbnail".into(), reason })?;
    Ok(BASE64.encode(&png))
}

/// A picture as PNG.
pub(crate) fn encode(picture: &RgbImage) -> std::result::Result<Vec<u8>, String> {
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).map_err(|error| error.to_string())?;
    Ok(png.into_inner())
}
