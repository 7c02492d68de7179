//! Scenes with a material for every pixel.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::materials::{Material, Shape};

/// Side of a scene in pixels.
pub const SIDE: usize = 64;
/// Label of an ignored pixel, with more than one shape in its neighbourhood.
pub const IGNORED: i64 = -1;
/// Number of shapes over the background, which may overlap.
const SHAPES: usize = 7;

/// A scene and its true labels.
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
        let side = SIDE as f32;
        let shapes: Vec<Shape> = (0..=SHAPES)
            // The first shape is the background, which covers everything.
            .map(|i| Shape::draw(&mut rng, side, (i > 0).then_some(0.13..0.3), &Material::ALL))
            .collect();
        let top = |x: usize, y: usize| {
            let holds = |shape: &Shape| shape.holds(x as f32, y as f32);
            shapes.iter().rposition(holds).unwrap_or(0)
        };
        let mut scene = Self { pixels: vec![0.0; 3 * SIDE * SIDE], labels: vec![0; SIDE * SIDE] };
        for y in 0..SIDE {
            for x in 0..SIDE {
                let own = top(x, y);
                let shape = &shapes[own];
                for (c, value) in shape.colour(x as f32, y as f32, &mut rng).into_iter().enumerate() {
                    scene.pixels[(c * SIDE + y) * SIDE + x] = value;
                }
                let around = |at: usize| at.saturating_sub(1)..=(at + 1).min(SIDE - 1);
                let inside = around(y).all(|y| around(x).all(|x| top(x, y) == own));
                scene.labels[y * SIDE + x] = if inside { shape.material as i64 } else { IGNORED };
            }
        }
        scene
    }

    /// Several scenes, in order.
    pub fn several(seed: u64, indices: std::ops::Range<u64>) -> Vec<Self> {
        indices.map(|index| Self::draw(seed, index)).collect()
    }
}

/// Labels of all pixels of all scenes.
pub fn labels_of(scenes: &[Scene]) -> Vec<i64> {
    scenes.iter().flat_map(|scene| scene.labels.iter().copied()).collect()
}
