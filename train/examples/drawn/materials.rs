//! Shapes with six textures, in random colours, for the scenes of the examples.

use std::ops::Range;

use rand::{Rng, RngExt};

/// Texture of a shape. Its two colours are random for each shape, so that only texture identifies the material.
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

    /// Share of the second colour in a pixel, 0 to 1.
    fn pattern(self, shape: &Shape, x: f32, y: f32, rng: &mut impl Rng) -> f32 {
        let (sin, cos) = shape.angle.sin_cos();
        let (u, v) = ((cos * x + sin * y) / shape.period, (cos * y - sin * x) / shape.period);
        let smooth = |phase: f32| 0.5 + 0.5 * (std::f32::consts::TAU * phase).sin();
        match self {
            Self::Plain => 0.0,
            Self::Stripes => smooth(u),
            Self::Checks => f32::from((u.floor() as i32 + v.floor() as i32) % 2 == 0),
            Self::Dots => f32::from((u - u.floor() - 0.5).hypot(v - v.floor() - 0.5) < 0.32),
            Self::Grain => rng.random(),
            Self::Rings => smooth((x - shape.x).hypot(y - shape.y) / shape.period),
        }
    }
}

/// A rotated ellipse or rectangle.
#[derive(Debug, Clone)]
pub struct Shape {
    pub material: Material,
    colours: [[f32; 3]; 2],
    /// Centre, in pixels.
    pub x: f32,
    pub y: f32,
    /// Half axes, in pixels.
    pub half: [f32; 2],
    pub angle: f32,
    period: f32,
    pub ellipse: bool,
}

impl Shape {
    /// A random shape in a scene of `side` pixels. The half axes are random shares of the side in the range
    /// `halves`; without it, the shape covers the whole scene.
    pub fn draw(rng: &mut impl Rng, side: f32, halves: Option<Range<f32>>, materials: &[Material]) -> Self {
        let mut colour = || -> [f32; 3] { std::array::from_fn(|_| rng.random()) };
        // Two colours that differ clearly.
        let colours = loop {
            let pair = [colour(), colour()];
            if pair[0].iter().zip(pair[1]).map(|(a, b)| (a - b).abs()).sum::<f32>() > 0.8 {
                break pair;
            }
        };
        let mut half = || halves.clone().map_or(2.0 * side, |shares| rng.random_range(shares) * side);
        Self {
            half: [half(), half()],
            material: materials[rng.random_range(0..materials.len())],
            colours,
            x: rng.random_range(0.0..side),
            y: rng.random_range(0.0..side),
            angle: rng.random_range(0.0..std::f32::consts::TAU),
            period: rng.random_range(3.5..6.0),
            ellipse: rng.random(),
        }
    }

    pub fn holds(&self, x: f32, y: f32) -> bool {
        let (sin, cos) = self.angle.sin_cos();
        let (dx, dy) = (x - self.x, y - self.y);
        let (u, v) = ((cos * dx + sin * dy) / self.half[0], (cos * dy - sin * dx) / self.half[1]);
        if self.ellipse { u * u + v * v <= 1.0 } else { u.abs().max(v.abs()) <= 1.0 }
    }

    /// Colour of a pixel inside the shape, 0 to 1.
    pub fn colour(&self, x: f32, y: f32, rng: &mut impl Rng) -> [f32; 3] {
        let share = self.material.pattern(self, x, y, rng);
        let [from, to] = self.colours;
        std::array::from_fn(|c| from[c] + (to[c] - from[c]) * share)
    }
}
