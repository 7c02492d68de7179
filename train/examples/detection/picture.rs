//! A picture of the results: scenes with their objects, and the proposals classified as objects.

use std::path::Path;

use ddtas_train::Result;
use image::{Rgb, RgbImage, imageops};

use crate::materials::Material;
use crate::sheet::Sheet;
use crate::street::{Region, SIDE, Scene, Truth};

/// Colours of the kinds in the order of [`Material::ALL`]: the palette of Okabe and Ito, which is safe for
/// colour-blind readers.
const COLOURS: [[u8; 3]; 6] =
    [[90, 90, 90], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0]];
/// Side of a scene's pixel in the picture.
const SCALE: u32 = 3;
/// Most boxes drawn for each object, and most that overlap no object.
const MOST: usize = 3;

/// Writes a column for each scene with three rows: the objects, and the proposals classified as one before and after
/// training.
///
/// # Errors
/// [`ddtas_train::Error::Io`] if the file cannot be written.
pub fn write(path: &Path, scenes: &[Scene], before: &[Truth], after: &[Truth]) -> Result<()> {
    let names = ["truth", "untrained", "trained"];
    // The first material, plain, is background.
    let key = Material::ALL.into_iter().zip(COLOURS).skip(1);
    let mut sheet = Sheet::new(scenes.len(), SIDE as u32 * SCALE, &names, key);
    let mut first = 0;
    for (column, scene) in scenes.iter().enumerate() {
        let boxes = |found: &[Truth]| {
            let of_scene = found[first..first + scene.proposals.len()].iter();
            let taken = scene.proposals.iter().zip(of_scene).filter_map(|((region, _), found)| match found {
                Truth::Object(material) => Some((*material, *region)),
                Truth::Unclear | Truth::Background => None,
            });
            best(scene, taken.collect())
        };
        for (row, boxes) in [scene.objects.clone(), boxes(before), boxes(after)].iter().enumerate() {
            sheet.place(column, row, &framed(scene, boxes));
        }
        first += scene.proposals.len();
    }
    sheet.write(path)
}

/// The [`MOST`] of `boxes` with the largest overlap for each object of a scene, and as many that overlap none.
fn best(scene: &Scene, mut boxes: Vec<(Material, Region)>) -> Vec<(Material, Region)> {
    let hit = |region: &Region| {
        let overlaps = scene.objects.iter().map(|(_, object)| object.overlap(region)).enumerate();
        let best = overlaps.max_by(|a, b| a.1.total_cmp(&b.1)).filter(|(_, overlap)| *overlap > 0.0);
        best.map_or((scene.objects.len(), 0.0), |best| best)
    };
    boxes.sort_by(|(_, a), (_, b)| hit(b).1.total_cmp(&hit(a).1));
    let mut drawn = vec![0; scene.objects.len() + 1];
    boxes.retain(|(_, region)| {
        let (object, _) = hit(region);
        drawn[object] += 1;
        drawn[object] <= MOST
    });
    boxes
}

/// A scene in pale colours, with boxes in the colours of their kinds.
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
