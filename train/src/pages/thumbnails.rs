//! Thumbnails for pages, as PNG in base64.

use std::io::Cursor;

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
    Ok(text(&png))
}

/// A picture as PNG.
pub(crate) fn encode(picture: &RgbImage) -> std::result::Result<Vec<u8>, String> {
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).map_err(|error| error.to_string())?;
    Ok(png.into_inner())
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 of RFC 4648 with padding, for a data URI.
fn text(bytes: &[u8]) -> String {
    let mut coded = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * i)) as usize & 63];
            coded.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    coded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_rfc_4648() {
        let vectors = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ];
        for (plain, coded) in vectors {
            assert_eq!(text(plain.as_bytes()), coded);
        }
        assert_eq!(text(&[0xfb, 0xff]), "+/8=");
    }
}
