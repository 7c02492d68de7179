//! Scenes with objects, and proposals like those of a detector's first stage: boxes near an object, and boxes
//! anywhere.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::materials::{Material, Shape};

/// Side of a scene in pixels.
pub const SIDE: usize = 64;
/// Proposals of every scene.
pub const PROPOSALS: usize = OBJECTS * AROUND + ANYWHERE;
/// Materials of objects; plain is background.
const KINDS: &[Material] = {
    let [_plain, kinds @ ..] = &Material::ALL;
    kinds
};
/// Numbers of objects in a scene, of proposals around each, and of proposals anywhere.
const OBJECTS: usize = 3;
const AROUND: usize = 4;
const ANYWHERE: usize = 8;
/// Number of plain shapes, which are not objects.
const CLUTTER: usize = 5;

/// A box: left, top, right, bottom, in whole pixels, the last two excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub x: [usize; 2],
    pub y: [usize; 2],
}

impl Region {
    /// The box around a centre, clipped to the scene; at least a few pixels wide.
    fn around(centre: [f32; 2], half: [f32; 2]) -> Self {
        let along = |axis: usize| {
            let most = SIDE as f32;
            let from = (centre[axis] - half[axis]).clamp(0.0, most - 4.0).round();
            let to = (centre[axis] + half[axis]).clamp(from + 4.0, most).round();
            [from as usize, to as usize]
        };
        Self { x: along(0), y: along(1) }
    }

    /// Intersection over union.
    pub fn overlap(&self, other: &Self) -> f32 {
        let along = |a: [usize; 2], b: [usize; 2]| a[1].min(b[1]).saturating_sub(a[0].max(b[0]));
        let area = |r: &Self| (r.x[1] - r.x[0]) * (r.y[1] - r.y[0]);
        let both = along(self.x, other.x) * along(self.y, other.y);
        both as f32 / (area(self) + area(other) - both) as f32
    }

    /// The same box, shifted and scaled a little.
    fn jittered(&self, rng: &mut impl Rng) -> Self {
        let sides = [self.x, self.y].map(|[from, to]| (to - from) as f32);
        let centre = [self.x, self.y].map(|[from, to]| (from + to) as f32 / 2.0);
        let mut moved = |axis: usize| centre[axis] + rng.random_range(-0.2..0.2) * sides[axis];
        let centre = [moved(0), moved(1)];
        let mut half = |axis: usize| 0.5 * sides[axis] * rng.random_range(0.75..1.3);
        Self::around(centre, [half(0), half(1)])
    }
}

/// Class of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// An object of this kind, with an overlap of 0.5 or more.
    Object(Material),
    /// An overlap of 0.2 to 0.5: ignored in training and test.
    Unclear,
    Background,
}

impl Truth {
    /// Label in the loss: background is one more class, and unclear regions are ignored.
    pub fn label(self) -> i64 {
        match self {
            Self::Object(material) => material as i64,
            Self::Unclear => -1,
            Self::Background => Material::Plain as i64,
        }
    }
}

/// A scene with its objects and proposals.
pub struct Scene {
    /// `[3, SIDE, SIDE]`, 0 to 1.
    pub pixels: Vec<f32>,
    pub objects: Vec<(Material, Region)>,
    /// The [`PROPOSALS`] proposals.
    pub proposals: Vec<(Region, Truth)>,
}

impl Scene {
    /// Scene number `index` of a seed: the same pixels each time.
    pub fn draw(seed: u64, index: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        let side = SIDE as f32;
        // From back to front: the background, clutter, objects that do not touch each other.
        let mut shapes: Vec<Shape> = (0..=CLUTTER)
            .map(|i| Shape::draw(&mut rng, side, (i > 0).then_some(0.1..0.25), &[Material::Plain]))
            .collect();
        let mut objects: Vec<(Material, Region)> = Vec::new();
        while objects.len() < OBJECTS {
            let shape = Shape::draw(&mut rng, side, Some(0.12..0.2), KINDS);
            let half = reach(&shape);
            let centre = [shape.x, shape.y];
            let within = centre.iter().zip(half).all(|(&at, half)| at - half >= 0.0 && at + half < side);
            let region = Region::around(centre, half);
            if within && objects.iter().all(|(_, other)| other.overlap(&region) == 0.0) {
                objects.push((shape.material, region));
                shapes.push(shape);
            }
        }
        let mut pixels = vec![0.0; 3 * SIDE * SIDE];
        for at in 0..SIDE * SIDE {
            let (x, y) = ((at % SIDE) as f32, (at / SIDE) as f32);
            if let Some(shape) = shapes.iter().rfind(|shape| shape.holds(x, y)) {
                for (c, value) in shape.colour(x, y, &mut rng).into_iter().enumerate() {
                    pixels[c * SIDE * SIDE + at] = value;
                }
            }
        }
        let mut regions: Vec<Region> = Vec::new();
        for (_, object) in &objects {
            regions.extend((0..AROUND).map(|_| object.jittered(&mut rng)));
        }
        for _ in 0..ANYWHERE {
            let mut place = || rng.random_range(8.0..side - 8.0);
            let centre = [place(), place()];
            let mut half = || rng.random_range(0.12..0.2) * side;
            regions.push(Region::around(centre, [half(), half()]));
        }
        let truth = |region: &Region| {
            let overlaps = objects.iter().map(|(material, object)| (*material, object.overlap(region)));
            match overlaps.max_by(|a, b| a.1.total_cmp(&b.1)) {
                Some((material, overlap)) if overlap >= 0.5 => Truth::Object(material),
                Some((_, overlap)) if overlap >= 0.2 => Truth::Unclear,
                _ => Truth::Background,
            }
        };
        let proposals = regions.into_iter().map(|region| (region, truth(&region))).collect();
        Self { pixels, objects, proposals }
    }

    /// Several scenes, in order.
    pub fn several(seed: u64, indices: std::ops::Range<u64>) -> Vec<Self> {
        indices.map(|index| Self::draw(seed, index)).collect()
    }
}

/// Extent of a shape from its centre along x and y, in pixels.
fn reach(shape: &Shape) -> [f32; 2] {
    let (sin, cos) = shape.angle.sin_cos();
    let [a, b] = shape.half;
    let far = |a: f32, b: f32| if shape.ellipse { a.hypot(b) } else { a.abs() + b.abs() };
    [far(a * cos, b * sin), far(a * sin, b * cos)]
}

/// Classes of the proposals of several scenes.
pub fn truths_of(scenes: &[Scene]) -> Vec<Truth> {
    scenes.iter().flat_map(|scene| scene.proposals.iter().map(|(_, truth)| *truth)).collect()
}
