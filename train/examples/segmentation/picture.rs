//! A picture of the results: scene, truth, and the nearest prototype of every pixel before and after training.

use std::path::Path;

use ddtas_train::Result;
use image::{Rgb, RgbImage, imageops};

use crate::materials::Material;
use crate::scenes::{SIDE, Scene};
use crate::sheet::Sheet;

/// Colours of the materials: the palette of Okabe and Ito, which is safe for colour-blind readers.
const COLOURS: [[u8; 3]; 6] =
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0]];
const BOUNDARY: [u8; 3] = [0, 0, 0];
/// Side of a scene's pixel in the picture.
const SCALE: u32 = 2;

/// Writes a column for each scene, with four rows: scene, truth, before and after training.
///
/// # Errors
/// [`ddtas_train::Error::Io`] if the file cannot be written.
pub fn write(path: &Path, scenes: &[Scene], before: &[usize], after: &[usize]) -> Result<()> {
    let side = SIDE as u32;
    let names = ["scene", "truth", "untrained", "trained"];
    let key = Material::ALL.into_iter().zip(COLOURS);
    let mut sheet = Sheet::new(scenes.len(), side * SCALE, &names, key);
    for (column, scene) in scenes.iter().enumerate() {
        let material = |values: &[usize], at: usize| COLOURS[values[column * SIDE * SIDE + at]];
        let pixel = |at: usize| -> [u8; 3] {
            std::array::from_fn(|c| (scene.pixels[c * SIDE * SIDE + at] * 255.0).round() as u8)
        };
        let truth = |at: usize| usize::try_from(scene.labels[at]).map_or(BOUNDARY, |label| COLOURS[label]);
        let rows: [&dyn Fn(usize) -> [u8; 3]; 4] =
            [&pixel, &truth, &|at| material(before, at), &|at| material(after, at)];
        for (row, colour) in rows.into_iter().enumerate() {
            let small = RgbImage::from_fn(side, side, |x, y| Rgb(colour((y * side + x) as usize)));
            let large = imageops::resize(&small, side * SCALE, side * SCALE, imageops::FilterType::Nearest);
            sheet.place(column, row, &large);
        }
    }
    sheet.write(path)
}
