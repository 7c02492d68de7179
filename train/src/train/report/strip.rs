//! Test pictures and their nearest neighbours, right and wrong marked.

use image::{Rgb, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use super::pictures::{Thumbnails, decode_base64, encode};
use crate::data::Split;
use crate::{Error, Result};
use ddtas::backend::Nearest;

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

/// A test picture and its nearest neighbours, by their indices in their splits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The picture.
    pub picture: usize,
    /// What was found and its cosine similarity, nearest first.
    pub answers: Vec<(usize, f32)>,
}

/// `count` queries with their first `depth` neighbours, at even distances through the split:
/// chosen before the answers are known.
///
/// `rows[i]` is the index in its split of the picture behind row `i` of `nearest`; `searched` is the same for the
/// indices in `nearest`, which count another split where the set has a gallery.
///
/// # Errors
/// [`Error::LengthMismatch`] if `rows` and `nearest` differ in length.
pub fn choose(
    rows: &[usize],
    searched: &[usize],
    nearest: &Nearest,
    count: usize,
    depth: usize,
) -> Result<Vec<Shown>> {
    if rows.len() != nearest.indices.nrows() {
        let (expected, got) = (nearest.indices.nrows(), rows.len());
        return Err(Error::LengthMismatch { what: "pictures of the neighbour lists", expected, got });
    }
    let count = count.min(rows.len());
    let shown = (0..count).map(|i| {
        // The middle of each of `count` equal stretches.
        let row = (2 * i + 1) * rows.len() / (2 * count);
        let found = nearest.indices.row(row).into_iter().zip(nearest.similarities.row(row)).take(depth);
        let found = found.take_while(|(answer, _)| **answer != Nearest::NONE);
        let answers = found.map(|(&answer, &similarity)| (searched[answer as usize], similarity)).collect();
        Shown { picture: rows[row], answers }
    });
    Ok(shown.collect())
}

/// The pictures and class names of what was chosen from `split`, answered from `searched`: the same, or its gallery.
///
/// # Errors
/// [`Error::Image`] if a picture can no longer be read; [`Error::Dataset`] if the splits are not those chosen from.
pub fn queries(split: &Split, searched: &Split, shown: &[Shown]) -> Result<Vec<Query>> {
    let mut thumbnails = Thumbnails::new(THUMBNAIL)?;
    let mut thumbnail = |split: &Split, index: usize| thumbnails.png(&*split.picture(index)?);
    let mut queries = Vec::with_capacity(shown.len());
    for Shown { picture, answers } in shown {
        let known = *picture < split.len() && answers.iter().all(|(answer, _)| *answer < searched.len());
        if !known {
            return Err(Error::Dataset("the test pictures are fewer than when the run began".into()));
        }
        let answers = answers
            .iter()
            .map(|&(answer, similarity)| {
                Ok(Answer {
                    class: searched.class_name(answer).to_string(),
                    right: searched.labels()[answer] == split.labels()[*picture],
                    similarity,
                    png: thumbnail(searched, answer)?,
                })
            })
            .collect::<Result<_>>()?;
        queries.push(Query {
            class: split.class_name(*picture).to_string(),
            png: thumbnail(split, *picture)?,
            answers,
        });
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
