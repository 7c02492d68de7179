//! Pictures inside a page: thumbnails as PNG in base64.

use std::io::Cursor;

use image::{ImageFormat, RgbImage};

use crate::data::Cropper;
use crate::{Error, Result};

/// Makes thumbnails of one size.
pub(crate) struct Thumbnails {
    cropper: Cropper,
}

impl Thumbnails {
    /// Thumbnails of `side` x `side` pixels.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for a side out of range.
    pub(crate) fn new(side: usize) -> Result<Self> {
        Ok(Self { cropper: Cropper::new(side)? })
    }

    /// The middle of a picture as PNG, base64.
    ///
    /// # Errors
    /// [`Error::Dataset`] or [`Error::Image`] if it cannot be resized or encoded.
    pub(crate) fn png(&mut self, picture: &RgbImage) -> Result<String> {
        let bytes = self.cropper.thumbnail(picture)?;
        let side = self.cropper.size() as u32;
        let thumbnail = RgbImage::from_raw(side, side, bytes).unwrap_or_else(|| RgbImage::new(side, side));
        encode(&thumbnail)
            .map(|png| base64(&png))
            .map_err(|reason| Error::Image { path: "thumbnail".into(), reason })
    }
}

/// A picture as PNG.
pub(crate) fn encode(picture: &RgbImage) -> std::result::Result<Vec<u8>, String> {
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).map_err(|error| error.to_string())?;
    Ok(png.into_inner())
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// RFC 4648, padded: what a data URI holds.
fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// The converse of [`base64`]; `None` for anything that it does not write.
pub(super) fn decode_base64(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for chunk in text.trim_end_matches('=').as_bytes().chunks(4) {
        let mut bits = 0;
        for i in 0..4 {
            let digit =
                chunk.get(i).map_or(Some(0), |digit| ALPHABET.iter().position(|known| known == digit));
            bits = bits << 6 | digit? as u32;
        }
        let decoded = bits.to_be_bytes();
        bytes.extend(&decoded[1..chunk.len().max(1)]);
    }
    Some(bytes)
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
            assert_eq!(base64(plain.as_bytes()), coded);
            assert_eq!(decode_base64(coded).unwrap(), plain.as_bytes());
        }
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
        assert_eq!(decode_base64("Zm9"), None);
        assert_eq!(decode_base64("Zm9\u{7f}"), None);
    }
}
