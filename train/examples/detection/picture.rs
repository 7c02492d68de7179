//! A picture of what was learned: scenes with their objects, and proposals by what they were taken for.

use std::path::Path;

use ddtas_train::Result;
use image::{Rgb, RgbImage, imageops};

use crate::materials::Material;
use crate::sheet;
use crate::street::{Region, SIDE, Scene, Truth};

/// Colours of the kinds (Okabe and Ito: they can be told apart by everyone), by their place in [`Material::ALL`].
const COLOURS: [[u8; 3]; 6] =
    [[90, 90, 90], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0]];
/// Each pixel is drawn this large, with a gap between panels.
const SCALE: u32 = 3;
const GAP: u32 = 6;

/// Writes one column a scene and three rows: the objects, and the proposals that were taken for one before and after.
///
/// # Errors
/// [`ddtas_train::Error::Io`] if the file cannot be written.
pub fn write(path: &Path, scenes: &[Scene], before: &[Truth], after: &[Truth]) -> Result<()> {
    let panel = SIDE as u32 * SCALE + GAP;
    let mut sheet = RgbImage::from_pixel(panel * scenes.len() as u32 + GAP, 3 * panel + GAP, Rgb([255; 3]));
    let mut first = 0;
    for (column, scene) in scenes.iter().enumerate() {
        let boxes = |found: &[Truth]| {
            let of_scene = found[first..first + scene.proposals.len()].iter();
            let taken = scene.proposals.iter().zip(of_scene).filter_map(|((region, _), found)| match found {
                Truth::Object(material) => Some((*material, *region)),
                Truth::Unclear | Truth::Background => None,
            });
            taken.collect::<Vec<_>>()
        };
        for (row, boxes) in [scene.objects.clone(), boxes(before), boxes(after)].iter().enumerate() {
            let (x, y) = (column as u32 * panel + GAP, row as u32 * panel + GAP);
            imageops::replace(&mut sheet, &framed(scene, boxes), i64::from(x), i64::from(y));
        }
        first += scene.proposals.len();
    }
    sheet::write(path, &sheet)
}

/// A scene, washed out, with frames in the colours of their kinds.
fn framed(scene: &Scene, boxes: &[(Material, Region)]) -> RgbImage {
    let side = SIDE as u32;
    let small = RgbImage::from_fn(side, side, |x, y| {
        let at = (y * side + x) as usize;
        Rgb(std::array::from_fn(|c| (160.0 + 90.0 * scene.pixels[c * SIDE * SIDE + at]).round() as u8))
    });
    let mut large = imageops::resize(&small, side * SCALE, side * SCALE, imageops::FilterType::Nearest);
    for (material, region) in boxes {
        let [x, y] = [region.x, region.y].map(|ends| ends.map(|end| end as u32 * SCALE));
        let colour = Rgb(COLOURS[*material as usize]);
        for at in x[0]..x[1] {
            (0..2).for_each(|width| {
                large.put_pixel(at, y[0] + width, colour);
                large.put_pixel(at, y[1] - 1 - width, colour);
            });
        }
        for at in y[0]..y[1] {
            (0..2).for_each(|width| {
                large.put_pixel(x[0] + width, at, colour);
                large.put_pixel(x[1] - 1 - width, at, colour);
            });
        }
    }
    large
}
