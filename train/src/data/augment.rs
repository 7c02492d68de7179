//! From a picture to the network's input: crop, flip, colour, normalisation.

use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::preprocessing::Preprocessing;
use crate::arguments::defaults;
use crate::error::check;
use crate::vectors::vectorised;
use crate::{Error, Result};

/// Least and largest width : height of a random crop.
const CROP_ASPECT: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);

/// How training pictures are varied.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct AugmentSettings {
    /// Smallest share of a picture's area that a random crop takes; 1 crops to a square only.
    #[arg(long, default_value_t = 0.6, hide_short_help = true)]
    pub smallest_crop: f64,
    /// Probability that a training picture is mirrored; 0 if left and right differ, as in writing.
    #[arg(long, value_name = "PROBABILITY", default_value_t = 0.5, hide_short_help = true)]
    pub flip: f64,
    /// How much the colours of training pictures vary: brightness, contrast and saturation are each multiplied by a
    /// random factor within 1 +- this; 0 if colours tell classes apart.
    #[arg(long, value_name = "SHARE", default_value_t = 0.2, hide_short_help = true)]
    pub jitter: f64,
}

impl Default for AugmentSettings {
    fn default() -> Self {
        defaults()
    }
}

impl AugmentSettings {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let Self { smallest_crop: crop, flip, jitter } = *self;
        check(crop > 0.0 && crop <= 1.0, "smallest-crop", crop, "above 0, at most 1")?;
        check((0.0..=1.0).contains(&flip), "flip", flip, "a probability, 0 to 1")?;
        check((0.0..1.0).contains(&jitter), "jitter", jitter, "0 (none) up to, not with, 1")
    }
}

/// # Errors
/// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) unless `size`, the side of the pictures, is in 8..=1024.
pub(crate) fn check_image_size(size: usize) -> Result<()> {
    check((8..=1024).contains(&size), "image-size", size, "8 to 1024")
}

/// Crops pictures, resizes them to `size` x `size` and writes them as normalised f32 planes (CHW).
///
/// Holds the resizer's buffers, so each thread needs its own ([`another`](Self::another)).
pub struct Cropper {
    resizer: Resizer,
    resized: Image<'static>,
    /// The picture as floats, if `preprocessing` resizes floats.
    source: Vec<f32>,
    /// One row of the resized picture: red, green and blue in separate vectors.
    row: [Vec<f32>; 3],
    size: u32,
    preprocessing: Preprocessing,
}

impl Cropper {
    /// A cropper to `size` x `size` pixels, scaled for `preprocessing`.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) unless `size` is in 8..=1024.
    pub fn new(size: usize, preprocessing: Preprocessing) -> Result<Self> {
        check_image_size(size)?;
        Ok(Self::with_side(size as u32, preprocessing))
    }

    fn with_side(size: u32, preprocessing: Preprocessing) -> Self {
        let pixel_type = if preprocessing.floats { PixelType::F32x3 } else { PixelType::U8x3 };
        let (resized, row) = (Image::new(size, size, pixel_type), vec![0.0; size as usize]);
        Self {
            resizer: Resizer::new(),
            resized,
            source: Vec::new(),
            row: [row.clone(), row.clone(), row],
            size,
            preprocessing,
        }
    }

    /// A cropper with the same size and preprocessing, for another thread.
    pub fn another(&self) -> Self {
        Self::with_side(self.size, self.preprocessing)
    }

    /// Side of the cropped pictures, in pixels.
    pub fn size(&self) -> usize {
        self.size as usize
    }

    /// Number of floats of one picture, 3 x size x size.
    pub fn floats(&self) -> usize {
        3 * self.size() * self.size()
    }

    /// Appends a random resized crop to `pixels`, mirrored at random and with its colours changed.
    ///
    /// # Errors
    /// [`Error::Dataset`] if the picture cannot be resized.
    pub fn train(
        &mut self,
        picture: &RgbImage,
        settings: &AugmentSettings,
        rng: &mut impl Rng,
        pixels: &mut Vec<f32>,
    ) -> Result<()> {
        let crop = random_crop(picture.width(), picture.height(), settings, rng);
        let flip = rng.random_bool(settings.flip);
        let factors: [f32; 3] =
            std::array::from_fn(|_| (1.0 + settings.jitter * rng.random_range(-1.0..=1.0)) as f32);
        self.resize(picture, [0, 0, picture.width(), picture.height()], crop)?;
        self.write(flip, Some(factors), pixels);
        Ok(())
    }

    /// Appends the resized square in the middle of the picture to `pixels`.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn test(&mut self, picture: &RgbImage, pixels: &mut Vec<f32>) -> Result<()> {
        self.resize_middle(picture)?;
        self.write(false, None, pixels);
        Ok(())
    }

    /// The resized square in the middle of the picture as RGB bytes, row by row, for thumbnails.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn thumbnail(&mut self, picture: &RgbImage) -> Result<Vec<u8>> {
        self.resize_middle(picture)?;
        Ok(self.resized.buffer().to_vec())
    }

    /// The square has whole pixels, and nothing beside it is read, as if it were cut out first (torchvision's `center_crop`).
    fn resize_middle(&mut self, picture: &RgbImage) -> Result<()> {
        let side = picture.width().min(picture.height());
        let start = |length: u32| (f64::from(length - side) / 2.0).round_ties_even() as u32;
        let square = [start(picture.width()), start(picture.height()), side, side];
        self.resize(picture, square, [0.0, 0.0, f64::from(side), f64::from(side)])
    }

    /// Resizes `crop` of the `part` of the picture (both left, top, width, height). The filter reaches beyond the crop, but not
    /// beyond the part.
    fn resize(&mut self, picture: &RgbImage, part: [u32; 4], crop: [f64; 4]) -> Result<()> {
        let failed = |reason: String| Error::Dataset(format!("cannot resize a picture: {reason}"));
        let bytes = if self.resized.pixel_type() == PixelType::F32x3 {
            self.source.clear();
            self.source.extend(picture.as_raw().iter().map(|&byte| f32::from(byte)));
            bytemuck::cast_slice(&self.source)
        } else {
            picture.as_raw()
        };
        let source = ImageRef::new(picture.width(), picture.height(), bytes, self.resized.pixel_type())
            .map_err(|e| failed(e.to_string()))?;
        let [left, top, width, height] = part;
        let source =
            CroppedImage::new(&source, left, top, width, height).map_err(|e| failed(e.to_string()))?;
        let [left, top, width, height] = crop;
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .crop(left, top, width, height);
        self.resizer.resize(&source, &mut self.resized, &options).map_err(|e| failed(e.to_string()))
    }

    /// Appends the resized picture to `pixels` as normalised planes.
    fn write(&mut self, flip: bool, jitter: Option<[f32; 3]>, pixels: &mut Vec<f32>) {
        let (size, start) = (self.size as usize, pixels.len());
        pixels.resize(start + 3 * size * size, 0.0);
        let (row, preprocessing) = (&mut self.row, &self.preprocessing);
        let target = &mut pixels[start..];
        if self.resized.pixel_type() == PixelType::F32x3 {
            let floats: Vec<f32> = bytemuck::pod_collect_to_vec(self.resized.buffer());
            vectorised(
                #[inline(always)]
                || write_planes(&floats, size, flip, jitter, preprocessing, row, target),
            );
        } else {
            let bytes = self.resized.buffer();
            vectorised(
                #[inline(always)]
                || write_planes(bytes, size, flip, jitter, preprocessing, row, target),
            );
        }
    }
}

/// The type of a channel's value, 0 to 255.
trait Level: Copy {
    fn value(self) -> f32;
    fn sum(values: &[Self]) -> f32;
}

impl Level for u8 {
    fn value(self) -> f32 {
        f32::from(self)
    }

    fn sum(values: &[Self]) -> f32 {
        values.iter().map(|&byte| u64::from(byte)).sum::<u64>() as f32
    }
}

impl Level for f32 {
    fn value(self) -> f32 {
        self
    }

    fn sum(values: &[Self]) -> f32 {
        values.iter().map(|&value| f64::from(value)).sum::<f64>() as f32
    }
}

/// PERF: works on rows of one channel each, which vectorises; benches/records/2026-11-24-cpu-loader, benches/loader.py.
#[inline(always)]
fn write_planes<T: Level>(
    levels: &[T],
    size: usize,
    flip: bool,
    jitter: Option<[f32; 3]>,
    preprocessing: &Preprocessing,
    row: &mut [Vec<f32>; 3],
    target: &mut [f32],
) {
    let grey_mean = jitter.map_or(0.0, |_| T::sum(levels) / (255 * levels.len()) as f32);
    let [red, green, blue] = row;
    for (y, levels) in levels.chunks_exact(3 * size).enumerate() {
        let values = red.iter_mut().zip(green.iter_mut()).zip(blue.iter_mut());
        for (rgb, ((red, green), blue)) in levels.as_chunks::<3>().0.iter().zip(values) {
            [*red, *green, *blue] = rgb.map(|level| level.value() / 255.0);
        }
        if let Some([brightness, contrast, saturation]) = jitter {
            for ((red, green), blue) in red.iter_mut().zip(green.iter_mut()).zip(blue.iter_mut()) {
                let grey = 0.299 * *red + 0.587 * *green + 0.114 * *blue;
                for value in [red, green, blue] {
                    let saturated = grey + (*value - grey) * saturation;
                    let contrasted = grey_mean + (saturated - grey_mean) * contrast;
                    *value = (contrasted * brightness).clamp(0.0, 1.0);
                }
            }
        }
        for (c, values) in [&*red, &*green, &*blue].into_iter().enumerate() {
            let target = &mut target[(preprocessing.place(c) * size + y) * size..][..size];
            let (mean, deviation) = (preprocessing.mean[c], preprocessing.deviation[c]);
            for (target, &value) in target.iter_mut().zip(values) {
                *target = (value - mean) / deviation;
            }
            if flip {
                target.reverse();
            }
        }
    }
}

/// Left, top, width, height of a random crop, in pixels.
///
/// Draws up to ten times until the crop fits the picture; then takes the largest centred crop of an allowed aspect.
fn random_crop(width: u32, height: u32, settings: &AugmentSettings, rng: &mut impl Rng) -> [f64; 4] {
    let (width, height) = (f64::from(width), f64::from(height));
    let (least, most) = CROP_ASPECT;
    for _ in 0..10 {
        let area = width * height * rng.random_range(settings.smallest_crop..=1.0);
        let aspect = rng.random_range(least.ln()..=most.ln()).exp();
        let (w, h) = ((area * aspect).sqrt(), (area / aspect).sqrt());
        if w <= width && h <= height {
            let left = rng.random_range(0.0..=width - w);
            let top = rng.random_range(0.0..=height - h);
            return [left, top, w, h];
        }
    }
    let aspect = (width / height).clamp(least, most);
    let (w, h) = (width.min(height * aspect), height.min(width / aspect));
    [(width - w) / 2.0, (height - h) / 2.0, w, h]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn random_crops_fill_the_range_of_areas_shapes_and_places() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let settings = AugmentSettings { smallest_crop: 0.25, ..AugmentSettings::default() };
        // Area, shape, and place between the borders, of each crop.
        let crops: Vec<[f64; 4]> = (0..2000)
            .map(|_| {
                let [left, top, width, height] = random_crop(200, 200, &settings, &mut rng);
                let aspect = (width / height).ln() / (4.0f64 / 3.0).ln();
                [width * height / 40_000.0, aspect, left / (200.0 - width), top / (200.0 - height)]
            })
            .collect();
        // A large crop fits in few shapes, so there are fewer of these: the mean area is below 0.625.
        let wanted = [(0.25, 1.0, 0.564), (-1.0, 1.0, 0.0), (0.0, 1.0, 0.5), (0.0, 1.0, 0.5)];
        for (of, (least, most, mean)) in wanted.into_iter().enumerate() {
            let values = || crops.iter().map(|crop| crop[of]);
            let (low, high) =
                values().fold((f64::MAX, f64::MIN), |(l, h), value| (l.min(value), h.max(value)));
            let room = 0.03 * (most - least);
            assert!(low >= least - 1e-9 && low < least + room, "{of}: the least is {low}");
            assert!(high <= most + 1e-9 && high > most - 3.0 * room, "{of}: the most is {high}");
            let found = values().sum::<f64>() / 2000.0;
            assert!((found - mean).abs() < 2.0 * room, "{of}: the mean is {found}");
        }
    }

    #[test]
    fn a_picture_too_narrow_for_any_crop_is_cropped_in_its_middle() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let settings = AugmentSettings::default();
        assert_eq!(random_crop(300, 30, &settings, &mut rng), [130.0, 0.0, 40.0, 30.0]);
        assert_eq!(random_crop(30, 300, &settings, &mut rng), [0.0, 130.0, 30.0, 40.0]);
    }

    #[test]
    fn colours_are_saturated_then_contrasted_then_brightened() {
        let plain = Preprocessing { mean: [0.0; 3], deviation: [1.0; 3], ..Preprocessing::default() };
        let pixels: Vec<u8> = (0..12).map(|at| (at * 53 % 256) as u8).collect();
        let mean = pixels.iter().map(|&byte| f64::from(byte)).sum::<f64>() / (12.0 * 255.0);
        let factors = [1.4f32, 0.7, 1.2];
        let (mut row, mut got) = (std::array::from_fn(|_| vec![0.0; 2]), vec![0.0; 12]);
        write_planes(&pixels, 2, false, Some(factors), &plain, &mut row, &mut got);
        let [brightness, contrast, saturation] = factors.map(f64::from);
        for (at, rgb) in pixels.chunks(3).enumerate() {
            let [red, green, blue] = [0, 1, 2].map(|c| f64::from(rgb[c]) / 255.0);
            let grey = 0.299 * red + 0.587 * green + 0.114 * blue;
            for (c, value) in [red, green, blue].into_iter().enumerate() {
                let saturated = grey + (value - grey) * saturation;
                let want = ((mean + (saturated - mean) * contrast) * brightness).clamp(0.0, 1.0);
                let got = f64::from(got[c * 4 + at]);
                assert!((got - want).abs() < 1e-6, "pixel {at}, channel {c}: {got}, not {want}");
            }
        }
        assert!(got.contains(&1.0), "nothing is too bright");
    }

    #[test]
    fn brightness_varies_to_both_sides() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let settings = AugmentSettings { jitter: 0.3, ..AugmentSettings::default() };
        let mut cropper = Cropper::new(8, Preprocessing::symmetric()).unwrap();
        let picture = RgbImage::from_pixel(9, 9, image::Rgb([102; 3]));
        let mut brightness = || {
            let mut pixels = Vec::new();
            cropper.train(&picture, &settings, &mut rng, &mut pixels).unwrap();
            (pixels[0] * 0.5 + 0.5) / 0.4
        };
        let drawn: Vec<f32> = (0..300).map(|_| brightness()).collect();
        let (low, high) = drawn.iter().fold((2.0f32, 0.0f32), |(l, h), &value| (l.min(value), h.max(value)));
        assert!((0.69..0.73).contains(&low) && (1.27..1.31).contains(&high), "{low} to {high}");
    }

    #[test]
    fn pictures_resized_as_floats_are_not_rounded_to_bytes() {
        let ramp = RgbImage::from_fn(16, 16, |x, _| image::Rgb([x as u8; 3]));
        let rounded = |preprocessing: Preprocessing| {
            let mut pixels = Vec::new();
            Cropper::new(12, preprocessing).unwrap().test(&ramp, &mut pixels).unwrap();
            let byte = |at: usize| {
                let value = pixels[at] * preprocessing.deviation[0] + preprocessing.mean[0];
                (255.0 * value).fract()
            };
            (0..12).all(|at| byte(at) < 1e-3 || byte(at) > 0.999)
        };
        assert!(rounded(Preprocessing::default()) && rounded(Preprocessing::symmetric()));
        assert!(!rounded(Preprocessing::centred()));
    }
}
