//! Draws text in pictures with a bitmap font of 8 x 8 pixels.

use font8x8::legacy::{BASIC_LEGACY, LATIN_LEGACY};
use image::{Rgb, RgbImage};

/// Side of a letter in pixels.
pub const LETTER: u32 = 8;

/// Writes `text` in black with its upper left corner at (x, y), clipped to the picture.
pub fn write(picture: &mut RgbImage, text: &str, (x, y): (u32, u32)) {
    for (column, letter) in (0..).zip(text.chars()) {
        for (row, line) in (0..).zip(glyph(letter)) {
            for bit in (0..LETTER).filter(|bit| line >> bit & 1 == 1) {
                if let Some(pixel) = picture.get_pixel_mut_checked(x + column * LETTER + bit, y + row) {
                    *pixel = Rgb([0; 3]);
                }
            }
        }
    }
}

/// The rows of a letter, with the leftmost pixel in the lowest bit; a question mark if the font lacks it.
fn glyph(letter: char) -> [u8; 8] {
    match u32::from(letter) as usize {
        code @ 0..0x80 => BASIC_LEGACY[code],
        code @ 0xa0..0x100 => LATIN_LEGACY[code - 0xa0],
        _ => BASIC_LEGACY[usize::from(b'?')],
    }
}
