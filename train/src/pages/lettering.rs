//! Draws text in pictures with a bitmap font of 8 x 8 pixels.

use font8x8::legacy::{BASIC_LEGACY, GREEK_LEGACY, HIRAGANA_LEGACY, LATIN_LEGACY};
use image::{Rgb, RgbImage};

/// Side of a letter in pixels.
pub const LETTER: u32 = 8;

/// Writes `text` in black with its upper left corner at (x, y), clipped to the picture. Letters that the font lacks stay blank.
pub fn write(picture: &mut RgbImage, text: &str, (x, y): (u32, u32)) {
    for (column, letter) in (0..).zip(text.chars()) {
        for (row, line) in (0..).zip(glyph(letter).unwrap_or_default()) {
            for bit in (0..LETTER).filter(|bit| line >> bit & 1 == 1) {
                if let Some(pixel) = picture.get_pixel_mut_checked(x + column * LETTER + bit, y + row) {
                    *pixel = Rgb([0; 3]);
                }
            }
        }
    }
}

/// The rows of a letter, with the leftmost pixel in the lowest bit; none if the font lacks it.
pub fn glyph(letter: char) -> Option<[u8; 8]> {
    let tables: [(u32, &[[u8; 8]]); 4] =
        [(0, &BASIC_LEGACY), (0xa0, &LATIN_LEGACY), (0x390, &GREEK_LEGACY), (0x3040, &HIRAGANA_LEGACY)];
    let code = u32::from(letter);
    let rows = tables.iter().find_map(|(first, table)| table.get(code.checked_sub(*first)? as usize));
    rows.copied().filter(|rows| letter.is_whitespace() || *rows != [0; 8])
}
