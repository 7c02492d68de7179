//! Test pictures and their nearest neighbours, right and wrong marked.

use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use crate::backend::Nearest;
use crate::data::{Cropper, Split};
use crate::{Error, Result};

/// Side of a thumbnail in pixels.
const THUMBNAIL: usize = 96;
/// Width of the frame that says right or wrong.
const FRAME: u32 = 5;
const GAP: u32 = 8;
pub(super) const RIGHT: [u8; 3] = [34, 160, 84];
pub(super) const WRONG: [u8; 3] = [214, 58, 58];

/// A test picture and what was found for it, nearest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// Name of its class.
    pub class: String,
    /// The picture as PNG, base64.
    pub png: String,
    /// What was found.
    pub answers: Vec<Answer>,
}

/// A neighbour of a [`Query`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of its class.
    pub class: String,
    /// Whether that is the query's class.
    pub right: bool,
    /// Cosine similarity to the query.
    pub similarity: f32,
    /// The picture as PNG, base64.
    pub png: String,
}

/// `count` queries with their first `depth` neighbours, at even distances through the split:
/// chosen before the answers are known.
///
/// `rows[i]` is the index in `split` of the picture behind row `i` of `nearest`; `searched` is the same for
/// the indices in `nearest`: another split where the set has a gallery.
///
/// # Errors
/// [`Error::LengthMismatch`] if `rows` and `nearest` differ in length; [`Error::Image`] if a
/// picture can no longer be read.
pub fn queries(
    (split, rows): (&Split, &[usize]),
    (gallery, gallery_rows): (&Split, &[usize]),
    nearest: &Nearest,
    count: usize,
    depth: usize,
) -> Result<Vec<Query>> {
    if rows.len() != nearest.indices.nrows() {
        let (expected, got) = (nearest.indices.nrows(), rows.len());
        return Err(Error::LengthMismatch { what: "pictures of the neighbour lists", expected, got });
    }
    let mut cropper = Cropper::new(THUMBNAIL)?;
    let mut thumbnail = |split: &Split, index: usize| -> Result<String> {
        let bytes = cropper.thumbnail(&*split.picture(index)?)?;
        let side = THUMBNAIL as u32;
        let picture = RgbImage::from_raw(side, side, bytes).unwrap_or_else(|| RgbImage::new(side, side));
        encode(&picture)
            .map(|png| base64(&png))
            .map_err(|reason| Error::Image { path: "thumbnail".into(), reason })
    };
    let count = count.min(rows.len());
    let mut queries = Vec::with_capacity(count);
    for i in 0..count {
        // The middle of each of `count` equal stretches.
        let row = (2 * i + 1) * rows.len() / (2 * count);
        let (index, class) = (rows[row], split.class_name(rows[row]));
        let mut answers = Vec::with_capacity(depth);
        for (&found, &similarity) in
            nearest.indices.row(row).iter().zip(nearest.similarities.row(row)).take(depth)
        {
            if found == Nearest::NONE {
                break;
            }
            let answer = gallery_rows[found as usize];
            answers.push(Answer {
                class: gallery.class_name(answer).to_string(),
                right: gallery.labels()[answer] == split.labels()[index],
                similarity,
                png: thumbnail(gallery, answer)?,
            });
        }
        queries.push(Query { class: class.to_string(), png: thumbnail(split, index)?, answers });
    }
    Ok(queries)
}

/// All queries as one PNG: a row each, the query on the left, its neighbours framed.
pub(super) fn png(queries: &[Query]) -> std::result::Result<Vec<u8>, String> {
    let cell = THUMBNAIL as u32 + 2 * FRAME;
    let depth = queries.iter().map(|query| query.answers.len()).max().unwrap_or(0) as u32;
    let width = GAP + cell + 2 * GAP + depth * (cell + GAP);
    let height = GAP + queries.len() as u32 * (cell + GAP);
    let mut sheet = RgbImage::from_pixel(width, height, Rgb([255; 3]));
    for (row, query) in queries.iter().enumerate() {
        let y = GAP + row as u32 * (cell + GAP);
        place(&mut sheet, &query.png, GAP, y, [255; 3])?;
        for (column, answer) in query.answers.iter().enumerate() {
            let x = GAP + cell + 2 * GAP + column as u32 * (cell + GAP);
            place(&mut sheet, &answer.png, x, y, if answer.right { RIGHT } else { WRONG })?;
        }
    }
    encode(&sheet)
}

fn place(sheet: &mut RgbImage, png: &str, x: u32, y: u32, frame: [u8; 3]) -> std::result::Result<(), String> {
    let bytes = decode_base64(png).ok_or("a thumbnail is not base64")?;
    let picture = image::load_from_memory(&bytes).map_err(|error| error.to_string())?.into_rgb8();
    let cell = THUMBNAIL as u32 + 2 * FRAME;
    let framed = RgbImage::from_pixel(cell, cell, Rgb(frame));
    imageops::replace(sheet, &framed, x.into(), y.into());
    imageops::replace(sheet, &picture, (x + FRAME).into(), (y + FRAME).into());
    Ok(())
}

fn encode(picture: &RgbImage) -> std::result::Result<Vec<u8>, String> {
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
fn decode_base64(text: &str) -> Option<Vec<u8>> {
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
