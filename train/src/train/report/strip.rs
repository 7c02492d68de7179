//! Queries and their nearest neighbours, with those of the query's class marked.

use image::{Rgb, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use crate::data::Split;
use crate::pages::lettering::{self, LETTER};
use crate::pages::{Thumbnails, base64};
use crate::train::shown::Shown;
use crate::{Error, Result};

/// Side of a thumbnail in pixels.
const THUMBNAIL: usize = 96;
/// Width of the frame that marks an answer as right or wrong.
const FRAME: u32 = 5;
const GAP: u32 = 8;
/// Height of a line of text: one above the columns; below each picture two for the class and one for the similarity.
const LINE: u32 = LETTER + 2;
const CAPTION: u32 = 3 * LINE;
pub(super) const RIGHT: [u8; 3] = [34, 160, 84];
pub(super) const WRONG: [u8; 3] = [214, 58, 58];

/// A query and its nearest neighbours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// Name of its class.
    pub class: String,
    /// The picture as PNG, base64.
    pub png: String,
    /// Its nearest neighbours.
    pub answers: Vec<Answer>,
}

/// A neighbour of a [`Query`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of its class.
    pub class: String,
    /// Whether it is the query's class.
    pub right: bool,
    /// Cosine similarity to the query.
    pub similarity: f32,
    /// The picture as PNG, base64.
    pub png: String,
}

/// The queries `shown` of `split` with their neighbours in `searched`, which is the same split or its gallery; and one
/// picture of all: a row for each query, with the query on the left, its neighbours in frames, and captions below.
///
/// # Errors
/// [`Error::Image`] if a picture can no longer be read; [`Error::Dataset`] if the splits are not those chosen from.
pub fn queries(split: &Split, searched: &Split, shown: &[Shown]) -> Result<(Vec<Query>, RgbImage)> {
    let mut thumbnails = Thumbnails::new(THUMBNAIL)?;
    let mut thumbnail = |split: &Split, index: usize| thumbnails.of(&*split.picture(index)?);
    let depth = shown.iter().map(|shown| shown.answers.len()).max().unwrap_or(0);
    let mut sheet = Sheet::new(shown.len(), depth);
    let mut queries = Vec::with_capacity(shown.len());
    for (row, Shown { picture, answers }) in shown.iter().enumerate() {
        let known = *picture < split.len() && answers.iter().all(|(answer, _)| *answer < searched.len());
        if !known {
            return Err(Error::Dataset("there are fewer test pictures than when the run began".into()));
        }
        let wanted = thumbnail(split, *picture)?;
        sheet.query(row, &wanted, &shown_class(split, *picture));
        let answer = |(column, &(answer, similarity)): (usize, &(usize, f32))| {
            let found = thumbnail(searched, answer)?;
            let right = searched.labels()[answer] == split.labels()[*picture];
            let class = searched.class_name(answer).to_string();
            sheet.answer((row, column), &found, right, (&shown_class(searched, answer), similarity));
            Ok(Answer { class, right, similarity, png: base64(&found)? })
        };
        let answers = answers.iter().enumerate().map(answer).collect::<Result<_>>()?;
        queries.push(Query { class: split.class_name(*picture).to_string(), png: base64(&wanted)?, answers });
    }
    Ok((queries, sheet.picture))
}

/// The class of a picture in the picture of all queries: its name, or its number if the font lacks a letter of it.
fn shown_class(split: &Split, picture: usize) -> String {
    let name = split.class_name(picture);
    let is_drawn = name.chars().all(|letter| lettering::glyph(letter).is_some());
    if is_drawn { name.to_owned() } else { format!("class {}", split.labels()[picture]) }
}

/// Breaks `text` into two lines of at most `most` letters, at a space if possible. The rest is left out.
fn in_two_lines(text: &str, most: usize) -> [String; 2] {
    let letters: Vec<char> = text.chars().collect();
    let end = match letters.get(..=most) {
        Some(start) => start.iter().rposition(|letter| *letter == ' ').unwrap_or(most),
        None => letters.len(),
    };
    let (first, second) = letters.split_at(end);
    [first.iter().collect(), second.iter().skip_while(|letter| **letter == ' ').take(most).collect()]
}

/// The picture of all queries.
struct Sheet {
    picture: RgbImage,
}

impl Sheet {
    const CELL: u32 = THUMBNAIL as u32 + 2 * FRAME;

    fn new(rows: usize, depth: usize) -> Self {
        let width = GAP + Self::CELL + 2 * GAP + depth as u32 * (Self::CELL + GAP);
        let height = Self::y(rows);
        let mut picture = RgbImage::from_pixel(width, height, Rgb([255; 3]));
        lettering::write(&mut picture, "query", (GAP, GAP));
        if depth > 0 {
            lettering::write(&mut picture, "nearest first, with cosine similarity", (Self::x(0), GAP));
        }
        Self { picture }
    }

    /// Left edge of an answer.
    fn x(column: usize) -> u32 {
        GAP + Self::CELL + 2 * GAP + column as u32 * (Self::CELL + GAP)
    }

    /// Upper edge of a row.
    fn y(row: usize) -> u32 {
        GAP + LINE + row as u32 * (Self::CELL + CAPTION + GAP)
    }

    fn query(&mut self, row: usize, thumbnail: &RgbImage, class: &str) {
        self.place(thumbnail, GAP, row, [255; 3]);
        self.caption(GAP, row, class, "");
    }

    fn answer(
        &mut self,
        (row, column): (usize, usize),
        thumbnail: &RgbImage,
        right: bool,
        (class, similarity): (&str, f32),
    ) {
        let x = Self::x(column);
        self.place(thumbnail, x, row, if right { RIGHT } else { WRONG });
        if !right {
            self.break_frame(x, row);
        }
        self.caption(x, row, class, &format!("{similarity:.2}"));
    }

    /// Draws the class in at most two lines, and the similarity in a line below.
    fn caption(&mut self, x: u32, row: usize, class: &str, similarity: &str) {
        let [first, second] = in_two_lines(class, (Self::CELL / LETTER) as usize);
        let lines = [first, second, similarity.to_owned()].into_iter().filter(|line| !line.is_empty());
        let y = Self::y(row) + Self::CELL + 2;
        for (y, line) in (y..).step_by(LINE as usize).zip(lines) {
            lettering::write(&mut self.picture, &line, (x, y));
        }
    }

    /// Draws gaps in the frame of a wrong answer, so that it is recognisable without colour.
    fn break_frame(&mut self, x: u32, row: usize) {
        let y = Self::y(row);
        // Only between the corners.
        for along in (FRAME..Self::CELL - FRAME).filter(|along| along / (2 * FRAME) % 2 == 1) {
            for across in (0..FRAME).chain(Self::CELL - FRAME..Self::CELL) {
                self.picture.put_pixel(x + along, y + across, Rgb([255; 3]));
                self.picture.put_pixel(x + across, y + along, Rgb([255; 3]));
            }
        }
    }

    fn place(&mut self, thumbnail: &RgbImage, x: u32, row: usize, frame: [u8; 3]) {
        let y = Self::y(row);
        let framed = RgbImage::from_pixel(Self::CELL, Self::CELL, Rgb(frame));
        imageops::replace(&mut self.picture, &framed, x.into(), y.into());
        imageops::replace(&mut self.picture, thumbnail, (x + FRAME).into(), (y + FRAME).into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_whose_names_the_font_lacks_are_numbered() {
        let names = ["Möbel 2", "Ωμ", "いす", "椅子", "机"];
        let classes = names.iter().map(|name| ((*name).to_owned(), vec!["a.png".into()])).collect();
        let split = Split::from_files(classes, 0);
        let shown: Vec<String> = (0..names.len()).map(|picture| shown_class(&split, picture)).collect();
        assert_eq!(shown, ["Möbel 2", "Ωμ", "いす", "class 3", "class 4"]);
    }

    #[test]
    fn class_names_are_broken_at_a_space() {
        let lines = |text| in_two_lines(text, 13);
        assert_eq!(lines("Robin"), ["Robin", ""]);
        assert_eq!(lines("Audi S5 Coupe 2012"), ["Audi S5 Coupe", "2012"]);
        assert_eq!(lines("Chrysler Sebring Convertible"), ["Chrysler", "Sebring Conve"]);
        assert_eq!(lines("Pieds-d'alouette"), ["Pieds-d'aloue", "tte"]);
        assert_eq!(lines("thirteen char"), ["thirteen char", ""]);
    }
}
