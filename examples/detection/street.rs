//! Scenes with several cars, and proposals as a detector's first stage would make them: boxes that
//! hit a car more or less, and boxes that hit nothing.

use ddtas::data::synthetic::Fleet;
use image::{Rgb, RgbImage, imageops};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Side of a scene, and of a region as the network sees it.
pub const SCENE: u32 = 144;
pub const REGION: u32 = 32;
/// Cars of a scene, proposals around each, and boxes drawn anywhere.
pub const CARS: usize = 4;
const AROUND: usize = 4;
const ANYWHERE: usize = 8;

/// A square box: left, top, side, in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Region {
    pub x: f32,
    pub y: f32,
    pub side: f32,
}

impl Region {
    /// Intersection over union.
    pub fn overlap(&self, other: &Self) -> f32 {
        let along = |a: f32, b: f32| (a + self.side).min(b + other.side) - a.max(b);
        let (width, height) = (along(self.x, other.x).max(0.0), along(self.y, other.y).max(0.0));
        let both = width * height;
        both / (self.side.powi(2) + other.side.powi(2) - both)
    }

    /// The same box, shifted and scaled a little, within the scene.
    fn jittered(&self, rng: &mut impl Rng) -> Self {
        let side = self.side * rng.random_range(0.75..1.3);
        let centre = |at: f32, rng: &mut dyn FnMut() -> f32| at + self.side / 2.0 + 0.18 * self.side * rng();
        let mut shift = || rng.random_range(-1.0..1.0f32);
        let (x, y) = (centre(self.x, &mut shift), centre(self.y, &mut shift));
        Self { x: x - side / 2.0, y: y - side / 2.0, side }.within()
    }

    fn within(self) -> Self {
        let side = self.side.min(SCENE as f32);
        let fit = |at: f32| at.clamp(0.0, SCENE as f32 - side);
        Self { x: fit(self.x), y: fit(self.y), side }
    }
}

/// What a proposal is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// A car of this design: overlap of 0.5 or more.
    Car(usize),
    /// Neither: overlap between 0.3 and 0.5, left out of training and counting.
    Unclear,
    Background,
}

/// A scene with its cars and proposals.
pub struct Scene {
    picture: RgbImage,
    pub cars: Vec<(usize, Region)>,
    pub proposals: Vec<(Region, Truth)>,
}

impl Scene {
    /// Scene number `index` of a seed, with cars of `designs`.
    pub fn draw(fleet: &Fleet, designs: std::ops::Range<usize>, seed: u64, index: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        let mut picture = background(&mut rng);
        let mut cars: Vec<(usize, Region)> = Vec::new();
        // A place that is taken is tried again elsewhere; a crowded scene has fewer cars.
        for _ in 0..20 * CARS {
            if cars.len() == CARS {
                break;
            }
            let side = rng.random_range(36..60u32);
            let mut place = || rng.random_range(0..SCENE - side) as f32;
            let region = Region { x: place(), y: place(), side: side as f32 };
            if cars.iter().any(|(_, other)| other.overlap(&region) > 0.0) {
                continue;
            }
            let design = rng.random_range(designs.clone());
            let car = fleet.draw(design, rng.random_range(0..1_000_000));
            let car = imageops::resize(&car, side, side, imageops::FilterType::Triangle);
            imageops::replace(&mut picture, &car, region.x as i64, region.y as i64);
            cars.push((design, region));
        }
        let mut proposals: Vec<Region> = Vec::new();
        for (_, car) in &cars {
            proposals.extend((0..AROUND).map(|_| car.jittered(&mut rng)));
        }
        for _ in 0..ANYWHERE {
            let side = rng.random_range(30.0..64.0);
            let mut place = || rng.random_range(0.0..SCENE as f32 - side);
            proposals.push(Region { x: place(), y: place(), side });
        }
        let truth = |region: &Region| {
            let overlaps = cars.iter().map(|(design, car)| (*design, car.overlap(region)));
            match overlaps.max_by(|a, b| a.1.total_cmp(&b.1)) {
                Some((design, overlap)) if overlap >= 0.5 => Truth::Car(design),
                Some((_, overlap)) if overlap >= 0.3 => Truth::Unclear,
                _ => Truth::Background,
            }
        };
        let proposals = proposals.into_iter().map(|region| (region, truth(&region))).collect();
        Self { picture, cars, proposals }
    }

    /// What the network sees of a region: `[3, REGION, REGION]`, around zero.
    pub fn cut(&self, region: &Region) -> Vec<f32> {
        let (x, y, side) = (region.x as u32, region.y as u32, (region.side as u32).max(1));
        let cut = imageops::crop_imm(&self.picture, x, y, side, side).to_image();
        let small = imageops::resize(&cut, REGION, REGION, imageops::FilterType::Triangle);
        (0..3).flat_map(|c| small.pixels().map(move |pixel| f32::from(pixel.0[c]) / 127.5 - 1.0)).collect()
    }
}

/// A shaded backdrop with boxes in it, some as large as a car.
fn background(rng: &mut impl Rng) -> RgbImage {
    let mut colour = || -> [f32; 3] { std::array::from_fn(|_| rng.random_range(30.0..225.0)) };
    let (top, bottom) = (colour(), colour());
    let boxes: Vec<([f32; 3], Region)> = (0..10)
        .map(|_| {
            let side = rng.random_range(8.0..50.0);
            let mut place = || rng.random_range(-20.0..SCENE as f32);
            let region = Region { x: place(), y: place(), side };
            (std::array::from_fn(|_| rng.random_range(30.0..225.0)), region)
        })
        .collect();
    RgbImage::from_fn(SCENE, SCENE, |x, y| {
        let (fx, fy) = (x as f32, y as f32);
        let inside = |r: &Region| fx >= r.x && fy >= r.y && fx < r.x + r.side && fy < r.y + r.side;
        let boxed = boxes.iter().rfind(|(_, region)| inside(region));
        let share = fy / SCENE as f32;
        let shaded = |c: usize| top[c] + (bottom[c] - top[c]) * share;
        let noise = rng.random_range(-8.0..8.0f32);
        Rgb(std::array::from_fn(|c| {
            let value = boxed.map_or_else(|| shaded(c), |(colour, _)| colour[c]);
            (value + noise).clamp(0.0, 255.0) as u8
        }))
    })
}
