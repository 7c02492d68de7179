//! Scenes with a material for every pixel: regions of six textures, in colours that say nothing about them.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Side of a scene in pixels.
pub const SIDE: usize = 64;
/// Label of a pixel that is left out: its neighbourhood holds two regions.
pub const IGNORED: i64 = -1;
/// Regions painted over the background, one over the other.
const SHAPES: usize = 7;

/// What a region is made of. A colour pair is drawn for each region anew, so that only texture tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Material {
    Plain,
    Stripes,
    Checks,
    Dots,
    Grain,
    Rings,
}

impl Material {
    pub const ALL: [Self; 6] =
        [Self::Plain, Self::Stripes, Self::Checks, Self::Dots, Self::Grain, Self::Rings];

    /// How much of the second colour a pixel has, 0 to 1.
    fn pattern(self, region: &Region, x: f32, y: f32, rng: &mut impl Rng) -> f32 {
        let (sin, cos) = region.angle.sin_cos();
        let (u, v) = ((cos * x + sin * y) / region.period, (cos * y - sin * x) / region.period);
        let smooth = |phase: f32| 0.5 + 0.5 * (std::f32::consts::TAU * phase).sin();
        match self {
            Self::Plain => 0.0,
            Self::Stripes => smooth(u),
            Self::Checks => f32::from((u.floor() as i32 + v.floor() as i32) % 2 == 0),
            Self::Dots => f32::from((u - u.floor() - 0.5).hypot(v - v.floor() - 0.5) < 0.32),
            Self::Grain => rng.random(),
            Self::Rings => smooth((x - region.x).hypot(y - region.y) / region.period),
        }
    }
}

/// A shape on the canvas: an ellipse or a rectangle, turned.
struct Region {
    material: Material,
    colours: [[f32; 3]; 2],
    x: f32,
    y: f32,
    half: [f32; 2],
    angle: f32,
    period: f32,
    ellipse: bool,
}

impl Region {
    fn draw(rng: &mut impl Rng, everywhere: bool) -> Self {
        let side = SIDE as f32;
        let mut colour = || -> [f32; 3] { std::array::from_fn(|_| rng.random()) };
        // Two colours that can be told apart.
        let colours = loop {
            let pair = [colour(), colour()];
            if pair[0].iter().zip(pair[1]).map(|(a, b)| (a - b).abs()).sum::<f32>() > 0.8 {
                break pair;
            }
        };
        let mut half = || if everywhere { 2.0 * side } else { rng.random_range(0.13..0.3) * side };
        Self {
            half: [half(), half()],
            material: Material::ALL[rng.random_range(0..Material::ALL.len())],
            colours,
            x: rng.random_range(0.0..side),
            y: rng.random_range(0.0..side),
            angle: rng.random_range(0.0..std::f32::consts::TAU),
            period: rng.random_range(3.5..6.0),
            ellipse: rng.random(),
        }
    }

    fn holds(&self, x: f32, y: f32) -> bool {
        let (sin, cos) = self.angle.sin_cos();
        let (dx, dy) = (x - self.x, y - self.y);
        let (u, v) = ((cos * dx + sin * dy) / self.half[0], (cos * dy - sin * dx) / self.half[1]);
        if self.ellipse { u * u + v * v <= 1.0 } else { u.abs().max(v.abs()) <= 1.0 }
    }
}

/// A scene and the truth about it.
pub struct Scene {
    /// `[3, SIDE, SIDE]`, 0 to 1.
    pub pixels: Vec<f32>,
    /// `[SIDE, SIDE]`: index of the material, or [`IGNORED`] at a boundary.
    pub labels: Vec<i64>,
}

impl Scene {
    /// Scene number `index` of a seed: the same pixels each time.
    pub fn draw(seed: u64, index: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        let regions: Vec<Region> = (0..=SHAPES).map(|i| Region::draw(&mut rng, i == 0)).collect();
        let top = |x: usize, y: usize| {
            let holds = |region: &Region| region.holds(x as f32, y as f32);
            // The first one is the background, which holds everything.
            regions.iter().rposition(holds).unwrap_or(0)
        };
        let mut scene = Self { pixels: vec![0.0; 3 * SIDE * SIDE], labels: vec![0; SIDE * SIDE] };
        for y in 0..SIDE {
            for x in 0..SIDE {
                let own = top(x, y);
                let region = &regions[own];
                let share = region.material.pattern(region, x as f32, y as f32, &mut rng);
                for c in 0..3 {
                    let [from, to] = region.colours.map(|colour| colour[c]);
                    scene.pixels[(c * SIDE + y) * SIDE + x] = from + (to - from) * share;
                }
                let around = |at: usize| at.saturating_sub(1)..=(at + 1).min(SIDE - 1);
                let inside = around(y).all(|y| around(x).all(|x| top(x, y) == own));
                scene.labels[y * SIDE + x] = if inside { region.material as i64 } else { IGNORED };
            }
        }
        scene
    }

    /// Several scenes, one behind the other.
    pub fn several(seed: u64, indices: std::ops::Range<u64>) -> Vec<Self> {
        indices.map(|index| Self::draw(seed, index)).collect()
    }
}

/// Labels of all pixels of all scenes.
pub fn labels_of(scenes: &[Scene]) -> Vec<i64> {
    scenes.iter().flat_map(|scene| scene.labels.iter().copied()).collect()
}
